"""The norms of a decoder's rows against PyTorch's own."""

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from sae_lens_e2e.architectures.row_norms import is_row_norms, row_norms


def test_norms_and_gradient_are_pytorch_s() -> None:
    x = torch.randn(50, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # A row without a direction has no gradient, in PyTorch's too.
    x[3] = 0
    grad = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, expected = row_norms(ours), theirs.norm(dim=1)
    assert torch.equal(found, expected)
    found.backward(grad)
    expected.backward(grad)
    assert ours.grad is not None
    assert ours.grad[3].eq(0).all()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-14, atol=1e-14)


class Asked(TorchFunctionMode):
    """Whether each call of a norm is that of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[bool] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.norm:
            self.found.append(is_row_norms(func, args, kwargs))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("kwargs", "is_one"),
    [
        ({"dim": 1}, True),
        ({"dim": -1}, True),
        ({"dim": 0}, False),
        ({"dim": 1, "keepdim": True}, False),
        ({"dim": 1, "p": 1}, False),
        ({"dim": 1, "dtype": torch.float64}, False),
        ({}, False),
    ],
)
def test_no_other_norm_is_taken_for_it(kwargs: dict[str, Any], is_one: bool) -> None:
    with Asked() as asked:
        torch.zeros(2, 3).norm(**kwargs)
        torch.zeros(2, 3, 4).norm(**kwargs)
    assert asked.found == [is_one, False]
