"""What every SAE of a report was trained with, what they share apart from what they do not, and how to do it again."""

import json
import platform
import shlex
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sae_lens.constants import RUNNER_CFG_FILENAME

from sae_lens_e2e.bench.members import Member
from sae_lens_e2e.markdown import one_line_of
from sae_lens_e2e.report.results import Results
from sae_lens_e2e.report.table import Column, Table

_PACKAGES = ("sae-lens-e2e", "sae-lens", "transformer-lens", "torch", "datasets", "transformers", "plotly")
# Where a run was written and logged is no setting of the SAE.
_NO_SETTING = (
    "checkpoint_path",
    "output_path",
    "logger",
    "verbose",
    "save_dir",
    "resume_from_checkpoint",
    "sae.metadata",
)
_SWEEP_FILES = ("sweep.yaml", "sweep.json")


def settings_tables(results: Results) -> tuple[Table, Table]:
    """What differs between the SAEs, a row an SAE, and what all have in common, a row a setting."""
    settings = {member.name: settings_of(member) for member in results.members}
    names = list(dict.fromkeys(name for one in settings.values() for name in one))
    differing = [name for name in names if len({one.get(name) for one in settings.values()}) > 1]
    rows = [[member.name, *(settings[member.name].get(name) for name in differing)] for member in results.members]
    tails = [name.rpartition(".")[2] for name in differing]
    titles = [tail if tails.count(tail) == 1 else name for name, tail in zip(differing, tails, strict=True)]
    of_each = Table("settings", "What differs", [Column("SAE"), *map(Column, titles)], [rows])
    first = next(iter(settings.values()))
    common = [[name, first.get(name)] for name in names if name not in differing]
    of_all = Table("common_settings", "What they have in common", [Column("setting"), Column("value")], [common])
    return of_each, of_all


def settings_of(member: Member) -> dict[str, str]:
    """The settings of an SAE's run as text, by dotted names; of one whose run is not known, what the SAE itself says."""
    if member.config:
        settings = dict(_flat(member.config))
    else:
        cfg = {name: value for name, value in member.sae.cfg.to_dict().items() if name != "metadata"}
        settings = dict(_flat({**cfg, "metadata": member.sae.cfg.metadata.to_dict()}))
    return {name: value for name, value in settings.items() if not name.startswith(_NO_SETTING)}


def training_commands(members: Sequence[Member]) -> list[str]:
    """The commands that train the SAEs again, as far as what they were trained with is there."""
    commands: dict[str, None] = {}
    for member in members:
        folder = member.folder
        if folder is None:
            commands[f"# {one_line_of(member.source)} was trained with Apollo's library, by its final_config.yaml"] = (
                None
            )
            continue
        sweep = next((folder.parent / name for name in _SWEEP_FILES if (folder.parent / name).is_file()), None)
        if sweep is not None:
            commands[f"sae-lens-e2e sweep {_quoted(str(sweep))} OUTPUT"] = None
        elif (folder / RUNNER_CFG_FILENAME).is_file():
            config = _quoted(str(folder / RUNNER_CFG_FILENAME))
            commands[f"sae-lens-e2e train --config {config} --output_path OUTPUT/{_quoted(member.name)}"] = None
        else:
            commands[f"# {one_line_of(member.source)} does not say what it was trained with"] = None
    return list(commands)


def report_command(sources: Sequence[str | Path], flags: Mapping[str, Any]) -> str:
    """The command that makes the report again; flags whose value is None are left out, and what has no name is '...'."""
    parts = ["sae-lens-e2e", "report", *map(str, sources)]
    for flag, value in flags.items():
        if value is True:
            parts.append(f"--{flag}")
            continue
        values = value if isinstance(value, list | tuple) else [] if value is None else [value]
        texts = [str(one) if isinstance(one, str | int | Path) else "..." for one in values]
        parts += [f"--{flag}", *texts] if texts else []
    return " ".join(map(_quoted, parts))


def _quoted(text: str) -> str:
    """An argument as a shell takes it, in one line whatever is in it."""
    if text.isprintable():
        return shlex.quote(text)
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + "".join(one if one.isprintable() else f"\\U{ord(one):08x}" for one in escaped) + "'"


def versions() -> dict[str, str]:
    """Python's version and those of the packages that the numbers depend on."""
    return {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value, default=str)
