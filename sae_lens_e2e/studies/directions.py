"""The directions in which activations vary most: how well an SAE reconstructs each, and how much the model needs it.

Braun et al. (2024), figures 22 and 23. Position 0 is kept apart, as there: its activation lies so far from all others that a
correlation or an exchange which includes it says nothing about them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.HookedRootModule import HookedRootModule

from sae_lens_e2e.columns import column_of
from sae_lens_e2e.evaluation.running import check_reconstructs, in_prompts, inference, reconstruct
from sae_lens_e2e.evaluation.tokens import excluded_tokens
from sae_lens_e2e.splice import Positions, Site, SplicedModel, Where, check_sites

# Figure 23 shows the first 25. Of the rest, to d_in, a few do: they matter less and less.
N_FIRST, N_SPACED = 25, 15
MEASURES = ("explained_variance", "correlation", "kl", "mean_at_0", "mean_later")

Tokens: TypeAlias = Int[Tensor, "batch pos"]
Vectors: TypeAlias = Float[Tensor, "n_directions d_in"]
Prompts = Sequence[tuple[Tokens, Where]]
"""Batches of tokens, and which of them count."""
Activations: TypeAlias = Iterator[tuple[Float[Tensor, "batch pos *d_act"], Where]]
"""The activations at a hook, a batch at a time."""
Figures = tuple[float | None, ...]


@dataclass(frozen=True, eq=False)
class PrincipalComponents:
    """The directions in which activations vary, of most variance first: unit rows, signed so that the largest entry is positive."""

    n_tokens: int
    mean: Float[Tensor, "d_in"]
    directions: Float[Tensor, "d_in d_in"]
    variance: Float[Tensor, "d_in"]


@dataclass(frozen=True)
class Directions:
    """What becomes of the principal directions of the activations at a hook; every tuple is in the order of `index`.

    `index` counts from 0, the direction of most variance; `explained_variance` is its fraction of the whole. `correlation` is
    Pearson's, between original and reconstructed activation along it, and `kl` the mean KL(clean ‖ ablated) in nats a token
    over `n_kl_tokens`, when all of these have their coordinate along it exchanged; both without position 0. `mean_at_0` and
    `mean_later` are the mean coordinate at position 0, and after it. None stands where there was nothing to measure.
    """

    hook_name: str
    n_tokens: int
    n_kl_tokens: int
    index: tuple[int, ...]
    explained_variance: tuple[float, ...]
    correlation: Figures
    mean_at_0: Figures
    mean_later: Figures
    kl: Figures

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary, from which `from_dict` makes it again."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, figures: Mapping[str, Any]) -> "Directions":
        """The result that `to_dict` was called on."""
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in figures.items()}
        return cls(**values)


@torch.no_grad()
def measure_directions(
    sae: SAE[Any],
    model: HookedRootModule,
    tokens: Dataset | Tensor | Iterable[Tokens],
    *,
    directions: Sequence[int] | None = None,
    n_kl_prompts: int = 16,
    batch_size_prompts: int = 16,
    seed: int = 0,
) -> Directions:
    """How well an SAE reconstructs each principal direction of the activations at its hook, and how much the model needs it.

    `tokens` are batches (batch, pos), or prompts (prompts, pos), or a dataset with a column of tokens, in equal rows. Positions
    outside the metadata's `seqpos_slice` and tokens of its `exclude_special_tokens` keep their activation and count nowhere.
    `directions`, counted from 0, default to `default_directions(d_in)`. The KL is of the first `n_kl_prompts` prompts, whose
    activations are held; 0 leaves it out, as for a second SAE of the same hook: it is the model's alone.

    Raises ValueError, before anything is measured, for a hook, tokens or directions that do not fit.
    """
    metadata, d_in = sae.cfg.metadata, sae.cfg.d_in
    if metadata.hook_name is None:
        raise ValueError("sae.cfg.metadata.hook_name is None; set it to the hook that the SAE was trained at")
    check_reconstructs("sae", sae)
    index = tuple(default_directions(d_in) if directions is None else map(int, directions))
    if not index or len(set(index)) < len(index) or not all(0 <= i < d_in for i in index):
        raise ValueError(f"directions={list(index)} must be different numbers from 0 to {d_in - 1}, and at least one")
    if n_kl_prompts < 0:
        raise ValueError(f"n_kl_prompts={n_kl_prompts} must not be negative; 0 leaves the KL out")
    splice, site = SplicedModel(model), Site.of_sae(metadata.hook_name, metadata.hook_head_index)
    batches = _batches(tokens, batch_size_prompts, splice.n_ctx)
    prompts = [(batch.to(splice.device), counted_positions(batch, sae, model)) for batch in batches]
    n_tokens = sum(where.n for _, where in prompts)
    if n_tokens < 2:
        raise ValueError(f"seqpos_slice and exclude_special_tokens leave {n_tokens} tokens; give more prompts")
    check_sites(splice, {"sae": site}, {"sae": (d_in, d_in)})
    with splice.running(), inference(sae):
        activations = _activations(splice, site, prompts, "Principal components")
        components = pca(site.take(where.take(activation)) for activation, where in activations)
        chosen = components.directions[list(index)]
        reconstructed = _along(chosen, components, sae, site, _activations(splice, site, prompts, "Reconstruction"))
        kl, n_kl_tokens = ablation_kl(splice, site, _first_prompts(prompts, n_kl_prompts), chosen, seed)
    explained_variance = components.variance[list(index)] / components.variance.sum()
    return Directions(
        metadata.hook_name, n_tokens, n_kl_tokens, index, tuple(explained_variance.tolist()), kl=kl, **reconstructed
    )


def directions_frame(results: Mapping[str, Directions]) -> pd.DataFrame:
    """Every direction of every SAE, by name, on a row: sae, hook, direction and what was measured along it."""
    rows = [
        {"sae": name, "hook": found.hook_name, "direction": direction}
        | {measure: getattr(found, measure)[i] for measure in MEASURES}
        for name, found in results.items()
        for i, direction in enumerate(found.index)
    ]
    return pd.DataFrame(rows, columns=["sae", "hook", "direction", *MEASURES]).astype(dict.fromkeys(MEASURES, float))


def default_directions(d_in: int) -> list[int]:
    """Directions worth showing: the first 25, and of the others some 15, farther and farther apart, to the last."""
    spaced = np.geomspace(N_FIRST, d_in - 1, N_SPACED).round() if d_in > N_FIRST else ()
    return sorted({*range(min(N_FIRST, d_in)), *map(int, spaced)})


def pca(activations: Iterable[Float[Tensor, "tokens d_in"]]) -> PrincipalComponents:
    """Principal components of activations given a batch at a time, centred; each batch is seen once, and none is kept.

    In float64, merging each batch's mean and scatter matrix into the whole's. Raises ValueError if there are not two different
    activations, or one is not finite.
    """
    n, mean, scatter = 0, torch.zeros(()), torch.zeros(())
    for batch in activations:
        if len(batch) == 0:
            continue
        x = batch.cpu().double() if batch.device.type == "mps" else batch.double()
        shift, centred = x.mean(0) - mean, x - x.mean(0)
        scatter = scatter + centred.T @ centred + torch.outer(shift, shift) * (n * len(x) / (n + len(x)))
        n += len(x)
        mean = mean + shift * (len(x) / n)
    if not bool(scatter.isfinite().all()):
        raise ValueError("the activations are not all finite; run the model in float32 or bfloat16")
    if n < 2 or not bool(scatter.any()):
        raise ValueError(f"principal components need two different activations, of {n} tokens none differ; give others")
    variance, directions = torch.linalg.eigh(scatter.cpu() / (n - 1))
    variance, directions = variance.flip(0).clamp(min=0), directions.T.flip(0)
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return PrincipalComponents(n, mean.cpu(), directions * largest.sign(), variance)


@torch.no_grad()
def ablation_kl(
    splice: SplicedModel, site: Site, prompts: Prompts, directions: Vectors, seed: int = 0
) -> tuple[Figures, int]:
    """KL(clean ‖ ablated) in nats a token when a direction is resampled, for each direction, and over how many tokens.

    The resample ablation of figure 23: each counted token after position 0 gets the coordinate along the direction of another,
    drawn once for all directions, and keeps the rest of its activation. Only what follows the hook is run again.
    """
    cleans = [(splice.clean(tokens, [site]), _later(where)) for tokens, where in prompts]
    sizes = [where.n for _, where in cleans]
    n_tokens = sum(sizes)
    if n_tokens < 2:
        return (None,) * len(directions), 0
    counted = torch.cat([site.take(where.take(clean.at[site.read])) for clean, where in cleans])
    directions = directions.to(counted.device, torch.promote_types(counted.dtype, torch.float32))
    coordinates = counted.to(directions) @ directions.T
    # One round through all tokens in random order, so that none is its own source.
    order = torch.randperm(n_tokens, generator=torch.Generator().manual_seed(seed)).to(counted.device)
    source = torch.empty_like(order).index_put((order,), order.roll(1))
    changes = coordinates[source] - coordinates

    def kl_of(direction: Tensor, change: Tensor) -> float:
        kl: list[Tensor] = []
        for (clean, where), moved in zip(cleans, change.split(sizes), strict=True):

            def ablated(x: Tensor, moved: Tensor = moved) -> dict[str, Tensor]:
                return {site.read: x.to(direction) + moved[:, None] * direction}

            spliced = splice.spliced(clean, where, {site: ablated})
            assert clean.final is not None
            assert spliced.final is not None
            final = where.take(spliced.final)
            weights = torch.full((len(final),), 1 / n_tokens, device=final.device)
            kl.append(splice.unembedding.kl(final, where.take(clean.final), weights))
        return float(torch.stack(kl).sum())

    by_direction = zip(tqdm(directions, "KL by direction", leave=False), changes.T, strict=True)
    return tuple(kl_of(direction, change) for direction, change in by_direction), n_tokens


def _batches(
    tokens: Dataset | Tensor | Iterable[Tokens], batch_size_prompts: int, n_ctx: int | None = None
) -> list[Tokens]:
    """Prompts in batches: as they are if they come in batches, else `batch_size_prompts` at a time.

    Raises ValueError if there are none, their lengths differ within a batch, or one is longer than `n_ctx` tokens.
    """
    if batch_size_prompts < 1:
        raise ValueError(f"batch_size_prompts={batch_size_prompts} must be at least 1")
    if isinstance(tokens, Tensor):
        tokens = tokens.split(batch_size_prompts)
    elif isinstance(tokens, Dataset):
        column = column_of(tokens.column_names)
        if not column.is_tokens:
            raise ValueError(f"the dataset holds text, in its column {column.name!r}; tokenise it first")
        rows: Any = tokens.with_format("torch", columns=[column.name])
        tokens = (batch[column.name] for batch in rows.iter(batch_size_prompts))
    batches = [batch for batch in tokens if len(batch)]
    for batch in batches:
        if not isinstance(batch, Tensor) or batch.ndim != 2 or batch.is_floating_point():
            raise ValueError("tokens must be ids in batches (batch, pos), rows of one length; cut or pack them")
        if n_ctx is not None and batch.shape[1] > n_ctx:
            raise ValueError(f"prompts of {batch.shape[1]} tokens exceed the model's context of {n_ctx}; cut them")
    if not batches:
        raise ValueError("there are no prompts among the tokens; give at least one")
    return batches


def counted_positions(tokens: Tokens, sae: SAE[Any], model: HookedRootModule) -> Where:
    """The tokens that an SAE was trained on: inside its metadata's `seqpos_slice`, and not excluded."""
    metadata = sae.cfg.metadata
    excluded = excluded_tokens(metadata.exclude_special_tokens, model)
    return Positions(tuple(metadata.seqpos_slice or (None,)), excluded).of(tokens)


def _along(
    directions: Vectors, components: PrincipalComponents, sae: SAE[Any], site: Site, activations: Activations
) -> dict[str, Figures]:
    """The correlation of original and reconstruction along each direction, and the original's mean at position 0 and later."""
    n_at_0, n_later = 0, 0
    sum_at_0, sums = directions.new_zeros(len(directions)), directions.new_zeros(5, len(directions))
    for activation, where in activations:
        x = in_prompts(site, activation)
        _, x_hat = reconstruct(sae, x.to(sae.dtype))
        # About the mean, so that no sum of squares is large beside the variance.
        a, b = ((y.cpu().double() - components.mean) @ directions.T for y in (x, x_hat))
        later = _later(where)
        at_0, a, b = a[:, 0][where.mask[:, 0]], later.take(a), later.take(b)
        sum_at_0 += at_0.sum(0)
        sums += torch.stack([y.sum(0) for y in (a, b, a * a, b * b, a * b)])
        n_at_0, n_later = n_at_0 + len(at_0), n_later + len(a)
    a, b, aa, bb, ab = sums / max(n_later, 1)
    variance_a, variance_b = aa - a**2, bb - b**2
    # Below what float32 resolves, activations do not vary.
    least = 1e-12 * (components.variance.sum() + aa + bb)
    correlation = (ab - a * b) / (variance_a.clamp(least) * variance_b.clamp(least)).sqrt()
    varies = (variance_a > least) & (variance_b > least)
    origin = directions @ components.mean
    return {
        "correlation": tuple(r if ok else None for r, ok in zip(correlation.tolist(), varies.tolist(), strict=True)),
        "mean_at_0": tuple((sum_at_0 / n_at_0 + origin).tolist()) if n_at_0 else (None,) * len(directions),
        "mean_later": tuple((a + origin).tolist()) if n_later else (None,) * len(directions),
    }


def _later(where: Where) -> Where:
    """Without position 0."""
    return Where(where.mask & (torch.arange(where.mask.shape[1]) > 0))


def _activations(splice: SplicedModel, site: Site, prompts: Prompts, description: str) -> Activations:
    for tokens, where in tqdm(prompts, description, leave=False):
        yield splice.clean(tokens, [site], final=False).at[site.read], where


def _first_prompts(prompts: Prompts, n_prompts: int) -> Prompts:
    """Those batches that hold the first prompts, the last of them cut."""
    kept = []
    for tokens, where in prompts:
        if n_prompts > 0:
            kept.append((tokens[:n_prompts], Where(where.mask[:n_prompts])))
        n_prompts -= len(tokens)
    return kept
