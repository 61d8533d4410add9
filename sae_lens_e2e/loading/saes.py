"""An SAE from wherever it is: SAELens' folders, or Apollo's runs."""

from pathlib import Path
from typing import Any

from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME

from sae_lens_e2e.apollo import load_apollo_saes


def load_sae(source: str | Path, device: str = "cpu") -> SAE[Any]:
    """The one SAE at `source`. Raises ValueError if there are several, or what `load_saes` raises."""
    saes = load_saes(source, device)
    if len(saes) > 1:
        raise ValueError(
            f"{source} holds SAEs at {', '.join(saes)}; write the one that is meant with `sae-lens-e2e convert`"
        )
    return next(iter(saes.values()))


def load_saes(
    source: str | Path,
    device: str = "cpu",
    *,
    hook_name: str | None = None,
    n_samples: int | None = None,
    fold_centring: bool | None = None,
) -> dict[str, SAE[Any]]:
    """The SAEs at `source`, a folder that SAELens saved or whatever `load_apollo_sae` takes, by hook name.

    `hook_name` takes the one there only; `n_samples` and `fold_centring` are `load_apollo_sae`'s. Raises ValueError if there is
    none at that hook, or if those are given for an SAE of SAELens', and what `load_apollo_sae` raises.
    """
    saes: dict[str, SAE[Any]]
    if not is_sae_folder(source):
        saes = dict(load_apollo_saes(source, n_samples=n_samples, fold_centring=fold_centring, device=device))
    elif n_samples is None and fold_centring is None:
        sae = SAE.load_from_disk(source, device=device)
        saes = {str(sae.cfg.metadata.hook_name): sae}
    else:
        raise ValueError(
            f"n_samples={n_samples} and fold_centring={fold_centring} are for Apollo's SAEs, and {str(source)!r} is SAELens'"
        )
    if hook_name is None:
        return saes
    if hook_name not in saes:
        raise ValueError(f"hook_name={hook_name!r}: {source} holds SAEs at {', '.join(saes)} only")
    return {hook_name: saes[hook_name]}


def is_sae_folder(path: str | Path) -> bool:
    """Whether a folder holds an SAE as SAELens saves it."""
    return (Path(path) / SAE_CFG_FILENAME).is_file() and (Path(path) / SAE_WEIGHTS_FILENAME).is_file()
