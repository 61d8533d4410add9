"""TransformerLens' bridge to Hugging Face models: telling one, loading one, and what else its SAEs run on."""

from collections.abc import Mapping
from typing import Any

import torch
from sae_lens.util import str_to_dtype
from torch import nn

try:
    from transformer_lens.model_bridge import TransformerBridge
except ImportError:
    TransformerBridge: Any = None

MODEL_CLASS = "TransformerBridge"

# At these hooks an unprocessed HookedTransformer and a bridge compute the same (a test compares them).
_SAME_IN_HOOKED_TRANSFORMER = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")


def is_bridge(model: nn.Module) -> bool:
    """Whether a model is a `TransformerBridge`."""
    return TransformerBridge is not None and isinstance(model, TransformerBridge)


def check_has_bridge() -> None:
    """Raise ValueError if this TransformerLens has no bridge."""
    if TransformerBridge is None:
        raise ValueError(
            f"model_class_name={MODEL_CLASS!r} needs transformer-lens 3.9 or later, which this is not; "
            "pip install 'transformer-lens>=3.9'"
        )


def load_bridge(model_name: str, device: str | torch.device | None, kwargs: Mapping[str, Any] | None = None) -> Any:
    """The bridge to a model of the Hub, or to a `hf_model=` and `tokenizer=` in `kwargs`, unprocessed.

    `kwargs` are `boot_transformers`' own, `dtype` by its name if that is given. Raises ValueError if this TransformerLens has no
    bridge, or for a dtype that there is not.
    """
    check_has_bridge()
    given = dict(kwargs or {})
    if isinstance(given.get("dtype"), str):
        given["dtype"] = str_to_dtype(given["dtype"])
    return TransformerBridge.boot_transformers(model_name, device=device, **given)


def hooked_transformer_hook(model: nn.Module, hook_name: str) -> str | None:
    """The name by which an unprocessed HookedTransformer has the same activation; None if it may not.

    By the bridge's own aliases; only hooks of the residual stream and of what attention and MLP write to it are sure to agree.
    """
    if not is_bridge(model):
        return None
    hooks: Any = model.hook_dict
    names = [name for name, point in hooks.items() if point is hooks.get(hook_name)]
    return next((name for name in names if name.split(".")[-1] in _SAME_IN_HOOKED_TRANSFORMER), None)
