"""A SAELens runner config with one more idea: the objective."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sae_lens.config import LanguageModelSAERunnerConfig, SAETrainerConfig
from sae_lens.saes.sae import T_TRAINING_SAE_CONFIG
from sae_lens.util import extract_layer_from_tlens_hook_name
from typing_extensions import override

from sae_lens_e2e.apollo.runner_settings import runner_settings
from sae_lens_e2e.objectives import Objective
from sae_lens_e2e.objectives.plugins import make_objective

MODEL_CLASSES = ("HookedTransformer", "AutoModelForCausalLM")

# Order of the hooks in a TransformerLens block; those between the first and the last are not told apart by name.
_FIRST_IN_BLOCK, _LAST_IN_BLOCK = "hook_resid_pre", "hook_resid_post"


@dataclass
class E2ERunnerConfig(LanguageModelSAERunnerConfig[T_TRAINING_SAE_CONFIG]):
    """Configuration for training a sparse autoencoder end to end: a SAELens config with an objective.

    Every other field means what it means in SAELens. Batches are made of whole prompts: a forward pass takes
    `store_batch_size_prompts` of them, and an optimizer step accumulates the gradient over `train_batch_size_tokens` tokens.
    With `seqpos_slice` only the positions inside it count; tokens left out by `exclude_special_tokens` count, untrained.

    Raises ValueError, naming the field, for whatever cannot be honoured.

    Args:
        objective (str | Objective): What the SAE's output is compared with: 'local', 'e2e', 'e2e_ds', the name of an installed plugin's, or an Objective with settings of its own.
        max_grad_norm (float): The norm to which each step's gradient is clipped. SAELens has 1.0 built in; the paper used 10 on GPT2-small.
    """

    objective: str | Objective = "e2e_ds"
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        self.objective = make_objective(self.objective)
        self._refuse_what_has_no_meaning()
        self._check_values()
        self._check_hooks()
        named = self.logger.run_name is not None
        super().__post_init__()
        self._check_batches()
        if not named:
            self.logger.run_name = f"{self.objective.name}-{self.logger.run_name}"

    @property
    def prompts_per_step(self) -> int:
        """Prompts per optimizer step."""
        return self.train_batch_size_tokens // self.trained_context_size

    @property
    def trained_context_size(self) -> int:
        """Positions of each prompt that lie inside `seqpos_slice`."""
        return len(range(self.context_size)[slice(*self.seqpos_slice)])

    def _refuse_what_has_no_meaning(self) -> None:
        assert isinstance(self.objective, Objective)
        defaults = {f.name: f.default for f in fields(LanguageModelSAERunnerConfig)}
        if self.use_cached_activations:
            raise ValueError(
                f"use_cached_activations=True: objective {self.objective.name!r} is trained on tokens in order, and cached "
                "activations have none; set it to False, or train locally with SAELens' own runner"
            )
        if self.prefetch_llm_batches:
            raise ValueError(
                f"prefetch_llm_batches={self.prefetch_llm_batches!r}: the language model runs within the training step, not "
                "ahead of it; set it to False"
            )
        if self.compile_llm:
            raise ValueError(
                "compile_llm=True: the language model is run in two parts that SAELens cannot compile; set it to False"
            )
        if self.activations_mixing_fraction != defaults["activations_mixing_fraction"]:
            raise ValueError(
                f"activations_mixing_fraction={self.activations_mixing_fraction!r}: tokens are trained on in order and never "
                "mixed; leave it out"
            )
        estimates = self.sae.normalize_activations in ("expected_average_only_in", "covariance_whitening")
        if self.n_batches_in_buffer != defaults["n_batches_in_buffer"] and not estimates:
            raise ValueError(
                f"n_batches_in_buffer={self.n_batches_in_buffer!r}: there is no activation buffer; leave it out, and shuffle "
                "the dataset instead"
            )
        if self.model_class_name not in MODEL_CLASSES:
            raise ValueError(f"model_class_name={self.model_class_name!r} must be one of {', '.join(MODEL_CLASSES)}")

    def _check_values(self) -> None:
        for name in ("context_size", "train_batch_size_tokens", "store_batch_size_prompts", "training_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be at least 1")
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={self.max_grad_norm!r} must be positive; float('inf') turns clipping off")
        for name in ("lr", "l1_coefficient", "l0_coefficient", "aux_loss_coefficient", "sparsity_coefficient"):
            value = getattr(self, name, None) if name == "lr" else getattr(self.sae, name, None)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value!r} must be a finite number that is not negative")

    def _check_hooks(self) -> None:
        assert isinstance(self.objective, Objective)
        if self.model_class_name != "HookedTransformer":
            return
        layer = extract_layer_from_tlens_hook_name(self.hook_name)
        for hook in self.objective.hooks:
            hook_layer = extract_layer_from_tlens_hook_name(hook)
            if layer is None or hook_layer is None or hook_layer > layer:
                continue
            first, last = hook.endswith(_FIRST_IN_BLOCK), self.hook_name.endswith(_LAST_IN_BLOCK)
            if hook_layer < layer or hook == self.hook_name or first or last:
                raise ValueError(f"downstream_hooks: {hook} is not downstream of hook_name={self.hook_name!r}")

    def _check_batches(self) -> None:
        unit = self.store_batch_size_prompts * self.trained_context_size
        steps, rest = divmod(self.train_batch_size_tokens, unit)
        if rest == 0:
            return
        nearest = " or ".join(str(n * unit) for n in (steps, steps + 1) if n)
        prompts = self.train_batch_size_tokens // self.trained_context_size
        fewer = (
            f", or store_batch_size_prompts to {prompts}"
            if steps == 0 and prompts * self.trained_context_size == self.train_batch_size_tokens
            else ""
        )
        raise ValueError(
            f"train_batch_size_tokens={self.train_batch_size_tokens} is not a whole number of forward passes of "
            f"store_batch_size_prompts={self.store_batch_size_prompts} prompts with {self.trained_context_size} tokens each; "
            f"set it to {nearest}{fewer}"
        )

    @override
    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary, from which `from_dict` makes the config again."""
        assert isinstance(self.objective, Objective)
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
        of the data is the dataset's. Raises ValueError, naming the key, for one that has no equivalent.
        """
        return cls(**runner_settings(path, architecture=architecture, d_in=d_in, overrides=overrides))

    @override
    def to_sae_trainer_config(self) -> SAETrainerConfig:
        """Not for end-to-end training: SAELens' own runner calls this, and would train on reconstruction alone."""
        assert isinstance(self.objective, Objective)
        raise TypeError(
            f"an E2ERunnerConfig (objective {self.objective.name!r}) was given to SAELens' own runner; "
            "use sae_lens_e2e.E2ETrainingRunner instead of LanguageModelSAETrainingRunner"
        )

    def to_e2e_trainer_config(self) -> SAETrainerConfig:
        """What `E2ETrainer` takes: SAELens' trainer settings."""
        return super().to_sae_trainer_config()
