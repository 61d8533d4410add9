"""How much of a language model's grasp of a task survives its SAE: faithfulness, here on subject-verb agreement.

Braun et al. (2024), table 7. With m the mean logit difference of the right and the wrong continuation,

    faithfulness = (m(SAE spliced in) - m(baseline)) / (m(original model) - m(baseline)),

where in the baseline the activation at the SAE's hook is ablated, as in Marks et al. (2024, arXiv 2403.19647).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import pandas as pd
import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.HookedRootModule import HookedRootModule

from sae_lens_e2e.architectures.transcoder import widths_of
from sae_lens_e2e.evaluation.running import SplicedSAE, check_reconstructs, in_prompts, inference
from sae_lens_e2e.evaluation.tokens import Setting
from sae_lens_e2e.splice import Clean, Replace, Site, SplicedModel, Unembedding, Where, check_sites
from sae_lens_e2e.studies.agreement import agreement_pairs
from sae_lens_e2e.studies.contrast import ContrastPair, PromptBatch, bos_tokens, prompt_batches, tokenize_pairs

Ablation = Literal["mean", "position_mean", "zero"]
_MODELS = ("original", "spliced", "baseline")


@dataclass(frozen=True)
class Performance:
    """How well a model does a task: the mean logit difference, right - wrong, in nats, and how often it is positive."""

    logit_difference: float
    accuracy: float


@dataclass(frozen=True)
class TaskFaithfulness:
    """Faithfulness over some pairs: 1 where the SAE leaves the task as it was, 0 where it is no better than the ablation.

    `low` and `high` bound its 95 % bootstrap interval over pairs, None for a single pair. Where the original model does not do
    the task, all three are None and `note` says so.
    """

    n_pairs: int
    n_prompts: int
    original: Performance
    spliced: Performance
    baseline: Performance
    faithfulness: float | None
    low: float | None
    high: float | None
    note: str | None

    @classmethod
    def from_dict(cls, figures: Mapping[str, Any]) -> "TaskFaithfulness":
        """The result that `dataclasses.asdict` was called on."""
        return cls(**{**figures, **{model: Performance(**figures[model]) for model in _MODELS}})


@dataclass(frozen=True)
class Faithfulness:
    """The faithfulness of an SAE over all pairs, and by the templates they came from.

    `n_left_out` counts the pairs that could not be measured, because a continuation is not a single token.
    """

    hook_name: str
    ablation: Ablation
    n_left_out: int
    overall: TaskFaithfulness
    templates: dict[str, TaskFaithfulness]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary, from which `from_dict` makes it again."""
        return asdict(self)

    @classmethod
    def from_dict(cls, figures: Mapping[str, Any]) -> "Faithfulness":
        """The result that `to_dict` was called on."""
        templates = {name: TaskFaithfulness.from_dict(task) for name, task in figures["templates"].items()}
        overall = TaskFaithfulness.from_dict(figures["overall"])
        return cls(**{**figures, "overall": overall, "templates": templates})


@torch.no_grad()
def faithfulness(
    sae: SAE[Any],
    model: HookedRootModule,
    pairs: Iterable[ContrastPair] | None = None,
    *,
    ablation: Ablation = "mean",
    batch_size: int = 64,
    minimum_gap: float = 0.1,
    n_resamples: int = 1000,
    seed: int = 0,
    model_kwargs: Mapping[str, Any] | None = None,
    verbose: bool = True,
) -> Faithfulness:
    """How faithful an SAE is to its language model on contrast pairs, by default those of `agreement_pairs(model)`.

    ablation: what the baseline has in place of the activation at the hook: its "mean" over all prompts and positions, the
        "position_mean" over the prompts of one template and length at each position, or "zero".
    batch_size: prompts a forward pass, of one template and one length; nothing is padded.
    minimum_gap: by how many nats the original model has to beat the baseline for faithfulness to be defined.
    n_resamples, seed: of the bootstrap.
    model_kwargs: what the language model's forward pass takes besides tokens.
    verbose: show a progress bar.

    A BOS is prepended if the SAE's metadata say so. Positions outside their `seqpos_slice` and tokens that they exclude keep
    their activation in every model and are no part of a mean. A pair counts once, whether it has one prompt or two. Raises
    ValueError, before the model is run on prompts, if the model has no tokenizer, a pair's two prompts differ in length, no
    pair has continuations of one token, or the SAE does not fit the model.
    """
    check_reconstructs("sae", sae)
    _check_options(ablation, batch_size, minimum_gap, n_resamples)
    pairs = agreement_pairs(model) if pairs is None else list(pairs)
    tokenized = tokenize_pairs(model, pairs)
    n_pos = max(len(prompt.tokens) for _, prompts in tokenized for prompt in prompts)
    setting = Setting.of(sae, model, context_size=n_pos)
    bos = bos_tokens(model, setting.prepend_bos)
    splice, site = SplicedModel(model, model_kwargs), setting.site
    if splice.n_ctx is not None and n_pos + len(bos) > splice.n_ctx:
        raise ValueError(
            f"pairs: a prompt has {n_pos + len(bos)} tokens, and the model takes {splice.n_ctx}; leave it out"
        )
    batches = prompt_batches(tokenized, bos, setting.positions, batch_size, splice.device)
    check_sites(splice, {"sae": site}, {"sae": widths_of(sae.cfg)})
    with splice.running(), inference(sae):
        baseline = _baseline(ablation, splice, site, sae.cfg.d_in, batches, verbose)
        bar = tqdm(batches, "Faithfulness", leave=False, disable=not verbose)
        differences = torch.cat([_logit_differences(sae, splice, site, batch, baseline[batch.group]) for batch in bar])
    if not bool(differences.isfinite().all()):
        raise ValueError("logit differences are not all finite; check the SAE's weights, or run the model in float32")
    pair_of = torch.cat([batch.pairs for batch in batches])
    templates = [tokenized[number][0].template for number in pair_of.tolist()]

    def task(chosen: Sequence[bool]) -> TaskFaithfulness:
        prompts = torch.tensor(chosen)
        return _task(differences[prompts], pair_of[prompts], minimum_gap, n_resamples, seed)

    return Faithfulness(
        setting.hook_name,
        ablation,
        n_left_out=len(pairs) - len(tokenized),
        overall=task([True] * len(templates)),
        templates={name: task([name == other for other in templates]) for name in dict.fromkeys(templates)},
    )


def faithfulness_frame(results: Mapping[str, Faithfulness]) -> pd.DataFrame:
    """One row an SAE, by name, and template, the last of each SAE being "overall"; undefined figures are NaN.

    Columns: sae, hook, ablation, template, n_pairs, n_prompts, faithfulness, low, high, note, and for each of the original,
    spliced and baseline models its logit_difference_ (nats) and accuracy_.
    """
    figures = ("n_pairs", "n_prompts", "faithfulness", "low", "high", "note")
    measures = ("logit_difference", "accuracy")
    rows = [
        {"sae": name, "hook": found.hook_name, "ablation": found.ablation, "template": template}
        | {figure: getattr(task, figure) for figure in figures}
        | {f"{measure}_{model}": getattr(getattr(task, model), measure) for measure in measures for model in _MODELS}
        for name, found in results.items()
        for template, task in {**found.templates, "overall": found.overall}.items()
    ]
    columns = ["sae", "hook", "ablation", "template", *figures]
    columns += [f"{measure}_{model}" for measure in measures for model in _MODELS]
    return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(("faithfulness", "low", "high"), float))


@torch.no_grad()
def logit_difference(
    unembedding: Unembedding, hidden: Float[Tensor, "prompts d_final"], choices: Int[Tensor, "prompts 2"]
) -> Float[Tensor, "prompts"]:
    """log p(first) - log p(second) of two next tokens, in nats, from what the unembedding takes; in float32 or better."""
    all_logits = unembedding.logits(hidden)
    logits = all_logits.gather(-1, choices.to(all_logits.device))
    return logits[:, 0] - logits[:, 1]


def _check_options(ablation: str, batch_size: int, minimum_gap: float, n_resamples: int) -> None:
    if ablation not in get_args(Ablation):
        raise ValueError(f"ablation={ablation!r} must be one of {', '.join(get_args(Ablation))}")
    if batch_size < 1 or n_resamples < 1:
        raise ValueError(f"batch_size={batch_size} and n_resamples={n_resamples} must be at least 1")
    if not minimum_gap > 0:
        raise ValueError(f"minimum_gap={minimum_gap} must be more than 0 nats")


def _baseline(
    ablation: Ablation, splice: SplicedModel, site: Site, d_in: int, batches: Sequence[PromptBatch], verbose: bool
) -> dict[tuple[str, int], Float[Tensor, "*pos d_in"]]:
    """What takes the activation's place in each group of prompts: (d_in,), or (pos, d_in) where it depends on the position."""
    if ablation == "zero":
        return {batch.group: torch.zeros(d_in) for batch in batches}
    sums: dict[tuple[str, int], Tensor] = {}
    counts: dict[tuple[str, int], Tensor] = {}
    for batch in tqdm(batches, "Mean activation", leave=False, disable=not verbose):
        x = in_prompts(site, splice.clean(batch.tokens, [site], final=False).at[site.read])
        replaced = batch.where.mask[..., None]
        # In float64, on the CPU for those accelerators that do not have it.
        sums[batch.group] = x.cpu().double().where(replaced, 0).sum(0) + sums.get(batch.group, 0)
        counts[batch.group] = replaced.sum(0) + counts.get(batch.group, 0)
    if ablation == "position_mean":
        return {group: sums[group] / counts[group].clamp(min=1) for group in sums}
    total = torch.stack([by_position.sum(0) for by_position in sums.values()]).sum(0)
    return dict.fromkeys(sums, total / sum(int(count.sum()) for count in counts.values()))


def _logit_differences(
    sae: SAE[Any], splice: SplicedModel, site: Site, batch: PromptBatch, baseline: Tensor
) -> Float[Tensor, "prompts 3"]:
    """Of each prompt, in the original model, with the SAE spliced in, and in the baseline."""
    ablated = batch.where.take(baseline.expand(*batch.tokens.shape, -1))

    def last(clean: Clean, function: Replace, reading: Where | None = None) -> Tensor:
        final = splice.spliced(clean, batch.where, {site: function}, reading=reading).final
        assert final is not None
        return final[:, -1]

    clean = splice.clean(batch.tokens, [site])
    assert clean.final is not None
    finals = [
        clean.final[:, -1],
        last(clean, SplicedSAE(sae, site, batch.where), reading=Where.everywhere(batch.tokens)),
        last(clean, lambda _: {site.read: ablated}),
    ]
    return torch.stack(
        [logit_difference(splice.unembedding, final, batch.choices).cpu().double() for final in finals], dim=-1
    )


def _task(
    differences: Float[Tensor, "prompts 3"],
    pair_of: Int[Tensor, "prompts"],
    minimum_gap: float,
    n_resamples: int,
    seed: int,
) -> TaskFaithfulness:
    """Means over pairs first, then the ratio."""
    pair_of = pair_of.unique(return_inverse=True)[1]
    n_prompts_of = pair_of.bincount()[:, None]
    by_pair = differences.new_zeros(len(n_prompts_of), 3).index_add(0, pair_of, differences) / n_prompts_of
    means, accuracies = by_pair.mean(0), (differences > 0).double().mean(0)
    original, _, baseline = means.tolist()
    defined = original - baseline > minimum_gap
    resampled = defined and len(by_pair) > 1
    low, high = _interval(by_pair, minimum_gap, n_resamples, seed) if resampled else (None, None)
    note = (
        f"undefined: the original model's logit difference of {original:.2f} nats is not {minimum_gap} above the baseline's "
        f"{baseline:.2f}"
    )
    return TaskFaithfulness(
        len(by_pair),
        len(differences),
        *(Performance(*figures) for figures in zip(means.tolist(), accuracies.tolist(), strict=True)),
        faithfulness=float(_ratio(means, minimum_gap)) if defined else None,
        low=low,
        high=high,
        note=None if defined else note,
    )


def _ratio(means: Float[Tensor, "*n 3"], minimum_gap: float) -> Float[Tensor, "*n"]:
    original, spliced, baseline = means.unbind(-1)
    # A resample in which the model hardly does the task must not blow up an interval.
    return (spliced - baseline) / (original - baseline).clamp(min=minimum_gap)


def _interval(
    by_pair: Float[Tensor, "pairs 3"], minimum_gap: float, n_resamples: int, seed: int
) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(seed)
    n = len(by_pair)
    means = [by_pair[torch.randint(n, (n,), generator=generator)].mean(0) for _ in range(n_resamples)]
    bounds = _ratio(torch.stack(means), minimum_gap).quantile(torch.tensor([0.025, 0.975], dtype=by_pair.dtype))
    low, high = bounds.tolist()
    return low, high
