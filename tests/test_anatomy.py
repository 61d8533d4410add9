"""Where the parts of a language model are, for each kind of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sae_lens.load_model import HookedProxyLM
from torch import Tensor, nn

from sae_lens_e2e.splice.anatomy import Anatomy, device_of, read_anatomy
from tests.models import (
    ANY,
    HUGGING_FACE,
    LOGIT_CAP,
    any_model,
    block_output,
    blocks_of,
    bridge_model,
    hugging_face_model,
    random_model,
)


@pytest.mark.parametrize("kind", ANY)
def test_blocks_are_told_and_their_ends_have_names(kind: str) -> None:
    model = any_model(kind)
    anatomy = read_anatomy(model)
    assert list(anatomy.blocks) == list(blocks_of(model))
    assert len(anatomy.blocks) == len(anatomy.enters) == 3
    assert anatomy.leaves == block_output(kind, 2)
    for i, block in enumerate(anatomy.blocks):
        assert anatomy.hooks[block_output(kind, i)] is block
    assert all(hook is None or hook in anatomy.hooks for hook in anatomy.enters)
    expected = [f"blocks.{i}.hook_resid_pre" for i in range(3)]
    if kind in HUGGING_FACE:
        # A block is entered by what the one before it returns.
        expected = [None, *(block_output(kind, i) for i in range(2))]
    assert list(anatomy.enters) == expected


@pytest.mark.parametrize("kind", ANY)
def test_what_else_is_known_of_a_model(kind: str) -> None:
    model = any_model(kind)
    anatomy = read_anatomy(model)
    assert anatomy.n_ctx == (None if kind == "mamba" else 16)
    assert anatomy.d_vocab_in == 61
    assert max(anatomy.soft_cap or 0, 0) == (LOGIT_CAP if kind == "gemma2" else 0)
    inner: Any = model.model if kind in HUGGING_FACE else model
    assert anatomy.root is inner
    assert anatomy.unembed is (inner.get_output_embeddings() if kind in HUGGING_FACE else model.unembed)
    assert device_of(anatomy.root) == torch.device("cpu")
    tokens = anatomy.probe_tokens(40)
    assert tokens.shape == (1, 40 if kind == "mamba" else 16)
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < 61


def test_a_soft_cap_of_each_kind_is_found() -> None:
    assert read_anatomy(random_model(output_logits_soft_cap=LOGIT_CAP)).soft_cap == LOGIT_CAP
    assert read_anatomy(hugging_face_model("gemma2")).soft_cap == LOGIT_CAP


def test_keyword_arguments_reach_the_model_and_the_cache_is_off_in_hugging_faces() -> None:
    assert read_anatomy(hugging_face_model("gpt2"), {"use_cache": True, "a": 1}).forward_kwargs == {
        "use_cache": False,
        "a": 1,
    }
    assert read_anatomy(random_model(), {"a": 1}).forward_kwargs == {"a": 1}


def test_a_bridges_hooks_go_by_all_their_names() -> None:
    model = bridge_model()
    anatomy = read_anatomy(model)
    assert anatomy.hooks["blocks.1.hook_in"] is anatomy.hooks["blocks.1.hook_resid_pre"]
    # The hook at the end of a block is the block, which may stand in, under all its names.
    assert anatomy.hooks["blocks.1.hook_out"] is anatomy.hooks["blocks.1.hook_resid_post"] is model.blocks[1]
    assert set(model.hook_dict) == set(anatomy.hooks)


# Other models


class Block(nn.Module):
    """Adds to the stream, and may return it in a tuple, as older Hugging Face models do."""

    def __init__(self, in_tuple: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.in_tuple = in_tuple

    def forward(self, hidden_states: Tensor) -> Any:
        out = hidden_states + self.linear(hidden_states).tanh()
        return (out, None) if self.in_tuple else out


class Toy(nn.Module):
    """A language model of no known class."""

    def __init__(self, run: Callable[["Toy", Tensor], Tensor], in_tuple: bool = False, n_blocks: int = 2) -> None:
        super().__init__()
        self.embed, self.unembed = nn.Embedding(11, 8), nn.Linear(8, 11)
        self.layers = nn.ModuleList(Block(in_tuple) for _ in range(n_blocks))
        # Larger than the blocks, so that the largest list is not the right one.
        self.experts = nn.ModuleList(nn.Linear(8, 64) for _ in range(4))
        self.run = run

    def forward(self, tokens: Tensor) -> Tensor:
        return self.unembed(self.run(self, self.embed(tokens)))


def one_by_one(toy: Toy, stream: Tensor) -> Tensor:
    for expert in toy.experts:
        expert(stream)
    for layer in toy.layers:
        out = layer(stream)
        stream = out[0] if isinstance(out, tuple) else out
    return stream


def by_keyword(toy: Toy, stream: Tensor) -> Tensor:
    for layer in toy.layers:
        stream = layer(hidden_states=stream)
    return stream


def changed_between(toy: Toy, stream: Tensor) -> Tensor:
    for layer in toy.layers:
        stream = layer(2 * stream)
    return stream


def backwards(toy: Toy, stream: Tensor) -> Tensor:
    for layer in reversed(toy.layers):
        stream = layer(stream)
    return stream


def twice(toy: Toy, stream: Tensor) -> Tensor:
    for layer in [*toy.layers, *toy.layers]:
        stream = layer(stream)
    return stream


def first_only(toy: Toy, stream: Tensor) -> Tensor:
    return toy.layers[0](stream)


def of(run: Callable[[Toy, Tensor], Tensor], **settings: Any) -> Anatomy:
    return read_anatomy(Toy(run, **settings))


def test_blocks_of_an_unknown_model_are_those_that_follow_each_other() -> None:
    for anatomy in (of(one_by_one), of(one_by_one, in_tuple=True), of(by_keyword), of(one_by_one, n_blocks=1)):
        assert [type(block) for block in anatomy.blocks] == [Block] * len(anatomy.enters)
        assert anatomy.leaves == f"layers.{len(anatomy.blocks) - 1}"
        assert anatomy.n_ctx is anatomy.d_vocab_in is anatomy.unembed is anatomy.soft_cap is None


@pytest.mark.parametrize("run", [changed_between, backwards, twice, first_only])
def test_modules_in_a_list_that_do_not_follow_each_other_are_no_blocks(run: Callable[[Toy, Tensor], Tensor]) -> None:
    anatomy = of(run)
    assert anatomy.blocks == anatomy.enters == ()
    assert anatomy.leaves is None
    assert "layers.0" in anatomy.hooks


def test_a_proxy_is_looked_through() -> None:
    toy: Any = Toy(lambda toy, stream: one_by_one(toy, stream))
    original = toy.forward
    toy.forward = lambda tokens, use_cache: original(tokens) if not use_cache else 1 / 0
    anatomy = read_anatomy(HookedProxyLM(toy, None))  # pyright: ignore[reportArgumentType]
    assert anatomy.root is toy
    assert len(anatomy.blocks) == 2
