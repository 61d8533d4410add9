"""What a step costs against tokens, features and layers: a picture.

    python benchmarks/cost.py [--output cost.png]

GPT2-small's shape, `local` and `e2e_ds`; one setting moves, the others stay at 512 tokens, 46,080 features and an SAE before block 6. How a step is measured
is in `measure.py`.
"""

import argparse
from typing import Any

import matplotlib.pyplot as plt
from measure import SHAPES, Case, measured

GPT2 = SHAPES["gpt2-small"]
WIDTH = GPT2.model["d_model"]
AXES: dict[str, tuple[str, list[int], int]] = {
    "n_pos": ("tokens a step", [128, 512, 1024], 1),
    "ratio": ("features", [8, 30, 60], WIDTH),
    "hook_layer": ("blocks before the SAE", [1, 6, 11], 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="cost.png")
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    figure, panels = plt.subplots(1, len(AXES), figsize=(11, 3.4), sharey=True, layout="constrained")
    print("| objective | varies | value | s a step | GiB above the model |\n| --- | --- | --- | --- | --- |")
    for panel, (field, (label, values, unit)) in zip(panels, AXES.items(), strict=True):
        for objective in ("local", "e2e_ds"):
            settings: list[dict[str, Any]] = [{"n_pos": 512, field: value} for value in values]
            rows = [measured(Case("gpt2-small", objective, steps=arguments.steps, **one)) for one in settings]
            x = [value * unit for value in values]
            panel.plot(x, [row["seconds"] for row in rows], marker="o", label=objective)
            for value, row in zip(x, rows, strict=True):
                print(
                    f"| {objective} | {label} | {value:,} | {row['seconds']:.2f} | {row['peak_gib']:.2f} |", flush=True
                )
        panel.set(xlabel=label, ylim=(0, None))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("seconds a step")
    panels[0].legend()
    figure.savefig(arguments.output, dpi=130)


if __name__ == "__main__":
    main()
