"""Run SAEDashboard on one SAE: `python -I driver.py`, in a new folder, with the Python environment that has SAEDashboard.

`make_dashboard` starts this file by its path, so it imports nothing of this package: that environment has not got it, and has
older versions of the libraries. The folder holds the job, and the model and tokens if SAEDashboard is not to find its own.
"""

# pyright: reportMissingImports=false

import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from sae_lens import HookedSAETransformer
from safetensors.torch import load_file
from transformer_lens import HookedTransformerConfig
from transformers import PreTrainedTokenizerFast

JOB = "job.json"
"""What `NeuronpediaRunnerConfig` is made with (`runner`), `n_features`, `hook_name`, and `model_from_pretrained_kwargs`."""
MODEL = "model"
TOKENS = "tokens.safetensors"
OUTPUTS = "outputs"
ERROR = "error.txt"

# Two versions of TransformerLens differ by rounding; a model that was read wrongly differs by its own size.
_LARGEST_DIFFERENCE = 0.02


def main() -> int:
    """Do the job in this folder. Returns the exit status, after writing what went wrong to a file if something did."""
    try:
        run(json.loads(Path(JOB).read_text()))
    except Exception as error:
        traceback.print_exc()
        Path(ERROR).write_text(f"{type(error).__name__}: {error}")
        return 1
    return 0


def run(job: dict[str, Any]) -> None:
    """Have SAEDashboard write `batch-0.json` and on, somewhere below OUTPUTS."""
    from sae_dashboard.neuronpedia import neuronpedia_runner
    from sae_dashboard.neuronpedia.neuronpedia_runner_config import NeuronpediaRunnerConfig
    from sae_lens.saes.topk_sae import TopKSAE

    tokens = load_file(TOKENS)["tokens"] if Path(TOKENS).exists() else None

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

        def generate_tokens(self, activations_store: Any, n_prompts: int) -> torch.Tensor:
            if tokens is None:
                return super().generate_tokens(activations_store, n_prompts)
            return tokens.to(self.cfg.activation_store_device)

    # The name that the runner loads its model by. Its own arguments ask for a processed model (LayerNorm folded, writing weights
    # centred), whose activations are not those that the SAE was trained on.
    neuronpedia_runner.HookedSAETransformer = SimpleNamespace(from_pretrained=_model_loader(job))
    # SAEDashboard folds decoder norms into every SAE, which one that may not be folded refuses.
    TopKSAE.fold_W_dec_norm = _if_it_rescales(TopKSAE.fold_W_dec_norm)  # pyright: ignore[reportAttributeAccessIssue]
    Runner(NeuronpediaRunnerConfig(**job["runner"])).run()


def _model_loader(job: dict[str, Any]) -> Callable[..., HookedSAETransformer]:
    def load(model_name: str, device: str, n_devices: int, dtype: str, **_: Any) -> HookedSAETransformer:
        if Path(MODEL).exists():
            return load_model(Path(MODEL), job["hook_name"], device)
        chosen = {"device": device, "n_devices": n_devices, "dtype": dtype} | job["model_from_pretrained_kwargs"]
        return HookedSAETransformer.from_pretrained_no_processing(model_name, **chosen)

    return load


def load_model(folder: Path, hook_name: str, device: str = "cpu") -> HookedSAETransformer:
    """The model that `export_model` wrote, computing what it computed there, whatever version of TransformerLens this is.

    Raises ValueError if it has other weights here, or another activation at `hook_name`.
    """
    settings = json.loads((folder / "config.json").read_text())
    # A setting that is unknown here is for kinds of models that this version has not got; the activation tells.
    known = {field.name for field in fields(HookedTransformerConfig)}
    settings = {name: value for name, value in settings.items() if name in known}
    settings |= {"dtype": getattr(torch, settings["dtype"]), "device": device, "init_weights": False}
    # With add_bos_token TransformerLens takes the tokenizer as it is, and does not look for another by its name.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, add_bos_token=True)
    model = HookedSAETransformer(HookedTransformerConfig(**settings), tokenizer=tokenizer)
    missing, unexpected = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    # What is no parameter is computed from the config: masks, rotary tables.
    parameters = {name for name, _ in model.named_parameters()}
    differing = sorted({*unexpected, *parameters.intersection(missing)})
    if differing:
        raise ValueError(f"the model has other weights in this version of TransformerLens: {', '.join(differing)}")
    difference = _difference(model, load_file(folder / "activation.safetensors"), hook_name)
    if not difference < _LARGEST_DIFFERENCE:
        raise ValueError(
            f"the model needs another TransformerLens than {version('transformer-lens')}, in which its activation at {hook_name} "
            f"differs by {difference:.0%}"
        )
    return model.eval()


@torch.no_grad()
def _difference(model: HookedSAETransformer, expected: dict[str, torch.Tensor], hook_name: str) -> float:
    """How far the model's activation is from what it should be, as a fraction of its norm."""
    _, cache = model.run_with_cache(expected["tokens"], names_filter=hook_name)
    activation = expected["activation"].float()
    return float((cache[hook_name].cpu().float() - activation).norm() / activation.norm())


def _if_it_rescales(fold: Callable[[Any], None]) -> Callable[[Any], None]:
    """A top-k SAE whose decoder norms may be folded rescales by them; for any other folding would change which features fire."""

    def fold_if_it_rescales(self: Any) -> None:
        if self.cfg.rescale_acts_by_decoder_norm:
            fold(self)

    return fold_if_it_rescales


if __name__ == "__main__":
    sys.exit(main())
