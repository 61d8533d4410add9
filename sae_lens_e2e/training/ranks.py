"""Several processes, a rank each, that train in step, started by torchrun; in a process by itself nothing here does anything.

What an SAE is made of travels between GPUs (NCCL); whether all is well is asked between the hosts (gloo), so that no device is waited for.
Every rank must come to the same calls in the same order: what may fail on one of them alone is done within `together`, `first` or `agreed`,
which are where the others hear of it.
"""

import atexit
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from sae_lens import logger
from torch import Tensor
from torch.nn import Parameter

from sae_lens_e2e.errors import named_line, one_line
from sae_lens_e2e.launch import has_ranks

Made = TypeVar("Made")

_PATIENCE = timedelta(days=1)
"""How long a rank waits for the others; of one that is gone it hears at once, so that a long wait is rank 0's evaluation."""

_LAST_WORDS = timedelta(seconds=20)
"""How long it waits for one that is about to end; torchrun gives it 30 seconds."""


class RankError(RuntimeError):
    """What stopped another rank, and this one with it."""

    def __init__(self, rank: int, said: str):
        super().__init__(f"rank {rank}: {said}")
        self.rank = rank


class RankLost(BaseException):
    """Another rank ended without a word, killed for instance. Not an Exception: no point of a sweep can go on without it either."""


def begin() -> None:
    """Join the ranks that torchrun has started, if it has; each takes the GPU of its number on its machine. Only rank 0 speaks."""
    if _in_group() or not has_ranks():
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_PATIENCE)
    atexit.register(dist.destroy_process_group)
    if not is_first():
        logger.setLevel(logging.ERROR)
        warnings.simplefilter("ignore")


def world_size() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if _in_group() else 1


def rank() -> int:
    """The number of this one."""
    return dist.get_rank() if _in_group() else 0


def local_rank() -> int:
    """Its number among those of this machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def is_first() -> bool:
    """Whether this is rank 0, which writes, logs and shows progress for all."""
    return rank() == 0


def share(items: Sequence[Made]) -> Sequence[Made]:
    """Those of some items that are this rank's: as many as each other's, or one more or less, and next to each other.

    Rank 0 has the last ones, so that what it logs of them is what one process would.
    """
    n, of = len(items), world_size()
    before = of - 1 - rank()
    return items[n * before // of : n * (before + 1) // of]


def any_of(flag: bool) -> bool:
    """Whether it is so on any rank."""
    return _any([flag])[0]


def gathered(value: Made) -> list[Made]:
    """What each rank has, by its number."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    with _heard():
        dist.all_gather_object(found, value)
    return found


def agreed(errors: Sequence[Exception | None]) -> list[Exception | None]:
    """What stops each of some things on any rank: its own error on the first rank that had one, on the others a RankError of that."""
    if world_size() == 1 or not errors or not any(_any([error is not None for error in errors])):
        return list(errors)
    said = gathered([None if error is None else named_line(error) for error in errors])
    settled: list[Exception | None] = []
    for number, error in enumerate(errors):
        first = next((r for r, of_rank in enumerate(said) if of_rank[number] is not None), None)
        settled.append(error if first in (None, rank()) else RankError(first, str(said[first][number])))
    return settled


@contextmanager
def together() -> Iterator[None]:
    """What each rank does for itself; an error of one is raised on all, by `agreed`.

    No rank may wait for the others within, unless it comes first of all, for one that has failed already does not come.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    (settled,) = agreed([error])
    if settled is not None:
        raise settled


def first(action: Callable[[], Made]) -> Made:
    """What rank 0 makes of an action, on all ranks, once it is done; an error of it is raised on all."""
    with together():
        made = action() if is_first() else None
    if world_size() == 1:
        return made  # pyright: ignore[reportReturnType]
    sent: list[Any] = [made]
    with _heard():
        dist.broadcast_object_list(sent, src=0)
    return sent[0]


@contextmanager
def on_first(make: Callable[[], AbstractContextManager[Made]], otherwise: Made) -> Iterator[Made]:
    """A context that rank 0 alone is in, such as a lock; the others have `otherwise`, and stop where it cannot be entered."""
    with ExitStack() as stack:
        with together():
            given = stack.enter_context(make()) if is_first() else otherwise
        yield given


def gradients(parameters: Sequence[Parameter]) -> list[Tensor]:
    """The gradients of some parameters; among several ranks of all of them, for where one rank had none, another may."""
    if world_size() > 1:
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


@torch.no_grad()
def sum_(tensors: Sequence[Tensor]) -> None:
    """Put into each tensor its sum over the ranks, the same to the last bit on all; one message for all of a kind."""
    if world_size() == 1:
        return
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for alike in kinds.values():
        with _heard():
            flat = torch.cat([tensor.reshape(-1) for tensor in alike])
            dist.all_reduce(flat)
        for tensor, part in zip(alike, flat.split([tensor.numel() for tensor in alike]), strict=True):
            tensor.copy_(part.view_as(tensor))


@torch.no_grad()
def mean_(tensors: Sequence[Tensor]) -> None:
    """Put into each tensor its mean over the ranks."""
    if world_size() == 1:
        return
    wide = [tensor.double() for tensor in tensors]
    sum_(wide)
    for tensor, total in zip(tensors, wide, strict=True):
        tensor.copy_(total / world_size())


@torch.no_grad()
def chained_(running: Tensor, before: Tensor, kept: float) -> None:
    """Put into a running mean what it is after all ranks' changes of it, one after the other, in the order of their shares.

    Each has changed it from what it was `before`, of which it has kept a part: value' = kept · value + new.
    """
    if world_size() == 1:
        return
    own = torch.stack([running.double(), torch.full_like(running, kept, dtype=torch.float64)])
    of_ranks = [torch.empty_like(own) for _ in range(world_size())]
    with _heard():
        dist.all_gather(of_ranks, own)
    after = before.double()
    for found, part in reversed(of_ranks):
        after = found + part * (after - before)
    running.copy_(after)


@torch.no_grad()
def copy_first_(tensors: Sequence[Tensor]) -> None:
    """Put into each tensor what rank 0 has there."""
    if world_size() == 1:
        return
    for tensor in tensors:
        sent = tensor.detach().contiguous()
        with _heard():
            dist.broadcast(sent, src=0)
        tensor.copy_(sent)


def outlive(other: int) -> None:
    """Wait until another rank, which is about to end, has ended: when one has, torchrun ends the others, in the middle of a word."""
    if other != rank():
        with suppress(RuntimeError):
            message = dist.irecv(torch.empty(1), src=other)
            assert message is not None
            message.wait(_LAST_WORDS)


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def _any(flags: Sequence[bool]) -> list[bool]:
    if world_size() == 1:
        return list(flags)
    found = torch.tensor(flags, dtype=torch.int32)
    with _heard():
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return [bool(flag) for flag in found]


@contextmanager
def _heard() -> Iterator[None]:
    """Raises RankLost where the others are not heard of, or cannot be answered; gloo and NCCL have no error of their own for it."""
    try:
        yield
    except RuntimeError as error:
        raise RankLost(
            f"the ranks have lost each other ({one_line(error)}); start all of them again, with resume_from_checkpoint for what was trained"
        ) from error
