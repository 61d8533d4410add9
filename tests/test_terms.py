"""Objectives that cannot train are refused by name: what is no term, no loss, or not to be followed back to the SAE."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from sae_lens import LoggingConfig
from typing_extensions import override

from sae_lens_e2e import Batch, Objective, PluginWarning, Term, available_objectives
from sae_lens_e2e.objectives.plugins import make_objective
from sae_lens_e2e.training.terms import weighted_sum
from tests.models import random_tokens
from tests.test_plugins import installed, plugin_with
from tests.training import EVERY_STEP, make_runner, make_trainer, runner_config

MadeOf = Callable[[Batch], Any]


@dataclass(frozen=True)
class Odd(Objective):
    """An objective of whatever terms a test wants."""

    name: ClassVar[str] = "odd"
    compares_logits: ClassVar[bool] = False
    made: MadeOf = lambda batch: {"mse_loss": Term(1.0, lambda: batch.mse_loss)}

    @override
    def terms(self, batch: Batch) -> dict[str, Term]:
        return self.made(batch)

    @override
    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name}


def step_of(made: MadeOf, logger: LoggingConfig = EVERY_STEP) -> dict[str, float]:
    """The losses of one step on such terms."""
    trainer = make_trainer(make_runner(runner_config(objective=Odd(made), logger=logger)))
    with trainer.group.model.running():
        output = trainer.step(random_tokens(4, 12, 61))
    return {name: float(value) for name, value in output.losses.items()}


def of(value: Callable[[Batch], Any], coefficient: Any = 1.0, parts: Any = None) -> MadeOf:
    return lambda batch: {"odd": Term(coefficient, lambda: value(batch), parts)}


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda _: {}, "returned none"),
        (lambda _: None, "must return a dict of Term by name, not None"),
        (lambda batch: [Term(1.0, lambda: batch.mse_loss)], "must return a dict of Term"),
        (lambda batch: {"odd": batch.mse_loss}, "must return a dict of Term"),
        (lambda batch: {3: Term(1.0, lambda: batch.mse_loss)}, "must be a text to log it by, not 3"),
        (lambda batch: {"l1_loss": Term(1.0, lambda: batch.mse_loss)}, "is a loss of 'standard' already"),
        (of(lambda batch: batch.mse_loss.detach()), "'odd' takes no gradient"),
        (of(lambda _: torch.tensor(1.0)), "'odd' takes no gradient"),
        (of(lambda batch: batch.mse_loss.item()), "'odd' must give a tensor"),
        (of(lambda batch: batch.mse_loss[None]), "float32 of shape (1,)"),
        (of(lambda batch: batch.mse_loss.long()), "int64 of shape ()"),
        (of(lambda batch: batch.mse_loss + 0j), "complex64 of shape ()"),
        (of(lambda batch: batch.mse_loss, None), "the coefficient None must be a number, not a NoneType"),
        (of(lambda batch: batch.mse_loss, "1"), "the coefficient '1' must be a number"),
        (of(lambda batch: batch.mse_loss, torch.tensor(1.0)), "must be a number, not a Tensor"),
        (of(lambda batch: batch.mse_loss, -1.0), "the coefficient -1.0 must be a finite number"),
        (of(lambda batch: batch.mse_loss, math.nan), "the coefficient nan must be a finite number"),
        (of(lambda batch: batch.mse_loss, parts=3), "Term.parts is a int"),
        (of(lambda batch: batch.mse_loss, parts=lambda: 3), "parts of the term 'odd' must be a dict, not int"),
        (of(lambda batch: batch.mse_loss, parts=lambda: {"a": 3.0}), "'odd/a' must give a tensor"),
        # What only is logged is looked at where it is.
        (of(lambda batch: batch.mse_loss[None], 0.0), "float32 of shape (1,)"),
    ],
)
def test_what_cannot_train_is_refused_at_the_first_step(made: MadeOf, says: str) -> None:
    with installed(odd_package=plugin_with(Odd)), pytest.raises((ValueError, TypeError)) as error:
        step_of(made)
    assert says in str(error.value)
    assert "objective 'odd' (Odd of odd_package)" in str(error.value)
    assert "\n" not in str(error.value)


def test_one_that_is_not_installed_is_named_by_its_module() -> None:
    with pytest.raises(ValueError, match=r"objective 'odd' \(Odd of tests\.test_terms\)"):
        step_of(lambda _: {})


def test_terms_without_any_weight_are_refused_where_nothing_else_trains() -> None:
    idle = of(lambda batch: batch.mse_loss, 0.0)
    assert step_of(idle)["odd"] > 0  # the architecture's own loss trains
    with pytest.raises(ValueError, match=r"every term has the coefficient 0 \(odd\)"):
        weighted_sum(Odd(), {"odd": Term(0.0, lambda: torch.tensor(1.0))}, {}, [])


def test_a_weight_may_come_and_go_with_training() -> None:
    def scheduled(batch: Batch) -> dict[str, Term]:
        return {"mse_loss": Term(1.0, lambda: batch.mse_loss), "odd": Term(batch.fraction, lambda: 2 * batch.mse_loss)}

    assert {"mse_loss", "odd"} <= step_of(scheduled).keys()


@pytest.mark.parametrize("field", ["passes", "terms", "hooks", "resolve", "to_dict"])
def test_a_field_named_like_a_method_is_refused_when_it_is_registered(field: str) -> None:
    made = dataclasses.make_dataclass(
        "Shadowing", [(field, int, 2)], bases=(Odd,), namespace={"name": "shadowing"}, frozen=True
    )
    with installed(culprit=plugin_with(made)), pytest.warns(PluginWarning, match="plugin culprit was left out") as told:
        assert "shadowing" not in available_objectives()
    assert f"Shadowing has a field {field!r}" in str(told[0].message)
    with pytest.raises(TypeError, match=f"has a field {field!r}"):
        make_objective(made())


def test_one_without_terms_is_refused_when_it_is_registered() -> None:
    class Termless(Objective):
        name: ClassVar[str] = "termless"

    with installed(culprit=plugin_with(Termless)), pytest.warns(PluginWarning, match="does not define `terms`"):
        assert "termless" not in available_objectives()


@pytest.mark.parametrize("spec", [{"name": 3}, {"name": "e2e", 3: 1}, {"name": "e2e", "kl_coefficient": "1"}], ids=str)
def test_settings_of_the_wrong_kind_are_refused_in_one_line(spec: Any) -> None:
    with pytest.raises(ValueError, match=r"objective|e2e") as error:
        make_objective(spec)
    assert "\n" not in str(error.value)
