"""Small language models for the tests, of every kind: one trained by Apollo, others with weights drawn once."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from sae_lens.load_model import HookedProxyLM
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from safetensors.torch import load_file
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.model_bridge import TransformerBridge

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


# Hugging Face's, as SAELens wraps them

_SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "initializer_range": 0.4,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED: dict[str, Any] = _SIZES | {"num_key_value_heads": 2, "head_dim": 4}
_GPT2: dict[str, Any] = {
    "vocab_size": 61,
    "n_embd": 16,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 16,
    "initializer_range": 0.4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
}
_MAMBA: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "state_size": 4,
    "initializer_range": 0.4,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LOGIT_CAP = 1.5
_GEMMA: dict[str, Any] = _GROUPED | {"query_pre_attn_scalar": 4, "sliding_window": 4}
HUGGING_FACE: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2,
    "gpt_neox": _SIZES,
    "llama": _GROUPED | {"tie_word_embeddings": True},
    "gemma2": _GEMMA | {"final_logit_softcapping": LOGIT_CAP, "attn_logit_softcapping": 5.0},
    "gemma3_text": _GEMMA,
    "qwen3": _GROUPED,
    "mamba": _MAMBA,
    "mixtral": _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"},
    "phi": _SIZES,
    "cohere": _GROUPED | {"logit_scale": 0.25},
    "granite": _GROUPED | {"logits_scaling": 3.0},
}
"""By Hugging Face's name for its kind, the settings of a small model, three blocks deep.

Between them: grouped queries, tied embeddings, soft caps, sliding windows, experts, no attention at all, a bias in the unembedding,
and logits that are scaled after it.
"""


def hugging_face_model(kind: str, dtype: torch.dtype = torch.float32) -> HookedProxyLM:
    """A small Hugging Face model with weights drawn once, as SAELens wraps it for `model_class_name="AutoModelForCausalLM"`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(kind, **HUGGING_FACE[kind])
        model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
    return HookedProxyLM(model, None)  # pyright: ignore[reportArgumentType]


def bridge_model(dtype: torch.dtype = torch.float32, **overrides: Any) -> TransformerBridge:
    """A small TransformerLens bridge, three blocks deep, with weights drawn once."""
    settings: dict[str, Any] = {
        "n_layers": 3,
        "d_model": 16,
        "n_heads": 4,
        "d_head": 4,
        "d_mlp": 32,
        "n_ctx": 16,
        "d_vocab": 61,
        "act_fn": "gelu",
        "normalization_type": "LN",
        "seed": 0,
        "initializer_range": 0.4,
    }
    return TransformerBridge.boot_native(settings | overrides, device="cpu", dtype=dtype)


# Any of them

ANY = ("HookedTransformer", "TransformerBridge", *HUGGING_FACE)
"""What `any_model` takes: a model of each kind that SAELens and this package train on."""
_LISTS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers", "mamba": "backbone.layers"}


def any_model(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A small model by its class's name, or by Hugging Face's name for its kind."""
    if kind == "HookedTransformer":
        return random_model(dtype=dtype)
    return bridge_model(dtype) if kind == "TransformerBridge" else hugging_face_model(kind, dtype)


def block_output(kind: str, block: int) -> str:
    """The hook at the output of a block."""
    if kind in ("HookedTransformer", "TransformerBridge"):
        return f"blocks.{block}.hook_resid_post"
    return f"{_LISTS.get(kind, 'model.layers')}.{block}"


def inside_block(kind: str, block: int) -> tuple[str, str]:
    """Two hooks inside a block, both as wide as the model: what its MLP adds, and something before that."""
    if kind in ("HookedTransformer", "TransformerBridge"):
        return f"blocks.{block}.hook_mlp_out", f"blocks.{block}.hook_attn_out"
    name = block_output(kind, block)
    if kind == "mamba":
        return f"{name}.mixer", f"{name}.norm"
    before = {"gpt2": "attn", "gpt_neox": "attention"}.get(kind, "self_attn")
    return f"{name}.mlp", f"{name}.{before}"


def blocks_of(model: Any) -> Sequence[torch.nn.Module]:
    """A model's blocks, however it is wrapped."""
    if not isinstance(model, HookedProxyLM):
        return tuple(model.blocks)
    lists = (module for module in model.model.modules() if isinstance(module, torch.nn.ModuleList))
    return tuple(next(blocks for blocks in lists if len(blocks) == 3))


def logits_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """A model's own logits."""
    return model.model(tokens, use_cache=False).logits if isinstance(model, HookedProxyLM) else model(tokens)


def run_with_hooks(
    model: Any,
    tokens: torch.Tensor,
    replace: Mapping[str, Callable[[torch.Tensor], torch.Tensor]],
    keep: Collection[str] = (),
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """All logits, and the activations at `keep`, of one plain forward pass with some activations replaced.

    By PyTorch's own hooks or TransformerLens', and nothing else; an activation that is replaced is kept as it was before.
    """
    found: dict[str, torch.Tensor] = {}

    def act(name: str, activation: torch.Tensor) -> torch.Tensor:
        if name in keep:
            found[name] = activation
        return replace[name](activation) if name in replace else activation

    names = {*replace, *keep}
    if not isinstance(model, HookedProxyLM):
        fwd_hooks = [(name, lambda tensor, hook, name=name: act(name, tensor)) for name in names]  # noqa: ARG005
        return model.run_with_hooks(tokens, fwd_hooks=fwd_hooks), found
    modules = dict(model.model.named_modules())

    def on_output(name: str, output: Any) -> Any:
        return (act(name, output[0]), *output[1:]) if isinstance(output, tuple) else act(name, output)

    handles = [
        modules[name].register_forward_hook(lambda *args, name=name: on_output(name, args[-1])) for name in names
    ]
    try:
        return logits_of(model, tokens), found
    finally:
        for handle in handles:
            handle.remove()


# Tokens


def random_tokens(n_prompts: int, n_pos: int, d_vocab: int, seed: int = 0) -> torch.Tensor:
    """(n_prompts, n_pos) token ids."""
    return torch.randint(0, d_vocab, (n_prompts, n_pos), generator=torch.Generator().manual_seed(seed))


def packed(documents: Dataset, model: HookedTransformer, context_size: int) -> Dataset:
    """Documents of text as rows of token ids, the same for a model of any class."""
    tokenizer: Any = model.tokenizer
    texts = (torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in documents["text"])
    bos = tokenizer.bos_token_id
    rows = concat_and_batch_sequences(texts, context_size, begin_batch_token_id=bos, sequence_separator_token_id=bos)
    return dataset_of(torch.stack(list(rows)))


def dataset_of(tokens: torch.Tensor) -> Dataset:
    """A tokenised dataset with one row a prompt."""
    return Dataset.from_dict({"input_ids": tokens.tolist()})
