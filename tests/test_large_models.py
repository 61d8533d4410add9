"""Models whose weights are in several places, or in few bits: the splice finds its way, and what cannot be had is refused."""

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from sae_lens import StandardTrainingSAEConfig, TopKTrainingSAEConfig
from sae_lens.load_model import HookedProxyLM

from sae_lens_e2e.loading import load_model
from sae_lens_e2e.loading.metadata import model_settings
from sae_lens_e2e.splice import SplicedModel
from sae_lens_e2e.splice.unembedding import LinearUnembedding
from sae_lens_e2e.training.ready import make_ready
from tests.models import HUGGING_FACE, hugging_face_model, random_tokens
from tests.training import gradients, make_runner, make_trainer, runner_config

SAE = TopKTrainingSAEConfig(d_in=16, d_sae=40, k=4)
SETTINGS: dict[str, Any] = {
    **{"hook_name": "model.layers.0", "objective": "e2e_ds", "model_class_name": "AutoModelForCausalLM"},
    "sae": SAE,
}


def trained(model: HookedProxyLM, **kwargs: Any) -> dict[str, torch.Tensor]:
    """An SAE's weights after a short run on a model."""
    runner = make_runner(runner_config(**SETTINGS, model_from_pretrained_kwargs=kwargs), model)
    return {name: value.detach().clone() for name, value in runner.run().state_dict().items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_a_device_map_is_followed(tmp_path: Path) -> None:
    plain: Any = hugging_face_model("llama")
    plain.model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(_TOKENIZER)
    model: Any = load_model(str(tmp_path), "cpu", "AutoModelForCausalLM", {"device_map": {"": "cpu"}})
    assert_same(trained(model, device_map={"": "cpu"}), trained(plain))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_blocks_that_move_what_they_are_given_stand_in(kind: str) -> None:
    # As accelerate spreads a model over GPUs: a hook on every part takes its inputs to where its weights are.
    spread: Any = hugging_face_model(kind)
    main: Any = "cpu"
    places: dict[str, Any] = {
        name: "cpu" for name, module in spread.model.named_modules() if name and not list(module.children())
    }
    accelerate.dispatch_model(spread.model, places, main, force_hooks=True)
    assert any(hasattr(module, "_hf_hook") for module in spread.model.modules())
    spliced = SplicedModel(spread)
    assert len(spliced.parts[0]) == 3
    assert isinstance(spliced.unembedding, LinearUnembedding)
    hook = {"gpt2": "transformer.h.0"}.get(kind, "model.layers.0")
    of_each = [
        make_runner(runner_config(**SETTINGS | {"hook_name": hook}), model).run().state_dict()
        for model in (spread, hugging_face_model(kind))
    ]
    assert_same(*of_each)


def test_weights_that_are_kept_away_until_they_are_needed_do() -> None:
    # As accelerate does with what does not fit on a device.
    away: Any = hugging_face_model("llama")
    for module in (away.model.model.layers[1], away.model.lm_head):
        accelerate.cpu_offload(module, execution_device=torch.device("cpu"))
    assert away.model.lm_head.weight.is_meta
    found, expected = trained(away), trained(hugging_face_model("llama"))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"quantization_config": {"load_in_8bit": True}}, "load_in_8bit takes bitsandbytes, which is not installed"),
        ({"load_in_8bit": True}, "set quantization_config to {'load_in_8bit': True}"),
        (
            {"quantization_config": transformers.BitsAndBytesConfig(load_in_8bit=True)},
            "quantization_config is a BitsAndBytesConfig; give its settings",
        ),
    ],
)
def test_quantised_weights_that_cannot_be_had_are_refused(
    kwargs: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae_lens_e2e.training.ready.find_spec", lambda _: None)
    with pytest.raises((ValueError, ImportError), match=r"^[^\n]*$") as raised:
        make_ready(runner_config(**SETTINGS, model_from_pretrained_kwargs=kwargs))
    assert says in str(raised.value)


def test_four_bits_on_a_cpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_lens_e2e.training.ready.find_spec", lambda _: object())
    cfg = runner_config(**SETTINGS, model_from_pretrained_kwargs={"quantization_config": {"load_in_4bit": True}})
    with pytest.raises(ValueError, match="load_in_4bit on a CPU gives wrong gradients"):
        make_ready(cfg)


def test_an_sae_trains_on_a_frozen_8_bit_model(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra 'quantised' is not installed")
    sizes = HUGGING_FACE["llama"] | {
        "hidden_size": 64,
        "intermediate_size": 128,
        "head_dim": 16,
        "initializer_range": 0.1,
    }
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("llama", **sizes)).save_pretrained(
        tmp_path
    )
    kwargs: dict[str, Any] = {"quantization_config": {"load_in_8bit": True}, "device_map": {"": "cpu"}}
    models: list[Any] = [
        HookedProxyLM(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **of), None)  # pyright: ignore[reportArgumentType]
        for of in (kwargs, {})
    ]
    quantised, plain = models
    weights = quantised.model.model.layers[0].mlp.up_proj.weight
    assert weights.dtype == torch.int8
    before = weights.clone()
    settings = SETTINGS | {"sae": StandardTrainingSAEConfig(d_in=64, d_sae=40, l1_coefficient=0.02), "objective": "e2e"}
    found, expected = (
        make_runner(runner_config(**settings, model_from_pretrained_kwargs=of), model)
        for model, of in ((quantised, kwargs), (plain, {}))
    )
    tokens = random_tokens(4, 12, 61)
    of_found, of_expected = (gradients(make_trainer(runner), tokens)["W_dec"].flatten() for runner in (found, expected))
    # The same, but for the rounding of the weights to 8 bits.
    assert torch.nn.functional.cosine_similarity(of_found, of_expected, 0) > 0.95
    start = found.sae.W_dec.detach().clone()
    assert not torch.equal(found.run().W_dec, start)
    assert torch.equal(weights, before)
    assert found.sae.cfg.metadata.training_flops == expected.sae.cfg.metadata.training_flops > 0


@pytest.mark.parametrize(
    ("kwargs", "loads_no_code"),
    [
        ({"quantization_config": {"load_in_8bit": True}, "device_map": "auto"}, True),
        ({"quantization_config": {"quant_method": "mxfp4"}}, False),
        ({"device_map": {"": "cuda:3"}}, False),
    ],
)
def test_what_metadata_say_of_places_and_bits(kwargs: dict[str, Any], loads_no_code: bool) -> None:
    metadata = make_runner().sae.cfg.metadata
    metadata.model_name, metadata.model_from_pretrained_kwargs = "tiny", kwargs
    if loads_no_code:
        assert model_settings(metadata)["model_from_pretrained_kwargs"] == kwargs
    else:
        with pytest.raises(ValueError, match="may run code"):
            model_settings(metadata)


_TOKENIZER = (
    '{"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}'
)
