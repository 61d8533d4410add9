"""The `apollo` training architecture: the SAE of Braun et al. (2024) as their library parametrises it."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, register_sae_training_class
from sae_lens.saes.sae import SAEConfig, TrainCoefficientConfig, TrainingSAE, TrainingSAEConfig, TrainStepInput
from sae_lens.saes.standard_sae import StandardSAEConfig
from torch import Tensor, nn
from typing_extensions import override

ARCHITECTURE = "apollo"


@dataclass
class ApolloTrainingSAEConfig(TrainingSAEConfig):
    """Configuration of an SAE parametrised as Apollo's are, saved for inference as SAELens' `standard`.

    The decoder starts orthogonal and is normalised in every forward pass, b_dec is not subtracted from the input, and the
    sparsity loss is sparsity_coefficient · mean over tokens of ‖f‖_p / d_in.

    Args:
        sparsity_coefficient (float): Weight of the sparsity loss, λ in the paper.
        lp_norm (float): The p of the sparsity norm.
        sparsity_warm_up_steps (int): Steps over which the sparsity coefficient rises from 0.
    """

    sparsity_coefficient: float = 1.0
    lp_norm: float = 1.0
    sparsity_warm_up_steps: int = 0
    apply_b_dec_to_input: bool = False
    decoder_init_norm: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.apply_b_dec_to_input:
            raise ValueError("apply_b_dec_to_input=True: the apollo architecture never does; use 'standard' instead")
        if self.decoder_init_norm is not None:
            raise ValueError(
                f"decoder_init_norm={self.decoder_init_norm!r}: the apollo architecture normalises its decoder in every "
                "forward pass; leave it at None"
            )
        if self.normalize_activations not in ("none", "layer_norm"):
            raise ValueError(
                f"normalize_activations={self.normalize_activations!r} cannot be folded into a normalised decoder; use 'none'"
            )

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return StandardSAEConfig


class ApolloTrainingSAE(TrainingSAE[ApolloTrainingSAEConfig]):
    """A ReLU SAE with Apollo's parametrisation.

    W_enc (d_in, d_sae) and W_dec (d_sae, d_in) are the transposes of their encoder.weight and raw decoder.weight.
    """

    b_enc: nn.Parameter

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        kwargs: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        # Both biases keep the small uniform start of torch.nn.Linear.
        encoder = nn.Linear(self.cfg.d_in, self.cfg.d_sae, **kwargs)
        self.W_enc = nn.Parameter(encoder.weight.data.T.contiguous())
        self.b_enc = encoder.bias
        self.b_dec = nn.Linear(self.cfg.d_sae, self.cfg.d_in, **kwargs).bias
        W_dec = torch.empty(self.cfg.d_sae, self.cfg.d_in, device=self.device)
        if W_dec.device.type != "meta":
            nn.init.orthogonal_(W_dec)
        self.W_dec = nn.Parameter(W_dec.to(self.dtype))

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {"sparsity": TrainCoefficientConfig(self.cfg.sparsity_coefficient, self.cfg.sparsity_warm_up_steps)}

    @override
    def encode_with_hidden_pre(
        self, x: Float[Tensor, "tokens d_in"]
    ) -> tuple[Float[Tensor, "tokens d_sae"], Float[Tensor, "tokens d_sae"]]:
        hidden_pre = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)
        return self.hook_sae_acts_post(self.activation_fn(hidden_pre)), hidden_pre

    @override
    def decode(self, feature_acts: Float[Tensor, "tokens d_sae"]) -> Float[Tensor, "tokens d_in"]:
        x_hat = self.hook_sae_recons(feature_acts @ F.normalize(self.W_dec, dim=1) + self.b_dec)
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(x_hat), self.d_head)

    @override
    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        sparsity = feature_acts.norm(p=self.cfg.lp_norm, dim=-1).mean() / self.cfg.d_in
        return {"sparsity_loss": step_input.coefficients["sparsity"] * sparsity}

    @override
    @torch.no_grad()
    def fold_W_dec_norm(self) -> None:
        """Give the stored decoder the unit rows it has in every forward pass."""
        self.W_dec.data = F.normalize(self.W_dec.data, dim=1)

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving_inference(state_dict)
        state_dict["W_dec"] = F.normalize(state_dict["W_dec"], dim=1)


if ARCHITECTURE not in SAE_TRAINING_CLASS_REGISTRY:
    register_sae_training_class(ARCHITECTURE, ApolloTrainingSAE, ApolloTrainingSAEConfig)
