"""What an evaluation's numbers are called and how they are written."""

import json
from dataclasses import fields

import pytest

from sae_lens_e2e.evaluation import Evaluation, LayerEvaluation, evaluation_frame
from sae_lens_e2e.evaluation.formats import count, decimals, digits, nats, significant
from sae_lens_e2e.evaluation.measures import MEASURES, OF_LAYER, OF_SAE, SUMMARY
from tests.models import GOLDEN

STORED = json.loads((GOLDEN / "evaluation.json").read_text())
# What an SAE is, rather than what was measured of it.
NO_MEASURES = {"hook_head_index", "context_size", "d_in", "d_sae"}


def test_every_number_of_an_evaluation_has_a_name() -> None:
    numbers = {name for name, value in STORED.items() if isinstance(value, int | float)}
    assert {measure.name for measure in OF_SAE} == numbers - NO_MEASURES
    assert {measure.name for measure in OF_LAYER} == {field.name for field in fields(LayerEvaluation)}
    assert len(MEASURES) == len(OF_SAE) + len(OF_LAYER) == len({measure.title for measure in MEASURES.values()})


def test_names_are_columns_and_their_values_can_be_written() -> None:
    evaluation = Evaluation.from_dict(STORED)
    row = evaluation_frame({"sae": evaluation}).iloc[0]
    assert all(MEASURES[name].format(row[name]) for name in SUMMARY)
    for measures, found in ((OF_SAE, evaluation), (OF_LAYER, evaluation.at_hook)):
        for measure in measures:
            value = getattr(found, measure.name)
            assert float(measure.format(value).replace(",", "")) == pytest.approx(value, rel=0.1, abs=0.06)


def test_a_name_is_said_as_its_place_wants_it() -> None:
    loss, alive, error = MEASURES["ce_loss_increase"], MEASURES["n_alive"], MEASURES["mse"]
    assert (loss.title, loss.axis) == ("CE loss increase (nats)", "CE loss increase (nats a token)")
    assert (alive.title, alive.axis) == ("alive features", "alive features")
    assert (error.title, error.axis) == ("MSE (squared activation)", "MSE (squared activation)")
    assert (loss.in_a_sentence, alive.in_a_sentence) == ("CE loss increase", "number of alive features")


def test_numbers_are_written_with_the_digits_that_say_something() -> None:
    assert [nats(value) for value in (0.0, 0.01, -1.23456, 0.00123)] == ["0.000", "0.010", "-1.235", "0.0012"]
    assert [count(value) for value in (7, 46_080.0)] == ["7", "46,080"]
    assert (decimals(2)(1234.5), significant(3)(0.012345), digits(0.5)) == ("1,234.50", "0.0123", "0.5")
