"""SAEs for the tests, with weights that leave nothing at zero or one."""

from typing import Any

import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata

D_IN, D_SAE = 16, 40
COMPLETE = {
    "model_name": "gpt2-small",
    "hook_name": "blocks.1.hook_resid_pre",
    "dataset_path": "NeelNanda/pile-10k",
    "context_size": 12,
    "prepend_bos": False,
}


def inference_sae(architecture: str, metadata: dict[str, Any] | None = None, **settings: Any) -> SAE[Any]:
    """An inference SAE with random weights, biases and thresholds; its metadata are complete unless told."""
    sae_class, config_class = SAE_CLASS_REGISTRY[architecture]
    settings = {"d_in": D_IN, "d_sae": D_SAE, **({"k": 7} if architecture == "topk" else {}), **settings}
    return randomised(sae_class(config_class(**settings, metadata=_metadata(metadata))))


def training_sae(architecture: str, metadata: dict[str, Any] | None = None, **settings: Any) -> TrainingSAE[Any]:
    """A training SAE with random weights, biases and thresholds; its metadata are complete unless told."""
    sae_class, config_class = SAE_TRAINING_CLASS_REGISTRY[architecture]
    settings = {"d_in": D_IN, "d_sae": D_SAE, **({"k": 7} if "topk" in architecture else {}), **settings}
    if architecture.startswith("matryoshka"):
        settings = {"matryoshka_widths": [10, 20], **settings}
    return randomised(sae_class(config_class(**settings, metadata=_metadata(metadata))))


def _metadata(metadata: dict[str, Any] | None) -> SAEMetadata:
    return SAEMetadata(**(COMPLETE if metadata is None else metadata))


@torch.no_grad()
def randomised(sae: Any, seed: int = 0) -> Any:
    """Every parameter drawn anew; thresholds are positive and lie where pre-activations do."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(sae.state_dict().items()):
        drawn = torch.randn(tensor.shape, generator=generator)
        if "threshold" in name:
            drawn = 0.1 + drawn.abs()
        tensor.copy_((0.3 if name.startswith("W") else 0.2 if name == "r_mag" else 0.5) * drawn)
    return sae


def activations(n: int = 64, seed: int = 1) -> torch.Tensor:
    """(n, d_in) inputs, whose norms differ."""
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(n, D_IN, generator=generator) * torch.rand(n, 1, generator=generator) + 0.3


@torch.no_grad()
def features_and_output(sae: SAE[Any], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What an SAE makes of activations; it must fire, and not everywhere."""
    features = sae.encode(x)
    output = sae.decode(features)
    assert 0.02 < float((features != 0).float().mean()) < 0.9
    return features, output
