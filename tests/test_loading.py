"""Models and data by name: the embedded ones, and those in folders and files."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import save_file
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from sae_lens_e2e import embedded
from sae_lens_e2e.loading import is_local, load_documents, load_model, model_class_of
from tests.models import random_tokens


def folder_with_tokenizer(folder: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(str(Path(embedded.__file__).parent), local_files_only=True)
    tokenizer.save_pretrained(folder)
    return folder


def logits(model: HookedTransformer, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens)


def test_the_embedded_model_and_stories_by_name() -> None:
    model = load_model("embedded")
    train, held_out = load_documents("embedded")
    assert isinstance(model, HookedTransformer)
    assert isinstance(train, Dataset)
    assert len(train) == len(embedded.load_dataset("train"))
    assert len(held_out) == len(embedded.load_dataset("held_out"))
    assert is_local("embedded")
    assert not is_local("no/such-model")


@pytest.mark.parametrize("tied", [True, False])
def test_a_transformer_lens_folder(tied: bool, tmp_path: Path) -> None:
    model = embedded.load_model()
    (tmp_path / "transformer_lens").mkdir()
    settings = json.loads((Path(embedded.__file__).parent / "config.json").read_text())
    (tmp_path / "transformer_lens" / "config.json").write_text(json.dumps(settings))
    weights = {name: parameter.data.clone() for name, parameter in model.named_parameters() if name != "unembed.b_U"}
    if tied:
        del weights["unembed.W_U"]
    save_file(weights, tmp_path / "transformer_lens" / "model.safetensors")
    folder_with_tokenizer(tmp_path / "huggingface")
    loaded = load_model(str(tmp_path))
    assert isinstance(loaded, HookedTransformer)
    tokens = random_tokens(2, 8, 1024)
    torch.testing.assert_close(logits(loaded, tokens), logits(model, tokens))

    save_file(
        {k: v for k, v in weights.items() if "ln1.w" not in k}, tmp_path / "transformer_lens" / "model.safetensors"
    )
    with pytest.raises(ValueError, match=r"model.safetensors has no blocks\.0\.ln1\.w"):
        load_model(str(tmp_path))


def hugging_face_folder(folder: Path) -> tuple[Path, GPT2LMHeadModel]:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=1024, n_positions=64, n_embd=16, n_layer=2, n_head=2)).eval()
    model.save_pretrained(folder)
    return folder_with_tokenizer(folder), model


@pytest.mark.parametrize("model_class", ["AutoModelForCausalLM", "TransformerBridge"])
def test_a_hugging_face_folder_in_half_precision(model_class: str, tmp_path: Path) -> None:
    hugging_face_folder(tmp_path)
    loaded = load_model(str(tmp_path), model_class_name=model_class, model_from_pretrained_kwargs={"dtype": "bfloat16"})
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("inside", ["", "huggingface"])
@pytest.mark.parametrize(
    ("model_class", "had"),
    [
        # The default, of which there is none in the folder.
        ("HookedTransformer", "AutoModelForCausalLM"),
        ("AutoModelForCausalLM", "AutoModelForCausalLM"),
        ("TransformerBridge", "TransformerBridge"),
    ],
)
def test_a_hugging_face_folder(
    inside: str, model_class: str, had: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    _, saved = hugging_face_folder(tmp_path / inside)
    model = load_model(str(tmp_path), "cpu", model_class)
    assert model_class_of(model) == had
    assert model.tokenizer is not None
    tokens = random_tokens(2, 8, 1024)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), saved(tokens).logits)


def test_kwargs_are_those_of_the_class(tmp_path: Path) -> None:
    name = str(hugging_face_folder(tmp_path)[0])
    for model_class in ("AutoModelForCausalLM", "TransformerBridge"):
        model = load_model(name, "cpu", model_class, {"dtype": torch.float64})
        assert next(model.parameters()).dtype == torch.float64
    # SAELens' default for the default class.
    assert model_class_of(load_model(name, "cpu", "HookedTransformer", {"center_writing_weights": False}))
    for saved in (name, "embedded"):
        with pytest.raises(ValueError, match=r"model_from_pretrained_kwargs={'fold_ln': True}: .* as it was saved"):
            load_model(saved, "cpu", "HookedTransformer", {"fold_ln": True, "center_writing_weights": False})


def test_a_class_that_cannot_be_had_of_a_model_on_this_machine(tmp_path: Path) -> None:
    (tmp_path / "tl" / "transformer_lens").mkdir(parents=True)
    folder_with_tokenizer(tmp_path / "tl" / "huggingface")
    (tmp_path / "apollo.pt").touch()
    for name in ("embedded", str(tmp_path / "tl"), str(tmp_path / "apollo.pt")):
        for model_class in ("TransformerBridge", "AutoModelForCausalLM", "HookedMamba"):
            with pytest.raises(ValueError, match=rf"model_class_name='{model_class}': .* as a HookedTransformer only"):
                load_model(name, "cpu", model_class)
    hugging_face_folder(tmp_path / "hf")
    with pytest.raises(ValueError, match="model_class_name='HookedMamba' must be one of"):
        load_model(str(tmp_path / "hf"), "cpu", "HookedMamba")
    for model_class in ("HookedTransformer", "TransformerBridge"):
        with pytest.raises(FileNotFoundError, match=r"holds neither transformer_lens/config\.json nor"):
            load_model(str(tmp_path), "cpu", model_class)


def test_a_model_of_apollos(tmp_path: Path) -> None:
    settings = {
        "n_layers": 1,
        "d_model": 8,
        "d_head": 4,
        "n_ctx": 8,
        "d_vocab": 16,
        "act_fn": "gelu",
        "dtype": "float32",
    }
    (tmp_path / "final_config.yaml").write_text(yaml.safe_dump({"tlens_config": settings}))
    settings["dtype"] = torch.float32
    model = HookedTransformer(HookedTransformerConfig(**settings))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    loaded = load_model(str(tmp_path / "model.pt"))
    assert isinstance(loaded, HookedTransformer)
    tokens = random_tokens(1, 8, 16)
    torch.testing.assert_close(logits(loaded, tokens), logits(model.eval(), tokens))


def test_what_is_nowhere_says_so_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Read when the libraries are imported, so that setting the environment variable would come too late.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"model 'gpt2-xl'.*'embedded' needs no network") as error:
        load_model("gpt2-xl")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="model 'gpt2-no-such' is none that HookedTransformer knows"):
        load_model("gpt2-no-such")
    with pytest.raises(ConnectionError, match="model 'someone/no-such'"):
        load_model("someone/no-such", "cpu", "TransformerBridge")
    with pytest.raises(ConnectionError, match="dataset 'someone/no-such'"):
        load_documents("someone/no-such")
    (tmp_path / "notes.md").write_text("no data")
    for path in (tmp_path, tmp_path / "notes.md"):
        with pytest.raises(
            ValueError, match=r"is no .parquet, .jsonl, .json, .csv, .tsv, .txt, .arrow file, nor a folder of them"
        ):
            load_documents(str(path))
