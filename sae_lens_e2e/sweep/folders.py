"""The folders of a sweep: what is in each point's, and what has gone wrong in it."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from sae_lens import logger
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME

from sae_lens_e2e.errors import named_line, one_line
from sae_lens_e2e.evaluation import Evaluation
from sae_lens_e2e.evaluation.files import read_evaluation
from sae_lens_e2e.output import clean_partials, write_whole
from sae_lens_e2e.sweep.plan import AnyConfig
from sae_lens_e2e.training import ranks
from sae_lens_e2e.training.multi_config import E2EMultiRunnerConfig
from sae_lens_e2e.training.same_run import difference, held_out_difference

FAILURE_FILENAME = "failed.txt"
CHECKPOINTS = "checkpoints"


def saes_of(name: str, cfg: AnyConfig) -> list[str]:
    """The SAEs of a point: one by the point's own name, or several by theirs inside its folder."""
    return [f"{name}/{sae}" for sae in cfg.saes] if isinstance(cfg, E2EMultiRunnerConfig) else [name]


def read_results(output: str | Path, names: Sequence[str]) -> dict[str, Evaluation]:
    """The evaluations of those points that are finished."""
    found = {name: evaluation_in(Path(output) / name) for name in names}
    return {name: evaluation for name, evaluation in found.items() if evaluation is not None}


def failures(output: str | Path, names: Sequence[str]) -> dict[str, str]:
    """What stopped those points that failed."""
    files = {name: Path(output) / name / FAILURE_FILENAME for name in names}
    return {name: file.read_text(errors="replace").strip() for name, file in files.items() if file.is_file()}


def record_failure(output: Path, name: str, error: Exception) -> None:
    """Say what stopped a point, in the log and in its `failed.txt`; of several ranks the first does."""
    if not ranks.is_first():
        return
    message = named_line(error)
    logger.error(f"point {name} failed: {message}")
    try:
        write_whole(output / name / FAILURE_FILENAME, message + "\n")
    except OSError as unwritable:
        # On the disk that has just filled up.
        logger.error(f"point {name}: that could not be written to {FAILURE_FILENAME}: {one_line(unwritable)}")


def is_finished(output: Path, name: str, cfg: AnyConfig) -> bool:
    """Whether a point is trained and evaluated."""
    return all(evaluation_in(output / sae) is not None for sae in saes_of(name, cfg))


def is_trained(output: Path, name: str, cfg: AnyConfig) -> bool:
    """Whether a point is trained, and all of it is there."""
    saes = [output / sae / file for sae in saes_of(name, cfg) for file in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME)]
    return all(file.is_file() for file in (*saes, output / name / RUNNER_CFG_FILENAME))


def evaluation_in(folder: Path) -> Evaluation | None:
    """The evaluation in a folder; None if there is none, or it is damaged, for then it is made again."""
    try:
        return read_evaluation(folder)
    except (OSError, ValueError):
        return None


def check_same(folder: Path, cfg: AnyConfig, held_out: float) -> str | None:
    """What is damaged, if the folder holds a run whose settings cannot be read; raises ValueError for one with other settings."""
    checkpoints = (file.parent for file in folder.glob(f"{CHECKPOINTS}/*/{RUNNER_CFG_FILENAME}"))
    first = next(iter(cfg.saes)) if isinstance(cfg, E2EMultiRunnerConfig) else ""
    for recorded in (folder, *checkpoints):
        try:
            other = difference(recorded, cfg) or held_out_difference(recorded / first, held_out)
        except (OSError, ValueError) as error:
            return f"{one_line(error)}; remove its folder to run the point without it"
        if other is not None:
            raise ValueError(
                f"{folder} holds a run with other settings ({other.name}: {other.then!r}, now {other.now!r}); choose another "
                "output folder"
            )
    return None


def clean(folder: Path, cfg: AnyConfig) -> None:
    """Remove what a killed run has left half-written of a point."""
    for written in (folder, folder / CHECKPOINTS, *(folder.parent / sae for sae in saes_of(folder.name, cfg))):
        clean_partials(written)


def checkpoints_in(folder: Path) -> Iterator[Path]:
    """The checkpoints of a run, each named by the tokens trained on."""
    return (path for path in folder.glob("*") if path.name.isdigit())
