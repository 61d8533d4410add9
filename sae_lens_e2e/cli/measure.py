"""`sae-lens-e2e sweep` and `evaluate`: many SAEs, and what each costs its language model."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from sae_lens import SAE
from transformer_lens.HookedRootModule import HookedRootModule

from sae_lens_e2e.cli.parser import Parser, add_trust, device
from sae_lens_e2e.errors import one_line
from sae_lens_e2e.evaluation import (
    Evaluation,
    TogetherEvaluation,
    evaluate_many,
    evaluate_together,
    evaluation_frame,
    together_frame,
)
from sae_lens_e2e.evaluation.files import write_evaluation, write_together
from sae_lens_e2e.evaluation.measures import MEASURES, SUMMARY
from sae_lens_e2e.loading import held_out_documents, load_documents, load_model, model_settings
from sae_lens_e2e.loading.saes import is_joint_folder, is_sae_folder, load_sae, load_saes
from sae_lens_e2e.studies.pareto import headline, sentence
from sae_lens_e2e.sweep import failures, read_sweep, run_sweep
from sae_lens_e2e.sweep.folders import FAILURE_FILENAME
from sae_lens_e2e.training import ranks


def sweep(arguments: list[str]) -> None:
    """Train and evaluate every point of a sweep file that is not finished."""
    parser = Parser(prog="sae-lens-e2e sweep", description=run_sweep.__doc__)
    parser.add_argument("config", type=Path, help="the sweep: a YAML or JSON file with 'base' and 'grid'")
    parser.add_argument("output", nargs="?", type=Path, help="where its folders go (default: output/NAME)")
    parser.add_argument(
        "--together", type=int, help="at most so many SAEs in memory at once (default: all that can share)"
    )
    parsed = parser.parse_args(arguments or ["--help"])
    with ranks.together():
        plan = read_sweep(parsed.config)
    output = parsed.output or Path("output") / plan.name
    frame = run_sweep(plan, output, together=parsed.together)
    if not ranks.is_first():
        return
    print(_as_text(frame) if len(frame) else "no point is finished")
    for _, rows in frame.groupby(["model_name", "hook_name"]) if len(frame) else ():
        if "local" in set(rows["objective"]):
            print("\n".join(sentence(comparison) for comparison in headline(rows)))
    failed = failures(output, [point.name for point in plan.points])
    if not failed and (lost := [point.name for point in plan.points if point.name not in _finished(frame)]):
        failed = dict.fromkeys(
            lost, f"it left neither results nor a {FAILURE_FILENAME}; see the log, and whether the disk is full"
        )
    if failed:
        name, reason = next(iter(failed.items()))
        raise ValueError(
            f"{len(failed)} of {len(plan.points)} points failed, and are tried again next time; {name}: {reason}"
        )


def _finished(frame: pd.DataFrame) -> set[str]:
    """The points in the results, those of several SAEs by what comes before the SAEs' own names."""
    return {name.split("/")[0] for name in frame["sae"]} if len(frame) else set()


def evaluate(arguments: list[str]) -> None:
    """Evaluate SAEs one by one, each on the model and data in its metadata unless told otherwise.

    Those of a folder of SAEs that were trained together are evaluated together as well.
    """
    parser = Parser(prog="sae-lens-e2e evaluate", description=evaluate.__doc__)
    parser.add_argument(
        "sae",
        nargs="+",
        help="a folder of SAELens', of SAEs that were trained together, or an SAE of Apollo's (see load_apollo_sae)",
    )
    parser.add_argument("--model", help="'embedded', a folder or a name on the Hub (default: as in the SAE's metadata)")
    parser.add_argument(
        "--dataset", help="'embedded', a file, a folder or a name on the Hub (default: as in the metadata)"
    )
    parser.add_argument("--max-tokens", type=int, default=500_000, help="(default: 500000)")
    parser.add_argument("--batch-size-prompts", type=int, default=16, help="prompts a forward pass (default: 16)")
    parser.add_argument("--device", type=device, default="cpu", help="(default: cpu)")
    add_trust(parser)
    parsed = parser.parse_args(arguments or ["--help"])
    # SAEs of one model are many, and it may be large.
    models: dict[str, HookedRootModule] = {}
    load_documents_once = cache(load_documents)
    results: dict[str, Evaluation] = {}
    together: dict[str, TogetherEvaluation] = {}
    skipped: dict[str, str] = {}
    caveats: list[str] = []
    for source in parsed.sae:
        try:
            saes = _saes_at(source, parsed.device)
            settings = model_settings(next(iter(saes.values())).cfg.metadata, parsed.model, parsed.trust_remote_code)
            if (key := json.dumps(settings)) not in models:
                models[key] = load_model(device=parsed.device, **settings)
            held_out = held_out_documents(saes, parsed.dataset, load_documents_once)
            data = (models[key], held_out.documents)
            options = {"max_tokens": parsed.max_tokens, "batch_size_prompts": parsed.batch_size_prompts}
            found = evaluate_many(saes, *data, **options)
            if is_joint_folder(source):
                by_name = {Path(folder).name: sae for folder, sae in saes.items()}
                together[source] = evaluate_together(by_name, *data, **options)
        except Exception as error:  # whatever is wrong with one SAE does not concern the others
            skipped[source] = one_line(error)
            continue
        caveats += [] if held_out.caveat is None else [held_out.caveat]
        results |= found
        for name in filter(is_sae_folder, found):
            write_evaluation(found[name], name)
        if source in together:
            write_together(together[source], source)
    if results:
        print("\n".join([_as_text(evaluation_frame(results)), *caveats]))
    for source, found in together.items():
        print(f"\n{source}, spliced in together, in order of depth:\n{_together_as_text(found)}")
    if skipped:
        raise ValueError("; ".join(f"{source} was skipped: {reason}" for source, reason in skipped.items()))


def _saes_at(source: str, device: str) -> dict[str, SAE[Any]]:
    """The SAE at a place, or those in a folder of several that were trained together, by where each is."""
    if not is_joint_folder(source):
        return {source: load_sae(source, device)}
    return {f"{source}/{name}": sae for name, sae in load_saes(source, device).items()}


def _together_as_text(found: TogetherEvaluation) -> str:
    """What the first, the first two and so on cost, as a table to read."""
    frame = together_frame({"": found})
    rows: pd.DataFrame = frame.loc[frame["spliced"] == "together"]
    columns = {"SAEs": rows["n_saes"], "down to": rows["hook_name"]}
    for measure in (MEASURES[name] for name in ("ce_loss_increase", "kl", "top1_agreement")):
        columns[measure.title] = rows[measure.name].map(measure.format)
    return pd.DataFrame(columns).to_string(index=False)


def _as_text(frame: pd.DataFrame) -> str:
    """An `evaluation_frame` as a table to read: what each SAE is, and the measures that say most."""
    columns = {name: frame[name] for name in ("sae", "objective", "d_sae")}
    for measure in (MEASURES[name] for name in (*SUMMARY, "n_tokens")):
        columns[measure.title] = frame[measure.name].map(measure.format)
    return pd.DataFrame(columns).to_string(index=False)
