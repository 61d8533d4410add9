"""Transcoders to train, which SAELens has for inference only: they read one hook and stand for the activation at another.

Each is SAELens' own training SAE with `TrainingTranscoder` below it, where SAELens has `TrainingSAE`: encoder, sparsity and
auxiliary losses are SAELens', and what has two widths or a target of its own is here.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUSkipTranscoderConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    JumpReLUTranscoderConfig,
    SAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TrainingSAE,
    TrainingSAEConfig,
)
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, register_sae_training_class
from sae_lens.saes.sae import T_TRAINING_SAE_CONFIG, TrainStepInput, TrainStepOutput
from torch import Tensor, nn
from typing_extensions import override

# pyright: reportIncompatibleVariableOverride=false


def is_transcoder(cfg: SAEConfig) -> bool:
    """Whether what a config is of reads one hook and writes another, in training or for inference."""
    return hasattr(cfg, "d_out")


def widths_of(cfg: SAEConfig) -> tuple[int, int]:
    """How wide what it reads is, and what it writes."""
    return cfg.d_in, getattr(cfg, "d_out", cfg.d_in)


@dataclass
class TranscoderStepInput(TrainStepInput):
    """SAELens' input of a training step, with what the output is to be."""

    target: Float[Tensor, "tokens d_out"]


@dataclass(kw_only=True)
class TrainingTranscoderConfig(TrainingSAEConfig):
    """What the configs of all transcoders have.

    Args:
        d_out (int): Width of the hook that is written.
    """

    d_out: int
    apply_b_dec_to_input: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.apply_b_dec_to_input:
            raise ValueError(
                "apply_b_dec_to_input=True: a transcoder's b_dec is of the hook it writes, not of the one it reads; leave it at False"
            )
        if self.normalize_activations != "none":
            raise ValueError(
                f"normalize_activations={self.normalize_activations!r}: a transcoder's input and output have scales of their own; "
                "leave it at 'none', or read a normalised hook such as blocks.0.ln2.hook_normalized"
            )
        if self.reshape_activations != "none":
            raise ValueError(
                f"reshape_activations={self.reshape_activations!r}: a transcoder takes heads side by side; leave it at 'none'"
            )


class TrainingTranscoder(TrainingSAE[T_TRAINING_SAE_CONFIG]):
    """What SAELens' `TrainingSAE` is to its architectures, for transcoders: W_enc (d_in, d_sae), W_dec (d_sae, d_out), b_dec (d_out).

    Encoder columns and decoder rows start in random directions of their own, as long as `decoder_init_norm` says.
    """

    @override
    def initialize_weights(self) -> None:
        d_sae, (d_in, d_out) = self.cfg.d_sae, widths_of(self.cfg)
        kwargs: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        self.b_dec = nn.Parameter(torch.zeros(d_out, **kwargs))
        rows = [nn.init.kaiming_uniform_(torch.empty(d_sae, width, **kwargs)) for width in (d_in, d_out)]
        if (norm := self.cfg.decoder_init_norm) is not None:
            rows = [norm * row / row.norm(dim=-1, keepdim=True) for row in rows]
        self.W_enc = nn.Parameter(rows[0].T.contiguous())
        self.W_dec = nn.Parameter(rows[1])

    @override
    def process_sae_in(self, sae_in: Float[Tensor, "*tokens d_in"]) -> Float[Tensor, "*tokens d_in"]:
        return self.hook_sae_input(sae_in.to(self.dtype))

    def output_of(
        self,
        features: Float[Tensor, "*tokens d_sae"],
        x: Float[Tensor, "*tokens d_in"],  # noqa: ARG002
    ) -> Float[Tensor, "*tokens d_out"]:
        """The output for features, and for the input where something goes past them."""
        return self.decode(features)

    def forward_with_activations(
        self, x: Float[Tensor, "*tokens d_in"]
    ) -> tuple[Float[Tensor, "*tokens d_out"], Float[Tensor, "*tokens d_sae"]]:
        """Output and features, as SAELens' `Transcoder` has it."""
        features = self.encode(x)
        return self.output_of(features, x), features

    @override
    def forward(self, x: Float[Tensor, "*tokens d_in"]) -> Float[Tensor, "*tokens d_out"]:
        return self.forward_with_activations(x)[0]

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """SAELens' training pass, against a `TranscoderStepInput`'s target; in what is returned `sae_in` is that target.

        Raises TypeError for SAELens' own input, which has none.
        """
        if not isinstance(step_input, TranscoderStepInput):
            raise TypeError(
                f"a {self.cfg.architecture()} is trained on what two hooks have; use sae_lens_e2e.E2ETrainingRunner, with hook_name_out"
            )
        # What an output has missed, SAELens' losses look for in the input.
        against = replace(step_input, sae_in=step_input.target)
        features, hidden_pre = self.encode_with_hidden_pre(step_input.sae_in)
        out = self.output_of(features, step_input.sae_in)
        losses = {"mse_loss": self.mse_loss_fn(out, against.sae_in).sum(dim=-1).mean()}
        own = self.calculate_aux_loss(against, feature_acts=features, hidden_pre=hidden_pre, sae_out=out)
        assert isinstance(own, dict)
        losses |= own
        return TrainStepOutput(
            sae_in=against.sae_in,
            sae_out=out,
            feature_acts=features,
            hidden_pre=hidden_pre,
            loss=torch.stack(list(losses.values())).sum(),
            losses=losses,
        )


class WithSkip(TrainingTranscoder[T_TRAINING_SAE_CONFIG]):
    """A transcoder with an affine way past its features: W_skip (d_out, d_in), which starts at zero, and b_dec."""

    W_skip: nn.Parameter

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        d_in, d_out = widths_of(self.cfg)
        self.W_skip = nn.Parameter(torch.zeros(d_out, d_in, dtype=self.dtype, device=self.device))

    @override
    def output_of(
        self, features: Float[Tensor, "*tokens d_sae"], x: Float[Tensor, "*tokens d_in"]
    ) -> Float[Tensor, "*tokens d_out"]:
        return super().output_of(features, x) + x.to(self.dtype) @ self.W_skip.T


@dataclass
class StandardTrainingTranscoderConfig(TrainingTranscoderConfig, StandardTrainingSAEConfig):
    """ReLU features and an L1 loss, as in SAELens' `standard`; saved as its `transcoder`."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "transcoder"


class StandardTrainingTranscoder(StandardTrainingSAE, TrainingTranscoder[Any]):
    """See `StandardTrainingTranscoderConfig`."""


@dataclass
class SkipTrainingTranscoderConfig(StandardTrainingTranscoderConfig):
    """The same with an affine way past the features; saved as SAELens' `skip_transcoder`."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "skip_transcoder"


class SkipTrainingTranscoder(WithSkip[Any], StandardTrainingTranscoder):
    """See `SkipTrainingTranscoderConfig`."""


@dataclass
class BatchTopKTrainingTranscoderConfig(TrainingTranscoderConfig, BatchTopKTrainingSAEConfig):
    """The k largest features a token, on the mean of a forward pass, as in SAELens' `batchtopk`; saved as its `jumprelu_transcoder`."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "batchtopk_transcoder"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return JumpReLUTranscoderConfig


class BatchTopKTrainingTranscoder(BatchTopKTrainingSAE, TrainingTranscoder[Any]):
    """See `BatchTopKTrainingTranscoderConfig`."""

    cfg: BatchTopKTrainingTranscoderConfig


@dataclass
class BatchTopKSkipTrainingTranscoderConfig(BatchTopKTrainingTranscoderConfig):
    """The same with an affine way past the features; saved as SAELens' `jumprelu_skip_transcoder`."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "batchtopk_skip_transcoder"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return JumpReLUSkipTranscoderConfig


class BatchTopKSkipTrainingTranscoder(WithSkip[Any], BatchTopKTrainingTranscoder):
    """See `BatchTopKSkipTrainingTranscoderConfig`."""

    cfg: BatchTopKSkipTrainingTranscoderConfig


@dataclass
class JumpReLUTrainingTranscoderConfig(TrainingTranscoderConfig, JumpReLUTrainingSAEConfig):
    """Features above thresholds that are trained, as in SAELens' `jumprelu`; saved as its `jumprelu_transcoder`."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "jumprelu_transcoder"


class JumpReLUTrainingTranscoder(JumpReLUTrainingSAE, TrainingTranscoder[Any]):
    """See `JumpReLUTrainingTranscoderConfig`."""


@dataclass
class JumpReLUSkipTrainingTranscoderConfig(JumpReLUTrainingTranscoderConfig):
    """The same with an affine way past the features; saved as SAELens' `jumprelu_skip_transcoder`."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "jumprelu_skip_transcoder"


class JumpReLUSkipTrainingTranscoder(WithSkip[Any], JumpReLUTrainingTranscoder):
    """See `JumpReLUSkipTrainingTranscoderConfig`."""


TRANSCODERS: dict[str, tuple[type[TrainingSAE[Any]], type[TrainingTranscoderConfig]]] = {
    config.architecture(): (sae, config)
    for sae, config in (
        (StandardTrainingTranscoder, StandardTrainingTranscoderConfig),
        (SkipTrainingTranscoder, SkipTrainingTranscoderConfig),
        (BatchTopKTrainingTranscoder, BatchTopKTrainingTranscoderConfig),
        (BatchTopKSkipTrainingTranscoder, BatchTopKSkipTrainingTranscoderConfig),
        (JumpReLUTrainingTranscoder, JumpReLUTrainingTranscoderConfig),
        (JumpReLUSkipTrainingTranscoder, JumpReLUSkipTrainingTranscoderConfig),
    )
}
"""By architecture, the class to train and its config."""

for name, classes in TRANSCODERS.items():
    if name not in SAE_TRAINING_CLASS_REGISTRY:
        register_sae_training_class(name, *classes)
