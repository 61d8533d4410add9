"""Time a training step of Apollo's library, `e2e_sae`, imported from its source tree: the loss of its end-to-end runs, clipped, Adam.

    python benchmarks/apollo_driver.py TREE '{"model": {"n_layers": 3, ...}, "hook_name": "blocks.1.hook_resid_pre", ...}'

Needs what that library imports. `peers.py` calls this.
"""

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from timing import measured_steps, random_batches
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig


def apollo_step(model: HookedTransformer, of: dict[str, Any]) -> Callable[[Tensor], float]:
    """Their two passes and their loss, as their training script calls them."""
    from e2e_sae import SAETransformer  # pyright: ignore[reportMissingImports]
    from e2e_sae.losses import LogitsKLLoss, LossConfigs, SparsityLoss, calc_loss  # pyright: ignore[reportMissingImports]

    hooks = [of["hook_name"]]
    torch.manual_seed(0)
    spliced = SAETransformer(model, hooks, of["ratio"])
    losses = LossConfigs(
        sparsity=SparsityLoss(coeff=of["sparsity"]),
        in_to_orig=None,
        out_to_orig=None,
        out_to_in=None,
        logits_kl=LogitsKLLoss(coeff=1.0),
    )
    model.requires_grad_(False)
    optimizer = torch.optim.Adam(spliced.saes.parameters(), lr=of["lr"])

    def step(tokens: Tensor) -> float:
        optimizer.zero_grad()
        with torch.inference_mode():
            logits, clean = spliced.forward_raw(tokens, run_entire_model=True)
        new_logits, new = spliced.forward(tokens, hooks)
        loss, _ = calc_loss(clean, new, logits, new_logits, losses)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(spliced.saes.parameters(), 1.0)
        optimizer.step()
        return float(loss)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree")
    parser.add_argument("settings", help="model, hook_name, ratio, sparsity, n_prompts, n_pos, lr, steps, as JSON")
    arguments = parser.parse_args()
    sys.path.insert(0, arguments.tree)
    of = json.loads(arguments.settings)
    model = HookedTransformer(HookedTransformerConfig(**of["model"]))
    batches = random_batches(of["steps"], of["n_prompts"], of["n_pos"], of["model"]["d_vocab"])
    # Importing it is no part of what a step takes.
    import e2e_sae  # noqa: F401 # pyright: ignore[reportMissingImports]

    print(json.dumps(measured_steps(lambda: apollo_step(model, of), batches)))


if __name__ == "__main__":
    main()
