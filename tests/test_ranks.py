"""Several ranks train what one process trains, end together, and refuse what cannot be dealt among them."""

import contextlib
import io
import math
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from sae_lens import BatchTopKTrainingSAEConfig, LoggingConfig, StandardTrainingSAEConfig, TopKTrainingSAEConfig
from safetensors.torch import load_file

from sae_lens_e2e import cli
from sae_lens_e2e._upstream import InterruptedException
from sae_lens_e2e.splice import Site
from sae_lens_e2e.sweep import read_sweep, run_sweep
from sae_lens_e2e.training import ranks
from sae_lens_e2e.training.group import Group
from sae_lens_e2e.training.prompts import PromptBatches
from sae_lens_e2e.training.ready import make_ready
from tests.models import dataset_of, random_tokens
from tests.ranks import Ended, in_ranks
from tests.reliability.killed import content
from tests.training import make_multi_runner, make_runner, multi_config, runner_config

STEPS = 50
BATCH = 4 * 12
"""Tokens of a step: four forward passes of a prompt."""
KINDS = ("standard", "batchtopk", "joint")
EARLY = StandardTrainingSAEConfig(
    d_in=16, d_sae=40, l1_coefficient=0.02, normalize_activations="expected_average_only_in"
)
LATE = TopKTrainingSAEConfig(d_in=16, d_sae=40, k=4)
BATCHTOPK = BatchTopKTrainingSAEConfig(d_in=16, d_sae=40, k=4)


# What the ranks do


def train(kind: str, out: Path, **overrides: Any) -> None:
    """Train what a kind of run is, to the end."""
    settings: dict[str, Any] = {
        **{"training_tokens": STEPS * BATCH, "train_batch_size_tokens": BATCH, "store_batch_size_prompts": 1},
        **{"lr": 1e-3, "dead_feature_window": 5, "n_batches_for_norm_estimate": 3, "exclude_special_tokens": [3, 5]},
        **{"output_path": str(out), "logger": LoggingConfig(log_to_wandb=False, wandb_log_frequency=1)},
        **overrides,
    }
    if kind == "joint":
        saes = {
            "late": (Site.of_sae("blocks.2.hook_resid_pre"), LATE),
            "early": (Site.of_sae("blocks.1.hook_resid_pre"), EARLY),
        }
        make_multi_runner(multi_config(saes, objective="kl_mse", **settings)).run()
    else:
        make_runner(runner_config(sae=EARLY if kind == "standard" else BATCHTOPK, **settings)).run()


def train_all(out: Path) -> None:
    """Train every kind of run."""
    for kind in KINDS:
        train(kind, out / kind)


def short(out: Path, **overrides: Any) -> None:
    """A run of 12 steps, with checkpoints, going on from the last there is."""
    checkpoints = out.parent / "checkpoints"
    found = sorted((int(path.name), str(path)) for path in checkpoints.glob("*/*") if path.name.isdigit())
    resume = found[-1][1] if found else None
    common = {"checkpoint_path": str(checkpoints), "n_checkpoints": 3, "resume_from_checkpoint": resume}
    train("batchtopk", out, **(common | {"training_tokens": 12 * BATCH} | overrides))


def short_until(out: Path, on_rank: int, at: int, signal_number: int) -> str:
    """The same, until one rank is sent a signal, before the prompts of its n-th step."""
    ask, asked = PromptBatches.__next__, 0

    def ask_after(self: PromptBatches) -> Any:
        nonlocal asked
        asked += 1
        if asked == at and ranks.rank() == on_rank:
            os.kill(os.getpid(), signal_number)
        return ask(self)

    PromptBatches.__next__ = ask_after
    try:
        short(out)
    except InterruptedException:
        return "interrupted"
    except ranks.RankLost as error:
        return str(error)
    return "ended"


def said_by(commands: Sequence[Sequence[str]], on_rank: int | None = None, wrong: str = "") -> list[tuple[int, str]]:
    """What commands of ours returned, and the messages that they printed; on one rank something goes wrong in the third step."""
    if int(os.environ["RANK"]) == on_rank:
        _go_wrong(wrong, at=3)
    # The others go on here, and do not end.
    ranks.outlive = lambda _: None
    found: list[tuple[int, str]] = []
    for command in commands:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            code = cli.main(command)
        lines = [line for line in said.getvalue().splitlines() if line.startswith("sae-lens-e2e ")]
        found.append((code, "\n".join(lines)))
    return found


def _go_wrong(wrong: str, at: int) -> None:
    run = Group.forward_backward

    def run_wrongly(self: Group, *arguments: Any) -> None:
        if wrong == "raise" and self.first.n_steps_done == at and self.first.sae.cfg.k == 7:
            raise RuntimeError("the cable came off")
        run(self, *arguments)
        if wrong == "nan" and self.first.n_steps_done == at:
            self.first.sae.W_dec.grad *= math.nan

    Group.forward_backward = run_wrongly  # pyright: ignore[reportAttributeAccessIssue]


def sweep(out: Path, wrong_on: int | None = None) -> dict[str, Any]:
    """Two points on one clean pass, and their evaluation; one of them fails on one rank."""
    if wrong_on is not None and int(os.environ["RANK"]) == wrong_on:
        _go_wrong("raise", at=3)
    base = {
        **{"model_name": "embedded", "dataset_path": "embedded", "hook_name": "blocks.3.hook_resid_pre"},
        **{"context_size": 24, "store_batch_size_prompts": 1, "train_batch_size_tokens": 96, "training_tokens": 8 * 96},
        **{"n_checkpoints": 2, "verbose": False, "objective": "e2e"},
        "logger": {"log_to_wandb": False, "wandb_log_frequency": 1},
        "sae": {"architecture": "topk", "d_in": 64, "d_sae": 96},
    }
    evaluation = {"max_tokens": 96, "batch_size_prompts": 4}
    file = out.parent / f"{out.name}-{os.getpid()}.yaml"
    file.write_text(yaml.safe_dump({"base": base, "grid": {"sae.k": [7, 8]}, "evaluation": evaluation}))
    frame = run_sweep(read_sweep(file), out)
    return dict(zip(frame["sae"], frame["ce_loss_with_sae"], strict=True)) if len(frame) else {}


# What comes of it


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Ended]]:
    """Every kind of run, in one process and in two ranks."""
    folder = tmp_path_factory.mktemp("trained")
    train_all(folder / "one")
    return folder, in_ranks(folder, train_all, folder / "two")


@pytest.mark.parametrize("sae", ["standard", "batchtopk", "joint/early", "joint/late"])
def test_ranks_train_what_one_process_trains(trained: tuple[Path, list[Ended]], sae: str) -> None:
    folder, done = trained
    assert [rank.code for rank in done] == [0, 0], done
    for file in ("sae_weights.safetensors", "sparsity.safetensors"):
        one, two = (load_file(folder / out / sae / file) for out in ("one", "two"))
        assert one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-5)
    one, two = (
        pd.read_csv(folder / out / sae / "history.csv").drop(columns="details/seconds") for out in ("one", "two")
    )
    assert len(one) == STEPS
    np.testing.assert_allclose(two[one.columns], one, rtol=2e-4, atol=1e-5)


def test_the_first_rank_alone_shows_progress(trained: tuple[Path, list[Ended]]) -> None:
    _, (first, second) = trained
    assert "Training" in first.said
    assert "Training" not in second.said


@pytest.mark.parametrize(
    ("signal_number", "code", "first_says", "checkpoints"),
    [
        (signal.SIGTERM, 0, "interrupted", [4, 7, 8]),
        (signal.SIGKILL, -signal.SIGKILL, "the ranks have lost each other", [4, 7]),
    ],
)
def test_ranks_end_together_and_their_checkpoint_resumes(
    signal_number: int, code: int, first_says: str, checkpoints: list[int], tmp_path: Path
) -> None:
    straight, stopped = tmp_path / "straight" / "out", tmp_path / "stopped" / "out"
    for out in (straight, stopped):
        out.parent.mkdir()
    assert [rank.code for rank in in_ranks(tmp_path, short, straight)] == [0, 0]
    done = in_ranks(tmp_path, short_until, stopped, 1, 9, signal_number)
    assert [rank.code for rank in done] == [0, code], done
    assert first_says in done[0].gave
    assert not (stopped / "sae_weights.safetensors").exists()
    found = sorted(int(path.name) for path in (stopped.parent / "checkpoints").glob("*/*") if path.name.isdigit())
    assert found == [n * BATCH for n in checkpoints]
    assert [rank.code for rank in in_ranks(tmp_path, short, stopped)] == [0, 0]
    assert content(stopped) == content(straight)


def test_a_checkpoint_of_two_ranks_is_gone_on_from_by_one_process(tmp_path: Path) -> None:
    straight, stopped = tmp_path / "straight" / "out", tmp_path / "stopped" / "out"
    for out in (straight, stopped):
        out.parent.mkdir()
    short(straight)
    in_ranks(tmp_path, short_until, stopped, 0, 9, signal.SIGTERM)
    short(stopped)
    one, two = (load_file(out / "sae_weights.safetensors") for out in (straight, stopped))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-5)


def flags(**overrides: Any) -> list[str]:
    """A short run of the command line's, on the embedded model, that writes nothing."""
    settings = {
        **{"architecture": "topk", "d_in": 64, "d_sae": 96, "k": 7, "objective": "local"},
        **{"model_name": "embedded", "dataset_path": "embedded", "hook_name": "blocks.3.hook_resid_pre"},
        **{"context_size": 24, "store_batch_size_prompts": 1, "train_batch_size_tokens": 96, "training_tokens": 480},
        **{"log_to_wandb": "false", "verbose": "false", "checkpoint_path": "", "n_checkpoints": 0},
        **overrides,
    }
    return ["train", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))]


REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    (
        {"train_batch_size_tokens": 5 * 12, "store_batch_size_prompts": 1},
        "train_batch_size_tokens=60 is 5 forward passes of store_batch_size_prompts=1, which do not divide over 2 ranks; set it to 48 or 72",
    ),
    (
        {"train_batch_size_tokens": 6 * 12},
        "train_batch_size_tokens=72 is 3 forward passes of store_batch_size_prompts=2, which do not divide over 2 ranks; set it to 48 or 96, or "
        "store_batch_size_prompts to 3",
    ),
    (
        {"train_batch_size_tokens": 12, "store_batch_size_prompts": 1},
        "train_batch_size_tokens=12 is 1 prompts a step, fewer than the 2 ranks; set it to 24 or more, or start at most 1",
    ),
    (
        {"model_from_pretrained_kwargs": {"device_map": "auto"}},
        "model_from_pretrained_kwargs: device_map='auto' spreads the model over all devices of the machine, and 2 ranks share them; leave it "
        "out, give each rank a device_map of its own GPUs, or start one rank a machine",
    ),
    (
        {"model_from_pretrained_kwargs": {"n_devices": 2}},
        "model_from_pretrained_kwargs: n_devices=2 takes the first devices of the machine, and 2 ranks share them; leave it out, or start one "
        "rank a machine",
    ),
    ({"device": "mps"}, "device='mps': several ranks train on 'cpu' or 'cuda'; set it to one of these"),
)


def refused() -> list[str]:
    """What configs that ranks cannot share are refused with, and a dataset that each rank has its own of."""
    found: list[str] = []
    for wrong, _ in REFUSED:
        with pytest.raises((ValueError, ranks.RankError)) as raised:
            make_ready(runner_config(**wrong))
        found.append(str(raised.value))
    own = dataset_of(random_tokens(64, 12, 61, seed=ranks.rank()))
    with pytest.raises(ValueError, match="the ranks read different prompts; give every rank the same dataset"):
        make_runner(dataset=own).run()
    return found


def test_what_ranks_cannot_share_is_refused(tmp_path: Path) -> None:
    first, second = in_ranks(tmp_path, refused)
    assert (first.code, second.code) == (0, 0), (first, second)
    expected = [says for _, says in REFUSED]
    assert first.gave == expected
    assert second.gave == [f"rank 0: ValueError: {says}" for says in expected]


def disagreeing() -> list[tuple[int, str]]:
    """A learning rate that each rank has its own of, and one that is none; no model is loaded for them."""
    sys.modules["sae_lens_e2e.cli.train"].load_model = None  # pyright: ignore[reportAttributeAccessIssue]
    return said_by([flags(lr=1e-3 * (1 + int(os.environ["RANK"]))), flags(lr="fast")])


def test_ranks_that_disagree_are_told_so_in_one_line_by_one_of_them(tmp_path: Path) -> None:
    first, second = in_ranks(tmp_path, disagreeing)
    (code, said), (of_bad, says_of_bad) = first.gave
    assert (code, of_bad) == (2, 2)
    assert said == (
        "sae-lens-e2e train: rank 1 has lr=0.002 and rank 0 has lr=0.001; start all ranks with the same settings"
    )
    assert "fast" in says_of_bad
    assert len(says_of_bad.splitlines()) == 1
    assert second.gave == [[2, ""], [2, ""]]


@pytest.mark.parametrize(
    ("wrong", "speaks", "says"),
    [("nan", 0, "step 2: the loss is"), ("raise", 1, "RuntimeError: the cable came off")],
)
def test_what_goes_wrong_on_one_rank_stops_all_with_one_message(
    wrong: str, speaks: int, says: str, tmp_path: Path
) -> None:
    done = in_ranks(tmp_path, said_by, [flags(), ["objectives"]], 1, wrong)
    (code, said), _ = done[speaks].gave
    assert code == 2
    assert says in said
    assert len(said.splitlines()) == 1
    assert [rank.gave[0] for rank in done if rank is not done[speaks]] == [[2, ""]]
    # What has nothing to do with ranks, the first does.
    assert [("kl_mse" in rank.said, rank.gave[1]) for rank in done] == [(True, [0, ""]), (False, [0, ""])]


def test_a_sweep_in_ranks_is_that_of_one_process_and_a_point_that_fails_on_one_is_dropped_by_all(
    tmp_path: Path,
) -> None:
    expected = sweep(tmp_path / "one")
    first, second = in_ranks(tmp_path / "ranks", sweep, tmp_path / "two", 1)
    assert first.code == second.code == 0, (first, second)
    failed = next((tmp_path / "two").glob("*/failed.txt"))
    assert failed.read_text() == "RankError: rank 1: RuntimeError: the cable came off\n"
    left = {name: value for name, value in expected.items() if name != failed.parent.name}
    assert len(left) == 1
    assert first.gave == second.gave == pytest.approx(left, rel=1e-5)


def test_shares_are_everything_once_and_differ_by_one_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    for of in range(1, 6):
        for n in range(12):
            monkeypatch.setattr(ranks, "world_size", lambda of=of: of)
            found = []
            for number in reversed(range(of)):
                monkeypatch.setattr(ranks, "rank", lambda number=number: number)
                found.append(ranks.share(range(n)))
            assert [item for share in found for item in share] == list(range(n))
            assert max(map(len, found)) - min(map(len, found)) <= 1
