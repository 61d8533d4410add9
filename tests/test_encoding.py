"""An encoder's product that waits for its bias: the same numbers and gradients, whatever is asked of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_lens_e2e.architectures.encoding import EncoderProduct, Encoding

N, D_IN, D_SAE = 6, 5, 8


def leaves() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (N, D_IN), "weights": (D_IN, D_SAE), "bias": (D_SAE,), "centre": (D_IN,)}
    found = {name: torch.randn(*shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: one.requires_grad_(name != "x") for name, one in found.items()}


def product_of(given: dict[str, Tensor]) -> EncoderProduct:
    return EncoderProduct(Encoding(given["x"] - given["centre"], given["weights"], given["centre"]))


ASKED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "biased": lambda product, bias: product + bias,
    "biased from the left": lambda product, bias: bias + product,
    "scaled": lambda product, _: product * 2 + product,
    "biased by a number for each token": lambda product, _: product + product.detach()[:, :1],
    "product": lambda product, _: product @ product.T,
    "shape": lambda product, _: torch.ones(product.shape, dtype=torch.float64) + product,
    "sum": lambda product, _: torch.stack([product.sum(), torch.relu(product).sum()]),
    "used twice": lambda product, bias: (product.relu() + bias) + (product + bias),
}


@pytest.mark.parametrize("asked", ASKED)
def test_it_is_the_product_that_it_stands_for(asked: str) -> None:
    gradients = []
    for lazy in (True, False):
        given = leaves()
        product = product_of(given) if lazy else (given["x"] - given["centre"]) @ given["weights"]
        found = ASKED[asked](product, given["bias"])
        assert type(found) is Tensor
        grads = torch.autograd.grad(
            (found**2).sum(), [one for one in given.values() if one.requires_grad], allow_unused=True
        )
        gradients.append([found, *grads])
    for ours, expected in zip(*gradients, strict=True):
        assert (ours is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_a_sum_with_another_row_is_not_taken_over() -> None:
    given = leaves()
    for other in (1.0, torch.zeros(N, D_SAE, dtype=torch.float64), torch.zeros(D_SAE), product_of(given)):
        assert product_of(given).with_bias(other) is None
    used = product_of(given)
    used.formed()
    assert used.with_bias(given["bias"]) is None
    assert product_of(given).with_bias(given["bias"]) is not None


@pytest.mark.parametrize("changed", ["x", "weights"])
def test_what_was_modified_before_it_was_used_is_refused(changed: str) -> None:
    given = leaves()
    with torch.no_grad():
        product = EncoderProduct(Encoding(given["x"], given["weights"], None))
        given[changed].mul_(2)
        for ask in (lambda: product.sum(), lambda: product.with_bias(given["bias"])):
            with pytest.raises(RuntimeError, match="modified by an inplace operation before its product was used"):
                ask()


def test_it_takes_no_memory_of_its_own() -> None:
    lazy = product_of(leaves())
    with torch._C.DisableTorchFunctionSubclass():
        assert lazy.untyped_storage().nbytes() == 8
