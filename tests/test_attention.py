"""TransformerLens attention through the fused kernel: the same attention, and only where nobody looks at its scores."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformer_lens.components.abstract_attention import AbstractAttention
from transformers import PreTrainedTokenizerFast

from sae_lens_e2e.splice import Site, SplicedModel, Where, attention
from sae_lens_e2e.splice.attention import fused_attention, is_fusible
from tests.models import any_model, random_model, random_tokens, run_with_hooks

D_VOCAB, N_POS = 61, 12
TOKENS = random_tokens(3, N_POS, D_VOCAB)
LOCAL: dict[str, Any] = {"use_local_attn": True, "window_size": 4, "attn_types": ["global", "local", "local"]}
GROUPED: dict[str, Any] = {"normalization_type": "RMS", "n_key_value_heads": 2}
FUSED: dict[str, dict[str, Any]] = {
    "plain": {},
    "rotary": {"positional_embedding_type": "rotary", "rotary_dim": 2},
    "shortformer": {"positional_embedding_type": "shortformer"},
    "unscaled": {"use_attn_scale": False},
    "result": {"use_attn_result": True},
    "grouped-query": GROUPED,
    "local": LOCAL,
    "grouped-query-local": GROUPED | LOCAL,
}
NOT_FUSED: dict[str, dict[str, Any]] = {
    "score-cap": {"attn_scores_soft_cap": 5.0},
    "alibi": {"positional_embedding_type": "alibi"},
    "bidirectional": {"attention_dir": "bidirectional"},
}


def make_model(**settings: Any) -> HookedTransformer:
    return random_model(**settings, dtype=torch.float64)


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@contextmanager
def counted_kernel() -> Iterator[list[tuple[int, ...]]]:
    """The shape of the queries, each time the fused kernel is called."""
    calls: list[tuple[int, ...]] = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def counted(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(tuple(q.shape))
        return kernel(q, *args, **kwargs)

    torch.nn.functional.scaled_dot_product_attention = counted
    try:
        yield calls
    finally:
        torch.nn.functional.scaled_dot_product_attention = kernel


def methods_in_place(model: HookedTransformer) -> list[str]:
    return [method for block in model.blocks for method in attention._Fused.METHODS if method in vars(block.attn)]


@pytest.mark.parametrize("kind", ["plain", "grouped-query"])
def test_the_seam_is_where_transformer_lens_has_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, TransformerLens computes attention another way: see splice/attention.py before anything else."""
    model = make_model(**FUSED[kind])
    calls: list[str] = []
    layer: Any = model.blocks[1].attn
    assert isinstance(layer, AbstractAttention)
    for method in attention._Fused.METHODS:
        original = getattr(layer, method)

        def counted(*args: Any, method: str = method, original: Callable[..., Any] = original, **kwargs: Any) -> Any:
            calls.append(method)
            return original(*args, **kwargs)

        monkeypatch.setattr(layer, method, counted)
    model(TOKENS)
    assert calls == list(attention._Fused.METHODS)


@pytest.mark.parametrize("kind", FUSED)
def test_fused_attention_is_the_same_attention(kind: str) -> None:
    model = make_model(**FUSED[kind])
    expected, cache = model.run_with_cache(TOKENS)
    with counted_kernel() as calls:
        with fused_attention(model):
            found, z = run_with_hooks(model, TOKENS, {}, [f"blocks.{i}.attn.hook_z" for i in range(3)])
        assert calls == [(3, 4, N_POS, 4)] * 3
        model(TOKENS)
        assert len(calls) == 3  # and no more once it is over
    close(z, {name: cache[name] for name in z})
    close(found, expected)


@pytest.mark.parametrize("kind", NOT_FUSED)
def test_attention_that_is_no_ordinary_causal_softmax_is_left_alone(kind: str) -> None:
    model = make_model(**NOT_FUSED[kind])
    expected = model(TOKENS)
    assert not any(is_fusible(block.attn) for block in model.blocks)
    with counted_kernel() as calls, fused_attention(model):
        assert not methods_in_place(model)
        close(model(TOKENS), expected)
    assert not calls


@pytest.mark.parametrize("n_pos", [1, 3, 4, 5, 12])
@pytest.mark.parametrize("kind", ["local", "grouped-query-local"])
def test_local_attention_looks_back_no_further_than_its_window(kind: str, n_pos: int) -> None:
    model = make_model(**FUSED[kind])
    expected = model(TOKENS[:, :n_pos])
    with fused_attention(model):
        close(model(TOKENS[:, :n_pos]), expected)


def test_gradients_are_those_of_the_attention_written_out() -> None:
    model = make_model(**FUSED["grouped-query-local"])
    gradients = []
    for fused in (False, True):
        x = torch.zeros(3, N_POS, 16, dtype=torch.float64, requires_grad=True)
        hooks: list[Any] = [("blocks.0.hook_resid_pre", lambda tensor, hook, x=x: tensor + x)]  # noqa: ARG005
        if fused:
            with fused_attention(model):
                loss = model.run_with_hooks(TOKENS, fwd_hooks=hooks).square().sum()
        else:
            loss = model.run_with_hooks(TOKENS, fwd_hooks=hooks).square().sum()
        gradients.append(torch.autograd.grad(loss, x)[0])
    close(gradients[1], gradients[0])


# Where it is decided


def test_it_is_put_in_place_once_a_run_and_not_by_each_pass() -> None:
    model = random_model()
    spliced_model, site = SplicedModel(model), Site.of_sae("blocks.1.hook_mlp_out")
    with spliced_model.running():
        assert len(methods_in_place(model)) == 9
        before = [vars(block.attn)[method] for block in model.blocks for method in attention._Fused.METHODS]
        with counted_kernel() as calls:
            clean = spliced_model.clean(TOKENS, [site])
            spliced_model.spliced(clean, Where.everywhere(TOKENS), {site: lambda x: {site.read: x}})
        assert len(calls) == 3 + 2  # block 0 stands in
        after = [vars(block.attn)[method] for block in model.blocks for method in attention._Fused.METHODS]
        assert before == after
    assert not methods_in_place(model)


def test_the_methods_are_put_back_when_nested_and_when_a_pass_fails() -> None:
    model = random_model()
    with fused_attention(model):
        with fused_attention(model):
            assert len(methods_in_place(model)) == 9
        assert len(methods_in_place(model)) == 9  # the outer one is still in force
        with counted_kernel() as calls:
            model(TOKENS)
        assert len(calls) == 3
    assert not methods_in_place(model)
    with pytest.raises(RuntimeError, match="on the way"), fused_attention(model):
        raise RuntimeError("on the way")
    assert not methods_in_place(model)
    failing = model.blocks[1].attn.hook_z.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), fused_attention(model):
        model(TOKENS)
    failing.remove()
    assert not methods_in_place(model)
    # What a failing pass had kept is no part of the next one.
    with fused_attention(model):
        fused = model(TOKENS)
    torch.testing.assert_close(fused, model(TOKENS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("hook", ["hook_pattern", "hook_attn_scores"])
def test_a_layer_whose_scores_are_watched_is_computed_as_written_from_call_to_call(hook: str) -> None:
    model = make_model()
    unwatched = model(TOKENS)

    def sharpen(tensor: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        assert tensor.shape == (3, 4, N_POS, N_POS)
        return tensor.clamp(max=0.3)

    hooks: list[Any] = [(f"blocks.1.attn.{hook}", sharpen)]
    watched = model.run_with_hooks(TOKENS, fwd_hooks=hooks)
    assert not torch.allclose(watched, unwatched)
    with fused_attention(model):
        for fwd_hooks, expected, n_fused in ((hooks, watched, 2), ([], unwatched, 3), (hooks, watched, 2)):
            with counted_kernel() as calls:
                close(model.run_with_hooks(TOKENS, fwd_hooks=fwd_hooks), expected)
            assert len(calls) == n_fused


@pytest.mark.parametrize("hook", ["hook_pattern", "hook_attn_scores"])
def test_scores_as_a_site_or_downstream_are_the_real_ones(hook: str) -> None:
    model = make_model()
    logits, cache = model.run_with_cache(TOKENS)
    site, after = Site.of_sae(f"blocks.1.attn.{hook}"), f"blocks.2.attn.{hook}"
    spliced_model = SplicedModel(model)
    with spliced_model.running():
        clean = spliced_model.clean(TOKENS, [site], [after])
        halved = {site: lambda x: {site.read: 0.5 * x}}
        spliced = spliced_model.spliced(clean, Where.everywhere(TOKENS), halved, [after])
    assert clean.final is not None
    assert spliced.final is not None
    close((clean.at[site.read], clean.at[after]), (cache[site.read], cache[after]))
    close(spliced_model.unembedding.logits(clean.final), logits)
    expected, found = run_with_hooks(model, TOKENS, {site.read: lambda scores: 0.5 * scores}, [after])
    close(spliced.at[after], found[after])
    close(spliced_model.unembedding.logits(spliced.final), expected)


def with_tokenizer(model: HookedTransformer) -> HookedTransformer:
    """One that pads on the left, with the last token of all."""
    words = {f"w{i}": i for i in range(D_VOCAB - 1)} | {"[PAD]": D_VOCAB - 1}
    model.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")),
        pad_token="[PAD]",
        bos_token="w1",
        padding_side="left",
    )
    return model


def test_a_padded_batch_is_computed_as_written() -> None:
    model = with_tokenizer(make_model())
    tokens = TOKENS % (D_VOCAB - 1)
    tokens[0, :5] = D_VOCAB - 1
    expected = model(tokens)
    with fused_attention(model), counted_kernel() as calls:
        close(model(tokens), expected)
    assert not calls


def test_a_key_value_cache_is_computed_as_written() -> None:
    model = with_tokenizer(make_model(**FUSED["grouped-query"]))
    tokens = TOKENS % (D_VOCAB - 1)

    def in_two_parts() -> Tensor:
        cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", len(tokens))
        return torch.cat([model(part, past_kv_cache=cache) for part in tokens.split([5, N_POS - 5], dim=1)], 1)

    expected = in_two_parts()
    close(expected, model(tokens))
    with fused_attention(model):
        close(in_two_parts(), expected)


def test_a_layer_given_a_cache_and_no_mask_is_computed_as_written() -> None:
    model = make_model()
    layer: Any = model.blocks[1].attn
    x = torch.randn(3, N_POS, 16, dtype=torch.float64)

    def in_two_parts() -> Tensor:
        entry = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 3)[1]
        return torch.cat([layer(part, part, part, past_kv_cache_entry=entry) for part in x.split([5, N_POS - 5], 1)], 1)

    expected = in_two_parts()
    with fused_attention(model), counted_kernel() as calls:
        close(in_two_parts(), expected)
    assert calls == [(3, 4, 5, 4)]  # what comes before there is anything in the cache


@pytest.mark.parametrize("kind", ["TransformerBridge", "llama"])
def test_models_with_kernels_of_their_own_are_left_alone(kind: str) -> None:
    model = any_model(kind)
    before = [dict(vars(module)) for module in model.modules()]
    with fused_attention(model):
        assert [vars(module).keys() for module in model.modules()] == [of_module.keys() for of_module in before]
