"""How numbers are written."""

from collections.abc import Callable


def count(value: float) -> str:
    """A number of things: 46,080."""
    return f"{round(value):,}"


def nats(value: float) -> str:
    """A loss, to three decimals as in the paper, or to two digits if it is small."""
    return f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.2g}"


def decimals(n: int) -> Callable[[float], str]:
    """A number with `n` decimals."""
    return lambda value: f"{value:,.{n}f}"


def significant(n: int) -> Callable[[float], str]:
    """A number to `n` significant digits."""
    return lambda value: f"{value:.{n}g}"


def digits(value: float) -> str:
    """A setting, with as many digits as it takes."""
    return f"{value:g}"
