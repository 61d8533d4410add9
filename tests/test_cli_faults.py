"""Whatever goes wrong on the command line is one line that names it, and exit code 2; --debug shows where."""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sae_lens_e2e import cli
from sae_lens_e2e.cli import main
from sae_lens_e2e.training.trainer import NonFiniteLossError
from tests.test_report import an_sae, save

TRAIN = [
    *("train", "--model_name", "embedded", "--dataset_path", "embedded", "--hook_name", "blocks.3.hook_resid_pre"),
    *("--d_in", "64", "--d_sae", "96", "--context_size", "16", "--store_batch_size_prompts", "2"),
    *("--train_batch_size_tokens", "64", "--training_tokens", "128", "--log_to_wandb", "false"),
]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs a command that is to fail, in an empty folder, and gives its one line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*arguments: str) -> str:
        assert main(arguments) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith(f"sae-lens-e2e {arguments[0]}: ")
        return said

    return run


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (NonFiniteLossError("step 3: the loss is nan"), "step 3: the loss is nan"),
        (OSError(errno.ENOSPC, "No space left on device"), "[Errno 28] No space left on device"),
        (torch.OutOfMemoryError("CUDA out of\nmemory"), "out of memory; run fewer prompts"),
        (MemoryError(), "out of memory; run fewer prompts"),
        (KeyError("architecture"), "KeyError: 'architecture' (--debug shows where)"),
        (RuntimeError("a\nb"), "RuntimeError: a b (--debug shows where)"),
        (AssertionError(), "AssertionError (--debug shows where)"),
        (ValueError(), "ValueError (--debug shows where)"),
    ],
)
def test_any_error_is_one_line(
    error: Exception, says: str, fails: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[list[str]] = []

    def raises(arguments: list[str]) -> None:
        given.append(arguments)
        raise error

    monkeypatch.setitem(cli.COMMANDS, "train", (raises, ""))
    assert fails("train", "--lr", "1") == f"sae-lens-e2e train: {says}" or says in fails("train", "--lr", "1")
    for arguments in (["--debug", "train", "--lr", "1"], ["train", "--lr", "1", "--debug"]):
        with pytest.raises(type(error)):
            main(arguments)
    assert given[-1] == ["--lr", "1"]
    capsys.readouterr()


def test_ctrl_c_is_no_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(_: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "train", (raises, ""))
    assert main(["train"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--architecture", "topk", "--k", "97"], "k=97 is more than the SAE has features, d_sae=96"),
        (["--device", "cuda:77"], "device='cuda:77': this machine has no such device"),
        (["--device", "gpu"], "device='gpu' is no device"),
        (["--lr", "1e30"], "the loss is"),
    ],
)
def test_what_cannot_be_trained(flags: list[str], says: str, fails: Any) -> None:
    assert says in fails(*TRAIN, *flags)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"input_ids": [70000] * 16}] * 8, "has token 70000 and the model knows"),
        ([{"input_ids": [1] * 16}, {"input_ids": [1] * 3}] * 8, "row 1 of the dataset has 3 tokens"),
        ([{"text": ""}] * 8, "does not give one prompt"),
        ([], "empty"),
    ],
    ids=["beyond the vocabulary", "a short row", "empty texts", "no rows"],
)
def test_data_that_cannot_be_trained_on(rows: list[Any], says: str, fails: Any, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenised = "true" if rows and "input_ids" in rows[0] else "false"
    assert says in fails(*TRAIN, "--dataset_path", str(file), "--is_dataset_tokenized", tokenised)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("sae: 3", "sae=3 in"),
        ("logger: [1]", "logger=[1] in"),
        ("saes: 3\nhook_names: a", "saes=3"),
        ("- 1", "mapping"),
    ],
)
def test_a_config_file_of_another_shape(content: str, says: str, fails: Any, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(content)
    assert says in fails("train", "--config", str(tmp_path / "c.yaml"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"base": {}, "grid": None}, "grid: None is not a mapping"),
        ({"base": None, "grid": {}}, "base: None is not a mapping"),
        ({"base": {}, "grid": []}, "grid: [] has no points"),
        ({"base": {"sae": 3}, "grid": {"sae.k": [1]}}, "sae.k needs a mapping at sae, which is 3"),
        ({"base": {}, "grid": {"seed": [0]}, "evaluation": {"held_out": 2}}, "held_out=2 is no part"),
        ({"base": {}, "grid": {}, "evaluation": {"max_tokens": "many"}}, "max_tokens='many' must be an integer"),
        ({"base": {}, "grid": {"objective": [{"kl_coefficient": 1}]}}, "sweep.yaml"),
    ],
    ids=lambda p: p if isinstance(p, str) else "",
)
def test_a_sweep_file_of_another_shape_is_named(content: Any, says: str, fails: Any, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
    said = fails("sweep", str(tmp_path / "sweep.yaml"))
    assert says in said
    assert "sweep.yaml" in said


@pytest.mark.parametrize("file", ["sae_weights.safetensors", "cfg.json"])
@pytest.mark.parametrize("command", ["evaluate", "convert", "report"])
def test_a_damaged_file_is_named_by_every_command(command: str, file: str, fails: Any, tmp_path: Path) -> None:
    folder = save(an_sae(), tmp_path / "sae")
    (folder / file).write_bytes(b"{")
    more = {"convert": [str(tmp_path / "out")], "report": [str(tmp_path / "out.html")]}.get(command, [])
    arguments = [str(folder), *more] if command != "report" else [str(folder), "--output", *more]
    assert f"sae/{file} is damaged" in fails(command, *arguments)


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"saes": ' * 100_000 + "1" + "}" * 100_000], ids=["open", "closed"]
)
@pytest.mark.parametrize("file", ["cfg.json", "runner_cfg.json", "evaluation.json"])
@pytest.mark.parametrize("command", ["evaluate", "convert", "report", "train"])
def test_a_file_of_a_hundred_thousand_brackets_is_named_or_made_again(
    command: str, file: str, content: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = save(an_sae(), tmp_path / "sae")
    (folder / file).write_text(content)
    arguments = {
        "evaluate": [str(folder), "--model", "embedded", "--dataset", "embedded", "--max-tokens", "512"],
        "convert": [str(folder), str(tmp_path / "out")],
        "report": [str(folder), "--output", str(tmp_path / "out.html"), "--max-tokens", "512"],
        "train": [*TRAIN[1:], "--output_path", str(folder)],
    }[command]
    code = main([command, *arguments])
    last = capsys.readouterr().err.strip().splitlines()[-1:]
    assert code == 0 or f"sae-lens-e2e {command}: " in last[0]
    assert not any("RecursionError" in line or "--debug" in line for line in last)
    if file == "cfg.json" and command != "train":
        assert code == 2
        assert "sae/cfg.json is damaged: it is nested too deep" in last[0]


def test_an_architecture_that_is_not_installed_is_named_with_its_file(fails: Any, tmp_path: Path) -> None:
    folder = save(an_sae(), tmp_path / "sae")
    settings = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**settings, "architecture": "from_tomorrow"}))
    said = fails("evaluate", str(folder), "--model", "embedded")
    assert "cfg.json: architecture='from_tomorrow' is not installed; there are standard" in said
    assert "device='cuda:77'" in fails("evaluate", str(folder), "--device", "cuda:77")
