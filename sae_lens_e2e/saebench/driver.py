"""Run SAEBench's core evaluation on SAEs of one model, in the Python environment that has it: see `elsewhere.host`."""

# pyright: reportMissingImports=false

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sae_bench.evals.core import main as core
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_bench.sae_bench_utils import get_eval_uuid, get_sae_bench_version, get_sae_lens_version
from sae_bench.sae_bench_utils.general_utils import load_and_format_sae
from sae_lens import SAE
from safetensors.torch import load_file
from torch import Tensor


class Store:
    """What SAEBench asks of an activation store, with tokens that are there already."""

    def __init__(self, tokens: Tensor, batch_size_prompts: int) -> None:
        self._tokens = tokens
        self.context_size = tokens.shape[1]
        self.store_batch_size_prompts = batch_size_prompts
        self.reset_input_dataset()

    def reset_input_dataset(self) -> None:
        self._n_read = 0

    def get_batch_tokens(self, batch_size: int) -> Tensor:
        self._n_read += batch_size
        return self._tokens[self._n_read - batch_size : self._n_read]


def run(job: dict[str, Any], load_model: Callable[..., Any]) -> None:
    """Write SAEBench's own result file on each SAE.

    The job: the folder of each SAE (`saes`) and its result file (`results`) by name, the files of `model` and `tokens`, `dataset` and
    `model_name` as they are called, `hook_name`, `batch_size_prompts`, `device`, and whether special tokens are left as they are (`leave_special_tokens`).
    """
    device = job["device"]
    model = load_model(Path(job["model"]), job["hook_name"], device)
    tokens = load_file(job["tokens"])["tokens"].to(device)
    special = {getattr(model.tokenizer, f"{kind}_token_id") for kind in ("pad", "eos", "bos")} - {None}
    n_batches = math.ceil(len(tokens) / job["batch_size_prompts"])
    config = CoreEvalConfig(
        model_name=job["model_name"],
        llm_dtype=str(model.cfg.dtype).removeprefix("torch."),
        batch_size_prompts=job["batch_size_prompts"],
        n_eval_reconstruction_batches=n_batches,
        n_eval_sparsity_variance_batches=n_batches,
        dataset=job["dataset"],
        context_size=tokens.shape[1],
        exclude_special_tokens_from_reconstruction=job["leave_special_tokens"],
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
    )
    for name, folder in job["saes"].items():
        _, sae, _ = load_and_format_sae(name, SAE.load_from_disk(folder, device=device), device)
        store = Store(tokens, job["batch_size_prompts"])
        metrics, features = core.run_evals(sae, store, model, config, ignore_tokens=special, verbose=True)
        found = {
            "eval_cfg": config,
            "sae_id": name,
            "sae_set": "local",
            "metrics": metrics | {"misc_metrics": core.calculate_misc_metrics(features)},
            "feature_metrics": features,
        }
        core.save_single_eval_result(
            core.replace_nans_with_negative_one(found),
            get_eval_uuid(),
            get_sae_lens_version(),
            get_sae_bench_version(),
            job["results"][name],
            sae,
        )
