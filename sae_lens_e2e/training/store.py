"""SAELens' activation store, whose checkpoints say exactly how far it has been read, and whose rows are looked at on the host."""

import inspect
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from jaxtyping import Int
from sae_lens import logger
from sae_lens.tokenization_and_batching import tokenize_with_chat_template
from sae_lens.training.activations_store import ActivationsStore
from safetensors.torch import load_file
from torch import Tensor
from typing_extensions import override

from sae_lens_e2e.columns import text_of, tokens_of

_BEFORE, _DOCUMENTS, _TOKENS = "documents_of_earlier_epochs", "documents_of_this_epoch", "tokens_of_the_next_document"


class _Document(Tensor):
    """The tokens of a document, which notes how many of them have been packed into rows."""

    packed: int

    @override
    def __getitem__(self, at: Any) -> Tensor:
        if isinstance(at, slice):
            # SAELens packs them slice by slice.
            self.packed = min(at.stop, len(self))
        return self.as_subclass(Tensor)[at]


class ResumableStore(ActivationsStore):
    """SAELens' store, which goes on from a checkpoint with the very next row, whoever has read from it.

    SAELens' saves how many documents it has left behind, but many rows may be made of one. Ours saves, beside that, where in
    its epoch the last row ended, and goes there without tokenising again what came before.

    Rows are made on the host and moved to the model whole, so that a device is not waited for to look at tokens. Asking it for a row
    raises ValueError, with its number, for one that is too short or holds something else, and for a token that the model does not know.
    """

    _d_vocab: int | None = None
    """Tokens that the model knows, if that is known."""

    _before = 0
    """Documents read in earlier epochs."""
    _skipped = (0, 0)
    """Where this epoch was begun: documents passed over, and tokens of the next one."""

    _document: _Document
    """The one in hand, where rows are packed; without what was cut off."""

    @classmethod
    def of(cls, store: ActivationsStore, d_vocab: int | None = None) -> "ResumableStore":
        """`store` itself, made one of these before anything is read from it: SAELens' runners make their own."""
        store.__class__ = cls
        assert isinstance(store, cls)
        store._d_vocab = d_vocab
        store.iterable_sequences = store._iterate_tokenized_sequences()
        return store

    @property
    def position(self) -> tuple[int, int]:
        """Where in this epoch the last row ended: documents used up, and tokens of the one after them."""
        rows = self.iterable_sequences
        if inspect.getgeneratorstate(rows) == inspect.GEN_CREATED:
            return self._skipped
        # SAELens counts a document when it asks for the next one.
        documents = self.n_dataset_processed - self._before
        if self.is_dataset_tokenized or self.disable_concat_sequences:
            return documents + 1, 0
        begun_in, cut_off = self._skipped
        return documents, self._document.packed + (cut_off if documents == begun_in else 0)

    @override
    def state_dict(self) -> dict[str, Tensor]:
        """SAELens' own, with the position."""
        documents, tokens = self.position
        numbers = {_BEFORE: self._before, _DOCUMENTS: documents, _TOKENS: tokens}
        return super().state_dict() | {name: torch.tensor(number) for name, number in numbers.items()}

    @override
    def load(self, file_path: str) -> None:
        """Go on where `state_dict` was called; from a file of SAELens' own, which does not say, near it."""
        state = load_file(file_path)
        if _DOCUMENTS not in state:
            logger.warning(
                f"{Path(file_path).parent} does not say which row comes next (an older version wrote it): going on near it, not "
                "bit for bit"
            )
            super().load(file_path)
            return
        self.iterable_sequences = self._epoch(*(int(state[name]) for name in (_BEFORE, _DOCUMENTS, _TOKENS)))

    @override
    def _iterate_tokenized_sequences(self) -> Generator[Tensor, None, None]:
        return self._epoch(self.n_dataset_processed, 0, 0)

    def _epoch(self, before: int, documents: int, tokens: int) -> Generator[Tensor, None, None]:
        """The rows of an epoch, from a position on."""
        self._before, self._skipped = before, (documents, tokens)
        self.n_dataset_processed = before + documents
        return self._rows()

    def _rows(self) -> Generator[Int[Tensor, "pos"], None, None]:
        rows = self._tokenised_rows() if self.is_dataset_tokenized else super()._iterate_tokenized_sequences()
        for row in rows:
            self._check_known(row)
            yield row

    def _tokenised_rows(self) -> Generator[Int[Tensor, "pos"], None, None]:
        for row in self._iterate_raw_dataset():
            yield tokens_of(row, self._number, self.context_size)

    @property
    def _number(self) -> int:
        """Of the row in hand, in its epoch."""
        return self.n_dataset_processed - self._before

    def _check_known(self, row: Int[Tensor, "pos"]) -> None:
        least, largest = (int(token) for token in row.aminmax())
        if least < 0 or (self._d_vocab is not None and largest >= self._d_vocab):
            raise ValueError(
                f"the dataset has token {least if least < 0 else largest} and the model knows {self._d_vocab}; tokenise it with the "
                "model's own tokenizer"
            )

    @override
    def _iterate_raw_dataset(self) -> Generator[Any, None, None]:
        for row in _after(cast(Any, self.dataset), self._skipped[0]):
            yield row[self.tokens_column]
            self.n_dataset_processed += 1

    @override
    def _iterate_raw_dataset_tokens(self) -> Generator[Tensor, None, None]:
        _, cut_off = self._skipped
        for row in self._iterate_raw_dataset():
            self._document = self._tokenised(row)[cut_off:].as_subclass(_Document)
            self._document.packed = 0
            yield self._document
            cut_off = 0

    def _tokenised(self, row: Any) -> Int[Tensor, "pos"]:
        """A document's tokens as SAELens has them, but on the host."""
        model, row = cast(Any, self.model), text_of(row, self._number, self.use_chat_formatting)
        if self.use_chat_formatting:
            return tokenize_with_chat_template(
                [{"role": "user", "content": row}] if isinstance(row, str) else row, model.tokenizer
            )
        return model.to_tokens(row, truncate=False, move_to_device=False, prepend_bos=False).squeeze(0)


def _after(dataset: Any, documents: int) -> Iterable[Any]:
    if not documents:
        return dataset
    # A dataset that has a length refuses to skip all of it.
    return () if isinstance(dataset, Dataset) and documents >= len(dataset) else dataset.skip(documents)
