"""Evaluation against sums written out, and against SAELens' own figures."""

from typing import Any

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata

from sae_lens_e2e.evaluation import evaluate
from tests.models import dataset_of, random_model, random_tokens


def sae_at(hook_name: str, excluded: list[int] | bool = False) -> StandardSAE:
    metadata = SAEMetadata(hook_name=hook_name, context_size=12, prepend_bos=False, exclude_special_tokens=excluded)
    torch.manual_seed(0)
    sae = StandardSAE(StandardSAEConfig(d_in=16, d_sae=40, metadata=metadata))
    with torch.no_grad():
        sae.W_dec.mul_(0.2)
        sae.b_enc[:3] = -100.0
    return sae


@pytest.mark.parametrize("excluded", [False, [1, 2, 3, 4, 5]], ids=["all-tokens", "excluded"])
def test_every_figure_is_its_definition(excluded: list[int] | bool) -> None:
    model, hook = random_model(), "blocks.1.hook_resid_pre"
    sae, tokens = sae_at(hook, excluded), random_tokens(10, 12, 61)
    found = evaluate(sae, model, dataset_of(tokens), batch_size_prompts=4)

    tokens = tokens[:8]  # whole batches
    mask = ~torch.isin(tokens, torch.tensor(excluded or []))
    with torch.no_grad():
        logits: Any
        spliced_logits: Any
        logits, cache = model.run_with_cache(tokens)
        x = cache[hook]
        features = sae.encode(x)
        x_hat = torch.where(mask[..., None], sae.decode(features), x)
        with model.hooks(fwd_hooks=[(hook, lambda _, hook: x_hat)]):  # noqa: ARG005
            spliced_logits, spliced = model.run_with_cache(tokens)
    log_p, log_q = logits.log_softmax(-1), spliced_logits.log_softmax(-1)
    next_tokens, predicting = tokens[:, 1:, None], mask[:, :-1]

    def ce(log_probs: torch.Tensor) -> float:
        return float(-log_probs[:, :-1].gather(-1, next_tokens)[..., 0][predicting].mean())

    assert found.ce_loss_without_sae == pytest.approx(ce(log_p), rel=1e-4)
    assert found.ce_loss_with_sae == pytest.approx(ce(log_q), rel=1e-4)
    assert found.ce_loss_increase == pytest.approx(ce(log_q) - ce(log_p), rel=1e-3)
    assert found.kl == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1)[mask].mean()), rel=1e-4)
    fired = features[mask] != 0
    assert found.l0 == pytest.approx(float(fired.sum(-1).float().mean()), rel=1e-5)
    assert found.n_alive == int(fired.any(0).sum()) <= 37
    assert found.n_tokens == 8 * 12
    assert list(found.downstream_mse) == ["blocks.2.hook_resid_pre", "blocks.2.hook_resid_post"]
    for name, mse in found.downstream_mse.items():
        assert mse == pytest.approx(float((spliced[name] - cache[name])[mask].square().mean()), rel=1e-4)
    assert found.to_dict()["ce_loss_increase"] == found.ce_loss_increase


def test_named_downstream_hooks_and_too_little_data() -> None:
    model, sae = random_model(), sae_at("blocks.1.hook_resid_pre")
    dataset = dataset_of(random_tokens(4, 12, 61))
    hooks = ("blocks.2.hook_mlp_out",)
    assert tuple(evaluate(sae, model, dataset, batch_size_prompts=4, downstream_hooks=hooks).downstream_mse) == hooks
    with pytest.raises(ValueError, match="batch_size_prompts=5"):
        evaluate(sae, model, dataset, batch_size_prompts=5)
