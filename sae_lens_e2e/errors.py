"""What an error says, in one line, and errors that concern one thing of many."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


def one_line(error: BaseException) -> str:
    """An error's message without line breaks; its type's name if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def named_line(error: BaseException) -> str:
    """The same after the error's type, as a traceback ends."""
    said = one_line(error)
    return said if said == type(error).__name__ else f"{type(error).__name__}: {said}"


@contextmanager
def kept_to(name: str, on_failure: Callable[[str, Exception], None]) -> Iterator[None]:
    """Give whatever a block raises to `on_failure`, with what it is about, so that the others go on."""
    try:
        yield
    except Exception as error:
        on_failure(name, error)
