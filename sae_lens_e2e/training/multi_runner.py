"""SAELens' runner of several SAEs, trained in one spliced pass on an objective that they share."""

import json
from pathlib import Path
from typing import Any

from sae_lens.config import HfDataset, SAETrainerConfig
from sae_lens.constants import RUNNER_CFG_FILENAME, SPARSITY_FILENAME
from sae_lens.llm_sae_training_runner import LLMSaeEvaluator
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner
from sae_lens.saes.sae import TrainingSAE
from sae_lens.util import temporary_seed
from safetensors.torch import save_file
from transformer_lens.HookedRootModule import HookedRootModule
from typing_extensions import override

from sae_lens_e2e.output import written_whole
from sae_lens_e2e.splice import SplicedModel
from sae_lens_e2e.training import ranks, setup
from sae_lens_e2e.training.checks import check_dataset
from sae_lens_e2e.training.group import Group
from sae_lens_e2e.training.history import write_history
from sae_lens_e2e.training.multi_config import E2EMultiRunnerConfig
from sae_lens_e2e.training.prompts import PromptBatches
from sae_lens_e2e.training.ready import make_ready
from sae_lens_e2e.training.same_run import check_resume
from sae_lens_e2e.training.stages import AnyObjective
from sae_lens_e2e.training.store import ResumableStore
from sae_lens_e2e.training.trainer import E2ETrainer, Log, to_wandb


class E2EMultiTrainingRunner(MultiSAETrainingRunner):
    """Trains several SAEs end to end, in one spliced pass, on a language model: SAELens' runner, for an `E2EMultiRunnerConfig`.

    The SAEs' initial weights follow `cfg.seed`, and `held_out` is `E2ETrainingRunner`'s. Each is saved as a stock folder of its own, `output_path/NAME`. Raises
    ValueError at construction for whatever does not fit the model, or each other.
    """

    cfg: E2EMultiRunnerConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    splice: SplicedModel
    objective: AnyObjective

    @ranks.together()
    def __init__(
        self,
        cfg: E2EMultiRunnerConfig,
        override_dataset: HfDataset | None = None,
        override_model: HookedRootModule | None = None,
        override_saes: dict[str, TrainingSAE[Any]] | None = None,
        splice: SplicedModel | None = None,
        held_out: float | None = None,
    ) -> None:
        if not isinstance(cfg, E2EMultiRunnerConfig):
            raise TypeError(
                f"cfg is a {type(cfg).__name__}; make it an E2EMultiRunnerConfig, or use SAELens' MultiSAETrainingRunner"
            )
        make_ready(cfg, held_out)
        check_dataset(override_dataset)
        check_resume(cfg, list(cfg.saes), held_out)
        for name in override_saes.keys() & cfg.saes.keys() if override_saes is not None else ():
            setup.check_given_sae(override_saes[name], f"override_saes[{name!r}]", cfg.saes[name])  # pyright: ignore[reportOptionalSubscript]
        model = setup.bridge_of(cfg, override_model)
        with (
            temporary_seed(cfg.seed),
            setup.without_override_warning(override_model is None),
            setup.without_sae_lens_compilation(cfg),
        ):
            super().__init__(cfg, override_dataset, model, override_saes)
        self.held_out = held_out
        self.splice = splice or SplicedModel(self.model, cfg.model_kwargs)
        self.activations_store = ResumableStore.of(self.activations_store, self.splice.d_vocab_in)
        self.objective = setup.resolved_objective(cfg, self.splice, cfg.sites)
        setup.check_fits(cfg, self.splice, self.activations_store, cfg.sites, self.saes, self.objective)

    @override
    def run(self, overwrite: bool = False) -> dict[str, TrainingSAE[Any]]:
        """Train, save to `output_path`, and return the SAEs. Raises what `E2ETrainingRunner.run` raises."""
        setup.run(self, overwrite)
        return self.saes

    def make_group(self, batches: PromptBatches | None = None, log: Log | None = None) -> Group:
        """What this run trains, at its first step, the SAEs' metadata filled in; in a sweep on prompts that others read too."""
        self._set_sae_metadata()
        cfg = self.cfg.to_e2e_trainer_config()
        batches = batches or PromptBatches(self.activations_store, self.cfg.prompts_per_step)
        trainers = {name: self._make_trainer(name, cfg, batches, log) for name in self.saes}
        return Group(
            self.splice,
            trainers,
            self.cfg.sites,
            self.objective,
            setup.step_plan(self),
            save_checkpoint_fn=self._save_runner_checkpoint_files,
        )

    def save_outputs(self, group: Group) -> None:
        """Save to `output_path`, if there is one: a stock folder for each SAE, and beside them the config and history of all."""
        if self.cfg.output_path is None:
            return
        base = Path(self.cfg.output_path)
        for name, trainer in group.trainers.items():
            with written_whole(base / name) as partial:
                weights_path, cfg_path = trainer.sae.save_inference_model(str(partial))
                save_file({"sparsity": trainer.log_feature_sparsity}, partial / SPARSITY_FILENAME)
                write_history(trainer.history, partial)
                if self.cfg.logger.log_to_wandb:
                    self.cfg.logger.log(
                        trainer,
                        weights_path,
                        cfg_path,
                        sparsity_path=partial / SPARSITY_FILENAME,
                        wandb_aliases=["final_model"],
                    )
        with written_whole(base) as partial:
            (partial / RUNNER_CFG_FILENAME).write_text(json.dumps(self.cfg.to_dict()))
            write_history(group.history, partial)

    def _make_trainer(
        self, name: str, cfg: SAETrainerConfig, batches: PromptBatches, log: Log | None
    ) -> E2ETrainer[Any, Any]:
        sink = log or (to_wandb if self.cfg.logger.log_to_wandb else None)

        def by_name(figures: dict[str, Any], step: int) -> None:
            assert sink is not None
            sink({f"{name}/{key}": value for key, value in figures.items()}, step)

        evaluator: Any = LLMSaeEvaluator(
            model=self.model,
            activations_store=self.activations_store,
            eval_batch_size_prompts=self.cfg.eval_batch_size_prompts,
            n_eval_batches=self.cfg.n_eval_batches,
            model_kwargs=self.cfg.model_kwargs,
        )
        evaluator = setup.evaluator_at(self.cfg.sites[name], evaluator)
        return E2ETrainer(cfg, self.saes[name], batches, evaluator, log=None if sink is None else by_name)

    @override
    def _set_sae_metadata(self) -> None:
        super()._set_sae_metadata()
        for name, sae in self.saes.items():
            setup.complete_metadata(sae, self.cfg, self.cfg.sites[name], self.splice, self.objective, self.held_out)
            sae.cfg.metadata.name_in_run = name
        for name, sae in self.saes.items():
            sae.cfg.metadata.companions = {
                other: _place_of(s.cfg.metadata) for other, s in self.saes.items() if other != name
            }


def _place_of(metadata: Any) -> dict[str, Any]:
    keys = ("hook_name", "hook_head_index", *(["hook_name_out"] if metadata.hook_name_out else []))
    return {key: metadata[key] for key in keys}
