"""Write SAEs as Neuronpedia and SAEDashboard read them: stock SAELens folders, with nothing missing."""

import copy
import math
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE, TrainingSAE
from sae_lens.constants import SPARSITY_FILENAME
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.util import extract_layer_from_tlens_hook_name
from safetensors.torch import save_file
from torch import Tensor

from sae_lens_e2e.output import check_free, written_whole

REQUIRED = ("model_name", "hook_name", "dataset_path", "context_size", "prepend_bos")
"""The metadata without which an SAE cannot be run or shown."""

_DEFAULTS: dict[str, Any] = {
    "model_class_name": "HookedTransformer",
    "model_from_pretrained_kwargs": {},
    "hook_head_index": None,
    "exclude_special_tokens": False,
    "neuronpedia_id": None,
}
_NEURONPEDIA_ID = re.compile(r"[^/\s]+/\d+-[^/\s]+")
# SAELens' own floor, so that a feature that never fired has a logarithm.
_SMALLEST_FREQUENCY = 1e-10


def save_for_neuronpedia(
    sae: SAE[Any],
    path: str | Path,
    *,
    frequency: Float[Tensor, "d_sae"] | None = None,
    norm_scaling_factor: float | None = None,
    overwrite: bool = False,
    **metadata: Any,
) -> Path:
    """Write an SAE to a folder that SAELens, SAEDashboard and Neuronpedia load: cfg.json, sae_weights and sparsity.safetensors.

    `sae` itself is left as it is; a training SAE is written as its inference SAE, with scales folded into the weights.

    Args:
        sae (SAE): Of any SAELens architecture, or a training SAE.
        path (str | Path): A folder that is new or empty.
        frequency (Tensor | None): The fraction of tokens on which each feature fires, (d_sae,); without it sparsity.safetensors is left out. `evaluate(...).firing_frequency` has it.
        norm_scaling_factor (float | None): The scale to fold, for an SAE with normalize_activations='expected_average_only_in'.
        overwrite (bool): Whether to write to a folder that has something in it.
        metadata (Any): What the SAE's metadata lack or have wrong, such as neuronpedia_id='gpt2-small/6-res_mine'.

    Raises ValueError, before anything is written, naming every key of the metadata that is missing, or what does not fit.
    """
    check_free(path, overwrite)
    stock = stock_sae(sae, norm_scaling_factor)
    stock.cfg.metadata = complete_metadata(stock, metadata)
    log_sparsity = None if frequency is None else _log_sparsity(frequency, stock.cfg.d_sae)
    with written_whole(path) as partial:
        stock.save_model(partial)
        if log_sparsity is None:
            # What is overwritten was another SAE's.
            (Path(path) / SPARSITY_FILENAME).unlink(missing_ok=True)
        else:
            save_file({"sparsity": log_sparsity}, partial / SPARSITY_FILENAME)
    return Path(path)


def stock_sae(sae: SAE[Any], norm_scaling_factor: float | None = None) -> SAE[Any]:
    """A copy of an SAE that SAELens alone can run: for inference, on the CPU, with what training kept apart folded in.

    Raises ValueError for an architecture that SAELens does not have, a scale that is not known, or weights that are NaN.
    """
    stock = _copied(sae)
    _fold_scale(stock, norm_scaling_factor)
    if isinstance(stock, TrainingSAE):
        with tempfile.TemporaryDirectory() as folder:
            stock.save_inference_model(folder)
            stock = SAE.load_from_disk(folder)
    architecture = stock.cfg.architecture()
    registered = SAE_CLASS_REGISTRY.get(architecture)
    if registered is None or registered[0] is not type(stock) or not type(stock).__module__.startswith("sae_lens."):
        raise ValueError(f"architecture {architecture!r} ({type(stock).__name__}) is not one that SAELens comes with")
    for name, weights in stock.state_dict().items():
        if bool(weights.isnan().any()):
            raise ValueError(f"the SAE's {name} holds NaN; take an earlier checkpoint")
    return stock


def complete_metadata(sae: SAE[Any], given: dict[str, Any]) -> Any:
    """The SAE's metadata with what is given and what can be worked out. Raises ValueError, naming every key that is missing."""
    metadata = copy.deepcopy(sae.cfg.metadata)
    for key, value in given.items():
        metadata[key] = value
    for key, value in _DEFAULTS.items():
        if metadata[key] is None:
            metadata[key] = copy.deepcopy(value)
    missing = [key for key in REQUIRED if metadata[key] in (None, "")]
    if missing:
        raise ValueError(
            f"the SAE's metadata have no {', '.join(missing)}; pass {'it' if len(missing) == 1 else 'them'}, for instance "
            f"save_for_neuronpedia(sae, path, {missing[0]}=...)"
        )
    layer = extract_layer_from_tlens_hook_name(metadata.hook_name)
    if (
        metadata.model_class_name != "HookedTransformer"
        or layer is None
        or not metadata.hook_name.startswith("blocks.")
    ):
        raise ValueError(
            f"hook_name={metadata.hook_name!r} of a {metadata.model_class_name}: Neuronpedia runs TransformerLens models; pass "
            "model_class_name='HookedTransformer', and hook_name= and model_name= as TransformerLens has them"
        )
    metadata.hook_layer = layer
    neuronpedia_id = metadata.neuronpedia_id
    if neuronpedia_id is not None and not _NEURONPEDIA_ID.fullmatch(str(neuronpedia_id)):
        raise ValueError(f"neuronpedia_id={neuronpedia_id!r} is not MODEL/LAYER-SET, such as 'gpt2-small/6-res_mine'")
    return metadata


def _copied(sae: SAE[Any]) -> SAE[Any]:
    """The SAE again, on the CPU, with memory of its own."""
    cfg = copy.deepcopy(sae.cfg)
    # Weights that are to be replaced are not drawn, as in SAELens' own loading.
    cfg.device = "meta"
    copied = type(sae)(cfg)
    weights = {name: tensor.cpu().clone() for name, tensor in sae.state_dict().items()}
    copied.load_state_dict(weights, assign=True)
    return copied.to("cpu")


def _fold_scale(sae: SAE[Any], norm_scaling_factor: float | None) -> None:
    normalization = sae.cfg.normalize_activations
    if normalization == "covariance_whitening":
        raise ValueError(
            "normalize_activations='covariance_whitening' is not folded in; train to the end, which folds it"
        )
    if normalization != "expected_average_only_in":
        if norm_scaling_factor is not None:
            raise ValueError(
                f"norm_scaling_factor={norm_scaling_factor}: with normalize_activations={normalization!r} there is no scale "
                "to fold; leave it out"
            )
        return
    if norm_scaling_factor is None:
        raise ValueError(
            "normalize_activations='expected_average_only_in': the scale is not in the SAE; pass norm_scaling_factor="
        )
    if not (math.isfinite(norm_scaling_factor) and norm_scaling_factor > 0):
        raise ValueError(f"norm_scaling_factor={norm_scaling_factor} must be a positive number")
    sae.fold_activation_norm_scaling_factor(norm_scaling_factor)


def _log_sparsity(frequency: Float[Tensor, "d_sae"], d_sae: int) -> Float[Tensor, "d_sae"]:
    frequency = frequency.detach().float().cpu()
    if frequency.shape != (d_sae,):
        raise ValueError(f"frequency has shape {list(frequency.shape)}; it is one fraction a feature, [{d_sae}]")
    if not bool(((frequency >= 0) & (frequency <= 1)).all()):
        raise ValueError("frequency holds values that are no fractions between 0 and 1")
    return torch.log10(frequency + _SMALLEST_FREQUENCY)
