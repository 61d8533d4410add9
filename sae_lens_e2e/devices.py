"""Devices by name: what PyTorch has a kind of, and what this machine has."""

from typing import Any

import torch


def check_device_name(field: str, device: Any) -> None:
    """Raise ValueError, naming the field, for a device that PyTorch has no kind of, whatever this machine has."""
    # SAELens' word for wherever the language model is.
    if device == "with_model":
        return
    try:
        torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"{field}={device!r} is no device; it is cpu, cuda, cuda:1 and their like") from error


def check_device(field: str, device: Any) -> None:
    """`check_device_name`, and raise ValueError too for a device that this machine does not have."""
    check_device_name(field, device)
    if device == "with_model":
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"{field}={str(device)!r}: this machine has no such device; it has {_devices()}") from error


def _devices() -> str:
    return ", ".join(["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])
