"""SAEs from wherever they are: SAELens' folders and registry, the Hub, folders of SAEs trained together, or Apollo's runs."""

from pathlib import Path
from typing import Any

from sae_lens import SAE
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME

from sae_lens_e2e.apollo import load_apollo_saes
from sae_lens_e2e.loading.folder import load_folder
from sae_lens_e2e.loading.released import find_released, load_released
from sae_lens_e2e.yaml_file import read_json


def load_sae(source: str | Path, device: str = "cpu") -> SAE[Any]:
    """The one SAE at `source`. Raises ValueError, with their names, if there are several, or what `load_saes` raises."""
    if len(names := joint_names(source)) > 1:
        raise ValueError(
            f"{source} holds SAEs that were trained together: {', '.join(names)}; give {Path(source)}/NAME"
        )
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
    """The SAEs at `source`: those trained together by their names in the run, in its order, and all others by hook name.

    `source` is a folder that SAELens saved, the output folder of an `E2EMultiTrainingRunner`, a released SAE by name (RELEASE/ID of
    SAELens' registry, OWNER/REPOSITORY:FOLDER of the Hub, see `find_released`), or whatever `load_apollo_sae` takes.
    `hook_name` takes those at that hook only; `n_samples` and `fold_centring` are `load_apollo_sae`'s. Raises ValueError if there
    is none at that hook, or if those are given for SAEs of SAELens', FileNotFoundError for one of a joint run that is not there,
    and what `find_released`, `load_released` and `load_apollo_sae` raise.
    """
    names = joint_names(source)
    saes: dict[str, SAE[Any]]
    released = None if names or is_sae_folder(source) else find_released(source)
    if not names and not is_sae_folder(source) and released is None:
        saes = dict(load_apollo_saes(source, n_samples=n_samples, fold_centring=fold_centring, device=device))
    elif n_samples is not None or fold_centring is not None:
        raise ValueError(
            f"n_samples={n_samples} and fold_centring={fold_centring} are for Apollo's SAEs, and {str(source)!r} is SAELens'"
        )
    elif released is not None:
        sae = load_released(released, device)
        saes = {str(sae.cfg.metadata.hook_name): sae}
    elif names:
        saes = {name: _load_of_run(Path(source) / name, device) for name in names}
    else:
        sae = load_folder(source, device)
        saes = {str(sae.cfg.metadata.hook_name): sae}
    if hook_name is None:
        return saes
    at_hook = {name: sae for name, sae in saes.items() if sae.cfg.metadata.hook_name == hook_name}
    if not at_hook:
        hooks = dict.fromkeys(str(sae.cfg.metadata.hook_name) for sae in saes.values())
        raise ValueError(f"hook_name={hook_name!r}: {source} holds SAEs at {', '.join(hooks)} only")
    return at_hook


def is_sae_folder(path: str | Path) -> bool:
    """Whether a folder holds an SAE as SAELens saves it."""
    return (Path(path) / SAE_CFG_FILENAME).is_file() and (Path(path) / SAE_WEIGHTS_FILENAME).is_file()


def is_joint_folder(path: str | Path) -> bool:
    """Whether a folder holds SAEs that were trained together, each as `is_sae_folder` in a folder of its name."""
    return bool(joint_names(path))


def joint_names(path: str | Path) -> list[str]:
    """The names of the SAEs that were trained together into a folder, in the run's own order; none if it is no such folder."""
    try:
        settings = read_json(Path(path) / RUNNER_CFG_FILENAME)
    except (OSError, ValueError):
        return []
    saes = settings.get("saes") if isinstance(settings, dict) else None
    return list(saes) if isinstance(saes, dict) else []


def _load_of_run(folder: Path, device: str) -> SAE[Any]:
    if not is_sae_folder(folder):
        raise FileNotFoundError(
            f"{folder} is not there, and the {RUNNER_CFG_FILENAME} beside it names it; copy it there, or give the others' own folders"
        )
    return load_folder(folder, device)
