"""How far training is, in one line: time left, tokens a second, and the losses of the last logged step with their units."""

import math
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm
from typing_extensions import Self

from sae_lens_e2e.training import ranks

if TYPE_CHECKING:
    from sae_lens_e2e.training.group import Group

COLUMNS = 100
"""As wide as a line gets, or as the terminal is."""
_BAR = 6

# By what a history calls it: what is said of it, and its unit. First what says most; other losses follow under their own names.
_SHOWN = {
    "losses/kl": ("KL", "nats"),
    "losses/ce": ("CE", "nats"),
    "metrics/l0": ("L0", ""),
    "losses/downstream_mse": ("later MSE", "act\N{SUPERSCRIPT TWO}"),
    "losses/mse_loss": ("MSE", "act\N{SUPERSCRIPT TWO}"),
    "losses/relative_mse": ("MSE", "of variance"),
}
_TOTAL = "losses/overall_loss"
# Seconds between two lines where each stays, as in a file.
_SELDOM = 30.0


class Progress:
    """A line about groups that are trained in step; only rank 0 shows it, and nothing in it waits for the device."""

    def __init__(self, groups: "Sequence[Group]") -> None:
        n_saes = sum(len(group.trainers) for group in groups)
        # Of whole steps, the last of which may be longer than what was left to do.
        step = groups[0].first.cfg.train_batch_size_samples
        total = max(group.first.cfg.total_training_samples for group in groups)
        desc = "Training" if n_saes == 1 else f"Training {n_saes} SAEs"
        width = min(shutil.get_terminal_size((COLUMNS, 1)).columns - 1, COLUMNS)
        self._room = width - len(f"{desc} 100%|{'':{_BAR}}| 9.99M/9.99M, 9.99M tok/s, 9:59:59 left")
        self._bar = tqdm(
            total=math.ceil(total / step) * step,
            initial=max(group.first.n_training_samples for group in groups),
            desc=desc,
            unit=" tok",
            unit_scale=True,
            ncols=width,
            mininterval=0.1 if sys.stderr.isatty() else _SELDOM,
            bar_format=f"{{desc}} {{percentage:3.0f}}%|{{bar:{_BAR}}}| {{n_fmt}}/{{total_fmt}}, {{rate_noinv_fmt}}, {{remaining}} left{{postfix}}",
            disable=not ranks.is_first(),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, tokens: int, groups: "Iterable[Group]") -> None:
        """So many tokens more, in groups of which some may have logged a step."""
        rows = [trainer.history[-1] for group in groups for trainer in group.trainers.values() if trainer.history]
        if rows:
            self._bar.set_postfix_str(in_words(rows, self._room), refresh=False)
        self._bar.update(tokens)


def in_words(rows: Sequence[Mapping[str, Any]], room: int) -> str:
    """The losses and L0 of logged steps, one of each SAE, as many of them as there is room for: 'KL 0.213 nats, L0 23.1'.

    Of several SAEs from the least to the largest.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    others = [name for name in names if name.startswith("losses/") and name not in _SHOWN and name != _TOTAL]
    said = ""
    for name in [*(name for name in _SHOWN if name in names), *others]:
        label, unit = _SHOWN.get(name, (name.removeprefix("losses/"), ""))
        part = ", ".join(
            filter(None, [said, f"{label} {_span([row[name] for row in rows if name in row])} {unit}".strip()])
        )
        # What comes before it is a comma.
        if len(part) + 2 <= room:
            said = part
    return said


def _span(values: Sequence[float]) -> str:
    least, largest = (f"{value:.3g}" for value in (min(values), max(values)))
    return least if least == largest else f"{least}\N{EN DASH}{largest}"
