"""How an SAE reads text, and which documents are kept from it: the same in a run, a sweep, on the command line and in a report."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from sae_lens import SAE
from safetensors.torch import load_file

from sae_lens_e2e import E2ERunnerConfig, E2ETrainingRunner, embedded
from sae_lens_e2e.cli import main
from sae_lens_e2e.evaluation import Evaluation, evaluate
from sae_lens_e2e.evaluation.files import read_evaluation
from sae_lens_e2e.evaluation.one_pass import OnePass
from sae_lens_e2e.loading import load_documents, load_model
from sae_lens_e2e.sweep import read_sweep, run_sweep
from sae_lens_e2e.training.prompts import PromptBatches

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "no BOS": {"prepend_bos": False},
    "no separator": {"sequence_separator_token": None},
    "neither": {"prepend_bos": False, "sequence_separator_token": None},
    "another separator": {"sequence_separator_token": 17},
    "documents apart": {"disable_concat_sequences": True},
}
EVALUATION = {"batch_size_prompts": 4, "max_tokens": 1024}


def stories(folder: Path, n: int = 120) -> Path:
    """A file of text that the embedded model knows something about."""
    tokenizer: Any = load_model("embedded").tokenizer
    rows = embedded.load_dataset("train").select(range(n))["input_ids"]
    whole = "".join(tokenizer.decode(row) for row in rows)
    path = folder / "stories.jsonl"
    texts = [text for text in whole.split("<|endoftext|>") if text][:n]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def settings(dataset: Path, **reading: Any) -> dict[str, Any]:
    return {
        "model_name": "embedded",
        "dataset_path": str(dataset),
        "is_dataset_tokenized": False,
        "hook_name": "blocks.3.hook_resid_pre",
        "objective": "e2e",
        "context_size": 32,
        "store_batch_size_prompts": 2,
        "train_batch_size_tokens": 64,
        "training_tokens": 64 * 4,
        "lr": 0.003,
        "verbose": False,
        "checkpoint_path": None,
        "logger": {"log_to_wandb": False},
        "sae": {"architecture": "standard", "d_in": 64, "d_sae": 96, "l1_coefficient": 0.1},
        **reading,
    }


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = (load_file(folder / "sae_weights.safetensors") for folder in (one, other))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_whoever_trains_or_evaluates_reads_the_same_tokens(tmp_path: Path) -> None:
    dataset = stories(tmp_path)
    model = load_model("embedded")
    documents, held_out = load_documents(str(dataset))
    found: dict[str, Evaluation] = {}
    flags = ["--batch-size-prompts", "4", "--max-tokens", "1024"]
    for name, reading in SETTINGS.items():
        folder, given = tmp_path / name, settings(dataset, **reading)
        folder.mkdir()
        alone = E2ERunnerConfig.from_dict({**given, "output_path": str(folder / "run")})
        E2ETrainingRunner(alone, override_dataset=documents, override_model=model, held_out=0.1).run()

        sweep = {"base": given, "grid": {"seed": [alone.seed]}, "evaluation": EVALUATION}
        (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
        run_sweep(read_sweep(folder / "sweep.yaml"), folder / "sweep")
        point = folder / "sweep" / f"seed={alone.seed}"

        (folder / "run.json").write_text(json.dumps({**given, "output_path": str(folder / "command")}))
        assert main(["train", "--config", str(folder / "run.json")]) == 0
        for other in (point, folder / "command"):
            assert_same_weights(folder / "run", other)

        found[name] = evaluate(SAE.load_from_disk(folder / "run"), model, held_out, verbose=False, **EVALUATION)
        assert read_evaluation(point) == found[name]
        page = folder / "report.html"
        drawn = ["--measures", "evaluation", "--figures", "pareto", "--output", str(page)]
        assert main(["report", str(folder / "run"), *flags, *drawn]) == 0
        reported = pd.read_csv(folder / "report_data" / "evaluation.csv")
        for loss in ("ce_loss_with_sae", "ce_loss_without_sae"):
            assert reported[loss][0] == pytest.approx(getattr(found[name], loss), abs=1e-6)
    # They are different ways of reading.
    assert len({round(one.ce_loss_without_sae, 4) for one in found.values()}) == len(SETTINGS)
    # One command for SAEs that read differently.
    assert main(["evaluate", *(str(tmp_path / name / "command") for name in SETTINGS), *flags]) == 0
    assert {name: read_evaluation(tmp_path / name / "command") for name in SETTINGS} == found


def test_conversations_are_evaluated_as_they_were_trained_on(tmp_path: Path) -> None:
    model: Any = load_model("embedded")
    model.tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    dataset = stories(tmp_path)
    documents, held_out = load_documents(str(dataset))
    found: dict[bool, float] = {}
    for chat in (True, False):
        cfg = E2ERunnerConfig.from_dict(
            settings(dataset, use_chat_formatting=chat, output_path=str(tmp_path / str(chat)))
        )
        E2ETrainingRunner(cfg, override_dataset=documents, override_model=model).run()
        sae = SAE.load_from_disk(tmp_path / str(chat))
        found[chat] = evaluate(sae, model, held_out, verbose=False, **EVALUATION).ce_loss_without_sae
    assert found[True] > found[False] + 0.05


class Seen:
    """The tokens that were trained and evaluated on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.trained: list[torch.Tensor] = []
        self.evaluated: list[torch.Tensor] = []
        next_prompts, add = PromptBatches.__next__, OnePass.add

        def trained(batches: PromptBatches) -> torch.Tensor:
            self.trained.append(next_prompts(batches))
            return self.trained[-1]

        def evaluated(one_pass: OnePass, tokens: torch.Tensor, where: Any) -> None:
            self.evaluated.append(tokens)
            add(one_pass, tokens, where)

        monkeypatch.setattr(PromptBatches, "__next__", trained)
        monkeypatch.setattr(OnePass, "add", evaluated)

    def share(self) -> float:
        """The share of the evaluated 12-grams that were trained on."""
        trained = set(map(tuple, torch.cat(self.trained).flatten().unfold(0, 12, 1).tolist()))
        evaluated = torch.cat(self.evaluated).unfold(1, 12, 12).flatten(0, 1).tolist()
        return sum(gram in trained for gram in map(tuple, evaluated)) / len(evaluated)


@pytest.mark.parametrize("part", [None, 0.3, 0.0])
def test_the_command_line_evaluates_on_what_it_kept(
    part: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset, seen, out = stories(tmp_path, 30), Seen(monkeypatch), tmp_path / "out"
    # All that there is, more than once.
    amounts = {"store_batch_size_prompts": 16, "train_batch_size_tokens": 512, "training_tokens": 512 * 50}
    given = settings(dataset, output_path=str(out), **amounts) | ({} if part is None else {"held_out": part})
    (tmp_path / "run.json").write_text(json.dumps(given))
    assert main(["train", "--config", str(tmp_path / "run.json")]) == 0
    assert SAE.load_from_disk(out).cfg.metadata.held_out == (0.1 if part is None else part)
    capsys.readouterr()
    assert main(["evaluate", str(out), "--batch-size-prompts", "2"]) == 0
    warned = f"{out}: nothing in the metadata (held_out) says" in capsys.readouterr().out
    n_expected = {None: 3, 0.3: 9, 0.0: 3}[part]
    assert len(load_documents(str(dataset), part or 0.1)[1]) == n_expected
    assert warned == (part == 0.0)
    # Cut into prompts elsewhere, not all that was trained on is found again.
    assert seen.share() > 0.4 if part == 0.0 else seen.share() < 0.05
    page = tmp_path / "report.html"
    flags = ["--measures", "evaluation", "--figures", "pareto", "--output", str(page), "--batch-size-prompts", "2"]
    assert main(["report", str(out), *flags]) == 0
    assert ("were kept back" in page.read_text()) == warned
