"""Which flags `train` and `finetune` have: the fields of the configs, read from their source, as importing them takes seconds."""

import ast
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from sae_lens_e2e.cli.parser import nearest
from sae_lens_e2e.cli.short_help import SHORT

_OURS = Path(__file__).parent.parent
_OURS_WITH_CONFIGS = ("training", "architectures")
_SAE_LENS_WITH_CONFIGS = ("config.py", "saes/*.py")


def refuse_unknown_flags(command: str, arguments: Sequence[str]) -> None:
    """Raise ValueError, with the nearest flag, for one that there is not; what else is wrong, the command itself says.

    Where SAELens is imported already, that says this as well: its parser is as quick then.
    """
    if "sae_lens" not in sys.modules and (flag := unknown_flag(command, arguments)) is not None:
        raise ValueError(f"unrecognized arguments: {flag}{nearest(flag, known_flags(command))}")


def unknown_flag(command: str, arguments: Sequence[str]) -> str | None:
    """The first flag among the arguments that is no field of any config; None if there is none."""
    known = known_flags(command)
    for flag in (argument.split("=")[0] for argument in arguments if argument.startswith("--")):
        # --sae.device is the SAE's; --nostreaming is --streaming false.
        name = flag.removeprefix("--").split(".")[-1]
        if known.isdisjoint({flag, f"--{name}", f"--{name.removeprefix('no')}"}):
            return flag
    return None


def known_flags(command: str) -> set[str]:
    """The flags of one of these commands, and possibly more: the fields of every config, for whichever architecture."""
    own = {flag for flags in SHORT[command][1].values() for flag in flags}
    return own | {"--help", "--debug", *(f"--{name}" for name in _fields())}


def _fields() -> Iterator[str]:
    for path in _sources():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
                for line in node.body:
                    if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                        yield line.target.id


def _sources() -> Iterator[Path]:
    for room in _OURS_WITH_CONFIGS:
        yield from (_OURS / room).glob("*.py")
    sae_lens = find_spec("sae_lens")
    assert sae_lens is not None
    for folder in sae_lens.submodule_search_locations or ():
        for pattern in _SAE_LENS_WITH_CONFIGS:
            yield from Path(folder).glob(pattern)
