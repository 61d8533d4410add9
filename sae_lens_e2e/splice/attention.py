"""TransformerLens attention through PyTorch's fused kernel, where nobody looks at its scores.

TransformerLens writes out every (head, query, key) score and pattern so that they can be hooked. When no hook is on them
that is most of a short-context model's time and memory. Its forward pass calls three methods between the projections; while
`fused_attention` is in force they keep q and k aside and let `scaled_dot_product_attention` do the work.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sae_lens_e2e.splice.hooked_transformer import is_hooked_transformer

if TYPE_CHECKING:
    from transformer_lens.components.abstract_attention import AbstractAttention

SCORE_HOOKS = ("hook_attn_scores", "hook_pattern")


@contextmanager
def fused_attention(model: nn.Module) -> Iterator[None]:
    """Compute the same attention with the fused kernel wherever it allows that, until the block is left.

    Whether it does is asked at each call: a layer whose scores or pattern somebody hooks, a padded batch and a key-value cache
    are computed as TransformerLens writes them. Models other than a `HookedTransformer` bring their own kernels.
    """
    layers = [block.attn for block in model.blocks] if is_hooked_transformer(model) else []
    # Within itself it has nothing left to do.
    fused = [_Fused(attention) for attention in layers if is_fusible(attention) and not _Fused.is_in(attention)]
    for layer in fused:
        layer.install()
    try:
        yield
    finally:
        for layer in fused:
            layer.remove()


def is_fusible(attention: "AbstractAttention") -> bool:
    """Whether a layer's scores and pattern are an ordinary causal softmax."""
    # Whoever has such a layer has these.
    from transformer_lens.components.attention import Attention
    from transformer_lens.components.grouped_query_attention import GroupedQueryAttention

    cfg = attention.cfg
    return (
        type(attention) in (Attention, GroupedQueryAttention)
        and cfg.attention_dir == "causal"
        and cfg.positional_embedding_type in ("standard", "rotary", "shortformer")
        and not (cfg.attn_scores_soft_cap or 0) > 0
        and not cfg.use_attention_sinks
    )


class _Fused:
    """Stands in for one attention layer's score, mask and pattern-times-value methods."""

    METHODS = ("calculate_attention_scores", "apply_causal_mask", "calculate_z_scores")

    def __init__(self, attention: "AbstractAttention"):
        self.attention = attention
        self.plain_scores = attention.calculate_attention_scores
        self.plain_mask = attention.apply_causal_mask
        self.plain_z = attention.calculate_z_scores
        self.kept: tuple[Tensor, Tensor] | None = None

    @classmethod
    def is_in(cls, attention: "AbstractAttention") -> bool:
        return cls.METHODS[0] in vars(attention)

    def install(self) -> None:
        for method in self.METHODS:
            setattr(self.attention, method, getattr(self, method))

    def remove(self) -> None:
        for method in self.METHODS:
            delattr(self.attention, method)

    def calculate_attention_scores(self, q: Tensor, k: Tensor) -> Tensor:
        if any(getattr(self.attention, hook).has_hooks() for hook in SCORE_HOOKS):
            self.kept = None
            return self.plain_scores(q, k)
        self.kept = (q, k)
        # What the caller masks and takes the softmax of, for nobody to use.
        return q.new_zeros(1, 1, 1, 1)

    def apply_causal_mask(
        self, attn_scores: Tensor, past_kv_pos_offset: int = 0, attention_mask: Tensor | None = None
    ) -> Tensor:
        # Rows that are all padding come out of the two kernels differently, and a cache has keys before these queries.
        if self.kept is not None and (attention_mask is not None or past_kv_pos_offset):
            attn_scores, self.kept = self.plain_scores(*self.kept), None
        return attn_scores if self.kept else self.plain_mask(attn_scores, past_kv_pos_offset, attention_mask)

    def calculate_z_scores(self, v: Tensor, pattern: Tensor) -> Tensor:
        if self.kept is None:
            return self.plain_z(v, pattern)
        (q, k), self.kept = self.kept, None
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        # Grouped-query attention: each key and value head serves several query heads.
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) if t.shape[1] < q.shape[1] else t for t in (k, v))
        window = self._window(q)
        z = F.scaled_dot_product_attention(
            q,
            k.to(q.dtype),
            v.to(q.dtype),
            window,
            is_causal=window is None,
            scale=1 / float(self.attention.attn_scale),
        )
        return self.attention.hook_z(z.transpose(1, 2).to(v.dtype))

    def _window(self, q: Tensor) -> Tensor | None:
        """0 where a local layer may look and -inf where not, (1, 1, query, key); None for plain causal attention."""
        cfg = self.attention.cfg
        n_pos = q.shape[2]
        if self.attention.attn_type != "local" or n_pos <= (cfg.window_size or 0):
            return None
        return self.plain_mask(torch.zeros(1, 1, n_pos, n_pos, dtype=q.dtype, device=q.device))
