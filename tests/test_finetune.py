"""Training SAEs made from inference SAEs: that they compute the same, train on, and what is refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sae_lens import SAE, TrainingSAE
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.training.activation_scaler import ActivationScaler
from transformer_lens import HookedTransformer

from sae_lens_e2e.architectures.going_on import GOES_ON_AS, check_can_go_on, trained_as, training_sae_from
from tests.models import dataset_of, random_model, random_tokens
from tests.saes import COMPLETE, activations, features_and_output, inference_sae, training_sae
from tests.training import make_runner, make_trainer, runner_config, tried_step

HOOK = "blocks.1.hook_resid_pre"
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("standard", {}),
    ("topk", {"rescale_acts_by_decoder_norm": False}),
    ("topk", {"rescale_acts_by_decoder_norm": True}),
    ("jumprelu", {}),
    ("gated", {}),
    ("abstopk", {"k": 7, "rescale_acts_by_decoder_norm": True}),
    ("matching_pursuit", {}),
]


@torch.no_grad()
def unit_rows(sae: SAE[Any]) -> SAE[Any]:
    sae.W_dec.data = F.normalize(sae.W_dec, dim=1)
    return sae


@torch.no_grad()
def ce_with(sae: SAE[Any], model: HookedTransformer, tokens: torch.Tensor) -> float:
    """The CE loss with the SAE spliced in, by TransformerLens' own hooks."""
    return float(model.run_with_hooks(tokens, return_type="loss", fwd_hooks=[(HOOK, spliced(sae))]))


@torch.no_grad()
def kl_with(sae: SAE[Any], model: HookedTransformer, tokens: torch.Tensor) -> float:
    """KL(clean ‖ spliced) in nats, the mean over tokens."""
    clean = model(tokens).log_softmax(-1)
    changed = model.run_with_hooks(tokens, fwd_hooks=[(HOOK, spliced(sae))]).log_softmax(-1)
    return float((clean.exp() * (clean - changed)).sum(-1).mean())


def spliced(sae: SAE[Any]) -> Any:
    return lambda x, hook: sae(x)  # noqa: ARG005


# The same computation


@pytest.mark.parametrize("normalize_activations", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize(("architecture", "settings"), VARIANTS)
def test_the_training_sae_encodes_and_decodes_as_the_inference_sae_does(
    architecture: str, settings: dict[str, Any], apply_b_dec_to_input: bool, normalize_activations: str
) -> None:
    shared = {"apply_b_dec_to_input": apply_b_dec_to_input, "normalize_activations": normalize_activations}
    sae = inference_sae(architecture, **settings, **shared)
    before = copy.deepcopy(sae.state_dict())
    trainable = training_sae_from(sae)
    assert isinstance(trainable, TrainingSAE)
    assert trainable.cfg.architecture() == architecture
    assert all(parameter.requires_grad for parameter in trainable.parameters())
    features, output = features_and_output(sae, activations())
    assert torch.equal(trainable.encode(activations()), features)
    assert torch.equal(trainable.decode(trainable.encode(activations())), output)
    with torch.no_grad():
        for parameter in trainable.parameters():
            parameter.add_(1)
    assert all(torch.equal(sae.state_dict()[name], before[name]) for name in before), "the weights are shared"


def test_a_negative_threshold_acts_as_the_relu_that_stands_behind_it() -> None:
    sae: Any = inference_sae("jumprelu")
    sae.threshold.data[::2] *= -3
    trainable = training_sae_from(sae)
    features, output = features_and_output(sae, activations())
    assert torch.equal(trainable.encode(activations()), features)
    assert torch.equal(trainable(activations()), output)
    assert bool((sae.threshold < 0).any())


def test_all_heads_side_by_side() -> None:
    hook = {**COMPLETE, "hook_name": "blocks.1.attn.hook_z"}
    sae = inference_sae("standard", hook, reshape_activations="hook_z")
    trainable = training_sae_from(sae)
    heads = activations().reshape(8, 8, 4, 4)
    output = sae(heads)
    assert torch.equal(trainable(heads.flatten(2)), output.flatten(2))


def test_low_precision_is_kept() -> None:
    sae = inference_sae("jumprelu", dtype="bfloat16")
    trainable = training_sae_from(sae)
    assert trainable.W_enc.dtype == torch.bfloat16
    assert torch.equal(trainable.encode(activations()), sae.encode(activations()))


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        *VARIANTS,
        ("standard", {"normalize_activations": "layer_norm"}),
        ("topk", {"normalize_activations": "layer_norm"}),
    ],
)
def test_at_step_0_the_loss_is_that_of_the_loaded_sae(
    architecture: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """By the runner's evaluator, and by the KL divergence of its first forward pass, with SAELens' loader in between."""
    model, tokens = random_model(), random_tokens(16, 12, 61, seed=3)
    inference_sae(architecture, **settings).save_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    trainable = training_sae_from(loaded)
    cfg = runner_config(sae=trainable.cfg, objective="e2e")
    runner = make_runner(cfg, model, dataset_of(tokens), trainable)

    batches = EvalConfig(batch_size_prompts=16, n_eval_reconstruction_batches=1, compute_ce_loss=True)
    metrics, _ = run_evals(runner.sae, runner.activations_store, model, ActivationScaler(), batches)
    expected = ce_with(loaded, model, tokens)
    clean = float(model(tokens, return_type="loss"))
    assert abs(expected - clean) > 0.01
    assert metrics["model_performance_preservation"]["ce_loss_with_sae"] == pytest.approx(expected, abs=1e-5)

    trainer = make_trainer(runner)
    first, _ = tried_step(trainer, tokens)
    assert float(first.losses["kl"]) == pytest.approx(kl_with(loaded, model, tokens), abs=1e-5)


@pytest.mark.parametrize(
    ("architecture", "settings", "training"),
    [
        ("standard", {}, {"l1_coefficient": 0.01}),
        ("topk", {"rescale_acts_by_decoder_norm": True}, {"aux_loss_coefficient": 0.1}),
        ("jumprelu", {}, {"l0_coefficient": 0.01}),
        ("gated", {}, {"l1_coefficient": 0.01}),
        ("apollo", {"apply_b_dec_to_input": False}, {"sparsity_coefficient": 0.2}),
    ],
)
def test_finetuning_end_to_end_changes_the_sae_and_saves_one_that_loads(
    architecture: str, settings: dict[str, Any], training: dict[str, Any], tmp_path: Path
) -> None:
    model, tokens = random_model(), random_tokens(16, 12, 61, seed=3)
    sae = inference_sae("standard" if architecture == "apollo" else architecture, **settings)
    if architecture == "apollo":
        unit_rows(sae)
    trainable = training_sae_from(sae, architecture, **training)
    cfg = runner_config(sae=trainable.cfg, objective="e2e_ds", lr=1e-2, output_path=str(tmp_path / "out"))
    trained = make_runner(cfg, model, dataset_of(random_tokens(64, 12, 61)), trainable).run()
    loaded = SAE.load_from_disk(tmp_path / "out")
    assert type(loaded) is SAE_CLASS_REGISTRY["standard" if architecture == "apollo" else architecture][0]
    assert not torch.allclose(loaded.W_enc, sae.W_enc, atol=1e-3)
    output = trained(activations())
    assert torch.allclose(loaded(activations()), output, atol=1e-5)
    assert kl_with(loaded, model, tokens) < 0.9 * kl_with(sae, model, tokens)
    recorded = json.loads((tmp_path / "out" / "runner_cfg.json").read_text())["sae"]
    assert {name: recorded[name] for name in training} == training
    assert recorded["architecture"] == architecture


def saved(sae: TrainingSAE[Any], folder: Path) -> SAE[Any]:
    sae.save_inference_model(folder)
    return SAE.load_from_disk(folder)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("batchtopk", {"rescale_acts_by_decoder_norm": True, "aux_loss_coefficient": 0.5}),
        ("batchtopk", {"rescale_acts_by_decoder_norm": False}),
        ("matryoshka_batchtopk", {"use_matryoshka_aux_loss": True}),
    ],
)
def test_what_was_trained_with_one_threshold_goes_on_so(
    architecture: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Saved as `jumprelu`; the metadata say what it was."""
    trained: Any = training_sae(architecture, k=6.5, **settings)
    trained.topk_threshold.fill_(1.2)
    sae = saved(trained, tmp_path / "first")
    assert sae.cfg.architecture() == "jumprelu"
    again: Any = training_sae_from(sae)
    assert again.cfg.architecture() == architecture
    assert again.cfg.k == 6.5
    assert {name: getattr(again.cfg, name) for name in settings} == settings
    if architecture == "matryoshka_batchtopk":
        assert again.cfg.matryoshka_widths == [10, 20, 40]
    assert float(again.topk_threshold) == pytest.approx(1.2)
    _, output = features_and_output(sae, activations())
    assert torch.allclose(saved(again, tmp_path / "second")(activations()), output, atol=1e-5)


def test_without_metadata_one_threshold_tells_batchtopk() -> None:
    sae: Any = inference_sae("jumprelu")
    assert trained_as(sae) == "jumprelu"
    sae.threshold.data.fill_(0.7)
    assert trained_as(sae) == "batchtopk"
    with pytest.raises(ValueError, match="'batchtopk' needs k, which the SAE's metadata do not say"):
        training_sae_from(sae)
    again: Any = training_sae_from(sae, k=5)
    # Of rows that are not of unit length, rescaling would select others.
    assert (again.cfg.k, again.cfg.rescale_acts_by_decoder_norm) == (5, False)
    assert training_sae_from(unit_rows(sae), k=5).cfg.rescale_acts_by_decoder_norm  # pyright: ignore[reportAttributeAccessIssue]
    assert training_sae_from(sae, "jumprelu").cfg.architecture() == "jumprelu"
    sae.threshold.data[0] = 0.8
    with pytest.raises(ValueError, match="'batchtopk' has one threshold for all features, and this SAE's differ"):
        training_sae_from(sae, "batchtopk", k=5)


def test_what_the_metadata_record_of_training_is_gone_on_with(tmp_path: Path) -> None:
    trained = training_sae("standard", l1_coefficient=0.03, lp_norm=0.5, l1_warm_up_steps=70)
    again = training_sae_from(saved(trained, tmp_path))
    assert (again.cfg.l1_coefficient, again.cfg.lp_norm, again.cfg.l1_warm_up_steps) == (0.03, 0.5, 0)
    other = training_sae_from(SAE.load_from_disk(tmp_path), l1_coefficient=0.2)
    assert (other.cfg.l1_coefficient, other.cfg.lp_norm) == (0.2, 0.5)


def test_apollos_parametrisation_of_a_standard_sae_computes_the_same() -> None:
    sae = unit_rows(inference_sae("standard", apply_b_dec_to_input=False))
    trainable = training_sae_from(sae, "apollo", sparsity_coefficient=3.0, lp_norm=0.5)
    assert trainable.cfg.architecture() == "apollo"
    assert (trainable.cfg.sparsity_coefficient, trainable.cfg.lp_norm) == (3.0, 0.5)
    features, output = features_and_output(sae, activations())
    assert torch.allclose(trainable.encode(activations()), features, atol=1e-5)
    assert torch.allclose(trainable(activations()), output, atol=1e-5)


# What is recorded


def test_the_finetuned_sae_is_not_the_one_on_neuronpedia() -> None:
    sae = inference_sae("standard", {**COMPLETE, "neuronpedia_id": "gpt2-small/1-res_mine"})
    metadata = training_sae_from(sae).cfg.metadata
    assert metadata.neuronpedia_id is None
    assert metadata.finetuned_from == "gpt2-small/1-res_mine"
    assert metadata.hook_name == HOOK
    assert metadata.training_architecture == "standard"
    assert sae.cfg.metadata.neuronpedia_id == "gpt2-small/1-res_mine"
    assert training_sae_from(inference_sae("standard")).cfg.metadata.finetuned_from == f"sae_gpt2-small_{HOOK}_40"


def test_settings_of_the_training_config_are_taken() -> None:
    trainable = training_sae_from(inference_sae("jumprelu"), l0_coefficient=0.3, jumprelu_sparsity_loss_mode="tanh")
    assert trainable.cfg.l0_coefficient == 0.3
    assert trainable.cfg.jumprelu_sparsity_loss_mode == "tanh"
    assert trainable.cfg.metadata.training_architecture_details["l0_coefficient"] == 0.3


# What is refused


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        ("standard", {"d_sae": 80}, "d_sae=80: the SAE has d_sae=40"),
        ("topk", {"k": 3}, "k=3: the SAE has k=7"),
        ("standard", {"apply_b_dec_to_input": False}, "the SAE has apply_b_dec_to_input=True"),
        ("standard", {"l0_coefficient": 1.0}, "l0_coefficient=1.0 is no setting of 'standard'; it has l1_coefficient"),
        ("standard", {"decoder_init_norm": 0.1}, "decoder_init_norm=0.1 is how a new SAE starts"),
        ("jumprelu", {"jumprelu_init_threshold": 0.1}, "jumprelu_init_threshold=0.1 is how a new SAE starts"),
        ("standard", {"architecture": "topk"}, "architecture='topk' does not compute what 'standard' does.*'apollo'"),
        (
            "jumprelu",
            {"architecture": "apollo"},
            "architecture='apollo' does not compute what 'jumprelu' does; leave it out, or use 'batchtopk' or 'matryoshka_batchtopk'$",
        ),
        ("standard", {"architecture": "nonsense"}, "architecture='nonsense'"),
    ],
)
def test_settings_that_cannot_be_honoured(architecture: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        training_sae_from(inference_sae(architecture), **settings)
    assert "\n" not in str(raised.value)


def test_what_is_no_inference_sae_that_can_be_trained() -> None:
    with pytest.raises(ValueError, match="training SAE already; give it to the runner"):
        training_sae_from(training_sae("standard"))
    others = sorted(SAE_CLASS_REGISTRY.keys() - set(GOES_ON_AS))
    with pytest.raises(ValueError, match=rf"architecture '{others[0]}' cannot be finetuned; standard, topk"):
        check_can_go_on(others[0])


@pytest.mark.parametrize("normalization", ["expected_average_only_in", "covariance_whitening"])
def test_a_scale_that_is_not_in_the_sae(normalization: str) -> None:
    """The runner would estimate one of its own, and the SAE at step 0 would be another."""
    sae = inference_sae("standard", normalize_activations=normalization)
    with pytest.raises(ValueError, match=f"normalize_activations='{normalization}'.*fold"):
        training_sae_from(sae)


def test_apollos_parametrisation_needs_a_decoder_of_unit_rows_and_an_input_as_it_is() -> None:
    with pytest.raises(ValueError, match="unit rows"):
        training_sae_from(inference_sae("standard", apply_b_dec_to_input=False), "apollo")
    with pytest.raises(ValueError, match="b_dec is not subtracted"):
        training_sae_from(unit_rows(inference_sae("standard")), "apollo")
    nearly = unit_rows(inference_sae("standard", apply_b_dec_to_input=False))
    nearly.W_dec.data *= 1.001
    with pytest.raises(ValueError, match="unit rows"):
        training_sae_from(nearly, "apollo")


# The runner


@pytest.mark.parametrize(
    ("field", "value", "given"),
    [("l1_coefficient", 0.02, 1.5), ("d_sae", 40, 24), ("normalize_activations", "none", "layer_norm")],
)
def test_a_runner_config_whose_sae_is_not_the_sae_that_would_be_trained(field: str, value: Any, given: Any) -> None:
    """SAELens trains what it is given and never looks at the config's `sae` again."""
    settings: dict[str, Any] = {"l1_coefficient": 0.02, field: given}
    trainable = training_sae("standard", **settings)
    with pytest.raises(ValueError, match=rf"sae\.{field}={value!r}, but .* override_sae has {given!r}"):
        make_runner(runner_config(), sae=trainable)


def test_a_runner_config_of_another_architecture() -> None:
    with pytest.raises(ValueError, match=r"sae\.architecture='standard'.*has 'gated'"):
        make_runner(runner_config(), sae=training_sae("gated", l1_coefficient=0.02))


def test_how_a_new_sae_starts_need_not_agree() -> None:
    runner = make_runner(runner_config(), sae=training_sae_from(inference_sae("standard"), l1_coefficient=0.02))
    assert runner.cfg.sae.decoder_init_norm == 0.1
    assert runner.sae.cfg.decoder_init_norm is None


def test_an_inference_sae_cannot_be_trained() -> None:
    with pytest.raises(TypeError, match=r"override_sae is a StandardSAE.*training_sae_from"):
        make_runner(runner_config(), sae=inference_sae("standard"))  # pyright: ignore[reportArgumentType]


def test_an_inference_folder_as_from_pretrained_path_does_not_train_with_defaults(tmp_path: Path) -> None:
    """SAELens fills in what an inference SAE's config does not have: an l1_coefficient of 1."""
    inference_sae("standard").save_model(tmp_path)
    with pytest.raises(ValueError, match=r"sae\.l1_coefficient=0.02, but .*from_pretrained_path=.* has 1.0"):
        make_runner(runner_config(from_pretrained_path=str(tmp_path)))
    training_sae("standard", l1_coefficient=0.02).save_model(tmp_path)
    runner = make_runner(runner_config(from_pretrained_path=str(tmp_path)))
    assert torch.equal(runner.sae.W_enc, training_sae("standard").W_enc)
