"""SAEDashboard: what it is given is right, what it says agrees with us, and what does not fit is refused early.

What runs SAEDashboard itself is marked slow, and needs an environment that has it:
    SAE_LENS_E2E_DASHBOARD_PYTHON=/path/to/its/bin/python pytest -m slow tests/test_dashboard.py
With the value `make` it is made first, or found in the cache, as it is for users.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE
from torch import Tensor
from transformer_lens import HookedTransformer
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from sae_lens_e2e import embedded
from sae_lens_e2e.evaluation import evaluate
from sae_lens_e2e.publishing.dashboard import make_dashboard
from sae_lens_e2e.publishing.dashboard.run import distinct_prompts
from sae_lens_e2e.publishing.neuronpedia import save_for_neuronpedia
from tests.models import dataset_of
from tests.saes import inference_sae

PYTHON = os.environ.get("SAE_LENS_E2E_DASHBOARD_PYTHON")
METADATA = {
    "model_name": embedded.MODEL_NAME,
    "hook_name": embedded.HOOK_NAME,
    "dataset_path": "stories",
    "context_size": 64,
    "prepend_bos": False,
}
N_PROMPTS, N_FEATURES = 64, 24


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return embedded.load_model()


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return embedded.load_dataset("held_out").select(range(N_PROMPTS))


@pytest.fixture(scope="module")
def tokens(dataset: Dataset) -> Tensor:
    return torch.tensor(dataset["input_ids"])[:, : METADATA["context_size"]]


def saved_sae(folder: Path, architecture: str = "standard", **metadata: Any) -> SAE[Any]:
    sae = inference_sae(architecture, METADATA | metadata, d_in=embedded.D_MODEL, d_sae=32)
    sae.save_model(folder)
    return sae


# What is refused before anything is run


@pytest.mark.parametrize(
    ("metadata", "arguments", "message"),
    [
        (
            {"model_name": None, "prepend_bos": None},
            {},
            r"cfg.json' have no model_name, prepend_bos; write the SAE with",
        ),
        ({"dataset_path": ""}, {"dataset": None}, "have no dataset_path"),
        ({"hook_name": "ln_final.hook_normalized"}, {}, r"hook_name='ln_final.hook_normalized' .* takes blocks.N"),
        ({"hook_name": "blocks.3.hook_resid"}, {}, r"no hook 'blocks.3.hook_resid'; did you mean blocks.3.hook_resid_"),
        ({"hook_name": "blocks.3.hook_mlp_in"}, {}, "hook_mlp_in"),
        ({"hook_name": "blocks.3.mlp.hook_post"}, {}, "d_in=64 does not fit blocks.3.mlp.hook_post, which is 256 wide"),
        ({"hook_head_index": 1}, {}, "hook_head_index=1"),
        ({"model_class_name": "HookedMamba"}, {}, "model_class_name='HookedMamba'"),
        ({"context_size": 512}, {}, "context_size=512 is longer than the model's, 256"),
        ({}, {"n_features": 33}, "n_features=33: the SAE has 32 features; ask for no more"),
        ({}, {"n_features": 0}, "n_features=0; set it to 1 or more"),
        ({}, {"n_prompts": 0}, "n_prompts=0; set it to 1 or more"),
        ({}, {"dataset": None, "n_prompts": 12}, "n_prompts=12 is no multiple of 8"),
        ({}, {"model": None}, r"dataset= needs model=.*from_pretrained_no_processing\('sae-lens-e2e-stories'\)"),
        ({}, {"python": sys.executable}, "has no sae-dashboard; run `.* -m pip install -r .*requirements.txt`"),
        ({}, {"python": "/nowhere/python"}, "python='/nowhere/python' is no program"),
        ({}, {"dataset": dataset_of(torch.full((2, 64), 1024))}, "token 1024 and the model knows 1024"),
        ({}, {"dataset": dataset_of(torch.zeros(2, 32, dtype=torch.long))}, "32 tokens, fewer than context_size=64"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(
    tmp_path: Path,
    model: HookedTransformer,
    dataset: Dataset,
    metadata: dict[str, Any],
    arguments: dict[str, Any],
    message: str,
) -> None:
    saved_sae(tmp_path / "sae", **metadata)
    with pytest.raises(ValueError, match=message) as raised:
        make_dashboard(tmp_path / "sae", tmp_path / "out", **({"model": model, "dataset": dataset} | arguments))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_sae(tmp_path: Path) -> None:
    (tmp_path / "cfg.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is no SAE: it lacks cfg.json or sae_weights.safetensors"):
        make_dashboard(tmp_path, tmp_path / "out")


def test_an_architecture_that_saedashboard_does_not_know(tmp_path: Path, model: HookedTransformer) -> None:
    saved_sae(tmp_path / "sae", "matching_pursuit")
    with pytest.raises(
        ValueError, match=r"architecture='matching_pursuit' .* takes standard or topk or jumprelu or gated"
    ):
        make_dashboard(tmp_path / "sae", tmp_path / "out", model=model)


def test_an_output_that_is_somebody_elses(tmp_path: Path, model: HookedTransformer) -> None:
    saved_sae(tmp_path / "sae")
    with pytest.raises(FileExistsError, match="exists and is not one of our runs"):
        make_dashboard(tmp_path / "sae", tmp_path / "sae", model=model)


# What SAEDashboard is given


def test_prompts_are_distinct_and_in_order(caplog: pytest.LogCaptureFixture) -> None:
    batches = [torch.tensor([[3, 1]]), torch.tensor([[2, 2]]), torch.tensor([[3, 1]]), torch.tensor([[0, 1]])]
    assert distinct_prompts(batches, 2, d_vocab=4).tolist() == [[3, 1], [2, 2]]
    assert not caplog.records
    assert distinct_prompts(batches, 9, d_vocab=4).tolist() == [[3, 1], [2, 2], [0, 1]]
    assert "3 different prompts, fewer than n_prompts=9" in caplog.text


# SAEDashboard itself


@pytest.fixture(scope="module")
def python() -> str | None:
    if PYTHON is None:
        pytest.skip(
            "SAE_LENS_E2E_DASHBOARD_PYTHON is not set: give it the interpreter of an environment with sae-dashboard, or 'make'"
        )
    return None if PYTHON == "make" else PYTHON


@pytest.fixture
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))


def at_hook(model: HookedTransformer, tokens: Tensor) -> Tensor:
    return model.run_with_cache(tokens, names_filter=embedded.HOOK_NAME)[1][embedded.HOOK_NAME].detach()


@torch.no_grad()
def our_features(sae: SAE[Any], x: Tensor, shown: Tensor) -> Tensor:
    """(prompts, pos, d_sae): in the unit of a decoder vector of length 1, and 0 where SAEDashboard does not look."""
    return sae.encode(x) * sae.W_dec.norm(dim=-1) * shown[..., None]


def features_in(batches: list[Path]) -> list[dict[str, Any]]:
    return [feature for batch in batches for feature in json.loads(batch.read_text())["features"]]


def assert_densities_agree(features: list[dict[str, Any]], ours: Tensor) -> None:
    counts = (ours > 0).sum((0, 1))
    assert float((counts > 0).float().mean()) > 0.9
    for feature in features:
        # Counts are exact, but for a pre-activation that rounding carries across the threshold; the density has five digits.
        count = sum(feature["freq_hist_data_bar_heights"])
        assert abs(count - int(counts[feature["feature_index"]])) <= 1
        assert feature["frac_nonzero"] == pytest.approx(count / ours[..., 0].numel(), abs=5.001e-6)


def assert_activations_agree(feature: dict[str, Any], ours: Tensor, words: list[list[str]]) -> None:
    """Each prompt that is shown is one of ours with its activations; the first of all is the one that is most active."""
    ours = ours[..., feature["feature_index"]]
    prompts = {tuple(prompt): activations for prompt, activations in zip(words, ours[:, 1:], strict=True)}
    assert len(feature["activations"]) > 20
    for shown in feature["activations"]:
        activations = prompts[tuple(shown["tokens"])]
        torch.testing.assert_close(torch.tensor(shown["values"]), activations, atol=6e-4, rtol=0)
    top = feature["activations"][0]
    assert max(top["values"]) == pytest.approx(float(ours.max()), abs=6e-4)
    assert top["values"][top["qualifying_token_index"]] == max(top["values"])


@pytest.mark.slow
@pytest.mark.usefixtures("no_network")
def test_a_folder_for_neuronpedia_and_a_local_model(
    tmp_path: Path, python: str | None, model: HookedTransformer, dataset: Dataset, tokens: Tensor
) -> None:
    sae = inference_sae("standard", METADATA | {"exclude_special_tokens": True}, d_in=embedded.D_MODEL, d_sae=32)
    x = at_hook(model, tokens)
    with torch.no_grad():
        bias: Any = sae.b_enc
        # Features that fire on from 0.1 % to 50 % of tokens.
        before_bias = ((x - sae.b_dec) @ sae.W_enc).flatten(0, 1)
        for index, rate in enumerate(torch.logspace(-3, -0.3, 32)):
            bias[index] = -torch.quantile(before_bias[:, index], 1 - rate)
    evaluation = evaluate(sae, model, dataset, batch_size_prompts=16, verbose=False)
    assert evaluation.firing_frequency is not None
    save_for_neuronpedia(sae, tmp_path / "sae", frequency=evaluation.firing_frequency, neuronpedia_id="tiny/3-res_mine")
    saved = {path.name: path.read_bytes() for path in (tmp_path / "sae").iterdir()}
    assert sorted(saved) == ["cfg.json", "sae_weights.safetensors", "sparsity.safetensors"]

    given = {"model": model, "dataset": dataset, "n_prompts_in_forward_pass": 24, "python": python, "verbose": False}
    batches = make_dashboard(tmp_path / "sae", tmp_path / "out", n_features=N_FEATURES, n_features_at_a_time=9, **given)
    assert [path.name for path in batches] == ["batch-0.json", "batch-1.json", "batch-2.json"]
    batch = json.loads(batches[0].read_text())
    assert (batch["model_id"], batch["layer"], batch["sae_set"]) == (embedded.MODEL_NAME, 3, "res_mine")
    features = features_in(batches)
    assert [feature["feature_index"] for feature in features] == list(range(N_FEATURES))
    ours = our_features(sae, x, tokens != 0)
    assert_densities_agree(features, ours)
    tokenizer: Any = model.tokenizer
    words = [
        [word.replace("Ġ", " ").replace("Ċ", "\n") for word in tokenizer.convert_ids_to_tokens(prompt[1:])]
        for prompt in tokens.tolist()
    ]
    logits = torch.nn.functional.normalize(sae.W_dec.detach()) @ model.W_U.detach()
    for feature in features:
        index = feature["feature_index"]
        # SAEDashboard's density is of all tokens, ours of those that the SAE is for.
        density = float(evaluation.firing_frequency[index]) * evaluation.n_tokens_measured / evaluation.n_tokens
        assert feature["frac_nonzero"] == pytest.approx(density, abs=5.001e-6 + 1 / tokens.numel())
        assert_activations_agree(feature, ours, words)
        assert feature["pos_values"] == pytest.approx(logits[index].topk(10).values.tolist(), abs=6e-4)
        assert feature["neg_values"] == pytest.approx(logits[index].topk(10, largest=False).values.tolist(), abs=6e-4)
        assert (feature["n_prompts_total"], feature["n_tokens_in_prompt"]) == (N_PROMPTS, 64)
        assert feature["dataset"] == "stories"

    # Again, with less: nothing of the first time is left.
    again = make_dashboard(tmp_path / "sae", tmp_path / "out", n_features=2, **given)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["batch-0.json", "dashboard.json"]
    assert [feature["frac_nonzero"] for feature in features_in(again)] == [
        feature["frac_nonzero"] for feature in features[:2]
    ]
    assert {path.name: path.read_bytes() for path in (tmp_path / "sae").iterdir()} == saved


@pytest.mark.slow
@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("topk", {"rescale_acts_by_decoder_norm": False}),
        ("topk", {"rescale_acts_by_decoder_norm": True}),
        ("jumprelu", {}),
        ("gated", {}),
    ],
)
def test_every_architecture_that_training_ends_in(
    tmp_path: Path,
    python: str | None,
    model: HookedTransformer,
    dataset: Dataset,
    tokens: Tensor,
    architecture: str,
    settings: dict[str, Any],
) -> None:
    metadata = METADATA | {"seqpos_slice": (8, 60)}
    sae = inference_sae(architecture, metadata, d_in=embedded.D_MODEL, d_sae=32, **settings)
    sae.save_model(tmp_path / "sae")
    batches = make_dashboard(
        tmp_path / "sae", tmp_path / "out", model=model, dataset=dataset, python=python, verbose=False
    )
    shown = tokens != 0
    shown[:, :8] = shown[:, 60:] = False
    features = features_in(batches)
    assert len(features) == 32
    assert_densities_agree(features, our_features(sae, at_hook(model, tokens), shown))


@pytest.mark.slow
@pytest.mark.parametrize("processed", [False, True])
def test_a_model_of_the_hub_is_processed_only_if_the_metadata_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python: str | None, dataset: Dataset, processed: bool
) -> None:
    name, hook = "roneneldan/TinyStories-1M", "blocks.1.hook_resid_pre"
    causal_lm = in_the_hub_cache(name, tmp_path / "hub")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer: Any = embedded.load_model().tokenizer
    prompts = torch.tensor([[0, *(token for token in row if token)][:32] for row in dataset["input_ids"]])
    (tmp_path / "text").mkdir()
    rows = [json.dumps({"text": tokenizer.decode([token for token in row if token])}) for row in dataset["input_ids"]]
    (tmp_path / "text" / "train.jsonl").write_text("\n".join(rows))
    kwargs = {"fold_ln": True, "center_writing_weights": True, "center_unembed": True} if processed else {}
    sae = inference_sae(
        "standard",
        {
            "model_name": name,
            "hook_name": hook,
            "dataset_path": str(tmp_path / "text"),
            "context_size": 32,
            "prepend_bos": True,
            "model_from_pretrained_kwargs": kwargs,
        },
        d_in=32,
        d_sae=32,
    )
    sae.save_model(tmp_path / "sae")
    batches = make_dashboard(tmp_path / "sae", tmp_path / "out", n_prompts=N_PROMPTS, python=python, verbose=False)
    x = causal_lm(prompts, output_hidden_states=True).hidden_states[1]
    if processed:
        x = x - x.mean(-1, keepdim=True)
    assert_densities_agree(features_in(batches), our_features(sae, x, prompts != 0))


@torch.no_grad()
def in_the_hub_cache(name: str, cache: Path) -> GPTNeoForCausalLM:
    """A small random model where huggingface_hub keeps what it has downloaded under `name`."""
    commit = "0" * 40
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    config = {
        "vocab_size": 1024,
        "hidden_size": 32,
        # TransformerLens takes it that the MLP is four times as wide.
        "intermediate_size": 128,
        "num_layers": 2,
        "num_heads": 2,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    model = GPTNeoForCausalLM(GPTNeoConfig.from_dict(config)).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(snapshot)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(embedded.__file__).parent / file, snapshot)
    return model
