"""The demo's verdict, and that what it trains is the two objectives under one recipe."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sae_lens_e2e.evaluation import Evaluation
from tests.models import GOLDEN

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import demo  # pyright: ignore[reportMissingImports]


def result(increase: float, l0: float) -> Evaluation:
    stored = Evaluation.from_dict(json.loads((GOLDEN / "evaluation.json").read_text()))
    return replace(stored, ce_loss_with_sae=stored.ce_loss_without_sae + increase, l0=l0)


def test_the_verdict_is_the_ratio_of_the_increases() -> None:
    sentence = demo.verdict({"local": result(0.4, 13.0), "e2e_ds": result(0.1, 12.5)})
    assert "25% of what local does" in sentence
    assert "12.5 features active a token to local's 13.0" in sentence


def test_a_folder_of_somebody_elses_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos.txt").write_text("holiday")
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="--overwrite"):
        demo.main()
    assert [path.name for path in tmp_path.iterdir()] == ["photos.txt"]
