"""SAELens' training runner, with an objective in the place of reconstruction."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sae_lens.config import HfDataset
from sae_lens.llm_sae_training_runner import LanguageModelSAETrainingRunner
from sae_lens.saes.sae import T_TRAINING_SAE_CONFIG, TrainingSAE
from sae_lens.util import temporary_seed
from transformer_lens.HookedRootModule import HookedRootModule
from typing_extensions import override

from sae_lens_e2e.output import written_whole
from sae_lens_e2e.splice import Site, SplicedModel
from sae_lens_e2e.training import ranks, setup
from sae_lens_e2e.training.checks import check_dataset
from sae_lens_e2e.training.config import E2ERunnerConfig
from sae_lens_e2e.training.group import Group
from sae_lens_e2e.training.history import write_history
from sae_lens_e2e.training.prompts import PromptBatches
from sae_lens_e2e.training.ready import make_ready
from sae_lens_e2e.training.same_run import check_resume
from sae_lens_e2e.training.stages import AnyObjective
from sae_lens_e2e.training.store import ResumableStore
from sae_lens_e2e.training.trainer import E2ETrainer, Log

_NAME = "sae"


class E2ETrainingRunner(LanguageModelSAETrainingRunner):
    """Trains an SAE end to end on a language model: SAELens' runner, for an `E2ERunnerConfig`.

    The SAE's initial weights follow `cfg.seed`. `held_out` is for the record, in the SAE's metadata: which part of the documents of
    `cfg.dataset_path` `override_dataset` leaves out, as `load_documents` does, so that whoever evaluates the SAE takes those. Raises ValueError at construction for whatever does not fit the model.
    """

    cfg: E2ERunnerConfig[Any]  # pyright: ignore[reportIncompatibleVariableOverride]
    splice: SplicedModel
    objective: AnyObjective
    site: Site

    @ranks.together()
    def __init__(
        self,
        cfg: E2ERunnerConfig[T_TRAINING_SAE_CONFIG],
        override_dataset: HfDataset | None = None,
        override_model: HookedRootModule | None = None,
        override_sae: TrainingSAE[Any] | None = None,
        splice: SplicedModel | None = None,
        held_out: float | None = None,
    ):
        if not isinstance(cfg, E2ERunnerConfig):
            raise TypeError(
                f"cfg is a {type(cfg).__name__}; make it an E2ERunnerConfig, or use SAELens' LanguageModelSAETrainingRunner"
            )
        make_ready(cfg, held_out)
        check_dataset(override_dataset)
        check_resume(cfg, [_NAME], held_out)
        if override_sae is not None:
            setup.check_given_sae(override_sae, "override_sae", cfg.sae)
        model = setup.bridge_of(cfg, override_model)
        with (
            temporary_seed(cfg.seed),
            setup.without_override_warning(override_model is None),
            setup.without_sae_lens_compilation(cfg),
        ):
            super().__init__(cfg, override_dataset, model, override_sae)
        if override_sae is None and cfg.from_pretrained_path is not None:
            setup.check_given_sae(self.sae, f"from_pretrained_path={cfg.from_pretrained_path!r}", cfg.sae)
        self.site = cfg.site
        self.held_out = held_out
        self.splice = splice or SplicedModel(self.model, cfg.model_kwargs)
        self.activations_store = ResumableStore.of(self.activations_store, self.splice.d_vocab_in)
        sites = {_NAME: self.site}
        self.objective = setup.resolved_objective(cfg, self.splice, sites)
        setup.check_fits(cfg, self.splice, self.activations_store, sites, {_NAME: self.sae}, self.objective)

    @override
    def run(self, overwrite: bool = False) -> TrainingSAE[Any]:
        """Train, save to `output_path`, and return the SAE.

        Raises, before training, OSError if that cannot be written or another process is at work in it, FileExistsError if it holds an
        SAE of other settings and is not to be overwritten.
        """
        setup.run(self, overwrite)
        return self.sae

    def make_group(self, batches: PromptBatches | None = None, log: Log | None = None) -> Group:
        """What this run trains, at its first step, the SAE's metadata filled in; in a sweep on prompts that others read too."""
        self._set_sae_metadata()
        self._compile_sae_if_needed()
        trainer: E2ETrainer[Any, Any] = E2ETrainer(
            cfg=self.cfg.to_e2e_trainer_config(),
            sae=self.sae,
            data_provider=batches or PromptBatches(self.activations_store, self.cfg.prompts_per_step),
            evaluator=setup.evaluator_at(self.site, self.evaluator),
            save_checkpoint_fn=self.save_checkpoint,
            log=log,
        )
        return Group(self.splice, {_NAME: trainer}, {_NAME: self.site}, self.objective, setup.step_plan(self))

    def make_trainer(self) -> E2ETrainer[Any, Any]:
        """The trainer of this run, at its first step."""
        return self.make_group().first

    def save_outputs(self, group: Group) -> None:
        """Save what has been trained to `output_path`, if there is one."""
        if self.cfg.output_path is not None:
            trainer = group.first
            self.save_final_sae(self.sae, self.cfg.output_path, trainer.log_feature_sparsity, trainer.history)

    @override
    def save_final_sae(
        self,
        sae: TrainingSAE[Any],
        output_path: str,
        log_feature_sparsity: torch.Tensor | None = None,
        history: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """As in SAELens, with the run's history; each file is written elsewhere first and moved into `output_path` whole."""
        with written_whole(output_path) as partial:
            super().save_final_sae(sae, str(partial), log_feature_sparsity)
            write_history(history, partial)

    @override
    def _set_sae_metadata(self) -> None:
        super()._set_sae_metadata()
        setup.complete_metadata(self.sae, self.cfg, self.site, self.splice, self.objective, self.held_out)
