"""The settings of a finetuning run: a short recipe, what the SAEs' metadata say of their model and data, and what is asked for."""

from collections.abc import Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from typing import Any

from sae_lens import SAE, LoggingConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from sae_lens_e2e.loading import model_settings
from sae_lens_e2e.training.config import E2ERunnerConfig
from sae_lens_e2e.training.multi_config import E2EMultiRunnerConfig
from sae_lens_e2e.training.stages import Stage, Stages, objective_of

AnyConfig = E2ERunnerConfig[Any] | E2EMultiRunnerConfig

RECIPE: dict[str, Any] = {"objective": "kl_mse", "lr": 5e-5, "max_grad_norm": 1.0}
"""Karvonen's (2025), but for the schedule: the learning rate falls linearly to 0 over the whole run."""
TRAINING_TOKENS = 25_000_000
"""Where it is not known on how many tokens an SAE was trained: Karvonen's number, 5 % of the usual 500 million."""
FRACTION = 0.05
"""Of the tokens that an SAE was trained on, where that is known."""
BATCH_TOKENS = 4096
"""SAELens' batch, as nearly as whole prompts fill it."""

_PLACE = ("hook_name", "hook_head_index", "hook_name_out")
_DATA = (
    *("dataset_path", "context_size", "prepend_bos", "seqpos_slice", "exclude_special_tokens"),
    *("sequence_separator_token", "disable_concat_sequences", "use_chat_formatting"),
)
NOT_ASKED = ("sae", "from_pretrained_path", "use_cached_activations", "cached_activations_path", "evaluator")
"""What a finetune decides itself: the SAE, and where its weights come from."""
# Settings that a run has as well.
_OF_RUN_TOO = ("device", "dtype", "metadata")


def run_fields() -> set[str]:
    """The fields of the runner config that a finetune takes."""
    return {f.name for f in fields(E2ERunnerConfig)} - set(NOT_ASKED)


def sae_fields() -> set[str]:
    """The settings that training SAEs have, of whatever architecture."""
    configs = [config for _, config in SAE_TRAINING_CLASS_REGISTRY.values()]
    return {f.name for config in configs for f in fields(config)} - set(_OF_RUN_TOO)


def split(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is asked of the run, and of the training SAEs. Raises ValueError for a setting of neither, with the nearest name."""
    run, sae = run_fields(), sae_fields()
    for name, value in settings.items():
        if name not in run | sae:
            near = get_close_matches(name, run | sae, n=1)
            meant = f"; did you mean {near[0]}?" if near else "; see sae-lens-e2e finetune --help"
            raise ValueError(f"{name}={value!r} is no setting of a finetune{meant}")
    return (
        {name: value for name, value in settings.items() if name in run},
        {name: value for name, value in settings.items() if name not in run},
    )


def run_settings(
    saes: Mapping[str, SAE[Any]],
    asked: Mapping[str, Any],
    training_tokens: int | None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """The fields of the runner config but for the SAEs and their places, from metadata and what is asked for.

    `training_tokens` is what the SAEs were trained on, if that is known. Raises ValueError for what the metadata lack, what they may
    not say (`model_settings`), and what several SAEs have differently.
    """
    each = {name: _from_metadata(sae.cfg.metadata, asked, trust_remote_code) for name, sae in saes.items()}
    (first, settings), *others = each.items()
    for other, theirs in others:
        for field in settings | theirs:
            if settings.get(field) != theirs.get(field) and field not in asked:
                raise ValueError(
                    f"{first} and {other} differ in {field} ({settings.get(field)!r} and {theirs.get(field)!r}), and SAEs that are "
                    f"finetuned together read the same; say which with {field}=, or finetune them apart"
                )
    for field in ("dataset_path", "context_size"):
        if not asked.get(field) and not settings.get(field):
            raise ValueError(f"{first}: the SAE's metadata name no {field}; say which, with {field}= (--{field})")
    settings |= {**RECIPE, "n_checkpoints": 0, "logger": LoggingConfig(log_to_wandb=False), **asked}
    return settings | _amounts(settings, training_tokens)


def config(saes: Mapping[str, Any], places: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]) -> AnyConfig:
    """The runner config for training SAEs' configs at their places, by name: of one SAE, or of several in one spliced pass."""
    if len(saes) == 1:
        return E2ERunnerConfig(sae=next(iter(saes.values())), **{**settings, **next(iter(places.values()))})
    hooks = {name: place["hook_name"] for name, place in places.items()}
    heads = {name: place["hook_head_index"] for name, place in places.items()}
    out = {name: place["hook_name_out"] for name, place in places.items() if "hook_name_out" in place}
    known = {f.name for f in fields(E2EMultiRunnerConfig)}
    for name in settings:
        if name not in known and name not in _PLACE:
            raise ValueError(
                f"{name}={settings[name]!r} is a setting of one SAE, and {len(saes)} are finetuned together"
            )
    common = {name: value for name, value in settings.items() if name not in _PLACE}
    return E2EMultiRunnerConfig(
        saes=dict(saes), hook_names=hooks, hook_head_indices=heads, hook_names_out=out or None, **common
    )


def places(saes: Mapping[str, SAE[Any]], asked: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Where each SAE sits: as asked, of one, or as its metadata say. Raises ValueError if one is asked for of several,
    or two have the same."""
    if len(saes) > 1 and (given := next((name for name in _PLACE if name in asked), None)) is not None:
        raise ValueError(
            f"{given}={asked[given]!r} is of one SAE, and {len(saes)} are finetuned together; leave it out"
        )
    found = {
        name: {field: asked.get(field, sae.cfg.metadata.get(field)) for field in _PLACE} for name, sae in saes.items()
    }
    for place in found.values():
        # An SAE that writes what it reads says nothing of it.
        if place["hook_name_out"] is None:
            del place["hook_name_out"]
    at: dict[tuple[Any, ...], str] = {}
    for name, place in found.items():
        if (other := at.setdefault(tuple(place.values()), name)) != name:
            raise ValueError(
                f"{other} and {name} both sit at {place['hook_name']}, and SAEs that are finetuned together replace different "
                "activations; finetune them apart"
            )
    return found


def n_steps(settings: Mapping[str, Any]) -> int:
    """How many optimizer steps a run takes."""
    return int(settings["training_tokens"]) // int(settings["train_batch_size_tokens"])


def read_as(sae: SAE[Any], cfg: AnyConfig, place: Mapping[str, Any]) -> None:
    """Write into an SAE's metadata on which model, where and on which data a run trains it, so that it is evaluated on those."""
    for field in ("model_name", "model_class_name", "model_from_pretrained_kwargs", *_DATA):
        sae.cfg.metadata[field] = getattr(cfg, field)
    for field, value in place.items():
        sae.cfg.metadata[field] = value


def _from_metadata(metadata: Any, asked: Mapping[str, Any], trust_remote_code: bool) -> dict[str, Any]:
    model = model_settings(metadata, asked.get("model_name"), trust_remote_code)
    data = {field: metadata[field] for field in _DATA if metadata[field] is not None}
    if "sequence_separator_token" in metadata:
        data["sequence_separator_token"] = metadata.sequence_separator_token
    if "seqpos_slice" in data:
        data["seqpos_slice"] = tuple(data["seqpos_slice"])
    return {"model_name": model.pop("name"), **model, **data}


def _amounts(settings: Mapping[str, Any], trained_on: int | None) -> dict[str, Any]:
    """Tokens, batches of whole prompts and the schedule, as far as they are not asked for."""
    context, positions = settings["context_size"], settings.get("seqpos_slice", (None,))
    if not isinstance(context, int) or context < 1:
        raise ValueError(f"context_size={context!r} must be an integer, at least 1")
    trained = max(len(range(context)[slice(*positions)]), 1)
    per_pass = settings.get("store_batch_size_prompts")
    default = max(BATCH_TOKENS // trained // (per_pass or 1), 1) * (per_pass or 1) * trained
    batch = settings.get("train_batch_size_tokens", default)
    prompts = max(batch // trained, 1)
    found: dict[str, Any] = {
        "train_batch_size_tokens": batch,
        "store_batch_size_prompts": per_pass or next(n for n in range(min(prompts, 16), 0, -1) if prompts % n == 0),
    }
    tokens = settings.get("training_tokens")
    if tokens is None:
        tokens = TRAINING_TOKENS if trained_on is None else round(trained_on * FRACTION)
        tokens = max(tokens // batch, 1) * batch
    found["training_tokens"] = tokens
    if not {"lr_decay_steps", "lr_scheduler_name", "lr_end"} & settings.keys():
        steps, warm_up = n_steps({**settings, **found}), int(settings.get("lr_warm_up_steps", 0))
        found["lr_warm_up_steps"] = warm_up
        objective = objective_of(settings["objective"])
        if isinstance(objective, Stages):
            found["objective"] = _each_falling(objective, steps, warm_up)
        else:
            found["lr_decay_steps"] = max(steps - warm_up, 0)
    return found


def _each_falling(stages: Stages, n_steps: int, warm_up_steps: int) -> Stages:
    """Stages whose learning rates fall over the whole of each, but for those that say otherwise."""
    falling: list[Stage] = []
    for stage, steps in zip(stages.stages, stages.steps(n_steps), strict=True):
        rest = len(steps) - (warm_up_steps if stage.lr_warm_up_steps is None else stage.lr_warm_up_steps)
        says = stage.lr_decay_steps, stage.lr_scheduler_name, stage.lr_end
        falling.append(stage if any(one is not None for one in says) else replace(stage, lr_decay_steps=max(rest, 0)))
    return Stages(tuple(falling))
