"""Learning rates chosen for each kind of point of a sweep, on documents that are not the ones reported.

Points that differ in their seed only are of one kind. Its candidates are runs of the first of them, each with another learning rate, on the
training documents without a validation part; the one with the lowest CE loss increase there gives all points of the kind their learning rate.
Where they differ in L0, they are compared at equal L0 (`equal_l0.py`), as far as the sweep's other sparsities say what L0 is worth. The points
themselves are then trained on all training documents, as any run is.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sae_lens import logger

from sae_lens_e2e.errors import one_line
from sae_lens_e2e.evaluation import TogetherEvaluation
from sae_lens_e2e.evaluation.files import read_together
from sae_lens_e2e.evaluation.one_pass import SPARSITY_FIELDS
from sae_lens_e2e.output import write_whole
from sae_lens_e2e.sweep.budgets import scaled, with_settings
from sae_lens_e2e.sweep.equal_l0 import Score, costs, differ_in_l0, slope
from sae_lens_e2e.sweep.folders import evaluation_in, failures
from sae_lens_e2e.sweep.plan import Point, Sweep
from sae_lens_e2e.training.stages import stages_of

FOLDER = "tuning"
"""Where candidates are trained, until the choice is made."""
FILENAME = "tuning.json"
"""By kind the learning rate that was chosen, and how each candidate did."""

_NO_MATTER = ("seed", "logger", "lr")


def check_tunable(sweep: Sweep, folder: Path) -> None:
    """Raise ValueError, in one line, for points whose learning rate is not to be chosen, or candidates that are no runs."""
    if sweep.tune is None:
        return
    for point in sweep.points:
        if point.name == FOLDER:
            raise ValueError(f"point {FOLDER}: tune needs a folder of this name; name the point otherwise")
        if "lr" in point.settings:
            raise ValueError(
                f"point {point.name}: lr={point.settings['lr']!r} is given, and tune chooses it; leave out one of the two"
            )
        stages = stages_of(point.config(folder).objective).stages  # pyright: ignore[reportArgumentType]
        if all(stage.lr is not None for stage in stages):
            raise ValueError(f"point {point.name}: every stage has an lr of its own, so there is none to tune")
    for candidate in candidates(sweep, list(kinds(sweep.points)), folder).points:
        candidate.config(folder)


def kind_of(name: str) -> str:
    """What a point's name says beside its seed."""
    return re.sub(r"(^|-)seed=[^-]*", "", name).strip("-") or "only"


def kinds(points: Sequence[Point]) -> dict[str, list[Point]]:
    """The points by what they are apart from their seed. Raises ValueError for two kinds that go by one name."""
    found: dict[str, list[Point]] = {}
    for point in points:
        of_kind = found.setdefault(kind_of(point.name), [])
        if of_kind and _settings(of_kind[0]) != _settings(point):
            raise ValueError(
                f"points {of_kind[0].name} and {point.name} differ in more than their seed; name their objectives apart"
            )
        of_kind.append(point)
    return found


def candidates(sweep: Sweep, names: Sequence[str], folder: Path) -> Sweep:
    """The runs that decide about some kinds of points: a sweep over their first points and the learning rates."""
    assert sweep.tune is not None
    by_kind, points = kinds(sweep.points), []
    for name in names:
        first = by_kind[name][0]
        logger_settings = {**(first.settings.get("logger") or {}), "log_to_wandb": False}
        tokens = _training_tokens(sweep, first, folder)
        for lr in sweep.tune.lr:
            point = with_settings(first, lr=lr, logger=logger_settings, training_tokens=tokens)
            points.append(replace(point, name=_candidate(name, lr)))
    return replace(sweep, points=tuple(points), tune=None, equal="tokens")


def undecided(sweep: Sweep, output: Path) -> list[str]:
    """The kinds of points whose learning rate is not chosen yet. Raises ValueError for choices made among other candidates."""
    return [name for name, points in kinds(sweep.points).items() if name not in _choices(sweep, output, {name: points})]


def decide(sweep: Sweep, names: Sequence[str], output: Path) -> None:
    """Choose for each kind the candidate that costs the least at equal L0, and write that, with all scores, to `tuning.json`, whole.

    Of a kind none of whose candidates has ended nothing is written.
    """
    assert sweep.tune is not None
    by_kind = kinds(sweep.points)
    choices = read_tuning(output)
    all_scores = {
        name: {lr: _score(output / FOLDER, _candidate(name, lr)) for lr in sweep.tune.lr} for name in names
    } | {name: {one["lr"]: one for one in choice["candidates"]} for name, choice in choices.items() if name in by_kind}
    slopes = _slopes({name: by_kind[name][0] for name in all_scores}, all_scores)
    for name in names:
        scores = all_scores[name]
        ended = costs(_ended(scores), slopes[name])
        if not ended:
            continue
        if slopes[name] is None and (apart := differ_in_l0(_ended(scores).values())):
            logger.warning(
                f"{name}: its candidates differ in L0, {apart[0]:.3g} to {apart[1]:.3g}, and what that is worth is not known, so the lowest "
                "CE loss increase was chosen; give the sweep several sparsities"
            )
        lr = min(ended, key=lambda lr: (ended[lr], lr))
        at_end = [end for end, word in ((min(sweep.tune.lr), "lowest"), (max(sweep.tune.lr), "highest")) if end == lr]
        if at_end:
            logger.warning(f"{name}: lr={lr:g} did best, and is at the end of those tried; try further ones")
        choices[name] = {
            "lr": lr,
            "candidates": [{"lr": lr, **score} for lr, score in scores.items()],
            "settings": _recorded(sweep, by_kind[name][0]),
        }
    write_whole(output / FILENAME, json.dumps(choices, indent=1))


def _ended(scores: Mapping[float, Mapping[str, Any]]) -> dict[float, Score]:
    return {lr: score for lr, score in scores.items() if "ce_loss_increase" in score}


def _slopes(
    firsts: Mapping[str, Point], all_scores: Mapping[str, Mapping[float, Mapping[str, Any]]]
) -> dict[str, float | None]:
    """By kind, what L0 is worth to it and to those that differ from it in sparsity only, at one learning rate each."""
    families: dict[str, list[str]] = {}
    for name, point in firsts.items():
        families.setdefault(_apart_from_sparsity(point), []).append(name)
    found: dict[str, float | None] = {}
    for names in families.values():
        curves: dict[float, list[Score]] = {}
        for name in names:
            for lr, score in _ended(all_scores[name]).items():
                if score.get("l0", 0) > 0 and score["ce_loss_increase"] > 0:
                    curves.setdefault(lr, []).append(score)
        found |= dict.fromkeys(names, slope(curves.values()))
    return found


def _apart_from_sparsity(point: Point) -> str:
    """A point's settings without what sets its sparsity, as text."""
    sae = point.settings.get("sae")
    kept = {key: value for key, value in sae.items() if key not in SPARSITY_FIELDS} if isinstance(sae, dict) else sae
    return json.dumps({**_settings(point), "sae": kept}, sort_keys=True, default=str)


def tuned(sweep: Sweep, output: Path) -> tuple[Sweep, dict[str, str]]:
    """The sweep with the learning rates chosen, and why its other points, whose kind has none, have none."""
    by_kind = kinds(sweep.points)
    choices = _choices(sweep, output, by_kind)
    rates = {point.name: choices[name]["lr"] for name in choices for point in by_kind[name]}
    points = tuple(with_settings(point, lr=rates[point.name]) for point in sweep.points if point.name in rates)
    failed: dict[str, str] = {}
    for name in by_kind.keys() - choices.keys():
        assert sweep.tune is not None
        found = [failure for lr in sweep.tune.lr for failure in _failure(output / FOLDER, _candidate(name, lr))]
        reason = f"no learning rate could be chosen: {'; '.join(dict.fromkeys(found)) or 'no candidate has ended'}"
        failed |= {point.name: reason for point in by_kind[name]}
    return replace(sweep, points=points), failed


def read_tuning(output: str | Path) -> dict[str, Any]:
    """What `tuning.json` says, by kind of point; nothing if there is none. Raises ValueError for a file that is not whole."""
    file = Path(output) / FILENAME
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text())
        for choice in found.values():
            float(choice["lr"])
            [float(one["lr"]) for one in choice["candidates"]]
            dict(choice["settings"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({one_line(error)}); remove it to tune again") from error
    return found


def choice_of(folder: str | Path) -> dict[str, Any] | None:
    """How the learning rate of the SAE in a folder was chosen, if that was in a sweep, alone or as one of several in a point."""
    for point in (Path(folder), Path(folder).parent):
        if (choice := read_tuning(point.parent).get(kind_of(point.name))) is not None:
            return choice
    return None


def _choices(sweep: Sweep, output: Path, by_kind: Mapping[str, list[Point]]) -> dict[str, Any]:
    choices = {name: choice for name, choice in read_tuning(output).items() if name in by_kind}
    for name, choice in choices.items():
        now = _recorded(sweep, by_kind[name][0])
        differing = [
            key for key in now.keys() | choice["settings"].keys() if now.get(key) != choice["settings"].get(key)
        ]
        if differing:
            raise ValueError(
                f"{output / FILENAME} has a learning rate of {name} that was chosen with other settings ({sorted(differing)[0]}); choose "
                "another output folder"
            )
    return choices


def _training_tokens(sweep: Sweep, point: Point, folder: Path) -> int:
    """Of a candidate."""
    cfg = point.config(folder)
    assert sweep.tune is not None
    if sweep.tune.fraction == 1:
        return cfg.training_tokens
    return scaled(sweep.tune.fraction * cfg.training_tokens, cfg.train_batch_size_tokens)


def _recorded(sweep: Sweep, point: Point) -> dict[str, Any]:
    """What a choice depends on, as JSON gives it back."""
    assert sweep.tune is not None
    tune = {f"tune.{key}": value for key, value in asdict(sweep.tune).items()}
    evaluation = {f"evaluation.{key}": value for key, value in sweep.evaluation.items()}
    return json.loads(json.dumps({**_settings(point), **tune, **evaluation}, default=str))


def _settings(point: Point) -> dict[str, Any]:
    return {key: value for key, value in point.settings.items() if key not in _NO_MATTER}


def _candidate(name: str, lr: float) -> str:
    return re.sub(r"[^\w.=-]+", "_", f"{name}-lr={lr:g}")


def _score(folder: Path, name: str) -> dict[str, Any]:
    """What a candidate costs on the validation documents (all SAEs of it spliced in), or why that is not known."""
    together = read_together(folder / name)
    found = evaluation_in(folder / name) if together is None else together
    if found is None:
        return {"failed": "; ".join(_failure(folder, name)) or "it has not ended"}
    if not math.isfinite(found.ce_loss_increase):
        return {"failed": f"its CE loss increase is {found.ce_loss_increase}"}
    score = {"ce_loss_increase": found.ce_loss_increase}
    return score if isinstance(found, TogetherEvaluation) else {**score, "l0": found.l0}


def _failure(folder: Path, name: str) -> list[str]:
    return list(failures(folder, [name]).values())
