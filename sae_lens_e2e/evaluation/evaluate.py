"""Evaluate one SAE on tokens it was not trained on."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from datasets import Dataset
from sae_lens import SAE
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.util import get_special_token_ids
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.HookedRootModule import HookedRootModule

from sae_lens_e2e.losses import downstream_mse
from sae_lens_e2e.splice import Splice, make_splice


@dataclass(frozen=True)
class Evaluation:
    """What an SAE does to its language model, over `n_tokens` held-out tokens.

    Losses are in nats per token, as SAELens' `run_evals` computes them; `downstream_mse` is the mean squared error of each
    later layer's activation with the SAE spliced in, over tokens and dimensions. A feature is alive if it fired at all.
    """

    n_tokens: int
    ce_loss_without_sae: float
    ce_loss_with_sae: float
    kl: float
    l0: float
    n_alive: int
    d_sae: int
    downstream_mse: dict[str, float]

    @property
    def ce_loss_increase(self) -> float:
        """Nats of cross-entropy that splicing in the SAE costs."""
        return self.ce_loss_with_sae - self.ce_loss_without_sae

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready figures."""
        return {**asdict(self), "ce_loss_increase": self.ce_loss_increase}


def evaluate(
    sae: SAE[Any],
    model: HookedRootModule,
    dataset: Dataset,
    *,
    batch_size_prompts: int = 16,
    downstream_hooks: Sequence[str] | None = None,
) -> Evaluation:
    """Evaluate `sae` on every whole batch of a tokenised dataset, at the hook and context size in its metadata.

    `downstream_hooks` default to the input of every later block and the output of the last. Raises ValueError if the dataset
    is shorter than one batch, or the metadata name no hook.
    """
    metadata = sae.cfg.metadata
    n_batches = len(dataset) // batch_size_prompts
    if n_batches == 0:
        raise ValueError(f"the dataset has {len(dataset)} prompts, fewer than batch_size_prompts={batch_size_prompts}")
    excluded = _excluded_tokens(metadata.exclude_special_tokens, model)
    # Whole batches only, so that run_evals' two passes over the data see the same prompts.
    store = ActivationsStore.from_sae(
        model,
        sae,
        dataset.select(range(n_batches * batch_size_prompts)),
        streaming=False,
        store_batch_size_prompts=batch_size_prompts,
        total_tokens=0,
        device=str(sae.device),
    )
    config = EvalConfig(
        batch_size_prompts=batch_size_prompts,
        n_eval_reconstruction_batches=n_batches,
        compute_ce_loss=True,
        compute_kl=True,
        n_eval_sparsity_variance_batches=n_batches,
        compute_sparsity_metrics=True,
        compute_featurewise_density_statistics=True,
    )
    metrics, features = run_evals(
        sae, store, model, ActivationScaler(), config, exclude_special_tokens=excluded, verbose=True
    )
    performance = metrics["model_performance_preservation"]
    batches = (store.get_batch_tokens(batch_size_prompts) for _ in range(n_batches))
    return Evaluation(
        n_tokens=n_batches * batch_size_prompts * store.context_size,
        ce_loss_without_sae=performance["ce_loss_without_sae"],
        ce_loss_with_sae=performance["ce_loss_with_sae"],
        kl=metrics["model_behavior_preservation"]["kl_div_with_sae"],
        l0=metrics["sparsity"]["l0"],
        n_alive=sum(density > 0 for density in features["feature_density"]),
        d_sae=sae.cfg.d_sae,
        downstream_mse=_downstream_mse(
            sae, model, tqdm(batches, "Downstream MSE", n_batches, leave=False), downstream_hooks, excluded
        ),
    )


def _excluded_tokens(setting: bool | list[int] | None, model: HookedRootModule) -> list[int]:
    if setting is True:
        return get_special_token_ids(model.tokenizer)  # pyright: ignore[reportArgumentType]
    return setting or []


@torch.no_grad()
def _downstream_mse(
    sae: SAE[Any], model: HookedRootModule, batches: Any, hooks: Sequence[str] | None, excluded: list[int]
) -> dict[str, float]:
    """The MSE at each hook, weighted by the tokens of each batch."""
    metadata = sae.cfg.metadata
    if hooks is None:
        hooks = make_splice(model, metadata.hook_name, metadata.hook_head_index).later_layers
    splice = make_splice(model, metadata.hook_name, metadata.hook_head_index, hooks)
    sums, n_tokens = dict.fromkeys(hooks, 0.0), 0
    for tokens in batches:
        mask = ~torch.isin(tokens, torch.tensor(excluded, device=tokens.device))
        n = int(mask.sum())
        for hook, mse in _batch_mse(sae, splice, tokens, mask).items():
            sums[hook] += mse * n
        n_tokens += n
    return {hook: total / n_tokens for hook, total in sums.items()}


def _batch_mse(sae: SAE[Any], splice: Splice, tokens: Tensor, mask: Tensor) -> dict[str, float]:
    clean = splice.clean(tokens)
    x = splice.read(clean.activation)
    sae.turn_off_forward_pass_hook_z_reshaping()
    x_hat = sae.decode(sae.encode(x.to(sae.device))).to(x.device, x.dtype)
    x_hat = torch.where(mask[..., None], x_hat, x)
    spliced = splice.spliced(clean, splice.write(clean.activation, x_hat))
    kept = {hook: activation[mask] for hook, activation in clean.downstream.items()}
    mse = downstream_mse({hook: spliced.downstream[hook][mask] for hook in kept}, kept)
    return {hook: float(value) for hook, value in mse.items()}
