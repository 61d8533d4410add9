"""The runner config: what it refuses and what it says, batches in whole prompts, and the way through JSON and back."""

import dataclasses
import json
import math
import re
from typing import Any

import pytest
from sae_lens import (
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAEConfig,
    LanguageModelSAERunnerConfig,
    LoggingConfig,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
)
from sae_lens.llm_sae_training_runner import LanguageModelSAETrainingRunner
from sae_lens.saes.sae import TrainingSAEConfig

from sae_lens_e2e import E2E, ApolloTrainingSAEConfig, E2EDownstream, E2ERunnerConfig, Local, Objective
from tests.models import dataset_of, random_model, random_tokens
from tests.training import runner_config

HOOK = "blocks.1.hook_resid_pre"
SAES: list[TrainingSAEConfig] = [
    StandardTrainingSAEConfig(d_in=16, d_sae=40, l1_coefficient=0.02),
    TopKTrainingSAEConfig(d_in=16, d_sae=40, k=4),
    BatchTopKTrainingSAEConfig(d_in=16, d_sae=40, k=4),
    MatryoshkaBatchTopKTrainingSAEConfig(d_in=16, d_sae=40, k=4, matryoshka_widths=[10, 40]),
    JumpReLUTrainingSAEConfig(d_in=16, d_sae=40, l0_coefficient=0.5),
    GatedTrainingSAEConfig(d_in=16, d_sae=40, l1_coefficient=0.02),
    ApolloTrainingSAEConfig(d_in=16, d_sae=40, sparsity_coefficient=0.3),
]
OBJECTIVES: list[Objective] = [
    Local(mse_coefficient=0.5),
    E2E(kl_coefficient=2.0, mse_coefficient=0.1),
    E2EDownstream(),
    E2EDownstream(downstream_hooks=("blocks.2.hook_resid_pre", "blocks.2.hook_resid_post")),
]


def standard(**overrides: Any) -> StandardTrainingSAEConfig:
    return StandardTrainingSAEConfig(d_in=16, d_sae=40, **overrides)


def refused(says: list[str], **overrides: Any) -> str:
    """The message with which these settings are refused; it must contain each of `says`."""
    with pytest.raises(ValueError, match=re.escape(says[0])) as error:
        runner_config(**overrides)
    message = str(error.value)
    for text in says:
        assert text in message
    return message


# Fields that have no meaning here


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            {"use_cached_activations": True},
            ["use_cached_activations=True", "'e2e_ds'", "set it to False", "own runner"],
        ),
        ({"prefetch_llm_batches": True}, ["prefetch_llm_batches=True", "set it to False"]),
        ({"prefetch_llm_batches": 3}, ["prefetch_llm_batches=3", "set it to False"]),
        ({"activations_mixing_fraction": 0.2}, ["activations_mixing_fraction=0.2", "leave it out"]),
        ({"n_batches_in_buffer": 8}, ["n_batches_in_buffer=8", "leave it out", "shuffle the dataset"]),
        (
            {"model_class_name": "HookedMamba"},
            ["model_class_name='HookedMamba'", "HookedTransformer", "AutoModelForCausalLM"],
        ),
    ],
    ids=lambda p: next(iter(p)) if isinstance(p, dict) else "",
)
def test_what_has_no_meaning_is_refused(overrides: dict[str, Any], says: list[str]) -> None:
    refused(says, **overrides)


@pytest.mark.parametrize("normalize", ["expected_average_only_in", "covariance_whitening"])
def test_the_buffer_size_has_a_meaning_where_activations_are_estimated(normalize: Any) -> None:
    cfg = runner_config(n_batches_in_buffer=8, sae=standard(normalize_activations=normalize))
    assert cfg.n_batches_in_buffer == 8


def test_prefetching_switched_off_as_a_number_is_accepted() -> None:
    assert runner_config(prefetch_llm_batches=0).prefetch_llm_batches == 0


def test_sae_lens_defaults_are_accepted() -> None:
    defaults = {
        f.name: f.default
        for f in dataclasses.fields(LanguageModelSAERunnerConfig)
        if f.default is not dataclasses.MISSING and not f.name.startswith("sae_lens")
    }
    stock = LanguageModelSAERunnerConfig(sae=standard(), verbose=False, logger=LoggingConfig(run_name="x"))
    ours = E2ERunnerConfig(sae=standard(), verbose=False, logger=LoggingConfig(run_name="x"))
    explicit = E2ERunnerConfig(
        **(defaults | {"sae": standard(), "verbose": False, "logger": LoggingConfig(run_name="x")})
    )
    added = {
        "objective",
        "max_grad_norm",
        "hook_name_out",
        "checkpoint_activations",
        "checkpoint_path",
    }  # a checkpoint path ends in a random name

    def settings(cfg: Any) -> dict[str, Any]:
        return {k: v for k, v in cfg.to_dict().items() if k not in added}

    assert settings(ours) == settings(explicit) == settings(stock) | {"seqpos_slice": [None]}
    assert (ours.objective, ours.max_grad_norm) == (E2EDownstream(), 1.0)


# Values


@pytest.mark.parametrize("value", [0, -4])
@pytest.mark.parametrize(
    "field", ["context_size", "train_batch_size_tokens", "store_batch_size_prompts", "training_tokens"]
)
def test_sizes_are_at_least_one(field: str, value: int) -> None:
    refused([f"{field}={value}", "must be at least 1"], **{field: value})


@pytest.mark.parametrize("value", [0, 0.0, -1.0, math.nan])
def test_the_clipping_norm_is_positive(value: float) -> None:
    refused([f"max_grad_norm={value!r}", "must be positive", "float('inf') turns clipping off"], max_grad_norm=value)


def test_clipping_can_be_turned_off() -> None:
    assert runner_config(max_grad_norm=math.inf).max_grad_norm == math.inf


@pytest.mark.parametrize("value", [-1e-3, math.nan, math.inf])
@pytest.mark.parametrize(
    ("field", "sae"),
    [
        ("lr", None),
        ("l1_coefficient", StandardTrainingSAEConfig),
        ("l1_coefficient", GatedTrainingSAEConfig),
        ("l0_coefficient", JumpReLUTrainingSAEConfig),
        ("aux_loss_coefficient", TopKTrainingSAEConfig),
        ("sparsity_coefficient", ApolloTrainingSAEConfig),
    ],
)
def test_coefficients_and_rate_are_finite_and_not_negative(
    field: str, sae: type[TrainingSAEConfig] | None, value: float
) -> None:
    setting: dict[str, Any] = {field: value}
    overrides = setting if sae is None else {"sae": sae(d_in=16, d_sae=40, **setting)}
    refused([f"{field}={value!r}", "must be a finite number that is not negative"], **overrides)


@pytest.mark.parametrize(
    ("objective", "error", "says"),
    [
        ("e2e_sd", ValueError, "did you mean 'e2e_ds'"),
        (3, TypeError, "objective=3 must be the name of an objective or an Objective"),
        ({"name": "e2e", "kl": 1}, ValueError, "has no setting 'kl'"),
    ],
    ids=str,
)
def test_objectives_that_there_are_not(objective: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=re.escape(says)):
        runner_config(objective=objective)


def test_an_objective_by_name_becomes_the_objective() -> None:
    assert runner_config(objective="local").objective == Local()


# Hooks


@pytest.mark.parametrize(
    ("hook_name", "downstream"),
    [
        (HOOK, HOOK),
        (HOOK, "blocks.0.hook_resid_post"),
        ("blocks.1.hook_resid_post", "blocks.1.hook_mlp_out"),
        ("blocks.1.hook_mlp_out", HOOK),
    ],
    ids=["itself", "an earlier block", "before a block's end", "a block's start"],
)
def test_hooks_that_are_not_downstream_are_refused(hook_name: str, downstream: str) -> None:
    objective = E2EDownstream(downstream_hooks=("blocks.2.hook_resid_pre", downstream))
    refused([f"downstream_hooks: {downstream}", f"hook_name={hook_name!r}"], hook_name=hook_name, objective=objective)


@pytest.mark.parametrize(
    ("hook_name", "downstream"),
    [(HOOK, "blocks.1.hook_resid_post"), (HOOK, "blocks.2.hook_resid_pre"), (HOOK, "ln_final.hook_normalized")],
)
def test_hooks_that_are_downstream_are_accepted(hook_name: str, downstream: str) -> None:
    objective = E2EDownstream(downstream_hooks=(downstream,))
    assert runner_config(hook_name=hook_name, objective=objective).objective == objective


def test_hugging_face_names_are_left_to_the_model() -> None:
    objective = E2EDownstream(downstream_hooks=("model.layers.1",))
    cfg = runner_config(
        model_class_name="AutoModelForCausalLM", hook_name="model.layers.1.mlp.down_proj", objective=objective
    )
    assert cfg.objective == objective


# Batches


@pytest.mark.parametrize(
    ("overrides", "nearest"),
    [
        ({"train_batch_size_tokens": 50}, "set it to 48 or 72"),
        ({"train_batch_size_tokens": 71}, "set it to 48 or 72"),
        ({"train_batch_size_tokens": 25, "store_batch_size_prompts": 1}, "set it to 24 or 36"),
        ({"train_batch_size_tokens": 5}, "set it to 24"),
        ({"train_batch_size_tokens": 12}, "set it to 24, or store_batch_size_prompts to 1"),
        (
            {"train_batch_size_tokens": 36, "store_batch_size_prompts": 4},
            "set it to 48, or store_batch_size_prompts to 3",
        ),
        ({"train_batch_size_tokens": 40, "seqpos_slice": (1, -2)}, "set it to 36 or 54"),
    ],
    ids=str,
)
def test_batches_are_whole_forward_passes_and_the_nearest_are_named(overrides: dict[str, Any], nearest: str) -> None:
    message = refused([f"train_batch_size_tokens={overrides['train_batch_size_tokens']}", "tokens each"], **overrides)
    assert message.endswith(nearest)
    # What it says to do is accepted.
    fields = ("store_batch_size_prompts", "train_batch_size_tokens")
    for value in re.findall(r"\d+", nearest.split(",")[0]):
        runner_config(**(overrides | {fields[1]: int(value)}))
    if "," in nearest:
        runner_config(**(overrides | {fields[0]: int(nearest.split()[-1])}))


@pytest.mark.parametrize(
    ("seqpos_slice", "positions"),
    [
        ((None,), 12),
        ((5,), 5),
        ((3, None), 9),
        ((1, -2), 9),
        ((-4, None), 4),
        ((0, 10, 3), 4),
        ((1, None, 2), 6),
        ((None, None, 5), 3),
        ((4, 100), 8),
    ],
    ids=str,
)
def test_only_positions_in_the_slice_count(seqpos_slice: tuple[int | None, ...], positions: int) -> None:
    cfg = runner_config(seqpos_slice=seqpos_slice, train_batch_size_tokens=6 * positions)
    assert cfg.trained_context_size == positions
    assert cfg.prompts_per_step == 6
    with pytest.raises(ValueError, match=f"prompts with {positions} tokens each"):
        runner_config(seqpos_slice=seqpos_slice, train_batch_size_tokens=6 * positions + 1)


@pytest.mark.parametrize("seqpos_slice", [(5, 5), (8, 3), (-3, -5), (12, None), (0,)], ids=str)
def test_a_slice_without_positions_is_refused(seqpos_slice: tuple[int | None, ...]) -> None:
    refused(["empty range", "adjust your seqpos"], seqpos_slice=seqpos_slice)


# The run's name


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.name)
def test_a_generated_run_name_starts_with_the_objective(objective: Objective) -> None:
    stock = LanguageModelSAERunnerConfig(sae=standard(), lr=1e-3, training_tokens=240, verbose=False)
    cfg = runner_config(sae=standard(), lr=1e-3, training_tokens=240, objective=objective)
    assert cfg.logger.run_name == f"{objective.name}-{stock.logger.run_name}"


def test_a_run_name_of_ones_own_stays() -> None:
    assert runner_config(logger=LoggingConfig(run_name="mine")).logger.run_name == "mine"


# Through JSON and back


@pytest.mark.parametrize("sae", SAES, ids=lambda s: s.architecture())
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{o.name}-{len(o.hooks)}")
def test_json_and_back(objective: Objective, sae: TrainingSAEConfig) -> None:
    cfg = runner_config(
        objective=objective,
        sae=sae,
        max_grad_norm=10.0,
        seqpos_slice=(1, -2),
        train_batch_size_tokens=4 * 9,
        exclude_special_tokens=[0, 3],
        checkpoint_path="somewhere",
        model_kwargs={"verbose": False},
    )
    settings = json.loads(json.dumps(cfg.to_dict()))
    assert settings == cfg.to_dict()
    again = E2ERunnerConfig.from_dict(settings)
    assert again.to_dict() == cfg.to_dict()
    assert again == cfg
    assert (again.objective, again.sae, again.max_grad_norm) == (objective, sae, 10.0)
    assert type(again.sae) is type(sae)
    assert again.seqpos_slice == (1, -2)
    assert again.logger.run_name == cfg.logger.run_name


def test_infinite_clipping_survives_json() -> None:
    cfg = runner_config(max_grad_norm=math.inf)
    assert E2ERunnerConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg


def test_settings_are_checked_on_the_way_back_too() -> None:
    settings = runner_config().to_dict()
    with pytest.raises(ValueError, match="max_grad_norm=-1"):
        E2ERunnerConfig.from_dict(settings | {"max_grad_norm": -1})
    with pytest.raises(ValueError, match="has no setting"):
        E2ERunnerConfig.from_dict(settings | {"objective": {"name": "local", "kl_coefficient": 1.0}})


def test_settings_that_sae_lens_saved_get_the_default_objective() -> None:
    settings = runner_config().to_dict()
    del settings["objective"], settings["max_grad_norm"], settings["seqpos_slice"]
    again = E2ERunnerConfig.from_dict(settings)
    assert (again.objective, again.max_grad_norm, again.seqpos_slice) == (E2EDownstream(), 1.0, (None,))


# SAELens' own runner


def test_sae_lens_runner_does_not_train_it_locally() -> None:
    cfg = runner_config(objective="e2e", n_batches_in_buffer=20)
    with pytest.raises(TypeError, match="E2ETrainingRunner instead of LanguageModelSAETrainingRunner") as error:
        cfg.to_sae_trainer_config()
    assert "'e2e'" in str(error.value)
    runner = LanguageModelSAETrainingRunner(
        cfg, override_dataset=dataset_of(random_tokens(64, 12, 61)), override_model=random_model()
    )
    with pytest.raises(TypeError, match="E2ETrainingRunner"):
        runner.run()


def test_trainer_settings_are_sae_lens_own() -> None:
    cfg = runner_config(lr=2e-3, lr_warm_up_steps=3, adam_beta1=0.5)
    stock = LanguageModelSAERunnerConfig(
        **{
            f.name: getattr(cfg, f.name)
            for f in dataclasses.fields(LanguageModelSAERunnerConfig)
            if f.name != "checkpoint_path"
        },
        checkpoint_path=None,
    )
    assert cfg.to_e2e_trainer_config() == stock.to_sae_trainer_config()


def test_a_bridge_needs_a_transformer_lens_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runner_config(model_class_name="TransformerBridge").model_class_name == "TransformerBridge"
    monkeypatch.setattr("sae_lens_e2e.splice.bridge.TransformerBridge", None)
    with pytest.raises(ValueError, match=r"model_class_name='TransformerBridge' needs transformer-lens 3\.9 or later"):
        runner_config(model_class_name="TransformerBridge")
