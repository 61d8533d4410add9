"""Objectives as values: their defaults, what they refuse, and what they make of a batch."""

import dataclasses
import json
import math
from typing import Any, ClassVar

import pytest
import torch
from sae_lens import LoggingConfig
from torch import Tensor
from typing_extensions import override

from sae_lens_e2e import E2E, Batch, CrossEntropy, E2EDownstream, KLAndMSE, Local, Objective, Part, Term
from sae_lens_e2e.objectives import base
from sae_lens_e2e.objectives.plugins import make_objective
from sae_lens_e2e.splice import Where, frozen
from sae_lens_e2e.splice.unembedding import LinearUnembedding
from tests.models import random_tokens
from tests.training import gradients, make_runner, make_trainer, runner_config

HOOKS = ("blocks.2.hook_resid_pre", "blocks.3.hook_resid_pre")
ALL = [Local, E2E, E2EDownstream, CrossEntropy, KLAndMSE]
N_TOKENS, D_MODEL, D_VOCAB = 6, 4, 11
COEFFICIENTS = [(cls, f.name) for cls in ALL for f in dataclasses.fields(cls) if f.name.endswith("_coefficient")]


def batch(hooks: tuple[str, ...] = HOOKS, with_logits: bool = True) -> Batch:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tokens = torch.arange(N_TOKENS)[None]
    activations = normal(N_TOKENS, D_MODEL)
    here = {"blocks.1.hook_resid_pre": activations}
    return Batch(
        prompts=tokens,
        where=Where.everywhere(tokens),
        parts={"sae": Part(activations, activations, here, here, torch.tensor(0.25, dtype=torch.float64))},
        clean={hook: normal(N_TOKENS, D_MODEL) for hook in hooks},
        spliced={hook: normal(N_TOKENS, D_MODEL) for hook in hooks},
        clean_final=normal(N_TOKENS, D_MODEL) if with_logits else None,
        spliced_final=normal(N_TOKENS, D_MODEL) if with_logits else None,
        unembedding=LinearUnembedding(normal(D_MODEL, D_VOCAB)) if with_logits else None,
    )


def naive_kl(b: Batch) -> Tensor:
    """KL(clean ‖ spliced) at each token."""
    assert isinstance(b.unembedding, LinearUnembedding)
    assert b.clean_final is not None
    assert b.spliced_final is not None
    p, q = (b.clean_final @ b.unembedding.weight).softmax(-1), (b.spliced_final @ b.unembedding.weight).softmax(-1)
    return (p * (p / q).log()).sum(-1)


def test_defaults_are_the_papers() -> None:
    assert Local() == Local(mse_coefficient=1.0)
    assert E2E() == E2E(kl_coefficient=1.0, mse_coefficient=0.0)
    assert E2EDownstream() == E2EDownstream(
        kl_coefficient=0.5, downstream_coefficient=2.5, downstream_hooks=None, mse_coefficient=0.0
    )
    assert CrossEntropy() == CrossEntropy(ce_coefficient=1.0, mse_coefficient=0.0)
    assert KLAndMSE() == KLAndMSE(kl_coefficient=0.5, mse_coefficient=0.5, alpha=None, alpha_decay=0.0)
    assert [cls.name for cls in ALL] == ["local", "e2e", "e2e_ds", "ce", "kl_mse"]
    assert [cls.compares_logits for cls in ALL] == [False, True, True, True, True]


@pytest.mark.parametrize("value", [-1.0, -1e-9, math.nan, math.inf, -math.inf, True, False, None, "1"], ids=repr)
@pytest.mark.parametrize(("cls", "field"), COEFFICIENTS, ids=lambda p: p if isinstance(p, str) else p.name)
def test_coefficients_that_weigh_nothing_sensible_are_refused(cls: type[Objective], field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{cls.name}: {field}=.*must be a finite number that is not negative"):
        cls(**{field: value})


@pytest.mark.parametrize(("cls", "field"), COEFFICIENTS, ids=lambda p: p if isinstance(p, str) else p.name)
def test_one_coefficient_is_enough(cls: type[Objective], field: str) -> None:
    others = {f: 0 for c, f in COEFFICIENTS if c is cls and f != field}
    assert getattr(cls(**{field: 2, **others}), field) == 2


@pytest.mark.parametrize("cls", ALL, ids=lambda c: c.name)
def test_all_coefficients_zero_is_refused(cls: type[Objective]) -> None:
    fields = [f for c, f in COEFFICIENTS if c is cls]
    with pytest.raises(ValueError, match="nothing to train on") as error:
        cls(**dict.fromkeys(fields, 0.0))
    assert all(field in str(error.value) for field in fields)


def test_hooks_from_a_list_are_a_tuple_and_the_objective_hashable() -> None:
    as_list: Any = list(HOOKS)
    objective = E2EDownstream(downstream_hooks=as_list)
    assert objective.downstream_hooks == objective.hooks == HOOKS
    assert {objective, E2EDownstream(downstream_hooks=HOOKS)} == {objective}
    assert Local().hooks == E2E().hooks == E2EDownstream().hooks == ()


def test_objectives_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        E2E().kl_coefficient = 2.0  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("hooks", "says"),
    [
        ("blocks.2.hook_resid_pre", "must be a sequence of hook names"),
        ([], "at least one hook"),
        ((), "at least one hook"),
        ([HOOKS[0], HOOKS[1], HOOKS[0]], "each once"),
    ],
    ids=["str", "empty list", "empty tuple", "duplicate"],
)
def test_hooks_that_cannot_be_meant_are_refused(hooks: Any, says: str) -> None:
    with pytest.raises(ValueError, match=f"e2e_ds: downstream_hooks=.*{says}"):
        E2EDownstream(downstream_hooks=hooks)


def test_resolve_fills_in_the_later_blocks_and_nothing_else() -> None:
    objective = E2EDownstream(kl_coefficient=0.3, downstream_coefficient=0.7, mse_coefficient=0.1)
    resolved = objective.resolve(list(HOOKS), "blocks.1.hook_resid_pre")
    assert resolved == dataclasses.replace(objective, downstream_hooks=HOOKS)
    assert objective.downstream_hooks is None


def test_resolve_leaves_named_hooks_alone() -> None:
    named = E2EDownstream(downstream_hooks=("blocks.7.hook_mlp_out",))
    assert named.resolve(list(HOOKS), "blocks.1.hook_resid_pre") == named
    assert named.resolve([], "blocks.1.hook_resid_pre") == named
    assert E2E().resolve([], "blocks.1.hook_resid_pre") == E2E()
    assert Local().resolve(list(HOOKS), "blocks.1.hook_resid_pre") == Local()


def test_no_later_block_names_the_hook_and_the_ways_out() -> None:
    with pytest.raises(ValueError, match=r"no block comes after hook_name='blocks\.5\.hook_resid_post'") as error:
        E2EDownstream().resolve([], "blocks.5.hook_resid_post")
    for way_out in ("earlier layer", "downstream_hooks", "objective='e2e'"):
        assert way_out in str(error.value)


@pytest.mark.parametrize(
    "objective",
    [
        Local(mse_coefficient=0.5),
        E2E(kl_coefficient=2, mse_coefficient=0.125),
        E2EDownstream(),
        E2E(splices=("each_alone", "all")),
        E2EDownstream(kl_coefficient=0.1, downstream_coefficient=0, downstream_hooks=HOOKS, mse_coefficient=3.0),
    ],
    ids=lambda o: f"{o.name}-{len(o.hooks)}",
)
def test_settings_survive_json(objective: Objective) -> None:
    settings = json.loads(json.dumps(objective.to_dict()))
    assert settings["name"] == objective.name
    unsaid = {"splices"} if getattr(objective, "splices", None) == ("all",) else set()
    assert set(settings) == {"name", *(f.name for f in dataclasses.fields(objective))} - unsaid
    again = make_objective(settings)
    assert again == objective
    assert type(again) is type(objective)
    assert hash(again) == hash(objective)
    assert settings == objective.to_dict()


def test_local_is_the_architectures_own_mse() -> None:
    b = batch((), with_logits=False)
    (term,) = Local(mse_coefficient=0.5).terms(b).values()
    assert (term.coefficient, float(term.value())) == (0.5, 0.25)


def test_e2e_is_the_mean_kl() -> None:
    b = batch(())
    terms = E2E(kl_coefficient=0.7, mse_coefficient=0.2).terms(b)
    assert list(terms) == ["kl", "mse_loss"]
    torch.testing.assert_close(terms["kl"].value(), naive_kl(b).mean(), rtol=1e-12, atol=0)
    assert (terms["kl"].coefficient, terms["mse_loss"].coefficient) == (0.7, 0.2)
    assert float(terms["mse_loss"].value()) == 0.25


def test_downstream_is_the_mean_over_hooks_of_their_means() -> None:
    b = batch()
    terms = E2EDownstream(downstream_hooks=HOOKS).terms(b)
    by_hook = {hook: ((b.spliced[hook] - b.clean[hook]) ** 2).mean() for hook in HOOKS}
    assert {name: term.coefficient for name, term in terms.items()} == {
        "kl": 0.5,
        "downstream_mse": 2.5,
        "mse_loss": 0.0,
    }
    torch.testing.assert_close(terms["kl"].value(), naive_kl(b).mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(terms["downstream_mse"].value(), sum(by_hook.values()) / 2, rtol=1e-12, atol=0)
    found = terms["downstream_mse"].parts
    assert found is not None
    torch.testing.assert_close(dict(found()), by_hook, rtol=1e-12, atol=0)


def test_kl_with_token_weights_is_their_weighted_sum() -> None:
    b = batch(())
    weights = torch.rand(N_TOKENS, dtype=torch.float64)
    torch.testing.assert_close(b.kl(weights), weights @ naive_kl(b), rtol=1e-12, atol=0)


def test_ce_is_the_mean_over_the_tokens_that_are_followed_by_one() -> None:
    b = batch(())
    assert isinstance(b.unembedding, LinearUnembedding)
    assert b.spliced_final is not None
    log_q = (b.spliced_final @ b.unembedding.weight).log_softmax(-1)
    naive = -torch.stack([log_q[i, i + 1] for i in range(N_TOKENS - 1)])
    (ce, mse) = CrossEntropy(ce_coefficient=0.3).terms(b).values()
    torch.testing.assert_close(ce.value(), naive.mean(), rtol=1e-12, atol=0)
    assert (ce.coefficient, mse.coefficient) == (0.3, 0.0)
    weights = torch.rand(N_TOKENS, dtype=torch.float64)
    torch.testing.assert_close(b.cross_entropy(weights), weights[:-1] @ naive, rtol=1e-12, atol=0)


def test_kl_without_logits_says_what_to_set() -> None:
    with pytest.raises(ValueError, match=r"compares_logits=False.*set it to True"):
        batch((), with_logits=False).kl()


class CountedBackward(torch.autograd.Function):
    """Passes a value through, and notes when its gradient is asked for."""

    asked: ClassVar[int] = 0

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:  # noqa: ARG004
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:  # noqa: ARG004
        CountedBackward.asked += 1
        return grad_outputs[0]


@dataclasses.dataclass(frozen=True)
class Watched(Objective):
    """The mse at one coefficient, and once more, watched, times infinity, at another."""

    name: ClassVar[str] = "watched"
    compares_logits: ClassVar[bool] = False
    mse_coefficient: float = 1.0
    watched_coefficient: float = 0.0
    factor: float = 1.0
    called: ClassVar[int] = 0

    @override
    def terms(self, batch: Batch) -> dict[str, Term]:
        def watched() -> Any:
            Watched.called += 1
            return CountedBackward.apply(batch.mse_loss * self.factor)

        return {
            "mse_loss": Term(self.mse_coefficient, lambda: batch.mse_loss),
            "watched": Term(self.watched_coefficient, watched),
        }


def one_pass(objective: Objective, log_every: int = 1) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients and losses of one batch."""
    logger = LoggingConfig(log_to_wandb=False, wandb_log_frequency=log_every)
    trainer = make_trainer(make_runner(runner_config(objective=objective, logger=logger)))
    tokens = random_tokens(2, 12, 61)
    with frozen(trainer.group.model.model):
        found = gradients(trainer, tokens)
        output = trainer.step(tokens)
    return found, {name: float(value) for name, value in output.losses.items()}


def test_a_term_without_weight_is_logged_but_not_differentiated() -> None:
    CountedBackward.asked = 0
    plain, losses = one_pass(Local())
    with_idle_term, logged = one_pass(Watched(factor=math.inf))
    assert CountedBackward.asked == 0
    assert logged["watched"] == math.inf
    assert logged["mse_loss"] == pytest.approx(losses["mse_loss"])
    torch.testing.assert_close(with_idle_term, plain, rtol=0, atol=0)
    one_pass(Watched(watched_coefficient=1.0))
    assert CountedBackward.asked == 2  # once for the gradients, once in the step: what is counted is the backward pass


def test_a_term_without_weight_is_not_even_worked_out_when_nobody_looks() -> None:
    Watched.called = 0
    _, losses = one_pass(Watched(factor=math.inf), log_every=10)
    assert Watched.called == 0
    assert set(losses) == {"mse_loss", "l1_loss"}


def test_a_term_as_it_was_in_0_1_is_refused_with_what_to_write() -> None:
    with pytest.raises(TypeError, match=r"since 0\.2 .* Term\(0\.5, lambda: batch\.kl\(\)\)"):
        Term(torch.tensor(1.0), 0.5)  # pyright: ignore[reportArgumentType]


def test_coefficients_add_up_in_the_gradient() -> None:
    halves, _ = one_pass(Watched(mse_coefficient=0.5, watched_coefficient=0.5))
    whole, _ = one_pass(Local())
    torch.testing.assert_close(halves, whole, rtol=1e-5, atol=1e-7)


def test_an_objective_without_coefficients_is_allowed() -> None:
    @dataclasses.dataclass(frozen=True)
    class Bare(base.Objective):
        name: ClassVar[str] = "bare"

        @override
        def terms(self, batch: Batch) -> dict[str, Term]:
            return {"mse_loss": Term(1.0, lambda: batch.mse_loss)}

    assert Bare().to_dict() == {"name": "bare"}
