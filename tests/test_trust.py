"""What the metadata of somebody else's SAE may have done: never run code, unless one says so."""

from pathlib import Path
from typing import Any

import pytest
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata

from sae_lens_e2e import save_for_neuronpedia
from sae_lens_e2e.apollo.model import PROCESSED
from sae_lens_e2e.cli import main
from sae_lens_e2e.loading import model_settings, models
from sae_lens_e2e.publishing.dashboard import make_dashboard
from sae_lens_e2e.report import make_report


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        None,
        PROCESSED,
        {"center_writing_weights": False},
        {"revision": "step3000", "dtype": "bfloat16", "n_ctx": 512},
        {"attn_implementation": "eager"},
        {"trust_remote_code": False},
    ],
)
def test_how_weights_are_read_may_be_said(kwargs: Any) -> None:
    metadata = SAEMetadata(
        model_name="someone/model", model_class_name="AutoModelForCausalLM", model_from_pretrained_kwargs=kwargs
    )
    assert model_settings(metadata) == {
        "name": "someone/model",
        "model_class_name": "AutoModelForCausalLM",
        "model_from_pretrained_kwargs": kwargs or {},
    }


CODE = [
    {"trust_remote_code": True},
    {"revision": "main", "trust_remote_code": "yes"},
    {"attn_implementation": "someone/kernels"},
    {"code_revision": "main"},
    {"custom_generate": "someone/else"},
    {"quantization_config": {"quant_method": "mxfp4"}},
    {"dtype": {"auto": "float16"}},
    {"subfolder": "../.."},
    {"use_safetensors": False},
]


@pytest.mark.parametrize("kwargs", CODE)
def test_anything_else_takes_a_flag(kwargs: dict[str, Any]) -> None:
    metadata = SAEMetadata(model_name="someone/model", model_from_pretrained_kwargs=kwargs)
    key, value = list(kwargs.items())[-1]
    with pytest.raises(ValueError, match="pass --trust-remote-code") as error:
        model_settings(metadata)
    assert f"{key}={value!r}" in str(error.value)
    assert "\n" not in str(error.value)
    assert model_settings(metadata, trust_remote_code=True)["model_from_pretrained_kwargs"] == kwargs
    # Another model does not make the same arguments safe.
    with pytest.raises(ValueError, match="pass --trust-remote-code"):
        model_settings(metadata, "gpt2")


def test_metadata_that_name_no_model_or_are_none() -> None:
    assert model_settings(SAEMetadata(), "embedded") == {
        "name": "embedded",
        "model_class_name": "HookedTransformer",
        "model_from_pretrained_kwargs": {},
    }
    with pytest.raises(ValueError, match="name no model"):
        model_settings(SAEMetadata())
    with pytest.raises(ValueError, match="is no mapping"):
        model_settings(SAEMetadata(model_name="gpt2", model_from_pretrained_kwargs=["trust_remote_code"]))


@pytest.fixture
def strangers(tmp_path: Path) -> Path:
    sae = StandardSAE(StandardSAEConfig(d_in=64, d_sae=96, apply_b_dec_to_input=False))
    metadata: dict[str, Any] = {
        "model_name": "someone/model",
        "dataset_path": "embedded",
        "hook_name": "blocks.3.hook_resid_pre",
        "context_size": 32,
        "prepend_bos": True,
        "model_from_pretrained_kwargs": {"trust_remote_code": True},
    }
    return save_for_neuronpedia(sae, tmp_path / "sae", **metadata)


def test_no_command_loads_a_strangers_code_unasked(
    strangers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[dict[str, Any]] = []

    def load(*arguments: Any) -> None:
        asked.append(arguments[-1])
        raise OSError("not there")

    monkeypatch.setattr(models, "load_saelens_model", load)
    commands = {
        "evaluate": [],
        "report": ["--output", str(tmp_path / "report.html"), "--measures", "evaluation"],
        "dashboard": ["--dataset", "NAME", "--python", "no-such-python"],
        "saebench": [],
    }
    for command, flags in commands.items():
        assert main([command, str(strangers), *flags]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert "trust_remote_code=True" in line
        assert "pass --trust-remote-code" in line
        assert not asked
    for command, flags in commands.items():
        assert main([command, str(strangers), "--trust-remote-code", *flags]) == 2
        assert "--trust-remote-code" not in capsys.readouterr().err.strip().splitlines()[-1]
    assert asked == [{"trust_remote_code": True}] * 3
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        make_report([strangers], tmp_path / "report.html")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        make_dashboard(strangers, tmp_path / "dashboard")
    assert not (tmp_path / "dashboard").exists()


def test_a_model_that_is_code_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> None:
        raise ValueError("The repository contains custom code.\nPlease pass the argument `trust_remote_code=True`.")

    monkeypatch.setattr(models, "load_saelens_model", load)
    with pytest.raises(ValueError, match="runs code of its own repository; if you trust it") as error:
        models.load_model("someone/model", "cpu", "AutoModelForCausalLM")
    assert "\n" not in str(error.value)
