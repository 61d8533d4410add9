"""Names of modules that were in this room before they moved to `studies`, for whoever imports them as they were called here."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_OLD, _NEW = "sae_lens_e2e.evaluation", "sae_lens_e2e.studies"
MOVED = ("agreement", "contrast", "directions", "faithfulness", "geometry", "pareto", "umap")


class MovedModules(MetaPathFinder, Loader):
    """Imports a module by its old name as the very module of the new one, and not before somebody asks for it."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        """A spec for the old name of a module that moved; None for any other."""
        package, _, name = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if package == _OLD and name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Put the module of the new name in the place of the empty one that is made for the old name."""
        name = module.__name__.rpartition(".")[-1]
        sys.modules[module.__name__] = import_module(f"{_NEW}.{name}")
