"""SAELens' config of a run with several SAEs, with one more idea: the objective of them all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lens import LoggingConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunnerConfig
from sae_lens.saes.sae import TrainingSAEConfig
from typing_extensions import override

from sae_lens_e2e.names import check_folder_name
from sae_lens_e2e.objectives import Objective
from sae_lens_e2e.splice import Site
from sae_lens_e2e.training.checks import (
    OfWholePrompts,
    check_batches,
    check_fields,
    check_hook_order,
    check_meaning,
    check_sites_of,
    check_stages,
    check_values,
)
from sae_lens_e2e.training.stages import AnyObjective, Stage, Stages, objective_of


@dataclass
class E2EMultiRunnerConfig(OfWholePrompts, MultiSAETrainingRunnerConfig):
    """Configuration for training several SAEs end to end in one spliced pass: SAELens' config, with an objective.

    `saes`, `hook_names`, `hook_names_out` and `hook_head_indices` go by the SAEs' names, in any order of depth; any mix of
    architectures, several SAEs inside one block, several heads of one hook. A later SAE is given the stream that the earlier ones
    have changed, and its own reconstruction loss is of that; a transcoder's is of the clean activation at the hook it writes.
    All else means what it means in `E2ERunnerConfig`.

    Raises ValueError, naming the field, for whatever cannot be honoured.
    """

    objective: str | Objective | Stages | Sequence[Stage] = "e2e_ds"
    max_grad_norm: float = 1.0
    """The norm to which each step's gradient is clipped, over all SAEs together."""
    hook_names_out: Mapping[str, str] | str | None = None
    """The hook that each transcoder writes, or the one that all do; an SAE, which writes what it reads, has none."""
    checkpoint_activations: bool = False

    def __post_init__(self) -> None:
        self.objective = objective_of(self.objective)
        check_fields(self, E2EMultiRunnerConfig, self.saes)
        check_meaning(self, self.objective, self.saes)
        check_values(self, self.saes)
        named = self.logger.run_name is not None
        heads = self.hook_head_indices
        # SAELens' store has one head a hook; ours reads no activations from it, so that several may be trained.
        self.hook_head_indices = None
        super().__post_init__()
        self._set_head_indices(heads)
        check_sites_of(self.saes, self.sites, self._hook_names_out_per_sae)
        for site in self.sites.values():
            check_hook_order(self, self.objective, site.writes[-1])
        check_batches(self)
        check_stages(self, self.objective)
        for name in self.saes:
            check_folder_name("saes", name)
        if not named:
            self.logger.run_name = f"{self.objective.name}-{self.logger.run_name}"

    @property
    def sites(self) -> dict[str, Site]:
        """Where each SAE sits."""
        out, heads = self._hook_names_out_per_sae, self.hook_head_indices_per_sae
        return {name: Site.between(hook, out.get(name), heads[name]) for name, hook in self.hook_names_per_sae.items()}

    @override
    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary, from which `from_dict` makes the config again."""
        assert isinstance(self.objective, AnyObjective)
        return {
            **super().to_dict(),
            "hook_names": dict(self.hook_names_per_sae),
            "hook_names_out": self._hook_names_out_per_sae or None,
            "objective": self.objective.to_dict(),
            "seqpos_slice": list(self.seqpos_slice),
        }

    @classmethod
    def from_dict(cls, cfg_dict: Mapping[str, Any]) -> "E2EMultiRunnerConfig":
        """The config that `to_dict` was called on."""
        saes = {name: TrainingSAEConfig.from_dict(dict(sae)) for name, sae in cfg_dict["saes"].items()}
        config = cls(
            **{
                **cfg_dict,
                "saes": saes,
                "logger": LoggingConfig(**cfg_dict.get("logger", {})),
                "seqpos_slice": tuple(cfg_dict.get("seqpos_slice", (None,))),
            }
        )
        # SAELens puts every new run's checkpoints in a folder of their own.
        if "checkpoint_path" in cfg_dict:
            config.checkpoint_path = cfg_dict["checkpoint_path"]
        return config

    @classmethod
    def from_apollo(
        cls, path: str | Path, *, architecture: str = "apollo", d_in: int | None = None, **overrides: Any
    ) -> "E2EMultiRunnerConfig":
        """The config that repeats a run of Apollo's library with SAEs at several positions, which it trains in one spliced pass.

        Each SAE is named as in Apollo's checkpoints (`blocks-2-hook_resid_pre`); all else is as in `E2ERunnerConfig.from_apollo`.
        Raises ValueError, naming the key, for one that has no equivalent, such as a compared hook between two SAEs.
        """
        from sae_lens_e2e.apollo.runner_settings import multi_runner_settings

        return cls(**multi_runner_settings(path, architecture=architecture, d_in=d_in, overrides=overrides))

    @override
    def to_sae_trainer_config(self) -> SAETrainerConfig:
        """Not for end-to-end training: SAELens' own runner calls this, and would train on reconstruction alone."""
        assert isinstance(self.objective, AnyObjective)
        raise TypeError(
            f"an E2EMultiRunnerConfig (objective {self.objective.name!r}) was given to SAELens' own runner; "
            "use sae_lens_e2e.E2EMultiTrainingRunner instead of MultiSAETrainingRunner"
        )

    def to_e2e_trainer_config(self) -> SAETrainerConfig:
        """What each SAE's `E2ETrainer` takes: SAELens' trainer settings."""
        return super().to_sae_trainer_config()

    @property
    def _hook_names_out_per_sae(self) -> dict[str, str]:
        """The hook that each transcoder writes. Raises ValueError for a name that is not in `saes`."""
        out = self.hook_names_out or {}
        if isinstance(out, str):
            return dict.fromkeys(self.saes, out)
        if unknown := sorted(set(out) - set(self.saes)):
            raise ValueError(
                f"hook_names_out names {unknown[0]!r}, which is not in saes; there are {', '.join(self.saes)}"
            )
        return dict(out)

    def _set_head_indices(self, heads: Mapping[str, int | None] | int | None) -> None:
        if isinstance(heads, Mapping):
            if unknown := sorted(set(heads) - set(self.saes)):
                raise ValueError(
                    f"hook_head_indices names {unknown[0]!r}, which is not in saes; there are {', '.join(self.saes)}"
                )
            by_name = {name: heads.get(name) for name in self.saes}
        else:
            by_name = dict.fromkeys(self.saes, heads)
        self.hook_head_indices = dict(heads) if isinstance(heads, Mapping) else heads
        self._hook_head_indices_per_sae = by_name
