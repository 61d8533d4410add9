"""Which column of a dataset is read, for training and for everything that is measured: the one that SAELens reads; and what may be in it."""

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

# In the order in which SAELens' ActivationsStore looks for them.
_TOKENS, _TEXT, _CHAT = ("tokens", "input_ids"), ("text", "problem"), ("conversation", "conversations", "messages")

_NO_IDS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128, torch.bool)


class Column(NamedTuple):
    """A column of a dataset: of token ids, or of text."""

    name: str
    is_tokens: bool


def column_of(names: Collection[str], chat: bool = False) -> Column:
    """The column that is read of a dataset, from the names of all, or a row of it; with `chat`, to be formatted as SAELens does.

    Raises ValueError if it has none.
    """
    for name in (*_CHAT, "text") if chat else (*_TOKENS, *_TEXT):
        if name in names:
            return Column(name, name in _TOKENS)
    columns = f"the columns {', '.join(names)}" if names else "no rows or columns"
    wanted = f"that of its conversations {_CHAT[-1]!r}" if chat else "that of its tokens 'input_ids'"
    raise ValueError(
        f"the dataset has {columns}; name {wanted}, or that of its text 'text' (or ask for DATASET::COLUMN)"
    )


def tokens_of(row: Any, number: int, n_wanted: int | None) -> Int[Tensor, "pos"]:
    """The first `n_wanted` tokens of a row of token ids, on the host. Raises ValueError, with its number, for one that has fewer or others."""
    try:
        tokens = torch.as_tensor(row[:n_wanted], device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError):
        tokens = torch.empty(0, 0)
    if tokens.ndim != 1 or (len(tokens) and tokens.dtype in _NO_IDS):
        raise ValueError(
            f"row {number} of the dataset holds no token ids ({_shortly(row)}); leave it out, or give lists of integers"
        )
    if n_wanted is not None and len(tokens) < n_wanted:
        raise ValueError(
            f"row {number} of the dataset has {len(tokens)} tokens, fewer than context_size={n_wanted}; leave it out, or tokenise "
            "the dataset into rows of that many"
        )
    return tokens.long()


def text_of(row: Any, number: int, chat: bool = False) -> Any:
    """The text of a row, or with `chat` its conversation. Raises ValueError, with its number, for one that has none."""
    if not isinstance(row, str) and not (chat and isinstance(row, list)):
        wanted = "conversation" if chat else "text"
        raise ValueError(f"row {number} of the dataset holds no {wanted} but {_shortly(row)}; leave it out")
    return row


def _shortly(row: Any) -> str:
    return " ".join(repr(row).split())[:60]
