"""Run SAEDashboard on one SAE, in the Python environment that has it: see `elsewhere.host`.

The folder holds the job, and the model and tokens if SAEDashboard is not to find its own.
"""

# pyright: reportMissingImports=false

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sae_dashboard.neuronpedia import neuronpedia_runner
from sae_dashboard.neuronpedia.neuronpedia_runner_config import NeuronpediaRunnerConfig
from sae_lens import HookedSAETransformer
from sae_lens.saes.topk_sae import TopKSAE
from safetensors.torch import load_file
from torch import Tensor


def run(job: dict[str, Any], load_model: Callable[..., HookedSAETransformer]) -> None:
    """Have SAEDashboard write `batch-0.json` and on, somewhere below the job's outputs folder.

    The job: what `NeuronpediaRunnerConfig` is made with (`runner`), `n_features`, `hook_name`, `model_from_pretrained_kwargs`, and
    the files of `model` and `tokens`, if there are.
    """
    tokens = load_file(job["tokens"])["tokens"] if Path(job["tokens"]).exists() else None

    class Runner(neuronpedia_runner.NeuronpediaRunner):
        """SAEDashboard's, on the first features only, and on tokens that are there already."""

        def get_feature_batches(self) -> list[list[int]]:
            self.target_feature_indexes = self.target_feature_indexes[: job["n_features"]]
            return super().get_feature_batches()

        def _setup_activation_store(self) -> None:
            if tokens is None:
                return super()._setup_activation_store()
            self.activations_store = None
            self.cached_activations_dir = Path("cached_activations")
            return None

        def generate_tokens(self, activations_store: Any, n_prompts: int) -> Tensor:
            if tokens is None:
                return super().generate_tokens(activations_store, n_prompts)
            return tokens.to(self.cfg.activation_store_device)

    def from_pretrained(model_name: str, device: str, n_devices: int, dtype: str, **_: Any) -> HookedSAETransformer:
        if Path(job["model"]).exists():
            return load_model(Path(job["model"]), job["hook_name"], device)
        chosen = {"device": device, "n_devices": n_devices, "dtype": dtype} | job["model_from_pretrained_kwargs"]
        return HookedSAETransformer.from_pretrained_no_processing(model_name, **chosen)

    # The name that the runner loads its model by. Its own arguments ask for a processed model (LayerNorm folded, writing weights
    # centred), whose activations are not those that the SAE was trained on.
    neuronpedia_runner.HookedSAETransformer = SimpleNamespace(from_pretrained=from_pretrained)
    # SAEDashboard folds decoder norms into every SAE, which one that may not be folded refuses.
    TopKSAE.fold_W_dec_norm = _if_it_rescales(TopKSAE.fold_W_dec_norm)  # pyright: ignore[reportAttributeAccessIssue]
    Runner(NeuronpediaRunnerConfig(**job["runner"])).run()


def _if_it_rescales(fold: Callable[[Any], None]) -> Callable[[Any], None]:
    """A top-k SAE whose decoder norms may be folded rescales by them; for any other folding would change which features fire."""

    def fold_if_it_rescales(self: Any) -> None:
        if self.cfg.rescale_acts_by_decoder_norm:
            fold(self)

    return fold_if_it_rescales
