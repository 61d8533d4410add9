"""`sae-lens-e2e sweep`: many SAEs from one file."""

from collections.abc import Collection
from pathlib import Path

from sae_lens_e2e.cli.parser import Parser


def sweep(arguments: list[str]) -> None:
    """Train and evaluate every point of a sweep file that is not finished.

    Each goes into a folder of its own. A point that fails leaves a failed.txt that says why, and does not stop the others; after an
    interruption the same command goes on.
    """
    parser = Parser(
        prog="sae-lens-e2e sweep",
        description=sweep.__doc__,
        example="sae-lens-e2e sweep sweep.yaml output/my_sweep --together 8",
    )
    parser.add_argument("config", type=Path, help="the sweep: a YAML or JSON file with 'base' and 'grid'")
    parser.add_argument("output", nargs="?", type=Path, help="where its folders go (default: output/NAME)")
    parser.add_argument(
        "--together", type=int, help="at most so many SAEs in memory at once (default: all that can share)"
    )
    parsed = parser.parse_args(arguments or ["--help"])
    from sae_lens_e2e.cli.tables import as_text
    from sae_lens_e2e.studies.pareto import headline, sentence
    from sae_lens_e2e.sweep import failures, read_sweep, run_sweep
    from sae_lens_e2e.sweep.folders import FAILURE_FILENAME
    from sae_lens_e2e.training import ranks

    with ranks.together():
        plan = read_sweep(parsed.config)
    output = parsed.output or Path("output") / plan.name
    frame = run_sweep(plan, output, together=parsed.together)
    if not ranks.is_first():
        return
    print(f"{as_text(frame)}\nsaved in {output}" if len(frame) else "no point is finished")
    for _, rows in frame.groupby(["model_name", "hook_name"]) if len(frame) else ():
        if "local" in set(rows["objective"]):
            print("\n".join(sentence(comparison) for comparison in headline(rows)))
    failed = failures(output, [point.name for point in plan.points])
    finished = _points(frame["sae"]) if len(frame) else set()
    if not failed and (lost := [point.name for point in plan.points if point.name not in finished]):
        failed = dict.fromkeys(
            lost, f"it left neither results nor a {FAILURE_FILENAME}; see the log, and whether the disk is full"
        )
    if failed:
        name, reason = next(iter(failed.items()))
        raise ValueError(
            f"{len(failed)} of {len(plan.points)} points failed, and are tried again next time; {name}: {reason}"
        )


def _points(saes: Collection[str]) -> set[str]:
    """The points that SAEs are of, those of several SAEs by what comes before the SAEs' own names."""
    return {name.split("/")[0] for name in saes}
