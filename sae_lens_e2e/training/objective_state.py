"""What an objective remembers, in a checkpoint."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_lens_e2e.errors import one_line

FILENAME = "objective_state.safetensors"


def write_objective_state(state: Mapping[str, Tensor], folder: Path) -> None:
    """Write an objective's state, by name, beside an SAE's; no file where there is none."""
    if state:
        save_file({name: value.detach().cpu().clone() for name, value in state.items()}, folder / FILENAME)


def read_objective_state(folder: Path) -> dict[str, Tensor]:
    """What `write_objective_state` wrote; nothing where there is no such file. Raises ValueError, naming it, for a damaged one."""
    file = folder / FILENAME
    if not file.is_file():
        return {}
    try:
        return load_file(file)
    except Exception as error:  # safetensors' own, which is no more than an Exception
        raise ValueError(
            f"{file} is damaged ({one_line(error)}); copy it again, or resume from an earlier checkpoint"
        ) from error
