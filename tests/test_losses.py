"""The terms of an objective against sums written out by hand."""

import itertools

import pytest
import torch
from torch import Tensor

from sae_lens_e2e.objectives.terms import downstream_mse, reconstruction_mse


def mean_by_hand(spliced: Tensor, clean: Tensor) -> float:
    """Σ (ŷ - y)² / n over every index, one number at a time."""
    indices = list(itertools.product(*map(range, clean.shape)))
    return sum((float(spliced[i]) - float(clean[i])) ** 2 for i in indices) / len(indices)


def pair(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(dtype))  # pyright: ignore[reportReturnType]


def test_the_mean_is_over_tokens_and_dimensions() -> None:
    spliced = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    clean = torch.tensor([[1.0, 0.0, 3.0], [0.0, 0.0, 4.0]])
    assert float(reconstruction_mse(spliced, clean)) == pytest.approx((4 + 16) / 6)


@pytest.mark.parametrize("shape", [(5, 3), (5, 2, 3), (1, 1), (4, 2, 3, 2)], ids=str)
def test_every_dimension_after_the_tokens_counts_alike(shape: tuple[int, ...]) -> None:
    spliced, clean = pair(*shape)
    assert float(reconstruction_mse(spliced, clean)) == pytest.approx(mean_by_hand(spliced, clean), rel=1e-12)


def test_heads_are_as_if_side_by_side() -> None:
    spliced, clean = pair(7, 4, 3)
    torch.testing.assert_close(
        reconstruction_mse(spliced, clean), reconstruction_mse(spliced.flatten(1), clean.flatten(1)), rtol=1e-14, atol=0
    )


def test_the_gradient_reaches_the_spliced_activation() -> None:
    spliced, clean = pair(5, 3)
    spliced = spliced.requires_grad_()
    reconstruction_mse(spliced, clean).backward()
    torch.testing.assert_close(spliced.grad, 2 * (spliced.detach() - clean) / 15, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_accumulated_in_float32(dtype: torch.dtype) -> None:
    # 20,000 squares of about 1: a bfloat16 sum would stop growing at 256, and float16 overflow at 65,504.
    spliced, clean = pair(400, 50, dtype=dtype)
    spliced = spliced * 3
    found = reconstruction_mse(spliced, clean)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(mean_by_hand(spliced, clean), rel=1e-5)


def test_small_errors_on_large_activations_survive_low_precision() -> None:
    clean = torch.full((4, 8), 256.0, dtype=torch.bfloat16)
    spliced = clean.clone()
    spliced[0, 0] = 258.0  # the next number that bfloat16 has
    assert float(reconstruction_mse(spliced, clean)) == pytest.approx(4 / 32)


def test_mixed_precision_keeps_the_better_one() -> None:
    spliced, clean = pair(5, 3)
    assert reconstruction_mse(spliced.float(), clean.bfloat16()).dtype == torch.float32
    assert reconstruction_mse(spliced.float(), clean).dtype == torch.float64


def test_downstream_is_one_mean_for_each_hook_in_order() -> None:
    hooks = {"blocks.2.hook_resid_pre": (5, 3), "blocks.1.attn.hook_z": (5, 2, 4), "blocks.3.hook_resid_pre": (5, 6)}
    pairs = {hook: pair(*shape, seed=seed) for seed, (hook, shape) in enumerate(hooks.items())}
    found = downstream_mse({h: s for h, (s, _) in pairs.items()}, {h: c for h, (_, c) in pairs.items()})
    assert list(found) == list(hooks)
    for hook, (spliced, clean) in pairs.items():
        assert float(found[hook]) == pytest.approx(mean_by_hand(spliced, clean), rel=1e-12), hook
    assert len({round(float(value), 6) for value in found.values()}) == 3


def test_no_hooks_no_terms() -> None:
    assert downstream_mse({}, {}) == {}
