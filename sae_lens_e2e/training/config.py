"""A SAELens runner config with one more idea: the objective."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lens.config import LanguageModelSAERunnerConfig, SAETrainerConfig
from sae_lens.saes.sae import T_TRAINING_SAE_CONFIG
from typing_extensions import override

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
class E2ERunnerConfig(OfWholePrompts, LanguageModelSAERunnerConfig[T_TRAINING_SAE_CONFIG]):
    """Configuration for training a sparse autoencoder end to end: a SAELens config with an objective.

    Every other field means what it means in SAELens. Batches are made of whole prompts: a forward pass takes
    `store_batch_size_prompts` of them, and an optimizer step accumulates the gradient over `train_batch_size_tokens` tokens.
    With `seqpos_slice` only the positions inside it count; tokens left out by `exclude_special_tokens` count, untrained.

    Raises ValueError, naming the field, for whatever cannot be honoured.

    Args:
        objective (str | Objective): What the SAE's output is compared with: 'local', 'e2e', 'e2e_ds', the name of an installed plugin's, or an Objective with settings of its own; several, one after the other, as a list of `Stage`; 'warm_e2e_ds' and the like are local first.
        max_grad_norm (float): The norm to which each step's gradient is clipped. SAELens has 1.0 built in; the paper used 10 on GPT2-small.
        hook_name_out (str | None): The hook that a transcoder writes, whose clean activation it stands for; None for an SAE, which writes what it reads.
        checkpoint_activations (bool): Whether blocks after the SAE with no hook inside keep only what enters them, and run again in the backward pass: less memory, more time, the same gradients.
    """

    objective: str | Objective | Stages | Sequence[Stage] = "e2e_ds"
    max_grad_norm: float = 1.0
    hook_name_out: str | None = None
    checkpoint_activations: bool = False

    def __post_init__(self) -> None:
        self.objective = objective_of(self.objective)
        saes = {"sae": self.sae}
        check_fields(self, E2ERunnerConfig, saes)
        check_meaning(self, self.objective, saes)
        check_values(self, saes)
        check_sites_of(saes, {"sae": self.site}, {} if self.hook_name_out is None else {"sae": self.hook_name_out})
        check_hook_order(self, self.objective, self.site.writes[-1])
        named = self.logger.run_name is not None
        super().__post_init__()
        check_batches(self)
        check_stages(self, self.objective)
        if not named:
            self.logger.run_name = f"{self.objective.name}-{self.logger.run_name}"

    @property
    def site(self) -> Site:
        """Where the SAE sits."""
        return Site.between(self.hook_name, self.hook_name_out, self.hook_head_index)

    @override
    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary, from which `from_dict` makes the config again."""
        assert isinstance(self.objective, AnyObjective)
        return {**super().to_dict(), "objective": self.objective.to_dict(), "seqpos_slice": list(self.seqpos_slice)}

    @classmethod
    @override
    def from_dict(cls, cfg_dict: dict[str, Any]) -> "E2ERunnerConfig[Any]":
        """The config that `to_dict` was called on."""
        seqpos_slice = tuple(cfg_dict.get("seqpos_slice", (None,)))
        config = super().from_dict({**cfg_dict, "seqpos_slice": seqpos_slice})
        assert isinstance(config, E2ERunnerConfig)
        return config

    @classmethod
    def from_apollo(
        cls, path: str | Path, *, architecture: str = "apollo", d_in: int | None = None, **overrides: Any
    ) -> "E2ERunnerConfig[Any]":
        """The config that repeats a run of Apollo's library, from its `final_config.yaml` (or its folder).

        `architecture` is 'apollo', exactly theirs, or 'standard' with the equivalent coefficients. `d_in` is looked up if it is
        not given; `overrides` are fields of this class. A run on a saved model (`tlens_model_path`) needs
        `override_model=load_apollo_model(cfg.model_name)`. The cosine schedule and warm-up are SAELens' own, and the order
        of the data is the dataset's. Raises ValueError, naming the key, for one that has no equivalent; SAEs at several positions
        are for `E2EMultiRunnerConfig.from_apollo`.
        """
        from sae_lens_e2e.apollo.runner_settings import runner_settings

        return cls(**runner_settings(path, architecture=architecture, d_in=d_in, overrides=overrides))

    @override
    def to_sae_trainer_config(self) -> SAETrainerConfig:
        """Not for end-to-end training: SAELens' own runner calls this, and would train on reconstruction alone."""
        assert isinstance(self.objective, AnyObjective)
        raise TypeError(
            f"an E2ERunnerConfig (objective {self.objective.name!r}) was given to SAELens' own runner; "
            "use sae_lens_e2e.E2ETrainingRunner instead of LanguageModelSAETrainingRunner"
        )

    def to_e2e_trainer_config(self) -> SAETrainerConfig:
        """What `E2ETrainer` takes: SAELens' trainer settings."""
        return super().to_sae_trainer_config()
