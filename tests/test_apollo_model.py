"""The language models that Apollo's library trained and saved."""

import inspect
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformer_lens import HookedTransformer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sae_lens_e2e.apollo.model import PROCESSED, d_model, find_model, load_apollo_model
from tests.apollo import reference, run_config, write_tiny4l
from tests.models import GOLDEN, apollo_tiny4l
from tests.servers import hub
from tests.test_apollo_checkpoint import Intruder

TOKENS = load_file(GOLDEN / "apollo_e2e_ds.safetensors")["tokens"]


def tokenizer() -> PreTrainedTokenizerFast:
    """One for the reference model's 512 pieces."""
    vocabulary = {"<|endoftext|>": 0, "once": 1, "upon": 2, **{f"piece{i}": i for i in range(3, 512)}}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<|endoftext|>"))
    words.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def change_config(model: Path, **changes: Any) -> None:
    """Set (or with None, drop) settings of the model's config."""
    file = model.parent / "final_config.yaml"
    config = yaml.safe_load(file.read_text())
    config["tlens_config"] = {k: v for k, v in (config["tlens_config"] | changes).items() if v is not None}
    file.write_text(yaml.dump(config))


def raises_one_line(error: type[Exception], path: Path, *parts: str) -> None:
    with pytest.raises(error) as caught:
        load_apollo_model(path)
    assert "\n" not in str(caught.value)
    for part in (str(path.parent), *parts):
        assert part in str(caught.value)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The reference model, with no tokenizer in its config."""
    path = write_tiny4l(tmp_path / "tiny4l")
    change_config(path, tokenizer_name=None)
    return path


def is_tiny4l(model: HookedTransformer) -> None:
    assert model.cfg.normalization_type == "LN"
    assert not model.training
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), apollo_tiny4l()(TOKENS), atol=1e-5, rtol=0)


class TestLoading:
    def test_it_is_as_it_was_saved(self, saved: Path) -> None:
        model = load_apollo_model(saved)
        is_tiny4l(model)
        assert model.tokenizer is None
        is_tiny4l(load_apollo_model(str(saved)))

    def test_what_apollos_library_wrote(self) -> None:
        model = load_apollo_model(reference("tiny4l") / "model.pt")
        is_tiny4l(model)
        # Its tokenizer lies beside its folder, and not in the one the tests run in.
        assert model.tokenizer is not None
        assert model.to_tokens("Once upon a time").max() < 512

    def test_the_mask_may_be_in_the_file_or_not(self, saved: Path) -> None:
        weights = torch.load(saved, weights_only=True)
        masks = {f"blocks.{layer}.attn.mask": torch.ones(64, 64).tril().bool() for layer in range(4)}
        ignored = {f"blocks.{layer}.attn.IGNORE": torch.tensor(-torch.inf) for layer in range(4)}
        torch.save({**weights, **masks, **ignored}, saved)
        is_tiny4l(load_apollo_model(saved))

    def test_its_dtype(self, saved: Path) -> None:
        change_config(saved, dtype="bfloat16")
        assert {p.dtype for p in load_apollo_model(saved).parameters()} == {torch.bfloat16}


class TestTokenizer:
    @pytest.fixture
    def saved(self, tmp_path: Path) -> Path:
        return write_tiny4l(tmp_path / "tiny4l")

    @pytest.mark.parametrize("place", ["tiny4l/tok512", "tok512"])
    def test_near_the_model(self, saved: Path, place: str) -> None:
        tokenizer().save_pretrained(saved.parents[1] / place)
        model = load_apollo_model(saved)
        assert model.to_tokens("once upon").tolist() == [[0, 1, 2]]
        is_tiny4l(model)

    def test_where_it_runs(self, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path / "tiny4l")
        tokenizer().save_pretrained(tmp_path / "tiny4l" / "tok512")
        assert load_apollo_model(saved).tokenizer is not None

    def test_one_that_is_given(self, saved: Path, tmp_path: Path) -> None:
        tokenizer().save_pretrained(tmp_path / "mine")
        given = AutoTokenizer.from_pretrained(tmp_path / "mine")
        assert load_apollo_model(saved, given).to_tokens("upon", prepend_bos=False).tolist() == [[2]]

    def test_one_that_is_nowhere(self, saved: Path, caplog: pytest.LogCaptureFixture) -> None:
        change_config(saved, tokenizer_name="somebody/tok512")
        with hub({}), caplog.at_level(logging.WARNING):
            model = load_apollo_model(saved)
        is_tiny4l(model)
        assert model.tokenizer is None
        assert any("'somebody/tok512' was not found" in message for message in caplog.messages)

    def test_without_a_network(self, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        change_config(saved, tokenizer_name="somebody/tok512")
        with hub({}):
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
            assert load_apollo_model(saved).tokenizer is None


class TestBadInput:
    def test_no_file(self, saved: Path) -> None:
        raises_one_line(FileNotFoundError, saved.parent / "other.pt", "other.pt", "final_config.yaml beside it")

    def test_no_config(self, saved: Path) -> None:
        (saved.parent / "final_config.yaml").unlink()
        raises_one_line(FileNotFoundError, saved, "final_config.yaml beside it")

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            (yaml.dump(run_config()), "no 'tlens_config'"),
            ("", "no 'tlens_config'"),
            ("tlens_config: gpt2", "no 'tlens_config'"),
            ("a: [1, 2\nb: }", "is neither YAML nor JSON"),
            ("x: !!python/object/apply:os.mkdir [here]", "is neither YAML nor JSON"),
        ],
    )
    def test_the_config_of_something_else(self, saved: Path, text: str, says: str) -> None:
        (saved.parent / "final_config.yaml").write_text(text)
        raises_one_line(ValueError, saved, "final_config.yaml", says)

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"n_experts_of_theirs": 3}, "n_experts_of_theirs"),
            ({"n_layers": None}, "n_layers"),
            ({"dtype": "float7"}, "float7"),
        ],
    )
    def test_settings_that_make_no_model(self, saved: Path, changes: dict[str, Any], says: str) -> None:
        change_config(saved, **changes)
        raises_one_line(ValueError, saved, "tlens_config does not make a model", says)

    def test_weights_of_another_shape(self, saved: Path) -> None:
        change_config(saved, d_model=40)
        raises_one_line(ValueError, saved, "model.pt", "embed.W_E")

    def test_a_missing_tensor(self, saved: Path) -> None:
        weights = torch.load(saved, weights_only=True)
        del weights["blocks.3.mlp.W_out"]
        torch.save(weights, saved)
        raises_one_line(ValueError, saved, "blocks.3.mlp.W_out is missing or unknown")

    def test_a_tensor_too_many(self, saved: Path) -> None:
        torch.save({**torch.load(saved, weights_only=True), "scale": torch.ones(3)}, saved)
        raises_one_line(ValueError, saved, "scale is missing or unknown")

    def test_a_damaged_file(self, saved: Path) -> None:
        saved.write_bytes(saved.read_bytes()[:5000])
        raises_one_line(ValueError, saved, "damaged")

    def test_code_in_it_is_not_run(self, saved: Path) -> None:
        marker = saved.parent / "marker"
        torch.save({**torch.load(saved, weights_only=True), "ln_final.w": Intruder(marker)}, saved)
        raises_one_line(ValueError, saved, "would run code")
        assert not marker.exists()


class TestWidth:
    def test_of_a_saved_model_from_wherever_the_run_was_started(
        self, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = tmp_path / "e2e_ds"
        run.mkdir()
        config = run_config()
        assert d_model(run, config) == d_model(run / "final_config.yaml", config) == 32
        assert find_model(run, "tiny4l/model.pt") == saved
        assert d_model("elsewhere/final_config.yaml", {"tlens_model_path": str(saved)}) == 32
        monkeypatch.chdir(tmp_path)
        assert find_model("elsewhere/final_config.yaml", "tiny4l/model.pt") == Path("tiny4l/model.pt")

    def test_of_one_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"^the width of tlens_model_path='tiny4l/model.pt'.* pass d_in=$"):
            d_model(tmp_path, run_config())

    def test_of_a_model_by_name_is_looked_up(self, tmp_path: Path) -> None:
        config = {
            "architectures": ["GPTNeoForCausalLM"],
            "model_type": "gpt_neo",
            "hidden_size": 64,
            "num_layers": 8,
            "num_heads": 16,
            "attention_types": [[["global", "local"], 4]],
        }
        files = {"roneneldan/TinyStories-1M/config.json": json.dumps(config).encode()}
        with hub(files):
            assert d_model(tmp_path, {"tlens_model_name": "roneneldan/TinyStories-1M"}) == 64
        with hub({}), pytest.raises(ValueError, match=r"tlens_model_name='tiny-stories-3M'.* pass d_in=$") as caught:
            d_model(tmp_path, {"tlens_model_name": "tiny-stories-3M"})
        assert "\n" not in str(caught.value)


def test_apollo_loaded_models_by_name_as_transformer_lens_does_by_default() -> None:
    defaults = inspect.signature(HookedTransformer.from_pretrained).parameters
    unprocessed = inspect.signature(HookedTransformer.from_pretrained_no_processing).parameters
    assert set(PROCESSED) == {"fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"}
    for name, value in PROCESSED.items():
        assert defaults[name].default is value
        # SAELens gives model_from_pretrained_kwargs to this one, whose defaults are the opposite.
        assert unprocessed[name].default is not value
