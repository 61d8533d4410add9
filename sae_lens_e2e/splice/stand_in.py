"""Blocks that run something else for a while, or need not run again, because what comes out of them is known."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def running_as(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Have each block run what it is given for its `forward`; forward hooks on the blocks themselves still run.

    Set on the instance, past the module's own `__setattr__`, which `TransformerBridge` intercepts; a block compiled in place is
    called around its `forward`, so that is set aside too.
    """
    before = [(block, block.__dict__.get("forward"), block._compiled_call_impl) for block in forwards]
    for block, forward in forwards.items():
        object.__setattr__(block, "forward", forward)
        if block._compiled_call_impl is not None:
            object.__setattr__(block, "_compiled_call_impl", None)
    try:
        yield
    finally:
        for block, own_forward, compiled in before:
            if own_forward is None:
                object.__delattr__(block, "forward")
            else:
                object.__setattr__(block, "forward", own_forward)
            if compiled is not None:
                object.__setattr__(block, "_compiled_call_impl", compiled)


@contextmanager
def standing_in(blocks: Sequence[nn.Module], residual: Tensor | None, in_tuple: bool) -> Iterator[None]:
    """Have each block return `residual`, (batch, pos, d_model), instead of running; in a tuple if that is what it returns."""
    stand_in = (residual,) if in_tuple else residual

    def forward(*_args: Any, **_kwargs: Any) -> Any:
        return stand_in

    with running_as(dict.fromkeys(blocks, forward)):
        yield
