"""Several SAEs in one spliced pass against the equations, written out naively: whole passes with plain hooks, all logits.

What is observed is the production loop itself: a runner's group, a real step, and the gradients that its optimizers are given.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from sae_lens import BatchTopKTrainingSAEConfig, StandardTrainingSAEConfig, TopKTrainingSAEConfig
from torch import Tensor
from typing_extensions import override

from sae_lens_e2e import E2E, Batch, CrossEntropy, E2EDownstream, E2EMultiTrainingRunner, Local, Objective, Term
from sae_lens_e2e.splice import Site, SplicedModel, frozen
from sae_lens_e2e.training.group import Group
from sae_lens_e2e.training.setup import step_plan
from sae_lens_e2e.training.step import step
from tests.models import any_model, block_output, inside_block, random_tokens, run_with_hooks
from tests.pairwise import pairwise
from tests.saes import randomised
from tests.training import group_gradients, make_multi_runner, multi_config

N_PROMPTS, N_POS = 4, 12
TOKENS = random_tokens(N_PROMPTS, N_POS, 61)
EXCLUDED = list(range(16))
KINDS = ("HookedTransformer", "TransformerBridge", "llama", "gemma2", "qwen3", "gpt_neox", "mamba")
OBJECTIVES = (
    Local(),
    E2E(),
    E2E(kl_coefficient=0.7, mse_coefficient=0.3),
    E2EDownstream(),
    E2EDownstream(kl_coefficient=0.2, downstream_coefficient=1.7, mse_coefficient=0.1),
    CrossEntropy(),
    CrossEntropy(ce_coefficient=0.6, mse_coefficient=0.2),
)


def sites_of(kind: str, n: int) -> dict[str, Site]:
    """Two inside one block, one of them on a head where the model has heads, and for three one that all blocks after it see."""
    mlp, before = inside_block(kind, 1)
    with_heads = kind in ("HookedTransformer", "TransformerBridge")
    sites = {
        "second": Site.of_sae("blocks.1.attn.hook_z", 2) if with_heads else Site.of_sae(before),
        "third": Site.of_sae(mlp),
        "first": Site.of_sae(block_output(kind, 0)),
    }
    return dict(list(sites.items())[:n])


def make_runner(
    kind: str,
    sites: Mapping[str, Site],
    objective: Objective,
    masked: bool = False,
    n_micro: int = 1,
    splice: SplicedModel | None = None,
    **overrides: Any,
) -> E2EMultiTrainingRunner:
    """A runner of standard SAEs that differ in size and sparsity, with no weight at zero or one."""
    d_in = {name: 16 if site.head_index is None else 4 for name, site in sites.items()}
    saes = {
        name: (site, StandardTrainingSAEConfig(d_in=d_in[name], d_sae=20 + 4 * i, l1_coefficient=0.02 * (i + 1)))
        for i, (name, site) in enumerate(sites.items())
    }
    settings: dict[str, Any] = {
        "model_class_name": kind if "Transformer" in kind else "AutoModelForCausalLM",
        "objective": objective,
        "exclude_special_tokens": EXCLUDED if masked else False,
        "seqpos_slice": (2, None) if masked else (None,),
        "store_batch_size_prompts": N_PROMPTS // n_micro,
        "train_batch_size_tokens": N_PROMPTS * (N_POS - 2 if masked else N_POS),
        "training_tokens": 5 * N_PROMPTS * N_POS,
    }
    runner = make_multi_runner(multi_config(saes, **(settings | overrides)), any_model(kind), splice)
    for i, sae in enumerate(runner.saes.values()):
        randomised(sae, seed=i)
    return runner


def mask_of(masked: bool) -> Tensor:
    """The positions that count, worked out by hand."""
    mask = torch.ones(TOKENS.shape, dtype=torch.bool)
    if masked:
        mask = ~torch.isin(TOKENS, torch.tensor(EXCLUDED))
        mask[:, :2] = False
        # Micro-batches are not alike, so that a mean of their means would be another.
        assert mask[:2].sum() != mask[2:].sum()
    return mask


@dataclass(frozen=True)
class Naive:
    """One pass by the equations: the objective's loss, and each SAE's sparsity and reconstruction losses."""

    objective_loss: Tensor
    l1: Mapping[str, Tensor]
    mse: Mapping[str, Tensor]

    @property
    def loss(self) -> Tensor:
        return self.objective_loss + torch.stack(list(self.l1.values())).sum()


def naive_pass(model: Any, runner: E2EMultiTrainingRunner, names: Collection[str], mask: Tensor) -> Naive:
    """Braun et al. (2024), section 2, for the SAEs in `names` at once, over the positions in `mask`."""
    objective, sites, saes = runner.objective, runner.cfg.sites, runner.saes
    l1: dict[str, Tensor] = {}
    mse: dict[str, Tensor] = {}

    def reconstruction(name: str, x: Tensor) -> Tensor:
        sae: Any = saes[name]
        features = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
        x_hat = features @ sae.W_dec + sae.b_dec
        l1[name] = sae.cfg.l1_coefficient * (features * sae.W_dec.norm(dim=1)).sum(-1)[mask].mean()
        mse[name] = ((x_hat - x) ** 2).sum(-1)[mask].mean()
        return torch.where(mask[..., None], x_hat, x)

    def replace(name: str) -> Callable[[Tensor], Tensor]:
        head = sites[name].head_index

        def hook(activation: Tensor) -> Tensor:
            if head is None:
                return reconstruction(name, activation.flatten(2)).reshape(activation.shape)
            heads = list(activation.unbind(2))
            heads[head] = reconstruction(name, heads[head])
            return torch.stack(heads, 2)

        return hook

    def keep_only(name: str) -> Callable[[Tensor], Tensor]:
        return lambda activation: (replace(name)(activation), activation)[1]

    local = isinstance(objective, Local)  # each SAE is given clean activations
    change = {sites[name].read: (keep_only if local else replace)(name) for name in names}
    clean_logits, clean = run_with_hooks(model, TOKENS, {}, objective.hooks)
    logits, spliced = run_with_hooks(model, TOKENS, change, objective.hooks)

    loss = getattr(objective, "mse_coefficient", 0.0) * torch.stack(list(mse.values())).sum()
    if isinstance(objective, E2E | E2EDownstream):
        log_p, log_q = clean_logits.log_softmax(-1), logits.log_softmax(-1)
        loss = loss + objective.kl_coefficient * (log_p.exp() * (log_p - log_q)).sum(-1)[mask].mean()
    if isinstance(objective, E2EDownstream):
        errors = [((spliced[hook] - clean[hook])[mask] ** 2).mean() for hook in objective.hooks]
        loss = loss + objective.downstream_coefficient * sum(errors) / len(errors)
    if isinstance(objective, CrossEntropy):
        # Of every token that counts and is followed by another.
        surprise = -logits[:, :-1].log_softmax(-1).gather(-1, TOKENS[:, 1:, None])[..., 0]
        loss = loss + objective.ce_coefficient * surprise[mask[:, :-1]].mean()
    return Naive(loss, l1, mse)


def naive_gradients(loss: Tensor, saes: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for name, sae in saes.items():
        parameters = dict(sae.named_parameters())
        grads = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
        found[name] = dict(zip(parameters, grads, strict=True))
    return found


def assert_gradients(
    found: Mapping[str, Mapping[str, Tensor]], expected: Mapping[str, Mapping[str, Tensor]], rtol: float
) -> None:
    """Each parameter's within `rtol` of its largest entry."""
    assert found.keys() == expected.keys()
    for sae, of_sae in expected.items():
        assert found[sae].keys() == of_sae.keys()
        for name, gradient in of_sae.items():
            scale = gradient.abs().max()
            assert scale > 0
            off = (found[sae][name] - gradient).abs().max() / scale
            assert off < rtol, f"{sae}.{name}: {float(off):.1e} off"


@pytest.mark.parametrize(
    ("kind", "objective", "n_saes", "masked", "n_micro"),
    pairwise(KINDS, OBJECTIVES, (2, 3), (False, True), (1, 2)),
    ids=lambda v: f"{v.name}-{v.mse_coefficient}" if isinstance(v, Objective) else str(v),  # pyright: ignore[reportAttributeAccessIssue]
)
def test_several_saes_match_the_equations(
    kind: str, objective: Objective, n_saes: int, masked: bool, n_micro: int
) -> None:
    runner = make_runner(kind, sites_of(kind, n_saes), objective, masked, n_micro)
    model, mask = runner.model, mask_of(masked)
    with frozen(model):
        naive = naive_pass(model, runner, runner.saes, mask)
        expected = naive_gradients(naive.loss, runner.saes)
    group = runner.make_group()
    with runner.splice.running():
        found = group_gradients(group, TOKENS)
        group.step(TOKENS)

    assert_gradients(found, expected, 1e-5)
    for name, output in group.outputs.items():
        torch.testing.assert_close(output.loss, naive.loss.detach(), rtol=1e-6, atol=0)
        torch.testing.assert_close(output.losses["l1_loss"], naive.l1[name].detach(), rtol=2e-6, atol=0)
        if getattr(objective, "mse_coefficient", 0):
            torch.testing.assert_close(output.losses["mse_loss"], naive.mse[name].detach(), rtol=2e-6, atol=0)


def test_the_compared_hooks_come_after_the_last_of_the_saes() -> None:
    for kind, hooks in {"HookedTransformer": ["blocks.2.hook_resid_pre"], "llama": ["model.layers.1"]}.items():
        runner = make_runner(kind, sites_of(kind, 3), E2EDownstream())
        assert list(runner.objective.hooks) == hooks


def test_two_heads_of_one_hook_match_the_equations() -> None:
    sites = {f"head{i}": Site.of_sae("blocks.1.attn.hook_z", i) for i in (3, 1)}
    runner = make_runner("HookedTransformer", sites, E2E(mse_coefficient=0.3), masked=True, n_micro=2)
    # Plain hooks go by name, so both heads in one.
    with frozen(runner.model):
        naive = naive_pass_of_heads(runner, mask_of(True))
        expected = naive_gradients(naive, runner.saes)
    group = runner.make_group()
    assert list(group.sites) == ["head1", "head3"]
    with runner.splice.running():
        assert_gradients(group_gradients(group, TOKENS), expected, 1e-5)


def naive_pass_of_heads(runner: E2EMultiTrainingRunner, mask: Tensor) -> Tensor:
    losses: list[Tensor] = []

    def hook(activation: Tensor) -> Tensor:
        heads = list(activation.unbind(2))
        for name, site in runner.cfg.sites.items():
            sae: Any = runner.saes[name]
            assert site.head_index is not None
            x = heads[site.head_index]
            features = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
            x_hat = features @ sae.W_dec + sae.b_dec
            losses.append(sae.cfg.l1_coefficient * (features * sae.W_dec.norm(dim=1)).sum(-1)[mask].mean())
            losses.append(0.3 * ((x_hat - x) ** 2).sum(-1)[mask].mean())
            heads[site.head_index] = torch.where(mask[..., None], x_hat, x)
        return torch.stack(heads, 2)

    clean, _ = run_with_hooks(runner.model, TOKENS, {})
    logits, _ = run_with_hooks(runner.model, TOKENS, {"blocks.1.attn.hook_z": hook})
    log_p, log_q = clean.log_softmax(-1), logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)[mask].mean() + torch.stack(losses).sum()


# What is done with the gradient


def given_to_optimizers(group: Group) -> dict[str, dict[str, Tensor]]:
    """Filled, in the group's next step, with the gradients that each optimizer is given."""
    found: dict[str, dict[str, Tensor]] = {}

    def keep(name: str, sae: Any) -> Callable[..., None]:
        return lambda *_: found.update({name: {n: p.grad.clone() for n, p in sae.named_parameters()}})

    for name, trainer in group.trainers.items():
        trainer.optimizer.register_step_pre_hook(keep(name, trainer.sae))
    return found


def grad_norm(group: Group) -> float:
    """Before clipping, as it is logged for each of the SAEs."""
    (norm,) = {float(output.metrics["grad_norm"]) for output in group.outputs.values()}  # pyright: ignore[reportArgumentType]
    return norm


def test_the_gradient_is_clipped_over_all_the_saes_together() -> None:
    runner = make_runner("HookedTransformer", sites_of("HookedTransformer", 3), E2E(), max_grad_norm=0.01)
    group = runner.make_group()
    with runner.splice.running():
        whole = group_gradients(group, TOKENS)
        given = given_to_optimizers(group)
        group.step(TOKENS)
    norm = math.sqrt(sum(float(g.square().sum()) for of_sae in whole.values() for g in of_sae.values()))
    assert norm > 0.1
    clipped = {sae: {name: g * 0.01 / norm for name, g in of_sae.items()} for sae, of_sae in whole.items()}
    assert_gradients(given, clipped, 1e-4)
    assert grad_norm(group) == pytest.approx(norm, rel=1e-5)


def test_groups_on_one_clean_pass_move_as_each_alone() -> None:
    first = make_runner("llama", sites_of("llama", 2), E2EDownstream(), True, 2)
    second = make_runner("llama", sites_of("llama", 3), CrossEntropy(mse_coefficient=0.1), True, 2, first.splice)
    groups = [first.make_group(), second.make_group()]
    with first.splice.running():
        expected = [group_gradients(group, TOKENS) for group in groups]
        found = [given_to_optimizers(group) for group in groups]
        assert step(first.splice, groups, TOKENS, step_plan(first)) == groups
    for group, given, alone in zip(groups, found, expected, strict=True):
        clip = min(1.0, 1.0 / grad_norm(group))
        assert_gradients(given, {s: {n: g * clip for n, g in of_sae.items()} for s, of_sae in alone.items()}, 1e-5)


def test_a_micro_batch_with_hardly_a_label_weighs_no_less_in_the_cross_entropy() -> None:
    # The last two positions of each prompt, of which one has a label; the first prompt has one token that counts.
    runner = make_runner(
        "HookedTransformer",
        sites_of("HookedTransformer", 2),
        CrossEntropy(),
        seqpos_slice=(-2, None),
        exclude_special_tokens=[int(TOKENS[0, -1])],
        store_batch_size_prompts=1,
        train_batch_size_tokens=N_PROMPTS * 2,
    )
    mask = torch.zeros(TOKENS.shape, dtype=torch.bool)
    mask[:, -2:] = True
    mask &= TOKENS[0, -1] != TOKENS
    assert mask.sum(1).tolist() == [1, 2, 2, 2]
    with frozen(runner.model):
        naive = naive_pass(runner.model, runner, runner.saes, mask)
        expected = naive_gradients(naive.loss, runner.saes)
    group = runner.make_group()
    with runner.splice.running():
        assert_gradients(group_gradients(group, TOKENS), expected, 1e-5)


# Several passes


@dataclass(frozen=True)
class InTurns(Objective):
    """A plugin's objective: KL and reconstruction, with chosen sets of the SAEs spliced in at a time."""

    name: ClassVar[str] = "in-turns"

    sets: tuple[tuple[str, ...], ...] = ()
    mse_coefficient: float = 0.2

    @override
    def passes(self, names: Sequence[str]) -> Sequence[Collection[str]]:
        return self.sets or [names]

    @override
    def terms(self, batch: Batch) -> dict[str, Term]:
        return {"kl": Term(1.0, lambda: batch.kl()), "mse_loss": Term(self.mse_coefficient, lambda: batch.mse_loss)}


SETS = (("second", "third"), ("third",), ("first", "third", "second"), ("first",))


@pytest.mark.parametrize(
    ("kind", "masked", "n_micro"), pairwise(("HookedTransformer", "qwen3"), (False, True), (1, 2)), ids=str
)
def test_the_loss_is_the_sum_over_passes_and_own_losses_count_once(kind: str, masked: bool, n_micro: int) -> None:
    runner = make_runner(kind, sites_of(kind, 3), InTurns(sets=SETS), masked, n_micro)
    loss, seen = torch.zeros(()), set[str]()
    with frozen(runner.model):
        for names in SETS:
            naive = naive_in_turns(runner, names, mask_of(masked))
            new = [name for name in names if name not in seen]
            # The sparsity of an SAE is that of the first pass it is in.
            loss = loss + naive.objective_loss + sum(naive.l1[name] for name in new)
            seen |= set(names)
        expected = naive_gradients(loss, runner.saes)
    group = runner.make_group()
    with runner.splice.running():
        assert_gradients(group_gradients(group, TOKENS), expected, 1e-5)
        group.step(TOKENS)
    for output in group.outputs.values():
        torch.testing.assert_close(output.loss, loss.detach(), rtol=1e-6, atol=0)
        assert output.n_tokens == int(mask_of(masked).sum())


def naive_in_turns(runner: E2EMultiTrainingRunner, names: Collection[str], mask: Tensor) -> Naive:
    objective = runner.objective
    runner.objective = E2E(mse_coefficient=0.2)
    try:
        return naive_pass(runner.model, runner, names, mask)
    finally:
        runner.objective = objective


def batch_topk_group(sets: tuple[tuple[str, ...], ...]) -> tuple[E2EMultiTrainingRunner, Group]:
    sites = sites_of("HookedTransformer", 3)
    saes = {
        name: (site, BatchTopKTrainingSAEConfig(d_in=16 if site.head_index is None else 4, d_sae=24, k=3))
        for name, site in sites.items()
    }
    runner = make_multi_runner(multi_config(saes, objective=InTurns(sets=sets)))
    for i, sae in enumerate(runner.saes.values()):
        randomised(sae, seed=i)
    return runner, runner.make_group()


def test_thresholds_firing_counts_and_own_losses_are_those_of_the_first_pass_only() -> None:
    results = []
    for sets in (SETS[2:3], SETS[2:3] + SETS[:2] + SETS[3:]):
        runner, group = batch_topk_group(sets)
        before = {name: sae.topk_threshold.clone() for name, sae in runner.saes.items()}  # pyright: ignore[reportCallIssue]
        with runner.splice.running():
            gradients = group_gradients(group, TOKENS)
            group.step(TOKENS)
        results.append((group, gradients))
        for name, trainer in group.trainers.items():
            sae: Any = trainer.sae
            assert sae.topk_threshold != before[name]
            assert trainer.n_frac_active_samples == TOKENS.numel()
            assert 0 < trainer.act_freq_scores.sum() <= TOKENS.numel() * 24
    (once, gradients), (several, other_gradients) = results
    for name, trainer in once.trainers.items():
        other: Any = several.trainers[name]
        assert torch.equal(trainer.act_freq_scores, other.act_freq_scores)
        assert torch.equal(trainer.n_forward_passes_since_fired, other.n_forward_passes_since_fired)
        assert trainer.sae.topk_threshold == other.sae.topk_threshold
        one, two = once.outputs[name].losses, several.outputs[name].losses
        assert one["auxiliary_reconstruction_loss"] == two["auxiliary_reconstruction_loss"]
        # The later passes did count, in the gradient.
        assert not torch.allclose(gradients[name]["W_dec"], other_gradients[name]["W_dec"])


def test_a_group_in_several_passes_logs_each_by_the_saes_in_it() -> None:
    runner = make_runner("HookedTransformer", sites_of("HookedTransformer", 2), InTurns(sets=SETS[:2]))
    group = runner.make_group()
    with runner.splice.running():
        group.step(TOKENS)
    assert {"kl/second+third", "kl/third"} <= group.outputs["third"].losses.keys()


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        ((("second", "fourth"),), "a pass names the SAE 'fourth'; there are second, third"),
        ((("second",),), "no pass has the SAE 'third', which would not be trained"),
        ((("second", "third"), ()), "a pass names no SAE"),
    ],
)
def test_passes_that_do_not_fit_the_names_are_refused(sets: tuple[tuple[str, ...], ...], says: str) -> None:
    runner = make_runner("HookedTransformer", sites_of("HookedTransformer", 2), InTurns(sets=sets))
    with pytest.raises(ValueError, match=f"objective 'in-turns' .*: {says}"):
        runner.make_group()


# A step that does not stand


def test_a_step_that_is_not_finite_moves_none_of_the_saes() -> None:
    sites = sites_of("HookedTransformer", 2)
    saes = {
        "second": (sites["second"], TopKTrainingSAEConfig(d_in=4, d_sae=20, k=3)),
        "third": (sites["third"], BatchTopKTrainingSAEConfig(d_in=16, d_sae=24, k=3)),
    }
    runner = make_multi_runner(multi_config(saes, objective=E2E()))
    group = runner.make_group()
    third: Any = runner.saes["third"]
    with torch.no_grad():
        third.b_dec[0] = math.nan
    before = {name: {k: v.clone() for k, v in sae.state_dict().items()} for name, sae in runner.saes.items()}
    with runner.splice.running(), pytest.raises(RuntimeError, match="the loss is nan"):
        group.step(TOKENS)
    for name, sae in runner.saes.items():
        for key, value in sae.state_dict().items():
            torch.testing.assert_close(value, before[name][key], rtol=0, atol=0, equal_nan=True)
        assert all(p.grad is None or not p.grad.any() for p in sae.parameters())
    assert all(trainer.n_training_samples == 0 for trainer in group.trainers.values())
