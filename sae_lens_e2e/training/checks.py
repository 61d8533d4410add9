"""What a runner config says that cannot be honoured, for one SAE and for several."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from datasets import DatasetDict, IterableDatasetDict
from sae_lens.config import LanguageModelSAERunnerConfig
from sae_lens.saes.sae import TrainingSAEConfig
from sae_lens.util import extract_layer_from_tlens_hook_name
from torch import zeros
from torch.optim import SGD

from sae_lens_e2e.architectures.transcoder import TRANSCODERS, is_transcoder
from sae_lens_e2e.devices import check_device
from sae_lens_e2e.errors import one_line
from sae_lens_e2e.splice import Site
from sae_lens_e2e.splice.bridge import MODEL_CLASS as BRIDGE
from sae_lens_e2e.splice.bridge import check_has_bridge
from sae_lens_e2e.training.field_types import check_types
from sae_lens_e2e.training.stages import AnyObjective, Stage, Stages, stages_of
from sae_lens_e2e.training.statistics import ESTIMATED

MODEL_CLASSES = ("HookedTransformer", BRIDGE, "AutoModelForCausalLM")

# Order of the hooks in a TransformerLens block; those between the first and the last are not told apart by name.
_FIRST_IN_BLOCK, _LAST_IN_BLOCK = "hook_resid_pre", "hook_resid_post"

COMPILATION_MODES = (None, "default", "max-autotune-no-cudagraphs")
SAE_DTYPES = ("float32", "bfloat16", "float64")
SCHEDULERS = ("constant", "cosineannealing", "cosineannealingwarmrestarts")

_BELOW_ONE = ("adam_beta1", "adam_beta2")
# Of runner configs, their logger and the SAEs, by name: what is the least, and how that is said.
_RANGES: tuple[tuple[tuple[str, ...], float, str], ...] = (
    (
        (
            *(
                "context_size",
                "train_batch_size_tokens",
                "store_batch_size_prompts",
                "training_tokens",
                "d_in",
                "d_out",
                "d_sae",
            ),
            *("n_batches_in_buffer", "n_batches_for_norm_estimate", "feature_sampling_window", "n_restart_cycles"),
            *("eval_batch_size_prompts", "n_eval_batches", "wandb_log_frequency", "eval_every_n_wandb_logs"),
            "max_iterations",
        ),
        1,
        "at least 1",
    ),
    (
        (
            *("n_checkpoints", "lr_warm_up_steps", "lr_decay_steps", "dead_feature_window", "l1_warm_up_steps"),
            *("l0_warm_up_steps", "sparsity_warm_up_steps"),
        ),
        0,
        "at least 0",
    ),
    (("k", "lp_norm", "jumprelu_bandwidth", "jumprelu_tanh_scale", "target_l0"), 0, "a finite number above 0"),
    (
        (
            *("lr", "lr_end", "adam_beta1", "adam_beta2", "dead_feature_threshold", "decoder_init_norm"),
            *("l1_coefficient", "l0_coefficient", "aux_loss_coefficient", "sparsity_coefficient", "topk_threshold_lr"),
            *("pre_act_loss_coefficient", "jumprelu_init_threshold", "residual_threshold"),
        ),
        0,
        "a finite number that is not negative",
    ),
)


def check_fields(cfg: Any, declared: type, saes: Mapping[str, TrainingSAEConfig]) -> None:
    """Raise ValueError, naming it, for a field of a run, its logger or its SAEs that is not of its type."""
    check_types(cfg, declared)
    check_types(cfg.logger, type(cfg.logger), "logger.")
    if not isinstance(saes, Mapping):
        raise ValueError(f"saes={saes!r} must be a mapping of each SAE's name to its config")
    for name, sae in saes.items():
        if not isinstance(sae, TrainingSAEConfig):
            raise ValueError(f"saes[{name!r}]={sae!r} must be a TrainingSAEConfig")
        check_types(sae, type(sae), _of(name, saes))


def check_devices(cfg: Any) -> None:
    """Raise ValueError, naming the field, for a device that this machine does not have."""
    for name in ("device", "llm_device", "act_store_device"):
        if (device := getattr(cfg, name)) is not None:
            check_device(name, device)


def check_dataset(override_dataset: Any) -> None:
    """Raise ValueError for a dataset that is given and empty, in whose place SAELens would take the config's."""
    if override_dataset is None:
        return
    if isinstance(override_dataset, DatasetDict | IterableDatasetDict):
        raise ValueError(f"override_dataset has splits ({', '.join(map(str, override_dataset))}); give one of them")
    if next(iter(override_dataset), None) is None:
        raise ValueError("override_dataset is empty; give it rows, or leave it out to train on dataset_path")


class OfWholePrompts:
    """What the config of one SAE and that of several know of their batches, which are whole prompts."""

    context_size: int
    seqpos_slice: tuple[int | None, ...]
    train_batch_size_tokens: int

    @property
    def prompts_per_step(self) -> int:
        """Prompts per optimizer step."""
        return self.train_batch_size_tokens // self.trained_context_size

    @property
    def trained_context_size(self) -> int:
        """Positions of each prompt that lie inside `seqpos_slice`."""
        return len(range(self.context_size)[slice(*self.seqpos_slice)])


def check_meaning(cfg: Any, objective: AnyObjective, saes: Mapping[str, TrainingSAEConfig]) -> None:
    """Raise ValueError, naming it, for a field of SAELens' that has no meaning here."""
    if getattr(cfg, "use_cached_activations", False):
        raise ValueError(
            f"use_cached_activations=True: objective {objective.name!r} is trained on tokens in order, and cached "
            "activations have none; set it to False, or train locally with SAELens' own runner"
        )
    if cfg.prefetch_llm_batches:
        raise ValueError(
            f"prefetch_llm_batches={cfg.prefetch_llm_batches!r}: the language model runs within the training step, not "
            "ahead of it; set it to False"
        )
    if cfg.activations_mixing_fraction != _default("activations_mixing_fraction"):
        raise ValueError(
            f"activations_mixing_fraction={cfg.activations_mixing_fraction!r}: tokens are trained on in order and never "
            "mixed; leave it out"
        )
    estimates = any(sae.normalize_activations in ESTIMATED for sae in saes.values())
    if cfg.n_batches_in_buffer != _default("n_batches_in_buffer") and not estimates:
        raise ValueError(
            f"n_batches_in_buffer={cfg.n_batches_in_buffer!r}: there is no activation buffer; leave it out, and shuffle "
            "the dataset instead"
        )
    if _dtype_name(cfg) not in {"float32", *map(_dtype_name, saes.values())}:
        raise ValueError(
            f"dtype={cfg.dtype!r}: activations are not stored, and an SAE's numbers are its own dtype; leave it out (the language model's "
            "are model_from_pretrained_kwargs={'dtype': ...}, or autocast_lm)"
        )
    if cfg.model_class_name not in MODEL_CLASSES:
        raise ValueError(f"model_class_name={cfg.model_class_name!r} must be one of {', '.join(MODEL_CLASSES)}")
    if cfg.model_class_name == BRIDGE:
        check_has_bridge()
    if cfg.compile_llm:
        _check_compilation(cfg)
    passes = stages_of(objective).objectives
    if cfg.checkpoint_activations and not any(one.compares_logits or one.hooks for one in passes):
        raise ValueError(
            f"checkpoint_activations=True: objective {objective.name!r} runs nothing after the SAE; set it to False"
        )


def _check_compilation(cfg: Any) -> None:
    if cfg.model_class_name == BRIDGE:
        raise ValueError(
            f"compile_llm=True: torch.compile cannot trace the blocks of a {BRIDGE}; set it to False, or take model_class_name="
            "'AutoModelForCausalLM'"
        )
    if cfg.llm_compilation_mode not in COMPILATION_MODES:
        raise ValueError(
            f"llm_compilation_mode={cfg.llm_compilation_mode!r} must be one of {', '.join(map(str, COMPILATION_MODES))}; modes with "
            "CUDA graphs would write over the activations of the clean pass"
        )


def check_values(cfg: Any, saes: Mapping[str, TrainingSAEConfig]) -> None:
    """Raise ValueError, naming it, for a number out of its range."""
    if not cfg.max_grad_norm > 0:
        raise ValueError(f"max_grad_norm={cfg.max_grad_norm!r} must be positive; float('inf') turns clipping off")
    _check_ranges(cfg)
    _check_ranges(cfg.logger, "logger.")
    for sae_name, sae in saes.items():
        of = _of(sae_name, saes)
        _check_ranges(sae, of)
        if (k := getattr(sae, "k", None)) is not None and k > sae.d_sae:
            raise ValueError(f"{of}k={k!r} is more than the SAE has features, d_sae={sae.d_sae}; lower it")
        _check_dtype(sae, of, cfg.autocast)
    _check_scheduler(cfg.lr_scheduler_name)


def _check_dtype(sae: TrainingSAEConfig, of: str, autocast: bool) -> None:
    """Raise ValueError for numbers in which an SAE cannot be trained; the language model's are another matter."""
    of = of or "sae."
    dtype, advice = _dtype_name(sae), "set it to 'float32', whatever the language model has"
    if dtype not in SAE_DTYPES:
        raise ValueError(
            f"{of}dtype={sae.dtype!r} must be one of {', '.join(SAE_DTYPES)} (in float16 Adam's second moments vanish); {advice}"
        )
    if dtype == "bfloat16" and sae.architecture() == "gated" and not autocast:
        raise ValueError(
            f"{of}dtype={sae.dtype!r}: the auxiliary loss of 'gated' multiplies float32 activations by its weights; {advice}, or set "
            "autocast=True"
        )


def _dtype_name(config: Any) -> str:
    return str(config.dtype).removeprefix("torch.")


def _check_scheduler(name: str, of: str = "") -> None:
    if name.lower() not in SCHEDULERS:
        raise ValueError(f"{of}lr_scheduler_name={name!r} must be one of {', '.join(SCHEDULERS)}")


def _check_ranges(config: Any, of: str = "") -> None:
    """Raise ValueError for a field of any config that is out of the range that its name has below; None is in every range."""
    for names, low, said in _RANGES:
        for name in names:
            value = getattr(config, name, None)
            if value is None or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if not (math.isfinite(value) and (value > low if "above" in said else value >= low)):
                raise ValueError(f"{of}{name}={value!r} must be {said}")
            if name in _BELOW_ONE and value >= 1:
                raise ValueError(f"{of}{name}={value!r} must be below 1")


def check_sites_of(
    saes: Mapping[str, TrainingSAEConfig], sites: Mapping[str, Site], hooks_out: Mapping[str, str]
) -> None:
    """Raise ValueError, naming the field, for a transcoder that writes no hook of its own, or an SAE that does."""
    for name, sae in saes.items():
        of = f"[{name!r}]" if len(saes) > 1 else ""
        field, architecture = ("hook_names_out" if of else "hook_name_out") + of, sae.architecture()
        site, hook_out = sites[name], hooks_out.get(name)
        if not is_transcoder(sae):
            if hook_out is not None:
                raise ValueError(
                    f"{field}={hook_out!r}: the architecture {architecture!r} stands for what it reads; leave it out, or train one of "
                    f"{', '.join(TRANSCODERS)}"
                )
            continue
        if hook_out is None:
            raise ValueError(
                f"{field} is not set, and a {architecture} reads {site.read!r} to stand for the activation at another hook; name "
                "that hook"
            )
        if hook_out == site.read:
            raise ValueError(
                f"{field}={hook_out!r} is the hook that it reads; name another, or train an SAE, such as 'batchtopk'"
            )
        if site.head_index is not None:
            raise ValueError(
                f"hook_head_index={site.head_index}: a {architecture} takes all heads of its hook; leave it at None"
            )


def check_hook_order(cfg: Any, objective: AnyObjective, hook_name: str) -> None:
    """Raise ValueError for a compared hook that, going by TransformerLens' names, does not come after the SAE's."""
    if cfg.model_class_name == "AutoModelForCausalLM":
        return
    layer = extract_layer_from_tlens_hook_name(hook_name)
    for hook in objective.hooks:
        hook_layer = extract_layer_from_tlens_hook_name(hook)
        if layer is None or hook_layer is None or hook_layer > layer:
            continue
        first, last = hook.endswith(_FIRST_IN_BLOCK), hook_name.endswith(_LAST_IN_BLOCK)
        if hook_layer < layer or hook == hook_name or first or last:
            raise ValueError(f"downstream_hooks: {hook} is not downstream of hook_name={hook_name!r}")


def check_batches(cfg: Any) -> None:
    """Raise ValueError, naming the nearest that can be had, for a batch that is no whole number of forward passes."""
    trained_context = cfg.trained_context_size
    unit = cfg.store_batch_size_prompts * trained_context
    steps, rest = divmod(cfg.train_batch_size_tokens, unit) if unit else (0, 1)
    if rest == 0:
        return
    if not unit:
        raise ValueError(f"seqpos_slice={cfg.seqpos_slice} of context_size={cfg.context_size} leaves no position")
    nearest = " or ".join(str(n * unit) for n in (steps, steps + 1) if n)
    prompts = cfg.train_batch_size_tokens // trained_context
    fits = steps == 0 and prompts * trained_context == cfg.train_batch_size_tokens
    fewer = f", or store_batch_size_prompts to {prompts}" if fits else ""
    raise ValueError(
        f"train_batch_size_tokens={cfg.train_batch_size_tokens} is not a whole number of forward passes of "
        f"store_batch_size_prompts={cfg.store_batch_size_prompts} prompts with {trained_context} tokens each; "
        f"set it to {nearest}{fewer}"
    )


def check_stages(cfg: Any, objective: AnyObjective) -> None:
    """Raise ValueError, naming it, for a stage that is out of order, out of range, or without a step of its own in this run."""
    if not isinstance(objective, Stages):
        return
    before = 0.0
    for number, stage in enumerate(objective.stages):
        of = _of_stage(number)
        check_types(stage, Stage, of)
        _check_ranges(stage, of)
        if stage.lr is not None and not stage.lr > 0:
            raise ValueError(f"{of}lr={stage.lr!r} must be above 0; leave it out for the run's, {cfg.lr!r}")
        if stage.lr_scheduler_name is not None:
            _check_scheduler(stage.lr_scheduler_name, of)
        if not before < stage.until <= 1:
            raise ValueError(
                f"{of}until={stage.until!r} must be above {before:g}, where it begins, and at most 1; stages go forwards"
            )
        before = stage.until
    if before != 1:
        last = len(objective.stages) - 1
        raise ValueError(
            f"{_of_stage(last)}until={before!r}: the last stage must end at 1; set it to 1, or add a stage"
        )
    for number, rate in enumerate(objective.learning_rates(cfg)):
        of = _of_stage(number)
        if rate.steps < 1:
            raise ValueError(
                f"{of}until={objective.stages[number].until!r}: of the {cfg.total_training_steps} steps that "
                f"training_tokens={cfg.training_tokens} makes, the stage has none; train on more tokens, or move until"
            )
        if rate.warm_up_steps + rate.decay_steps > rate.steps:
            raise ValueError(
                f"{of}lr_warm_up_steps={rate.warm_up_steps} and lr_decay_steps={rate.decay_steps} are more than the {rate.steps} steps of "
                "the stage, over which they run; lower them in the stage or in the run"
            )
        try:
            rate.scheduler(SGD([zeros(1)], lr=rate.lr))
        except ValueError as error:
            raise ValueError(f"{of}lr_scheduler_name={rate.scheduler_name!r}: {one_line(error)}") from error


def _of_stage(number: int) -> str:
    return f"objective.stages[{number}]."


def _of(name: str, saes: Mapping[str, Any]) -> str:
    """How the fields of one SAE are named, where there are several."""
    return f"saes[{name!r}]." if len(saes) > 1 else ""


def _default(name: str) -> Any:
    defaults = {f.name: f.default for f in fields(LanguageModelSAERunnerConfig)}
    assert defaults[name] is not MISSING
    return defaults[name]
