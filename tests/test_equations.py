"""The engine against the paper's equations, written out naively: two whole passes, all logits, softmax by name.

In float64, so that agreement to 1e-7 leaves no room for a term that is merely close.
"""

from typing import Any

import pytest
import torch
from sae_lens import BatchTopKTrainingSAEConfig, StandardTrainingSAEConfig
from torch import Tensor
from transformer_lens import HookedTransformer

from sae_lens_e2e import E2E, E2EDownstream, Local, Objective
from sae_lens_e2e.splice import frozen
from tests.models import random_model, random_tokens
from tests.pairwise import pairwise
from tests.training import gradients, make_runner, make_trainer, runner_config

DOWNSTREAM = ("blocks.2.hook_resid_pre", "blocks.2.mlp.hook_post", "blocks.2.hook_resid_post")
OBJECTIVES = [
    Local(),
    E2E(),
    E2E(kl_coefficient=0.7, mse_coefficient=0.3),
    E2EDownstream(downstream_hooks=DOWNSTREAM),
    E2EDownstream(kl_coefficient=0.2, downstream_coefficient=1.7, downstream_hooks=DOWNSTREAM[:1], mse_coefficient=0.1),
]
PLACES = [
    ("blocks.1.hook_resid_pre", None, 16),
    ("blocks.1.hook_resid_post", None, 16),
    ("blocks.1.hook_mlp_out", None, 16),
    ("blocks.1.attn.hook_z", None, 16),
    ("blocks.1.attn.hook_z", 2, 4),
    ("blocks.0.hook_resid_mid", None, 16),
]
L1 = 0.02
N_PROMPTS, N_POS = 4, 12


def naive_loss(
    model: HookedTransformer,
    sae: Any,
    objective: Objective,
    hook_name: str,
    head: int | None,
    tokens: Tensor,
    mask: Tensor,
) -> Tensor:
    """The loss of Braun et al. (2024), section 2, over the positions in `mask`."""
    hooks = objective.hooks

    def keep(store: dict[str, Tensor]) -> Any:
        def hook_fn(activation: Tensor, hook: Any) -> None:
            store[hook.name] = activation

        return hook_fn

    clean: dict[str, Tensor] = {}
    clean_logits = model.run_with_hooks(tokens, fwd_hooks=[(h, keep(clean)) for h in {hook_name, *hooks}])
    original = clean[hook_name]
    x = (original if head is None else original[:, :, head]).flatten(2)

    features = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
    x_hat = features @ sae.W_dec + sae.b_dec
    sparsity = (features * sae.W_dec.norm(dim=1)).sum(-1)[mask].mean()
    mse = ((x_hat - x) ** 2).sum(-1)[mask].mean()
    loss = L1 * sparsity + getattr(objective, "mse_coefficient", 0.0) * mse
    if isinstance(objective, Local):
        return loss

    replaced = torch.where(mask[..., None], x_hat, x)
    if head is None:
        put_in = replaced.reshape(original.shape)
    else:
        put_in = torch.stack([replaced if h == head else original[:, :, h] for h in range(original.shape[2])], 2)
    spliced: dict[str, Tensor] = {}
    spliced_logits = model.run_with_hooks(
        tokens,
        fwd_hooks=[(hook_name, lambda _, hook: put_in), *((h, keep(spliced)) for h in hooks)],  # noqa: ARG005
    )
    p, q = clean_logits.softmax(-1), spliced_logits.softmax(-1)
    kl = (p * (p / q).log()).sum(-1)[mask].mean()
    loss = loss + objective.kl_coefficient * kl  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(objective, E2EDownstream):
        errors = [((spliced[h] - clean[h])[mask] ** 2).mean() for h in hooks]
        loss = loss + objective.downstream_coefficient * sum(errors) / len(errors)
    return loss


@pytest.mark.parametrize(
    ("objective", "normalization_type", "place", "masked"),
    pairwise(OBJECTIVES, ("LN", "RMS"), PLACES, (False, True)),
    ids=lambda v: f"{v.name}-{v.mse_coefficient}" if isinstance(v, Objective) else str(v),  # pyright: ignore[reportAttributeAccessIssue]
)
def test_engine_matches_the_equations(
    objective: Objective, normalization_type: str, place: tuple[str, int | None, int], masked: bool
) -> None:
    hook_name, head, d_in = place
    model = random_model(normalization_type, dtype=torch.float64)
    tokens = random_tokens(N_PROMPTS, N_POS, 61)
    excluded = [0, 1, 2, 3, 4, 5, 6, 7]
    cfg = runner_config(
        sae=StandardTrainingSAEConfig(d_in=d_in, d_sae=40, l1_coefficient=L1, decoder_init_norm=0.7, dtype="float64"),
        objective=objective,
        hook_name=hook_name,
        hook_head_index=head,
        exclude_special_tokens=excluded if masked else False,
        seqpos_slice=(1, -2) if masked else (None,),
        store_batch_size_prompts=1,
        train_batch_size_tokens=N_PROMPTS * (N_POS - 3 if masked else N_POS),
        context_size=N_POS,
    )
    trainer = make_trainer(make_runner(cfg, model))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    if masked:
        mask = ~torch.isin(tokens, torch.tensor(excluded))
        mask[:, 0] = mask[:, -2:] = False
        assert 0 < mask.sum() < 0.9 * mask.numel()

    with frozen(model):
        found = gradients(trainer, tokens)
        step = trainer.step(tokens)
        sae = make_runner(cfg, model).sae  # as it was before the step, from the same seed
        expected_loss = naive_loss(model, sae, objective, hook_name, head, tokens, mask)
        expected_loss.backward()

    torch.testing.assert_close(step.loss, expected_loss.detach(), rtol=1e-7, atol=0)
    for name, parameter in sae.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_looking_at_a_gradient_changes_nothing() -> None:
    tokens = random_tokens(N_PROMPTS, N_POS, 61)
    sae = BatchTopKTrainingSAEConfig(d_in=16, d_sae=40, k=4)
    steps = []
    for look in (False, True):
        trainer = make_trainer(make_runner(runner_config(sae=sae, objective="e2e")))
        if look:
            assert all(gradient.any() for gradient in gradients(trainer, tokens).values())
            assert trainer.n_training_samples == trainer.n_training_steps == trainer.n_frac_active_samples == 0
            assert all(p.grad is None for p in trainer.sae.parameters())
        loss = trainer.step(tokens).loss
        steps.append((loss, trainer.sae.state_dict(), trainer.act_freq_scores, trainer.n_forward_passes_since_fired))
    torch.testing.assert_close(steps[0], steps[1], rtol=0, atol=0)
