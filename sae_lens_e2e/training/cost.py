"""What training costs in floating-point operations: counted from shapes, not timed."""

from collections.abc import Mapping
from typing import Any

from sae_lens.saes.sae import SAEConfig

from sae_lens_e2e.architectures.transcoder import widths_of
from sae_lens_e2e.objectives import Objective
from sae_lens_e2e.objectives.plugins import said_of
from sae_lens_e2e.splice import ModelFlops, Site, SplicedModel
from sae_lens_e2e.training.course import checked_passes
from sae_lens_e2e.training.multi_config import E2EMultiRunnerConfig
from sae_lens_e2e.training.stages import AnyObjective, stages_of


def training_flops(cfg: Any, objective: AnyObjective, model: SplicedModel) -> float:
    """FLOPs of a run of these settings (an `E2ERunnerConfig`'s or an `E2EMultiRunnerConfig`'s) on a model, stage by stage.

    objective: the config's, with its hooks resolved. Raises ValueError as `flops_per_token` does.
    """
    several = isinstance(cfg, E2EMultiRunnerConfig)
    saes, sites = (cfg.saes, cfg.sites) if several else ({"sae": cfg.sae}, {"sae": cfg.site})
    stages = stages_of(objective)
    # Positions outside of seqpos_slice are run through the model and trained on by nobody.
    counts = (cfg.context_size, cfg.trained_context_size)
    return sum(
        rate.steps * cfg.train_batch_size_tokens * flops_per_token(objective, model, saes, sites, *counts)
        for objective, rate in zip(stages.objectives, stages.learning_rates(cfg), strict=True)
    )


def flops_per_token(
    objective: Objective,
    model: SplicedModel,
    saes: Mapping[str, SAEConfig],
    sites: Mapping[str, Site],
    context_size: int,
    trained_positions: int | None = None,
) -> float:
    """FLOPs of training SAEs on one token with an objective, whose hooks are resolved, if they were trained by themselves.

    They are the clean pass as far as it is needed; for each spliced pass a forward pass from the block of the earliest write on and the
    backward pass down to it; the products with the unembedding that `Objective.logit_products` tells; and the SAEs' encoders and
    decoders, dense, in each pass that they are in. A hook inside a block counts as at its end, a scheduled coefficient as if it were
    never 0. Not counted is what is not a product with weights or in attention, what an architecture's auxiliary terms decode, and the
    optimizer. Raises ValueError for an objective that does not say its `logit_products`, and as `ModelFlops` does.
    """
    check_countable(objective)
    lm = ModelFlops(model, context_size)
    ends = [model.blocks_up_to(hook) for hook in objective.hooks]
    reached = [model.blocks_up_to(hook) for site in sites.values() for hook in (site.read, *site.writes)]
    final = objective.compares_logits
    of_prompt = lm.forward(0, lm.n_blocks if final else max([*ends, *reached]))
    of_trained = 0.0
    is_spliced = final or bool(objective.hooks)
    for names in checked_passes(objective, model.names_in_order(sites)):
        in_pass = {name: sites[name] for name in names}
        later = later_reads(model, in_pass) if is_spliced else set()
        of_trained += sum(_sae_flops(saes[name], name in later) for name in names)
        if is_spliced:
            end = lm.n_blocks if final else max(ends)
            earliest = min(model.blocks_up_to(hook) for site in in_pass.values() for hook in site.writes)
            compared_up_to = lm.n_blocks if objective.logit_products else max(ends, default=earliest)
            of_prompt += lm.forward(model.start(in_pass.values()), end) + lm.backward(earliest, compared_up_to)
            of_trained += (objective.logit_products or 0) * lm.unembedding
    return of_prompt * context_size / (trained_positions or context_size) + of_trained


def check_countable(objective: AnyObjective) -> None:
    """Raise ValueError for an objective, or a stage's, whose FLOPs are not known, as it does not say its passes."""
    for one in stages_of(objective).objectives:
        if one.logit_products is None:
            raise ValueError(
                f"{said_of(one)} does not say its logit_products, without which its FLOPs cannot be counted; give the class that property, or "
                "compare at equal: tokens"
            )


def later_reads(model: SplicedModel, sites: Mapping[str, Site]) -> set[str]:
    """The SAEs of a spliced pass that read what an earlier one has changed, through which the gradient goes on to that."""
    if len(sites) < 2:
        return set()
    order = model.order({hook for site in sites.values() for hook in (site.read, *site.writes)})
    first = min(order[hook] for site in sites.values() for hook in site.writes)
    return {name for name, site in sites.items() if order[site.read] > first}


def _sae_flops(cfg: SAEConfig, reads_gradient: bool) -> float:
    """Of one token: each weight matrix is used forward and for its own gradient, the decoder for its features' too."""
    d_in, d_out = widths_of(cfg)
    # b_dec, where it is subtracted from the input, has its gradient through the encoder.
    inputs = 3 if reads_gradient or cfg.apply_b_dec_to_input else 2
    skip = d_in * d_out if "skip" in cfg.architecture() else 0
    return 2.0 * (inputs * (d_in * cfg.d_sae + skip) + 3 * cfg.d_sae * d_out)  # pyright: ignore[reportAttributeAccessIssue]
