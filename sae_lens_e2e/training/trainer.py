"""SAELens' trainer for one of the SAEs that are trained end to end: all that is its own, and no loop."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import wandb
from jaxtyping import Float, Int
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import T_TRAINING_SAE, T_TRAINING_SAE_CONFIG, TrainingSAE, TrainStepInput, TrainStepOutput
from sae_lens.training.sae_trainer import Evaluator, SAETrainer, SaveCheckpointFn
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR
from typing_extensions import override

from sae_lens_e2e.architectures.sparse_products import SparseProducts
from sae_lens_e2e.architectures.transcoder import TranscoderStepInput
from sae_lens_e2e.output import replaced_whole
from sae_lens_e2e.training.clock import Clock
from sae_lens_e2e.training.history import read_history, write_history
from sae_lens_e2e.training.output import StepOutput
from sae_lens_e2e.training.prompts import PromptBatches
from sae_lens_e2e.training.stages import LearningRate

if TYPE_CHECKING:
    from sae_lens_e2e.training.group import Group

Log = Callable[[dict[str, Any], int], None]
"""Takes figures by name, and the optimizer step that they are of."""


class NonFiniteLossError(RuntimeError):
    """A loss or gradient became NaN or infinite; the SAEs are as they were before that step."""


class E2ETrainer(SAETrainer[T_TRAINING_SAE, T_TRAINING_SAE_CONFIG]):
    """SAELens' trainer of one SAE, taking whole prompts in the place of activations.

    It has the SAE's optimizer, schedules, statistics, log and checkpoints. What the SAE's output is compared with is the
    business of the `Group` it is in, which it may share with others; `fit` and `step` are the group's.
    """

    group: "Group"
    """Set by the group itself."""

    def __init__(
        self,
        cfg: SAETrainerConfig,
        sae: T_TRAINING_SAE,
        data_provider: PromptBatches,
        evaluator: Evaluator[T_TRAINING_SAE] | None = None,
        save_checkpoint_fn: SaveCheckpointFn | None = None,
        log: Log | None = None,
    ) -> None:
        super().__init__(cfg, sae, data_provider, evaluator, save_checkpoint_fn)
        if torch.device(cfg.device).type in ("cpu", "cuda"):
            # The same Adam in one pass over its state, where SAELens' takes a dozen with temporaries in between.
            for param_group in self.optimizer.param_groups:
                param_group["fused"] = True
        self.log: Log | None = log or (to_wandb if cfg.logger.log_to_wandb else None)
        self.history: list[dict[str, Any]] = []
        """What SAELens would log to W&B, every `logger.wandb_log_frequency` steps, whether it does or not."""
        # Within the language model's own autocast, which is not the SAE's.
        self._autocast = torch.autocast(torch.device(cfg.device).type, dtype=torch.bfloat16, enabled=cfg.autocast)
        self._products = SparseProducts.of(sae.cfg)
        self._losses_checked = False

    @override
    def fit(self) -> T_TRAINING_SAE:
        """Train this SAE's group to the end. Raises what `loop.fit` raises."""
        self.group.fit()
        return self.sae

    @override
    def step(self, batch: Int[Tensor, "prompts pos"]) -> StepOutput:
        """One optimizer step of this SAE's group on whole prompts. Raises `NonFiniteLossError`, with the SAEs as they were."""
        self.group.step(batch)
        return next(self.group.outputs[name] for name, trainer in self.group.trainers.items() if trainer is self)

    @property
    def n_steps_done(self) -> int:
        """Optimizer steps begun and not undone, the one under way among them."""
        return self.n_training_samples // self.cfg.train_batch_size_samples

    def follow(self, rate: LearningRate) -> None:
        """Have the learning rate where a stage's schedule has it after the steps that were done of the stage.

        Where the settings are the same that is where a checkpoint has it, since a schedule goes by steps alone.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate.lr
            del group["initial_lr"]
        self.lr_scheduler = rate.scheduler(self.optimizer)
        with warnings.catch_warnings():
            # Of torch's, that the optimizer has made no step; it made them before the checkpoint.
            warnings.simplefilter("ignore", UserWarning)
            for _ in range(self.n_steps_done - rate.first_step):
                self.lr_scheduler.step()

    def begin_stage(self, rate: LearningRate) -> None:
        """Start the optimizer anew, its moments being those of another loss, at the first step of a stage's schedule."""
        self.optimizer.state.clear()
        self.follow(rate)

    def begin_step(self) -> dict[str, Tensor]:
        """Get ready for a step's forward passes; returns what `undo_step` takes should the step not stand."""
        self.n_training_samples += self.cfg.train_batch_size_samples
        self.sae.train()
        # A threshold such as BatchTopK's moves in the forward pass, before it is known whether the step will stand.
        return {name: buffer.clone() for name, buffer in self.sae.named_buffers()}

    def undo_step(self, buffers: dict[str, Tensor]) -> None:
        """Put back what `begin_step` and the forward passes have changed."""
        self.optimizer.zero_grad()
        self.sae.load_state_dict(buffers, strict=False)
        self.n_training_samples -= self.cfg.train_batch_size_samples

    def forward(
        self, x: Float[Tensor, "tokens d_in"], target: Float[Tensor, "tokens d_out"] | None = None
    ) -> tuple[TrainStepOutput, Float[Tensor, "tokens d_out"]]:
        """The SAE's training pass on a hook's activations: SAELens' record, and the output in the activations' own scale.

        `target` is what a transcoder's output stands for. Raises TypeError for an architecture whose loss is not its
        reconstruction plus the losses it names.
        """
        step_input = {
            "sae_in": self.activation_scaler(self._as_trained_on(x)),
            "dead_neuron_mask": self.dead_neurons,
            "coefficients": self.get_coefficients(),
            "n_training_steps": self.n_training_steps,
            "is_logging_step": self._is_logging_step(),
        }
        with self._autocast, self._products:
            output = self.sae.training_forward_pass(
                TrainStepInput(**step_input)
                if target is None
                else TranscoderStepInput(**step_input, target=self._as_trained_on(target))
            )
        if not self._losses_checked:
            _check_losses(self.sae, output)
            self._losses_checked = True
        # As wide as the features, and nobody's business from here on: what autograd needs of it, it keeps itself.
        output.hidden_pre = output.hidden_pre.new_empty(0)
        return output, self.activation_scaler.unscale(output.sae_out)

    def _as_trained_on(self, activation: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens d"]:
        # As SAELens' store does: activations of a low-precision model are trained on in float32.
        return activation.to(self.sae.device, torch.promote_types(activation.dtype, torch.float32))

    def end_step(self, output: StepOutput) -> None:
        """Apply the gradient of a step's forward passes, which the group has clipped and found finite."""
        self._count_firing(output)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.lr_scheduler.step()
        for scheduler in self.coefficient_schedulers.values():
            scheduler.step()

    def log_sparsity(self, last: bool = False) -> None:
        """SAELens' sparsity log, where a window of steps is full; its statistics start anew then, unless it is the `last`."""
        sparsity = self.full_sparsity_window_log() if last else self.maybe_reset_sparsity()
        if sparsity and self.log is not None:
            self.log(sparsity, self.n_training_steps)

    def log_step(self, output: StepOutput, clock: Clock) -> None:
        """On a logging step, add to the history and log it; evaluate and log that as often as SAELens does."""
        if not self.is_logging_step:
            return
        row = self.build_train_step_log_dict(output, self.n_training_samples)
        row = {"details/seconds": clock.seconds, **row}
        if self.group.course.n_stages > 1:
            row["details/stage"] = self.group.course.stage
        self.history.append({"step": self.n_training_steps, **row})
        if self.log is None:
            return
        self.log(row, self.n_training_steps)
        if ((self.n_training_steps + 1) // self._log_every) % self.cfg.logger.eval_every_n_wandb_logs == 0:
            self.log(self._evaluate(), self.n_training_steps)

    def finish(self) -> None:
        """What SAELens does when training ends: the last sparsity log, statistics folded into the weights, metadata."""
        self.log_sparsity(last=True)
        scaler = self.activation_scaler
        if scaler.scaling_factor is not None:
            self.sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
            scaler.scaling_factor = None
        if (whitening := scaler.whitening) is not None:
            self.sae.fold_activation_whitening(
                mean=whitening.mean,
                whitening_matrix=whitening.matrix,
                unwhitening_matrix=whitening.inverse_matrix,
            )
            scaler.whitening = None
        self.set_final_sae_metadata()

    def estimate_activation_statistics(self, activations: Any) -> None:
        """What SAELens' `fit` does first, from an iterator of activations at the SAE's hook."""
        normalize, scaler = self.sae.cfg.normalize_activations, self.activation_scaler
        arguments: dict[str, Any] = {
            "d_in": self.sae.cfg.d_in,
            "data_provider": activations,
            "n_batches_for_norm_estimate": self.cfg.n_batches_for_norm_estimate,
        }
        if normalize == "expected_average_only_in" and scaler.scaling_factor is None:
            scaler.estimate_scaling_factor(**arguments)
        elif normalize == "covariance_whitening" and scaler.whitening is None:
            scaler.estimate_whitening(**arguments)

    @property
    def is_logging_step(self) -> bool:
        """Whether the step under way is one of those that are logged."""
        return self._is_logging_step()

    @property
    def _log_every(self) -> int:
        return self.cfg.logger.wandb_log_frequency

    @torch.no_grad()
    def _count_firing(self, output: StepOutput) -> None:
        """SAELens' running statistics: tokens fired on, and optimizer steps since a feature last fired."""
        self.n_forward_passes_since_fired += 1
        self.n_forward_passes_since_fired.masked_fill_(output.firing > 0, 0)
        self.act_freq_scores += output.firing
        self.n_frac_active_samples += output.n_tokens

    @torch.no_grad()
    def _evaluate(self) -> dict[str, Any]:
        self.sae.eval()
        figures: dict[str, Any] = {}
        if self.evaluator is not None:
            figures |= self.evaluator(self.sae, self.data_provider, self.activation_scaler)
        figures |= {name: wandb.Histogram(value) for name, value in self.sae.log_histograms().items()}  # pyright: ignore[reportArgumentType]
        self.sae.train()
        return figures

    @override
    def _is_logging_step(self) -> bool:
        # SAELens logs to W&B or not at all; the history is kept either way.
        return (self.n_training_steps + 1) % self._log_every == 0

    @override
    @torch.no_grad()
    def build_train_step_log_dict(self, output: TrainStepOutput, n_training_samples: int) -> dict[str, Any]:
        """SAELens' log of a step, with each objective coefficient, and L0 over all of the step's tokens."""
        log = super().build_train_step_log_dict(output, n_training_samples)
        if isinstance(output, StepOutput):
            log["metrics/l0"] = (output.firing.sum() / output.n_tokens).item()
            log |= {f"metrics/{name}": value.item() for name, value in output.parts.items()}
            log |= {f"details/{name}_coefficient": value for name, value in output.coefficients.items()}
        return log

    @override
    def save_checkpoint(
        self, checkpoint_name: str, base_path: Path | str | None = None, wandb_aliases: list[str] | None = None
    ) -> None:
        """As in SAELens, with the history, but written beside its name and moved there whole."""
        base = base_path if base_path is not None else self.cfg.checkpoint_path
        if base is None:
            super().save_checkpoint(checkpoint_name, None, wandb_aliases)
            return
        with replaced_whole(Path(base) / checkpoint_name) as new:
            super().save_checkpoint(checkpoint_name, new.parent, wandb_aliases)
            write_history(self.history, new)
            self.group.course.save(new)

    @override
    def load_trainer_state(self, checkpoint_path: Path | str) -> None:
        """As in SAELens, without writing the checkpoints again that were passed before, on this config's own schedule.

        Raises ValueError if the config's training ended before the checkpoint.
        """
        # One that takes the state of any other, of however many parts; how far it was is known by the steps.
        self.lr_scheduler = CosineAnnealingLR(self.optimizer, T_max=1)
        super().load_trainer_state(checkpoint_path)
        last, total = self.n_training_samples - self.cfg.train_batch_size_samples, self.cfg.total_training_samples
        if last >= total:
            raise ValueError(
                f"training_tokens={total}, but {str(checkpoint_path)!r} is after {self.n_training_samples}; set it to more"
            )
        self.follow(self.group.course.learning_rate)
        self.history = read_history(checkpoint_path)
        self.checkpoint_thresholds = [t for t in self.checkpoint_thresholds if t >= self.n_training_samples]

    def check_finite(self, checkpoint_path: Path | str) -> None:
        """Raise ValueError, naming it, for a number of a checkpoint that was loaded which no step could be made from."""
        state = [
            (f"the optimizer's {name}", value) for of in self.optimizer.state.values() for name, value in of.items()
        ]
        for name, value in [*self.sae.named_parameters(), *state]:
            if isinstance(value, Tensor) and not bool(value.isfinite().all()):
                raise ValueError(
                    f"checkpoint {str(checkpoint_path)!r}: {name} holds values that are not finite numbers, and no lr trains them; "
                    "resume from an earlier checkpoint"
                )


def _check_losses(sae: TrainingSAE[Any], output: TrainStepOutput) -> None:
    """Raises TypeError for an architecture whose loss is not its reconstruction plus the losses it names."""
    rounding = 8 * torch.finfo(output.loss.dtype).eps
    total = sum((loss.detach() for loss in output.losses.values()), torch.zeros_like(output.loss.detach()))
    if "mse_loss" not in output.losses or not torch.allclose(
        total, output.loss.detach(), rtol=rounding, equal_nan=True
    ):
        raise TypeError(
            f"architecture {sae.cfg.architecture()!r} adds to its loss what it does not list in TrainStepOutput.losses, so "
            "an objective cannot be put in the place of its reconstruction; have calculate_aux_loss return a dict"
        )


def to_wandb(figures: dict[str, Any], step: int) -> None:
    """Log to the one W&B run of the process, as SAELens does."""
    wandb.log(figures, step=step)
