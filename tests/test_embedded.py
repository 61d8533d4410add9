"""The embedded model and stories: that they are what their card says, load offline, and fail clearly when damaged."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformer_lens import HookedTransformer
from transformers import AutoTokenizer

from sae_lens_e2e import embedded
from sae_lens_e2e.embedded import EmbeddedFileError, load_dataset, load_model
from sae_lens_e2e.splice import SplicedModel

FOLDER = Path(embedded.__file__).parent
DATA_FILES = sorted(json.loads((FOLDER / "checksums.json").read_text()))
MODEL_FILES = [name for name in DATA_FILES if not name.endswith(".parquet")]
BOS = 0


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return load_model()


@pytest.fixture(scope="module")
def rows() -> dict[str, np.ndarray]:
    """[rows, 256] token ids of each split."""
    return {split: np.array(load_dataset(split)["input_ids"][:]) for split in embedded.SPLITS}


@pytest.fixture(scope="module")
def token_losses(model: HookedTransformer, rows: dict[str, np.ndarray]) -> np.ndarray:
    """[held-out rows, 255] nats."""
    with torch.no_grad(), SplicedModel(model).running():
        parts = [
            model(part, return_type="loss", loss_per_token=True)
            for part in torch.from_numpy(rows["held_out"]).split(16)
        ]
    return torch.cat(parts).double().numpy()


@pytest.fixture
def copied_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the shipped files that a test may damage, which the loaders read instead of the package's."""
    folder = tmp_path / "embedded"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(embedded, "_FOLDER", folder)
    return folder


def card_figure(name: str) -> float:
    figure = re.search(rf"^\| {re.escape(name)} \| ([\d.,]+)", (FOLDER / "MODEL_CARD.md").read_text(), re.MULTILINE)
    assert figure, f"the card has no row {name!r}"
    return float(figure[1].replace(",", ""))


def unigram_entropy(targets: np.ndarray) -> float:
    p = np.bincount(targets.ravel()) / targets.size
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


def test_files_are_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 4e6


def test_config(model: HookedTransformer) -> None:
    cfg = model.cfg
    assert (cfg.n_layers, cfg.d_model, cfg.n_heads, cfg.d_head, cfg.d_mlp) == (6, embedded.D_MODEL, 4, 16, 256)
    assert (cfg.n_ctx, cfg.d_vocab, cfg.model_name) == (embedded.CONTEXT_SIZE, 1024, embedded.MODEL_NAME)
    assert (cfg.normalization_type, cfg.positional_embedding_type, cfg.act_fn) == ("LN", "standard", "gelu_new")
    assert embedded.HOOK_NAME in model.hook_dict
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_every_weight_was_loaded(model: HookedTransformer) -> None:
    assert all(torch.isfinite(p).all() for p in model.parameters())
    torch.testing.assert_close(model.W_U, model.W_E.T)
    untrained = [name for name, p in model.named_parameters() if not p.any()]
    assert untrained == ["unembed.b_U"]


def test_model_predicts_much_better_than_token_frequencies(
    token_losses: np.ndarray, rows: dict[str, np.ndarray]
) -> None:
    assert token_losses.mean() < 0.55 * unigram_entropy(rows["held_out"][:, 1:])


def test_card_states_the_measured_figures(token_losses: np.ndarray, rows: dict[str, np.ndarray]) -> None:
    entropy = unigram_entropy(rows["held_out"][:, 1:])
    assert card_figure("Held-out cross-entropy") == pytest.approx(token_losses.mean(), abs=1e-3)
    assert card_figure("Held-out unigram entropy") == pytest.approx(entropy, abs=1e-3)
    assert card_figure("Train rows") == len(rows["train"])
    assert card_figure("Held-out rows") == len(rows["held_out"])


def test_there_are_enough_stories(rows: dict[str, np.ndarray]) -> None:
    assert rows["train"].size >= 1_000_000
    assert rows["held_out"].size >= 60_000


@pytest.mark.parametrize("split", embedded.SPLITS)
def test_rows_start_with_bos(rows: dict[str, np.ndarray], split: str) -> None:
    assert rows[split].shape[1] == embedded.CONTEXT_SIZE
    assert (rows[split][:, 0] == BOS).all()
    assert rows[split].min() >= 0
    assert rows[split].max() < 1024


def stories(rows: np.ndarray) -> set[bytes]:
    """The stories that rows hold whole."""
    stream = rows[:, 1:].ravel()
    return {story.tobytes() for story in np.split(stream, np.flatnonzero(stream == BOS) + 1)[1:-1]}


def test_splits_share_no_row_and_no_story(rows: dict[str, np.ndarray]) -> None:
    train, held_out = ({row.tobytes() for row in rows[split]} for split in embedded.SPLITS)
    assert train.isdisjoint(held_out)
    train, held_out = (stories(rows[split]) for split in embedded.SPLITS)
    assert len(held_out) > 200
    assert train.isdisjoint(held_out)


@pytest.mark.parametrize(
    "text", ['Once upon a time, Lily\'s mom said, "Look!"\nThe end.', "caf\u00e9 \U0001f600\t x  y "]
)
def test_tokenizer_round_trips(model: HookedTransformer, text: str) -> None:
    tokens = model.to_tokens(text)
    assert tokens[0, 0] == BOS
    assert (tokens[0, 1:] != BOS).all()
    assert model.to_string(tokens[0, 1:]) == text
    assert model.to_tokens(text, prepend_bos=False).tolist() == tokens[:, 1:].tolist()


def test_tokenizer_stands_alone() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    assert len(tokenizer) == 1024
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == BOS
    assert tokenizer("One day<|endoftext|>")["input_ids"][-1] == BOS


def test_rows_are_stories(model: HookedTransformer, rows: dict[str, np.ndarray]) -> None:
    text = model.to_string(torch.from_numpy(rows["held_out"][:20].ravel()))
    assert isinstance(text, str)
    assert text.isascii()
    assert text.count("Once upon a time") > 5


def test_dataset_works_as_sae_lens_uses_it() -> None:
    dataset = load_dataset("held_out")
    assert dataset.column_names == ["input_ids"]
    dataset.set_format("torch", columns=["input_ids"])
    row = dataset[0]["input_ids"]
    assert row.dtype == torch.int64
    assert row[:100].shape == (100,)


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="train, held_out"):
        load_dataset("test")


def test_loads_from_a_read_only_folder_and_writes_nothing(copied_folder: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in copied_folder.iterdir()}
    copied_folder.chmod(0o555)
    try:
        load_model()
        for split in embedded.SPLITS:
            load_dataset(split).select(range(3)).map(lambda row: {"n": len(row["input_ids"])})
    finally:
        copied_folder.chmod(0o755)
    assert {path.name: path.stat().st_mtime_ns for path in copied_folder.iterdir()} == before


def load_what_reads(name: str) -> None:
    if name.endswith(".parquet"):
        load_dataset(name.removesuffix(".parquet"))
    else:
        load_model()


def damages(path: Path) -> Iterator[str]:
    """Damages a file in one way after another, yielding what the error must say of each."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    yield "is damaged"
    path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    yield "is damaged"
    path.unlink()
    yield "is missing"
    path.mkdir()
    yield "cannot be read"


@pytest.mark.parametrize("name", DATA_FILES)
def test_damaged_and_missing_files_are_named(copied_folder: Path, name: str) -> None:
    for says in damages(copied_folder / name):
        with pytest.raises(EmbeddedFileError) as error:
            load_what_reads(name)
        message = str(error.value)
        assert "\n" not in message
        assert f"{name} {says}" in message
        assert "pip install --force-reinstall --no-deps sae-lens-e2e" in message


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"{}", b"\xff\xfe"])
def test_damaged_checksums_are_named(copied_folder: Path, content: bytes | None) -> None:
    path = copied_folder / "checksums.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    for load in (load_model, load_dataset):
        with pytest.raises(EmbeddedFileError, match=r"checksums\.json is (missing|damaged); reinstall"):
            load()


def test_every_shipped_file_is_checked() -> None:
    shipped = {path.name for path in FOLDER.iterdir() if path.is_file()}
    assert shipped == {*DATA_FILES, "checksums.json", "MODEL_CARD.md", "__init__.py"}
    assert set(MODEL_FILES) == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
