"""Make the stored evaluation that tests read back: a random SAE on one batch of held-out stories.

python tests/golden/make_evaluation.py
"""

import json
from pathlib import Path

import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata

from sae_lens_e2e import embedded
from sae_lens_e2e.evaluation import evaluate


def main() -> None:
    torch.manual_seed(0)
    metadata = SAEMetadata(
        model_name=embedded.MODEL_NAME,
        hook_name=embedded.HOOK_NAME,
        context_size=embedded.CONTEXT_SIZE,
        prepend_bos=False,
        objective={"name": "local"},
    )
    sae = StandardSAE(StandardSAEConfig(d_in=embedded.D_MODEL, d_sae=128, metadata=metadata))
    with torch.no_grad():
        sae.W_dec.mul_(0.2)
        sae.b_enc.fill_(-2.0)
    result = evaluate(sae, embedded.load_model(), embedded.load_dataset("held_out"), n_batches=1)
    Path(__file__).with_name("evaluation.json").write_text(json.dumps(result.to_dict(), indent=1) + "\n")


if __name__ == "__main__":
    main()
