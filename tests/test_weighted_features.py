"""A penalty over active features against the dense one, and what else is asked of the weighted features."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sae_lens_e2e.architectures.active_features import ActiveFeatures
from sae_lens_e2e.architectures.weighted_features import WeightedFeatures

N_TOKENS, D_SAE = 6, 40


def leaves() -> tuple[Tensor, Tensor, Tensor]:
    """Features of which few fire, a weight each (one is 0, one negative), and a gradient for each token."""
    random = torch.Generator().manual_seed(0)
    features = torch.randn(N_TOKENS, D_SAE, dtype=torch.float64, generator=random)
    features[torch.rand(N_TOKENS, D_SAE, generator=random) < 0.9] = 0
    features[2] = 0
    weights = torch.randn(D_SAE, dtype=torch.float64, generator=random)
    weights[features[0].nonzero()[0]] = 0
    return features.requires_grad_(), weights.requires_grad_(), torch.randn(N_TOKENS, dtype=torch.float64)


def weighted(features: Tensor, weights: Tensor) -> WeightedFeatures:
    return WeightedFeatures(features, weights, ActiveFeatures.of(features, features.detach().to_sparse_csr()))


def test_the_l1_norm_and_its_gradients_are_the_dense_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    features, weights, grad = leaves()
    expected = (features * weights).norm(p=1, dim=-1)
    gradients = torch.autograd.grad(expected, (features, weights), grad)
    # Nothing dense is multiplied for it.
    monkeypatch.setattr(pytree, "tree_map_only", None)
    found = weighted(features, weights).norm(p=1.0, dim=-1)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
    for mine, theirs in zip(torch.autograd.grad(found, (features, weights), grad), gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    "asked",
    [
        lambda x: x.norm(p=2, dim=-1),
        lambda x: x.norm(p=1, dim=0),
        lambda x: x.norm(p=1, dim=-1, keepdim=True),
        lambda x: x.sum(-1),
        lambda x: torch.exp(x),
        lambda x: 2 * x + x,
        lambda x: torch.cat([x, x]),
        lambda x: x[1, 3:],
    ],
)
def test_anything_else_is_asked_of_the_product(asked: Callable[[Tensor], Tensor]) -> None:
    features, weights, _ = leaves()
    found, expected = asked(weighted(features, weights)), asked(features * weights)
    assert type(found) is Tensor
    assert torch.equal(found, expected)
    for mine, theirs in zip(
        torch.autograd.grad(found.sum(), (features, weights)),
        torch.autograd.grad(expected.sum(), (features, weights)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-14, atol=1e-14)
