"""Whether sparse modules fit a language model: their hooks, their widths, their order and what depends on them."""

from collections.abc import Collection, Mapping
from itertools import combinations

import torch
from torch import Tensor

from sae_lens_e2e.splice.frozen import frozen
from sae_lens_e2e.splice.hooks import unknown_hook
from sae_lens_e2e.splice.model import Clean, Replace, SplicedModel
from sae_lens_e2e.splice.positions import Where
from sae_lens_e2e.splice.site import Site


def check_sites(
    model: SplicedModel, sites: Mapping[str, Site], widths: Mapping[str, tuple[int, int]], hooks: Collection[str] = ()
) -> None:
    """Check on a few tokens, by autograd, that modules fit their hooks and that what is compared does depend on them.

    `sites` and `widths` (each module's d_in and d_out) go by the modules' names, which a message gives where there are several; `hooks` are
    those compared downstream. Raises ValueError in one line, naming the field that is wrong.
    """
    for name, site in sites.items():
        for field, hook in site.named_hooks:
            if hook not in model.hooks:
                raise unknown_hook(_of(name, sites) + field, hook, list(model.hooks))
    for hook in hooks:
        if hook not in model.hooks:
            raise unknown_hook("downstream_hooks", hook, list(model.hooks))
    order = model.order({*hooks, *(hook for site in sites.values() for hook in (site.read, *site.writes))})
    _check_places(model, sites, order)
    with frozen(model.model), torch.enable_grad():
        # Two prompts, so that what is the same for all shows, and a length that is seldom a number of heads.
        clean = model.clean(model.probe_tokens(7).repeat(2, 1), sites.values(), hooks)
        # Attention has a number of heads where others have tokens, and a width that is a number of tokens.
        n_fewer = max(clean.tokens.shape[1] - 1, 1)
        shorter = model.clean(model.probe_tokens(n_fewer).repeat(2, 1), sites.values(), hooks)
        for name, site in sites.items():
            for field, hook in site.named_hooks:
                _check_shape(_of(name, sites) + field, hook, clean, shorter)
            _check_widths(_of(name, sites), site, clean, *widths[name])
        for hook in hooks:
            _check_shape("downstream_hooks", hook, clean, shorter)
        _check_depends(model, clean, sites, hooks, order)


def _of(name: str, sites: Mapping[str, Site]) -> str:
    """Which module a message is about, where that is not plain."""
    return f"{name}: " if len(sites) > 1 else ""


def _check_places(model: SplicedModel, sites: Mapping[str, Site], order: Mapping[str, int]) -> None:
    """Raise ValueError for modules that would write over each other, or read what they have written."""
    for (name, site), (other_name, other) in combinations(sites.items(), 2):
        shared = {id(model.hooks[hook]) for hook in site.writes} & {id(model.hooks[hook]) for hook in other.writes}
        heads = (site.head_index, other.head_index)
        apart = None not in heads and heads[0] != heads[1]
        if shared and not apart and (site.is_sae or other.is_sae):
            raise ValueError(
                f"{name} and {other_name} both write {site.writes[0]}, and only transcoders' outputs add up; "
                "splice them in one at a time, or move one"
            )
    for name, site in sites.items():
        for hook in site.writes:
            if order[hook] < order[site.read]:
                raise ValueError(
                    f"{_of(name, sites)}hook_name={site.read!r} comes after hook_name_out={hook!r}, and a transcoder writes later "
                    "than it reads; swap them"
                )


def _check_shape(field: str, hook: str, *passes: Clean) -> None:
    shapes = [tuple(clean.at[hook].shape) for clean in passes]
    of_tokens = all(
        len(shape) > 2 and shape[:2] == clean.tokens.shape for shape, clean in zip(shapes, passes, strict=True)
    )
    if not of_tokens or len({shape[2:] for shape in shapes}) > 1:
        raise ValueError(
            f"{field}: {hook} has no activation for each token; for {tuple(passes[0].tokens.shape)} of them it is {shapes[0]}; "
            "take one of the residual stream, of an attention's z or of an MLP"
        )


def _check_widths(of: str, site: Site, clean: Clean, d_in: int, d_out: int) -> None:
    head, activation = site.head_index, clean.at[site.read]
    if head is not None and not site.is_sae:
        raise ValueError(f"{of}hook_head_index={head}: a transcoder takes all heads of its hook; leave it at None")
    if head is not None and activation.ndim != 4:
        raise ValueError(f"{of}hook_head_index={head}: {site.read} has no heads; leave hook_head_index at None")
    if head is not None and not 0 <= head < activation.shape[2]:
        raise ValueError(f"{of}hook_head_index={head}: {site.read} has {activation.shape[2]} heads")
    width = site.take(activation.flatten(0, 1)).shape[-1]
    if width != d_in:
        raise ValueError(f"{of}sae.d_in={d_in} does not fit {site.read}, which is {width} wide; set d_in={width}")
    for hook in site.writes:
        if (width := clean.at[hook].flatten(2).shape[-1]) != d_out and not site.is_sae:
            raise ValueError(f"{of}sae.d_out={d_out} does not fit {hook}, which is {width} wide; set d_out={width}")


def _check_depends(
    model: SplicedModel, clean: Clean, sites: Mapping[str, Site], hooks: Collection[str], order: Mapping[str, int]
) -> None:
    """Raise ValueError for a hook, or an output of the model, that a module does not change."""
    where = Where.everywhere(clean.tokens)
    added: dict[str, Tensor] = {}

    def passing(name: str, site: Site) -> Replace:
        """The model's own activations and zeros, which take the gradient, at the module's place in the graph."""

        def function(x: Tensor) -> dict[str, Tensor]:
            own = {hook: x if site.is_sae else site.take(where.take(clean.at[hook])) for hook in site.writes}
            width = next(iter(own.values())).shape[-1]
            added[name] = torch.zeros(width, device=x.device, dtype=x.dtype, requires_grad=True)
            return {hook: activation + added[name] for hook, activation in own.items()}

        return function

    names = {site: name for name, site in sites.items()}
    replace = {site: passing(names[site], site) for site in model.in_order(sites.values())}
    spliced = model.spliced(clean, where, replace, hooks)
    assert spliced.final is not None
    for hook in hooks:
        # A hook in a block that stands in is not called.
        for name in _without_effect(spliced.at.get(hook), added):
            place = sites[name].writes[0]
            raise ValueError(f"downstream_hooks: {hook} is not downstream of {_of(name, sites)}hook_name={place!r}")
        for name, site in sites.items():
            # What leaves a block is before what enters the next, although they are the same.
            if any(model.hooks[hook] is model.hooks[write] or order[hook] < order[write] for write in site.writes):
                raise ValueError(
                    f"downstream_hooks: {hook} is not downstream of {_of(name, sites)}hook_name={site.writes[0]!r}"
                )
    for name in _without_effect(spliced.final, added):
        hook = sites[name].writes[0]
        raise ValueError(f"{_of(name, sites)}hook_name={hook!r}: the model's output does not depend on it")


def _without_effect(value: Tensor | None, added: Mapping[str, Tensor]) -> list[str]:
    """The modules that a value does not depend on."""
    if value is None or not value.requires_grad:
        return list(added)
    grads = torch.autograd.grad(value.sum(), list(added.values()), allow_unused=True, retain_graph=True)
    return [name for name, grad in zip(added, grads, strict=True) if grad is None]
