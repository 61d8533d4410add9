"""Reading and replacing an activation where a language model computes it."""

import difflib
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

Watch = Callable[[Tensor], Tensor | None]
"""Is given a module's output (the first, if there are several); what it returns, unless None, is used in its place."""

# TransformerLens removes hooks by level; one of its own for each keeps clear of everybody else's.
_levels = itertools.count(start=10_000_000)


@contextmanager
def watching(watches: Sequence[tuple[nn.Module, Watch]], first: bool = False) -> Iterator[None]:
    """Have each function called whenever its module runs, in the order given where a module has several.

    `first` has them called before whatever other hooks the module has.
    """
    removals = [_attach(module, watch, first) for module, watch in watches]
    try:
        yield
    finally:
        for remove in removals:
            remove()


def first_output(output: Any) -> Any:
    """What a module computes, where it returns other things beside it."""
    return output[0] if isinstance(output, tuple) else output


def unknown_hook(field: str, hook: str, known: Sequence[str]) -> ValueError:
    """The error for a hook that the model does not have, with those that look like it."""
    close = difflib.get_close_matches(hook, known, n=3, cutoff=0.5)
    hint = f"; did you mean {', '.join(close)}?" if close else f"; it has for instance {', '.join(list(known)[:3])}"
    return ValueError(f"{field}: the model has no hook {hook!r}{hint}")


def _attach(module: nn.Module, watch: Watch, first: bool) -> Callable[[], None]:
    if isinstance(module, HookPoint):
        # TransformerLens' own way: it reshapes what some hooks show (heads), and computes some only if they are watched.
        level = next(_levels)
        module.add_hook(lambda tensor, hook: watch(tensor), level=level, prepend=first)  # noqa: ARG005
        return lambda: module.remove_hooks("fwd", level=level)

    def on_output(_module: nn.Module, _args: Any, output: Any) -> Any:
        activation = first_output(output)
        if not isinstance(activation, Tensor):
            raise ValueError(
                f"a hook on {type(module).__name__}: it returns {type(activation).__name__}, no activation"
            )
        new = watch(activation)
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return module.register_forward_hook(on_output, prepend=first).remove
