"""Evaluate SAEs on tokens they were not trained on, in one pass over the data."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.config import HfDataset
from tqdm.auto import tqdm
from transformer_lens.HookedRootModule import HookedRootModule

from sae_lens_e2e.evaluation.one_pass import OnePass
from sae_lens_e2e.evaluation.result import Evaluation
from sae_lens_e2e.evaluation.running import check_evaluable, inference
from sae_lens_e2e.evaluation.tokens import Setting, token_batches
from sae_lens_e2e.splice import Splice, frozen, make_splice
from sae_lens_e2e.training.step import StepPlan


def evaluate(
    sae: SAE[Any],
    model: HookedRootModule,
    dataset: HfDataset,
    *,
    batch_size_prompts: int = 16,
    downstream_hooks: Sequence[str] | None = None,
    n_batches: int | None = None,
    max_tokens: int | None = None,
    context_size: int | None = None,
    alive_tokens: int = 500_000,
    model_kwargs: Mapping[str, Any] | None = None,
    verbose: bool = True,
) -> Evaluation:
    """What `sae` costs the language model, what it keeps of its activations, and how its features fire.

    sae: any SAE of SAELens, trained or in training, whose metadata say where it sits and which tokens it saw.
    dataset: one split, tokenised (`input_ids` or `tokens`) or text, read as SAELens reads it for training.
    batch_size_prompts: prompts a forward pass; the last prompts, if they fill no batch, are left out.
    downstream_hooks: later hooks to compare; left out, the input of every later block and the output of the last.
    n_batches, max_tokens: at most so many are evaluated; left out, the whole dataset.
    context_size: tokens a prompt; left out, as in the SAE's metadata.
    alive_tokens: among how many measured tokens a feature has to fire to be alive; by default the paper's 500,000.
    model_kwargs: what the language model's forward pass takes besides tokens.
    verbose: show a progress bar.

    The data are read once, and memory does not grow with their size. Definitions are SAELens' where its `run_evals` has the
    figure; those of `Evaluation` say so. Raises ValueError before any long work for a hook the model does not have, an SAE
    that does not fit it, metadata that are missing, and a dataset that is empty or shorter than one batch.
    """
    return evaluate_many(
        {"sae": sae},
        model,
        dataset,
        batch_size_prompts=batch_size_prompts,
        downstream_hooks=downstream_hooks,
        n_batches=n_batches,
        max_tokens=max_tokens,
        context_size=context_size,
        alive_tokens=alive_tokens,
        model_kwargs=model_kwargs,
        verbose=verbose,
    )["sae"]


@torch.no_grad()
def evaluate_many(
    saes: Mapping[str, SAE[Any]],
    model: HookedRootModule,
    dataset: HfDataset,
    *,
    batch_size_prompts: int = 16,
    downstream_hooks: Sequence[str] | None = None,
    n_batches: int | None = None,
    max_tokens: int | None = None,
    context_size: int | None = None,
    alive_tokens: int = 500_000,
    model_kwargs: Mapping[str, Any] | None = None,
    verbose: bool = True,
) -> dict[str, Evaluation]:
    """`evaluate` for several SAEs at one hook, by name: the model's clean and ablated passes are shared.

    Raises ValueError, besides what `evaluate` raises it for, if the SAEs sit at different hooks or read tokens differently.
    """
    _check_limits(
        batch_size_prompts=batch_size_prompts, n_batches=n_batches, max_tokens=max_tokens, alive_tokens=alive_tokens
    )
    setting = _shared_setting(saes, model, context_size)
    splice = _checked_splice(saes, model, setting, downstream_hooks, model_kwargs)
    batches = token_batches(dataset, model, setting, batch_size_prompts)
    tokens_per_batch = batch_size_prompts * setting.context_size
    limit = _limit(batches.n_batches, n_batches, max_tokens, tokens_per_batch)
    plan = StepPlan(
        batch_size_prompts, setting.seqpos_slice, torch.tensor(setting.exclude_special_tokens, dtype=torch.long)
    )
    one_pass = OnePass(splice, saes, alive_tokens)
    with ExitStack() as stack:
        for context in (frozen(model), *map(inference, saes.values())):
            stack.enter_context(context)
        bar = tqdm(
            desc="Evaluating",
            total=None if limit is None else limit * tokens_per_batch,
            unit="tok",
            unit_scale=True,
            leave=False,
            disable=not verbose,
        )
        stack.enter_context(bar)
        for number, tokens in enumerate(batches, start=1):
            one_pass.add(tokens, plan.trained_positions(tokens))
            bar.update(tokens.numel())
            if number == limit:
                break
    return {name: one_pass.evaluation(name, setting) for name in saes}


def _check_limits(**limits: int | None) -> None:
    for name, value in limits.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")


def _shared_setting(saes: Mapping[str, SAE[Any]], model: HookedRootModule, context_size: int | None) -> Setting:
    """The one setting of all SAEs. Raises ValueError for those that cannot be evaluated, or not together."""
    if not saes:
        raise ValueError("saes is empty; name at least one SAE")
    for name, sae in saes.items():
        check_evaluable(name, sae)
    (first, setting), *others = ((name, Setting.of(sae, model, context_size)) for name, sae in saes.items())
    for name, other in others:
        setting.check_same(other, (first, name))
    return setting


def _checked_splice(
    saes: Mapping[str, SAE[Any]],
    model: HookedRootModule,
    setting: Setting,
    downstream_hooks: Sequence[str] | None,
    model_kwargs: Mapping[str, Any] | None,
) -> Splice:
    """The model, to be spliced at the SAEs' hook. Raises ValueError if that is not there, or an SAE does not fit it."""
    if downstream_hooks is None:
        downstream_hooks = make_splice(model, setting.hook_name, setting.hook_head_index, (), model_kwargs).later_layers
    splice = make_splice(model, setting.hook_name, setting.hook_head_index, downstream_hooks, model_kwargs)
    setting.check_positions(splice.n_ctx)
    tokens = torch.arange(min(4, setting.context_size), device=next(model.parameters()).device)[None]
    for sae in saes.values():
        splice.probe(tokens, sae.cfg.d_in)
    return splice


def _limit(available: int | None, n_batches: int | None, max_tokens: int | None, tokens_per_batch: int) -> int | None:
    """How many batches to evaluate; None for as many as there turn out to be."""
    if max_tokens is not None and max_tokens < tokens_per_batch:
        raise ValueError(
            f"max_tokens={max_tokens} is less than one batch, {tokens_per_batch} tokens; raise it, or lower batch_size_prompts"
        )
    of_tokens = None if max_tokens is None else max_tokens // tokens_per_batch
    return min((limit for limit in (available, n_batches, of_tokens) if limit is not None), default=None)
