"""What a language model's passes cost in floating-point operations, from the shapes of its weights."""

from typing import Any

from torch import nn

from sae_lens_e2e.splice.model import SplicedModel

_HEADS = ("num_attention_heads", "n_heads", "n_head", "num_heads")
_HEAD_WIDTH = ("head_dim", "d_head")
_WIDTH = ("hidden_size", "d_model", "n_embd")


class ModelFlops:
    """FLOPs of a token, on average over a prompt of `n_pos`, in each block and in the unembedding of a language model.

    A matrix of n weights takes 2 n, attention 4 · n_pos · heads · d_head for scores and values, the causal mask not made use of (Kaplan et
    al. 2020, section 2.1). Norms, activation functions and softmax are left out; all experts of a mixture count. Raises ValueError for a
    model whose blocks or unembedding could not be told.
    """

    def __init__(self, model: SplicedModel, n_pos: int):
        blocks, unembed = model.parts
        if not blocks or unembed is None:
            kind = type(model.model).__name__
            raise ValueError(f"the FLOPs of {kind} cannot be counted: its blocks or its unembedding could not be told")
        attention = 4.0 * n_pos * _attention_width(model.model)
        self._forward = [2.0 * n_matrix_weights(block) + attention for block in blocks]
        # By its weights, which are frozen, nothing is differentiated; by both factors of each product in attention.
        self._backward = [2.0 * n_matrix_weights(block) + 2 * attention for block in blocks]
        self.unembedding = 2.0 * n_matrix_weights(unembed)
        """Of one product of the last hidden state with the unembedding."""

    @property
    def n_blocks(self) -> int:
        """How many there are."""
        return len(self._forward)

    def forward(self, start: int, end: int) -> float:
        """Of a forward pass from the block `start` up to the block `end`, which is not run."""
        return sum(self._forward[start:end])

    def backward(self, start: int, end: int) -> float:
        """Of the backward pass from what enters the block `end` to what enters the block `start`."""
        return sum(self._backward[start:end])


def n_matrix_weights(module: nn.Module) -> int:
    """How many weights of a module a token is multiplied with: those of its matrices, biases and norms left out."""
    named = ((name.rpartition(".")[2].lstrip("_"), p) for name, p in module.named_parameters())
    return sum(_numel(p) for name, p in named if p.ndim >= 2 and not name.startswith(("b_", "bias")))


def _numel(weights: nn.Parameter) -> int:
    """How many numbers, of which bitsandbytes keeps two in a byte where they have 4 bits."""
    quantised = getattr(weights, "quant_state", None)
    return weights.numel() if quantised is None else quantised.shape.numel()


def _attention_width(model: nn.Module) -> int:
    """heads · d_head; 0 for a model without attention."""
    config = _config(model)
    heads, head_width, width = (_first(config, names) for names in (_HEADS, _HEAD_WIDTH, _WIDTH))
    if heads is None:
        return 0
    return heads * head_width if head_width is not None else width or 0


def _config(model: Any) -> Any:
    """The model's own config, or that of the one it is wrapped around."""
    config = getattr(model, "cfg", None) or getattr(model, "config", None)
    inner = getattr(model, "model", None)
    if config is None and inner is not None:
        return _config(inner)
    return getattr(config, "text_config", None) or config


def _first(config: Any, names: tuple[str, ...]) -> int | None:
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)
