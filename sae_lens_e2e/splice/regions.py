"""Blocks of a language model that run in one piece, since nobody looks inside: checkpointed, or compiled."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sae_lens_e2e.errors import one_line
from sae_lens_e2e.splice.stand_in import running_as


class Compilation(NamedTuple):
    """How `torch.compile` is to compile a model's blocks."""

    mode: str | None = None
    backend: str | Callable[..., Any] = "inductor"


def unwatched(blocks: Sequence[nn.Module], watched: Collection[nn.Module]) -> list[nn.Module]:
    """The blocks with no watched module inside. What a block itself returns may be watched: it is seen outside."""
    ids = {id(module) for module in watched}
    return [block for block in blocks if not any(id(m) in ids for m in block.modules() if m is not block)]


@contextmanager
def checkpointed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Have blocks keep their input for the backward pass and nothing else, and run again there: less memory, more time."""
    with running_as({block: partial(checkpoint, block.forward, use_reentrant=False) for block in blocks}):
        yield


def compiled(blocks: Sequence[nn.Module], compilation: Compilation) -> dict[nn.Module, Callable[..., Any]]:
    """For each block its `forward`, compiled when it is first called.

    What is compiled is kept by the code that it is of, with weights for inputs, so that equal blocks share it. A call raises
    RuntimeError, in one line, if it cannot be compiled.
    """
    return {block: _compiled(block, compilation) for block in blocks}


def _compiled(block: nn.Module, compilation: Compilation) -> Callable[..., Any]:
    # Here, because whoever compiles nothing need not wait for it.
    from torch._dynamo.exc import TorchDynamoException

    run = torch.compile(block.forward, mode=compilation.mode, backend=compilation.backend)

    def forward(*args: Any, **kwargs: Any) -> Any:
        try:
            return run(*args, **kwargs)
        except TorchDynamoException as error:
            # What follows is advice on how to see more of the compiler.
            reason = one_line(error).partition(" Set TORCH")[0]
            raise RuntimeError(
                f"compile_llm=True: torch.compile cannot compile {type(block).__name__} here: {reason}; give it what it lacks, or set "
                "compile_llm to False"
            ) from error

    return forward
