"""Which column of a dataset is read, for training and for everything that is measured: the one that SAELens reads."""

from collections.abc import Collection
from typing import NamedTuple

# In the order in which SAELens' ActivationsStore looks for them.
_TOKENS, _TEXT, _CHAT = ("tokens", "input_ids"), ("text", "problem"), ("conversation", "conversations", "messages")


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
