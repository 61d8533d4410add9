"""Splicing: the clean and the spliced pass of every kind of model against its own forward pass with hooks that replace."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from sae_lens.load_model import HookedProxyLM
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions.gpt2 import convert_gpt2_weights
from transformers import DynamicCache, PreTrainedTokenizerFast

from sae_lens_e2e.splice import Positions, Replace, Site, SplicedModel, Where, frozen
from tests.models import (
    ANY,
    any_model,
    block_output,
    blocks_of,
    hugging_face_model,
    inside_block,
    logits_of,
    random_model,
    random_tokens,
    run_with_hooks,
)
from tests.pairwise import pairwise

D_VOCAB, N_POS = 61, 12
TOKENS = random_tokens(3, N_POS, D_VOCAB)
EVERYWHERE = Where.everywhere(TOKENS)
SOME = Positions((1, -2), (0, 1, 2, 3, 4, 5, 6, 7)).of(TOKENS)
WHERES = {"all": EVERYWHERE, "some": SOME}
LOCAL_ATTENTION: dict[str, Any] = {
    "use_local_attn": True,
    "window_size": 4,
    "attn_types": ["global", "local", "local"],
}
GROUPED: dict[str, Any] = {"normalization_type": "RMS", "n_key_value_heads": 2}
HOOKED: dict[str, dict[str, Any]] = {
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


class Change(nn.Module):
    """What a sparse module might make of an activation, differentiable in a weight of its own."""

    def __init__(self, width: int, seed: int = 0, out: int | None = None, dtype: torch.dtype = torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(width, out or width, generator=generator, dtype=torch.float64) / width**0.5
        own = torch.eye(width, out or width, dtype=torch.float64)
        self.weight = nn.Parameter((0.7 * own + 0.5 * drawn).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x.to(self.weight.dtype) @ self.weight) + 0.1

    def at(self, *writes: str) -> Replace:
        """The same as what `SplicedModel.spliced` takes."""
        return lambda x: {hook: self(x) / (i + 1) for i, hook in enumerate(writes)}

    def hook(self, site: Site, where: Where = EVERYWHERE) -> Callable[[Tensor], Tensor]:
        """The same as a plain hook that replaces an activation, or one head of it, at the positions that count."""

        def replace(activation: Tensor) -> Tensor:
            head = site.head_index
            x = activation.flatten(2) if head is None else activation[:, :, head]
            mixed = torch.where(where.mask[..., None], self(x).to(x.dtype), x)
            if head is None:
                return mixed.reshape(activation.shape)
            heads = [mixed if h == head else activation[:, :, h] for h in range(activation.shape[2])]
            return torch.stack(heads, 2)

        return replace


def functional(logits: Tensor, downstream: Mapping[str, Tensor]) -> Tensor:
    """A scalar that depends on everything, each entry with a weight of its own."""
    generator = torch.Generator().manual_seed(3)
    tensors = [logits, *(downstream[hook] for hook in sorted(downstream))]
    return torch.stack([(torch.rand(t.shape, generator=generator, dtype=t.dtype) * t).sum() for t in tensors]).sum()


def gradients_of(loss: Tensor, changes: Sequence[Change]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, [change.weight for change in changes])


def close(found: Any, expected: Any, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def check_spliced(
    model: Any,
    spliced_model: SplicedModel,
    changes: Mapping[Site, Change],
    where: Where = EVERYWHERE,
    downstream: Sequence[str] = (),
    tolerance: float = 1e-9,
) -> None:
    """Clean and spliced logits, downstream activations and gradients are those of plain hooks."""
    with spliced_model.running():
        clean = spliced_model.clean(TOKENS, changes, downstream)
        replace = {site: change.at(*site.writes) for site, change in changes.items()}
        spliced = spliced_model.spliced(clean, where, replace, downstream)
    assert clean.final is not None
    assert spliced.final is not None
    with frozen(model):
        clean_logits, clean_found = run_with_hooks(model, TOKENS, {}, [*{s.read for s in changes}, *downstream])
        by_hook = {site.read: [] for site in changes}
        for site, change in changes.items():
            by_hook[site.read].append(change.hook(site, where))
        logits, found = run_with_hooks(model, TOKENS, {h: in_turn(hooks) for h, hooks in by_hook.items()}, downstream)

    to = logits.dtype  # Mamba's logits come in float32, whatever its weights are
    close(dict(clean.at), clean_found, tolerance)
    ours = spliced_model.unembedding.logits(spliced.final)
    close(spliced_model.unembedding.logits(clean.final).to(to), clean_logits, tolerance)
    close(ours.to(to), logits, tolerance)
    close(dict(spliced.at), found, tolerance)
    assert not torch.allclose(logits, clean_logits), changes  # something was spliced in
    assert not clean.final.requires_grad
    found_gradients = gradients_of(functional(ours.to(to), spliced.at), list(changes.values()))
    expected_gradients = gradients_of(functional(logits, found), list(changes.values()))
    # Relative to the largest entry: sums over many terms come in another order.
    for ours_, theirs in zip(found_gradients, expected_gradients, strict=True):
        close(ours_ / theirs.abs().max(), theirs / theirs.abs().max(), tolerance)
    assert all(p.grad is None for p in model.parameters())


def in_turn(functions: Sequence[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
    def all_of_them(activation: Tensor) -> Tensor:
        for function in functions:
            activation = function(activation)
        return activation

    return all_of_them


# A HookedTransformer of every sort, at every sort of hook


@pytest.mark.parametrize("kind", HOOKED)
def test_passes_and_gradient_are_those_of_a_replacing_hook(kind: str) -> None:
    settings: dict[str, Any] = HOOKED[kind] | {"dtype": torch.float64}
    model = random_model(**settings)
    spliced_model = SplicedModel(model)
    _, cache = model.run_with_cache(TOKENS[:1])
    tested = [hook for hook in HOOKS if hook in cache]
    assert len(tested) >= 8
    for i, hook in enumerate(tested):
        at_the_end = hook in ("ln_final.hook_normalized", "blocks.2.hook_resid_post")
        change = Change(cache[hook].flatten(2).shape[-1])
        where = (EVERYWHERE, SOME)[i % 2]
        check_spliced(model, spliced_model, {Site.of_sae(hook): change}, where, () if at_the_end else DOWNSTREAM)


def test_one_head_or_several_of_one_hook() -> None:
    model = random_model(dtype=torch.float64)
    spliced_model = SplicedModel(model)
    one, other = (Site.of_sae("blocks.1.attn.hook_z", head) for head in (2, 0))
    check_spliced(model, spliced_model, {one: Change(4)}, SOME, DOWNSTREAM)
    check_spliced(model, spliced_model, {other: Change(4, 1), one: Change(4, 2)}, SOME, DOWNSTREAM)


@pytest.mark.parametrize("head", [None, 2])
def test_a_site_takes_and_puts_one_head_or_all_side_by_side(head: int | None) -> None:
    site = Site.of_sae("blocks.1.attn.hook_z", head)
    activation = torch.randn(5, 4, 3, dtype=torch.float64)
    x = site.take(activation)
    assert x.shape == (5, 12 if head is None else 3)
    close(site.put(activation, x), activation, 0)
    written = site.put(activation, (x + 1).float())
    assert written.dtype == activation.dtype
    changed = (written - activation).abs().amax((0, 2)) > 0.5
    assert changed.tolist() == ([True] * 4 if head is None else [False, False, True, False])


def test_padding_on_the_left_is_masked_as_the_model_does() -> None:
    words = {f"w{i}": i for i in range(D_VOCAB - 1)} | {"[PAD]": D_VOCAB - 1}
    backend = Tokenizer(WordLevel(words, unk_token="w0"))
    model = random_model(dtype=torch.float64)
    model.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", bos_token="w1", padding_side="left"
    )
    tokens = TOKENS % (D_VOCAB - 1)
    tokens[0, :5] = D_VOCAB - 1
    spliced_model = SplicedModel(model)
    site, change = Site.of_sae("blocks.1.hook_resid_pre"), Change(16)
    with spliced_model.running():
        clean = spliced_model.clean(tokens, [site])
        spliced = spliced_model.spliced(clean, Where.everywhere(tokens), {site: change.at(site.read)})
    assert clean.final is not None
    assert spliced.final is not None
    expected = model(tokens)
    close(spliced_model.unembedding.logits(clean.final), expected)
    replaced = model.run_with_hooks(tokens, fwd_hooks=[(site.read, lambda tensor, hook: change(tensor))])  # noqa: ARG005
    close(spliced_model.unembedding.logits(spliced.final), replaced)
    model.tokenizer.padding_side = "right"
    assert not torch.allclose(model(tokens), expected)  # padding on the left did matter


# Every kind of model


@contextmanager
def counted_blocks(model: Any) -> Iterator[Counter[int]]:
    """How often each block's own forward pass is begun: its class's, which a stand-in takes the place of."""
    calls: Counter[int] = Counter()
    blocks = list(blocks_of(model))
    (block_class,) = {type(block) for block in blocks}
    original = block_class.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls[blocks.index(self)] += 1
        return original(self, *args, **kwargs)

    block_class.forward = forward
    try:
        yield calls
    finally:
        block_class.forward = original


WITHOUT_UNEMBEDDING = ("cohere", "granite")
SITES: dict[str, Callable[[str], list[str]]] = {
    "between-blocks": lambda kind: [block_output(kind, 0)],
    "inside": lambda kind: [inside_block(kind, 1)[0]],
    "two-in-one-block": lambda kind: [*reversed(inside_block(kind, 1))],
    "three": lambda kind: [inside_block(kind, 0)[0], block_output(kind, 0), inside_block(kind, 2)[1]],
    "last": lambda kind: [block_output(kind, 2)],
}
RUNS_AGAIN = {"between-blocks": [1, 2], "inside": [1, 2], "two-in-one-block": [1, 2], "three": [0, 1, 2], "last": []}


@pytest.mark.filterwarnings("ignore:.*could not tell its unembedding:UserWarning")
@pytest.mark.parametrize("kind", ANY)
def test_every_kind_of_model_is_spliced_as_by_hooks_and_no_block_before_runs_twice(kind: str) -> None:
    model = any_model(kind, torch.float64)
    spliced_model = SplicedModel(model)
    tolerance = 1e-5 if kind == "mamba" else 1e-8  # some of Mamba is computed in float32
    for i, (name, hooks_of) in enumerate(SITES.items()):
        sites = [Site.of_sae(hook) for hook in hooks_of(kind)]
        changes = {site: Change(16, seed=i) for i, site in enumerate(sites)}
        assert spliced_model.in_order(sites[::-1]) == sites
        downstream = [] if name == "last" else [block_output(kind, 2)]
        where = (EVERYWHERE, SOME)[i % 2]
        with counted_blocks(model) as calls:
            clean = spliced_model.clean(TOKENS, sites)
            assert calls == {0: 1, 1: 1, 2: 1}
            calls.clear()
            spliced_model.spliced(clean, where, {site: c.at(site.read) for site, c in changes.items()})
            assert sorted(calls.elements()) == RUNS_AGAIN[name], name
        check_spliced(model, spliced_model, changes, where, downstream, tolerance)


@pytest.mark.filterwarnings("ignore:.*could not tell its unembedding:UserWarning")
@pytest.mark.parametrize("kind", ANY)
def test_a_pass_that_needs_no_more_goes_no_further(kind: str) -> None:
    model = any_model(kind)
    spliced_model = SplicedModel(model)
    early, late = Site.of_sae(block_output(kind, 0)), Site.of_sae(inside_block(kind, 1)[0])
    change = Change(16, dtype=torch.float32)
    with counted_blocks(model) as calls:
        whole = spliced_model.clean(TOKENS, [early, late])
        calls.clear()
        clean = spliced_model.clean(TOKENS, [early], final=False)
        assert calls == {0: 1}
        close(clean.at[early.read], whole.at[early.read], 0)
        assert clean.final is None
        calls.clear()
        spliced = spliced_model.spliced(
            clean, EVERYWHERE, {early: change.at(early.read)}, [block_output(kind, 1)], final=False
        )
        assert calls == {1: 1}
        assert spliced.final is None
        assert list(spliced.at) == [block_output(kind, 1)]
        calls.clear()
        spliced_model.clean(TOKENS, [late], final=False)
        assert calls == {0: 1, 1: 1}


def test_a_pass_that_stops_early_has_run_every_module() -> None:
    spliced_model = SplicedModel(random_model())
    sites = [Site.of_sae(f"blocks.{i}.hook_mlp_out") for i in range(2)]
    clean = spliced_model.clean(TOKENS, sites, final=False)
    ran: list[str] = []

    def noted(site: Site) -> Replace:
        return lambda x: ran.append(site.read) or {site.read: x}

    spliced_model.spliced(clean, EVERYWHERE, {site: noted(site) for site in sites}, ["blocks.1.hook_resid_pre"], False)
    assert ran == [site.read for site in sites]


def test_one_clean_pass_serves_spliced_passes_from_anywhere() -> None:
    model = random_model(dtype=torch.float64)
    spliced_model = SplicedModel(model)
    sites = [Site.of_sae(hook) for hook in HOOKS]
    shared = spliced_model.clean(TOKENS, sites)
    for site in sites:
        change = Change(shared.at[site.read].flatten(2).shape[-1])
        own = spliced_model.spliced(spliced_model.clean(TOKENS, [site]), SOME, {site: change.at(site.read)})
        close(spliced_model.spliced(shared, SOME, {site: change.at(site.read)}).final, own.final, 0)


def test_both_ways_of_running_gpt2_agree() -> None:
    proxy = hugging_face_model("gpt2", torch.float64)
    cfg = HookedTransformerConfig(
        n_layers=3,
        d_model=16,
        n_heads=4,
        d_head=4,
        d_mlp=64,
        n_ctx=16,
        d_vocab=D_VOCAB,
        act_fn="gelu_new",
        normalization_type="LN",
        eps=1e-5,
        dtype=torch.float64,
        device="cpu",
    )
    hooked = HookedTransformer(cfg)
    hooked.load_state_dict(convert_gpt2_weights(proxy.model, cfg), strict=False)
    results = []
    for model, hook in ((hooked, "blocks.0.hook_resid_post"), (proxy, "transformer.h.0")):
        spliced_model, site, change = SplicedModel(model), Site.of_sae(hook), Change(16)
        (later,) = spliced_model.later_blocks(hook)
        with spliced_model.running():
            clean = spliced_model.clean(TOKENS, [site])
            spliced = spliced_model.spliced(clean, SOME, {site: change.at(hook)}, [later])
        assert clean.final is not None
        assert spliced.final is not None
        kl = spliced_model.unembedding.kl(SOME.take(spliced.final), SOME.take(clean.final))
        gradient = gradients_of(kl + functional(kl, {"later": spliced.at[later]}), [change])
        results.append((clean.at[hook], clean.final, spliced.at[later].detach(), kl.detach(), gradient))
    assert float(results[0][3]) > 1e-2
    close(results[0], results[1], 1e-8)


# Modules that read in one place and write in another


def hooks_of_mlp(kind: str, block: int) -> tuple[str, str]:
    """What goes into a block's MLP, and what comes out of it."""
    if kind in ("HookedTransformer", "TransformerBridge"):
        return f"blocks.{block}.ln2.hook_normalized", f"blocks.{block}.hook_mlp_out"
    norm = {"gpt2": "ln_2"}.get(kind, "post_attention_layernorm")
    return f"{block_output(kind, block)}.{norm}", f"{block_output(kind, block)}.mlp"


MLP_KINDS = ("HookedTransformer", "TransformerBridge", "gpt2", "llama", "mixtral")


def transcoded(
    kind: str, modules: Sequence[tuple[Site, Change]], where: Where
) -> tuple[Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Spliced logits and gradients, ours and those of plain hooks that add up what is written, at the tokens that count."""
    model = any_model(kind, torch.float64)
    spliced_model = SplicedModel(model)
    sites = [site for site, _ in modules]
    with spliced_model.running():
        clean = spliced_model.clean(TOKENS, sites)
        spliced = spliced_model.spliced(clean, where, {site: change.at(*site.writes) for site, change in modules})
    assert spliced.final is not None
    ours = spliced_model.unembedding.logits(spliced.final)
    outputs: dict[tuple[str, int], Tensor] = {}

    def read(hook: str) -> Callable[[Tensor], Tensor]:
        def keep(activation: Tensor) -> Tensor:
            for i, (site, change) in enumerate(modules):
                if site.read == hook:
                    outputs.update({(write, i): change(activation) / (n + 1) for n, write in enumerate(site.writes)})
            return activation

        return keep

    def write(hook: str) -> Callable[[Tensor], Tensor]:
        def put(activation: Tensor) -> Tensor:
            total = torch.stack([out for (at, _), out in outputs.items() if at == hook]).sum(0)
            return torch.where(where.mask[..., None], total, activation)

        return put

    replace = {site.read: read(site.read) for site in sites} | {h: write(h) for site in sites for h in site.writes}
    with frozen(model):
        theirs, _ = run_with_hooks(model, TOKENS, replace)
    assert not torch.allclose(theirs, logits_of(model, TOKENS))
    changes = [change for _, change in modules]
    return ours, theirs, gradients_of(functional(ours, {}), changes), gradients_of(functional(theirs, {}), changes)


@pytest.mark.parametrize(("kind", "where"), pairwise(MLP_KINDS, list(WHERES)))
def test_a_transcoder_reads_at_one_hook_and_writes_at_another(kind: str, where: str) -> None:
    read, write = hooks_of_mlp(kind, 1)
    within = [(Site(read, (write,)), Change(16))]
    across = [(Site(block_output(kind, 0), (hooks_of_mlp(kind, 2)[1],)), Change(16))]
    hooks = [hooks_of_mlp(kind, i) for i in range(3)]
    every = [(Site(read, (write,)), Change(16, seed=i)) for i, (read, write) in enumerate(hooks)]
    for modules in (within, across, every):
        ours, theirs, gradients, expected = transcoded(kind, modules, WHERES[where])
        close(ours, theirs, 1e-8)
        close(gradients, expected, 1e-7)


@pytest.mark.parametrize(("kind", "where"), pairwise(MLP_KINDS, list(WHERES)))
def test_outputs_of_several_transcoders_at_one_hook_add_up(kind: str, where: str) -> None:
    (read_1, write_1), (read_2, write_2) = hooks_of_mlp(kind, 1), hooks_of_mlp(kind, 2)
    # A cross-layer transcoder, and one of the later layer's own.
    modules = [(Site(read_1, (write_1, write_2)), Change(16)), (Site(read_2, (write_2,)), Change(16, seed=1))]
    ours, theirs, gradients, expected = transcoded(kind, modules, WHERES[where])
    close(ours, theirs, 1e-8)
    close(gradients, expected, 1e-7)


def test_a_transcoder_that_reads_before_the_earliest_write_reruns_nothing_before_it() -> None:
    model = random_model()
    spliced_model = SplicedModel(model)
    site = Site("blocks.0.hook_resid_mid", ("blocks.2.hook_mlp_out",))
    with counted_blocks(model) as calls:
        clean = spliced_model.clean(TOKENS, [site])
        calls.clear()
        spliced_model.spliced(clean, EVERYWHERE, {site: Change(16).at(*site.writes)})
        assert calls == {2: 1}


# The blocks' names


def test_the_output_of_a_block_goes_by_its_hook() -> None:
    model = any_model("HookedTransformer")
    spliced_model = SplicedModel(model)
    assert spliced_model.hooks["blocks.1.hook_resid_post"] is model.blocks[1]
    # A hook of the user's own on that hook point is within the block, and so comes before ours.
    model.add_hook("blocks.1.hook_resid_post", lambda tensor, hook: 2 * tensor)  # noqa: ARG005
    site = Site.of_sae("blocks.1.hook_resid_post")
    clean = spliced_model.clean(TOKENS, [site])
    _, cache = model.run_with_cache(TOKENS)
    assert clean.final is not None
    close(clean.at[site.read], cache["blocks.2.hook_resid_pre"], 1e-6)
    spliced = spliced_model.spliced(clean, EVERYWHERE, {site: lambda x: {site.read: x}})
    close(spliced.final, clean.final, 0)


@pytest.mark.parametrize(
    ("kind", "hook", "later", "layers"),
    [
        ("HookedTransformer", "blocks.0.hook_resid_pre", ["blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"], None),
        ("HookedTransformer", "blocks.0.hook_mlp_out", ["blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"], None),
        ("HookedTransformer", "hook_embed", ["blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"], None),
        ("HookedTransformer", "blocks.1.attn.hook_z", ["blocks.2.hook_resid_pre"], None),
        # The output of block 0 is the input of block 1, which the SAE itself replaces: nothing is downstream of it there.
        ("HookedTransformer", "blocks.0.hook_resid_post", ["blocks.2.hook_resid_pre"], None),
        ("HookedTransformer", "blocks.1.hook_resid_pre", ["blocks.2.hook_resid_pre"], None),
        ("HookedTransformer", "blocks.2.hook_mlp_out", [], None),
        ("HookedTransformer", "blocks.2.hook_resid_post", [], []),
        ("HookedTransformer", "ln_final.hook_normalized", [], []),
        ("HookedTransformer", "ln_final.hook_scale", [], []),
        ("TransformerBridge", "blocks.0.hook_mlp_out", ["blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"], None),
        ("TransformerBridge", "blocks.0.hook_out", ["blocks.2.hook_resid_pre"], None),
        ("TransformerBridge", "blocks.2.hook_resid_post", [], []),
        ("llama", "model.layers.0", ["model.layers.1"], None),
        ("llama", "model.layers.0.mlp", ["model.layers.0", "model.layers.1"], None),
        ("llama", "model.embed_tokens", ["model.layers.0", "model.layers.1"], None),
        ("llama", "model.layers.1", [], None),
        ("llama", "model.layers.1.self_attn.o_proj", ["model.layers.1"], None),
        ("llama", "model.layers.2", [], []),
        ("llama", "model.layers.2.mlp", [], None),
        ("llama", "model.norm", [], []),
        ("mamba", "backbone.layers.0.mixer", ["backbone.layers.0", "backbone.layers.1"], None),
    ],
)
def test_later_blocks_and_layers(kind: str, hook: str, later: list[str], layers: list[str] | None) -> None:
    spliced_model = SplicedModel(any_model(kind))
    assert spliced_model.later_blocks(hook) == later
    assert spliced_model.later_layers(hook) == ([*later, block_output(kind, 2)] if layers is None else layers)


@pytest.mark.parametrize(
    ("kind", "hook", "says"),
    [
        ("HookedTransformer", "blocks.1.hook_resid_prr", "did you mean blocks.1.hook_resid_pre"),
        ("HookedTransformer", "blocks.9.hook_resid_pre", "did you mean blocks."),
        ("HookedTransformer", "????", "it has for instance hook_embed"),
        ("TransformerBridge", "blocks.1.hook_resid_prr", "did you mean blocks.1.hook_resid_pre"),
        ("TransformerBridge", "blocks.1.hook_outt", "did you mean blocks.1.hook_out"),
        ("llama", "model.layer.1", "did you mean model.layers.1"),
        ("llama", "blocks.2", "it has for instance model"),
    ],
)
def test_a_hook_the_model_does_not_have_is_refused_with_those_like_it(kind: str, hook: str, says: str) -> None:
    spliced_model = SplicedModel(any_model(kind))
    with pytest.raises(ValueError, match="hook_name: the model has no hook") as error:
        spliced_model.check_hook(hook)
    assert says in str(error.value)
    assert repr(hook) in str(error.value)
    spliced_model.check_hook(block_output(kind, 1))


@pytest.mark.parametrize("hook", ["blocks.1.hook_mlp_in", "blocks.1.attn.hook_result"])
def test_a_hook_that_the_model_has_and_does_not_call_is_refused(hook: str) -> None:
    # TransformerLens has these hook points in every model, and calls them with use_hook_mlp_in or use_attn_result only.
    spliced_model = SplicedModel(random_model())
    assert hook in spliced_model.hooks
    for ask in (lambda: spliced_model.clean(TOKENS, hooks=[hook]), lambda: spliced_model.order([hook])):
        with pytest.raises(ValueError, match=f"has a hook '{hook}' but does not call it"):
            ask()


# What is left as it was


def test_hooks_of_the_users_own_stay_and_ours_do_not() -> None:
    model = random_model(dtype=torch.float64)
    model.add_hook("blocks.2.hook_mlp_out", lambda tensor, hook: 2 * tensor)  # noqa: ARG005
    expected = model(TOKENS)
    spliced_model = SplicedModel(model)
    site = Site.of_sae("blocks.1.hook_mlp_out")
    clean = spliced_model.clean(TOKENS, [site], DOWNSTREAM)
    spliced = spliced_model.spliced(clean, EVERYWHERE, {site: lambda x: {site.read: x}}, DOWNSTREAM)
    assert clean.final is not None
    close(spliced_model.unembedding.logits(clean.final), expected)
    close(spliced.final, clean.final)
    assert [name for name, hook in model.hook_dict.items() if hook.has_hooks()] == ["blocks.2.hook_mlp_out"]
    close(model(TOKENS), expected, 0)


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["HookedTransformer", "TransformerBridge", "llama", "gpt_neox"])
def test_a_hook_on_a_block_that_stands_in_is_applied_once(kind: str, when: str, block: int) -> None:
    model = any_model(kind, torch.float64)
    spliced_model = SplicedModel(model) if when == "before" else None

    def double(_module: Any, _args: Any, output: Any) -> Any:
        return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output

    blocks_of(model)[block].register_forward_hook(double)
    spliced_model = spliced_model or SplicedModel(model)
    for hook in (inside_block(kind, 2)[0], block_output(kind, block)):
        site = Site.of_sae(hook)
        with counted_blocks(model) as calls:
            clean = spliced_model.clean(TOKENS, [site])
            calls.clear()
            spliced = spliced_model.spliced(clean, EVERYWHERE, {site: lambda x, hook=hook: {hook: x}})
        assert clean.final is not None
        assert block not in calls
        close(spliced.final, clean.final)
        close(spliced_model.unembedding.logits(clean.final), logits_of(model, TOKENS))


@pytest.mark.parametrize("kind", ["HookedTransformer", "TransformerBridge", "llama"])
def test_nothing_is_left_behind_even_when_a_pass_fails(kind: str) -> None:
    model = any_model(kind)
    modules = list(model.modules())

    def state() -> list[Any]:
        hooks = [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in modules]
        return [hooks, [vars(m).get("forward") for m in modules], [m.training for m in modules]]

    logits_of(model, TOKENS)  # a bridge sets itself up in its first pass
    before = state()
    spliced_model = SplicedModel(model)
    assert state() == before
    site = Site.of_sae(inside_block(kind, 2)[0])
    identity: Replace = lambda x: {site.read: x}  # noqa: E731
    with spliced_model.running():
        clean = spliced_model.clean(TOKENS, [site])
        spliced_model.spliced(clean, EVERYWHERE, {site: identity})
        with pytest.raises(RuntimeError, match=r"size|shape"):
            spliced_model.spliced(clean, EVERYWHERE, {site: lambda x: {site.read: x[:, :-1]}})
        failing = blocks_of(model)[2].register_forward_hook(lambda *_: 1 / 0)
        for ask in (lambda: spliced_model.clean(TOKENS), lambda: spliced_model.spliced(clean, SOME, {site: identity})):
            with pytest.raises(ZeroDivisionError):
                ask()
        failing.remove()
    assert state() == before


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "qwen3"])
def test_no_key_value_cache_is_kept(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = hugging_face_model(kind)
    updates: list[None] = []
    original = DynamicCache.update

    def update(*args: Any, **kwargs: Any) -> Any:
        updates.append(None)
        return original(*args, **kwargs)

    monkeypatch.setattr(DynamicCache, "update", update)
    spliced_model, site = SplicedModel(model), Site.of_sae(block_output(kind, 0))
    clean = spliced_model.clean(TOKENS, [site])
    spliced_model.spliced(clean, EVERYWHERE, {site: lambda x: {site.read: x}})
    assert not updates
    model.model(TOKENS)
    assert updates  # what is counted is what fills a cache


def test_a_block_compiled_in_place_stands_in_all_the_same() -> None:
    model = any_model("llama")
    expected = logits_of(model, TOKENS)
    blocks = blocks_of(model)
    blocks[0].compile(backend="eager")
    compiled = blocks[0]._compiled_call_impl
    ran: list[None] = []
    spliced_model, site = SplicedModel(model), Site.of_sae("model.layers.1.mlp")
    clean = spliced_model.clean(TOKENS, [site])
    assert clean.final is not None
    close(spliced_model.unembedding.logits(clean.final), expected, 1e-5)
    object.__setattr__(blocks[0], "_compiled_call_impl", lambda *a, **k: ran.append(None) or compiled(*a, **k))  # pyright: ignore[reportOptionalCall]
    spliced = spliced_model.spliced(clean, EVERYWHERE, {site: lambda x: {site.read: x}})
    assert not ran
    close(spliced.final, clean.final, 1e-6)
    close(logits_of(model, TOKENS), expected, 1e-5)
    assert ran  # put back, and what is counted is what runs


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


# Models whose parts cannot be told


class Recurrent(nn.Module):
    """A language model with no list of blocks, whose logits are scaled after its unembedding."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(D_VOCAB, 16, dtype=torch.float64)
        self.mix = nn.Linear(16, 16, dtype=torch.float64)
        self.unembed = nn.Linear(16, D_VOCAB, dtype=torch.float64)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        stream = self.embed(tokens)
        for _ in range(2):
            stream = stream + self.mix(stream.cumsum(1).tanh())
        return 2 * self.unembed(stream)


class SkippingBlocks(Recurrent):
    """The same with a list of blocks that do not follow each other."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(16, 16, dtype=torch.float64) for _ in range(3)])

    def forward(self, tokens: Tensor) -> Tensor:
        stream = self.embed(tokens)
        return 2 * self.unembed(sum((block(stream).tanh() for block in self.blocks), self.mix(stream)))


@pytest.mark.parametrize("model_class", [Recurrent, SkippingBlocks])
def test_a_model_whose_parts_cannot_be_told_is_run_whole_and_says_so_once(model_class: type[Recurrent]) -> None:
    model: Any = HookedProxyLM(model_class(), None)  # pyright: ignore[reportArgumentType]
    model.model.forward = without_cache(model.model.forward)
    name = model_class.__name__
    says = f"{name}: could not tell its blocks, so each spliced pass runs all of it; nor its unembedding, so all logits"
    with pytest.warns(UserWarning, match=says) as warned:
        spliced_model = SplicedModel(model)
    assert len(warned) == 1
    site, change = Site.of_sae("embed"), Change(16)
    clean = spliced_model.clean(TOKENS, [site])
    ran: list[None] = []
    model.model.embed.register_forward_hook(lambda *_: ran.append(None))
    spliced = spliced_model.spliced(clean, SOME, {site: change.at("embed")})
    assert len(ran) == 1
    assert spliced.final is not None
    modified = [("embed", change.hook(site, SOME))]
    handles = [getattr(model.model, n).register_forward_hook(lambda *a, f=f: f(a[-1])) for n, f in modified]
    expected = model.model(TOKENS)
    for handle in handles:
        handle.remove()
    close(spliced_model.unembedding.logits(spliced.final), expected)
    close(gradients_of(functional(spliced.final, {}), [change]), gradients_of(functional(expected, {}), [change]))
    with pytest.raises(ValueError, match="hook_name='embed': the blocks of this model could not be told"):
        spliced_model.later_layers("embed")


def without_cache(forward: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda tokens, use_cache=False: forward(tokens)  # noqa: ARG005


def test_every_other_model_says_nothing(recwarn: pytest.WarningsRecorder) -> None:
    for kind in ANY:
        if kind not in WITHOUT_UNEMBEDDING:
            SplicedModel(any_model(kind))
    assert not [w for w in recwarn if "could not tell" in str(w.message)]
