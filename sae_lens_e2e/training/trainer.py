"""One optimizer step of end-to-end training, in the place of SAELens' own."""

import math
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import wandb
from jaxtyping import Bool, Float, Int
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import T_TRAINING_SAE, T_TRAINING_SAE_CONFIG, TrainingSAE, TrainStepInput, TrainStepOutput
from sae_lens.training.sae_trainer import Evaluator, SAETrainer, SaveCheckpointFn
from torch import Tensor
from typing_extensions import override

from sae_lens_e2e.objectives import Objective, SplicedBatch, Term
from sae_lens_e2e.splice import CleanPass, Splice
from sae_lens_e2e.training.history import read_history, write_history
from sae_lens_e2e.training.step import PromptBatches, StepOutput, StepPlan


class NonFiniteLossError(RuntimeError):
    """A loss or gradient became NaN or infinite; the SAE is as it was before that step."""


class E2ETrainer(SAETrainer[T_TRAINING_SAE, T_TRAINING_SAE_CONFIG]):
    """SAELens' trainer with an objective in the place of reconstruction, taking tokens in the place of activations.

    Raises `NonFiniteLossError` if a loss is NaN, before the optimizer sees it.
    """

    def __init__(
        self,
        cfg: SAETrainerConfig,
        sae: T_TRAINING_SAE,
        data_provider: PromptBatches,
        splice: Splice,
        objective: Objective,
        plan: StepPlan,
        evaluator: Evaluator[T_TRAINING_SAE] | None = None,
        save_checkpoint_fn: SaveCheckpointFn | None = None,
    ) -> None:
        super().__init__(cfg, sae, data_provider, evaluator, save_checkpoint_fn)
        if torch.device(cfg.device).type in ("cpu", "cuda"):
            # The same Adam in one pass over its state, where SAELens' takes a dozen with temporaries in between.
            for group in self.optimizer.param_groups:
                group["fused"] = True
        self.store = data_provider.store
        self.splice = splice
        self.objective = objective
        self.plan = plan
        self.history: list[dict[str, Any]] = []
        """What SAELens would log to W&B, every `logger.wandb_log_frequency` steps, whether it does or not."""
        self.seconds = 0.0
        """Spent on this SAE's steps, clean passes included, as if it were trained alone."""

    @override
    def fit(self) -> T_TRAINING_SAE:
        self.estimate_activation_statistics()
        return super().fit()

    @override
    def step(self, batch: Int[Tensor, "prompts pos"]) -> StepOutput:
        """One optimizer step on whole prompts: the gradient of the mean over all its trained tokens, clipped once."""
        (output,) = step_together([self], batch)
        if isinstance(output, Exception):
            raise output
        return output

    def forward_backward(
        self,
        tokens: Int[Tensor, "prompts pos"],
        mask: Bool[Tensor, "prompts pos"],
        share: float,
        clean: CleanPass | None = None,
    ) -> StepOutput:
        """Clean pass, unless it is given, SAE, spliced pass, loss and backward; `share` is this pass's part of the step."""
        clean = clean or self.clean_pass(tokens, stop_at_hook=not self.runs_past_hook)
        x = self.splice.read(clean.activation)[mask.to(clean.activation.device)]
        with self.autocast_if_enabled:
            output = self.sae.training_forward_pass(self._sae_input(x))
        own_terms = _architecture_terms(self.sae, output)
        batch = SplicedBatch(tokens[mask], output.losses["mse_loss"])
        if self.runs_past_hook:
            batch = self._spliced_batch(batch, clean, output.sae_out, mask)
        terms = self.objective.terms(batch)
        loss = _weighted_sum(terms, own_terms)
        (share * loss).backward()
        return _record(output, terms, own_terms, loss, share)

    @property
    def runs_past_hook(self) -> bool:
        """Whether the objective compares anything that comes after the SAE."""
        return self.objective.compares_logits or bool(self.objective.hooks)

    def clean_pass(self, tokens: Int[Tensor, "prompts pos"], stop_at_hook: bool) -> CleanPass:
        """The language model without the SAE, under the plan's autocast."""
        with self._autocast_lm(tokens):
            return self.splice.clean(tokens, stop_at_hook)

    def begin_step(self) -> dict[str, Tensor]:
        """Get ready for a step's forward passes; returns what `end_step` puts back should the step not stand."""
        self.n_training_samples += self.cfg.train_batch_size_samples
        self.sae.train()
        # A threshold such as BatchTopK's moves in the forward pass, before it is known whether the step will stand.
        return {name: buffer.clone() for name, buffer in self.sae.named_buffers()}

    def end_step(self, output: StepOutput, buffers: dict[str, Tensor]) -> None:
        """Clip, check and apply the gradient of a step's forward passes. Raises NonFiniteLossError, with the SAE as it was."""
        self._clip_and_check(output, buffers)
        self._count_firing(output)
        self._update_parameters()
        if self._is_logging_step():
            log = self.build_train_step_log_dict(output, self.n_training_samples)
            self.history.append({"step": self.n_training_steps, "details/seconds": self.seconds, **log})

    def _sae_input(self, x: Float[Tensor, "tokens d_in"]) -> TrainStepInput:
        # As SAELens' store does: activations of a low-precision model are trained on in float32.
        x = x.to(self.sae.device, torch.promote_types(x.dtype, torch.float32))
        return TrainStepInput(
            sae_in=self.activation_scaler(x),
            dead_neuron_mask=self.dead_neurons,
            coefficients=self.get_coefficients(),
            n_training_steps=self.n_training_steps,
            is_logging_step=self._is_logging_step(),
        )

    def _spliced_batch(
        self,
        batch: SplicedBatch,
        clean: CleanPass,
        sae_out: Float[Tensor, "tokens d_in"],
        mask: Bool[Tensor, "prompts pos"],
    ) -> SplicedBatch:
        """Run on from the hook with the SAE's output at the trained positions and the model's own at the others."""
        x = self.splice.read(clean.activation)
        mask = mask.to(x.device)
        x_hat = self.activation_scaler.unscale(sae_out).to(x.device, x.dtype)
        x_hat = x_hat.reshape(x.shape) if bool(mask.all()) else x.clone().index_put((mask,), x_hat)
        with self._autocast_lm(batch.tokens):
            spliced = self.splice.spliced(clean, self.splice.write(clean.activation, x_hat))
        assert clean.final is not None
        return SplicedBatch(
            batch.tokens,
            batch.mse_loss,
            {hook: clean.downstream[hook][mask] for hook in self.objective.hooks},
            {hook: spliced.downstream[hook][mask] for hook in self.objective.hooks},
            clean.final[mask] if self.objective.compares_logits else None,
            spliced.final[mask] if self.objective.compares_logits else None,
            self.splice.head,
        )

    @torch.no_grad()
    def _count_firing(self, output: StepOutput) -> None:
        """SAELens' running statistics: tokens fired on, and optimizer steps since a feature last fired."""
        self.n_forward_passes_since_fired += 1
        self.n_forward_passes_since_fired[output.firing > 0] = 0
        self.act_freq_scores += output.firing
        self.n_frac_active_samples += output.n_tokens

    def _clip_and_check(self, output: StepOutput, buffers: dict[str, Tensor]) -> None:
        """Clip the step's gradient; if it or the loss is not finite, put back what has changed and raise."""
        norm = torch.nn.utils.clip_grad_norm_(self.sae.parameters(), self.plan.max_grad_norm)
        output.metrics["grad_norm"] = norm.detach()
        if not math.isfinite(float(output.loss) + float(norm)):
            self.optimizer.zero_grad()
            self.sae.load_state_dict(buffers, strict=False)
            self.n_training_samples -= self.cfg.train_batch_size_samples
            losses = ", ".join(f"{name} {float(value):.4g}" for name, value in output.losses.items())
            raise NonFiniteLossError(
                f"step {self.n_training_steps}: the loss is {float(output.loss)} (grad norm {float(norm):.4g}, {losses}); "
                "the SAE was not updated. Resume from the last checkpoint with a lower lr or a longer lr_warm_up_steps"
            )

    def _update_parameters(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.lr_scheduler.step()
        for scheduler in self.coefficient_schedulers.values():
            scheduler.step()

    def _autocast_lm(self, tokens: Tensor) -> torch.autocast:
        return torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=self.plan.autocast_lm)

    def estimate_activation_statistics(self) -> None:
        """Do what SAELens' `fit` does first, from the store's activations, where `fit` would be given tokens."""
        normalize, scaler = self.sae.cfg.normalize_activations, self.activation_scaler
        arguments: dict[str, Any] = {
            "d_in": self.sae.cfg.d_in,
            "data_provider": self.store,
            "n_batches_for_norm_estimate": self.cfg.n_batches_for_norm_estimate,
        }
        if normalize == "expected_average_only_in" and scaler.scaling_factor is None:
            scaler.estimate_scaling_factor(**arguments)
        elif normalize == "covariance_whitening" and scaler.whitening is None:
            scaler.estimate_whitening(**arguments)

    @override
    def _is_logging_step(self) -> bool:
        # SAELens logs to W&B or not at all; the history is kept either way.
        return (self.n_training_steps + 1) % self.cfg.logger.wandb_log_frequency == 0

    @override
    def _log_train_step(self, step_output: TrainStepOutput) -> None:
        # SAELens' own would work out again what the history has already.
        if self._is_logging_step():
            logged = {name: value for name, value in self.history[-1].items() if name != "step"}
            wandb.log(logged, step=self.n_training_steps)

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
        """As in SAELens, but written beside its name and moved there whole."""
        base = base_path if base_path is not None else self.cfg.checkpoint_path
        if base is None:
            super().save_checkpoint(checkpoint_name, None, wandb_aliases)
            return
        partial, final = Path(base) / f".{checkpoint_name}.partial", Path(base) / checkpoint_name
        try:
            super().save_checkpoint(partial.name, base, wandb_aliases)
            write_history(self.history, partial)
            if final.exists():
                shutil.rmtree(final)
            os.replace(partial, final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    @override
    def load_trainer_state(self, checkpoint_path: Path | str) -> None:
        """As in SAELens, without writing the checkpoints again that were passed before."""
        super().load_trainer_state(checkpoint_path)
        self.history = read_history(checkpoint_path)
        self.seconds = self.history[-1]["details/seconds"] if self.history else 0.0
        self.checkpoint_thresholds = [t for t in self.checkpoint_thresholds if t >= self.n_training_samples]


def step_together(
    trainers: Sequence["E2ETrainer[Any, Any]"], batch: Int[Tensor, "prompts pos"]
) -> list[StepOutput | Exception]:
    """One optimizer step of each of several trainers on the same prompts, with one clean pass for them all.

    They must share a splice and a plan. Gives each one's output, or what it raised: one that fails does not stop the others.
    Raises ValueError if no token of the batch is trained on.
    """
    plan = trainers[0].plan
    mask = plan.trained_positions(batch)
    n_tokens = int(mask.sum())
    if n_tokens == 0:
        raise ValueError("exclude_special_tokens leaves no token to train on in a whole batch; exclude fewer")
    buffers = [trainer.begin_step() for trainer in trainers]
    outputs: list[Any] = [None] * len(trainers)
    stop_at_hook = not any(trainer.runs_past_hook for trainer in trainers)
    size = plan.prompts_per_forward
    for tokens, trained in zip(batch.split(size), mask.split(size), strict=True):
        n_trained = int(trained.sum())
        if n_trained == 0:
            continue
        start = time.perf_counter()
        clean = trainers[0].clean_pass(tokens, stop_at_hook)
        clean_seconds = time.perf_counter() - start
        for i, trainer in enumerate(trainers):
            if not isinstance(outputs[i], Exception):
                start = time.perf_counter()
                try:
                    outputs[i] = trainer.forward_backward(tokens, trained, n_trained / n_tokens, clean).plus(outputs[i])
                except Exception as error:
                    outputs[i] = error
                trainer.seconds += clean_seconds + time.perf_counter() - start
    for i, trainer in enumerate(trainers):
        if not isinstance(outputs[i], Exception):
            start = time.perf_counter()
            try:
                trainer.end_step(outputs[i], buffers[i])
            except Exception as error:
                outputs[i] = error
            trainer.seconds += time.perf_counter() - start
    return outputs


def _architecture_terms(sae: TrainingSAE[Any], output: TrainStepOutput) -> dict[str, Tensor]:
    """The losses of the SAE's architecture other than reconstruction, coefficients included.

    Raises TypeError for an architecture whose loss is not its reconstruction plus the losses it names.
    """
    terms = {name: loss for name, loss in output.losses.items() if name != "mse_loss"}
    rounding = 8 * torch.finfo(output.loss.dtype).eps
    total = sum((loss.detach() for loss in output.losses.values()), torch.zeros_like(output.loss.detach()))
    if "mse_loss" not in output.losses or not torch.allclose(
        total, output.loss.detach(), rtol=rounding, equal_nan=True
    ):
        raise TypeError(
            f"architecture {sae.cfg.architecture()!r} adds to its loss what it does not list in TrainStepOutput.losses, so "
            "an objective cannot be put in the place of its reconstruction; have calculate_aux_loss return a dict"
        )
    return terms


def _weighted_sum(terms: dict[str, Term], own_terms: dict[str, Tensor]) -> Tensor:
    # A term of coefficient 0 is logged but not differentiated: 0 · inf is NaN, and its backward pass would be for nothing.
    losses = [term.coefficient * term.value for term in terms.values() if term.coefficient] + list(own_terms.values())
    total = losses[0]
    for loss in losses[1:]:
        total = total + loss.to(total.device)
    return total


def _record(
    output: TrainStepOutput, terms: dict[str, Term], own_terms: dict[str, Tensor], loss: Tensor, share: float
) -> StepOutput:
    """One forward pass's part of the step: every loss and metric times its share of the tokens."""
    values = {name: term.value for name, term in terms.items()} | own_terms
    parts = {f"{name}/{part}": value for name, term in terms.items() for part, value in term.parts.items()}
    return StepOutput(
        sae_in=output.sae_in.detach(),
        sae_out=output.sae_out.detach(),
        feature_acts=output.feature_acts.detach(),
        hidden_pre=output.hidden_pre.detach(),
        loss=loss.detach() * share,
        losses={name: value.detach() * share for name, value in values.items()},
        metrics=output.metrics,
        coefficients={name: term.coefficient for name, term in terms.items()},
        parts={name: value.detach() * share for name, value in parts.items()},
        firing=count_firing(output.feature_acts),
        n_tokens=len(output.sae_in),
    )


@torch.no_grad()
def count_firing(feature_acts: Float[Tensor, "tokens d_sae"]) -> Float[Tensor, "d_sae"]:
    """On how many tokens each feature fired, (d_sae,); takes the sparse activations of SAELens' TopK too."""
    if not feature_acts.is_sparse:
        return (feature_acts != 0).sum(0).float()
    feature_acts = feature_acts.coalesce()
    fired = feature_acts.indices()[1][feature_acts.values() != 0]
    return torch.bincount(fired, minlength=feature_acts.shape[1]).float()
