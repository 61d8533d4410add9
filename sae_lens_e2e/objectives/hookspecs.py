"""The one hook by which a package adds objectives.

A plugin is a module (or object) named in the entry-point group `sae_lens_e2e`, with a function

    @sae_lens_e2e.hookimpl
    def register_objectives(register):
        register(MyObjective)
"""

from collections.abc import Callable

import pluggy

from sae_lens_e2e.objectives import Objective

PROJECT = "sae_lens_e2e"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

Register = Callable[[type[Objective]], None]


@hookspec
def register_objectives(register: Register) -> None:
    """Call `register` once for each `Objective` class the plugin brings; its `name` is what users write."""
