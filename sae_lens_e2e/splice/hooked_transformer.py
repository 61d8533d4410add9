"""The fast path: a HookedTransformer resumed at the SAE's own block, nothing before it run twice."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens.util import extract_layer_from_tlens_hook_name
from torch import Tensor
from transformer_lens import HookedTransformer
from typing_extensions import override

from sae_lens_e2e.splice.attention import fused_attention
from sae_lens_e2e.splice.base import CleanPass, Splice, SplicedPass, unknown_hook
from sae_lens_e2e.splice.unembedding import LinearHead

_Hook = tuple[str | Callable[..., Any], Callable[..., Any]]


@dataclass(frozen=True)
class _Resume:
    """The residual stream entering block `layer`, and what every block is called with besides."""

    residual: Float[Tensor, "batch pos d_model"]
    block_inputs: dict[str, Tensor | None]


class HookedTransformerSplice(Splice):
    """Splices into a `HookedTransformer`, resuming at the block that holds the hook, or that it is the input of."""

    model: HookedTransformer

    def __init__(
        self,
        model: HookedTransformer,
        hook_name: str,
        hook_head_index: int | None = None,
        downstream_hooks: Sequence[str] = (),
        model_kwargs: Mapping[str, Any] | None = None,
    ):
        super().__init__(model, hook_name, hook_head_index, downstream_hooks)
        for field, hook in [("hook_name", hook_name), *(("downstream_hooks", h) for h in downstream_hooks)]:
            if hook not in model.hook_dict:
                raise unknown_hook(field, hook, list(model.hook_dict))
        self.model_kwargs = dict(model_kwargs or {})
        self.layer, self.enters_layer = _place(hook_name, model.cfg.n_layers)
        bias = model.unembed.b_U
        self.head = LinearHead(
            model.unembed.W_U.detach(),
            bias.detach() if bool(bias.any()) else None,
            model.cfg.output_logits_soft_cap if (model.cfg.output_logits_soft_cap or 0) > 0 else None,
        )

    @property
    @override
    def n_ctx(self) -> int | None:
        return self.model.cfg.n_ctx

    @property
    @override
    def later_blocks(self) -> list[str]:
        return [f"blocks.{layer}.hook_resid_pre" for layer in range(self.layer + 1, self.model.cfg.n_layers)]

    @property
    @override
    def last_layer(self) -> str:
        return f"blocks.{self.model.cfg.n_layers - 1}.hook_resid_post"

    @property
    @override
    def later_layers(self) -> list[str]:
        # After the last block there are none, and its output is behind the hook.
        return super().later_layers if self.layer < self.model.cfg.n_layers else []

    @override
    def clean(self, tokens: Int[Tensor, "batch pos"], stop_at_hook: bool = False) -> CleanPass:
        cache: dict[str, Tensor] = {}
        captures: list[_Hook] = [(hook, _capture(cache, hook)) for hook in {self.hook_name, *self.downstream_hooks}]
        with torch.no_grad(), self.model.hooks(fwd_hooks=captures):
            residual, _, shortformer, mask = self.model.input_to_embed(tokens)
            blocks = {"shortformer_pos_embed": shortformer, "attention_mask": mask}
            with self._attention(mask):
                residual = self._blocks(residual, 0, self.layer, blocks)
                if self.enters_layer:
                    cache[self.hook_name] = residual
                if stop_at_hook and self.layer < self.model.cfg.n_layers:
                    if not self.enters_layer:
                        self._blocks(residual, self.layer, self.layer + 1, blocks)
                    self._check_called(cache)
                    return CleanPass(cache[self.hook_name], {}, None)
                final = self._to_final(residual, blocks)
        self._check_called(cache, *self.downstream_hooks)
        downstream = {hook: cache[hook] for hook in self.downstream_hooks}
        return CleanPass(cache[self.hook_name], downstream, final, _Resume(residual, blocks))

    @override
    def spliced(self, clean: CleanPass, activation: Tensor) -> SplicedPass:
        cache: dict[str, Tensor] = {}
        resume: _Resume = clean.resume
        residual = activation if self.enters_layer else resume.residual
        hooks: list[_Hook] = [(hook, _capture(cache, hook)) for hook in self.downstream_hooks]
        if not self.enters_layer:
            hooks.append((self.hook_name, lambda _, hook: activation))  # noqa: ARG005
        with self.model.hooks(fwd_hooks=hooks), self._attention(resume.block_inputs["attention_mask"]):
            final = self._to_final(residual, resume.block_inputs)
        return SplicedPass(cache, final)

    def _check_called(self, cache: dict[str, Tensor], *downstream_hooks: str) -> None:
        for field, hook in [("hook_name", self.hook_name), *(("downstream_hooks", h) for h in downstream_hooks)]:
            if hook not in cache:
                raise ValueError(
                    f"{field}: the model has a hook {hook!r} but does not call it; TransformerLens calls some only if the "
                    "model's config turns them on, such as use_attn_result for attn.hook_result"
                )

    def _blocks(self, residual: Tensor, start: int, stop: int, block_inputs: dict[str, Tensor | None]) -> Tensor:
        """Run blocks start to stop - 1; stopping at a layer, the model returns the residual stream that enters it."""
        return self.model(residual, start_at_layer=start, stop_at_layer=stop, **block_inputs, **self.model_kwargs)  # pyright: ignore[reportReturnType]

    def _to_final(self, residual: Tensor, block_inputs: dict[str, Tensor | None]) -> Float[Tensor, "batch pos d_model"]:
        residual = self._blocks(residual, self.layer, self.model.cfg.n_layers, block_inputs)
        return residual if self.model.cfg.normalization_type is None else self.model.ln_final(residual)

    @contextmanager
    def _attention(self, attention_mask: Tensor | None) -> Iterator[None]:
        # Rows that are all padding come out of the two kernels differently.
        with nullcontext() if attention_mask is not None else fused_attention(self.model):
            yield


def _place(hook_name: str, n_layers: int) -> tuple[int, bool]:
    """The block to resume at, and whether the hook is the residual stream that enters it."""
    if hook_name.startswith("ln_final."):
        return n_layers, False
    block = extract_layer_from_tlens_hook_name(hook_name)
    if block is None:
        raise ValueError(
            f"hook_name={hook_name!r} is not in a block; choose a hook of a block, such as "
            f"blocks.{n_layers // 2}.hook_resid_pre"
        )
    if hook_name.endswith(".hook_resid_post"):
        return block + 1, True
    return block, hook_name == f"blocks.{block}.hook_resid_pre"


def _capture(cache: dict[str, Tensor], name: str) -> Callable[..., None]:
    def store(activation: Tensor, hook: Any, *, name: str) -> None:  # noqa: ARG001
        cache[name] = activation

    return partial(store, name=name)
