"""One SAE in a folder of SAELens', or a line that says which of its files is wrong."""

from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.registry import SAE_CLASS_REGISTRY
from safetensors import safe_open

from sae_lens_e2e.devices import check_device
from sae_lens_e2e.errors import named_line
from sae_lens_e2e.training.field_types import check_types
from sae_lens_e2e.yaml_file import read_json


def load_folder(folder: str | Path, device: str = "cpu") -> SAE[Any]:
    """The SAE that SAELens saved into a folder.

    Raises ValueError, in one line that names the file, for one that is damaged or of an architecture that is not installed, and
    for a device that this machine does not have; OSError for a file that is not there.
    """
    check_device("device", device)
    try:
        sae = SAE.load_from_disk(folder, device=device)
        _check_cfg(sae.cfg)
        return sae
    except (OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # damaged bytes fail in whatever way they happen to ask for
        raise ValueError(_what_is_wrong(Path(folder), error)) from error


def _check_cfg(cfg: Any) -> None:
    check_types(cfg, type(cfg))
    if (k := getattr(cfg, "k", None)) is not None and not 0 < k <= cfg.d_sae:
        raise ValueError(f"k={k!r} must be above 0 and at most d_sae={cfg.d_sae}")


def _what_is_wrong(folder: Path, error: Exception) -> str:
    cfg, weights = folder / SAE_CFG_FILENAME, folder / SAE_WEIGHTS_FILENAME
    try:
        settings = read_json(cfg)
    except ValueError as damage:
        return str(damage)
    architecture = settings.get("architecture") if isinstance(settings, dict) else None
    if not isinstance(settings, dict) or not isinstance(settings.get("metadata", {}), dict):
        return f"{cfg} is not what SAELens writes; copy the SAE again, or train it anew"
    if architecture not in SAE_CLASS_REGISTRY:
        known = ", ".join(SAE_CLASS_REGISTRY)
        return f"{cfg}: architecture={architecture!r} is not installed; there are {known}"
    try:
        with safe_open(weights, framework="pt"):
            pass
    except Exception as unreadable:
        return f"{weights} is damaged ({named_line(unreadable)}); copy the SAE again, or train it anew"
    return f"{cfg} and {weights.name} beside it make no SAE ({named_line(error)}); copy the SAE again, or train it anew"
