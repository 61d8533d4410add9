"""SAELens' training runner, with an objective in the place of reconstruction."""

import json
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import wandb
from sae_lens import logger
from sae_lens.config import HfDataset
from sae_lens.constants import TRAINER_STATE_FILENAME
from sae_lens.llm_sae_training_runner import LanguageModelSAETrainingRunner
from sae_lens.saes.sae import T_TRAINING_SAE_CONFIG, TrainingSAE
from sae_lens.training._interruption import InterruptedException
from sae_lens.training.sae_trainer import SAETrainer
from sae_lens.util import extract_layer_from_tlens_hook_name, temporary_seed
from transformer_lens.HookedRootModule import HookedRootModule
from typing_extensions import override

from sae_lens_e2e.objectives import Objective
from sae_lens_e2e.output import check_writable, written_whole
from sae_lens_e2e.splice import Splice, frozen, make_splice
from sae_lens_e2e.training.config import E2ERunnerConfig
from sae_lens_e2e.training.history import write_history
from sae_lens_e2e.training.step import PromptBatches, StepPlan
from sae_lens_e2e.training.trainer import E2ETrainer

# Of an SAE and the runner config's `sae`: what the runner sets, and how a new SAE starts.
_MAY_DIFFER = ("metadata", "device", "decoder_init_norm", "jumprelu_init_threshold")


class E2ETrainingRunner(LanguageModelSAETrainingRunner):
    """Trains an SAE end to end on a language model: SAELens' runner, for an `E2ERunnerConfig`.

    The SAE's initial weights follow `cfg.seed`. Raises ValueError at construction for whatever does not fit the model.
    """

    cfg: E2ERunnerConfig[Any]  # pyright: ignore[reportIncompatibleVariableOverride]
    splice: Splice
    objective: Objective

    def __init__(
        self,
        cfg: E2ERunnerConfig[T_TRAINING_SAE_CONFIG],
        override_dataset: HfDataset | None = None,
        override_model: HookedRootModule | None = None,
        override_sae: TrainingSAE[Any] | None = None,
    ):
        if not isinstance(cfg, E2ERunnerConfig):
            raise TypeError(
                f"cfg is a {type(cfg).__name__}; make it an E2ERunnerConfig, or use SAELens' LanguageModelSAETrainingRunner"
            )
        _check_resume(cfg.resume_from_checkpoint)
        if override_sae is not None:
            _check_given_sae(override_sae, "override_sae", cfg)
        with temporary_seed(cfg.seed):
            super().__init__(cfg, override_dataset, override_model, override_sae)
        if override_sae is None and cfg.from_pretrained_path is not None:
            _check_given_sae(self.sae, f"from_pretrained_path={cfg.from_pretrained_path!r}", cfg)
        self.objective = self._resolve_objective()
        self.splice = make_splice(
            self.model, cfg.hook_name, cfg.hook_head_index, self.objective.hooks, cfg.model_kwargs
        )
        self._check_model()

    def _resolve_objective(self) -> Objective:
        assert isinstance(self.cfg.objective, Objective)
        splice = make_splice(self.model, self.cfg.hook_name, self.cfg.hook_head_index)
        return self.cfg.objective.resolve(splice.later_blocks, self.cfg.hook_name)

    def _check_model(self) -> None:
        n_ctx = self.splice.n_ctx
        if n_ctx is not None and self.cfg.context_size > n_ctx:
            raise ValueError(
                f"context_size={self.cfg.context_size} is longer than the model's, {n_ctx}; set it to {n_ctx} or less"
            )
        device = next(self.model.parameters()).device
        if not self.activations_store.is_dataset_tokenized and getattr(self.model, "tokenizer", None) is None:
            raise ValueError(
                "the dataset holds text and the model has no tokenizer; tokenise it, or give the model one"
            )
        self.splice.probe(torch.arange(min(4, self.cfg.context_size), device=device)[None], self.sae.cfg.d_in)

    @override
    def run(self) -> TrainingSAE[Any]:
        """Train, save to `output_path`, and return the SAE. Raises OSError, before training, if that cannot be written."""
        if self.cfg.output_path is not None:
            check_writable(self.cfg.output_path)
        if self.cfg.logger.log_to_wandb:
            wandb.init(
                project=self.cfg.logger.wandb_project,
                entity=self.cfg.logger.wandb_entity,
                config=self.cfg.to_dict(),
                name=self.cfg.logger.run_name,
                id=self.cfg.logger.wandb_id,
            )
        trainer = self.make_trainer()
        if self.cfg.resume_from_checkpoint is not None:
            logger.info(f"Resuming from checkpoint: {self.cfg.resume_from_checkpoint}")
            trainer.load_trainer_state(self.cfg.resume_from_checkpoint)
            self.sae.load_weights_from_checkpoint(self.cfg.resume_from_checkpoint)
            self.activations_store.load_from_checkpoint(self.cfg.resume_from_checkpoint)
        self._compile_sae_if_needed()
        with frozen(self.model):
            sae = self.run_trainer_with_interruption_handling(trainer)
        if self.cfg.output_path is not None:
            self.save_final_sae(sae, self.cfg.output_path, trainer.log_feature_sparsity, trainer.history)
        if self.cfg.logger.log_to_wandb:
            wandb.finish()
        return sae

    def make_trainer(self) -> E2ETrainer[TrainingSAE[Any], Any]:
        """The trainer of this run, at its first step, the SAE's metadata filled in."""
        self._set_sae_metadata()
        return E2ETrainer(
            cfg=self.cfg.to_e2e_trainer_config(),
            sae=self.sae,
            data_provider=PromptBatches(self.activations_store, self.cfg.prompts_per_step),
            splice=self.splice,
            objective=self.objective,
            plan=StepPlan(
                prompts_per_forward=self.cfg.store_batch_size_prompts,
                seqpos_slice=self.cfg.seqpos_slice,
                excluded_tokens=self.activations_store.exclude_special_tokens,
                max_grad_norm=self.cfg.max_grad_norm,
                autocast_lm=self.cfg.autocast_lm,
            ),
            evaluator=self.evaluator,
            save_checkpoint_fn=self.save_checkpoint,
        )

    @override
    def run_trainer_with_interruption_handling(self, trainer: SAETrainer[TrainingSAE[Any], Any]) -> TrainingSAE[Any]:
        """Train; on Ctrl-C or SIGTERM finish the step, write a checkpoint that can be resumed from, and raise."""
        assert isinstance(trainer.data_provider, PromptBatches)
        with interrupting(trainer.data_provider):
            try:
                return trainer.fit()
            except InterruptedException:
                if self.cfg.checkpoint_path is not None:
                    trainer.save_checkpoint(str(trainer.n_training_samples))
                    logger.warning(
                        f"interrupted; to go on, set resume_from_checkpoint to {self.cfg.checkpoint_path}/{trainer.n_training_samples}"
                    )
                raise

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
        self.sae.cfg.metadata.hook_layer = extract_layer_from_tlens_hook_name(self.cfg.hook_name)
        self.sae.cfg.metadata.objective = json.loads(json.dumps(self.objective.to_dict()))


def _check_given_sae(sae: TrainingSAE[Any], given_as: str, cfg: E2ERunnerConfig[Any]) -> None:
    """SAELens trains the SAE it is given and looks at `cfg.sae` no more: refuse one that says otherwise."""
    if not isinstance(sae, TrainingSAE):
        raise TypeError(f"{given_as} is a {type(sae).__name__}, for inference only; pass training_sae_from(...) of it")
    wanted, given = cfg.sae.to_dict(), sae.cfg.to_dict()
    for name in sorted(wanted.keys() | given.keys()):
        if name not in _MAY_DIFFER and wanted.get(name) != given.get(name):
            raise ValueError(
                f"sae.{name}={wanted.get(name)!r}, but the SAE given as {given_as} has {given.get(name)!r}, which is what would "
                "be trained with; give the config that SAE's own cfg as sae"
            )


def _check_resume(path: str | None) -> None:
    if path is not None and not (Path(path) / TRAINER_STATE_FILENAME).is_file():
        raise FileNotFoundError(
            f"resume_from_checkpoint={path!r} is not a checkpoint: it has no {TRAINER_STATE_FILENAME}"
        )


@contextmanager
def interrupting(batches: PromptBatches) -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into an interruption after the step; a second one interrupts at once."""

    def interrupt(signal_number: int, _: Any) -> None:
        if batches.interrupted:
            raise KeyboardInterrupt
        batches.interrupted = True
        logger.warning(f"{signal.Signals(signal_number).name}: finishing this step; once more to stop at once")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
