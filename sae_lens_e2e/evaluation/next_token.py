"""How far the next-token distributions of a language model move, without ever holding all logits."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_e2e.evaluation.sums import at_least_float32
from sae_lens_e2e.splice.unembedding import Head, LinearHead, LogitsHead, chunk_size

NO_TOKEN = -1
"""Stands for the token after the last, which is not known."""


@torch.no_grad()
def compare_next_tokens(
    head: Head,
    clean: Float[Tensor, "tokens d_final"],
    changed: Sequence[Float[Tensor, "tokens d_final"]],
    next_tokens: Int[Tensor, "tokens"],
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Per-token measures of the clean model, and of each changed one beside it, from what the head takes.

    Of every model, over the tokens whose next token is known (is not NO_TOKEN):
        ce: the cross-entropy -log p(next token), in nats;
        top1_accuracy: 1 where the likeliest token is the next one.
    Of each changed model, over all tokens:
        kl: KL(clean ‖ changed) = Σ p (log p - log q), in nats;
        top1_agreement: 1 where both models' likeliest tokens are the same;
        statistical_distance: the total variation ½ Σ |p - q|.
    Softmax and sums are in float32 or better. Memory is a few buffers of chunk x d_vocab.
    """
    of_clean: dict[str, list[Tensor]] = defaultdict(list)
    of_changed: list[dict[str, list[Tensor]]] = [defaultdict(list) for _ in changed]
    for rows in _chunks(head, clean):
        targets = next_tokens[rows]
        log_p = log_probabilities(head, clean[rows])
        p, likeliest = log_p.exp(), log_p.argmax(-1)
        _append(of_clean, _prediction(log_p, likeliest, targets))
        for final, measures in zip(changed, of_changed, strict=True):
            log_q = log_probabilities(head, final[rows])
            also_likeliest = log_q.argmax(-1)
            _append(measures, _prediction(log_q, also_likeliest, targets))
            agreement = (likeliest == also_likeliest).to(p.dtype)
            kl = torch.linalg.vecdot(p, log_p - log_q)
            distance = log_q.exp_().sub_(p).abs_().sum(-1) / 2
            _append(measures, {"kl": kl, "top1_agreement": agreement, "statistical_distance": distance})
    return _joined(of_clean), [_joined(measures) for measures in of_changed]


def log_probabilities(head: Head, hidden: Float[Tensor, "tokens d_final"]) -> Float[Tensor, "tokens d_vocab"]:
    """The language model's log p of every next token, in float32 or better."""
    if isinstance(head, LogitsHead):
        return at_least_float32(head.logits(hidden)).log_softmax(-1)
    assert isinstance(head, LinearHead)
    logits = at_least_float32(hidden.to(head.weight.dtype) @ head.weight)
    if head.bias is not None:
        logits += head.bias
    if head.soft_cap is not None:
        logits.div_(head.soft_cap).tanh_().mul_(head.soft_cap)
    return logits.log_softmax(-1)


def d_vocab(head: Head) -> int:
    """How many next tokens the model tells apart."""
    if isinstance(head, LogitsHead):
        return head.d_vocab
    assert isinstance(head, LinearHead)
    return head.weight.shape[1]


def _chunks(head: Head, hidden: Tensor) -> Iterator[slice]:
    chunk = chunk_size(d_vocab(head), torch.promote_types(hidden.dtype, torch.float32), hidden.device)
    return (slice(start, start + chunk) for start in range(0, len(hidden), chunk))


def _prediction(log_p: Tensor, likeliest: Tensor, targets: Tensor) -> dict[str, Tensor]:
    known = targets != NO_TOKEN
    ce = -log_p.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    return {"ce": ce[known], "top1_accuracy": (likeliest == targets)[known].to(log_p.dtype)}


def _append(lists: dict[str, list[Tensor]], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        lists[name].append(value)


def _joined(lists: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat(values) for name, values in lists.items()}
