"""GELU in one kernel: the same numbers, and TransformerLens' own again afterwards."""

from typing import Any

import pytest
import torch
from transformer_lens.utilities.activation_functions import gelu_new

from sae_lens_e2e.splice import SplicedModel
from sae_lens_e2e.splice.activation import TANH_GELU, fused_gelu
from tests.models import any_model, random_model, random_tokens


@pytest.mark.parametrize("plain", TANH_GELU)
def test_it_is_the_same_function_with_the_same_gradient(plain: Any) -> None:
    model = random_model()
    for block in model.blocks:
        block.mlp.act_fn = plain
    x = torch.linspace(-6, 6, 4001, dtype=torch.float64).requires_grad_()
    expected = plain(x)
    with fused_gelu(model):
        found = model.blocks[0].mlp.act_fn(x)
        assert model.blocks[0].mlp.act_fn is not plain
    assert model.blocks[0].mlp.act_fn is plain
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    grads = [torch.autograd.grad(y.sum(), x)[0] for y in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-8)


def test_a_model_computes_the_same_while_it_runs() -> None:
    model, tokens = random_model(), random_tokens(2, 12, 61)
    for block in model.blocks:
        block.mlp.act_fn = gelu_new
    expected = model(tokens)
    with SplicedModel(model).running():
        torch.testing.assert_close(model(tokens), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(tokens), expected)


def test_another_activation_and_another_model_are_left_alone() -> None:
    model = random_model()
    for block in model.blocks:
        block.mlp.act_fn = torch.relu
    with fused_gelu(model):
        assert model.blocks[0].mlp.act_fn is torch.relu
    with fused_gelu(any_model("llama")):
        pass


def test_it_is_put_back_after_an_error() -> None:
    model = random_model()
    model.blocks[0].mlp.act_fn = gelu_new
    with pytest.raises(ZeroDivisionError), fused_gelu(model):
        _ = 1 / 0
    assert model.blocks[0].mlp.act_fn is gelu_new
