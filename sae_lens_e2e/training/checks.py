"""What a runner config says that cannot be honoured, for one SAE and for several."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from sae_lens.config import LanguageModelSAERunnerConfig
from sae_lens.saes.sae import TrainingSAEConfig
from sae_lens.util import extract_layer_from_tlens_hook_name

from sae_lens_e2e.objectives import Objective
from sae_lens_e2e.splice.bridge import MODEL_CLASS as BRIDGE
from sae_lens_e2e.splice.bridge import check_has_bridge
from sae_lens_e2e.training.statistics import ESTIMATED

MODEL_CLASSES = ("HookedTransformer", BRIDGE, "AutoModelForCausalLM")

# Order of the hooks in a TransformerLens block; those between the first and the last are not told apart by name.
_FIRST_IN_BLOCK, _LAST_IN_BLOCK = "hook_resid_pre", "hook_resid_post"
_NOT_NEGATIVE = ("l1_coefficient", "l0_coefficient", "aux_loss_coefficient", "sparsity_coefficient")


def check_meaning(cfg: Any, objective: Objective, saes: Mapping[str, TrainingSAEConfig]) -> None:
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
    if cfg.compile_llm:
        raise ValueError(
            "compile_llm=True: the language model is run in two parts that SAELens cannot compile; set it to False"
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
    if cfg.model_class_name not in MODEL_CLASSES:
        raise ValueError(f"model_class_name={cfg.model_class_name!r} must be one of {', '.join(MODEL_CLASSES)}")
    if cfg.model_class_name == BRIDGE:
        check_has_bridge()


def check_values(cfg: Any, saes: Mapping[str, TrainingSAEConfig]) -> None:
    """Raise ValueError, naming it, for a number out of its range."""
    for name in ("context_size", "train_batch_size_tokens", "store_batch_size_prompts", "training_tokens"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"{name}={getattr(cfg, name)!r} must be at least 1")
    if not cfg.max_grad_norm > 0:
        raise ValueError(f"max_grad_norm={cfg.max_grad_norm!r} must be positive; float('inf') turns clipping off")
    numbers = [("lr", cfg.lr)]
    for sae_name, sae in saes.items():
        of = f"saes[{sae_name!r}]." if len(saes) > 1 else ""
        numbers += [(of + name, getattr(sae, name)) for name in _NOT_NEGATIVE if hasattr(sae, name)]
    for name, value in numbers:
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}={value!r} must be a finite number that is not negative")


def check_hook_order(cfg: Any, objective: Objective, hook_name: str) -> None:
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
    trained_context = trained_context_size(cfg)
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


def trained_context_size(cfg: Any) -> int:
    """Positions of each prompt that lie inside `seqpos_slice`."""
    return len(range(cfg.context_size)[slice(*cfg.seqpos_slice)])


def _default(name: str) -> Any:
    defaults = {f.name: f.default for f in fields(LanguageModelSAERunnerConfig)}
    assert defaults[name] is not MISSING
    return defaults[name]
