"""Language models of transformers with the shapes of models that people use, and weights drawn at random.

Needs transformers alone, so that the environment of another library can use it too. Nothing is downloaded.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
)


@dataclass(frozen=True)
class RandomModel:
    """A language model's config, and what the list of its blocks is called."""

    config: PretrainedConfig
    blocks: str

    def hook_name(self, layer: int) -> str:
        """The module whose output is the residual stream that enters a block."""
        return f"{self.blocks}.{layer - 1}"

    def load(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
        """The model; the same in each process."""
        torch.manual_seed(0)
        with torch.device(device):
            return AutoModelForCausalLM.from_config(self.config, dtype=dtype).eval()


_LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

RANDOM_MODELS = {
    "tiny": RandomModel(
        LlamaConfig(
            vocab_size=211,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        ),
        "model.layers",
    ),
    "tinystories-1m": RandomModel(
        GPTNeoConfig(
            hidden_size=64,
            num_layers=8,
            num_heads=16,
            attention_types=[[["global", "local"], 4]],
            window_size=256,
            max_position_embeddings=2048,
        ),
        "transformer.h",
    ),
    "gpt2-small": RandomModel(GPT2Config(), "transformer.h"),
    "pythia-410m": RandomModel(
        GPTNeoXConfig(
            vocab_size=50304,
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            max_position_embeddings=2048,
        ),
        "gpt_neox.layers",
    ),
    "gemma-2-2b": RandomModel(
        Gemma2Config(
            vocab_size=256000,
            hidden_size=2304,
            intermediate_size=9216,
            num_hidden_layers=26,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=256,
            query_pre_attn_scalar=256,
            sliding_window=4096,
        ),
        "model.layers",
    ),
    "llama-3.2-1b": RandomModel(
        LlamaConfig(
            vocab_size=128256,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=64,
            max_position_embeddings=131072,
            tie_word_embeddings=True,
            rope_parameters=_LLAMA_3,
        ),
        "model.layers",
    ),
}
