"""Small language models for the tests: one trained by Apollo, others with weights drawn once."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformer_lens import HookedTransformer, HookedTransformerConfig

GOLDEN = Path(__file__).parent / "golden"
D_VOCAB, N_CTX, D_MODEL = 512, 64, 32


def apollo_tiny4l() -> HookedTransformer:
    """The trained 4-layer model that Apollo's golden values were computed on."""
    model = HookedTransformer(
        HookedTransformerConfig(
            n_layers=4,
            d_model=D_MODEL,
            d_head=8,
            n_ctx=N_CTX,
            d_vocab=D_VOCAB,
            act_fn="gelu",
            device="cpu",
            init_weights=False,
        )
    )
    model.load_state_dict(load_file(GOLDEN / "tiny4l.safetensors"), strict=False)
    return model


def random_model(normalization_type: str = "LN", seed: int = 0, **overrides: Any) -> HookedTransformer:
    """A 3-layer model whose weights are large enough for its activations and logits to matter."""
    settings: dict[str, Any] = {
        "n_layers": 3,
        "d_model": 16,
        "n_heads": 4,
        "d_head": 4,
        "d_mlp": 32,
        "n_ctx": 16,
        "d_vocab": 61,
        "act_fn": "gelu",
        "normalization_type": normalization_type,
        "device": "cpu",
        "seed": seed,
        "initializer_range": 0.4,
    }
    if normalization_type == "RMS":
        settings |= {
            "positional_embedding_type": "rotary",
            "rotary_dim": 4,
            "gated_mlp": True,
            "act_fn": "silu",
            "final_rms": True,
        }
    model = HookedTransformer(HookedTransformerConfig(**(settings | overrides)))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if name.endswith(("b_U", ".b", ".w")) or ".b_" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def random_tokens(n_prompts: int, n_pos: int, d_vocab: int, seed: int = 0) -> torch.Tensor:
    """(n_prompts, n_pos) token ids."""
    return torch.randint(0, d_vocab, (n_prompts, n_pos), generator=torch.Generator().manual_seed(seed))


def dataset_of(tokens: torch.Tensor) -> Dataset:
    """A tokenised dataset with one row a prompt."""
    return Dataset.from_dict({"input_ids": tokens.tolist()})
