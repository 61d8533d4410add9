"""`sae-lens-e2e sweep` and `evaluate`: many SAEs, and what each costs its language model."""

import json
from functools import cache
from pathlib import Path

import pandas as pd
from transformer_lens.HookedRootModule import HookedRootModule

from sae_lens_e2e.cli.parser import Parser
from sae_lens_e2e.evaluation import Evaluation, evaluation_frame
from sae_lens_e2e.evaluation import evaluate as evaluate_sae
from sae_lens_e2e.evaluation.files import write_evaluation
from sae_lens_e2e.evaluation.measures import MEASURES, SUMMARY
from sae_lens_e2e.loading import load_documents, load_model, tokenised
from sae_lens_e2e.loading.saes import is_sae_folder, load_sae
from sae_lens_e2e.studies.pareto import headline, sentence
from sae_lens_e2e.sweep import failures, read_sweep, run_sweep


def sweep(arguments: list[str]) -> None:
    """Train and evaluate every point of a sweep file that is not finished."""
    parser = Parser(prog="sae-lens-e2e sweep", description=run_sweep.__doc__)
    parser.add_argument("config", type=Path, help="the sweep: a YAML or JSON file with 'base' and 'grid'")
    parser.add_argument("output", nargs="?", type=Path, help="where its folders go (default: output/NAME)")
    parser.add_argument(
        "--together", type=int, help="at most so many SAEs in memory at once (default: all that can share)"
    )
    parsed = parser.parse_args(arguments or ["--help"])
    plan = read_sweep(parsed.config)
    output = parsed.output or Path("output") / plan.name
    frame = run_sweep(plan, output, together=parsed.together)
    print(_as_text(frame) if len(frame) else "no point is finished")
    for _, rows in frame.groupby(["model_name", "hook_name"]) if len(frame) else ():
        if "local" in set(rows["objective"]):
            print("\n".join(sentence(comparison) for comparison in headline(rows)))
    failed = failures(output, [point.name for point in plan.points])
    if failed:
        name, reason = next(iter(failed.items()))
        raise ValueError(
            f"{len(failed)} of {len(plan.points)} points failed, and are tried again next time; {name}: {reason}"
        )


def evaluate(arguments: list[str]) -> None:
    """Evaluate SAEs one by one, each on the model and data in its metadata unless told otherwise."""
    parser = Parser(prog="sae-lens-e2e evaluate", description=evaluate.__doc__)
    parser.add_argument("sae", nargs="+", help="a folder of SAELens', or an SAE of Apollo's (see load_apollo_sae)")
    parser.add_argument("--model", help="'embedded', a folder or a name on the Hub (default: as in the SAE's metadata)")
    parser.add_argument(
        "--dataset", help="'embedded', a file, a folder or a name on the Hub (default: as in the metadata)"
    )
    parser.add_argument("--max-tokens", type=int, default=500_000, help="(default: 500000)")
    parser.add_argument("--batch-size-prompts", type=int, default=16, help="prompts a forward pass (default: 16)")
    parser.add_argument("--device", default="cpu", help="(default: cpu)")
    parsed = parser.parse_args(arguments or ["--help"])
    # SAEs of one model are many, and it may be large.
    load_model_once, load_documents_once = cache(_load_model), cache(load_documents)
    results: dict[str, Evaluation] = {}
    skipped: dict[str, str] = {}
    for source in parsed.sae:
        try:
            sae = load_sae(source, parsed.device)
            metadata = sae.cfg.metadata
            model = load_model_once(
                str(parsed.model or metadata.model_name),
                parsed.device,
                metadata.model_class_name or "HookedTransformer",
                json.dumps(metadata.model_from_pretrained_kwargs or {}),
            )
            _, held_out = load_documents_once(str(parsed.dataset or metadata.dataset_path))
            results[source] = evaluate_sae(
                sae,
                model,
                tokenised(held_out, model, metadata.context_size),
                max_tokens=parsed.max_tokens,
                batch_size_prompts=parsed.batch_size_prompts,
            )
        except (ValueError, TypeError, OSError) as error:
            skipped[source] = " ".join(str(error).split())
            continue
        if is_sae_folder(source):
            write_evaluation(results[source], source)
    if results:
        print(_as_text(evaluation_frame(results)))
    if skipped:
        raise ValueError("; ".join(f"{source} was skipped: {reason}" for source, reason in skipped.items()))


def _as_text(frame: pd.DataFrame) -> str:
    """An `evaluation_frame` as a table to read: what each SAE is, and the measures that say most."""
    columns = {name: frame[name] for name in ("sae", "objective", "d_sae")}
    for measure in (MEASURES[name] for name in (*SUMMARY, "n_tokens")):
        columns[measure.title] = frame[measure.name].map(measure.format)
    return pd.DataFrame(columns).to_string(index=False)


def _load_model(name: str, device: str, model_class_name: str, from_pretrained_kwargs: str) -> HookedRootModule:
    return load_model(name, device, model_class_name, json.loads(from_pretrained_kwargs))
