"""What the runners of one SAE and of several have in common: the model, the objective, metadata, saving."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from sae_lens import logger
from sae_lens.saes.sae import SAE, TrainingSAE
from sae_lens.util import extract_layer_from_tlens_hook_name

from sae_lens_e2e._upstream import InterruptedException
from sae_lens_e2e.architectures.transcoder import widths_of
from sae_lens_e2e.objectives import CrossEntropy
from sae_lens_e2e.splice import Compilation, Site, SplicedModel, check_sites, excluded
from sae_lens_e2e.splice.bridge import MODEL_CLASS as BRIDGE
from sae_lens_e2e.splice.bridge import hooked_transformer_hook, is_bridge, load_bridge
from sae_lens_e2e.splice.hooked_transformer import official_model_name
from sae_lens_e2e.splice.positions import Positions
from sae_lens_e2e.training import ranks
from sae_lens_e2e.training.cost import training_flops
from sae_lens_e2e.training.group import Group
from sae_lens_e2e.training.plan import StepPlan
from sae_lens_e2e.training.prompts import PromptBatches, interrupting
from sae_lens_e2e.training.same_run import claimed
from sae_lens_e2e.training.stages import AnyObjective, stages_of
from sae_lens_e2e.training.trainer import Log
from sae_lens_e2e.training.wandb_run import logged_to_wandb, unheard

# Of an SAE and the runner config's `sae`: what the runner sets, and how a new SAE starts.
_MAY_DIFFER = ("metadata", "device", "decoder_init_norm", "jumprelu_init_threshold")


class Runner(Protocol):
    """A runner of one SAE or of several, as what they have in common sees it."""

    cfg: Any
    activations_store: Any
    splice: SplicedModel

    def make_group(self, *, log: Log | None = None) -> Group:
        """What it trains; figures go to `log`."""
        ...

    def save_outputs(self, group: Group) -> None:
        """Save what has been trained."""
        ...


def bridge_of(cfg: Any, override_model: Any) -> Any:
    """The model to train on where SAELens cannot load it itself, which is a bridge; else what was given, or None."""
    if override_model is not None or cfg.model_class_name != BRIDGE:
        return override_model
    return load_bridge(cfg.model_name, cfg.llm_device, cfg.model_from_pretrained_kwargs)


@contextmanager
def without_override_warning(overridden: bool) -> Iterator[None]:
    """Keep SAELens from saying that a model it was given cannot be had from the config, where it can."""

    def keep(record: logging.LogRecord) -> bool:
        return "model" not in record.getMessage()

    if overridden:
        logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def resolved_objective(cfg: Any, model: SplicedModel, sites: Mapping[str, Site]) -> AnyObjective:
    """The config's objective, with the hooks that it leaves to the model: those after the last SAE.

    Raises ValueError for a hook that the model does not have.
    """
    assert isinstance(cfg.objective, AnyObjective)
    for site in sites.values():
        for field, hook in site.named_hooks:
            model.check_hook(hook, field)
    last = model.in_order(sites.values())[-1].writes[-1]
    return cfg.objective.resolve(model.later_blocks(last), last)


def check_fits(
    cfg: Any,
    model: SplicedModel,
    store: Any,
    sites: Mapping[str, Site],
    saes: Mapping[str, Any],
    objective: AnyObjective,
) -> None:
    """Raise ValueError, naming the field, for whatever does not fit the model: context, data, SAEs and compared hooks."""
    n_ctx = model.n_ctx
    if n_ctx is not None and cfg.context_size > n_ctx:
        raise ValueError(
            f"context_size={cfg.context_size} is longer than the model's, {n_ctx}; set it to {n_ctx} or less"
        )
    if (predicted := model.unembedding.d_vocab) < (model.d_vocab_in or predicted):
        said = f"the model reads {model.d_vocab_in} tokens and predicts {predicted}"
        if any(isinstance(one, CrossEntropy) for one in stages_of(objective).objectives):
            raise ValueError(f"objective {objective.name!r}: {said}, so the next token may be none of them; use 'e2e'")
        logger.warning(f"{said}; SAEs of it can be trained, and `evaluate`, which needs the next token, refuses them")
    if not store.is_dataset_tokenized and getattr(model.model, "tokenizer", None) is None:
        raise ValueError("the dataset holds text and the model has no tokenizer; tokenise it, or give the model one")
    check_sites(model, sites, {name: widths_of(sae.cfg) for name, sae in saes.items()}, objective.hooks)
    check_pieces(cfg, model, sites, objective)


def check_pieces(cfg: Any, model: SplicedModel, sites: Mapping[str, Site], objective: AnyObjective) -> None:
    """Raise ValueError if there are blocks to be compiled or checkpointed and no pass of training runs one in one piece."""
    asked = [name for name in ("compile_llm", "checkpoint_activations") if getattr(cfg, name)]
    if asked and not model.parts[0]:
        raise ValueError(f"{asked[0]}=True: the blocks of this model could not be told; set it to False")
    of_sites = [hook for site in sites.values() for hook in (site.read, *site.writes)]
    free: set[int] = set()
    for one in stages_of(objective).objectives:
        hooks = [*of_sites, *one.hooks]
        end = len(model.parts[0]) if one.compares_logits else max(map(model.blocks_up_to, hooks))
        free |= {number for number in model.blocks_without(hooks) if number < end}
    if not free and cfg.compile_llm:
        raise ValueError(
            "compile_llm=True: every block that is run has a hook inside, so none is left to compile; set it to False, or take hooks "
            "between blocks"
        )
    if cfg.checkpoint_activations and not any(number >= model.start(sites.values()) for number in free):
        raise ValueError(
            "checkpoint_activations=True: every block that is run after the first SAE has a hook inside, so there is none to checkpoint; set "
            "it to False, or take hooks between blocks"
        )


def check_given_sae(sae: Any, given_as: str, wanted_cfg: Any) -> None:
    """SAELens trains the SAE it is given and looks at the config's no more: refuse one that says otherwise."""
    if not isinstance(sae, TrainingSAE):
        raise TypeError(f"{given_as} is a {type(sae).__name__}, for inference only; pass training_sae_from(...) of it")
    wanted, given = wanted_cfg.to_dict(), sae.cfg.to_dict()
    for name in sorted(wanted.keys() | given.keys()):
        if name not in _MAY_DIFFER and wanted.get(name) != given.get(name):
            raise ValueError(
                f"sae.{name}={wanted.get(name)!r}, but the SAE given as {given_as} has {given.get(name)!r}, which is what would "
                "be trained with; give the config that SAE's own cfg as sae"
            )


def step_plan(runner: Runner) -> StepPlan:
    """How a run works through the tokens of a step."""
    cfg = runner.cfg
    positions = Positions(tuple(cfg.seqpos_slice), excluded(runner.activations_store.exclude_special_tokens))
    return StepPlan(
        cfg.store_batch_size_prompts, positions, cfg.max_grad_norm, cfg.autocast_lm, cfg.checkpoint_activations
    )


def compilation(cfg: Any) -> Compilation | None:
    """How a run has the language model's blocks compiled, if it does."""
    return Compilation(cfg.llm_compilation_mode) if cfg.compile_llm else None


@contextmanager
def without_sae_lens_compilation(cfg: Any) -> Iterator[None]:
    """Keep SAELens from compiling the model's `run_with_cache`, for good, where its blocks are compiled here."""
    compile_llm, cfg.compile_llm = cfg.compile_llm, False
    try:
        yield
    finally:
        cfg.compile_llm = compile_llm


def evaluator_at(site: Site, evaluator: Any) -> Any:
    """SAELens' evaluator during training, for an SAE at a site; None for a transcoder, which it would splice in where that reads."""
    return evaluator if site.is_sae else None


def complete_metadata(
    sae: SAE[Any], cfg: Any, site: Site, model: SplicedModel, objective: AnyObjective, held_out: float | None
) -> None:
    """Add to what SAELens writes into an SAE's metadata: its layer, the objective, its data and cost, and a model that others can load."""
    metadata = sae.cfg.metadata
    metadata.training_tokens = cfg.training_tokens
    # Of models and objectives for which it cannot be counted it is left out.
    with suppress(ValueError):
        metadata.training_flops = training_flops(cfg, objective, model)
    if not site.is_sae:
        metadata.hook_name_out = site.writes[0]
    metadata.use_chat_formatting = cfg.use_chat_formatting
    if held_out is not None:
        metadata.held_out = held_out
    if is_bridge(model.model):
        # SAELens and SAEDashboard load no bridge; where a HookedTransformer computes the same, name that.
        names = {
            key: hooked_transformer_hook(model.model, metadata[key])
            for key in ("hook_name", "hook_name_out")
            if metadata[key] is not None
        }
        if None not in names.values() and official_model_name(cfg.model_name) is not None:
            for key, hook in names.items():
                metadata[key] = hook
            metadata.model_class_name = "HookedTransformer"
            metadata.model_from_pretrained_kwargs = {"center_writing_weights": False}
        else:
            metadata.model_class_name = BRIDGE
    metadata.hook_layer = extract_layer_from_tlens_hook_name(metadata.hook_name)
    metadata.objective = json.loads(json.dumps(objective.to_dict()))


def run(runner: Runner, overwrite: bool) -> None:
    """Train a runner's group and save what comes of it, with all that SAELens' runners do around it.

    Raises, before training, what `claimed` and `logged_to_wandb` raise.
    """
    cfg = runner.cfg
    silent = unheard if cfg.logger.log_to_wandb else None
    with (
        ranks.on_first(lambda: claimed(cfg, overwrite), None),
        ranks.on_first(lambda: logged_to_wandb(cfg), silent) as log,
    ):
        with ranks.together():
            group = runner.make_group(log=log)
            if cfg.resume_from_checkpoint is not None:
                logger.info(f"Resuming from checkpoint: {cfg.resume_from_checkpoint}")
                group.load_checkpoint(cfg.resume_from_checkpoint)
                runner.activations_store.load_from_checkpoint(cfg.resume_from_checkpoint)
        with runner.splice.running(compilation(cfg)):
            _fit_interruptibly(group)
        ranks.first(lambda: runner.save_outputs(group))


def _fit_interruptibly(group: Group) -> None:
    """Train; on Ctrl-C or SIGTERM finish the step, write a checkpoint that can be resumed from, and raise."""
    assert isinstance(group.first.data_provider, PromptBatches)
    with interrupting(group.first.data_provider):
        try:
            group.fit()
        except InterruptedException:
            path = group.first.cfg.checkpoint_path
            if path is not None:
                logger.warning(
                    f"interrupted; to go on, set resume_from_checkpoint to {path}/{group.first.n_training_samples}"
                )
            raise
