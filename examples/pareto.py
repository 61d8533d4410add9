"""The paper's figure 1 in miniature: CE loss increase against L0 and alive features, for three objectives on the embedded model.

    python examples/pareto.py [--output pareto_output] [--sweep examples/pareto.yaml]

Twelve SAEs, trained together: under 15 minutes on two CPU cores. Writes a folder a point, pareto.png, pareto.pdf, pareto.html and
layers.png, and prints the table and what it says. Stopped half-way, the same command goes on.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd

from sae_lens_e2e.evaluation import layers_frame
from sae_lens_e2e.evaluation.measures import MEASURES, SUMMARY
from sae_lens_e2e.figures import layers_figure, pareto_figure, pareto_plotly, save, with_objectives
from sae_lens_e2e.studies.pareto import headline, sentence
from sae_lens_e2e.sweep import read_sweep, run_sweep
from sae_lens_e2e.sweep.run import read_results

SHOWN = [MEASURES[name] for name in SUMMARY]
HEADINGS = ("objective", "sparsity coefficient", *(measure.title for measure in SHOWN))


def table(frame: pd.DataFrame) -> str:
    """A row for each SAE, in Markdown."""
    rows = [list(HEADINGS), ["---"] * len(HEADINGS)]
    for row in frame.to_dict("records"):
        figures = (measure.format(row[measure.name]) for measure in SHOWN)
        rows.append([row["objective"], str(row["sae"]).split("=")[-1], *figures])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("pareto_output"), help="(default: pareto_output)")
    parser.add_argument(
        "--sweep", type=Path, default=Path(__file__).with_suffix(".yaml"), help="(default: pareto.yaml)"
    )
    arguments = parser.parse_args()
    try:
        sweep = read_sweep(arguments.sweep)
        frame = run_sweep(sweep, arguments.output)
    except (OSError, ValueError) as error:
        sys.exit(f"{Path(__file__).name}: {error}")
    print(f"\n{table(frame)}\n")
    print("\n".join(sentence(comparison) for comparison in headline(frame)))
    save(pareto_figure(frame), arguments.output / "pareto.png")
    save(pareto_figure(frame), arguments.output / "pareto.pdf")
    save(pareto_plotly(frame), arguments.output / "pareto.html")
    results = read_results(arguments.output, list(frame["sae"]))
    layers = with_objectives(layers_frame(results), frame)
    save(layers_figure(layers), arguments.output / "layers.png")


if __name__ == "__main__":
    main()
