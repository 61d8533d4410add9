"""Digests of weights, tokens and texts, by which what was measured of them is known again."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def fingerprint_of_module(module: nn.Module) -> str:
    """A digest of a module's weights, the same wherever they lie."""
    return fingerprint(dict(module.state_dict()))


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A digest of tensors by name."""
    hashed = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        # Numpy has no bfloat16; bytes are all that matters.
        values = tensor.detach().cpu().contiguous()
        hashed.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        hashed.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def digest(text: str) -> str:
    """A short digest of a text."""
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()
