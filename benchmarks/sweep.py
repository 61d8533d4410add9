"""What a sweep of end-to-end SAEs costs against the same SAEs one run at a time.

    python benchmarks/sweep.py [--model FOLDER --dataset FILE --hook HOOK --tokens N]

Six points (e2e and e2e_ds at three sparsities each), trained and evaluated both ways in one process, the model's own loading left out
of the single runs' time. Without arguments: the embedded model.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from sae_lens import SAE

from sae_lens_e2e import E2ERunnerConfig, E2ETrainingRunner
from sae_lens_e2e.evaluation import evaluate
from sae_lens_e2e.loading import HELD_OUT, load_documents, load_model
from sae_lens_e2e.sweep import Sweep, read_sweep, run_sweep


def sweep_file(arguments: argparse.Namespace) -> dict[str, Any]:
    """Six end-to-end points."""
    return {
        "base": {
            "model_name": arguments.model,
            "dataset_path": arguments.dataset,
            "hook_name": arguments.hook,
            "context_size": arguments.context,
            "store_batch_size_prompts": arguments.batch,
            "train_batch_size_tokens": arguments.batch * arguments.context,
            "training_tokens": arguments.tokens,
            "lr": 5e-3,
            "verbose": False,
            "sae": {"architecture": "standard", "d_in": 64, "d_sae": 1024, "apply_b_dec_to_input": False},
        },
        "grid": {"objective": ["e2e", "e2e_ds"], "sae.l1_coefficient": [0.05, 0.1, 0.2]},
        "evaluation": {"max_tokens": arguments.evaluation_tokens},
    }


def one_at_a_time(sweep: Sweep, folder: Path) -> float:
    """Seconds to train and evaluate each point by itself, once the model and its data are there."""
    first = sweep.points[0].config(folder)
    model = load_model(first.model_name)
    train, held_out = load_documents(first.dataset_path)
    start = time.perf_counter()
    for point in sweep.points:
        cfg = point.config(folder / point.name)
        assert isinstance(cfg, E2ERunnerConfig)
        E2ETrainingRunner(cfg, override_dataset=train, override_model=model, held_out=HELD_OUT).run()
        evaluate(SAE.load_from_disk(folder / point.name), model, held_out, **sweep.evaluation)
    return time.perf_counter() - start


def all_together(sweep: Sweep, folder: Path) -> float:
    """Seconds for the sweep, loading the model and its data included."""
    start = time.perf_counter()
    run_sweep(sweep, folder)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--dataset", default="embedded")
    parser.add_argument("--hook", default="blocks.3.hook_resid_pre")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128 * 4 * 100)
    parser.add_argument("--evaluation-tokens", type=int, default=20_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sweep.yaml"
        path.write_text(yaml.safe_dump(sweep_file(arguments)))
        sweep = read_sweep(path)
        singly = one_at_a_time(sweep, Path(folder) / "singly")
        together = all_together(sweep, Path(folder) / "together")
    print(
        json.dumps(
            {"singly_s": round(singly, 1), "together_s": round(together, 1), "ratio": round(together / singly, 3)}
        )
    )


if __name__ == "__main__":
    main()
