"""Every training architecture of SAELens, and ours, under every objective."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAEConfig,
    MatchingPursuitTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
    TrainingSAEConfig,
)
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.abstopk_sae import AbsTopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput
from safetensors.torch import load_file
from torch import Tensor

from sae_lens_e2e import ApolloTrainingSAEConfig
from sae_lens_e2e.architectures.transcoder import TRANSCODERS
from sae_lens_e2e.splice import frozen
from tests.models import random_model, random_tokens
from tests.training import EVERY_STEP, gradients, make_runner, make_trainer, runner_config

HOOK = "blocks.1.hook_resid_pre"
# Fewer active features in a step than there are features, so that some are dead after one with a window of 0.
SIZE: dict[str, Any] = {"d_in": 16, "d_sae": 128}
K: dict[str, Any] = {**SIZE, "k": 2}

CONFIGS: dict[str, TrainingSAEConfig] = {
    "standard": StandardTrainingSAEConfig(**SIZE, l1_coefficient=0.02),
    "topk": TopKTrainingSAEConfig(**K),
    "abstopk": AbsTopKTrainingSAEConfig(**K),
    "batchtopk": BatchTopKTrainingSAEConfig(**K),
    "matryoshka_batchtopk": MatryoshkaBatchTopKTrainingSAEConfig(
        **K, matryoshka_widths=[16, 64, 128], use_matryoshka_aux_loss=True
    ),
    "jumprelu": JumpReLUTrainingSAEConfig(
        **SIZE, l0_coefficient=0.1, pre_act_loss_coefficient=0.01, jumprelu_init_threshold=0.8
    ),
    "gated": GatedTrainingSAEConfig(**SIZE, l1_coefficient=0.02),
    "matching_pursuit": MatchingPursuitTrainingSAEConfig(**SIZE, max_iterations=3, decoder_init_norm=1.0),
    "apollo": ApolloTrainingSAEConfig(**SIZE, sparsity_coefficient=0.3),
}
OWN_TERMS: dict[str, set[str]] = {
    "standard": {"l1_loss"},
    "topk": {"auxiliary_reconstruction_loss"},
    "abstopk": {"auxiliary_reconstruction_loss"},
    "batchtopk": {"auxiliary_reconstruction_loss"},
    "matryoshka_batchtopk": {"auxiliary_reconstruction_loss", "inner_mse_loss_16", "inner_mse_loss_64"},
    "jumprelu": {"l0_loss", "pre_act_loss"},
    "gated": {"l1_loss", "auxiliary_reconstruction_loss"},
    "matching_pursuit": set(),
    "apollo": {"sparsity_loss"},
}
SAVED_AS = {
    **{name: name for name in CONFIGS},
    "batchtopk": "jumprelu",
    "matryoshka_batchtopk": "jumprelu",
    "apollo": "standard",
}
OBJECTIVE_TERMS = {"local": {"mse_loss"}, "e2e": {"kl", "mse_loss"}, "e2e_ds": {"kl", "downstream_mse", "mse_loss"}}

every_architecture = pytest.mark.parametrize("architecture", CONFIGS)
every_objective = pytest.mark.parametrize("objective", OBJECTIVE_TERMS)


def config(architecture: str, objective: str, **overrides: Any) -> Any:
    # A copy, for training writes into an SAE's config.
    sae = copy.deepcopy(CONFIGS[architecture])
    return runner_config(sae=sae, objective=objective, dead_feature_window=0, lr=3e-3, **overrides)


def hook_activations(tokens: Tensor) -> Tensor:
    """(tokens, d_in) at HOOK, as TransformerLens computes them."""
    with torch.no_grad():
        return random_model().run_with_cache(tokens, names_filter=HOOK)[1][HOOK].flatten(0, 1)


def test_every_registered_architecture_is_tested() -> None:
    # tests/test_transcoders.py has the transcoders.
    assert set(SAE_TRAINING_CLASS_REGISTRY) == set(CONFIGS) | set(TRANSCODERS)
    assert set(CONFIGS) == set(OWN_TERMS)
    for name, sae_config in CONFIGS.items():
        assert sae_config.architecture() == name


@every_architecture
@every_objective
def test_own_terms_are_sae_lens_own(architecture: str, objective: str) -> None:
    # One forward pass a step: the top k of a batch depend on the batch.
    cfg = config(architecture, objective, store_batch_size_prompts=4, logger=EVERY_STEP)
    trainer = make_trainer(make_runner(cfg))
    dead, last = 0, {}
    with frozen(trainer.group.model.model):
        for step in range(4):
            tokens = random_tokens(4, 12, 61, seed=step)
            dead = int(trainer.dead_neurons.sum())
            reference = copy.deepcopy(trainer.sae).training_forward_pass(
                TrainStepInput(
                    sae_in=hook_activations(tokens),
                    coefficients=trainer.get_coefficients(),
                    dead_neuron_mask=trainer.dead_neurons,
                    n_training_steps=step,
                    is_logging_step=False,
                )
            )
            output = trainer.step(tokens)
            trainer.n_training_steps += 1

            assert bool(output.loss.isfinite())
            assert set(output.losses) == OWN_TERMS[architecture] | OBJECTIVE_TERMS[objective]
            for name, value in reference.losses.items():
                torch.testing.assert_close(
                    output.losses[name], value.detach(), rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
                )
            weighted = sum(output.coefficients[name] * output.losses[name] for name in OBJECTIVE_TERMS[objective])
            own = sum(output.losses[name] for name in OWN_TERMS[architecture])
            torch.testing.assert_close(output.loss, torch.as_tensor(weighted + own), rtol=1e-4, atol=1e-5)
            last = output.losses
    if architecture not in ("standard", "gated", "apollo"):
        assert dead > 0
    for name in OWN_TERMS[architecture]:
        assert float(last[name]) > 0, f"{name} never occurred"


@every_architecture
@every_objective
def test_training_lowers_the_loss_and_changes_every_parameter(architecture: str, objective: str) -> None:
    trainer = make_trainer(make_runner(config(architecture, objective)))
    before = {name: parameter.detach().clone() for name, parameter in trainer.sae.named_parameters()}
    tokens = random_tokens(4, 12, 61)
    with frozen(trainer.group.model.model):
        losses = [trainer.step(tokens).losses for _ in range(15)]
    goal = "mse_loss" if objective == "local" else "kl"
    assert float(losses[-1][goal]) < float(losses[0][goal])
    for name, parameter in trainer.sae.named_parameters():
        assert bool(parameter.isfinite().all()), name
        assert not torch.equal(parameter, before[name]), name


@every_architecture
@pytest.mark.parametrize("objective", ["e2e", "e2e_ds"])
def test_gradient_is_not_that_of_reconstruction(architecture: str, objective: str) -> None:
    tokens = random_tokens(4, 12, 61)
    found = {}
    for name in ("local", objective):
        trainer = make_trainer(make_runner(config(architecture, name)))
        with frozen(trainer.group.model.model):
            found[name] = gradients(trainer, tokens)
    assert found["local"].keys() == found[objective].keys()
    ours, local = (found[name]["W_dec"].flatten() for name in (objective, "local"))
    assert float(ours.norm()) > 0
    assert float((ours - local).norm() / local.norm()) > 0.05


@pytest.mark.filterwarnings("ignore:.*non-empty model_from_pretrained_kwargs:UserWarning")
@every_architecture
@every_objective
def test_what_is_saved_is_what_sae_lens_saves(architecture: str, objective: str, tmp_path: Path) -> None:
    cfg = config(architecture, objective, output_path=str(tmp_path / "ours"), training_tokens=3 * 48)
    trained = make_runner(cfg).run()
    trained.save_inference_model(tmp_path / "theirs")
    for name, value in load_file(tmp_path / "theirs" / "sae_weights.safetensors").items():
        assert torch.equal(value, load_file(tmp_path / "ours" / "sae_weights.safetensors")[name]), name
    ours, theirs = (json.loads((tmp_path / who / "cfg.json").read_text()) for who in ("ours", "theirs"))
    assert ours == theirs
    assert ours["metadata"]["training_architecture"] == architecture
    assert ours["metadata"]["objective"]["name"] == objective

    reloaded = SAE.load_from_disk(tmp_path / "ours")
    assert reloaded.cfg.architecture() == SAVED_AS[architecture]
    x = hook_activations(random_tokens(4, 12, 61, seed=9))
    with torch.no_grad():
        found = reloaded(x)
        assert bool(found.isfinite().all())
        if SAVED_AS[architecture] != "jumprelu" or architecture == "jumprelu":
            torch.testing.assert_close(found, trained.eval()(x), rtol=1e-4, atol=1e-4)
        else:
            # The top k of a batch become a threshold, a moving average of the smallest of them.
            assert torch.equal(reloaded.threshold, torch.full((128,), float(trained.topk_threshold)))  # pyright: ignore[reportArgumentType]
