"""Loading SAEs by where they are: those of a joint run by name, and Apollo's of one checkpoint by hook."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, LoggingConfig, StandardTrainingSAEConfig, TopKTrainingSAEConfig, TrainingSAE

from sae_lens_e2e import E2EMultiRunnerConfig, E2EMultiTrainingRunner, apollo_disk_loader, load_apollo_saes
from sae_lens_e2e.cli import main
from sae_lens_e2e.loading.saes import is_joint_folder, is_sae_folder, joint_names, load_sae, load_saes
from tests.apollo import HOOK, apollo_forward, golden_parameters, parameters, run_config, write_run
from tests.models import dataset_of, random_model, random_tokens

# Not in order of depth, nor of the alphabet.
HOOKS = {"late": "blocks.1.hook_mlp_out", "early": "blocks.0.hook_resid_pre", "head": "blocks.1.attn.hook_z"}
OTHER = "blocks.1.hook_resid_pre"


def joint_run(folder: Path) -> dict[str, TrainingSAE[Any]]:
    """Train three small SAEs together into a folder."""
    cfg = E2EMultiRunnerConfig(
        saes={
            "late": TopKTrainingSAEConfig(d_in=16, d_sae=24, k=3),
            "early": StandardTrainingSAEConfig(d_in=16, d_sae=32),
            "head": TopKTrainingSAEConfig(d_in=4, d_sae=12, k=2),
        },
        hook_names=HOOKS,
        hook_head_indices={"head": 1},
        objective="e2e",
        model_name="tiny",
        context_size=12,
        store_batch_size_prompts=2,
        train_batch_size_tokens=24,
        training_tokens=72,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=str(folder),
    )
    runner = E2EMultiTrainingRunner(
        cfg, override_model=random_model(), override_dataset=dataset_of(random_tokens(64, 12, 61))
    )
    return runner.run()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("joint")
    joint_run(folder)
    return folder


class TestJointRun:
    def test_by_name_in_the_order_of_the_config(self, tmp_path: Path) -> None:
        trained = joint_run(tmp_path / "out")
        saes = load_saes(tmp_path / "out")
        assert list(saes) == list(HOOKS) == joint_names(tmp_path / "out")
        assert [sae.cfg.architecture() for sae in saes.values()] == ["topk", "standard", "topk"]
        for name, sae in saes.items():
            x = torch.randn(5, sae.cfg.d_in)
            with torch.no_grad():
                torch.testing.assert_close(sae(x), trained[name](x))

    def test_each_knows_its_name_and_companions(self, run: Path) -> None:
        for name, sae in load_saes(run).items():
            metadata = sae.cfg.metadata
            assert (metadata.name_in_run, metadata.hook_name) == (name, HOOKS[name])
            assert metadata.companions == {
                other: {"hook_name": hook, "hook_head_index": 1 if other == "head" else None}
                for other, hook in HOOKS.items()
                if other != name
            }

    def test_a_folder_of_one_of_them_is_an_sae_like_any_other(self, run: Path) -> None:
        assert load_sae(run / "early").cfg.metadata.name_in_run == "early"
        assert list(load_saes(run / "early")) == [HOOKS["early"]]
        assert is_sae_folder(run / "early")
        assert not is_joint_folder(run / "early")
        assert is_joint_folder(run)
        assert not is_sae_folder(run)

    def test_one_alone_is_asked_for_by_folder(self, run: Path) -> None:
        with pytest.raises(ValueError, match=r"late, early, head; give .*/NAME") as error:
            load_sae(run)
        assert "\n" not in str(error.value)

    def test_by_hook(self, run: Path) -> None:
        assert list(load_saes(run, hook_name=HOOKS["early"])) == ["early"]
        with pytest.raises(ValueError, match=r"holds SAEs at blocks\.1\.hook_mlp_out, .* only"):
            load_saes(run, hook_name="blocks.2.hook_mlp_out")

    def test_what_is_for_apollos_only(self, run: Path) -> None:
        with pytest.raises(ValueError, match=r"n_samples=3 .* is SAELens'"):
            load_saes(run, n_samples=3)

    def test_one_that_is_gone(self, tmp_path: Path) -> None:
        (tmp_path / "runner_cfg.json").write_text(json.dumps({"saes": {"a": {}, "b": {}}}))
        with pytest.raises(FileNotFoundError, match="/a is not there"):
            load_saes(tmp_path)

    @pytest.mark.parametrize("text", ["[]", "{", '{"saes": 3}', '{"sae": {}}'])
    def test_a_folder_of_something_else(self, text: str, tmp_path: Path) -> None:
        (tmp_path / "runner_cfg.json").write_text(text)
        assert joint_names(tmp_path) == []
        assert not is_joint_folder(tmp_path / "nowhere")

    def test_convert_gives_each_a_folder(self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["convert", str(run), str(tmp_path / "out"), "--dataset-path", "some/data"]) == 0
        assert f"early: {tmp_path / 'out' / 'early'}" in capsys.readouterr().out
        for name in HOOKS:
            assert (tmp_path / "out" / name / "sparsity.safetensors").is_file()
            assert SAE.load_from_disk(tmp_path / "out" / name).cfg.metadata.hook_name == HOOKS[name]
        assert (
            main(["convert", str(run), str(tmp_path / "ids"), "--dataset-path", "d", "--neuronpedia-id", "tiny/2-a"])
            == 2
        )
        assert "late, early, head; take one of them with --hook-name" in capsys.readouterr().err
        assert not (tmp_path / "ids").exists()


class TestApollosCheckpoint:
    @pytest.fixture
    def checkpoint(self, tmp_path: Path) -> tuple[Path, dict[str, dict[str, torch.Tensor]]]:
        saes = {HOOK: golden_parameters("e2e_ds"), OTHER: parameters(32, 40)}
        # The order of the config is not that of the checkpoint.
        config = run_config({"saes.sae_positions": [OTHER, HOOK]})
        return write_run(tmp_path / "run", config, saes), saes

    def test_every_entry_gives_the_same(
        self, checkpoint: tuple[Path, dict[str, dict[str, torch.Tensor]]], tmp_path: Path
    ) -> None:
        folder, theirs = checkpoint
        assert main(["convert", str(folder), str(tmp_path / "out")]) == 0
        entries = {
            "load_apollo_saes": load_apollo_saes(folder),
            "load_saes": load_saes(folder),
            "of the file": load_saes(folder / "samples_1600.pt"),
            "by hook": {hook: load_saes(folder, hook_name=hook)[hook] for hook in theirs},
            "converter": {
                hook: SAE.load_from_disk(folder, converter=partial(apollo_disk_loader, hook_name=hook))
                for hook in theirs
            },
            "convert": {hook: SAE.load_from_disk(tmp_path / "out" / hook) for hook in theirs},
        }
        x = torch.randn(16, 32)
        for entry, saes in entries.items():
            assert list(saes) == list(theirs), entry
            for hook, sae in saes.items():
                with torch.no_grad():
                    torch.testing.assert_close(sae(x), apollo_forward(theirs[hook], x)[1], msg=entry)
                assert sae.cfg.metadata.hook_name == hook
                assert sae.cfg.metadata.name_in_run == hook.replace(".", "-")
                (other,) = sae.cfg.metadata.companions.values()
                assert {hook, other["hook_name"]} == set(theirs)

    def test_all_are_named_where_one_is_wanted(
        self, checkpoint: tuple[Path, dict[str, dict[str, torch.Tensor]]], capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder, _ = checkpoint
        wanted = [
            partial(load_sae, folder),
            partial(load_saes, folder, hook_name="blocks.0.hook_resid_pre"),
            partial(SAE.load_from_disk, folder, converter=apollo_disk_loader),
        ]
        for load in wanted:
            with pytest.raises(ValueError) as error:  # noqa: PT011
                load()
            assert f"{HOOK}, {OTHER}" in str(error.value)
            assert "\n" not in str(error.value)
        assert main(["evaluate", str(folder)]) == 2
        assert f"{HOOK}, {OTHER}" in capsys.readouterr().err

    def test_one_alone_has_no_companions(self, tmp_path: Path) -> None:
        folder = write_run(tmp_path, run_config(), {HOOK: golden_parameters("e2e_ds")})
        metadata = load_sae(folder).cfg.metadata
        assert (metadata.name_in_run, metadata.companions) == (None, None)
