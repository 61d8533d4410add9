"""The general path: any other language model, with forward hooks on its modules."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from sae_lens.load_model import HookedProxyLM
from torch import Tensor, nn
from transformer_lens.HookedRootModule import HookedRootModule
from typing_extensions import override

from sae_lens_e2e.splice.base import CleanPass, Splice, SplicedPass, unknown_hook
from sae_lens_e2e.splice.unembedding import Head, LinearHead, LogitsHead

_PROBE_LENGTH = 8


class ModuleSplice(Splice):
    """Splices by forward hooks into any model whose hooks are the names of its modules.

    For SAELens' `AutoModelForCausalLM` wrapper those are the Hugging Face model's modules, a hook's activation being the
    module's output (the first, if it returns several). The spliced pass runs the whole model, the part before the hook
    without gradients. The head's input is captured and its logits left out where the model's logits are a function of
    that input alone.
    """

    def __init__(
        self,
        model: HookedRootModule,
        hook_name: str,
        hook_head_index: int | None = None,
        downstream_hooks: Sequence[str] = (),
        model_kwargs: Mapping[str, Any] | None = None,
    ):
        super().__init__(model, hook_name, hook_head_index, downstream_hooks)
        self.root: nn.Module = model.model if isinstance(model, HookedProxyLM) else model
        self.forward_kwargs = dict(model_kwargs or {})
        if isinstance(model, HookedProxyLM):
            # A key-value cache is of no use to whole prompts, and would hold every layer's keys and values.
            self.forward_kwargs["use_cache"] = False
        self.modules = dict(self.root.named_modules())
        for field, hook in [("hook_name", hook_name), *(("downstream_hooks", h) for h in downstream_hooks)]:
            if hook not in self.modules:
                raise unknown_hook(field, hook, [name for name in self.modules if name])
        self.head_module, self.head = self._find_head()

    @property
    @override
    def n_ctx(self) -> int | None:
        config = getattr(self.root, "config", None)
        for field in ("max_position_embeddings", "n_positions", "n_ctx"):
            if isinstance(limit := getattr(config, field, None), int):
                return limit
        return None

    @property
    @override
    def later_blocks(self) -> list[str]:
        """The outputs of the blocks after the hook, but for the last block's, which enters no block."""
        if self._place is None:
            return []
        blocks, layer, inside, n_layers = self._place
        return [f"{blocks}.{i}" for i in range(layer + (not inside), n_layers - 1)]

    @property
    @override
    def last_layer(self) -> str:
        if self._place is None:
            raise ValueError(
                f"hook_name={self.hook_name!r} is not in a block, so the last block is not known; name hooks"
            )
        blocks, _, _, n_layers = self._place
        return f"{blocks}.{n_layers - 1}"

    @property
    def _place(self) -> tuple[str, int, bool, int] | None:
        """The list of blocks that the hook is in, which of them, whether inside it, and how many there are."""
        match = re.match(r"(.*?)\.(\d+)(\..+)?$", self.hook_name)
        if match is None:
            return None
        return match[1], int(match[2]), match[3] is not None, len(list(self.modules[match[1]].children()))

    @override
    def clean(self, tokens: Int[Tensor, "batch pos"], stop_at_hook: bool = False) -> CleanPass:
        with torch.no_grad(), self._capturing((self.hook_name, *self.downstream_hooks)) as cache:
            final = self._run(tokens, stop_at=self.modules[self.hook_name] if stop_at_hook else None)
        downstream = {hook: cache[hook] for hook in self.downstream_hooks if hook in cache}
        return CleanPass(cache[self.hook_name], downstream, final, tokens)

    @override
    def spliced(self, clean: CleanPass, activation: Tensor) -> SplicedPass:
        put_in = self.modules[self.hook_name].register_forward_hook(lambda *args: _replace_first(args[-1], activation))
        try:
            with self._capturing(self.downstream_hooks) as cache:
                final = self._run(clean.resume)
        finally:
            put_in.remove()
        if final is None:
            raise RuntimeError(f"the model's head was not reached from {self.hook_name}")
        return SplicedPass(cache, final)

    def _run(self, tokens: Tensor, stop_at: nn.Module | None = None) -> Tensor | None:
        """The head's input, or all logits if the head could not be told apart; None if stopped before."""
        stop = _Stop(stop_at, self.head_module)
        with stop.watching():
            try:
                output = self.root(tokens, **self.forward_kwargs)
            except _StopForward:
                return stop.head_input
        return _logits(output)

    @contextmanager
    def _capturing(self, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        cache: dict[str, Tensor] = {}
        handles = [self.modules[name].register_forward_hook(_capture(cache, name)) for name in names]
        try:
            yield cache
        finally:
            for handle in handles:
                handle.remove()

    def _find_head(self) -> tuple[nn.Module | None, Head]:
        """The module whose input decides the logits, and how; both checked against the model's own logits."""
        tokens = torch.arange(_PROBE_LENGTH, device=_device(self.root)).unsqueeze(0)
        output_embeddings: Any = getattr(self.root, "get_output_embeddings", None)
        head = None if output_embeddings is None else output_embeddings()
        captured: list[Tensor] = []
        handles = [head.register_forward_pre_hook(lambda _, args: captured.append(args[0]))] if head is not None else []
        self.head_module = None
        with torch.no_grad():
            try:
                logits = _logits(self.root(tokens, **self.forward_kwargs))
            finally:
                for handle in handles:
                    handle.remove()
            d_vocab = logits.shape[-1]
            for candidate in self._candidate_heads(head, d_vocab) if captured else ():
                expected = candidate.logits(captured[0])
                if expected.shape == logits.shape and torch.allclose(expected, logits, rtol=1e-3, atol=1e-3):
                    return head, candidate.head
        return None, LogitsHead(lambda all_logits: all_logits, d_vocab)

    def _candidate_heads(self, head: Any, d_vocab: int) -> "list[_Candidate]":
        config = getattr(self.root, "config", None)
        cap = getattr(config, "final_logit_softcapping", None)
        candidates = []
        if type(head) is nn.Linear:
            linear = LinearHead(head.weight.detach().T, None if head.bias is None else head.bias.detach(), cap)
            candidates.append(_Candidate(linear, lambda h: _soft_cap(head(h), cap)))
        candidates.append(_Candidate(LogitsHead(head, d_vocab), head))
        return candidates


@dataclass(frozen=True)
class _Candidate:
    head: Head
    logits: Callable[[Tensor], Tensor]


class _StopForward(Exception):  # noqa: N818
    """The rest of the forward pass is not needed."""


class _Stop:
    """Ends a forward pass once a module has run, or before the head does, keeping the head's input."""

    def __init__(self, after: nn.Module | None, before_head: nn.Module | None):
        self.after, self.before_head = after, before_head
        self.head_input: Tensor | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = []
        if self.after is not None:
            handles.append(self.after.register_forward_hook(self._stop))
        if self.before_head is not None:
            handles.append(self.before_head.register_forward_pre_hook(self._keep_and_stop))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _stop(self, *_: Any) -> None:
        raise _StopForward

    def _keep_and_stop(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.head_input = args[0]
        raise _StopForward


def _capture(cache: dict[str, Tensor], name: str) -> Callable[..., None]:
    def store(_module: nn.Module, _args: Any, output: Any) -> None:
        activation = output[0] if isinstance(output, tuple) else output
        if not isinstance(activation, Tensor):
            raise ValueError(f"hook {name!r}: the module returns {type(output).__name__}, which is no activation")
        cache[name] = activation

    return store


def _replace_first(output: Any, activation: Tensor) -> Any:
    return (activation, *output[1:]) if isinstance(output, tuple) else activation


def _logits(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, tuple) else output.logits


def _soft_cap(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None or math.isinf(cap) else torch.tanh(logits / cap) * cap


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
