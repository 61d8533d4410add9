"""How far the next-token distributions of a language model move, without ever holding all logits."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_e2e.splice import NO_LABEL, Unembedding


@torch.no_grad()
def compare_next_tokens(
    unembedding: Unembedding,
    clean: Float[Tensor, "tokens d_final"],
    changed: Sequence[Float[Tensor, "tokens d_final"]],
    labels: Int[Tensor, "tokens"],
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Per-token measures of the clean model, and of each changed one beside it, from what the unembedding takes.

    Of every model, over the tokens whose next token is known (`labels` are not NO_LABEL):
        ce: the cross-entropy -log p(next token), in nats;
        top1_accuracy: 1 where the likeliest token is the next one.
    Of each changed model, over all tokens:
        kl: KL(clean ‖ changed) = Σ p (log p - log q), in nats;
        top1_agreement: 1 where both models' likeliest tokens are the same;
        statistical_distance: the total variation ½ Σ |p - q|.
    Softmax and sums are in float32 or better. Memory is a few buffers of chunk x d_vocab. Labels on the host keep everything
    there that would wait for a device.
    """
    labels = labels.cpu()
    known, on_device = labels != NO_LABEL, labels.clamp(min=0).to(clean.device)
    of_clean: dict[str, list[Tensor]] = defaultdict(list)
    of_changed: list[dict[str, list[Tensor]]] = [defaultdict(list) for _ in changed]
    for rows in unembedding.chunks(clean):
        targets = on_device[rows, None], known[rows].nonzero()[:, 0].to(clean.device)
        log_p = unembedding.logits(clean[rows]).log_softmax(-1)
        p, likeliest = log_p.exp(), log_p.argmax(-1)
        _append(of_clean, _prediction(log_p, likeliest, *targets))
        for final, measures in zip(changed, of_changed, strict=True):
            log_q = unembedding.logits(final[rows]).log_softmax(-1)
            also_likeliest = log_q.argmax(-1)
            _append(measures, _prediction(log_q, also_likeliest, *targets))
            agreement = (likeliest == also_likeliest).to(p.dtype)
            kl = (log_p - log_q).mul_(p).sum(-1)
            distance = log_q.exp_().sub_(p).abs_().sum(-1) / 2
            _append(measures, {"kl": kl, "top1_agreement": agreement, "statistical_distance": distance})
    return _joined(of_clean), [_joined(measures) for measures in of_changed]


def _prediction(
    log_p: Tensor, likeliest: Tensor, labels: Int[Tensor, "rows 1"], known: Int[Tensor, "known"]
) -> dict[str, Tensor]:
    ce, hit = -log_p.gather(-1, labels)[:, 0], likeliest == labels[:, 0]
    return {"ce": ce[known], "top1_accuracy": hit[known].to(log_p.dtype)}


def _append(lists: dict[str, list[Tensor]], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        lists[name].append(value)


def _joined(lists: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat(values) for name, values in lists.items()}
