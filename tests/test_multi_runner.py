"""Several SAEs in one spliced pass: what is trained, saved, logged and gone on with, by name."""

import copy
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAEConfig,
    LoggingConfig,
    MultiSAETrainingRunner,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
)
from safetensors.torch import load_file
from torch import Tensor

from sae_lens_e2e import (
    E2E,
    E2EMultiRunnerConfig,
    E2EMultiTrainingRunner,
    NonFiniteLossError,
)
from sae_lens_e2e._upstream import InterruptedException
from sae_lens_e2e.training.prompts import PromptBatches
from tests.models import dataset_of, random_model, random_tokens
from tests.training import EVERY_STEP, make_runner, runner_config

EARLY, INSIDE, LATE = "blocks.0.hook_resid_pre", "blocks.1.hook_mlp_out", "blocks.1.hook_resid_post"
DATASET = dataset_of(random_tokens(64, 12, 61))


def standard(**settings: Any) -> StandardTrainingSAEConfig:
    return StandardTrainingSAEConfig(**{"d_in": 16, "d_sae": 40, "l1_coefficient": 0.02, **settings})


def multi_config(**overrides: Any) -> E2EMultiRunnerConfig:
    """Three SAEs of three architectures, not in order of depth; writes nothing, with any field overridden."""
    settings: dict[str, Any] = {
        "saes": {
            "late": standard(),
            "early": TopKTrainingSAEConfig(d_in=16, d_sae=40, k=5),
            "inside": BatchTopKTrainingSAEConfig(d_in=16, d_sae=40, k=5),
        },
        "hook_names": {"late": LATE, "early": EARLY, "inside": INSIDE},
        "objective": "e2e",
        "model_name": "tiny",
        "context_size": 12,
        "store_batch_size_prompts": 2,
        "train_batch_size_tokens": 4 * 12,
        "training_tokens": 6 * 48,
        "logger": LoggingConfig(log_to_wandb=False, wandb_log_frequency=2),
        "checkpoint_path": None,
        "output_path": None,
    }
    return E2EMultiRunnerConfig(**(settings | overrides))


def run(cfg: E2EMultiRunnerConfig, **overrides: Any) -> dict[str, Any]:
    return E2EMultiTrainingRunner(cfg, override_dataset=DATASET, override_model=random_model(), **overrides).run()


def weights(saes: dict[str, Any]) -> dict[str, Tensor]:
    return {f"{name}.{key}": value.clone() for name, sae in saes.items() for key, value in sae.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize(
    ("sae", "settings"),
    [
        (standard(), {"hook_name": EARLY, "objective": "e2e_ds"}),
        (TopKTrainingSAEConfig(d_in=16, d_sae=40, k=5), {"hook_name": INSIDE, "objective": "e2e"}),
        (
            BatchTopKTrainingSAEConfig(d_in=4, d_sae=40, k=5),
            {"hook_name": "blocks.1.attn.hook_z", "hook_head_index": 2},
        ),
        (JumpReLUTrainingSAEConfig(d_in=16, d_sae=40), {"hook_name": LATE, "objective": "local"}),
        (
            standard(normalize_activations="expected_average_only_in"),
            {"hook_name": EARLY, "n_batches_for_norm_estimate": 2},
        ),
    ],
    ids=["standard", "topk", "head", "local", "normalised"],
)
def test_one_sae_is_the_single_run_bit_for_bit(sae: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    single: dict[str, Any] = {**settings, "logger": EVERY_STEP}
    hook, head = settings.pop("hook_name"), settings.pop("hook_head_index", None)
    torch.manual_seed(0)
    cfg = runner_config(sae=copy.deepcopy(sae), training_tokens=6 * 48, output_path=str(tmp_path / "one"), **single)
    alone = make_runner(cfg, dataset=DATASET).run()
    torch.manual_seed(0)
    objective = settings.pop("objective", "e2e_ds")
    several = multi_config(
        saes={"only": sae},
        hook_names=hook,
        hook_head_indices=head,
        objective=objective,
        output_path=str(tmp_path / "several"),
        logger=EVERY_STEP,
        **settings,
    )
    assert_same(weights({"only": alone}), weights(run(several)))
    for file in ("sae_weights.safetensors", "sparsity.safetensors"):
        assert_same(load_file(tmp_path / "one" / file), load_file(tmp_path / "several" / "only" / file))
    ours, theirs = (pd.read_csv(tmp_path / folder / "history.csv") for folder in ("several/only", "one"))
    assert ours.drop(columns="details/seconds").equals(theirs.drop(columns="details/seconds"))


def test_each_is_a_stock_folder_that_names_its_companions(tmp_path: Path) -> None:
    saes = run(multi_config(output_path=str(tmp_path)))
    assert list(saes) == ["late", "early", "inside"]
    assert {path.name for path in tmp_path.iterdir()} == {"late", "early", "inside", "runner_cfg.json", "history.csv"}
    for name, sae in saes.items():
        loaded = SAE.load_from_disk(tmp_path / name)
        metadata = loaded.cfg.metadata
        x = torch.randn(8, 16)
        if name != "inside":  # BatchTopK is saved as the JumpReLU it amounts to
            torch.testing.assert_close(loaded(x), sae(x), rtol=1e-5, atol=1e-5)
        assert (metadata.name_in_run, metadata.hook_name) == (
            name,
            {"late": LATE, "early": EARLY, "inside": INSIDE}[name],
        )
        assert metadata.objective["name"] == "e2e"
        assert set(metadata.companions) == {"late", "early", "inside"} - {name}
        assert all(companion["hook_name"] for companion in metadata.companions.values())
        history = pd.read_csv(tmp_path / name / "history.csv")
        assert list(history["step"]) == [1, 3, 5]
        assert {"losses/kl", "losses/mse_loss", "metrics/l0", "losses/overall_loss"} <= set(history.columns)
    together = pd.read_csv(tmp_path / "history.csv")
    assert {"step", "late/losses/l1_loss", "early/metrics/l0", "inside/losses/kl"} <= set(together.columns)
    assert (together["late/losses/overall_loss"] == together["early/losses/overall_loss"]).all()
    again = E2EMultiRunnerConfig.from_dict(json.loads((tmp_path / "runner_cfg.json").read_text()))
    assert again.to_dict() == json.loads((tmp_path / "runner_cfg.json").read_text())


def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cfg(folder: str, **settings: Any) -> E2EMultiRunnerConfig:
        return multi_config(
            objective="e2e",
            checkpoint_path=str(tmp_path / folder),
            output_path=str(tmp_path / f"{folder}_out"),
            **settings,
        )

    whole = run(cfg("whole", n_checkpoints=1))
    (checkpoint,) = (tmp_path / "whole").glob("*/*")
    assert {path.name for path in checkpoint.iterdir()} == {
        *("late", "early", "inside", "runner_cfg.json", "history.csv", "activations_store_state.safetensors"),
    }
    resumed = run(cfg("resumed", resume_from_checkpoint=str(checkpoint)))
    assert_same(weights(resumed), weights(whole))
    for path in ("history.csv", "late/history.csv"):
        ours, theirs = (pd.read_csv(tmp_path / f"{folder}_out" / path) for folder in ("resumed", "whole"))
        seconds = [column for column in ours if column.endswith("details/seconds")]
        assert ours.drop(columns=seconds).equals(theirs.drop(columns=seconds)), path

    original, batches = PromptBatches.__next__, 0

    def interrupted_after_two(self: PromptBatches) -> Tensor:
        nonlocal batches
        batches += 1
        self.interrupted = batches == 3
        return original(self)

    monkeypatch.setattr(PromptBatches, "__next__", interrupted_after_two)
    with pytest.raises(InterruptedException):
        run(cfg("interrupted"))
    (stopped,) = (tmp_path / "interrupted").glob("*/*")
    assert stopped.name == str(2 * 48)
    assert_same(weights(run(cfg("again", resume_from_checkpoint=str(stopped)))), weights(whole))


def test_a_checkpoint_of_other_saes_is_refused_at_construction(tmp_path: Path) -> None:
    run(multi_config(checkpoint_path=str(tmp_path), n_checkpoints=1))
    (checkpoint,) = tmp_path.glob("*/*")
    other = multi_config(
        saes={"late": standard(), "other": standard()},
        hook_names={"late": LATE, "other": EARLY},
        resume_from_checkpoint=str(checkpoint),
    )
    with pytest.raises(FileNotFoundError, match=r"resume_from_checkpoint=.*other.* is not a checkpoint"):
        run(other)


def test_local_is_each_trained_apart_on_the_clean_activations() -> None:
    saes = {"late": standard(), "early": standard(d_sae=24)}
    hooks = {"late": LATE, "early": EARLY}
    joint = run(multi_config(saes=copy.deepcopy(saes), hook_names=hooks, objective="local", max_grad_norm=float("inf")))
    start = E2EMultiTrainingRunner(
        multi_config(saes=copy.deepcopy(saes), hook_names=hooks),
        override_dataset=DATASET,
        override_model=random_model(),
    ).saes
    for name, sae in start.items():
        cfg = runner_config(
            sae=sae.cfg, hook_name=hooks[name], objective="local", max_grad_norm=float("inf"), training_tokens=6 * 48
        )
        alone = make_runner(cfg, dataset=DATASET, sae=sae).run()
        assert_same(weights({name: alone}), weights({name: joint[name]}))


def test_the_gradient_is_clipped_over_all_together() -> None:
    runner = E2EMultiTrainingRunner(
        multi_config(max_grad_norm=1e-3), override_dataset=DATASET, override_model=random_model()
    )
    group = runner.make_group()
    seen: dict[str, Tensor] = {}
    for name, trainer in group.trainers.items():

        def see(*_: Any, name: str = name, sae: Any = trainer.sae) -> None:
            grads = [p.grad.flatten() for p in sae.parameters() if p.grad is not None]
            seen[name] = torch.cat(grads)

        trainer.optimizer.register_step_pre_hook(see)
    with runner.splice.running():
        group.step(random_tokens(4, 12, 61))
    assert float(torch.cat(list(seen.values())).norm()) == pytest.approx(1e-3, rel=1e-3)
    assert len({float(output.metrics["grad_norm"]) for output in group.outputs.values()}) == 1  # pyright: ignore[reportArgumentType]


def test_a_step_that_is_not_finite_moves_none_of_them() -> None:
    runner = E2EMultiTrainingRunner(multi_config(), override_dataset=DATASET, override_model=random_model())
    group = runner.make_group()
    with torch.no_grad():
        runner.saes["late"].W_dec[0, 0] = float("nan")
    before = weights(runner.saes)
    with runner.splice.running(), pytest.raises(NonFiniteLossError, match="kl nan"):
        group.step(random_tokens(4, 12, 61))
    for name, value in weights(runner.saes).items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), name
    assert {trainer.n_training_samples for trainer in group.trainers.values()} == {0}


def test_two_heads_of_one_hook() -> None:
    hook = "blocks.1.attn.hook_z"
    saes = {"one": standard(d_in=4), "three": standard(d_in=4)}
    cfg = multi_config(saes=saes, hook_names=hook, hook_head_indices={"one": 1, "three": 3})
    runner = E2EMultiTrainingRunner(cfg, override_dataset=DATASET, override_model=random_model())
    group = runner.make_group()
    with runner.splice.running():
        group.step(random_tokens(4, 12, 61))
    assert all(output.sae_in.shape == (24, 4) for output in group.outputs.values())
    assert {name: sae.cfg.metadata.hook_head_index for name, sae in runner.saes.items()} == {"one": 1, "three": 3}
    trained = run(copy.deepcopy(cfg))
    assert not torch.equal(trained["one"].W_enc, runner.saes["one"].W_enc)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"hook_names": {"late": LATE, "early": EARLY}},
            r"hook_names keys must match saes keys.*missing: \['inside'\]",
        ),
        ({"hook_head_indices": {"nobody": 1}}, "hook_head_indices names 'nobody', which is not in saes"),
        ({"saes": {"a/b": standard()}, "hook_names": EARLY}, "'a/b' is to be a folder's"),
        ({"saes": {}}, "saes must contain at least one"),
        ({"objective": "e3e"}, "objective='e3e' is not installed"),
        ({"compile_llm": True, "llm_compilation_mode": "fast"}, "llm_compilation_mode='fast' must be one of"),
        ({"prefetch_llm_batches": 2}, "prefetch_llm_batches=2"),
        ({"train_batch_size_tokens": 50}, "set it to 48 or 72"),
        ({"max_grad_norm": 0}, "max_grad_norm=0 must be positive"),
        (
            {"saes": {"a": standard(l1_coefficient=-1.0), "b": standard()}, "hook_names": {"a": EARLY, "b": LATE}},
            r"saes\['a'\]\.l1_coefficient=-1\.0",
        ),
        (
            {"objective": {"name": "e2e_ds", "downstream_hooks": ["blocks.1.hook_resid_pre"]}},
            r"blocks\.1\.hook_resid_pre is not downstream of hook_name='blocks\.1\.",
        ),
        ({"model_class_name": "HookedMamba"}, "model_class_name='HookedMamba' must be one of"),
    ],
)
def test_configs_that_cannot_be_meant(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        multi_config(**settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("hooks", "settings", "message"),
    [
        ({"a": EARLY, "b": EARLY}, {}, f"a and b both write {EARLY}, and only transcoders' outputs add up"),
        ({"a": EARLY, "b": "blocks.1.hook_resid_pst"}, {}, r"has no hook 'blocks\.1\.hook_resid_pst'; did you mean"),
        ({"a": EARLY, "b": "blocks.1.hook_attn_in"}, {}, "does not call it"),
        ({"a": EARLY, "b": "blocks.2.hook_resid_post"}, {"objective": "e2e_ds"}, "no block comes after"),
        ({"a": EARLY, "b": LATE}, {"context_size": 17, "train_batch_size_tokens": 4 * 17}, "context_size=17 is longer"),
    ],
)
def test_places_that_do_not_fit_the_model(hooks: dict[str, str], settings: dict[str, Any], message: str) -> None:
    cfg = multi_config(saes={"a": standard(), "b": standard()}, hook_names=hooks, **settings)
    dataset = dataset_of(random_tokens(8, cfg.context_size, 61))
    with pytest.raises(ValueError, match=message) as error:
        E2EMultiTrainingRunner(cfg, override_dataset=dataset, override_model=random_model())
    assert "\n" not in str(error.value)


def test_an_sae_of_another_width_is_named() -> None:
    cfg = multi_config(saes={"a": standard(), "b": standard(d_in=8)}, hook_names={"a": EARLY, "b": LATE})
    with pytest.raises(ValueError, match=rf"b: sae\.d_in=8 does not fit {LATE}, which is 16 wide"):
        E2EMultiTrainingRunner(cfg, override_dataset=DATASET, override_model=random_model())


def test_sae_lens_own_runner_says_which_is_meant() -> None:
    with pytest.raises(TypeError, match=r"use sae_lens_e2e\.E2EMultiTrainingRunner instead of MultiSAETrainingRunner"):
        MultiSAETrainingRunner(multi_config(), override_dataset=DATASET, override_model=random_model()).run()
    with pytest.raises(TypeError, match="make it an E2EMultiRunnerConfig"):
        E2EMultiTrainingRunner(runner_config())  # pyright: ignore[reportArgumentType]


def test_saes_of_ones_own_are_trained_and_others_refused() -> None:
    cfg = multi_config(saes={"a": standard(), "b": standard()}, hook_names={"a": EARLY, "b": LATE})
    saes = E2EMultiTrainingRunner(cfg, override_dataset=DATASET, override_model=random_model()).saes
    trained = run(copy.deepcopy(cfg), override_saes=saes)
    assert trained["a"] is saes["a"]
    other = {
        **saes,
        "b": E2EMultiTrainingRunner(
            multi_config(saes={"b": standard(d_sae=24)}, hook_names=LATE),
            override_dataset=DATASET,
            override_model=random_model(),
        ).saes["b"],
    }
    with pytest.raises(ValueError, match=r"sae\.d_sae=40, but the SAE given as override_saes\['b'\] has 24"):
        run(copy.deepcopy(cfg), override_saes=other)


class ApartThenTogether(E2E):
    """Each by itself, and then all: three passes for two SAEs."""

    name = "apart_then_together"

    def passes(self, names: Any) -> Any:
        return [*([name] for name in names), names]


class OfNobody(E2E):
    name = "of_nobody"

    def passes(self, names: Any) -> Any:
        return [names, ["nobody"]]


class LeavingOut(E2E):
    name = "leaving_out"

    def passes(self, names: Any) -> Any:
        return [names[:1]]


@pytest.mark.parametrize(
    ("objective", "message"),
    [(OfNobody(), "a pass names the SAE 'nobody'"), (LeavingOut(), "no pass has the SAE 'late'")],
)
def test_passes_that_do_not_fit_the_saes(objective: Any, message: str) -> None:
    cfg = multi_config(
        saes={"late": standard(), "early": standard()}, hook_names={"late": LATE, "early": EARLY}, objective=objective
    )
    runner = E2EMultiTrainingRunner(cfg, override_dataset=DATASET, override_model=random_model())
    with pytest.raises(ValueError, match=message):
        runner.make_group()


def test_passes_are_logged_by_the_saes_in_them() -> None:
    cfg = multi_config(
        saes={"late": standard(), "early": standard()},
        hook_names={"late": LATE, "early": EARLY},
        objective=ApartThenTogether(),
    )
    runner = E2EMultiTrainingRunner(cfg, override_dataset=DATASET, override_model=random_model())
    group = runner.make_group()
    with runner.splice.running():
        group.step(random_tokens(4, 12, 61))
    losses = group.outputs["late"].losses
    assert {"kl/early", "kl/late", "kl/early+late", "l1_loss"} <= set(losses)
    assert float(losses["kl/early+late"]) > 0
