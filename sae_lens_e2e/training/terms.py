"""What an objective makes of a batch, checked: a term that cannot train is refused where it would train nothing, silently."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sae_lens_e2e.objectives import Batch, Objective, Term
from sae_lens_e2e.objectives.plugins import said_of


def terms_of(objective: Objective, batch: Batch) -> dict[str, Term]:
    """The terms of an objective. Raises TypeError or ValueError, naming it and its package, for what are no terms."""
    try:
        terms = objective.terms(batch)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{said_of(objective)}: {error}") from error
    if not isinstance(terms, dict) or not all(isinstance(term, Term) for term in terms.values()):
        raise TypeError(f"{said_of(objective)}: terms() must return a dict of Term by name, not {terms!r}")
    if not terms:
        raise ValueError(f"{said_of(objective)}: terms() returned none, which leaves nothing to train on; return one")
    if unnamed := [name for name in terms if not isinstance(name, str) or not name]:
        raise TypeError(f"{said_of(objective)}: a term's name must be a text to log it by, not {unnamed[0]!r}")
    return terms


def evaluated(objective: Objective, terms: Mapping[str, Term], logging: bool) -> dict[str, Tensor]:
    """The value of every term that weighs something, and on logging steps, without gradients, of the others.

    Raises TypeError or ValueError, naming objective and term, for a value that is no loss. Nothing here waits for the device.
    """
    # A term of coefficient 0 is logged but not differentiated: 0 · inf is NaN, and its backward pass would be for nothing.
    values: dict[str, Tensor] = {}
    for name, term in terms.items():
        if term.coefficient:
            values[name] = _scalar(objective, name, term.value())
            if not values[name].requires_grad:
                raise ValueError(
                    f"{said_of(objective)}: the term {name!r} takes no gradient, so it trains nothing; compute it from what the "
                    "batch has without detach, item or no_grad, or give it the coefficient 0"
                )
        elif logging:
            with torch.no_grad():
                values[name] = _scalar(objective, name, term.value())
    return values


@torch.no_grad()
def parts_of(objective: Objective, terms: Mapping[str, Term]) -> dict[str, Tensor]:
    """What the terms are made of, under 'term/part'. Raises TypeError, naming objective and term, for what are no numbers."""
    values: dict[str, Tensor] = {}
    for name, term in terms.items():
        parts: Any = {} if term.parts is None else term.parts()
        if not isinstance(parts, Mapping):
            raise TypeError(
                f"{said_of(objective)}: parts of the term {name!r} must be a dict, not {type(parts).__name__}"
            )
        for part, value in parts.items():
            values[f"{name}/{part}"] = _scalar(objective, f"{name}/{part}", value)
    return values


def weighted_sum(
    objective: Objective, terms: Mapping[str, Term], values: Mapping[str, Tensor], own_losses: Sequence[Tensor]
) -> Tensor:
    """The loss of a pass: the terms by their coefficients, and the architectures' own. Raises ValueError if there is nothing."""
    weighted = [term.coefficient * values[name] for name, term in terms.items() if term.coefficient]
    if not (losses := [*weighted, *own_losses]):
        raise ValueError(
            f"{said_of(objective)}: every term has the coefficient 0 ({', '.join(terms)}), which leaves nothing to train on; "
            "raise one"
        )
    first, *others = losses
    for loss in others:
        first = first + loss.to(first.device)
    return first


def _scalar(objective: Objective, name: str, value: Any) -> Tensor:
    """A term's value, if it is one real number on a device."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{said_of(objective)}: the term {name!r} must give a tensor, not {value!r} (a {type(value).__name__}); do not take its item"
        )
    if value.shape != () or not value.is_floating_point():
        raise TypeError(
            f"{said_of(objective)}: the term {name!r} must give one real number, and gives {str(value.dtype).removeprefix('torch.')} "
            f"of shape {tuple(value.shape)}; take its mean or sum"
        )
    return value
