"""Splicing: the clean and the spliced pass against the model's own forward pass with a hook that replaces."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from sae_lens.load_model import HookedProxyLM
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.components.abstract_attention import AbstractAttention
from transformer_lens.pretrained.weight_conversions.gpt2 import convert_gpt2_weights
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
)

from sae_lens_e2e.splice import CleanPass, Splice, attention, frozen, make_splice
from sae_lens_e2e.splice.attention import fused_attention, is_fusible
from sae_lens_e2e.splice.hooked_transformer import HookedTransformerSplice
from sae_lens_e2e.splice.module import ModuleSplice
from sae_lens_e2e.splice.unembedding import LinearHead, LogitsHead
from tests.models import random_model, random_tokens

D_VOCAB, N_POS = 61, 12
TOKENS = random_tokens(3, N_POS, D_VOCAB)
LOCAL_ATTENTION: dict[str, Any] = {
    "use_local_attn": True,
    "window_size": 4,
    "attn_types": ["global", "local", "local"],
}
GROUPED: dict[str, Any] = {"normalization_type": "RMS", "n_key_value_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "LN": {},
    "RMS": {"normalization_type": "RMS"},
    "LNPre": {"normalization_type": "LNPre"},
    "no-norm": {"normalization_type": None, "initializer_range": 0.2},
    "grouped-query": GROUPED,
    "local-attention": LOCAL_ATTENTION,
    "grouped-query-local": GROUPED | LOCAL_ATTENTION,
    "attn-only": {"attn_only": True},
    "parallel": {"parallel_attn_mlp": True},
    "rotary": {"positional_embedding_type": "rotary", "rotary_dim": 2},
    "alibi": {"positional_embedding_type": "alibi"},
    "shortformer": {"positional_embedding_type": "shortformer"},
    "unscaled-attention": {"use_attn_scale": False},
    "attn-result": {"use_attn_result": True},
    "logit-cap": {"output_logits_soft_cap": 1.5},
    "score-cap": {"attn_scores_soft_cap": 2.0},
}
HOOKS = (
    "blocks.1.hook_resid_pre",
    "blocks.0.hook_resid_mid",
    "blocks.1.hook_resid_post",
    "blocks.1.hook_mlp_out",
    "blocks.1.hook_attn_out",
    "blocks.1.attn.hook_z",
    "blocks.0.attn.hook_v",
    "blocks.1.ln2.hook_normalized",
    "blocks.0.hook_resid_pre",
    "blocks.2.hook_resid_post",
    "ln_final.hook_normalized",
)
DOWNSTREAM = ("blocks.2.hook_resid_pre", "blocks.2.attn.hook_z", "blocks.2.hook_resid_post")


def make_model(kind: str) -> HookedTransformer:
    settings: dict[str, Any] = MODELS[kind] | {"dtype": torch.float64}
    return random_model(**settings)


def downstream_of(hook_name: str) -> tuple[str, ...]:
    at_the_end = hook_name.startswith("ln_final") or hook_name == "blocks.2.hook_resid_post"
    return () if at_the_end else DOWNSTREAM


def head_logits(splice: Splice, final: Tensor) -> Tensor:
    """What a LinearHead means, written out."""
    head = splice.head
    assert isinstance(head, LinearHead)
    logits = final @ head.weight + (0 if head.bias is None else head.bias)
    return logits if head.soft_cap is None else head.soft_cap * torch.tanh(logits / head.soft_cap)


def moved(activation: Tensor) -> Tensor:
    """Another activation of that shape, as an SAE would put it in."""
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(activation.shape, generator=generator, dtype=torch.float64).to(activation.dtype)
    return (activation + 0.5 * noise).detach().requires_grad_()


def functional(logits: Tensor, downstream: dict[str, Tensor]) -> Tensor:
    """A scalar that depends on everything, each entry with a weight of its own."""
    generator = torch.Generator().manual_seed(3)
    tensors = [logits, *(downstream[hook] for hook in sorted(downstream))]
    return torch.stack([(torch.rand(t.shape, generator=generator, dtype=t.dtype) * t).sum() for t in tensors]).sum()


def close(found: Any, expected: Any, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# The HookedTransformer


@pytest.mark.parametrize("kind", MODELS)
def test_the_clean_pass_is_the_models_own(kind: str) -> None:
    model = make_model(kind)
    logits, cache = model.run_with_cache(TOKENS)
    for hook_name in (h for h in HOOKS if h in cache):
        splice = HookedTransformerSplice(model, hook_name, None, downstream_of(hook_name))
        clean = splice.clean(TOKENS)
        close(clean.activation, cache[hook_name])
        close(dict(clean.downstream), {h: cache[h] for h in downstream_of(hook_name)})
        assert clean.final is not None
        close(head_logits(splice, clean.final), logits)
        assert not clean.final.requires_grad


@pytest.mark.parametrize("kind", MODELS)
def test_the_spliced_pass_and_its_gradient_are_those_of_a_replacing_hook(kind: str) -> None:
    model = make_model(kind)
    _, cache = model.run_with_cache(TOKENS)
    tested = [h for h in HOOKS if h in cache]
    assert len(tested) >= 8
    for hook_name in tested:
        splice = HookedTransformerSplice(model, hook_name, None, downstream_of(hook_name))
        clean = splice.clean(TOKENS)
        ours, theirs = moved(clean.activation), moved(clean.activation)
        with frozen(model):
            spliced = splice.spliced(clean, ours)
            functional(head_logits(splice, spliced.final), dict(spliced.downstream)).backward()
            found: dict[str, Tensor] = {}
            logits = model.run_with_hooks(
                TOKENS, fwd_hooks=[replacing(hook_name, theirs), *(keeping(found, h) for h in downstream_of(hook_name))]
            )
            functional(logits, found).backward()
        close(dict(spliced.downstream), found)
        close(head_logits(splice, spliced.final), logits)
        assert not torch.allclose(logits, model(TOKENS)), hook_name  # something was spliced in
        close(ours.grad, theirs.grad)
        assert all(p.grad is None for p in model.parameters())


def replacing(hook_name: str, activation: Tensor) -> tuple[str, Callable[..., Any]]:
    return hook_name, lambda _, hook: activation  # noqa: ARG005


def keeping(store: dict[str, Tensor], hook_name: str) -> tuple[str, Callable[..., Any]]:
    def keep(activation: Tensor, hook: Any) -> None:  # noqa: ARG001
        store[hook_name] = activation

    return hook_name, keep


@pytest.mark.parametrize("head", [None, 2])
def test_one_head_or_all_side_by_side(head: int | None) -> None:
    splice = make_splice(make_model("LN"), "blocks.1.attn.hook_z", head)
    activation = splice.clean(TOKENS).activation
    x = splice.read(activation)
    assert x.shape == (3, N_POS, 16 if head is None else 4)
    close(splice.write(activation, x), activation)
    written = splice.write(activation, (x + 1).float())
    assert written.dtype == activation.dtype
    changed = (written - activation).abs().amax((0, 1, 3)) > 0.5
    assert changed.tolist() == ([True] * 4 if head is None else [False, False, True, False])


@contextmanager
def counted_blocks(model: HookedTransformer) -> Iterator[Counter[int]]:
    calls: Counter[int] = Counter()

    def counter(layer: int) -> Callable[..., None]:
        return lambda *_: calls.update([layer])

    handles = [block.register_forward_hook(counter(layer)) for layer, block in enumerate(model.blocks)]
    handles.append(model.embed.register_forward_hook(counter(-1)))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(
    ("hook_name", "spliced_blocks"),
    [
        ("blocks.0.hook_resid_pre", [0, 1, 2]),
        ("blocks.1.hook_resid_pre", [1, 2]),
        ("blocks.1.attn.hook_z", [1, 2]),
        ("blocks.1.hook_resid_post", [2]),
        ("blocks.2.hook_resid_post", []),
        ("ln_final.hook_normalized", []),
    ],
)
def test_nothing_before_the_hook_runs_twice(hook_name: str, spliced_blocks: list[int]) -> None:
    model = random_model()
    splice = HookedTransformerSplice(model, hook_name)
    with counted_blocks(model) as calls:
        clean = splice.clean(TOKENS)
        assert calls == {-1: 1, 0: 1, 1: 1, 2: 1}
        calls.clear()
        splice.spliced(clean, clean.activation)
        assert sorted(calls.elements()) == spliced_blocks


@pytest.mark.parametrize(
    ("hook_name", "blocks"),
    [("blocks.0.hook_resid_pre", []), ("blocks.1.hook_resid_pre", [0]), ("blocks.1.hook_mlp_out", [0, 1])],
)
def test_stopping_at_the_hook_runs_no_further(hook_name: str, blocks: list[int]) -> None:
    model = random_model()
    splice = HookedTransformerSplice(model, hook_name)
    with counted_blocks(model) as calls:
        stopped = splice.clean(TOKENS, stop_at_hook=True)
        assert sorted(calls.elements()) == [-1, *blocks]
    close(stopped.activation, splice.clean(TOKENS).activation, 0)
    assert stopped.final is None


@pytest.mark.parametrize("hook_name", ["blocks.2.hook_resid_post", "ln_final.hook_normalized"])
def test_stopping_at_the_last_hooks(hook_name: str) -> None:
    splice = HookedTransformerSplice(random_model(), hook_name)
    close(splice.clean(TOKENS, stop_at_hook=True).activation, splice.clean(TOKENS).activation, 0)


@pytest.mark.parametrize(
    ("hook_name", "later"),
    [
        ("blocks.0.hook_resid_pre", ["blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"]),
        ("blocks.0.hook_mlp_out", ["blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"]),
        ("blocks.1.attn.hook_z", ["blocks.2.hook_resid_pre"]),
        ("blocks.2.hook_resid_pre", []),
        ("blocks.2.hook_resid_post", []),
        ("ln_final.hook_normalized", []),
    ],
)
def test_later_blocks(hook_name: str, later: list[str]) -> None:
    assert make_splice(random_model(), hook_name).later_blocks == later


def test_later_blocks_do_not_depend_on_what_the_place_is_called() -> None:
    # The output of block 0 is the input of block 1, which the SAE itself replaces: no reconstruction downstream of it.
    model = random_model()
    end_of_0, start_of_1 = (make_splice(model, f"blocks.{h}") for h in ("0.hook_resid_post", "1.hook_resid_pre"))
    assert end_of_0.later_blocks == start_of_1.later_blocks == ["blocks.2.hook_resid_pre"]


def test_padding_on_the_left_is_masked_as_the_model_does() -> None:
    words = {f"w{i}": i for i in range(D_VOCAB - 1)} | {"[PAD]": D_VOCAB - 1}
    backend = Tokenizer(WordLevel(words, unk_token="w0"))
    model = make_model("LN")
    model.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", bos_token="w1", padding_side="left"
    )
    tokens = TOKENS % (D_VOCAB - 1)
    tokens[0, :5] = D_VOCAB - 1
    logits, cache = model.run_with_cache(tokens)
    splice = HookedTransformerSplice(model, "blocks.1.hook_resid_pre", None, DOWNSTREAM)
    clean = splice.clean(tokens)
    assert clean.final is not None
    close(clean.activation, cache["blocks.1.hook_resid_pre"])
    close(head_logits(splice, clean.final), logits)
    replaced = moved(clean.activation)
    spliced = splice.spliced(clean, replaced)
    expected = model.run_with_hooks(tokens, fwd_hooks=[replacing("blocks.1.hook_resid_pre", replaced)])
    close(head_logits(splice, spliced.final), expected)
    model.tokenizer.padding_side = "right"
    assert not torch.allclose(model(tokens), cast(Tensor, logits))  # padding on the left did matter


def test_hooks_of_the_users_own_stay_and_ours_do_not() -> None:
    model = make_model("LN")
    model.add_hook("blocks.2.hook_mlp_out", lambda tensor, hook: 2 * tensor)  # noqa: ARG005
    expected = model(TOKENS)
    splice = HookedTransformerSplice(model, "blocks.1.hook_mlp_out", None, DOWNSTREAM)
    clean = splice.clean(TOKENS)
    assert clean.final is not None
    close(head_logits(splice, clean.final), expected)
    close(head_logits(splice, splice.spliced(clean, clean.activation).final), expected)
    assert [name for name, hook in model.hook_dict.items() if hook.has_hooks()] == ["blocks.2.hook_mlp_out"]
    close(model(TOKENS), expected, 0)


# Fused attention


def attention_methods_in_place(model: HookedTransformer) -> list[str]:
    return [method for block in model.blocks for method in attention._Fused.METHODS if method in vars(block.attn)]


@pytest.mark.parametrize("kind", ["LN", "grouped-query"])
def test_the_seam_is_where_transformer_lens_has_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, TransformerLens computes attention another way: see splice/attention.py before anything else."""
    model = make_model(kind)
    expected, cache = model.run_with_cache(TOKENS)
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
    monkeypatch.undo()

    kernel = torch.nn.functional.scaled_dot_product_attention
    fused: list[tuple[int, ...]] = []

    def counted_kernel(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        fused.append(tuple(q.shape))
        return kernel(q, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted_kernel)
    z: dict[str, Tensor] = {}
    hooks: list[Any] = [keeping(z, f"blocks.{i}.attn.hook_z") for i in range(3)]
    with fused_attention(model):
        found = model.run_with_hooks(TOKENS, fwd_hooks=hooks)
    assert fused == [(3, 4, N_POS, 4)] * 3
    close(z, {name: cache[name] for name in z})
    close(found, expected)


@pytest.mark.parametrize("n_pos", [1, 3, 4, 5, 12])
@pytest.mark.parametrize("kind", ["local-attention", "grouped-query-local"])
def test_local_attention_looks_back_no_further_than_its_window(kind: str, n_pos: int) -> None:
    model = make_model(kind)
    expected = model(TOKENS[:, :n_pos])
    assert all(is_fusible(block.attn) for block in model.blocks)
    with fused_attention(model):
        close(model(TOKENS[:, :n_pos]), expected)


def test_the_methods_are_put_back() -> None:
    model = random_model()
    with fused_attention(model):
        assert len(attention_methods_in_place(model)) == 9
    assert not attention_methods_in_place(model)
    with pytest.raises(RuntimeError, match="on the way"), fused_attention(model):
        raise RuntimeError("on the way")
    assert not attention_methods_in_place(model)


def test_the_methods_and_hooks_are_put_back_when_a_pass_fails() -> None:
    model = random_model()
    splice = HookedTransformerSplice(model, "blocks.1.hook_mlp_out", None, DOWNSTREAM)
    clean = splice.clean(TOKENS)
    with pytest.raises(RuntimeError, match="size of tensor"):
        splice.spliced(clean, clean.activation[..., :-1])
    failing = model.blocks[2].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        splice.clean(TOKENS)
    failing.remove()
    assert not attention_methods_in_place(model)
    assert not any(hook.has_hooks() for hook in model.hook_dict.values())


@pytest.mark.parametrize("hook", ["hook_pattern", "hook_attn_scores"])
def test_a_layer_whose_scores_are_watched_is_left_alone(hook: str) -> None:
    model = make_model("LN")

    def sharpen(tensor: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        assert tensor.shape == (3, 4, N_POS, N_POS)
        return tensor.clamp(max=0.3)

    model.add_hook(f"blocks.1.attn.{hook}", sharpen)
    assert [is_fusible(block.attn) for block in model.blocks] == [True, False, True]
    expected = model(TOKENS)
    splice = HookedTransformerSplice(model, "blocks.0.hook_resid_post")
    clean = splice.clean(TOKENS)
    assert clean.final is not None
    close(head_logits(splice, clean.final), expected)
    close(head_logits(splice, splice.spliced(clean, clean.activation).final), expected)
    model.reset_hooks()
    assert all(is_fusible(block.attn) for block in model.blocks)


@pytest.mark.parametrize("hook", ["hook_pattern", "hook_attn_scores"])
def test_scores_as_the_saes_hook_or_downstream_are_the_real_ones(hook: str) -> None:
    model = make_model("LN")
    logits, cache = model.run_with_cache(TOKENS)
    at, after = f"blocks.1.attn.{hook}", f"blocks.2.attn.{hook}"
    splice = HookedTransformerSplice(model, at, None, (after,))
    clean = splice.clean(TOKENS)
    assert clean.final is not None
    close((clean.activation, clean.downstream[after]), (cache[at], cache[after]))
    close(head_logits(splice, clean.final), logits)
    replaced = (clean.activation * 0.5).detach()
    spliced = splice.spliced(clean, replaced)
    found: dict[str, Tensor] = {}
    expected = model.run_with_hooks(TOKENS, fwd_hooks=[replacing(at, replaced), keeping(found, after)])
    close(spliced.downstream[after], found[after])
    close(head_logits(splice, spliced.final), expected)


@pytest.mark.parametrize(
    ("overrides", "fusible"),
    [
        ({}, True),
        (GROUPED, True),
        ({"positional_embedding_type": "shortformer"}, True),
        ({"attn_scores_soft_cap": 5.0}, False),
        ({"positional_embedding_type": "alibi"}, False),
        ({"attention_dir": "bidirectional"}, False),
    ],
    ids=str,
)
def test_only_ordinary_attention_is_fused(overrides: dict[str, Any], fusible: bool) -> None:
    model = random_model(**overrides)
    assert [is_fusible(block.attn) for block in model.blocks] == [fusible] * 3
    with fused_attention(model):
        assert bool(attention_methods_in_place(model)) == fusible


# What is refused


@pytest.mark.parametrize(
    ("field", "hook_name", "downstream", "says"),
    [
        ("hook_name", "blocks.1.hook_resid_prr", (), "did you mean blocks.1.hook_resid_pre"),
        ("hook_name", "blocks.9.hook_resid_pre", (), "did you mean blocks."),
        ("downstream_hooks", "blocks.1.hook_resid_pre", ("blocks.2.hook_resid",), "did you mean blocks.2.hook_resid_"),
        ("hook_name", "????", (), "it has for instance hook_embed"),
        ("hook_name", "hook_embed", (), "blocks.1.hook_resid_pre"),
        ("hook_name", "unembed.hook_in", (), "is not in a block"),
    ],
)
def test_hooks_that_there_are_not(field: str, hook_name: str, downstream: tuple[str, ...], says: str) -> None:
    with pytest.raises(ValueError, match=field) as error:
        make_splice(random_model(), hook_name, None, downstream)
    assert says in str(error.value)
    assert repr(downstream[0] if downstream else hook_name) in str(error.value)


@pytest.mark.parametrize(
    ("hook_name", "head", "d_in", "says"),
    [
        ("blocks.1.hook_resid_pre", None, 12, "sae.d_in=12 does not fit blocks.1.hook_resid_pre, .*set d_in=16"),
        ("blocks.1.attn.hook_z", None, 4, "set d_in=16"),
        ("blocks.1.attn.hook_z", 1, 16, "set d_in=4"),
        ("blocks.1.hook_mlp_out", 0, 16, "hook_head_index=0: blocks.1.hook_mlp_out has no heads.*None"),
        ("blocks.1.attn.hook_z", 4, 4, "hook_head_index=4: blocks.1.attn.hook_z has 4 heads"),
        ("blocks.1.attn.hook_z", -9, 4, "hook_head_index=-9"),
    ],
)
def test_probing_finds_an_sae_that_does_not_fit(hook_name: str, head: int | None, d_in: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make_splice(random_model(), hook_name, head).probe(TOKENS[:1, :4], d_in)


@pytest.mark.parametrize(
    ("hook_name", "downstream"),
    [
        ("blocks.1.hook_resid_pre", "blocks.1.hook_resid_pre"),
        ("blocks.1.hook_mlp_out", "blocks.1.attn.hook_z"),
        ("blocks.1.hook_mlp_out", "blocks.1.hook_resid_mid"),
        ("blocks.1.hook_resid_pre", "blocks.0.hook_mlp_out"),
        ("blocks.1.hook_resid_pre", "hook_embed"),
        ("blocks.1.hook_resid_post", "blocks.1.hook_mlp_out"),
        ("ln_final.hook_normalized", "blocks.2.hook_resid_post"),
    ],
)
def test_probing_finds_hooks_that_are_not_downstream(hook_name: str, downstream: str) -> None:
    splice = make_splice(random_model(), hook_name, None, (downstream,))
    with pytest.raises(ValueError, match=f"{downstream} is not downstream of hook_name='{hook_name}'"):
        splice.probe(TOKENS[:1, :4], 16)


@pytest.mark.parametrize(
    ("field", "hook_name", "downstream"),
    [
        ("hook_name", "blocks.1.hook_mlp_in", ()),
        ("hook_name", "blocks.1.attn.hook_result", ()),
        ("downstream_hooks", "blocks.1.hook_resid_pre", ("blocks.2.hook_mlp_in",)),
    ],
)
def test_probing_finds_hooks_that_the_models_settings_leave_out(
    field: str, hook_name: str, downstream: tuple[str, ...]
) -> None:
    # TransformerLens has these hook points in every model, and calls them with use_hook_mlp_in or use_attn_result only.
    splice = make_splice(random_model(), hook_name, None, downstream)
    with pytest.raises(ValueError, match=f"{field}.*{downstream[0] if downstream else hook_name}"):
        splice.probe(TOKENS[:1, :4], 16)


def test_probing_a_fitting_sae_changes_nothing() -> None:
    model = random_model().train()
    make_splice(model, "blocks.1.attn.hook_z", 3, DOWNSTREAM).probe(TOKENS[:1, :4], 4)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(hook.has_hooks() for hook in model.hook_dict.values())


@pytest.mark.parametrize("fails", [False, True])
def test_frozen_puts_everything_back(fails: bool) -> None:
    model = random_model().train()
    model.blocks[1].eval()
    for parameter in model.blocks[2].parameters():
        parameter.requires_grad_(False)

    def state() -> tuple[list[bool], list[bool]]:
        return [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]

    before = state()
    assert {True, False} == set(before[0]) == set(before[1])
    try:
        with frozen(model):
            assert not any(state()[0])
            assert not any(state()[1])
            assert 1 / (not fails)
    except ZeroDivisionError:
        assert fails
    assert state() == before


# Hugging Face models


class MLPHeadForCausalLM(LlamaForCausalLM):
    """A model whose logits are no linear function of its last hidden state."""

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.lm_head: Any = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, D_VOCAB))


SIZES: dict[str, Any] = {
    "vocab_size": D_VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "initializer_range": 0.4,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED_SIZES: dict[str, Any] = SIZES | {"num_key_value_heads": 2}
GPT2_SIZES: dict[str, Any] = {
    "vocab_size": D_VOCAB,
    "n_embd": 16,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 32,
    "initializer_range": 0.4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
}
CAP = 1.5
HF_MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2_SIZES)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED_SIZES)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**SIZES)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **GROUPED_SIZES,
            head_dim=4,
            final_logit_softcapping=CAP,
            attn_logit_softcapping=5.0,
            query_pre_attn_scalar=4,
            sliding_window=4,
        )
    ),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**GROUPED_SIZES, logit_scale=0.25)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**GROUPED_SIZES, logits_scaling=3.0)),
    "mlp-head": lambda: MLPHeadForCausalLM(LlamaConfig(**GROUPED_SIZES)),
}


def hf_model(kind: str) -> HookedProxyLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = HF_MODELS[kind]().double().eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.3)
    return HookedProxyLM(model, tokenizer=None)  # pyright: ignore[reportArgumentType]


def hf_hooks(kind: str) -> dict[str, tuple[str, ...]]:
    """Hooks of each sort, with others downstream of them."""
    if kind == "gpt2":
        return {"transformer.h.0": ("transformer.h.1",), "transformer.h.1.mlp": ("transformer.h.1", "transformer.h.2")}
    inside = "model.layers.1.self_attn.dense" if kind == "phi" else "model.layers.1.self_attn.o_proj"
    return {
        "model.layers.0": ("model.layers.1",),
        "model.layers.1.mlp": ("model.layers.1", "model.layers.2.mlp"),
        "model.layers.1.self_attn": (),
        inside: ("model.layers.2",),
        "model.layers.2": (),
    }


def hf_naive(
    model: HookedProxyLM, hook_name: str | None, activation: Tensor | None, downstream: tuple[str, ...]
) -> tuple[Tensor, dict[str, Tensor]]:
    """All logits and the downstream activations, with a module's first output replaced."""
    modules, found, handles = dict(model.model.named_modules()), {}, []

    def first(output: Any) -> Tensor:
        return output[0] if isinstance(output, tuple) else output

    def replace(_module: Any, _args: Any, output: Any) -> Any:
        return (activation, *output[1:]) if isinstance(output, tuple) else activation

    if hook_name is not None:
        handles.append(modules[hook_name].register_forward_hook(replace))
    handles += [
        modules[name].register_forward_hook(lambda _m, _a, out, name=name: found.update({name: first(out)}))
        for name in downstream
    ]
    try:
        return model.model(TOKENS, use_cache=False).logits, found
    finally:
        for handle in handles:
            handle.remove()


def naive_kl(clean_logits: Tensor, spliced_logits: Tensor) -> Tensor:
    p, q = clean_logits.softmax(-1), spliced_logits.softmax(-1)
    return (p * (p / q).log()).sum(-1).mean()


def head_kl(splice: Splice, spliced_final: Tensor, clean: CleanPass) -> Tensor:
    assert clean.final is not None
    n = TOKENS.numel()
    weights = torch.full((n,), 1 / n, dtype=torch.float64)
    return splice.head.kl(spliced_final.flatten(0, 1), clean.final.flatten(0, 1), weights)


@pytest.mark.parametrize("kind", HF_MODELS)
def test_hugging_face_kl_activations_and_gradient_are_those_of_all_the_logits(kind: str) -> None:
    model = hf_model(kind)
    for hook_name, downstream in hf_hooks(kind).items():
        splice = make_splice(model, hook_name, None, downstream)
        assert isinstance(splice, ModuleSplice)
        with torch.no_grad():
            clean_logits, clean_found = hf_naive(model, None, None, (hook_name, *downstream))
        clean = splice.clean(TOKENS)
        close(clean.activation, clean_found.pop(hook_name))
        close(dict(clean.downstream), clean_found)

        ours, theirs = moved(clean.activation), moved(clean.activation)
        with frozen(model):
            spliced = splice.spliced(clean, ours)
            kl = head_kl(splice, spliced.final, clean)
            (kl + functional(kl, dict(spliced.downstream))).backward()
            logits, found = hf_naive(model, hook_name, theirs, downstream)
            expected = naive_kl(clean_logits, logits)
            (expected + functional(expected, found)).backward()
        assert float(expected.detach()) > 1e-4
        close(kl, expected)
        close(dict(spliced.downstream), found)
        close(ours.grad, theirs.grad)
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", ["gpt2", "llama", "phi", "gemma2"])
def test_a_linear_head_is_recognised_and_the_logits_left_out(kind: str) -> None:
    model = hf_model(kind)
    lm_head: Any = model.model.lm_head
    splice = ModuleSplice(model, next(iter(hf_hooks(kind))))
    assert isinstance(splice.head, LinearHead)
    assert splice.head.soft_cap == (CAP if kind == "gemma2" else None)
    assert (splice.head.bias is not None) == (kind == "phi")
    assert splice.head.weight.data_ptr() == lm_head.weight.data_ptr()
    calls: list[None] = []
    handle = lm_head.register_forward_hook(lambda *_: calls.append(None))
    clean = splice.clean(TOKENS)
    spliced = splice.spliced(clean, clean.activation)
    handle.remove()
    assert not calls
    assert spliced.final.shape == (3, N_POS, 16)
    close(spliced.final, clean.final)


@pytest.mark.parametrize("kind", ["cohere", "granite"])
def test_logits_that_are_scaled_after_the_head_are_taken_as_they_come(kind: str) -> None:
    model = hf_model(kind)
    splice = ModuleSplice(model, "model.layers.0")
    assert isinstance(splice.head, LogitsHead)
    close(splice.clean(TOKENS).final, model.model(TOKENS).logits)


def test_any_other_head_module_is_applied_in_chunks() -> None:
    model = hf_model("mlp-head")
    splice = ModuleSplice(model, "model.layers.0")
    assert isinstance(splice.head, LogitsHead)
    final = splice.clean(TOKENS).final
    assert final is not None
    assert final.shape == (3, N_POS, 16)
    close(splice.head.logits(final), model.model(TOKENS).logits)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "cohere"])
def test_no_key_value_cache_is_kept(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = hf_model(kind)
    updates: list[None] = []
    original = DynamicCache.update

    def update(*args: Any, **kwargs: Any) -> Any:
        updates.append(None)
        return original(*args, **kwargs)

    monkeypatch.setattr(DynamicCache, "update", update)
    splice = ModuleSplice(model, next(iter(hf_hooks(kind))))
    clean = splice.clean(TOKENS)
    splice.spliced(clean, clean.activation)
    assert not updates
    model.model(TOKENS)
    assert updates  # what is counted is what fills a cache


@pytest.mark.parametrize(
    ("hook_name", "later"),
    [
        ("model.layers.0", ["model.layers.1"]),
        ("model.layers.0.mlp", ["model.layers.0", "model.layers.1"]),
        ("model.layers.1", []),
        ("model.layers.1.self_attn.o_proj", ["model.layers.1"]),
        ("model.layers.2", []),
        ("model.layers.2.mlp", []),
    ],
)
def test_later_blocks_of_a_hugging_face_model(hook_name: str, later: list[str]) -> None:
    assert make_splice(hf_model("llama"), hook_name).later_blocks == later


def test_stopping_at_a_module_runs_no_further() -> None:
    model = hf_model("llama")
    splice = ModuleSplice(model, "model.layers.1.mlp")
    modules, ran = dict(model.model.named_modules()), []
    handles = [
        modules[name].register_forward_hook(lambda *_, name=name: ran.append(name))
        for name in ("model.layers.0", "model.layers.1.mlp", "model.layers.1", "model.layers.2", "lm_head")
    ]
    stopped = splice.clean(TOKENS, stop_at_hook=True)
    for handle in handles:
        handle.remove()
    assert "model.layers.0" in ran
    assert {"model.layers.1", "model.layers.2", "lm_head"}.isdisjoint(ran)
    assert stopped.final is None
    close(stopped.activation, splice.clean(TOKENS).activation, 0)


def test_hugging_face_limits_and_refusals() -> None:
    model = hf_model("llama")
    assert make_splice(model, "model.layers.1").n_ctx == 32
    assert make_splice(hf_model("gpt2"), "transformer.h.1").n_ctx == 32
    with pytest.raises(ValueError, match=r"hook_name: the model has no hook 'model\.layer\.1'; did you mean model\."):
        make_splice(model, "model.layer.1")
    with pytest.raises(ValueError, match=r"sae\.d_in=8 does not fit model\.layers\.1, .*set d_in=16"):
        make_splice(model, "model.layers.1").probe(TOKENS[:1, :4], 8)
    with pytest.raises(ValueError, match=r"downstream_hooks: model\.layers\.0 is not downstream of"):
        make_splice(model, "model.layers.1", None, ("model.layers.0",)).probe(TOKENS[:1, :4], 16)
    with pytest.raises(ValueError, match=r"downstream_hooks: the model has no hook 'blocks\.2'"):
        make_splice(model, "model.layers.1", None, ("blocks.2",))


def test_an_embedding_can_be_spliced_into() -> None:
    model = hf_model("llama")
    splice = make_splice(model, "model.embed_tokens", None, ("model.layers.0",))
    splice.probe(TOKENS[:1, :4], 16)
    clean = splice.clean(TOKENS)
    activation = moved(clean.activation)
    logits, _ = hf_naive(model, "model.embed_tokens", activation, ())
    close(head_logits(splice, splice.spliced(clean, activation).final), logits)
    assert isinstance(splice.later_blocks, list)  # an objective that names no layers of its own needs none


def test_no_forward_hook_is_left_behind() -> None:
    model = hf_model("llama")

    def n_hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.modules())

    before = n_hooks()
    splice = ModuleSplice(model, "model.layers.1", None, ("model.layers.2",))
    clean = splice.clean(TOKENS)
    splice.spliced(clean, clean.activation)
    with pytest.raises(RuntimeError):
        splice.spliced(clean, clean.activation[..., :-1])
    assert n_hooks() == before


def test_both_ways_of_running_gpt2_agree() -> None:
    proxy = hf_model("gpt2")
    cfg = HookedTransformerConfig(
        n_layers=3,
        d_model=16,
        n_heads=4,
        d_head=4,
        d_mlp=64,
        n_ctx=32,
        d_vocab=D_VOCAB,
        act_fn="gelu_new",
        normalization_type="LN",
        eps=1e-5,
        dtype=torch.float64,
        device="cpu",
    )
    hooked = HookedTransformer(cfg)
    hooked.load_state_dict(convert_gpt2_weights(proxy.model, cfg), strict=False)
    ours = make_splice(hooked, "blocks.0.hook_resid_post", None, ("blocks.2.hook_resid_pre",))
    theirs = make_splice(proxy, "transformer.h.0", None, ("transformer.h.1",))
    results = []
    for splice, model in ((ours, hooked), (theirs, proxy)):
        clean = splice.clean(TOKENS)
        activation = moved(clean.activation)
        with frozen(model):
            spliced = splice.spliced(clean, activation)
            kl = head_kl(splice, spliced.final, clean)
            (downstream,) = spliced.downstream.values()
            (kl + functional(kl, {"later": downstream})).backward()
        results.append((clean.activation, clean.final, downstream.detach(), kl.detach(), activation.grad))
    assert float(results[0][3]) > 1e-2
    close(results[0], results[1], 1e-8)


@pytest.mark.parametrize("hook", ["ln_final.hook_normalized", "ln_final.hook_scale", "blocks.2.hook_resid_post"])
def test_no_layer_is_later_than_the_end(hook: str) -> None:
    assert make_splice(random_model(), hook).later_layers == []
