"""Where the parts of a language model are: its blocks, its hooks and its unembedding, one small reader for each kind."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from sae_lens.load_model import HookedProxyLM
from torch import Tensor, nn

from sae_lens_e2e.splice.bridge import is_bridge
from sae_lens_e2e.splice.hooked_transformer import is_hooked_transformer
from sae_lens_e2e.splice.hooks import first_output

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

_PROBE_LENGTH = 8


@dataclass(frozen=True)
class Anatomy:
    """A language model as the splice sees it: a root that is called with tokens, and what is inside."""

    root: nn.Module
    hooks: Mapping[str, nn.Module]
    """By every name it goes by, the module whose output is the activation there."""
    blocks: Sequence[nn.Module] = ()
    """In order; none if they could not be told."""
    enters: Sequence[str | None] = ()
    """For each block the hook at its input, None where that has no name."""
    leaves: str | None = None
    """The hook at the output of the last block."""
    unembed: nn.Module | None = None
    """The module whose input is the last hidden state."""
    n_ctx: int | None = None
    """The longest context, in tokens; None if there is no limit."""
    d_vocab_in: int | None = None
    """How many tokens there are to read; None if it is not known."""
    soft_cap: float | None = None
    forward_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """What the root is called with besides tokens."""

    def probe_tokens(self, n_pos: int = _PROBE_LENGTH) -> Int[Tensor, "1 pos"]:
        """A few tokens that the model takes, for trying things out."""
        n_pos = min(n_pos, self.n_ctx or n_pos)
        return (torch.arange(n_pos, device=device_of(self.root)) % (self.d_vocab_in or n_pos))[None]


def read_anatomy(model: nn.Module, model_kwargs: Mapping[str, Any] | None = None) -> Anatomy:
    """The anatomy of a `HookedTransformer`, a `TransformerBridge`, SAELens' Hugging Face wrapper, or any other model."""
    kwargs = dict(model_kwargs or {})
    if is_hooked_transformer(model):
        return _hooked_transformer(model, kwargs)
    if is_bridge(model):
        return _transformer_bridge(model, kwargs)
    if isinstance(model, HookedProxyLM):
        # A key-value cache is of no use to whole prompts, and would hold every layer's keys and values.
        return _modules(model.model, kwargs | {"use_cache": False})
    return _modules(model, kwargs)


def device_of(module: nn.Module) -> torch.device:
    """Where a module's weights are: the first of them that are anywhere, if they are in several places; else the CPU."""
    devices = (parameter.device for parameter in module.parameters())
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


def _hooked_transformer(model: "HookedTransformer", kwargs: Mapping[str, Any]) -> Anatomy:
    cfg, n = model.cfg, model.cfg.n_layers
    # What a block returns is its hook_resid_post.
    outputs = {f"blocks.{i}.hook_resid_post": block for i, block in enumerate(model.blocks)}
    return Anatomy(
        root=model,
        hooks={**model.hook_dict, **outputs},
        blocks=tuple(model.blocks),
        enters=tuple(f"blocks.{i}.hook_resid_pre" for i in range(n)),
        leaves=f"blocks.{n - 1}.hook_resid_post",
        unembed=model.unembed,
        n_ctx=cfg.n_ctx,
        d_vocab_in=cfg.d_vocab,
        soft_cap=cfg.output_logits_soft_cap,
        forward_kwargs=kwargs,
    )


def _transformer_bridge(model: Any, kwargs: Mapping[str, Any]) -> Anatomy:
    hooks, blocks = dict(model.hook_dict), tuple(model.blocks)
    block_of = {block.hook_out: block for block in blocks}
    # A stand-in returns before the block's own last hook point, under whichever of its names.
    hooks = {name: block_of.get(point, point) for name, point in hooks.items()}
    enters = [f"blocks.{i}.hook_resid_pre" for i in range(len(blocks))]
    leaves = f"blocks.{len(blocks) - 1}.hook_resid_post"
    return Anatomy(
        root=model,
        hooks=hooks,
        blocks=blocks,
        enters=tuple(hook if hook in hooks else f"blocks.{i}.hook_in" for i, hook in enumerate(enters)),
        leaves=leaves if leaves in hooks else f"blocks.{len(blocks) - 1}.hook_out",
        unembed=getattr(model, "unembed", None),
        n_ctx=model.cfg.n_ctx,
        d_vocab_in=model.cfg.d_vocab if model.cfg.d_vocab > 0 else None,
        soft_cap=_soft_cap(getattr(model.original_model, "config", None)) or model.cfg.output_logits_soft_cap,
        forward_kwargs=kwargs,
    )


def _modules(root: nn.Module, kwargs: Mapping[str, Any]) -> Anatomy:
    """A model whose hooks are the names of its modules: SAELens' Hugging Face wrapper, and whatever else there may be."""
    config = getattr(root, "config", None)
    modules = {name: module for name, module in root.named_modules() if name}
    anatomy = Anatomy(
        root=root,
        hooks=modules,
        unembed=_call(root, "get_output_embeddings"),
        n_ctx=_first_int(config, ("max_position_embeddings", "n_positions", "n_ctx")),
        d_vocab_in=getattr(_call(root, "get_input_embeddings"), "num_embeddings", None),
        soft_cap=_soft_cap(config),
        forward_kwargs=kwargs,
    )
    lists = {name: tuple(module) for name, module in modules.items() if isinstance(module, nn.ModuleList)}
    by_size = sorted(lists, key=lambda name: -sum(p.numel() for p in modules[name].parameters()))
    name = next((name for name in by_size if _follow_each_other(anatomy, lists[name])), None)
    if name is None:
        return anatomy
    n = len(lists[name])
    # A block is entered by what the one before it returns.
    enters = (None, *(f"{name}.{i}" for i in range(n - 1)))
    return Anatomy(**{**vars(anatomy), "blocks": lists[name], "enters": enters, "leaves": f"{name}.{n - 1}"})


@torch.no_grad()
def _follow_each_other(anatomy: Anatomy, blocks: Sequence[nn.Module]) -> bool:
    """Whether modules are called once each, in order, each with what the one before it returned."""
    inputs: list[tuple[nn.Module, Any]] = []
    outputs: list[Any] = []

    def on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append((module, args[0] if args else kwargs.get("hidden_states")))

    def on_output(_module: nn.Module, _args: Any, output: Any) -> None:
        outputs.append(first_output(output))

    handles = [block.register_forward_pre_hook(on_input, with_kwargs=True) for block in blocks]
    handles += [block.register_forward_hook(on_output) for block in blocks]
    try:
        anatomy.root(anatomy.probe_tokens(), **anatomy.forward_kwargs)
    finally:
        for handle in handles:
            handle.remove()
    in_order = len(blocks) > 0 and [module for module, _ in inputs] == list(blocks) and len(outputs) == len(blocks)
    return in_order and all(
        isinstance(left, Tensor) and isinstance(entered, Tensor) and torch.equal(left, entered)
        for left, (_, entered) in zip(outputs, inputs[1:], strict=False)
    )


def _call(module: nn.Module, method: str) -> Any:
    """What a method of Hugging Face models gives, None where there is no such method or it is not implemented."""
    try:
        return getattr(module, method)()
    except (AttributeError, NotImplementedError):
        return None


def _first_int(config: Any, names: Sequence[str]) -> int | None:
    # Models of several kinds of input keep the language model's own settings apart.
    text = getattr(config, "text_config", None) or config
    return next((limit for name in names if isinstance(limit := getattr(text, name, None), int)), None)


def _soft_cap(config: Any) -> float | None:
    text = getattr(config, "text_config", None) or config
    return getattr(text, "final_logit_softcapping", None)
