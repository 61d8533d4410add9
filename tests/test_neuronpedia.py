"""Folders for SAELens, SAEDashboard and Neuronpedia: what is in them, that they are equal to the SAE, what is refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, StandardTrainingSAEConfig
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.training.sae_trainer import _log_feature_sparsity
from safetensors.torch import load_file

from sae_lens_e2e.architectures.transcoder import TRANSCODERS
from sae_lens_e2e.publishing import neuronpedia
from sae_lens_e2e.publishing.neuronpedia import REQUIRED, complete_metadata, save_for_neuronpedia, stock_sae
from tests.processes import run_stock
from tests.saes import COMPLETE, D_SAE, activations, features_and_output, inference_sae, training_sae
from tests.training import make_runner, runner_config

FILES = ["cfg.json", "sae_weights.safetensors"]
STOCK = {
    "apollo": "standard",
    "standard": "standard",
    "topk": "topk",
    "batchtopk": "jumprelu",
    "matryoshka_batchtopk": "jumprelu",
    "gated": "gated",
    "jumprelu": "jumprelu",
    "abstopk": "abstopk",
    "matching_pursuit": "matching_pursuit",
}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def metadata_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "cfg.json").read_text())["metadata"]


def state_of(sae: SAE[Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return copy.deepcopy(sae.cfg.to_dict()), copy.deepcopy(sae.state_dict())


def assert_unchanged(sae: SAE[Any], state: tuple[dict[str, Any], dict[str, torch.Tensor]]) -> None:
    cfg, weights = state_of(sae)
    assert cfg == state[0]
    assert all(torch.equal(weights[name], state[1][name]) for name in state[1] | weights)


# What is written


def test_a_process_that_knows_sae_lens_alone_loads_it(tmp_path: Path) -> None:
    sae = training_sae("apollo")
    save_for_neuronpedia(sae, tmp_path / "sae", neuronpedia_id="gpt2-small/1-res_mine")
    torch.save(activations(), tmp_path / "x.pt")
    program = f"""
import sys, torch
from sae_lens import SAE
sae = SAE.load_from_disk({str(tmp_path / "sae")!r})
torch.save(sae(torch.load({str(tmp_path / "x.pt")!r}, weights_only=True)).detach(), {str(tmp_path / "y.pt")!r})
assert not [name for name in sys.modules if name.startswith("sae_lens_e2e")]
print(type(sae).__module__, sae.cfg.metadata.neuronpedia_id, sae.cfg.device)
"""
    done = run_stock(program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["sae_lens.saes.standard_sae", "gpt2-small/1-res_mine", "cpu"]
    written = torch.load(tmp_path / "y.pt", weights_only=True)
    assert torch.allclose(written, sae(activations()), atol=1e-5)


def test_every_key_that_neuronpedia_and_saedashboard_read(tmp_path: Path) -> None:
    given = {
        "neuronpedia_id": "gpt2-small/1-res_mine",
        "model_from_pretrained_kwargs": {"center_writing_weights": True},
    }
    path = save_for_neuronpedia(inference_sae("standard"), tmp_path / "sae", **given)
    assert path == tmp_path / "sae"
    assert names_in(path) == FILES
    metadata = metadata_in(path)
    expected = {
        **COMPLETE,
        **given,
        "model_class_name": "HookedTransformer",
        "hook_layer": 1,
        "hook_head_index": None,
        "exclude_special_tokens": False,
    }
    assert {key: metadata[key] for key in expected} == expected
    assert metadata["sae_lens_version"]
    assert json.loads((path / "cfg.json").read_text())["architecture"] == "standard"


def test_what_the_metadata_have_is_kept_and_what_is_given_goes_before(tmp_path: Path) -> None:
    known = {**COMPLETE, "objective": {"name": "e2e"}, "exclude_special_tokens": [0], "context_size": 64}
    save_for_neuronpedia(inference_sae("standard", known), tmp_path, context_size=128, creator="me")
    metadata = metadata_in(tmp_path)
    assert metadata["objective"] == {"name": "e2e"}
    assert metadata["exclude_special_tokens"] == [0]
    assert (metadata["context_size"], metadata["creator"]) == (128, "me")


def test_defaults_are_not_shared_between_saes() -> None:
    first, second = (complete_metadata(inference_sae("standard"), {}) for _ in range(2))
    first.model_from_pretrained_kwargs["fold_ln"] = True
    assert second.model_from_pretrained_kwargs == {}
    assert complete_metadata(inference_sae("standard"), {}).model_from_pretrained_kwargs == {}


def test_completing_metadata_leaves_the_sae_as_it_was() -> None:
    sae = inference_sae("standard")
    before = copy.deepcopy(sae.cfg.metadata)
    assert complete_metadata(sae, {"context_size": 128}).context_size == 128
    assert sae.cfg.metadata == before


# Equal to the SAE


@pytest.mark.parametrize("architecture", sorted(STOCK))
def test_a_training_sae_is_written_as_its_stock_inference_sae(architecture: str, tmp_path: Path) -> None:
    sae = training_sae(architecture)
    state = state_of(sae)
    save_for_neuronpedia(sae, tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert type(loaded) is SAE_CLASS_REGISTRY[STOCK[architecture]][0]
    assert metadata_in(tmp_path)["training_architecture"] == architecture
    features, output = features_and_output(loaded, activations())
    assert torch.allclose(output, naive_output(sae, activations()), atol=1e-4)
    assert torch.allclose(features, features_by_hand(sae, activations()), atol=1e-4)
    assert_unchanged(sae, state)


def test_every_training_architecture_is_tried() -> None:
    own = {
        name
        for name, (sae_class, _) in SAE_TRAINING_CLASS_REGISTRY.items()
        if sae_class.__module__.startswith("sae_lens")
    }
    # Transcoders have tests of their own.
    assert set(STOCK) == own - set(TRANSCODERS)


@torch.no_grad()
def naive_output(sae: Any, x: torch.Tensor) -> torch.Tensor:
    """What a training SAE gives outside training."""
    if "batchtopk" not in sae.cfg.architecture():
        return sae(x)
    norms = sae.W_dec.norm(dim=1) if sae.cfg.rescale_acts_by_decoder_norm else torch.ones(D_SAE)
    return (features_by_hand(sae, x) / norms) @ sae.W_dec + sae.b_dec


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
def test_an_inference_sae_is_written_as_it_is(architecture: str, tmp_path: Path) -> None:
    sae = inference_sae(architecture)
    state = state_of(sae)
    save_for_neuronpedia(sae, tmp_path)
    weights = load_file(tmp_path / "sae_weights.safetensors")
    assert weights.keys() == sae.state_dict().keys()
    assert all(torch.equal(weights[name], sae.state_dict()[name]) for name in weights)
    assert_unchanged(sae, state)


SCALED: list[tuple[str, dict[str, Any]]] = [
    ("standard", {}),
    ("standard", {"apply_b_dec_to_input": False}),
    ("topk", {"rescale_acts_by_decoder_norm": True}),
    ("topk", {"rescale_acts_by_decoder_norm": False}),
    ("jumprelu", {}),
    ("gated", {}),
    ("batchtopk", {}),
    ("batchtopk", {"rescale_acts_by_decoder_norm": False}),
]


@pytest.mark.parametrize(
    ("architecture", "settings", "training"),
    [(*case, training) for training in (True, False) for case in SCALED if training or case[0] != "batchtopk"],
)
def test_a_scale_is_folded_in(architecture: str, settings: dict[str, Any], training: bool, tmp_path: Path) -> None:
    """The folded SAE on activations is the SAE on scaled ones, scaled back."""
    scale = 3.7
    normalized = {**settings, "normalize_activations": "expected_average_only_in"}
    sae = (training_sae if training else inference_sae)(architecture, **normalized)
    state = state_of(sae)
    save_for_neuronpedia(sae, tmp_path, norm_scaling_factor=scale)
    loaded = SAE.load_from_disk(tmp_path)
    assert loaded.cfg.normalize_activations == "none"
    features, output = features_and_output(loaded, activations())
    by_hand = naive_output(sae, scale * activations()) / scale if training else sae(scale * activations()) / scale
    assert torch.allclose(output, by_hand, atol=1e-4)
    assert torch.equal(features != 0, features_by_hand(sae, scale * activations()) != 0)
    assert_unchanged(sae, state)


def features_by_hand(sae: Any, x: torch.Tensor) -> torch.Tensor:
    """Above a threshold, where a training SAE has a top-k of the batch."""
    if "batchtopk" not in sae.cfg.architecture():
        return sae.encode(x)
    hidden = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    if sae.cfg.rescale_acts_by_decoder_norm:
        hidden = hidden * sae.W_dec.norm(dim=1)
    return hidden.relu() * (hidden > sae.topk_threshold)


def test_the_stock_sae_is_a_copy() -> None:
    sae = inference_sae("standard")
    stock = stock_sae(sae)
    stock.W_enc.data.zero_()
    stock.cfg.metadata.model_name = "another"
    assert bool(sae.W_enc.any())
    assert sae.cfg.metadata.model_name == "gpt2-small"
    assert str(stock.W_enc.device) == stock.cfg.device == str(stock.device) == "cpu"


def test_copying_draws_no_random_numbers() -> None:
    state = torch.get_rng_state()
    sae = inference_sae("standard")
    torch.set_rng_state(state)
    stock_sae(sae)
    assert torch.equal(torch.get_rng_state(), state)


# Sparsity


def test_firing_frequency_is_written_as_sae_lens_writes_it(tmp_path: Path) -> None:
    frequency = torch.linspace(0, 1, D_SAE)
    save_for_neuronpedia(inference_sae("standard"), tmp_path, frequency=frequency)
    assert names_in(tmp_path) == [*FILES, "sparsity.safetensors"]
    written = load_file(tmp_path / "sparsity.safetensors")
    assert list(written) == ["sparsity"]
    assert torch.equal(written["sparsity"], _log_feature_sparsity(frequency))
    assert float(written["sparsity"][0]) == -10


@pytest.mark.parametrize(
    ("frequency", "message"),
    [
        (torch.zeros(D_SAE - 1), r"frequency has shape \[39\]; .* \[40\]"),
        (torch.zeros(1, D_SAE), r"frequency has shape \[1, 40\]"),
        (torch.full((D_SAE,), -3.0), "no fractions"),
        (torch.full((D_SAE,), 1.5), "no fractions"),
        (torch.full((D_SAE,), float("nan")), "no fractions"),
    ],
)
def test_frequencies_that_are_none(frequency: torch.Tensor, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        save_for_neuronpedia(inference_sae("standard"), tmp_path / "sae", frequency=frequency)
    assert names_in(tmp_path) == []


# What is refused, before anything is written


def test_everything_that_is_missing_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="no model_name, hook_name, dataset_path, context_size, prepend_bos; pass them"
    ):
        save_for_neuronpedia(inference_sae("standard", {}), tmp_path / "a" / "sae")
    assert names_in(tmp_path) == []
    with pytest.raises(ValueError, match=r"no dataset_path; pass it, for instance .*dataset_path=\.\.\.") as raised:
        save_for_neuronpedia(inference_sae("standard", {**COMPLETE, "dataset_path": None}), tmp_path / "sae")
    assert "\n" not in str(raised.value)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("key", REQUIRED)
def test_each_required_key(key: str, tmp_path: Path) -> None:
    known = {name: value for name, value in COMPLETE.items() if name != key}
    with pytest.raises(ValueError, match=f"no {key}; "):
        save_for_neuronpedia(inference_sae("standard", known), tmp_path / "sae")
    save_for_neuronpedia(inference_sae("standard", known), tmp_path / "sae", **{key: COMPLETE[key]})


def test_a_dataset_without_a_name_is_missing(tmp_path: Path) -> None:
    """SAELens' runner config has dataset_path='' where a dataset was handed to the runner."""
    with pytest.raises(ValueError, match="no dataset_path"):
        save_for_neuronpedia(inference_sae("standard", {**COMPLETE, "dataset_path": ""}), tmp_path / "sae")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (
            {"model_class_name": "AutoModelForCausalLM", "hook_name": "model.layers.1"},
            "Neuronpedia runs TransformerLens models",
        ),
        (
            {"hook_name": "model.layers.1"},
            r"hook_name='model.layers.1' of a HookedTransformer.*hook_name= and model_name=",
        ),
        ({"neuronpedia_id": "my-sae"}, "neuronpedia_id='my-sae' is not MODEL/LAYER-SET"),
        ({"neuronpedia_id": "gpt2-small/res-6"}, "neuronpedia_id='gpt2-small/res-6'"),
        ({"neuronpedia_id": 6}, "neuronpedia_id=6"),
    ],
)
def test_metadata_that_neuronpedia_cannot_use(metadata: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        save_for_neuronpedia(inference_sae("standard", COMPLETE | metadata), tmp_path / "sae")
    assert "\n" not in str(raised.value)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("normalization", "scale", "message"),
    [
        ("expected_average_only_in", None, "the scale is not in the SAE; pass norm_scaling_factor="),
        ("expected_average_only_in", 0.0, "norm_scaling_factor=0.0 must be a positive number"),
        ("expected_average_only_in", float("nan"), "norm_scaling_factor=nan must be"),
        ("expected_average_only_in", float("inf"), "norm_scaling_factor=inf must be"),
        ("none", 2.0, "normalize_activations='none' there is no scale to fold"),
        ("layer_norm", 2.0, "normalize_activations='layer_norm' there is no scale to fold"),
        ("covariance_whitening", None, "covariance_whitening' is not folded in"),
    ],
)
def test_scales_that_are_not_known(normalization: str, scale: float | None, message: str, tmp_path: Path) -> None:
    for sae in (inference_sae("standard", normalize_activations=normalization), _training(normalization)):
        with pytest.raises(ValueError, match=message):
            save_for_neuronpedia(sae, tmp_path / "sae", norm_scaling_factor=scale)
    assert names_in(tmp_path) == []


def _training(normalization: str) -> SAE[Any]:
    return training_sae("standard", normalize_activations=normalization)


def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    sae = inference_sae("standard")
    sae.W_dec.data[3, 2] = float("nan")
    with pytest.raises(ValueError, match="W_dec holds NaN"):
        save_for_neuronpedia(sae, tmp_path / "sae")
    assert names_in(tmp_path) == []


def test_an_architecture_that_sae_lens_does_not_come_with(tmp_path: Path) -> None:
    sae_class, config_class = SAE_CLASS_REGISTRY["standard"]

    own_class: Any = type("OwnSAE", (sae_class,), {})
    with pytest.raises(ValueError, match=r"architecture 'standard' \(OwnSAE\) is not one that SAELens comes with"):
        save_for_neuronpedia(own_class(config_class(d_in=16, d_sae=40)), tmp_path / "sae")


# The folder


def test_a_folder_with_something_in_it(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"overwrite=True"):
        save_for_neuronpedia(inference_sae("standard"), tmp_path)
    assert names_in(tmp_path) == ["notes.txt"]
    save_for_neuronpedia(inference_sae("standard"), tmp_path, overwrite=True)
    assert names_in(tmp_path) == ["cfg.json", "notes.txt", "sae_weights.safetensors"]


def test_an_sae_that_is_overwritten_leaves_no_sparsity_behind(tmp_path: Path) -> None:
    save_for_neuronpedia(inference_sae("standard"), tmp_path, frequency=torch.zeros(D_SAE))
    save_for_neuronpedia(inference_sae("jumprelu"), tmp_path, overwrite=True)
    assert names_in(tmp_path) == FILES
    assert type(SAE.load_from_disk(tmp_path)) is SAE_CLASS_REGISTRY["jumprelu"][0]


def test_a_failure_during_writing_leaves_the_folder_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    existing = save_for_neuronpedia(inference_sae("standard"), tmp_path / "old", frequency=torch.zeros(D_SAE))
    before = {path.name: path.read_bytes() for path in existing.iterdir()}

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(neuronpedia, "save_file", full)
    for folder in (existing, tmp_path / "a" / "new"):
        with pytest.raises(OSError, match="No space left"):
            save_for_neuronpedia(inference_sae("gated"), folder, frequency=torch.ones(D_SAE), overwrite=True)
    assert {path.name: path.read_bytes() for path in existing.iterdir()} == before
    assert names_in(tmp_path) == ["old"]


def test_metadata_that_json_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_for_neuronpedia(inference_sae("standard"), tmp_path / "sae", creator=object())
    assert names_in(tmp_path) == []


# The runner's own output


def test_what_the_runner_writes_is_complete(tmp_path: Path) -> None:
    output = tmp_path / "run"
    cfg = runner_config(dataset_path="mine/stories", model_name="gpt2-small", output_path=str(output))
    make_runner(cfg).run()
    assert {*FILES, "sparsity.safetensors"} <= set(names_in(output))
    loaded = SAE.load_from_disk(output)
    metadata = complete_metadata(loaded, {})
    assert metadata.hook_layer == loaded.cfg.metadata.hook_layer == 1
    assert metadata.objective["name"] == "e2e_ds"
    assert stock_sae(loaded).cfg.normalize_activations == "none"
    assert load_file(output / "sparsity.safetensors")["sparsity"].shape == (D_SAE,)


def test_what_the_runner_writes_of_a_normalised_sae_is_folded(tmp_path: Path) -> None:
    sae = StandardTrainingSAEConfig(
        d_in=16, d_sae=40, l1_coefficient=0.02, normalize_activations="expected_average_only_in"
    )
    output = str(tmp_path / "run")
    make_runner(runner_config(sae=sae, dataset_path="me/it", output_path=output, n_batches_for_norm_estimate=2)).run()
    loaded = SAE.load_from_disk(tmp_path / "run")
    complete_metadata(loaded, {})
    assert stock_sae(loaded).cfg.normalize_activations == "none"
