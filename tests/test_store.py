"""A store that goes on from a checkpoint: every row as in the straight run, whatever the data and wherever it stopped."""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens.training import activations_store
from sae_lens.training.activations_store import ActivationsStore
from safetensors.torch import save_file

from sae_lens_e2e import embedded
from sae_lens_e2e.training.prompts import PromptBatches
from sae_lens_e2e.training.store import ResumableStore
from tests.models import dataset_of, random_tokens

MODEL = embedded.load_model()
STORIES = [str(MODEL.to_string(torch.tensor(row))) for row in embedded.load_dataset()[:12]["input_ids"]]
TEXTS = {
    "short": [story[:40] for story in STORIES],
    "mixed": [STORIES[0][:400], STORIES[1][:90], "", STORIES[2][:20], STORIES[3][:600]],
    "long": [" ".join(STORIES[:2]), STORIES[2][:50]],
}
TOKENISED = {f"tokenised, {n} rows": dataset_of(random_tokens(n, 40, 512)) for n in (3, 20)}
DATA = {name: Dataset.from_dict({"text": texts}) for name, texts in TEXTS.items()} | TOKENISED
FORMS: dict[str, Callable[[Dataset], Any]] = {
    "map": lambda data: data,
    "shuffled": lambda data: data.shuffle(seed=3),
    "streamed": lambda data: data.with_format(None).to_iterable_dataset(num_shards=2).shuffle(seed=3, buffer_size=4),
}
PACKING: dict[str, dict[str, Any]] = {
    "packed": {},
    "no bos": {"prepend_bos": False},
    "no separator": {"sequence_separator_token": None},
    "eos between": {"sequence_separator_token": "eos", "prepend_bos": False},
    "apart": {"disable_concat_sequences": True},
}
# Every text with every packing, and each of the two in every form: pairs, not all three at once.
CASES = [(data, "packed", form) for data in TOKENISED for form in FORMS] + [
    (data, packing, list(FORMS)[(i + j) % len(FORMS)])
    for i, data in enumerate(TEXTS)
    for j, packing in enumerate(PACKING)
]


def store_of(dataset: Any, tokenised: bool = False, **settings: Any) -> ResumableStore:
    arguments: dict[str, Any] = {
        "hook_name": "blocks.0.hook_resid_pre",
        "hook_head_index": None,
        "context_size": 8 if settings.get("disable_concat_sequences") else 32,
        "d_in": MODEL.cfg.d_model,
        "n_batches_in_buffer": 2,
        "total_training_tokens": 1000,
        "store_batch_size_prompts": 2,
        "train_batch_size_tokens": 64,
        "prepend_bos": True,
        "normalize_activations": "none",
        "device": torch.device("cpu"),
        "dtype": "float32",
    }
    store = ResumableStore.of(ActivationsStore(MODEL, dataset, True, **(arguments | settings)))
    assert store.is_dataset_tokenized is tokenised
    return store


@pytest.mark.parametrize(("data", "packing", "form"), CASES)
def test_every_row_after_a_checkpoint_is_the_straight_run_s(data: str, packing: str, form: str, tmp_path: Path) -> None:
    def make() -> ResumableStore:
        return store_of(FORMS[form](DATA[data]), tokenised="tokenised" in data, **PACKING[packing])

    straight = make()
    batches, folders, states = [], [], []
    for i in range(18):
        folders.append(tmp_path / str(i))
        folders[-1].mkdir()
        straight.save_to_checkpoint(folders[-1])
        batches.append(straight.get_batch_tokens(1 + i % 4))
        states.append(straight.state_dict())
    assert straight.n_dataset_processed > len(DATA[data]), "more than an epoch has been read"
    for start, folder in enumerate(folders):
        resumed = make()
        resumed.load_from_checkpoint(folder)
        for i in range(start, min(start + 3, len(batches))):
            assert torch.equal(resumed.get_batch_tokens(1 + i % 4), batches[i]), f"from {start}, batch {i}"
            assert resumed.state_dict() == states[i], f"from {start}, batch {i}"
            if i == start:
                # Stopped once more, perhaps within the document that it began in.
                resumed.save_to_checkpoint(folder)
                resumed = make()
                resumed.load_from_checkpoint(folder)


def test_a_stock_store_reads_the_same_rows() -> None:
    ours = store_of(DATA["mixed"])
    stock = store_of(DATA["mixed"])
    stock.__class__ = ActivationsStore  # pyright: ignore[reportAttributeAccessIssue]
    stock.iterable_sequences = ActivationsStore._iterate_tokenized_sequences(stock)
    for _ in range(20):
        assert torch.equal(ours.get_batch_tokens(3), stock.get_batch_tokens(3))
    assert ours.n_dataset_processed == stock.n_dataset_processed


def test_activations_are_a_part_of_what_was_read(tmp_path: Path) -> None:
    """An estimate of activation statistics reads from the same rows, and drops those of a batch that an epoch's end cuts."""
    straight = store_of(DATA["short"])
    for _ in range(5):
        next(straight)
    straight.save_to_checkpoint(tmp_path)
    resumed = store_of(DATA["short"])
    resumed.load_from_checkpoint(tmp_path)
    assert torch.equal(resumed.get_batch_tokens(9), straight.get_batch_tokens(9))


def test_documents_passed_over_are_not_tokenised_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = store_of(DATA["short"])
    straight.get_batch_tokens(4)
    straight.save_to_checkpoint(tmp_path)
    documents, _ = straight.position
    assert documents > 2
    resumed, read = store_of(DATA["short"]), []
    to_tokens = MODEL.to_tokens
    monkeypatch.setattr(MODEL, "to_tokens", lambda text, **how: read.append(text) or to_tokens(text, **how))
    resumed.load_from_checkpoint(tmp_path)
    resumed.get_batch_tokens(1)
    assert read[0] == TEXTS["short"][documents]


def test_a_checkpoint_that_does_not_say_is_gone_on_from_near_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = store_of(DATA["short"])
    old.get_batch_tokens(4)
    save_file(ActivationsStore.state_dict(old), tmp_path / "activations_store_state.safetensors")
    resumed = store_of(DATA["short"])
    with caplog.at_level(logging.WARNING):
        resumed.load_from_checkpoint(tmp_path)
    assert "does not say which row comes next" in caplog.text
    assert resumed.n_dataset_processed >= old.n_dataset_processed


@pytest.mark.parametrize("data", ["mixed", "tokenised, 20 rows"])
def test_nothing_is_read_from_the_device_that_rows_go_to(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`meta` has no numbers: whoever reads one there, to pack rows or to look at tokens, fails."""
    expected = store_of(DATA[data], "tokenised" in data).get_batch_tokens(5)
    store = store_of(DATA[data], "tokenised" in data)
    ResumableStore.of(store, MODEL.cfg.d_vocab).device = torch.device("meta")
    assert torch.equal(PromptBatches(store, 5).__next__(), expected)
    monkeypatch.setattr(activations_store, "_get_input_token_device", lambda _: torch.device("meta"))
    prompts = next(PromptBatches(store, 5))
    assert prompts.is_meta
    assert prompts.shape == expected.shape
    # A meta tensor does fail to be read.
    with pytest.raises(RuntimeError):
        prompts.max().item()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("row", "says"),
    [
        ([1] * 5, "row 4 of the dataset has 5 tokens, fewer than context_size=32"),
        ([1] * 31 + [512], "has token 512 and the model knows 512"),
        ([-1] + [1] * 31, "has token -1 and the model knows 512"),
    ],
)
def test_a_row_that_cannot_be_read_is_refused_whatever_the_dataset(form: str, row: list[int], says: str) -> None:
    rows = [[1] * 40] * 6
    rows[4] = row
    store = ResumableStore.of(store_of(FORMS[form](Dataset.from_dict({"input_ids": rows})), True), d_vocab=512)
    if form != "map":
        says = re.sub("row 4", r"row \\d", says)
    with pytest.raises(ValueError, match=says):
        store.get_batch_tokens(6)


NO_TOKENS = [[1.5] * 40, [[1, 2]] * 40, "a text of forty letters is no list of ids", [None] * 40, [True] * 40, None]


@pytest.mark.parametrize("row", [*NO_TOKENS, 3], ids=lambda row: repr(row)[:12])
def test_what_holds_no_tokens_or_no_text_is_named(row: Any) -> None:
    tokenised = row in NO_TOKENS
    column, good = ("input_ids", [1] * 40) if tokenised else ("text", STORIES[0])
    rows = [{column: good}, {column: row}] * 3
    data = Dataset.from_dict({"n": range(6)})
    # As a dataset of such rows is: arrow itself takes one kind of value only.
    store = store_of(data.add_column(column, [good] * 6), tokenised)
    store.dataset = rows  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(
        ValueError, match=f"row 1 of the dataset holds no {'token ids' if tokenised else 'text'}"
    ) as error:
        store.get_batch_tokens(9)
    assert "\n" not in str(error.value)
