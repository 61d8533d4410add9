"""Which of several SAEs are spliced in together, so that those that answer for the end together do not come to depend on each other."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from typing_extensions import override

from sae_lens_e2e.objectives.base import Objective

Sets = list[Sequence[str]]

SPLICES: Mapping[str, Callable[[Sequence[str]], Sets]] = {
    "all": lambda names: [names],
    "each_alone": lambda names: [[name] for name in names],
    "halves": lambda names: [half for half in (names[: len(names) // 2], names[len(names) // 2 :]) if half],
}
"""What `splices` may name: the SAEs of each pass, of all SAEs in order of depth."""

ALL_AT_ONCE = ("all",)


@dataclass(frozen=True)
class InPasses(Objective):
    """An objective whose loss is the sum over spliced passes: all SAEs at once, each alone, the first half and the second.

    `splices` names the passes, as in `("all", "each_alone")`. Every pass has all terms of the objective: SAEs that are in several are
    trained to do well in each, and their reconstruction loss counts in each, for they are given another stream there. An SAE's own
    terms (sparsity, auxiliary) and its firing count in the first pass that it is in, so the order of `splices` says on which
    stream. Each pass costs a forward and a backward pass from its first SAE on.
    """

    splices: tuple[str, ...] = field(default=ALL_AT_ONCE, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        names = (self.splices,) if isinstance(self.splices, str) else self.splices
        if not isinstance(names, list | tuple) or not names or not all(name in SPLICES for name in names):
            raise ValueError(f"{self.name}: splices={self.splices!r} must name one or more of {', '.join(SPLICES)}")
        if len(set(names)) < len(names):
            raise ValueError(f"{self.name}: splices={list(names)} must name each once")
        object.__setattr__(self, "splices", tuple(names))

    @override
    def passes(self, names: Sequence[str]) -> Sequence[Collection[str]]:
        sets = [tuple(of_pass) for splice in self.splices for of_pass in SPLICES[splice](names)]
        return list(dict.fromkeys(sets))

    @override
    def to_dict(self) -> dict[str, Any]:
        settings = super().to_dict()
        if self.splices == ALL_AT_ONCE:
            # Of one SAE, and as it was before there were others, it says nothing.
            del settings["splices"]
        return settings
