"""What a finetune is going to do, checked before the language model is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sae_lens import SAE, TrainingSAE

from sae_lens_e2e.devices import check_device
from sae_lens_e2e.finetuning.folding import fold_centring
from sae_lens_e2e.finetuning.settings import AnyConfig, config, n_steps, places, run_settings, split
from sae_lens_e2e.finetuning.sources import Source, collect
from sae_lens_e2e.finetuning.training import Thresholds, coefficient_name, refuses_dead_features, training_sae
from sae_lens_e2e.training.checks import check_devices


@dataclass
class Plan:
    """The SAEs to start from, and the settings of the run and of the SAEs that are trained."""

    sources: dict[str, Source]
    places: dict[str, dict[str, Any]]
    """Where each SAE sits: fields of the runner config."""
    run: dict[str, Any]
    """The other fields of the runner config."""
    of_saes: dict[str, Any]
    """Settings of the training SAEs that are asked for."""
    architecture: str | None
    thresholds: Thresholds
    notes: list[str] = field(default_factory=list)
    """What was chosen and done, a sentence each."""

    @property
    def saes(self) -> dict[str, SAE[Any]]:
        """The SAEs to start from, by name."""
        return {name: source.sae for name, source in self.sources.items()}

    def note(self, name: str, said: str | None) -> None:
        """Remember what was done with one SAE, if anything was."""
        if said:
            self.notes.append(f"{name}: {said}" if len(self.sources) > 1 else said)

    def training_saes(
        self, l0: Mapping[str, float], coefficients: Mapping[str, float] | None = None
    ) -> dict[str, TrainingSAE[Any]]:
        """The SAEs as they are trained, from the L0 that each has, and the sparsity coefficients where those are known."""
        made: dict[str, TrainingSAE[Any]] = {}
        for name, sae in self.saes.items():
            made[name] = training_sae(sae, self.architecture, self.thresholds, self.of_saes, l0[name])
            if coefficients is not None and name in coefficients:
                settings = {**self.of_saes, str(coefficient_name(made[name])): coefficients[name]}
                made[name] = training_sae(sae, self.architecture, self.thresholds, settings, l0[name])
        return made

    def config(self, trained: Mapping[str, TrainingSAE[Any]]) -> AnyConfig:
        """The runner config for SAEs that are trained."""
        settings = dict(self.run)
        if "dead_feature_window" not in settings and any(map(refuses_dead_features, trained.values())):
            settings["dead_feature_window"] = n_steps(settings) + 1
        return config({name: sae.cfg for name, sae in trained.items()}, self.places, settings)


def make_plan(
    sources: Any,
    settings: Mapping[str, Any],
    architecture: str | None,
    thresholds: Thresholds,
    fold: bool | None,
    trust_remote_code: bool,
) -> tuple[Plan, AnyConfig]:
    """What is going to be done, and the runner config as it is known by now. Raises ValueError or OSError for what cannot be."""
    asked, of_saes = split(settings)
    device = str(asked.get("device", "cpu"))
    check_device("device", device)
    found = collect(sources, asked, device)
    saes = {name: source.sae for name, source in found.items()}
    where = places(saes, asked)
    plan = Plan(found, where, {}, of_saes, architecture, thresholds)
    for name, sae in saes.items():
        for key, value in where[name].items():
            sae.cfg.metadata[key] = value
        sae.cfg.metadata.model_name = asked.get("model_name", sae.cfg.metadata.model_name)
        plan.note(name, fold_centring(sae, fold))
    trained_on = max((source.training_tokens for source in found.values() if source.training_tokens), default=None)
    plan.run = run_settings(saes, asked, trained_on, trust_remote_code)
    cfg = plan.config(_thrown_away(plan))
    check_devices(cfg)
    return plan, cfg


def _thrown_away(plan: Plan) -> dict[str, TrainingSAE[Any]]:
    """The SAEs as they are trained, but for their L0, and a scale that is estimated when the model is there: to check settings on."""
    scales = {name: sae.cfg.normalize_activations for name, sae in plan.saes.items()}
    try:
        for sae in plan.saes.values():
            if sae.cfg.normalize_activations == "expected_average_only_in":
                sae.cfg.normalize_activations = "none"
        return plan.training_saes(dict.fromkeys(plan.saes, 1.0))
    finally:
        for name, sae in plan.saes.items():
            sae.cfg.normalize_activations = scales[name]
