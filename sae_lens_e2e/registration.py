"""What SAELens finds of ours by name, registered as soon as it is imported too, without importing it.

It has no entry points: an architecture or loader is there once somebody has put it into a dict of SAELens'. Whoever imports both packages,
in either order, has ours.
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_SAE_LENS = "sae_lens"

# These import SAELens and nothing of ours, so that they can be imported whichever module of ours asked for SAELens first.
ARCHITECTURES = ("sae_lens_e2e.architectures.apollo", "sae_lens_e2e.architectures.transcoder")
"""Modules that register training architectures when they are imported."""

LOADERS = {
    "apollo": ("apollo_huggingface_loader", "apollo_huggingface_config"),
    "apollo_neuronpedia": ("neuronpedia_apollo_loader", "neuronpedia_apollo_config"),
}
"""By SAELens' name of it, the functions in `apollo.loaders` that load an SAE, and its settings alone."""


def register_with_sae_lens() -> None:
    """Register our architectures and loaders with SAELens now if it is imported, or else when it is."""
    if _SAE_LENS in sys.modules:
        _register()
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


def _register() -> None:
    for module in ARCHITECTURES:
        import_module(module)
    of_sae_lens = import_module(f"{_SAE_LENS}.loading.pretrained_sae_loaders")
    for name, (loader, config) in LOADERS.items():
        of_sae_lens.NAMED_PRETRAINED_SAE_LOADERS.setdefault(name, _late(loader))
        of_sae_lens.NAMED_PRETRAINED_SAE_CONFIG_GETTERS.setdefault(name, _late(config))


def _late(function: str) -> Callable[..., Any]:
    """A function of `apollo.loaders`, which is imported when it is called."""

    def call(*arguments: Any, **settings: Any) -> Any:
        return getattr(import_module("sae_lens_e2e.apollo.loaders"), function)(*arguments, **settings)

    return call


class _WhenImported(MetaPathFinder):
    """Finds SAELens as the other finders do, and has `_register` run when it has been imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _SAE_LENS:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(fullname, path, target) for finder in others if hasattr(finder, "find_spec"))
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_then_register(module: ModuleType) -> None:
                run(module)
                _register()

            spec.loader.exec_module = run_then_register
        return spec
