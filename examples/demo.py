"""Local against end-to-end features on the embedded model: what `make demo` runs.

    python examples/demo.py [--output demo_output] [--overwrite]

Trains a `local` and an `e2e_ds` SAE with the same settings but for the sparsity coefficient, evaluates both on held-out
stories, prints the comparison and draws it. Writes OUTPUT/local and OUTPUT/e2e_ds (SAEs that SAELens loads), comparison.png,
comparison.html and comparison.json.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from train_tinystories import Settings, table, train_and_evaluate

from sae_lens_e2e.evaluation import Evaluation
from sae_lens_e2e.figures import comparison_html, comparison_png
from sae_lens_e2e.loading import load_documents, load_model
from sae_lens_e2e.output import claim_output, write_whole

# Chosen so that both come out at about the same L0; the losses differ in scale, and so do their sparsity coefficients.
SPARSITY = {"local": 1.3, "e2e_ds": 0.1}


def run(output: Path) -> dict[str, Evaluation]:
    """Train and evaluate one SAE for each objective, on the same model and prompts."""
    settings = Settings()
    model = load_model(settings.model, settings.device)
    documents, held_out = load_documents(settings.dataset)
    results = {}
    for objective, sparsity in SPARSITY.items():
        print(f"training {objective}, sparsity {sparsity}", flush=True)
        chosen = replace(settings, objective=objective, sparsity=sparsity, output=str(output / objective))
        results[objective] = train_and_evaluate(chosen, model, documents, held_out)
    return results


def verdict(results: dict[str, Evaluation]) -> str:
    """The comparison in a sentence."""
    local, end_to_end = results["local"], results["e2e_ds"]
    ratio = end_to_end.ce_loss_increase / local.ce_loss_increase
    return (
        f"e2e_ds costs the model {ratio:.0%} of what local does in cross-entropy, "
        f"with {end_to_end.l0:.1f} features active a token to local's {local.l0:.1f}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="(default: demo_output)")
    parser.add_argument("--overwrite", action="store_true", help="write to a folder that is not one of ours")
    arguments = parser.parse_args()
    try:
        claim_output(arguments.output, arguments.overwrite, made_by="comparison.json")
    except OSError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
    results = run(arguments.output)
    print(f"\n{table(results)}\n\n{verdict(results)}")
    comparison_png(results, arguments.output / "comparison.png")
    comparison_html(results, arguments.output / "comparison.html")
    figures = {name: result.to_dict() for name, result in results.items()}
    write_whole(arguments.output / "comparison.json", json.dumps(figures, indent=1))
    print(f"drawn in {arguments.output}/comparison.png and {arguments.output}/comparison.html")


if __name__ == "__main__":
    main()
