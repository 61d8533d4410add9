"""Say the settings of an Apollo run in SAELens' terms."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_lens import LoggingConfig, StandardTrainingSAEConfig, logger
from sae_lens.saes.sae import TrainingSAEConfig

from sae_lens_e2e.apollo.checkpoint import sae_name
from sae_lens_e2e.apollo.model import PROCESSED, d_model, find_model
from sae_lens_e2e.apollo.run_config import (
    as_list,
    check_whole_names,
    model_name,
    objective,
    prepends_bos,
    read_run_config,
    required,
    setting,
)
from sae_lens_e2e.architectures.apollo import ARCHITECTURE, ApolloTrainingSAEConfig

ARCHITECTURES = (ARCHITECTURE, "standard")

# SAELens evaluates every so many logs, and has no word for not at all.
_NEVER = 10**9

# Activations with a dimension for the heads.
_BY_HEAD = ("hook_q", "hook_k", "hook_v", "hook_z", "hook_result")

# What trains the SAE, by section. A key that is not here, nor below, is refused.
_TRAINS = {
    "": {
        *("batch_size", "cooldown_samples", "effective_batch_size", "loss", "lr", "lr_schedule", "max_grad_norm"),
        *("min_lr_factor", "n_samples", "saes", "seed", "tlens_model_name", "tlens_model_path", "train_data"),
        *("warmup_samples", "wandb_project", "wandb_run_name", "wandb_run_name_prefix", "log_every_n_grad_steps"),
        *("save_every_n_samples", "eval_every_n_samples", "eval_n_samples"),
    },
    "loss": {"sparsity", "in_to_orig", "out_to_in", "logits_kl"},
    "loss.sparsity": {"coeff", "p_norm"},
    "loss.in_to_orig": {"hook_positions", "total_coeff"},
    "loss.out_to_in": {"coeff"},
    "loss.logits_kl": {"coeff"},
    "saes": {"dict_size_to_input_ratio", "sae_positions", "retrain_saes", "type_of_sparsifier"},
    "train_data": {
        *("column_name", "dataset_name", "is_tokenized", "n_ctx", "seed", "split", "streaming", "tokenizer_name"),
    },
}
# What only watches the run, or says where on their machine it was written.
_WATCHES = {
    *("act_frequency_n_tokens", "collect_act_frequency_every_n_samples", "collect_output_metrics_every_n_samples"),
    *("eval_data", "save_dir"),
}


def runner_settings(
    path: str | Path,
    *,
    architecture: str = ARCHITECTURE,
    d_in: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The fields of an `E2ERunnerConfig` that repeats the Apollo run whose `final_config.yaml` is at `path`.

    `overrides` replace fields, and with them what would have to be read. Raises ValueError, naming the key, for one that
    has no equivalent.
    """
    config, overrides = _read(path), overrides or {}
    settings = {
        **_settings(path, config, overrides),
        "hook_name": overrides.get("hook_name") or _only_position(config),
        "is_dataset_tokenized": setting(config, "train_data.is_tokenized", True),
    }
    if "sae" not in overrides or "objective" not in overrides:
        width = d_in or (overrides["sae"].d_in if "sae" in overrides else d_model(path, config))
        if "sae" not in overrides:
            settings["sae"] = _sae(config, architecture, width)
        if "objective" not in overrides:
            settings["objective"] = objective(config, width)
    _say_what_is_left_out(config)
    return {**settings, **overrides}


def multi_runner_settings(
    path: str | Path,
    *,
    architecture: str = ARCHITECTURE,
    d_in: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """`runner_settings` for an `E2EMultiRunnerConfig`: an SAE at every position, named as in Apollo's checkpoints.

    Apollo's library adds up each position's sparsity and reconstruction, takes the mean over the compared hooks, and lets the
    gradient of a later SAE's loss into the earlier ones; so does a group of ours.
    """
    config, overrides = _read(path), overrides or {}
    given = overrides.get("hook_names")
    hooks = dict(given) if isinstance(given, Mapping) else {sae_name(hook): hook for hook in _positions(config)}
    settings = {**_settings(path, config, overrides), "hook_names": hooks}
    if "saes" not in overrides:
        width = d_in or d_model(path, config)
        settings["saes"] = {name: _sae(config, architecture, width) for name in hooks}
    if "objective" not in overrides:
        widths = {sae.d_in for sae in {**settings, **overrides}["saes"].values()}
        if len(widths) > 1 and setting(config, "loss.out_to_in.coeff"):
            raise ValueError(
                f"loss.out_to_in.coeff={setting(config, 'loss.out_to_in.coeff')!r} is divided by the width in each SAE, and there "
                f"are several ({', '.join(map(str, sorted(widths)))}), which has no equivalent; set it to 0, or pass objective="
            )
        settings["objective"] = objective(config, widths.pop(), list(hooks.values()))
    _say_what_is_left_out(config)
    return {**settings, **overrides}


def _read(path: str | Path) -> dict[str, Any]:
    config = read_run_config(path)
    _refuse_unknown(config)
    return config


def _settings(path: str | Path, config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What the config of one SAE and of several have in common."""
    n_ctx, batch_size = required(config, "train_data.n_ctx"), required(config, "batch_size")
    settings: dict[str, Any] = {
        "model_name": _model_to_load(path, config),
        "dataset_path": required(config, "train_data.dataset_name"),
        "prepend_bos": prepends_bos(config),
        "streaming": setting(config, "train_data.streaming", True),
        "context_size": n_ctx,
        "store_batch_size_prompts": batch_size,
        "train_batch_size_tokens": setting(config, "effective_batch_size", batch_size) * n_ctx,
        "lr": required(config, "lr"),
        "lr_warm_up_steps": _steps(config, setting(config, "warmup_samples", 0)),
        "max_grad_norm": setting(config, "max_grad_norm", float("inf")),
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "seed": setting(config, "seed", 0),
        **_schedule(config),
        **_length(config, overrides),
        **_evaluation(config),
        "logger": _logging(config),
    }
    if config.get("tlens_model_name") is not None:
        settings["model_from_pretrained_kwargs"] = dict(PROCESSED)
    return settings


def _sae(config: Mapping[str, Any], architecture: str, d_in: int) -> TrainingSAEConfig:
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"architecture={architecture!r} must be one of {', '.join(ARCHITECTURES)}; for another pass sae="
        )
    coefficient = required(config, "loss.sparsity.coeff")
    p_norm = setting(config, "loss.sparsity.p_norm", 1.0)
    d_sae = int(setting(config, "saes.dict_size_to_input_ratio", 1.0) * d_in)
    if architecture == "standard":
        return StandardTrainingSAEConfig(
            d_in=d_in,
            d_sae=d_sae,
            l1_coefficient=coefficient / d_in,
            lp_norm=p_norm,
            apply_b_dec_to_input=False,
        )
    return ApolloTrainingSAEConfig(d_in=d_in, d_sae=d_sae, sparsity_coefficient=coefficient, lp_norm=p_norm)


def _model_to_load(path: str | Path, config: Mapping[str, Any]) -> str:
    name = model_name(config)
    found = None if config.get("tlens_model_name") is not None else find_model(path, name)
    return name if found is None else str(found)


def _steps(config: Mapping[str, Any], samples: int) -> int:
    return samples // setting(config, "effective_batch_size", config["batch_size"])


def _schedule(config: Mapping[str, Any]) -> dict[str, Any]:
    schedule, factor = setting(config, "lr_schedule", "cosine"), setting(config, "min_lr_factor", 0.1)
    cooldown = setting(config, "cooldown_samples", 0)
    if schedule == "cosine":
        if cooldown:
            raise ValueError(f"cooldown_samples={cooldown} beside lr_schedule='cosine' has no equivalent; set it to 0")
        return {"lr_scheduler_name": "cosineannealing", "lr_end": config["lr"] * factor}
    if schedule != "linear":
        raise ValueError(f"lr_schedule={schedule!r} has no equivalent; Apollo's are 'cosine' and 'linear'")
    if cooldown and factor:
        raise ValueError(
            f"min_lr_factor={factor} has no equivalent beside lr_schedule='linear' and cooldown_samples={cooldown}: SAELens' "
            "linear decay ends at 0; set it to 0"
        )
    return {"lr_scheduler_name": "constant", "lr_decay_steps": _steps(config, cooldown)}


def _length(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    n_samples, every = config.get("n_samples"), config.get("save_every_n_samples")
    if n_samples is None:
        if "training_tokens" in overrides:
            return {}
        raise ValueError("n_samples is null: the run has no end; pass training_tokens=")
    # SAELens spaces checkpoints evenly, and saves the end of training by itself.
    n_checkpoints = max(0, -(-n_samples // every) - 1) if every else 0
    return {"training_tokens": n_samples * config["train_data"]["n_ctx"], "n_checkpoints": n_checkpoints}


def _evaluation(config: Mapping[str, Any]) -> dict[str, Any]:
    if not config.get("eval_n_samples"):
        return {}
    batch_size = config["batch_size"]
    return {"eval_batch_size_prompts": batch_size, "n_eval_batches": -(-config["eval_n_samples"] // batch_size)}


def _logging(config: Mapping[str, Any]) -> LoggingConfig:
    settings: dict[str, Any] = {"log_to_wandb": config.get("wandb_project") is not None}
    if config.get("wandb_project"):
        settings["wandb_project"] = config["wandb_project"]
    if config.get("wandb_run_name"):
        settings["run_name"] = (config.get("wandb_run_name_prefix") or "") + config["wandb_run_name"]
    steps = settings["wandb_log_frequency"] = setting(config, "log_every_n_grad_steps", 20)
    every = config.get("eval_every_n_samples")
    settings["eval_every_n_wandb_logs"] = max(1, _steps(config, every) // steps) if every else _NEVER
    return LoggingConfig(**settings)


def _only_position(config: Mapping[str, Any]) -> str:
    positions = _positions(config)
    if len(positions) > 1:
        raise ValueError(
            f"saes.sae_positions={positions}: Apollo's library trains these together; use E2EMultiRunnerConfig.from_apollo, or pass "
            "hook_name= to train one of them alone"
        )
    return positions[0]


def _positions(config: Mapping[str, Any]) -> list[str]:
    positions = list(dict.fromkeys(as_list(setting(config, "saes.sae_positions"))))
    check_whole_names("saes.sae_positions", positions)
    if not positions:
        raise ValueError("saes.sae_positions=[] names no hook; pass hook_name= (of several SAEs, hook_names=)")
    for position in positions:
        if position.endswith(_BY_HEAD):
            raise ValueError(
                f"saes.sae_positions: at {position} Apollo's library trains one SAE on each head's activation in turn, which has no "
                "equivalent; pass hook_name= (of several SAEs, hook_names=) and d_in= to train one on all heads side by side"
            )
    return positions


def _refuse_unknown(config: Mapping[str, Any]) -> None:
    for section, known in _TRAINS.items():
        found = setting(config, section, {}) if section else config
        for key, value in found.items():
            name = f"{section}.{key}".removeprefix(".")
            if key not in known and name not in _WATCHES and value not in (None, [], {}):
                raise ValueError(f"{name}={value!r} has no equivalent; set it to null, or say it in SAELens' terms")
    if (kind := setting(config, "saes.type_of_sparsifier", "sae")) != "sae":
        raise ValueError(f"saes.type_of_sparsifier={kind!r} has no equivalent; only 'sae' has")
    if (split := setting(config, "train_data.split", "train")) != "train":
        raise ValueError(
            f"train_data.split={split!r} has no equivalent: SAELens reads 'train'; set it to that, and give the runner "
            "that split as override_dataset="
        )
    column = setting(config, "train_data.column_name", "input_ids")
    if setting(config, "train_data.is_tokenized", True) and column not in ("input_ids", "tokens"):
        raise ValueError(
            f"train_data.column_name={column!r} has no equivalent: SAELens reads 'input_ids' or 'tokens'; set it to one of "
            "them, and give the runner the dataset with its column renamed as override_dataset="
        )


def _say_what_is_left_out(config: Mapping[str, Any]) -> None:
    left_out = sorted(key for key in _WATCHES if config.get(key) not in (None, 0))
    if left_out:
        logger.info(f"from_apollo: left out, as they do not change the SAE: {', '.join(left_out)}")
    logger.info(
        "from_apollo: Apollo's library shuffles the dataset with its seed, SAELens reads it in order; pass a shuffled "
        "override_dataset where the order matters"
    )
