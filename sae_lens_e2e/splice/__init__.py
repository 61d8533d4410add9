"""Run a language model clean, and again from a hook on with an SAE's output spliced in."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformer_lens import HookedTransformer
from transformer_lens.HookedRootModule import HookedRootModule

from sae_lens_e2e.splice.base import CleanPass, Splice, SplicedPass, frozen
from sae_lens_e2e.splice.hooked_transformer import HookedTransformerSplice
from sae_lens_e2e.splice.module import ModuleSplice

__all__ = ["CleanPass", "Splice", "SplicedPass", "frozen", "make_splice"]


def make_splice(
    model: HookedRootModule,
    hook_name: str,
    hook_head_index: int | None = None,
    downstream_hooks: Sequence[str] = (),
    model_kwargs: Mapping[str, Any] | None = None,
) -> Splice:
    """The fastest way there is to splice into `model`. Raises ValueError for a hook the model does not have."""
    kind = HookedTransformerSplice if isinstance(model, HookedTransformer) else ModuleSplice
    return kind(model, hook_name, hook_head_index, downstream_hooks, model_kwargs)  # pyright: ignore[reportArgumentType]
