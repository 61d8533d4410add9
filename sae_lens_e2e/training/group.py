"""SAEs that are trained in one spliced pass, and the objective, or the stages, they share."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from sae_lens.saes.sae import TrainingSAE, TrainStepOutput
from torch import Tensor

from sae_lens_e2e.objectives import Batch, Objective, Part, Term
from sae_lens_e2e.objectives.plugins import said_of
from sae_lens_e2e.output import replaced_whole
from sae_lens_e2e.splice import Clean, Remembered, Replace, Site, SplicedModel, Where
from sae_lens_e2e.training import ranks
from sae_lens_e2e.training.clock import Clock
from sae_lens_e2e.training.course import Course
from sae_lens_e2e.training.history import write_history
from sae_lens_e2e.training.loop import fit
from sae_lens_e2e.training.output import StepOutput
from sae_lens_e2e.training.plan import StepPlan
from sae_lens_e2e.training.prompts import PromptBatches
from sae_lens_e2e.training.stages import AnyObjective
from sae_lens_e2e.training.step import step
from sae_lens_e2e.training.terms import evaluated, parts_of, terms_of, weighted_sum
from sae_lens_e2e.training.trainer import E2ETrainer, NonFiniteLossError

Trainer = E2ETrainer[Any, Any]

_THRESHOLD = "topk_threshold"
"""SAELens' name, in each architecture that has one."""


class Group:
    """SAEs that are trained in one spliced pass, by name; one alone is a group too.

    Each has its optimizer settings and statistics; the gradient is clipped over all of them together, as Apollo does, and a step
    that is not finite moves none of them. Raises ValueError for an objective whose passes do not fit the names.
    """

    def __init__(
        self,
        model: SplicedModel,
        trainers: Mapping[str, Trainer],
        sites: Mapping[str, Site],
        objective: AnyObjective,
        plan: StepPlan,
        save_checkpoint_fn: Callable[[Path | None], None] | None = None,
    ):
        self.model, self.plan = model, plan
        # In order of depth, in which they are spliced in.
        self.sites = {name: sites[name] for name in model.names_in_order(sites)}
        self.trainers = {name: trainers[name] for name in self.sites}
        self.course = Course(objective, self.first.cfg, list(self.trainers))
        self.clock = Clock(model.device)
        """Runs during this group's steps, clean passes included, as if it were trained alone."""
        self.outputs: dict[str, StepOutput] = {}
        """What came out of the last step, by SAE."""
        self._save_checkpoint_fn = save_checkpoint_fn
        self._buffers: dict[str, dict[str, Tensor]] = {}
        self._resumed_from: str | None = None
        """The checkpoint that was gone on from, until a step has stood since."""
        for trainer in self.trainers.values():
            trainer.group = self
            trainer.follow(self.course.learning_rate)
        self._fraction = 0.0
        """Of the training done when the step under way began."""

    @property
    def objective(self) -> Objective:
        """What the step under way compares."""
        return self.course.objective

    @property
    def first(self) -> Trainer:
        """The trainer of the SAE that comes first; all of a group are at the same step."""
        return next(iter(self.trainers.values()))

    @property
    def is_done(self) -> bool:
        """Whether the last step has been taken."""
        return self.first.n_training_samples >= self.first.cfg.total_training_samples

    @property
    def runs_past_hooks(self) -> bool:
        """Whether the objective compares anything that comes after the SAEs."""
        return self.objective.compares_logits or bool(self.objective.hooks)

    def fit(self) -> None:
        """Train the SAEs to the end. Raises what `loop.fit` raises."""
        batches = self.first.data_provider
        assert isinstance(batches, PromptBatches)
        fit(self.model, [self], batches, self.plan)

    def step(self, prompts: Int[Tensor, "prompts pos"]) -> None:
        """One optimizer step, with no more around it. Raises NonFiniteLossError, with the SAEs as they were."""
        step(self.model, [self], prompts, self.plan)

    def begin_step(self) -> None:
        """Get ready for a step's forward passes; the first of a stage starts the optimizers anew."""
        self.outputs = {}
        self._fraction = min(self.first.n_training_samples / self.first.cfg.total_training_samples, 1.0)
        if self.course.begin_step(self.first.n_steps_done, self._fraction):
            for trainer in self.trainers.values():
                trainer.begin_stage(self.course.learning_rate)
        self._buffers = {name: trainer.begin_step() for name, trainer in self.trainers.items()}

    def forward_backward(
        self, clean: Clean, where: Where, share: float, label_rate: float, remembered: Remembered | None = None
    ) -> None:
        """SAEs, spliced passes, losses and backward on one micro-batch, which is `share` of the step's trained tokens.

        What is `remembered` of the clean model's distributions serves every pass.
        """
        counted: dict[str, TrainStepOutput] = {}
        terms: dict[str, Term] = {}
        values: dict[str, Tensor] = {}
        losses: list[Tensor] = []
        for names in self.course.passes:
            batch, outputs = self._run_pass(names, clean, where, label_rate, counted, remembered)
            new = {name: output for name, output in outputs.items() if name not in counted}
            own = [loss for name in new for loss in batch.parts[name].own_losses.values()]
            of_pass = {self._logged_as(term, names): value for term, value in terms_of(self.objective, batch).items()}
            found = evaluated(self.objective, of_pass, self.first.is_logging_step)
            loss = weighted_sum(self.objective, of_pass, found, own)
            (share * loss).backward()
            losses.append(loss.detach())
            counted |= new
            terms |= of_pass
            values |= found
            parts = {name: batch.parts[name] for name in new}
            self._check_names(of_pass, parts)
        for name, output in counted.items():
            self._record(name, output, sum(losses[1:], losses[0]), terms, values, share)

    def sum_over_ranks(self, n_tokens: int, n_passes: int) -> None:
        """Add up what the ranks have made of the step's `n_tokens` trained tokens: gradients, losses and counts.

        BatchTopK's threshold, a running mean over forward passes, of which this rank ran `n_passes`, is what one process would have; what
        else a forward pass leaves behind, such as an objective's running means, is averaged.
        """
        saes = [trainer.sae for trainer in self.trainers.values()]
        outputs = self.outputs.values()
        gradients = ranks.gradients([p for sae in saes for p in sae.parameters()])
        ranks.sum_([*gradients, *(value for output in outputs for value in output.added_up)])
        averaged = list(self.course.means.values.values())
        for name, trainer in self.trainers.items():
            buffers = dict(trainer.sae.named_buffers())
            if (threshold := buffers.pop(_THRESHOLD, None)) is not None:
                kept = (1 - trainer.sae.cfg.topk_threshold_lr) ** n_passes
                ranks.chained_(threshold, self._buffers[name][_THRESHOLD], kept)
            averaged += buffers.values()
        ranks.mean_(averaged)
        for output in outputs:
            output.n_tokens = n_tokens

    def copy_first(self) -> None:
        """Have the weights and estimated statistics of rank 0, whose device may have rounded otherwise."""
        for trainer in self.trainers.values():
            ranks.copy_first_([*trainer.sae.parameters(), *trainer.sae.buffers()])
            scaler = trainer.activation_scaler
            scaler.scaling_factor = ranks.first(lambda scaler=scaler: scaler.scaling_factor)
            if (whitening := scaler.whitening) is not None:
                ranks.copy_first_([whitening.mean, whitening.matrix, whitening.inverse_matrix])

    def end_step(self) -> None:
        """Clip, check and apply the gradient of a step's forward passes. Raises NonFiniteLossError, the SAEs as they were."""
        parameters = [p for trainer in self.trainers.values() for p in trainer.sae.parameters()]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.plan.max_grad_norm)
        loss = next(iter(self.outputs.values())).loss
        # The one thing in a step that waits for the device.
        if not math.isfinite(float(loss.to(norm.device) + norm)):
            error = self._non_finite(loss, norm)
            self.undo_step()
            raise error
        for name, trainer in self.trainers.items():
            self.outputs[name].metrics["grad_norm"] = norm.detach()
            trainer.end_step(self.outputs[name])
        self._resumed_from = None

    def undo_step(self) -> None:
        """Put back what a step that does not stand has changed."""
        self.course.undo_step()
        for name, trainer in self.trainers.items():
            trainer.undo_step(self._buffers[name])

    def log_step(self) -> None:
        """What SAELens logs at the end of a step, for each SAE; then the step is done, and a checkpoint may be due."""
        for name, trainer in self.trainers.items():
            trainer.log_step(self.outputs[name], self.clock)
            trainer.n_training_steps += 1
        thresholds = self.first.checkpoint_thresholds
        if thresholds and self.first.n_training_samples > thresholds[0]:
            thresholds.pop(0)
            self.save_checkpoint(str(self.first.n_training_samples))

    def finish(self) -> None:
        """What SAELens does when training ends."""
        for trainer in self.trainers.values():
            trainer.finish()
        if self.first.cfg.save_final_checkpoint:
            self.save_checkpoint(f"final_{self.first.n_training_samples}")

    def save_checkpoint(self, name: str) -> None:
        """A checkpoint of all, from which `load_checkpoint` goes on: SAELens' own for one SAE, a folder for each of several.

        All ranks have the same to write, and rank 0 does.
        """
        if not ranks.is_first():
            return
        base = self.first.cfg.checkpoint_path
        if len(self.trainers) == 1 or base is None:
            for trainer in self.trainers.values():
                trainer.save_checkpoint(name)
            return
        with replaced_whole(Path(base) / name) as new:
            for sae_name, trainer in self.trainers.items():
                trainer.save_checkpoint(sae_name, new)
            write_history(self.history, new)
            if self._save_checkpoint_fn is not None:
                self._save_checkpoint_fn(new)

    def load_checkpoint(self, path: str | Path) -> None:
        """Go on from a checkpoint of `save_checkpoint`.

        Raises FileNotFoundError for an SAE that is not in it, ValueError for one whose numbers are not finite, or of another stage
        than the settings lead to.
        """
        for name, trainer in self.trainers.items():
            folder = Path(path) if len(self.trainers) == 1 else Path(path) / name
            if not folder.is_dir():
                raise FileNotFoundError(f"checkpoint {str(path)!r} has no {name!r}; it is of a run with other SAEs")
            # All have the same.
            self.course.load(folder)
            trainer.load_trainer_state(folder)
            trainer.sae.load_weights_from_checkpoint(folder)
            trainer.check_finite(folder)
        self.course.check_loaded(self.first.n_steps_done)
        self._resumed_from = str(path)
        history = self.first.history
        self.clock.seconds = history[-1]["details/seconds"] if history else 0.0

    @property
    def history(self) -> list[dict[str, Any]]:
        """The log of all, a row a logged step: one SAE's as it is, several by name, as in `k16/metrics/l0`."""
        if len(self.trainers) == 1:
            return self.first.history
        # Which losses there are may change from stage to stage.
        keys = {name: _keys(trainer.history) for name, trainer in self.trainers.items()}
        rows: list[dict[str, Any]] = []
        for parts in zip(*(trainer.history for trainer in self.trainers.values()), strict=True):
            row: dict[str, Any] = {"step": parts[0]["step"]}
            for name, part in zip(self.trainers, parts, strict=True):
                row |= {f"{name}/{key}": part.get(key, math.nan) for key in keys[name]}
            rows.append(row)
        return rows

    def _run_pass(
        self,
        names: Collection[str],
        clean: Clean,
        where: Where,
        label_rate: float,
        counted: Collection[str],
        remembered: Remembered | None,
    ) -> tuple[Batch, dict[str, TrainStepOutput]]:
        """Splice in the SAEs in `names`, at the trained tokens. Those `counted` already leave their state as it is."""
        outputs: dict[str, TrainStepOutput] = {}
        parts: dict[str, Part] = {}

        def module(name: str, site: Site) -> Replace:
            trainer = self.trainers[name]

            def function(x: Tensor) -> dict[str, Tensor]:
                target = {h: x if h == site.read else site.take(where.take(clean.at[h])) for h in site.writes}
                with _state_kept(trainer.sae, name in counted):
                    output, out = trainer.forward(x, None if site.is_sae else target[site.writes[0]])
                own = {loss: value for loss, value in output.losses.items() if loss != "mse_loss"}
                outputs[name] = output
                put = dict.fromkeys(site.writes, out)
                parts[name] = Part(x, output.feature_acts, target, put, output.losses["mse_loss"], own)
                return put

            return function

        replace = {site: module(name, site) for name, site in self.sites.items() if name in names}
        objective = self.objective
        if not self.runs_past_hooks:
            for site, function in replace.items():
                function(site.take(where.take(clean.at[site.read])))
            return Batch(clean.tokens, where, parts, fraction=self._fraction, means=self.course.means), outputs
        with self.plan.lm_autocast(clean.tokens.device):
            spliced = self.model.spliced(
                clean,
                where,
                replace,
                objective.hooks,
                objective.compares_logits,
                checkpoint=self.plan.checkpoint_activations,
            )
        return (
            Batch(
                clean.tokens,
                where,
                parts,
                {hook: where.take(clean.at[hook]) for hook in objective.hooks},
                {hook: where.take(spliced.at[hook]) for hook in objective.hooks},
                where.take(clean.final) if objective.compares_logits and clean.final is not None else None,
                where.take(spliced.final) if spliced.final is not None else None,
                self.model.unembedding,
                self._fraction,
                label_rate,
                self.course.means,
                remembered,
            ),
            outputs,
        )

    def _logged_as(self, term: str, names: Collection[str]) -> str:
        return term if len(self.course.passes) == 1 else f"{term}/{'+'.join(names)}"

    def _check_names(self, terms: Collection[str], parts: Mapping[str, Part]) -> None:
        for name, part in parts.items():
            if taken := sorted(set(terms) & part.own_losses.keys()):
                raise ValueError(
                    f"{said_of(self.objective)} has a term {taken[0]!r}, which is a loss of "
                    f"{self.trainers[name].sae.cfg.architecture()!r} already; give the term another name"
                )

    def _record(
        self,
        name: str,
        output: TrainStepOutput,
        loss: Tensor,
        terms: Mapping[str, Term],
        values: Mapping[str, Tensor],
        share: float,
    ) -> None:
        """Add one SAE's part of a micro-batch to what comes out of the step: the terms they share, and its own losses."""
        own = {loss_name: value for loss_name, value in output.losses.items() if loss_name != "mse_loss"}
        shared = dict(values)
        if len(self.trainers) > 1 and "mse_loss" in shared:
            shared["mse_loss"] = output.losses["mse_loss"]
        parts: dict[str, Tensor] = {}
        if self.first.is_logging_step:
            parts = parts_of(self.objective, terms)
        coefficients = {term: value.coefficient for term, value in terms.items()}
        of_pass = StepOutput.of_pass(output, loss, shared | own, parts, coefficients, share)
        self.outputs[name] = of_pass.plus(self.outputs.get(name))

    def _non_finite(self, loss: Tensor, norm: Tensor) -> NonFiniteLossError:
        losses = {name: value for output in self.outputs.values() for name, value in output.losses.items()}
        listed = ", ".join(f"{name} {float(value):.4g}" for name, value in losses.items())
        advice = "Resume from the last checkpoint with a lower lr or a longer lr_warm_up_steps"
        if self._resumed_from is not None:
            advice = f"It is so in {self._resumed_from!r} already, whatever the lr; resume from an earlier checkpoint"
        return NonFiniteLossError(
            f"step {self.first.n_training_steps}: the loss is {float(loss)} (grad norm {float(norm):.4g}, {listed}); the SAE "
            f"was not updated. {advice}"
        )


def _keys(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns of a history, in the order in which they come up, without the step."""
    return [key for key in dict.fromkeys(key for row in rows for key in row) if key != "step"]


@contextmanager
def _state_kept(sae: TrainingSAE[Any], keep: bool) -> Iterator[None]:
    """Undo what a forward pass does to buffers such as BatchTopK's threshold, for one that does not count."""
    before = {name: buffer.clone() for name, buffer in sae.named_buffers()} if keep else {}
    yield
    if keep:
        sae.load_state_dict(before, strict=False)
