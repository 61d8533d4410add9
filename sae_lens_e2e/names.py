"""Names that become folders."""

from pathlib import PurePosixPath, PureWindowsPath
from typing import Any


def is_folder_name(name: Any) -> bool:
    """Whether a name is fit for one folder, on any system: no path, not hidden, all of it visible."""
    if not isinstance(name, str) or not name.isprintable() or name.startswith(".") or name != name.strip():
        return False
    return bool(name) and PurePosixPath(name).name == name == PureWindowsPath(name).name


def check_folder_name(field: str, name: Any) -> None:
    """Raise ValueError, naming the field, for what cannot be a folder's name."""
    if not is_folder_name(name):
        raise ValueError(f"{field}: the name {name!r} is to be a folder's; use letters, digits, - and _")
