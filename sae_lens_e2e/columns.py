"""Which column of a dataset is read, for training and for everything that is measured: the one that SAELens reads."""

from collections.abc import Collection
from typing import NamedTuple

# In the order in which SAELens' ActivationsStore looks for them.
_TOKENS, _TEXT = ("tokens", "input_ids"), ("text", "problem")


class Column(NamedTuple):
    """A column of a dataset: of token ids, or of text."""

    name: str
    is_tokens: bool


def column_of(names: Collection[str]) -> Column:
    """The column that is read of a dataset, from the names of all, or a row of it. Raises ValueError if it has none."""
    for name in (*_TOKENS, *_TEXT):
        if name in names:
            return Column(name, name in _TOKENS)
    columns = f"the columns {', '.join(names)}" if names else "no rows or columns"
    raise ValueError(f"the dataset has {columns}; name that of its tokens 'input_ids', or that of its text 'text'")
