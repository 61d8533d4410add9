"""LayerNorm in one kernel: the same numbers, TransformerLens' own where somebody looks in between, and its own again afterwards."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.components.layer_norm import LayerNorm
from transformer_lens.components.layer_norm_pre import LayerNormPre

from sae_lens_e2e.splice import SplicedModel
from sae_lens_e2e.splice.normalization import fused_layer_norm, is_in
from tests.models import any_model, random_model, random_tokens, run_with_hooks

TOKENS = random_tokens(2, 12, 61)
PASSES = 3 * (3 + 1) + 1
"""In three blocks, before attention for its queries, keys and values each, and before the MLP; and at the end."""
KINDS = {"LN": LayerNorm, "LNPre": LayerNormPre}


def norms_of(model: HookedTransformer) -> list[Any]:
    return [module for module in model.modules() if type(module) in KINDS.values()]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of what is normalised, each time PyTorch's kernel is called."""
    calls: list[tuple[int, ...]] = []
    kernel = torch.nn.functional.layer_norm

    def counted(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(tuple(x.shape))
        return kernel(x, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "layer_norm", counted)
    return calls


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_same_function_with_the_same_gradient(kind: str) -> None:
    model = random_model(normalization_type=kind, dtype=torch.float64)
    norm = norms_of(model)[0]
    assert type(norm) is KINDS[kind]
    for weight in norm.parameters():
        torch.nn.init.normal_(weight)
    x = (torch.randn(2, 5, 16, dtype=torch.float64) * 3 + 1).requires_grad_()
    expected = norm(x)
    with fused_layer_norm(model):
        found = norm(x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    towards = torch.randn_like(expected)
    grads = [torch.autograd.grad((y * towards).sum(), x)[0] for y in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_computes_the_same_while_it_runs(kind: str, kernels: list[tuple[int, ...]]) -> None:
    model = random_model(normalization_type=kind)
    expected = model(TOKENS)
    assert not kernels
    with SplicedModel(model).running():
        torch.testing.assert_close(model(TOKENS), expected, rtol=1e-5, atol=1e-5)
        assert kernels == [(2, 12, 16)] * PASSES
    assert torch.equal(model(TOKENS), expected)
    assert len(kernels) == PASSES
    assert not any(map(is_in, norms_of(model)))


@pytest.mark.parametrize("hook", ["hook_scale", "hook_normalized"])
def test_where_somebody_looks_it_is_written_out(hook: str, kernels: list[tuple[int, ...]]) -> None:
    model = random_model(normalization_type="LN")
    name = f"blocks.1.ln1.{hook}"
    _, expected = model.run_with_cache(TOKENS, names_filter=name)
    with fused_layer_norm(model):
        _, seen = run_with_hooks(model, TOKENS, {}, [name])
        assert len(kernels) == PASSES - 3
        # What is put there counts as well.
        changed, _ = run_with_hooks(model, TOKENS, {name: lambda x: x * 2}, [])
    torch.testing.assert_close(seen[name], expected[name], rtol=1e-5, atol=1e-5)
    plain, _ = run_with_hooks(model, TOKENS, {name: lambda x: x * 2}, [])
    torch.testing.assert_close(changed, plain, rtol=1e-5, atol=1e-5)


def test_half_precision_and_other_models_are_left_alone(kernels: list[tuple[int, ...]]) -> None:
    model = random_model(normalization_type="LN", dtype=torch.bfloat16)
    expected = model(TOKENS)
    with fused_layer_norm(model):
        assert torch.equal(model(TOKENS), expected)
    with fused_layer_norm(any_model("llama")):
        pass
    root_mean_square = random_model(normalization_type="RMS")
    with fused_layer_norm(root_mean_square):
        root_mean_square(TOKENS)
    assert not kernels


def test_it_is_put_back_after_an_error() -> None:
    model = random_model(normalization_type="LN")
    with pytest.raises(ZeroDivisionError), fused_layer_norm(model):
        _ = 1 / 0
    assert not any(map(is_in, norms_of(model)))


def test_within_itself_it_does_nothing() -> None:
    model = random_model(normalization_type="LN")
    with fused_layer_norm(model):
        with fused_layer_norm(model):
            pass
        assert all(map(is_in, norms_of(model)))
    assert not any(map(is_in, norms_of(model)))
