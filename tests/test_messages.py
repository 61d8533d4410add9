"""What the libraries below say is said in our words, and what we do not know as it is."""

import logging
import re
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest

from sae_lens_e2e.cli import main
from sae_lens_e2e.cli.messages import KNOWN, Known, in_our_words, told
from sae_lens_e2e.cli.terminal import BOLD, styled
from tests.test_cli_faults import TRAIN


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.words[:40])
def test_what_is_known_is_still_said_below(known: Known) -> None:
    """The words between its variable parts stand in the module, in their order."""
    spec = find_spec(known.module)
    assert spec is not None
    assert spec.origin is not None
    source = " ".join(re.sub(r'"\s*f?"', "", Path(spec.origin).read_text()).replace("\\n", " ").split())
    fixed = [part for part in re.split(r"\(\?:.*?\)|\\?\(?\\[dS]\+\)?\\?|\.\*", known.words) if part.strip()]
    words = [re.sub(r"\\(.)", r"\1", part).strip() for part in fixed]
    found = re.search(".{0,400}?".join(map(re.escape, words)), source)
    assert found is not None, f"{known.module} no longer says {words}; take it out of KNOWN, or put it right"


def test_they_are_said_otherwise_or_not_at_all() -> None:
    said = "pretokenized dataset has context_size 256, but the provided context_size is 64. Some data will be discarded in this case."
    assert (
        in_our_words(said) == "context_size=64: the first 64 of each row's 256 tokens are read, and the others are not"
    )
    fewer = (
        "The training dataset contains fewer samples (5) than the number of samples required by your training configuration (20). "
        "This will result in multiple training epochs and some samples being used more than once."
    )
    assert in_our_words(fewer) is None
    assert in_our_words("the disk is nearly full") == "the disk is nearly full"


def test_a_warning_is_one_line_once_and_verbose_says_from_where(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("sae_lens")
    for verbose in (False, True):
        with told(verbose):
            for _ in range(2):
                warnings.warn("the disk\nis nearly full", UserWarning, stacklevel=1)
            log.info("noted")
            log.warning("careful")
    assert capsys.readouterr().err.splitlines() == [
        "warning: the disk is nearly full",
        "careful",
        f"warning: the disk is nearly full (UserWarning, {__file__}:{_line_of('warnings.warn(')})",
        "noted",
        "careful",
    ]


def _line_of(text: str) -> int:
    lines = Path(__file__).read_text().splitlines()
    return next(number for number, line in enumerate(lines, start=1) if line.strip().startswith(text))


def test_a_first_run_says_nothing_but_how_it_went(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*TRAIN, "--output_path", "my_sae", "--checkpoint_path", ""]) == 0
    out, err = capsys.readouterr()
    lines = [line for line in re.split(r"[\r\n]+", err) if line.strip()]
    assert (
        lines[0] == "warning: context_size=16: the first 16 of each row's 256 tokens are read, and the others are not"
    )
    assert all(line.startswith("Training") and len(line) <= 100 for line in lines[1:])
    heading, row, measured = out.splitlines()
    assert all(word in heading for word in ("SAE", "CE loss increase (nats)", "KL divergence (nats)", "L0", "saved in"))
    assert row.split()[0] == "standard"
    assert "128 tokens" in row
    assert row.endswith("my_sae")
    assert measured == "Measured on 32 held-out tokens; on more: sae-lens-e2e evaluate my_sae"


def test_prompts_that_are_read_again_are_told_of_and_what_cannot_be_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"input_ids": {[0, *range(5 + n, 20 + n)]}}}\n' for n in range(4)))
    assert main([*TRAIN, "--dataset_path", str(file), "--checkpoint_path", "", "--output_path"]) == 0
    out, err = capsys.readouterr()
    assert "warning: training_tokens=128: the dataset's 3 prompts of 16 tokens are read 2.7 times" in err
    assert "nothing: no output_path" in out
    assert "standard was not measured: " in out


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert styled("SAE", BOLD, sys.stdout) == "SAE"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert styled("SAE", BOLD, sys.stdout) == "\033[1mSAE\033[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert styled("SAE", BOLD, sys.stdout) == "SAE"
