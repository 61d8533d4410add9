"""Evaluate SAEs on tokens they were not trained on, in one pass over the data."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from sae_lens import SAE, logger
from sae_lens.config import HfDataset
from transformer_lens.HookedRootModule import HookedRootModule

from sae_lens_e2e.architectures.transcoder import widths_of
from sae_lens_e2e.errors import kept_to, one_line
from sae_lens_e2e.evaluation.one_pass import OnePass
from sae_lens_e2e.evaluation.options import EvaluationOptions
from sae_lens_e2e.evaluation.reading import read_through, settings_of
from sae_lens_e2e.evaluation.result import Evaluation
from sae_lens_e2e.evaluation.tokens import token_batches
from sae_lens_e2e.splice import Site, SplicedModel, check_sites


def evaluate(sae: SAE[Any], model: HookedRootModule, dataset: HfDataset, **options: Any) -> Evaluation:
    """What `sae` costs the language model, what it keeps of its activations, and how its features fire.

    sae: any SAE or transcoder of SAELens, trained or in training, whose metadata say where it sits and which tokens it saw.
    dataset: one split, tokenised (`tokens` or `input_ids`) or text, read as SAELens reads it for training.
    options: fields of `EvaluationOptions`: batch_size_prompts, downstream_hooks, n_batches, max_tokens, context_size,
        alive_tokens, model_kwargs, verbose.

    The data are read once, and memory does not grow with their size. Definitions are SAELens' where its `run_evals` has the
    figure; those of `Evaluation` say so. Raises ValueError before any long work for a hook the model does not have, an SAE
    that does not fit it, metadata that are missing, and a dataset that is empty or shorter than one batch.
    """
    return evaluate_many({"sae": sae}, model, dataset, **options)["sae"]


@torch.no_grad()
def evaluate_many(
    saes: Mapping[str, SAE[Any]], model: HookedRootModule, dataset: HfDataset, **options: Any
) -> dict[str, Evaluation]:
    """`evaluate` for several SAEs by name, each alone: they share the model's clean pass, and its ablation where they sit.

    They may sit at different hooks; `downstream_hooks` have to come after all of them. Raises ValueError, besides what `evaluate`
    raises it for, if the SAEs read tokens differently.
    """
    chosen = EvaluationOptions(**options)
    setting, settings = settings_of(saes, model, chosen)
    spliced = SplicedModel(model, chosen.model_kwargs)
    setting.check(spliced.n_ctx)
    later: dict[Site, list[str]] = {}
    for name, one in settings.items():
        with _named(name if len(saes) > 1 else None):
            hooks = chosen.downstream_hooks
            later[one.site] = spliced.later_layers(one.site.writes[-1]) if hooks is None else list(hooks)
            check_sites(spliced, {name: one.site}, {name: widths_of(saes[name].cfg)}, later[one.site])
    one_pass = OnePass(spliced, saes, settings, later, chosen.alive_tokens)
    batches = token_batches(dataset, model, setting, chosen.batch_size_prompts)
    read = read_through(batches, spliced, saes, setting, chosen, one_pass.add)
    return {name: one_pass.evaluation(name, read) for name in saes}


def evaluate_each(
    saes: Mapping[str, SAE[Any]],
    model: HookedRootModule,
    dataset: HfDataset,
    on_failure: Callable[[str, Exception], None],
    **options: Any,
) -> dict[str, Evaluation]:
    """`evaluate_many` of those SAEs that can be evaluated: in one pass, or one at a time if any stops the others.

    Each that cannot is given to `on_failure`, with why.
    """
    if len(saes) > 1:
        try:
            return evaluate_many(saes, model, dataset, **options)
        except Exception as error:
            logger.warning(f"the SAEs cannot be evaluated together, so each is alone ({one_line(error)})")
    results: dict[str, Evaluation] = {}
    for name, sae in saes.items():
        with kept_to(name, on_failure):
            results |= evaluate_many({name: sae}, model, dataset, **options)
    return results


@contextmanager
def _named(name: str | None) -> Iterator[None]:
    """Say which SAE a ValueError is about, where there are several."""
    try:
        yield
    except ValueError as error:
        if name is None:
            raise
        raise ValueError(f"{name}: {error}") from error
