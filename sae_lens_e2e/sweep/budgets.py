"""Matched budgets: how many tokens each point of a sweep is trained on so that all cost the same."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from sae_lens import logger

from sae_lens_e2e.loading import load_model
from sae_lens_e2e.splice import SplicedModel
from sae_lens_e2e.sweep.plan import AnyConfig, Point, Sweep
from sae_lens_e2e.training.cost import training_flops
from sae_lens_e2e.training.multi_config import E2EMultiRunnerConfig
from sae_lens_e2e.training.setup import resolved_objective

_OF_MODEL = ("model_name", "model_class_name", "model_kwargs", "model_from_pretrained_kwargs", "llm_device")


def matched(sweep: Sweep, output: Path) -> Sweep:
    """The sweep with each point's `training_tokens` such that all of a model have the same training FLOPs, if it asks for `equal: flops`.

    The `training_tokens` of the file are those of the point whose training costs the most; every other one is trained on as many more, to a
    whole optimizer step, as the FLOPs of that one pay for. Points whose `training_tokens` in the file differ are matched apart. Warm-ups
    and other settings in steps stay as they are. Raises ValueError for what cannot be counted, and what `load_model` raises.
    """
    if sweep.equal == "tokens":
        return sweep
    configs = {point.name: point.config(output / point.name) for point in sweep.points}
    flops: dict[str, float] = {}
    for names in _alike(configs, _OF_MODEL):
        flops |= _flops({name: configs[name] for name in names})
    tokens: dict[str, int] = {}
    for names in _alike(configs, (*_OF_MODEL, "training_tokens")):
        most = max(flops[name] for name in names)
        tokens |= {name: _tokens(configs[name], most / flops[name]) for name in names}
    for name in configs:
        logger.info(
            f"point {name}: {tokens[name]:,} training tokens of {flops[name] / configs[name].training_tokens:.3g} FLOPs"
        )
    return replace(
        sweep, points=tuple(with_settings(point, training_tokens=tokens[point.name]) for point in sweep.points)
    )


def with_settings(point: Point, **settings: object) -> Point:
    """The point with some of its settings replaced."""
    return replace(point, settings={**point.settings, **settings})


def scaled(tokens: float, batch: int) -> int:
    """A number of tokens to the nearest whole number of optimizer steps, at least one."""
    return max(round(tokens / batch), 1) * batch


def _tokens(cfg: AnyConfig, times: float) -> int:
    return cfg.training_tokens if times == 1 else scaled(cfg.training_tokens * times, cfg.train_batch_size_tokens)


def _flops(configs: dict[str, AnyConfig]) -> dict[str, float]:
    """The training FLOPs of runs on one model."""
    first = next(iter(configs.values()))
    assert first.llm_device is not None
    model = load_model(first.model_name, first.llm_device, first.model_class_name, first.model_from_pretrained_kwargs)
    spliced = SplicedModel(model, first.model_kwargs)
    found: dict[str, float] = {}
    for name, cfg in configs.items():
        sites = cfg.sites if isinstance(cfg, E2EMultiRunnerConfig) else {"sae": cfg.site}
        try:
            found[name] = training_flops(cfg, resolved_objective(cfg, spliced, sites), spliced)
        except ValueError as error:
            raise ValueError(f"point {name}: equal: flops: {error}") from error
    return found


def _alike(configs: dict[str, AnyConfig], fields: Iterable[str]) -> list[list[str]]:
    """The names of the runs that have the same values of some fields, in one list each."""
    fields, by_key = tuple(fields), {}
    for name, cfg in configs.items():
        key = json.dumps([getattr(cfg, field) for field in fields], default=str)
        by_key.setdefault(key, []).append(name)
    return list(by_key.values())
