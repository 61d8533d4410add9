"""Read the weights that Apollo's library saved, trusting nothing in the file."""

import pickle
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

# A released pair names the encoder itself, a run's checkpoint the first layer of its encoder.
_ENCODER_NAMES = {"encoder.0.weight": "encoder.weight", "encoder.0.bias": "encoder.bias"}
_NAMES = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")

ONLY_SAE = ""
"""The hook of a checkpoint that holds one SAE and does not say where it sits."""


@dataclass(frozen=True)
class ApolloWeights:
    """One SAE as Apollo's library stores it, in float32; its decoder is normalised when it runs, and need not be so here."""

    encoder_weight: Float[Tensor, "d_sae d_in"]
    encoder_bias: Float[Tensor, "d_sae"]
    decoder_weight: Float[Tensor, "d_in d_sae"]
    decoder_bias: Float[Tensor, "d_in"]

    @property
    def d_sae(self) -> int:
        """Features in the dictionary."""
        return self.encoder_weight.shape[0]

    @property
    def d_in(self) -> int:
        """Width of the activation."""
        return self.encoder_weight.shape[1]


def sae_name(hook_name: str) -> str:
    """What a checkpoint calls the SAE at a hook, such as 'blocks-2-hook_resid_pre'."""
    return hook_name.replace(".", "-")


def read_checkpoint(path: str | Path) -> dict[str, ApolloWeights]:
    """The SAEs in a file of Apollo's, by the hook where each sits (`ONLY_SAE` in a file of the Hub's layout).

    Runs no code that the file may hold. Raises ValueError, naming the tensor, if one is missing, unknown, misshapen or not
    finite, or if the file is no checkpoint.
    """
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in load_tensors(path).items():
        hook, name = _split(key)
        if name not in _NAMES:
            raise ValueError(
                f"{path}: tensor {key!r} is not part of an SAE of Apollo's; it has {', '.join(_NAMES)} and no other"
            )
        if name in parts[hook]:
            raise ValueError(f"{path}: {key!r} is there under two names")
        parts[hook][name] = tensor
    if ONLY_SAE in parts and len(parts) > 1:
        raise ValueError(f"{path}: tensor {next(iter(parts[ONLY_SAE]))!r} does not say at which hook its SAE sits")
    return {hook: _weights(path, hook, tensors) for hook, tensors in parts.items()}


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file of PyTorch's, on the CPU; no code that the file may hold is run.

    Raises OSError if it cannot be read, ValueError if it is damaged or holds anything but tensors by name.
    """
    with open(path, "rb") as file:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{path} is damaged, or holds more than tensors and would run code; it was not loaded"
            ) from error
        except Exception as error:  # damaged bytes fail in whatever way they happen to ask for
            raise ValueError(f"{path} is damaged or not a PyTorch file; download or copy it again") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} holds no tensors by name; it is not a state dict")
    for name, value in content.items():
        dense = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta
        if not isinstance(name, str) or not dense:
            raise ValueError(f"{path}: entry {name!r} is not a dense tensor under a name; it is not a state dict")
    return content


def _split(key: str) -> tuple[str, str]:
    """'blocks-2-hook_resid_pre.encoder.0.weight' as ('blocks.2.hook_resid_pre', 'encoder.weight')."""
    for name in (*_ENCODER_NAMES, *_NAMES):
        if key == name or key.endswith(f".{name}"):
            hook = key[: -len(name)].removesuffix(".").replace("-", ".")
            return hook, _ENCODER_NAMES.get(name, name)
    return ONLY_SAE, key


def _weights(path: str | Path, hook: str, tensors: dict[str, Tensor]) -> ApolloWeights:
    where = f"{path}, SAE at {hook}" if hook != ONLY_SAE else f"{path}"
    missing = [name for name in _NAMES if name not in tensors]
    if missing:
        raise ValueError(f"{where}: tensor {missing[0]!r} is missing")
    encoder = tensors["encoder.weight"]
    if encoder.ndim != 2 or 0 in encoder.shape:
        raise ValueError(f"{where}: encoder.weight has shape {list(encoder.shape)}, not [d_sae, d_in]")
    d_sae, d_in = encoder.shape
    shapes = {"encoder.bias": [d_sae], "decoder.weight": [d_in, d_sae], "decoder.bias": [d_in]}
    for name, shape in shapes.items():
        if list(tensors[name].shape) != shape:
            raise ValueError(
                f"{where}: {name} has shape {list(tensors[name].shape)}; beside encoder.weight {[d_sae, d_in]} it must be {shape}"
            )
    weights = {name: tensors[name].detach().float() for name in _NAMES if tensors[name].is_floating_point()}
    for name in _NAMES:
        if name not in weights or not bool(torch.isfinite(weights[name]).all()):
            raise ValueError(f"{where}: {name} holds values that are not finite numbers")
    if not bool(weights["decoder.weight"].any()):
        raise ValueError(f"{where}: decoder.weight is all zeros, so the SAE puts out nothing; take another checkpoint")
    return ApolloWeights(*(weights[name] for name in _NAMES))
