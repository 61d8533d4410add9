"""Matrices of which few entries are other than zero, as PyTorch's CSR: made, transposed and multiplied."""

import warnings
from functools import cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

MAX_DENSITY = 0.05
"""A product over active features pays where no more than this part of them fires: a multiplication costs it some ten times as much."""
ROWS_AT_ONCE = 32
"""Of tokens, whose features are looked through; so many that a cache holds them."""


def as_csr_if_few(x: Float[Tensor, "m k"]) -> Tensor | None:
    """A matrix as CSR, if few of its entries are other than zero."""
    x = x.detach().contiguous()
    width, most, found = x.shape[1], MAX_DENSITY * x.numel(), []
    # By numpy, which compares and finds several times as fast as PyTorch does, and in pieces that a cache holds.
    for start in range(0, len(x), ROWS_AT_ONCE):
        found.append(start * width + np.flatnonzero(x[start : start + ROWS_AT_ONCE].numpy() != 0))
        most -= len(found[-1])
        if most < 0:
            return None
    at = torch.from_numpy(np.concatenate(found)) if found else torch.zeros(0, dtype=torch.long)
    rows, columns = at.div(width, rounding_mode="floor"), at % width
    return _sorted_csr(rows, columns, x.view(-1)[at], x.shape)


def transposed(features: Tensor) -> Tensor:
    """A CSR matrix's transpose as CSR, its rows filled in their order."""
    rows, columns = places(features)
    order = columns.argsort(stable=True)
    return _sorted_csr(columns[order], rows[order], features.values()[order], features.shape[::-1])


def places(features: Tensor) -> tuple[Tensor, Tensor]:
    """The token and the feature of each entry of a CSR matrix."""
    return torch.repeat_interleave(torch.arange(len(features)), features.crow_indices().diff()), features.col_indices()


def with_values(csr: Tensor, values: Tensor) -> Tensor:
    """A CSR matrix with other values in the same places."""
    return _csr(csr.crow_indices(), csr.col_indices(), values, csr.shape)


def times(features: Tensor, x: Float[Tensor, "k n"]) -> Float[Tensor, "m n"]:
    """A CSR matrix times a dense one, laid out by rows or by columns as that is: MKL would copy one of two that differ.

    `features @ x` would fill its result with zeros first, and copy it.
    """
    m, n = features.shape[0], x.shape[1]
    out = x.new_empty(m, n) if x.is_contiguous() else x.new_empty(n, m).T
    return torch.addmm(out, features, x, beta=0, out=out)


def times_transposed(left: Float[Tensor, "m k"], features: Tensor) -> Float[Tensor, "k n"]:
    """`left.T` times a CSR matrix, such as the gradient of an encoder's weights."""
    # Of a matrix laid out by columns the result is laid out as weights are, and not copied.
    return times(transposed(features), left.T.contiguous().T).T


def _sorted_csr(rows: Tensor, columns: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """A CSR matrix of entries that are sorted by row."""
    starts = torch.zeros(shape[0] + 1, dtype=torch.long)
    torch.cumsum(torch.bincount(rows, minlength=shape[0]), 0, out=starts[1:])
    return _csr(starts, columns, values, shape)


def _csr(starts: Tensor, columns: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """A CSR matrix that is known to be one."""
    _say_nothing_of_beta()
    return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)


@cache
def _say_nothing_of_beta() -> None:
    """PyTorch says once a process that CSR is in beta: here, to nobody."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.zeros(1, 1).to_sparse_csr()
