"""Train an SAE locally, finetune it end to end, and compare before and after: on the embedded model, in about a minute.

    python examples/finetune.py [--output finetune_output] [--overwrite]

The first SAE stands for one that somebody has released: instead of its folder `finetune` takes the name of a release and of an SAE in
it, such as gpt2-small-res-jb/blocks.4.hook_resid_pre. Writes OUTPUT/local and OUTPUT/finetuned, SAEs that SAELens loads.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from sae_lens import LoggingConfig, TopKTrainingSAEConfig

from sae_lens_e2e import E2ERunnerConfig, E2ETrainingRunner, embedded, finetune
from sae_lens_e2e.loading import HELD_OUT, load_documents
from sae_lens_e2e.output import claim_output

TOKENS = 409_600
# A small model takes large learning rates, and so does its finetune; for a released SAE leave lr at its default.
LR, FINETUNING_LR = 1e-2, 3e-3
BATCH: dict[str, Any] = {"store_batch_size_prompts": 4, "train_batch_size_tokens": 4 * 256}


def train_locally(output: Path) -> None:
    """An ordinary SAE, which reconstructs activations."""
    cfg = E2ERunnerConfig(
        sae=TopKTrainingSAEConfig(d_in=embedded.D_MODEL, d_sae=512, k=16),
        objective="local",
        model_name="embedded",
        dataset_path="embedded",
        hook_name=embedded.HOOK_NAME,
        context_size=256,
        prepend_bos=False,
        training_tokens=TOKENS,
        lr=LR,
        lr_decay_steps=TOKENS // 1024 // 3,
        output_path=str(output),
        checkpoint_path=None,
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
        **BATCH,
    )
    documents, _ = load_documents("embedded")
    E2ETrainingRunner(cfg, documents, embedded.load_model(), held_out=HELD_OUT).run(overwrite=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("finetune_output"), help="(default: finetune_output)")
    parser.add_argument("--overwrite", action="store_true", help="write to a folder that is not one of ours")
    arguments = parser.parse_args()
    local, finetuned = arguments.output / "local", arguments.output / "finetuned"
    try:
        for folder in (local, finetuned):
            claim_output(folder, arguments.overwrite)
    except OSError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
    train_locally(local)
    # Model, hook, context and data are in the SAE's metadata; the objective is kl_mse, and L0 stays where it is.
    result = finetune(
        local,
        output_path=finetuned,
        training_tokens=TOKENS // 5,
        lr=FINETUNING_LR,
        overwrite=True,
        verbose=False,
        **BATCH,
    )
    print(f"\n{result.summary()}")


if __name__ == "__main__":
    main()
