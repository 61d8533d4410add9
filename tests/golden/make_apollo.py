"""Make the Apollo golden files from a folder of reference data written by Apollo's own library (e2e_sae 2.1.1).

    python tests/golden/make_apollo.py FOLDER

FOLDER holds tiny4l/model.pt and, for each of the runs local and e2e_ds, reference.safetensors (one batch: losses, parameters
and their gradients), trajectory.safetensors (ten optimizer steps) and metrics.json (evaluation metrics on that batch).
Activations and logits are left out, for size.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent


def main(folder: Path) -> None:
    model = torch.load(folder / "tiny4l" / "model.pt", weights_only=True, map_location="cpu")
    weights = {name: w.contiguous() for name, w in model.items() if not name.endswith((".mask", ".IGNORE"))}
    save_file(weights, HERE / "tiny4l.safetensors")
    metrics = {}
    for run in ("local", "e2e_ds"):
        reference = load_file(folder / run / "reference.safetensors")
        kept = {k: v for k, v in reference.items() if k == "tokens" or k.startswith(("grad", "param.", "loss."))}
        kept = {k: v for k, v in kept.items() if "explained_variance" not in k}
        trajectory = load_file(folder / run / "trajectory.safetensors")
        save_file(kept | {f"trajectory.{k}": v for k, v in trajectory.items()}, HERE / f"apollo_{run}.safetensors")
        of_batch = json.loads((folder / run / "metrics.json").read_text())
        metrics[run] = of_batch["batch"] | of_batch["losses"]
    (HERE / "apollo_metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
