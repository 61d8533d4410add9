"""An SAE from wherever it is: SAELens' folders and releases, or Apollo's runs."""

from pathlib import Path
from typing import Any

from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME

from sae_lens_e2e.apollo import load_apollo_saes


def load_sae(source: str | Path, device: str = "cpu", hook_name: str | None = None) -> SAE[Any]:
    """The one SAE at `source`: a folder that SAELens saved, or whatever `load_apollo_sae` takes.

    Raises ValueError if there are several and `hook_name` chooses none, or what `load_apollo_sae` raises.
    """
    saes = load_saes(source, device)
    if hook_name is None and len(saes) == 1:
        return next(iter(saes.values()))
    if hook_name not in saes:
        raise ValueError(f"{source} holds SAEs at {', '.join(saes)}; hook_name={hook_name!r} is none of them")
    return saes[hook_name]


def load_saes(source: str | Path, device: str = "cpu") -> dict[str, SAE[Any]]:
    """Every SAE at `source`, by hook name."""
    if is_sae_folder(source):
        sae = SAE.load_from_disk(source, device=device)
        return {sae.cfg.metadata.hook_name: sae}
    return dict(load_apollo_saes(source, device=device))


def is_sae_folder(path: str | Path) -> bool:
    """Whether a folder holds an SAE as SAELens saves it."""
    return (Path(path) / SAE_CFG_FILENAME).is_file() and (Path(path) / SAE_WEIGHTS_FILENAME).is_file()
