"""Which module of a language model is its unembedding, and how the logits come from its input."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sae_lens_e2e.splice.anatomy import Anatomy
from sae_lens_e2e.splice.hooks import first_output
from sae_lens_e2e.splice.unembedding import LinearUnembedding, ModuleUnembedding, Unembedding, soft_capped


@torch.no_grad()
def find_unembedding(anatomy: Anatomy) -> tuple[nn.Module | None, Unembedding]:
    """The module whose input decides the logits, and how; both checked against the model's own logits on a few tokens.

    Where there is no such module, None and an unembedding that takes logits for what they are.
    """
    captured: list[Tensor] = []
    module = anatomy.unembed
    handles = []
    if module is not None:
        handles.append(module.register_forward_pre_hook(lambda module, args: captured.append(given_to(module, args))))
    try:
        logits = logits_of(anatomy.root(anatomy.probe_tokens(), **anatomy.forward_kwargs))
    finally:
        for handle in handles:
            handle.remove()
    for candidate in _candidates(module, anatomy.soft_cap, logits.shape[-1]) if captured else ():
        expected = candidate.logits(captured[0].flatten(0, -2)).reshape(*captured[0].shape[:-1], -1)
        if expected.shape == logits.shape and torch.allclose(expected, logits.to(expected), rtol=1e-3, atol=1e-3):
            return module, candidate
    return None, ModuleUnembedding(lambda all_logits: all_logits, logits.shape[-1])


def given_to(unembed: nn.Module, args: tuple[Any, ...]) -> Tensor:
    """What an unembedding is called with, where its weights are: of a model that is spread over devices, that may be elsewhere."""
    weight = next(unembed.parameters(), None)
    return args[0] if weight is None or weight.is_meta else args[0].to(weight.device)


def logits_of(output: Any) -> Tensor:
    """The logits in whatever a language model returns."""
    return output.logits if hasattr(output, "logits") else first_output(output)


def _candidates(module: Any, soft_cap: float | None, d_vocab: int) -> Iterator[Unembedding]:
    if isinstance(weight := getattr(module, "W_U", None), Tensor):  # TransformerLens' names
        yield LinearUnembedding(weight.detach(), module.b_U.detach(), soft_cap)
    # Weights that are kept elsewhere until they are needed are on no device here.
    elif type(module) is nn.Linear and not module.weight.is_meta:
        yield LinearUnembedding(
            module.weight.detach().T, None if module.bias is None else module.bias.detach(), soft_cap
        )
    # Some other map, capped or not by the model around it.
    yield ModuleUnembedding(module, d_vocab)
    if soft_cap:
        yield ModuleUnembedding(lambda hidden: soft_capped(module(hidden), soft_cap), d_vocab)
