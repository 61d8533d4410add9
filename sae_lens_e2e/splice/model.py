"""A language model that can be run clean, and again from the earliest write on with sparse modules in it."""

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_lens_e2e.splice.activation import fused_gelu
from sae_lens_e2e.splice.anatomy import device_of, read_anatomy
from sae_lens_e2e.splice.attention import fused_attention
from sae_lens_e2e.splice.find_unembedding import find_unembedding, given_to, logits_of
from sae_lens_e2e.splice.frozen import frozen
from sae_lens_e2e.splice.hooks import Watch, first_output, unknown_hook, watching
from sae_lens_e2e.splice.normalization import fused_layer_norm
from sae_lens_e2e.splice.positions import Where
from sae_lens_e2e.splice.regions import Compilation, checkpointed, compiled, unwatched
from sae_lens_e2e.splice.site import Site
from sae_lens_e2e.splice.stand_in import running_as, standing_in

Replace = Callable[[Float[Tensor, "n d_in"]], Mapping[str, Float[Tensor, "n d_out"]]]
"""What a sparse module does: from what it reads to what it puts, at the tokens that count, at each hook it writes."""


@dataclass(frozen=True)
class Clean:
    """One batch through the language model as it is; tensors only, on their way to any number of spliced passes."""

    tokens: Int[Tensor, "batch pos"]
    at: Mapping[str, Float[Tensor, "batch pos *d_act"]] = field(default_factory=dict)
    """The activation at each hook asked for."""
    entering: Mapping[int, Float[Tensor, "batch pos d_model"]] = field(default_factory=dict)
    """The residual stream that enters a block, by its number; that which leaves the last block has the next number."""
    final: Float[Tensor, "batch pos d_final"] | None = None
    """What the unembedding takes; None if the pass stopped before."""


@dataclass(frozen=True)
class Spliced:
    """The same batch with sparse modules in it."""

    at: Mapping[str, Float[Tensor, "batch pos *d_act"]]
    final: Float[Tensor, "batch pos d_final"] | None


class SplicedModel:
    """A language model, made ready once for any number of clean and spliced passes. Hooks are arguments of its calls.

    While a spliced pass runs, the blocks before the earliest write stand in with the residual stream that the clean pass
    recorded, so nothing before it runs twice. Where blocks or unembedding of a model cannot be told it is run whole, and a
    warning says so. Gradients flow from a spliced pass to what the modules put in; the model itself is frozen by `running`.
    """

    def __init__(self, model: nn.Module, model_kwargs: Mapping[str, Any] | None = None):
        self.model = model
        anatomy = read_anatomy(model, model_kwargs)
        self._anatomy = anatomy
        self._root, self._kwargs = anatomy.root, dict(anatomy.forward_kwargs)
        self.hooks: Mapping[str, nn.Module] = anatomy.hooks
        """The module whose output is the activation at a hook, by the hook's name (and its aliases)."""
        self._blocks: Sequence[nn.Module] = tuple(anatomy.blocks)
        self._in_tuple = False
        self._places: dict[str, int] = {}
        self._left_by: dict[nn.Module, nn.Module] = {}
        self._compiled: Mapping[nn.Module, Callable[..., Any]] = {}
        with frozen(model):
            self._unembed, self.unembedding = find_unembedding(anatomy)
            self._blocks = self._blocks if self._blocks_can_stand_in() else ()
            self._left_by = self._outputs_at_inputs()
        self._warn_if_run_whole()

    @property
    def n_ctx(self) -> int | None:
        """The longest context the model takes, in tokens; None if it has no limit."""
        return self._anatomy.n_ctx

    @property
    def device(self) -> torch.device:
        """Where the model's first weights are."""
        return device_of(self._root)

    @property
    def d_vocab_in(self) -> int | None:
        """How many tokens the model can read; None if it does not say."""
        return self._anatomy.d_vocab_in

    def probe_tokens(self, n_pos: int) -> Int[Tensor, "1 pos"]:
        """A few tokens that the model takes, for trying things out."""
        return self._anatomy.probe_tokens(n_pos)

    @contextmanager
    def running(self, compilation: Compilation | None = None) -> Iterator[None]:
        """The model as training and evaluation want it: frozen, attention, LayerNorm and GELU fused where they can be; put back on exit.

        With a `compilation` passes run the blocks compiled that they do not look into. Others' calls of the model do not.
        """
        before = self._compiled
        model = self.model
        with frozen(model), fused_attention(model), fused_layer_norm(model), fused_gelu(model):
            self._compiled = before if compilation is None else compiled(self._blocks, compilation)
            try:
                yield
            finally:
                self._compiled = before

    def later_blocks(self, hook_name: str) -> list[str]:
        """The hooks at the input of each later block, in order; not the one that is the hook's own activation."""
        start = self._block(hook_name)
        return [hook for hook in self._anatomy.enters[start + 1 :] if hook is not None]

    def later_layers(self, hook_name: str) -> list[str]:
        """Every hook between two blocks after `hook_name`, and the output of the last block.

        Raises ValueError if the model's blocks are not known.
        """
        if self._anatomy.leaves is None:
            raise ValueError(
                f"hook_name={hook_name!r}: the blocks of this model could not be told, so later layers are not known; "
                "name downstream_hooks yourself"
            )
        # After the last block there are none, and its output is behind the hook.
        if self._block(hook_name) >= len(self._anatomy.blocks):
            return []
        return [*self.later_blocks(hook_name), self._anatomy.leaves]

    @property
    def parts(self) -> tuple[Sequence[nn.Module], nn.Module | None]:
        """The model's blocks, in order, and its unembedding; none, and None, where they could not be told."""
        return self._blocks, self._unembed

    def blocks_up_to(self, hook_name: str) -> int:
        """How many blocks have begun when a hook is called; the one that its activation enters has not."""
        place, module = self._block(hook_name), self.hooks[hook_name]
        if place == len(self._anatomy.blocks) or not _contains(self._anatomy.blocks[place], module):
            return place
        entered = self._anatomy.enters[place]
        return place if entered is not None and self.hooks[entered] is module else place + 1

    def blocks_without(self, hooks: Collection[str]) -> list[int]:
        """The numbers of the blocks that have none of these hooks inside; what leaves one and enters the next is in neither."""
        blocks = unwatched(self._blocks, [self._watched(hook) for hook in hooks])
        return [self._blocks.index(block) for block in blocks]

    def check_hook(self, hook_name: str, field: str = "hook_name") -> None:
        """Raise ValueError, with the hooks that look like it, for one the model does not have."""
        if hook_name not in self.hooks:
            raise unknown_hook(field, hook_name, list(self.hooks))

    def in_order(self, sites: Collection[Site]) -> list[Site]:
        """Sites from the earliest write to the latest, and by their reads where they write the same."""
        if len(sites) < 2:
            return list(sites)
        order = self.order({hook for site in sites for hook in (site.read, *site.writes)})
        return sorted(sites, key=lambda site: (order[site.writes[0]], order[site.read], site.head_index or 0))

    def names_in_order(self, sites: Mapping[str, Site]) -> list[str]:
        """The names of sites that all differ, in their order."""
        names = {site: name for name, site in sites.items()}
        return [names[site] for site in self.in_order(names)]

    def clean(
        self,
        tokens: Int[Tensor, "batch pos"],
        sites: Collection[Site] = (),
        hooks: Collection[str] = (),
        final: bool = True,
    ) -> Clean:
        """Run the model as it is, without gradients; with `final=False` no further than sites and hooks need."""
        tokens = tokens.to(self.device)
        at: dict[str, Tensor] = {}
        entering: dict[int, Tensor] = {}
        wanted = dict.fromkeys([*(hook for site in sites for hook in (site.read, *site.writes)), *hooks])
        starts = {self.start([site]) for site in sites} - {0}
        watches: list[tuple[nn.Module, Watch]] = [(self._watched(hook), _keep(at, hook)) for hook in wanted]
        with torch.no_grad(), self._in_one_piece(self._blocks, watches):
            leaving = {self._blocks[i - 1]: _keep(entering, i) for i in starts}
            found = self._run(tokens, watches, leaving, stop=not final)
        self._check_called(at, wanted)
        return Clean(tokens, at, entering, found if final else None)

    def spliced(
        self,
        clean: Clean,
        where: Where,
        replace: Mapping[Site, Replace],
        hooks: Collection[str] = (),
        final: bool = True,
        reading: Where | None = None,
        checkpoint: bool = False,
    ) -> Spliced:
        """Run on from the earliest write, each module's output in its place at the tokens that count.

        A module is run once, on what the modules before it have left of the stream; modules at one and the same hook in the
        order given (see `in_order`). Outputs of several modules at one hook, none of which reads there, add up. The model's
        own activation stays at all other tokens. Modules are given those tokens only, or, for modules that look back, all that are
        in `reading`; what they return is of the tokens that count either way. To `checkpoint` is to keep, for the backward pass,
        only what enters the blocks that have no hook of this pass inside, and to run them again there.
        """
        sites, reading = list(replace), reading or where
        start = self.start(sites)
        outputs: dict[tuple[Site, str], Tensor] = {}
        watches: list[tuple[nn.Module, Watch]] = []
        for site in sites:
            if self._block(site.read) < start:
                # Nothing before the earliest write has changed.
                _read(clean.at[site.read], site, replace[site], reading, outputs)
            elif site.is_sae:
                watches.append(
                    (self._watched(site.read), partial(_read_and_write, site, replace[site], reading, where))
                )
            else:
                read = partial(_read, site=site, function=replace[site], reading=reading, outputs=outputs)
                watches.append((self._watched(site.read), read))
        for hook in dict.fromkeys(hook for site in sites if not site.is_sae for hook in site.writes):
            writers = [site for site in sites if hook in site.writes and not site.is_sae]
            watches.append((self._watched(hook), partial(_write_sum, hook, writers, where, outputs)))
        at: dict[str, Tensor] = {}
        watches += [(self._watched(hook), _keep(at, hook)) for hook in hooks]
        with (
            standing_in(self._blocks[:start], clean.entering.get(start), self._in_tuple),
            self._in_one_piece(self._blocks[start:], watches, checkpoint),
        ):
            found = self._run(clean.tokens, watches, stop=not final)
        return Spliced(at, found if final else None)

    def _run(
        self,
        tokens: Int[Tensor, "batch pos"],
        watches: Sequence[tuple[nn.Module, Watch]] = (),
        leaving: Mapping[nn.Module, Watch] = MappingProxyType({}),
        stop: bool = False,
    ) -> Tensor | None:
        """One forward pass under `watches`: what the unembedding takes, or all logits where that could not be told.

        It ends before the unembedding, or, if it is to `stop`, when all of `watches` have been called (None then). `leaving`
        see what a block returns before anybody's hooks on it, as these run on what a stand-in returns, too.
        """
        final: list[Tensor] = []
        waiting = [*watches, *leaving.items()]

        def stop_if_done(called: tuple[nn.Module, Watch], activation: Tensor) -> Tensor | None:
            new = called[1](activation)
            if called in waiting:
                waiting.remove(called)
            if stop and not waiting:
                raise _Done
            return new

        def keep_final(module: nn.Module, args: tuple[Any, ...]) -> None:
            final.append(given_to(module, args))
            raise _Done

        def stopping(watched: Iterable[tuple[nn.Module, Watch]]) -> list[tuple[nn.Module, Watch]]:
            return [(watch[0], partial(stop_if_done, watch)) for watch in watched]

        with ExitStack() as stack:
            stack.enter_context(watching(stopping(leaving.items()), first=True))
            stack.enter_context(watching(stopping(watches)))
            if self._unembed is not None:
                stack.callback(self._unembed.register_forward_pre_hook(keep_final).remove)
            try:
                return logits_of(self._root(tokens, **self._kwargs))
            except _Done:
                return final[0] if final else None

    @contextmanager
    def _in_one_piece(
        self, blocks: Sequence[nn.Module], watches: Sequence[tuple[nn.Module, Watch]], checkpoint: bool = False
    ) -> Iterator[None]:
        """Run the blocks that no watch looks into compiled, if the model is, and checkpointed, if they are to be."""
        free = unwatched(blocks, [module for module, _ in watches])
        of_free = {block: self._compiled[block] for block in free if block in self._compiled}
        with running_as(of_free), checkpointed(free if checkpoint else ()):
            yield

    def _watched(self, hook_name: str) -> nn.Module:
        """The module at which a hook is watched: for what enters a block, the block before, which it leaves."""
        module = self.hooks[hook_name]
        return self._left_by.get(module, module)

    def start(self, sites: Collection[Site]) -> int:
        """The block to resume at: that of the earliest write. 0 if the model is run whole."""
        return min(self._block(hook) for site in sites for hook in site.writes) if self._blocks else 0

    def _block(self, hook_name: str) -> int:
        """The block that a hook is in, or that its activation enters: len(blocks) after the last, 0 before the first."""
        places = self._places
        if hook_name not in places:
            self.check_hook(hook_name)
            module = self.hooks[hook_name]
            inside = [i for i, block in enumerate(self._anatomy.blocks) if _contains(block, module)]
            if module in self._anatomy.blocks:
                places[hook_name] = self._anatomy.blocks.index(module) + 1
            elif inside:
                places[hook_name] = inside[0]
            else:
                last = len(self._anatomy.blocks)
                places[hook_name] = last if last and self._comes_after(module, self._anatomy.blocks[-1]) else 0
        return places[hook_name]

    def _comes_after(self, module: nn.Module, block: nn.Module) -> bool:
        called: list[nn.Module] = []
        watches = [(m, partial(lambda m, _: called.append(m), m)) for m in (module, block)]
        with torch.no_grad():
            self._run(self.probe_tokens(4), watches)
        return called[:1] == [block] and module in called

    @torch.no_grad()
    def order(self, hooks: Collection[str]) -> dict[str, int]:
        """When each hook is called, from 0 on. Raises ValueError for one that the model has and does not call."""
        called: dict[str, Tensor] = {}
        watches = [(self.hooks[hook], _keep(called, hook)) for hook in hooks]
        self._run(self.probe_tokens(4), watches, stop=True)
        self._check_called(called, hooks)
        return {hook: number for number, hook in enumerate(called)}

    def _check_called(self, called: Mapping[str, Tensor], wanted: Collection[str]) -> None:
        for hook in wanted:
            if hook not in called:
                raise ValueError(
                    f"the model has a hook {hook!r} but does not call it; TransformerLens calls some only if the "
                    "model's config turns them on, such as use_attn_result for attn.hook_result"
                )

    @torch.no_grad()
    def _blocks_can_stand_in(self) -> bool:
        """Whether the model computes the same to the last bit when all blocks, or all but the last, stand in."""
        if not self._blocks:
            return False
        left: dict[nn.Module, Any] = {}
        many = [self._blocks[:n] for n in (len(self._blocks) - 1, len(self._blocks)) if n > 0]
        keep = [
            blocks[-1].register_forward_hook(lambda module, _, out: left.update({module: out}), prepend=True)
            for blocks in many
        ]
        try:
            final = self._run(self.probe_tokens(8))
        finally:
            for handle in keep:
                handle.remove()
        for blocks in many:
            output = left[blocks[-1]]
            self._in_tuple = isinstance(output, tuple)
            try:
                with standing_in(blocks, first_output(output), self._in_tuple):
                    again = self._run(self.probe_tokens(8))
            except Exception:
                return False
            if final is None or again is None or not torch.equal(final, again):
                return False
        return True

    @torch.no_grad()
    def _outputs_at_inputs(self) -> dict[nn.Module, nn.Module]:
        """For each hook that is inside a block and sees what enters it, the block before, where the two see the same."""
        pairs = zip(self._blocks, self._anatomy.enters[1:], strict=False)
        blocks = {self.hooks[hook]: block for block, hook in pairs if hook is not None}
        if not blocks:
            return {}
        seen: dict[nn.Module, Tensor] = {}
        modules = dict.fromkeys([*blocks, *blocks.values()])
        self._run(self.probe_tokens(8), [(module, _keep(seen, module)) for module in modules])
        return {m: block for m, block in blocks.items() if m in seen and torch.equal(seen[m], seen[block])}

    def _warn_if_run_whole(self) -> None:
        kind = type(self._root).__name__
        unknown = [
            *(["blocks, so each spliced pass runs all of it"] if not self._blocks else []),
            *(["unembedding, so all logits of a batch are held at once"] if self._unembed is None else []),
        ]
        if unknown:
            warnings.warn(f"{kind}: could not tell its {'; nor its '.join(unknown)}", stacklevel=4)


class _Done(Exception):  # noqa: N818
    """The rest of the forward pass is not needed."""


def _keep(kept: dict[Any, Tensor], key: Any) -> Watch:
    def keep(activation: Tensor) -> None:
        kept[key] = activation

    return keep


def _read(
    activation: Tensor, site: Site, function: Replace, reading: Where, outputs: dict[tuple[Site, str], Tensor]
) -> None:
    for hook, out in function(site.take(reading.take(activation))).items():
        outputs[site, hook] = out


def _read_and_write(site: Site, function: Replace, reading: Where, where: Where, activation: Tensor) -> Tensor:
    rows = where.take(activation)
    given = rows if reading is where else reading.take(activation)
    return where.put(activation, site.put(rows, function(site.take(given))[site.read]))


def _write_sum(
    hook: str, writers: Sequence[Site], where: Where, outputs: Mapping[tuple[Site, str], Tensor], activation: Tensor
) -> Tensor:
    rows = where.take(activation)
    for i, site in enumerate(writers):
        out = outputs[site, hook].to(activation.device, activation.dtype).reshape(rows.shape)
        total = out if i == 0 else total + out  # pyright: ignore[reportPossiblyUnboundVariable]
    return where.put(activation, total)  # pyright: ignore[reportPossiblyUnboundVariable]


def _contains(block: nn.Module, module: nn.Module) -> bool:
    return any(inside is module for inside in block.modules())
