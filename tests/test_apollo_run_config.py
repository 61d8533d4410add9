"""Apollo's configs: what is read of them, and the runner config that repeats such a run."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from sae_lens import LoggingConfig, StandardTrainingSAEConfig, TopKTrainingSAEConfig, TrainingSAE
from safetensors.torch import load_file

from sae_lens_e2e import E2E, ApolloTrainingSAEConfig, E2EDownstream, E2ERunnerConfig, Local
from sae_lens_e2e.apollo.model import PROCESSED
from sae_lens_e2e.apollo.run_config import read_run_config
from sae_lens_e2e.splice import frozen
from tests.apollo import HOOK, apollo_forward, golden_parameters, named_model, reference, run_config, write_tiny4l
from tests.models import GOLDEN, apollo_tiny4l
from tests.training import make_runner, make_trainer

DOWNSTREAM = ("blocks.2.hook_resid_post", "blocks.3.hook_resid_pre", "blocks.3.hook_resid_post")
# What keeps a test from writing, and from looking for the language model.
QUIET: dict[str, Any] = {"d_in": 32, "output_path": None, "checkpoint_path": None, "verbose": False}


def written(folder: Path, config: Mapping[str, Any]) -> Path:
    """The file with a run's settings."""
    (folder / "final_config.yaml").write_text(yaml.dump(dict(config)))
    return folder / "final_config.yaml"


def from_apollo(folder: Path, changes: Mapping[str, Any] | None = None, **options: Any) -> E2ERunnerConfig[Any]:
    """The runner config of the reference run with some settings changed."""
    return E2ERunnerConfig.from_apollo(written(folder, run_config(changes)), **(QUIET | options))


def refuses(
    folder: Path, changes: Mapping[str, Any], *parts: str, without: tuple[str, ...] = (), **options: Any
) -> None:
    """There must be no runner config of it, and one line that says all of `parts`."""
    path = written(folder, run_config(changes, without))
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        E2ERunnerConfig.from_apollo(path, **(QUIET | options))
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


class TestReferenceRun:
    def test_every_setting(self, tmp_path: Path) -> None:
        cfg = from_apollo(tmp_path)
        assert isinstance(cfg, E2ERunnerConfig)
        assert cfg.sae.to_dict() == ApolloTrainingSAEConfig(d_in=32, d_sae=256, sparsity_coefficient=0.3).to_dict()
        assert cfg.objective == E2EDownstream(0.5, 2.5, DOWNSTREAM, mse_coefficient=0.0)
        expected = {
            "model_name": "tiny4l/model.pt",
            "model_class_name": "HookedTransformer",
            "model_from_pretrained_kwargs": {"center_writing_weights": False},
            "hook_name": HOOK,
            "hook_head_index": None,
            "dataset_path": "tiny512x64",
            "is_dataset_tokenized": True,
            "streaming": True,
            "prepend_bos": False,
            "exclude_special_tokens": False,
            "context_size": 64,
            "store_batch_size_prompts": 8,
            "train_batch_size_tokens": 16 * 64,
            "training_tokens": 1600 * 64,
            "lr": 0.001,
            "lr_scheduler_name": "cosineannealing",
            "lr_end": 0.0001,
            "lr_warm_up_steps": 10,
            "lr_decay_steps": 0,
            "adam_beta1": 0.9,
            "adam_beta2": 0.999,
            "max_grad_norm": 10.0,
            "seed": 0,
            "n_checkpoints": 1,
        }
        assert {name: getattr(cfg, name) for name in expected} == expected
        assert cfg.logger.log_to_wandb is False
        assert (cfg.logger.run_name, cfg.logger.wandb_log_frequency) == ("e2e_ds", 20)

    def test_of_the_folder_as_of_the_file(self, tmp_path: Path) -> None:
        cfg = from_apollo(tmp_path)
        assert E2ERunnerConfig.from_apollo(tmp_path, **QUIET).to_dict() == cfg.to_dict()

    @pytest.mark.parametrize("run", ["local", "e2e_ds"])
    def test_what_apollos_library_wrote(self, run: str) -> None:
        folder = reference(run)
        # The width is that of the language model, which lies beside the run.
        quiet: dict[str, Any] = QUIET | {"d_in": None}
        cfg = E2ERunnerConfig.from_apollo(folder, **quiet)
        assert (cfg.sae.d_in, cfg.sae.d_sae) == (32, 256)
        assert Path(cfg.model_name).samefile(reference("tiny4l") / "model.pt")
        if run == "e2e_ds":
            assert read_run_config(folder) == run_config()
        else:
            assert cfg.objective == Local(1 / 32)

    def test_it_can_be_saved_and_read_again(self, tmp_path: Path) -> None:
        cfg = from_apollo(tmp_path)
        assert E2ERunnerConfig.from_dict(cfg.to_dict()).to_dict() == cfg.to_dict()

    def test_the_width_and_the_model_are_found_beside_the_run(self, tmp_path: Path) -> None:
        model = write_tiny4l(tmp_path / "tiny4l")
        (tmp_path / "e2e_ds").mkdir()
        cfg = from_apollo(tmp_path / "e2e_ds", d_in=None)
        assert cfg.sae.d_in == 32
        assert cfg.model_name == str(model)


class TestEachKey:
    @pytest.mark.parametrize(
        ("changes", "objective"),
        [
            ({"loss.in_to_orig": None, "loss.logits_kl": None, "loss.out_to_in.coeff": 1.0}, Local(1 / 32)),
            ({"loss.in_to_orig": None, "loss.logits_kl.coeff": 0.0, "loss.out_to_in.coeff": 0.5}, Local(0.5 / 32)),
            ({"loss.in_to_orig": None, "loss.out_to_in": None}, E2E(0.5)),
            ({"loss.in_to_orig": None, "loss.logits_kl.coeff": 1.0, "loss.out_to_in.coeff": 2}, E2E(1.0, 2 / 32)),
            ({"loss.in_to_orig.total_coeff": 0.0}, E2E(0.5)),
            (
                {"loss.in_to_orig.hook_positions": DOWNSTREAM[1], "loss.in_to_orig.total_coeff": 0.05},
                E2EDownstream(0.5, 0.05, (DOWNSTREAM[1],), 0.0),
            ),
            (
                {"loss.logits_kl": None, "loss.out_to_in.coeff": 3.2},
                E2EDownstream(0.0, 2.5, DOWNSTREAM, 3.2 / 32),
            ),
        ],
    )
    def test_the_loss(self, tmp_path: Path, changes: dict[str, Any], objective: Any) -> None:
        assert from_apollo(tmp_path, changes).objective == objective

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"lr": 0.01}, {"lr": 0.01, "lr_end": 0.001}),
            ({"lr": "5e-4"}, {"lr": 5e-4, "lr_end": 5e-5}),  # what YAML makes of 5e-4
            ({"min_lr_factor": 0.25}, {"lr_end": 0.00025}),
            ({"min_lr_factor": 0.0}, {"lr_end": 0.0}),
            ({"min_lr_factor": None}, {"lr_end": 0.0001}),
            ({"warmup_samples": 0}, {"lr_warm_up_steps": 0}),
            ({"warmup_samples": None}, {"lr_warm_up_steps": 0}),
            ({"warmup_samples": 47}, {"lr_warm_up_steps": 2}),
            ({"lr_schedule": "linear"}, {"lr_scheduler_name": "constant", "lr_decay_steps": 0}),
            (
                {"lr_schedule": "linear", "cooldown_samples": 330, "min_lr_factor": 0.0},
                {"lr_scheduler_name": "constant", "lr_decay_steps": 20, "lr_warm_up_steps": 10},
            ),
            ({"max_grad_norm": 1}, {"max_grad_norm": 1.0}),
            ({"max_grad_norm": None}, {"max_grad_norm": math.inf}),
            ({"batch_size": 4}, {"store_batch_size_prompts": 4, "train_batch_size_tokens": 16 * 64}),
            ({"effective_batch_size": None}, {"train_batch_size_tokens": 8 * 64, "lr_warm_up_steps": 20}),
            ({"effective_batch_size": 24}, {"train_batch_size_tokens": 24 * 64, "lr_warm_up_steps": 6}),
            ({"n_samples": 320}, {"training_tokens": 320 * 64, "n_checkpoints": 0}),
            ({"train_data.n_ctx": 32}, {"context_size": 32, "training_tokens": 1600 * 32}),
            ({"save_every_n_samples": 400}, {"n_checkpoints": 3}),
            ({"save_every_n_samples": 500}, {"n_checkpoints": 3}),
            ({"save_every_n_samples": None}, {"n_checkpoints": 0}),
            ({"eval_n_samples": 500}, {"n_eval_batches": 63, "eval_batch_size_prompts": 8}),
            ({"seed": 7}, {"seed": 7}),
            ({"train_data.streaming": False}, {"streaming": False}),
            ({"train_data.dataset_name": "a/b"}, {"dataset_path": "a/b"}),
            ({"train_data.column_name": "tokens"}, {"is_dataset_tokenized": True}),
            (
                {"train_data.is_tokenized": False, "train_data.column_name": "text"},
                {"is_dataset_tokenized": False, "prepend_bos": True},
            ),
            ({"saes.sae_positions": "blocks.1.hook_resid_post"}, {"hook_name": "blocks.1.hook_resid_post"}),
            ({"saes.sae_positions": ["blocks.1.mlp.hook_post"]}, {"hook_name": "blocks.1.mlp.hook_post"}),
            ({"saes.retrain_saes": True}, {}),  # without pretrained ones there are none to retrain
            ({"saes.type_of_sparsifier": "sae", "saes.k": None, "loss.anything_new": None}, {}),
        ],
    )
    def test_a_field(self, tmp_path: Path, changes: dict[str, Any], expected: dict[str, Any]) -> None:
        cfg = from_apollo(tmp_path, changes)
        assert {name: getattr(cfg, name) for name in expected} == pytest.approx(expected)

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"loss.sparsity.coeff": 50}, {"sparsity_coefficient": 50.0}),
            ({"loss.sparsity.p_norm": 0.5}, {"lp_norm": 0.5}),
            ({"loss.sparsity.p_norm": None}, {"lp_norm": 1.0}),
            ({"saes.dict_size_to_input_ratio": 60}, {"d_sae": 1920}),
            ({"saes.dict_size_to_input_ratio": 1.3}, {"d_sae": 41}),  # Apollo's library rounds down
        ],
    )
    def test_the_sae(self, tmp_path: Path, changes: dict[str, Any], expected: dict[str, Any]) -> None:
        sae = from_apollo(tmp_path, changes).sae
        assert {name: getattr(sae, name) for name in expected} == expected

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"wandb_project": "gpt2"}, LoggingConfig(True, wandb_project="gpt2", run_name="e2e_ds")),
            (
                {"wandb_project": "gpt2", "wandb_run_name": "x", "wandb_run_name_prefix": "my_"},
                LoggingConfig(True, wandb_project="gpt2", run_name="my_x"),
            ),
            ({"log_every_n_grad_steps": 5}, LoggingConfig(False, run_name="e2e_ds", wandb_log_frequency=5)),
        ],
    )
    def test_logging(self, tmp_path: Path, changes: dict[str, Any], expected: LoggingConfig) -> None:
        logger = from_apollo(tmp_path, changes).logger
        for name in ("log_to_wandb", "wandb_project", "run_name"):
            assert getattr(logger, name) == getattr(expected, name)
        assert logger.wandb_log_frequency == changes.get("log_every_n_grad_steps", 20)

    def test_a_run_without_a_name_gets_one(self, tmp_path: Path) -> None:
        name = from_apollo(tmp_path, {"wandb_run_name": None}).logger.run_name
        assert name is not None
        assert name.startswith("e2e_ds-apollo-256-")

    @pytest.mark.parametrize(
        ("changes", "steps"), [({"eval_every_n_samples": 640}, 40), ({"eval_every_n_samples": 1}, 20)]
    )
    def test_evaluation_every_so_many_samples(self, tmp_path: Path, changes: dict[str, Any], steps: int) -> None:
        logger = from_apollo(tmp_path, changes).logger
        assert logger.wandb_log_frequency * logger.eval_every_n_wandb_logs == steps

    def test_no_evaluation(self, tmp_path: Path) -> None:
        cfg = from_apollo(tmp_path)
        n_logs = cfg.training_tokens // cfg.train_batch_size_tokens // cfg.logger.wandb_log_frequency
        assert cfg.logger.eval_every_n_wandb_logs > n_logs


def test_a_run_of_the_paper(tmp_path: Path) -> None:
    """GPT2-small, layer 6, e2e+ds of Table 2, with the settings of the paper's appendix."""
    data = {
        **{
            "column_name": "input_ids",
            "is_tokenized": True,
            "n_ctx": 1024,
            "streaming": True,
            "tokenizer_name": "gpt2",
        },
        **{"dataset_name": "apollo-research/Skylion007-openwebtext-tokenizer-gpt2", "seed": 0, "split": "train"},
    }
    config = named_model(
        "gpt2-small",
        "blocks.6.hook_resid_pre",
        {
            **{"lr": 0.0005, "lr_schedule": "cosine", "min_lr_factor": 0.1, "warmup_samples": 20000},
            **{"batch_size": 8, "effective_batch_size": 16, "n_samples": 400000, "max_grad_norm": 10.0, "seed": 0},
            **{"save_every_n_samples": None, "eval_every_n_samples": 40000, "eval_n_samples": 500},
            **{"collect_output_metrics_every_n_samples": 0, "act_frequency_n_tokens": 500000},
            **{"wandb_project": "gpt2", "wandb_run_name": None, "wandb_run_name_prefix": "e2e-ds_"},
            "saes.dict_size_to_input_ratio": 60.0,
            "loss.sparsity": {"coeff": 50.0, "p_norm": 1.0},
            "loss.logits_kl": {"coeff": 0.5},
            "loss.out_to_in": {"coeff": 0.0},
            "loss.in_to_orig": {
                "hook_positions": [f"blocks.{layer}.hook_resid_pre" for layer in range(7, 12)],
                "total_coeff": 2.5,
            },
            "train_data": data,
            "eval_data": {**data, "seed": 42},
        },
    )
    cfg = E2ERunnerConfig.from_apollo(written(tmp_path, config), d_in=768, verbose=False)
    assert (cfg.sae.d_in, cfg.sae.d_sae, cfg.sae.sparsity_coefficient) == (768, 46080, 50.0)
    hooks = tuple(f"blocks.{layer}.hook_resid_pre" for layer in range(7, 12))
    assert cfg.objective == E2EDownstream(0.5, 2.5, hooks)
    assert (cfg.model_name, cfg.hook_name) == ("gpt2-small", "blocks.6.hook_resid_pre")
    assert cfg.model_from_pretrained_kwargs == PROCESSED
    assert cfg.training_tokens == 409_600_000
    assert cfg.training_tokens // cfg.train_batch_size_tokens == 25_000
    assert (cfg.lr, cfg.lr_end, cfg.lr_warm_up_steps, cfg.max_grad_norm) == (0.0005, 0.00005, 1250, 10.0)
    assert (cfg.n_eval_batches, cfg.eval_batch_size_prompts) == (63, 8)
    assert cfg.logger.wandb_log_frequency * cfg.logger.eval_every_n_wandb_logs == 40_000 // 16
    assert (cfg.logger.log_to_wandb, cfg.logger.wandb_project) == (True, "gpt2")
    standard = E2ERunnerConfig.from_apollo(tmp_path, d_in=768, architecture="standard", verbose=False)
    assert standard.sae.l1_coefficient == pytest.approx(50 / 768)


class TestArchitectures:
    @pytest.mark.parametrize("architecture", ["apollo", "standard"])
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"loss.sparsity.p_norm": 2.0, "loss.out_to_in.coeff": 0.7},
            {"loss.in_to_orig": None, "loss.sparsity.coeff": 3},
            {"loss.in_to_orig": None, "loss.logits_kl": None, "loss.out_to_in.coeff": 1.0},
        ],
    )
    def test_the_loss_is_apollos(self, tmp_path: Path, architecture: str, changes: dict[str, Any]) -> None:
        tokens, model = load_file(GOLDEN / "apollo_e2e_ds.safetensors")["tokens"], apollo_tiny4l()
        trained = golden_parameters("e2e_ds")
        cfg = from_apollo(tmp_path, changes, architecture=architecture, is_dataset_tokenized=True)
        sae = TrainingSAE.from_dict(cfg.sae.to_dict())
        dictionary = F.normalize(trained["decoder.weight"], dim=0)
        weights = (trained["encoder.weight"].T, trained["encoder.bias"], dictionary.T, trained["decoder.bias"])
        names = ("W_enc", "b_enc", "W_dec", "b_dec")
        sae.load_state_dict({k: v.contiguous() for k, v in zip(names, weights, strict=True)})
        trainer = make_trainer(make_runner(cfg, model, sae=sae))
        with frozen(model):
            ours = trainer.step(tokens).loss
        loss = naive_loss(run_config(changes)["loss"], model, tokens, trained)
        assert float(ours) == pytest.approx(float(loss), rel=1e-5)
        if not changes:
            golden = load_file(GOLDEN / "apollo_e2e_ds.safetensors")["loss.total"]
            assert float(ours) == pytest.approx(float(golden), rel=1e-5)

    def test_the_standard_architecture(self, tmp_path: Path) -> None:
        sae = from_apollo(tmp_path, architecture="standard").sae
        assert isinstance(sae, StandardTrainingSAEConfig)
        assert (sae.l1_coefficient, sae.apply_b_dec_to_input) == (0.3 / 32, False)

    def test_another_architecture(self, tmp_path: Path) -> None:
        refuses(tmp_path, {}, "architecture='topk'", "apollo, standard", "sae=", architecture="topk")

    @pytest.mark.parametrize(
        ("warm_up", "schedule", "expected"),
        [
            # As SAELens has it: the first step of the warm-up is not lost to a learning rate of 0.
            (48, "cosine", None),
            (48, "linear", [1 / 3, 2 / 3, *[1.0] * 8]),
            (0, "linear", [1.0] * 10),
        ],
    )
    def test_the_learning_rate_of_each_step(
        self, tmp_path: Path, warm_up: int, schedule: str, expected: list[float] | None
    ) -> None:
        changes = {"n_samples": 160, "warmup_samples": warm_up, "lr_schedule": schedule}
        cfg = from_apollo(tmp_path, changes)
        trainer = make_trainer(make_runner(cfg, apollo_tiny4l()))
        rates = []
        for _ in range(10):
            rates.append(trainer.optimizer.param_groups[0]["lr"])
            trainer.optimizer.step()
            trainer.lr_scheduler.step()
        if expected is not None:
            assert rates == pytest.approx([0.001 * factor for factor in expected])
            return
        theirs = load_file(GOLDEN / "apollo_e2e_ds.safetensors")["trajectory.traj.lr"].tolist()
        assert theirs[0] == 0.0
        assert rates[3:] == pytest.approx(theirs[3:])
        assert rates[:3] == pytest.approx(theirs[1:4])


def naive_loss(
    loss: Mapping[str, Any], model: Any, tokens: torch.Tensor, sae: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """The paper's equations 1 to 4 with Apollo's scales, coefficients as they are in a config."""
    seen: dict[str, torch.Tensor] = {}

    def splice(x: torch.Tensor, hook: Any) -> torch.Tensor:  # noqa: ARG001
        seen["input"] = x
        seen["features"], seen["output"] = apollo_forward(sae, x)
        return seen["output"]

    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens)
        model.add_hook(HOOK, splice)
        new_logits, new_cache = model.run_with_cache(tokens)
        model.reset_hooks()
    sparsity, later = loss["sparsity"], loss["in_to_orig"]
    total = sparsity["coeff"] * seen["features"].norm(p=sparsity["p_norm"], dim=-1).mean() / seen["input"].shape[-1]
    total += loss["out_to_in"]["coeff"] * (seen["input"] - seen["output"]).square().mean()
    if later is not None:
        errors = [(new_cache[hook] - cache[hook]).square().mean() for hook in later["hook_positions"]]
        total += sum(later["total_coeff"] / len(errors) * error for error in errors)
    if loss["logits_kl"] is not None:
        p = logits.log_softmax(-1)
        total += loss["logits_kl"]["coeff"] * (p.exp() * (p - new_logits.log_softmax(-1))).sum(-1).mean()
    return total


class TestRefused:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("loss.out_to_orig", {"coeff": 0.0}),
            ("loss.out_to_orig", {"coeff": 1.0}),
            ("saes.pretrained_sae_paths", ["some/samples_1.pt"]),
            ("saes.k", 32),
            ("saes.type_of_sparsifier", "codebook"),
            ("train_data.split", "validation"),
            ("train_data.split", "train[:90%]"),
            ("train_data.column_name", "pieces"),
            ("lr_schedule", "exponential"),
            # Keys that no version is known to have, at each level.
            ("anything_new", 1),
            ("anything_new", False),
            ("loss.anything_new", {"coeff": 1.0}),
            ("loss.sparsity.anything_new", 1),
            ("loss.in_to_orig.anything_new", "x"),
            ("loss.out_to_in.anything_new", 1),
            ("loss.logits_kl.anything_new", 1),
            ("saes.anything_new", True),
            ("train_data.anything_new", 1),
        ],
    )
    def test_a_key_without_equivalent(self, tmp_path: Path, name: str, value: Any) -> None:
        refuses(tmp_path, {name: value}, f"{name}={value!r} has no equivalent")

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"saes.sae_positions": [HOOK, "blocks.3.hook_resid_pre"]}, "hook_name="),
            ({"saes.sae_positions": []}, "saes.sae_positions=[]"),
            ({"saes.sae_positions": None}, "saes.sae_positions=[]"),
            ({"saes.sae_positions": "hook_resid_pre"}, "saes.sae_positions: 'hook_resid_pre'"),
            ({"saes.sae_positions": "blocks.2"}, "saes.sae_positions: 'blocks.2'"),
            ({"saes.sae_positions": ["blocks.2.hook_resid", 3]}, "saes.sae_positions: 3"),
            (
                {"saes.sae_positions": "blocks.2.attn.hook_z"},
                "at blocks.2.attn.hook_z Apollo's library trains one SAE on",
            ),
            (
                {"loss.in_to_orig.hook_positions": ["hook_resid_post"]},
                "loss.in_to_orig.hook_positions: 'hook_resid_post'",
            ),
            ({"loss.in_to_orig.hook_positions": "resid"}, "loss.in_to_orig.hook_positions: 'resid'"),
            ({"loss.in_to_orig.hook_positions": []}, "must name at least one hook"),
            ({"loss.in_to_orig.hook_positions": [HOOK]}, "is not downstream"),
            ({"lr_schedule": "linear", "cooldown_samples": 160}, "min_lr_factor=0.1 has no equivalent"),
            ({"cooldown_samples": 160}, "cooldown_samples=160"),
            ({"n_samples": None}, "n_samples is null"),
            ({"tlens_model_path": None}, "tlens_model_name and tlens_model_path are both null"),
            ({"max_grad_norm": 0}, "max_grad_norm"),
            ({"batch_size": 3}, "train_batch_size_tokens"),
            ({"loss.in_to_orig": None, "loss.logits_kl": None}, "nothing to train on"),
        ],
    )
    def test_a_value_without_equivalent(self, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
        refuses(tmp_path, changes, says)

    @pytest.mark.parametrize(
        "name",
        [
            *("lr", "batch_size", "train_data.n_ctx", "train_data.dataset_name", "loss.sparsity.coeff"),
            *("loss.logits_kl.coeff", "loss.out_to_in.coeff", "loss.in_to_orig.total_coeff"),
            "loss.in_to_orig.hook_positions",
        ],
    )
    def test_a_setting_that_has_no_default(self, tmp_path: Path, name: str) -> None:
        refuses(tmp_path, {}, f"{name} is missing", without=(name,))
        refuses(tmp_path, {name: None}, f"{name} is missing")

    def test_no_sparsity_at_all(self, tmp_path: Path) -> None:
        refuses(tmp_path, {"loss.sparsity": None}, "loss.sparsity.coeff is missing")

    @pytest.mark.parametrize(
        ("name", "value", "kind"),
        [
            ("lr", "fast", "a number"),
            ("lr", [0.1], "a number"),
            ("lr", -0.1, "a number"),
            ("lr", True, "a number"),
            ("lr", float("nan"), "a number"),
            ("loss.sparsity.coeff", "much", "a number"),
            ("batch_size", 2.5, "a whole number of at least 1"),
            ("batch_size", 0, "a whole number of at least 1"),
            ("effective_batch_size", 0, "a whole number of at least 1"),
            ("train_data.n_ctx", "all", "a whole number of at least 1"),
            ("n_samples", -1, "a whole number of at least 0"),
        ],
    )
    def test_what_is_no_number(self, tmp_path: Path, name: str, value: Any, kind: str) -> None:
        refuses(tmp_path, {name: value}, f"{name}={value!r} must be {kind}", str(tmp_path))

    def test_a_width_that_cannot_be_looked_up(self, tmp_path: Path) -> None:
        refuses(tmp_path, {}, "tlens_model_path='tiny4l/model.pt'", "pass d_in=", d_in=None)

    def test_no_file(self, tmp_path: Path) -> None:
        for path in (tmp_path, tmp_path / "other.yaml"):
            with pytest.raises(FileNotFoundError, match=r"there is no file '.*yaml'$"):
                E2ERunnerConfig.from_apollo(path)

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("model:\n  d_model: 32\n", "no 'saes'"),
            ("[]", "no 'saes'"),
            ("saes: 3\nloss: {}\ntrain_data: {}", "saes=3 is not a mapping"),
            ("saes: {}\nloss: null\ntrain_data: {}", "loss=None is not a mapping"),
            ("saes: {}\nloss: {sparsity: 0.3}\ntrain_data: {}", "loss.sparsity=0.3 is not a mapping"),
            ("saes: {\n", "is neither YAML nor JSON"),
            ("x: !!python/name:os.system", "is neither YAML nor JSON"),
        ],
    )
    def test_another_file(self, tmp_path: Path, text: str, says: str) -> None:
        (tmp_path / "final_config.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"final_config\.yaml") as caught:
            E2ERunnerConfig.from_apollo(tmp_path)
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)


class TestOverrides:
    def test_a_field_of_the_class(self, tmp_path: Path) -> None:
        cfg = from_apollo(tmp_path, lr=0.5, training_tokens=2048, prepend_bos=True, device="cpu", seed=3)
        assert (cfg.lr, cfg.training_tokens, cfg.prepend_bos, cfg.seed) == (0.5, 2048, True, 3)
        with pytest.raises(TypeError, match="learning_rate"):
            from_apollo(tmp_path, learning_rate=0.5)

    def test_one_of_several_positions(self, tmp_path: Path) -> None:
        several = {"saes.sae_positions": ["blocks.1.hook_resid_pre", HOOK]}
        assert from_apollo(tmp_path, several, hook_name=HOOK).hook_name == HOOK

    def test_a_length_where_the_run_has_none(self, tmp_path: Path) -> None:
        cfg = from_apollo(tmp_path, {"n_samples": None}, training_tokens=4096)
        assert (cfg.training_tokens, cfg.n_checkpoints) == (4096, 0)

    def test_with_an_sae_of_ones_own_the_width_is_its(self, tmp_path: Path) -> None:
        sae = TopKTrainingSAEConfig(d_in=48, d_sae=96, k=4)
        cfg = from_apollo(tmp_path, {"loss.out_to_in.coeff": 1.0}, d_in=None, sae=sae)
        assert cfg.sae is sae
        assert cfg.objective == E2EDownstream(0.5, 2.5, DOWNSTREAM, 1 / 48)

    def test_with_both_of_ones_own_neither_is_read(self, tmp_path: Path) -> None:
        sae = TopKTrainingSAEConfig(d_in=48, d_sae=96, k=4)
        changes = {"loss.sparsity": None, "loss.logits_kl": {}, "tlens_model_path": "nowhere.pt"}
        cfg = from_apollo(tmp_path, changes, d_in=None, sae=sae, objective="e2e")
        assert (cfg.sae, cfg.objective) == (sae, E2E())


class TestWhatIsSaid:
    def test_what_is_left_out(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO):
            from_apollo(tmp_path)
        (said,) = [message for message in caplog.messages if "left out" in message]
        for key in ("act_frequency_n_tokens", "collect_act_frequency_every_n_samples", "eval_data", "save_dir"):
            assert key in said
        assert any("override_dataset" in message for message in caplog.messages)

    def test_nothing_where_nothing_is(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        watching = ("act_frequency_n_tokens", "collect_act_frequency_every_n_samples", "eval_data", "save_dir")
        path = written(tmp_path, run_config(without=watching))
        with caplog.at_level(logging.INFO):
            E2ERunnerConfig.from_apollo(path, **QUIET)
        assert not [message for message in caplog.messages if "left out" in message]
