"""Sets for circuit-tracer: the files it reads, that it loads and attributes with them, and what is refused.

What runs circuit-tracer itself is marked slow, and needs an environment that has it (`make test-circuit-tracer`):
    SAE_LENS_E2E_CIRCUIT_TRACER_PYTHON=/path/to/its/bin/python pytest -m slow tests/test_circuit_tracer.py
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sae_lens import SAE
from sae_lens.registry import SAE_CLASS_REGISTRY
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_lens_e2e import embedded, save_for_circuit_tracer
from sae_lens_e2e.elsewhere.export import export_model
from sae_lens_e2e.evaluation.running import SplicedSAE
from sae_lens_e2e.splice import Site, SplicedModel, Where
from tests.saes import inference_sae, randomised
from tests.test_transcoders import config, single
from tests.training import make_runner

PYTHON = os.environ.get("SAE_LENS_E2E_CIRCUIT_TRACER_PYTHON")
DRIVER = Path(__file__).with_name("circuit_tracer_driver.py")
N_LAYERS, D_MODEL, D_SAE = 6, 64, 96
READ, WRITE = "ln2.hook_normalized", "hook_mlp_out"


def transcoder(layer: int, architecture: str = "jumprelu_transcoder", **changes: Any) -> SAE[Any]:
    """One with random weights, for a layer of the embedded model."""
    sizes: dict[str, Any] = {"d_in": D_MODEL, "d_sae": D_SAE, "d_out": D_MODEL}
    sae_class, config_class = SAE_CLASS_REGISTRY[architecture]
    settings: dict[str, Any] = {name: changes.pop(name) for name in list(changes) if name in sizes}
    sae: Any = sae_class(config_class(**(sizes | settings), apply_b_dec_to_input=False))  # pyright: ignore[reportCallIssue]
    place = {"hook_name": f"blocks.{layer}.{READ}", "hook_name_out": f"blocks.{layer}.{WRITE}", "model_name": "stories"}
    for key, value in (place | changes).items():
        sae.cfg.metadata[key] = value
    sae = randomised(sae, seed=layer)
    with torch.no_grad():
        sae.W_dec *= 0.2
        sae.b_dec *= 0.2
    return sae


def a_set(architecture: str = "jumprelu_transcoder", **changes: Any) -> dict[str, SAE[Any]]:
    """Of every layer, out of order."""
    return {f"mlp{i}": transcoder(i, architecture, **changes) for i in (3, 0, 5, 1, 2, 4)}


# What is written


@pytest.mark.parametrize("architecture", ["transcoder", "skip_transcoder", "jumprelu_transcoder"])
def test_the_files_are_as_circuit_tracer_reads_them(tmp_path: Path, architecture: str) -> None:
    saes = a_set(architecture)
    written = save_for_circuit_tracer(saes, tmp_path / "set", n_layers=N_LAYERS)
    settings = yaml.safe_load((written / "config.yaml").read_text())
    assert settings == {
        "model_name": "stories",
        "model_kind": "transcoder_set",
        "feature_input_hook": READ,
        "feature_output_hook": WRITE,
        "scan": "set",
        "transcoders": [str(tmp_path / "set" / f"layer_{i}.safetensors") for i in range(N_LAYERS)],
    }
    x = torch.randn(20, D_MODEL)
    for i, file in enumerate(settings["transcoders"]):
        tensors = load_file(file)
        assert tensors["W_enc"].shape == (D_SAE, D_MODEL)
        # As in its single_layer_transcoder.
        hidden = torch.nn.functional.linear(x, tensors["W_enc"], tensors["b_enc"])
        threshold = tensors.get("activation_function.threshold")
        features = hidden.relu() if threshold is None else hidden * (hidden > threshold)
        output = features @ tensors["W_dec"] + tensors["b_dec"]
        if "W_skip" in tensors:
            output = output + x @ tensors["W_skip"].T
        assert ("W_skip" in tensors) == ("skip" in architecture)
        with torch.no_grad():
            torch.testing.assert_close(output, saes[f"mlp{i}"](x), rtol=1e-4, atol=1e-4)
    assert {path.name for path in written.iterdir()} == {"config.yaml", *(f"layer_{i}.safetensors" for i in range(6))}


def test_for_a_repository_and_of_ones_just_trained(tmp_path: Path) -> None:
    runner = make_runner(
        single(
            sae=config("batchtopk_transcoder"),
            hook_name="blocks.0.hook_resid_mid",
            hook_name_out="blocks.0.hook_mlp_out",
        )
    )
    trained = runner.run()
    save_for_circuit_tracer({"only": trained}, tmp_path / "set", repo_id="me/mine")
    settings = yaml.safe_load((tmp_path / "set" / "config.yaml").read_text())
    assert settings["transcoders"] == ["hf://me/mine/layer_0.safetensors"]
    assert settings["scan"] == "me/mine"
    threshold = load_file(tmp_path / "set" / "layer_0.safetensors")["activation_function.threshold"]
    assert torch.equal(threshold, torch.full((24,), float(runner.sae.topk_threshold)))  # pyright: ignore[reportArgumentType]


def test_a_negative_threshold_acts_as_0_there_too(tmp_path: Path) -> None:
    sae: Any = transcoder(0)
    sae.threshold.data[:10] = -1.0
    save_for_circuit_tracer({"a": sae}, tmp_path / "set")
    threshold = load_file(tmp_path / "set" / "layer_0.safetensors")["activation_function.threshold"]
    assert float(threshold.min()) == 0


# What is refused


def without(*layers: int) -> dict[str, SAE[Any]]:
    return {name: sae for name, sae in a_set().items() if int(name[-1]) not in layers}


@pytest.mark.parametrize(
    ("saes", "match"),
    [
        ({}, "^transcoders is empty"),
        (without(2), "^transcoders has none for layer 2 of 6; circuit-tracer needs one for each layer"),
        (without(0, 4), "has none for layer 0, 4 of 6"),
        (without(5), "has none for layer 5 of 6"),
        (a_set() | {"more": transcoder(6)}, "^n_layers=6: more is of layer 6"),
        (a_set() | {"again": transcoder(3)}, "^mlp3 and again are both of layer 3"),
        (without(2) | {"sae": inference_sae("standard")}, "^sae: a standard writes what it reads"),
        (without(2) | {"b": transcoder(2, hook_name="blocks.2.hook_resid_mid")}, "^mlp0 and b differ in hook_name "),
        (without(2) | {"b": transcoder(2, d_sae=48)}, r"^mlp0 and b differ in d_sae \(96 and 48\)"),
        (without(2) | {"b": transcoder(2, "jumprelu_skip_transcoder")}, "^mlp0 and b differ in a skip"),
        (without(2) | {"b": transcoder(2, model_name="other")}, "^mlp0 and b differ in model_name"),
        (without(2) | {"b": transcoder(2, d_in=32)}, "d_in=32 and d_out=64 differ"),
        (without(2) | {"b": transcoder(2, hook_name_out=None)}, "^b: hook_name_out=None is no hook of a block"),
        (without(2) | {"b": transcoder(2, hook_name="model.layers.2")}, "^b: hook_name='model.layers.2' is no hook"),
        (
            without(2) | {"b": transcoder(2, hook_name_out=f"blocks.3.{WRITE}")},
            "^b: it reads layer 2 and writes layer 3",
        ),
        (without(2) | {"b": transcoder(2, model_class_name="TransformerBridge")}, "^b: it is of a TransformerBridge"),
    ],
)
def test_sets_that_it_cannot_load(tmp_path: Path, saes: dict[str, SAE[Any]], match: str) -> None:
    with pytest.raises(ValueError, match=match) as raised:
        save_for_circuit_tracer(saes, tmp_path / "set", n_layers=N_LAYERS)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "set").exists()


def test_nothing_of_anybody_elses_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        save_for_circuit_tracer({"a": transcoder(0)}, tmp_path)


# circuit-tracer itself


@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason="circuit-tracer has an environment of its own: make test-circuit-tracer")
@pytest.mark.parametrize("architecture", ["transcoder", "skip_transcoder", "jumprelu_transcoder"])
def test_circuit_tracer_loads_the_set_computes_the_same_and_attributes(tmp_path: Path, architecture: str) -> None:
    model, saes = embedded.load_model(), a_set(architecture)
    tokens = torch.tensor(embedded.load_dataset("held_out")["input_ids"][:2])[:, :24]
    export_model(model, tmp_path / "model", f"blocks.0.{READ}", 24)
    save_for_circuit_tracer(saes, tmp_path / "set", n_layers=N_LAYERS)
    save_file({"tokens": tokens.contiguous()}, tmp_path / "tokens.safetensors")
    done = subprocess.run([str(PYTHON), "-I", DRIVER, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, said = load_file(tmp_path / "found.safetensors"), json.loads((tmp_path / "found.json").read_text())

    assert said == {
        **{"n_layers": N_LAYERS, "skip": "skip" in architecture, "hooks": [READ, WRITE], "same": True, "scan": "set"},
        "n_logits": said["n_logits"],
    }
    with torch.no_grad():
        clean = model(tokens)
    torch.testing.assert_close(found["logits"], clean, rtol=0, atol=1e-4)
    replaced = replaced_logits(saes, tokens)
    torch.testing.assert_close(found["replaced"], replaced, rtol=0, atol=1e-4)
    # They are no small change.
    assert float((replaced - clean).abs().max()) > 1
    assert 1 <= said["n_logits"] <= 3
    assert float(found["adjacency"].abs().sum()) > 0
    assert bool(found["adjacency"].isfinite().all())
    # Layer, position and feature: what fires there is what fires here, but for the first position.
    layers, positions, features = found["active_features"].T
    of_first = (layers == 0) & (positions > 0)
    with torch.no_grad():
        x = model.run_with_cache(tokens[:1])[1][f"blocks.0.{READ}"][0]
        ours = saes["mlp0"].encode(x)
    ours[0] = 0
    assert int(of_first.sum()) == int((ours > 0).sum())
    torch.testing.assert_close(
        found["activations"][of_first], ours[positions[of_first], features[of_first]], rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def replaced_logits(saes: dict[str, SAE[Any]], tokens: Tensor) -> Tensor:
    """Our own, all at once, by the engine that evaluates them."""
    splice, where = SplicedModel(embedded.load_model()), Where.everywhere(tokens)
    sites = {Site(f"blocks.{i}.{READ}", (f"blocks.{i}.{WRITE}",)): saes[f"mlp{i}"] for i in range(N_LAYERS)}
    with splice.running():
        clean = splice.clean(tokens, sites)
        replace = {site: SplicedSAE(sae, site, where) for site, sae in sites.items()}
        final = splice.spliced(clean, where, replace).final
        assert final is not None
        return splice.unembedding.logits(final)
