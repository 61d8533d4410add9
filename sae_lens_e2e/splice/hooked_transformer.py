"""Which models are TransformerLens' own implementation, or could be, told without importing it: its version 4 has none."""

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer


def is_hooked_transformer(model: Any) -> "TypeGuard[HookedTransformer]":
    """Whether a model is a `HookedTransformer`, which whoever made it has imported."""
    module = sys.modules.get("transformer_lens.HookedTransformer")
    return module is not None and isinstance(model, module.HookedTransformer)


def official_model_name(name: str) -> str | None:
    """What the Hub calls a model that TransformerLens loads as a `HookedTransformer`; None if it knows none of that name."""
    try:
        from transformer_lens.loading_from_pretrained import get_official_model_name

        return get_official_model_name(name)
    except (ImportError, ValueError):
        return None
