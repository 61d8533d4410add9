"""Apollo's SAEs through SAELens' own loading: `SAE.from_pretrained` and `SAE.load_from_disk`."""

from pathlib import Path
from typing import Any

import sae_lens
from sae_lens import StandardSAE, logger
from sae_lens.loading.pretrained_sae_loaders import (
    NAMED_PRETRAINED_SAE_CONFIG_GETTERS,
    NAMED_PRETRAINED_SAE_LOADERS,
    get_sae_lens_config_from_hf,
    handle_config_defaulting,
    sae_lens_disk_loader,
    sae_lens_huggingface_loader,
)
from torch import Tensor

from sae_lens_e2e.apollo.sources import find
from sae_lens_e2e.apollo.weights import sae_components, without_mean

LOADER_NAME = "apollo"
CONVERTED_LOADER_NAME = "apollo_neuronpedia"

_CENTRING = "center_writing_weights"
# A centred encoder has means of zero but for rounding, a raw one of a few per cent of its weights.
_ROUNDING = 1e-3


def apollo_huggingface_loader(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor], None]:
    """The `converter` with which `SAE.from_pretrained` loads one of the SAEs that Apollo released.

    `SAE.from_pretrained("apollo-research/e2e-saes-gpt2", "e2e_similar_ce_layer_6", converter=apollo_huggingface_loader)`.
    """
    components = sae_components(find(f"{repo_id}/{folder_name}", force_download=force_download))
    return *_overridden(*components, device, cfg_overrides), None


def apollo_huggingface_config(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The configuration that `apollo_huggingface_loader` gives."""
    return apollo_huggingface_loader(repo_id, folder_name, device, force_download, cfg_overrides)[0]


def apollo_disk_loader(
    path: str | Path,
    device: str = "cpu",
    cfg_overrides: dict[str, Any] | None = None,
    *,
    hook_name: str | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The `converter` with which `SAE.load_from_disk` loads a run of Apollo's library.

    For one of several SAEs in a run give `partial(apollo_disk_loader, hook_name=...)`; without it a ValueError lists them.
    """
    return _overridden(*sae_components(find(path), hook_name), device, cfg_overrides)


def neuronpedia_apollo_loader(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor], Tensor | None]:
    """The `converter` for Neuronpedia's own conversions of Apollo's SAEs, `gpt2-small-res_*-ajt` in SAELens' registry.

    They load with `SAE.from_pretrained`; what their old configuration leaves out is put right as `corrected` says.
    """
    cfg_dict, state_dict, sparsity = sae_lens_huggingface_loader(
        repo_id, folder_name, device, force_download, cfg_overrides
    )
    return *corrected(cfg_dict, state_dict), sparsity


def neuronpedia_apollo_config(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The configuration that `neuronpedia_apollo_loader` gives, but for what it finds out from the weights."""
    cfg_dict = get_sae_lens_config_from_hf(repo_id, folder_name, device, force_download, cfg_overrides)
    return _corrected_config(cfg_dict)[0]


def neuronpedia_apollo_disk_loader(
    path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`neuronpedia_apollo_loader` for a folder that is already on this machine, as `SAE.load_from_disk`'s `converter`."""
    return corrected(*sae_lens_disk_loader(path, device, cfg_overrides))


def load_neuronpedia_apollo_sae(release: str, sae_id: str, device: str = "cpu", dtype: str = "float32") -> StandardSAE:
    """One of SAELens' registry entries for Apollo's SAEs, such as ("gpt2-small-res_scefr-ajt", "blocks.6.hook_resid_pre").

    What was put right is logged, and in the metadata as `corrections`. For Apollo's own file of the same SAE see
    `load_apollo_sae("gpt2-small/6-res_scefr-ajt")`. Raises ValueError for a release that is none of theirs.
    """
    if not is_neuronpedia_apollo(release):
        raise ValueError(
            f"release={release!r} is none of Apollo's; they are gpt2-small-res_{{sce,scefr,scl,sle,slefr,sll}}-ajt"
        )
    return StandardSAE.from_pretrained(release, sae_id, device, dtype, converter=neuronpedia_apollo_loader)


def is_neuronpedia_apollo(release: str) -> bool:
    """Whether a release of SAELens' registry is one of Neuronpedia's conversions of Apollo's SAEs."""
    return release.startswith("gpt2-small-res_") and release.endswith("-ajt")


def corrected(cfg_dict: dict[str, Any], state_dict: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A converted Apollo SAE as Apollo's library runs it: b_dec not subtracted from the input, the encoder reading past the mean.

    SAELens takes a missing `apply_b_dec_to_input` or `prepend_bos` for True, and runs the language model unprocessed. Each
    correction is logged, and listed in the metadata as `corrections`.
    """
    cfg_dict, corrections = _corrected_config(cfg_dict)
    metadata, W_enc = cfg_dict["metadata"], state_dict["W_enc"]
    processed = (metadata.get("model_from_pretrained_kwargs") or {}).get(_CENTRING, False)
    if not processed and W_enc.mean(0).abs().max() > _ROUNDING * W_enc.abs().mean():
        corrections.append("W_enc was for a residual stream with its mean taken out; it now reads past the mean itself")
        state_dict = {**state_dict, "W_enc": without_mean(W_enc)}
    for correction in corrections:
        logger.warning(f"{metadata.get('neuronpedia_id') or metadata.get('hook_name')}: {correction}")
    return cfg_dict, state_dict


def _corrected_config(cfg_dict: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The configuration put right, and the list of corrections, which is the one in its metadata."""
    corrections = []
    subtracts_b_dec = cfg_dict.get("apply_b_dec_to_input")
    if subtracts_b_dec is not False:
        said = "was missing, which SAELens takes for True" if subtracts_b_dec is None else "was True"
        corrections.append(f"apply_b_dec_to_input {said}; it is now False")
    prepends_bos = {**cfg_dict, **cfg_dict.get("metadata", {})}.get("prepend_bos")
    if prepends_bos is None:
        corrections.append("prepend_bos was missing, which SAELens takes for True; it is now False")
    cfg_dict = {**handle_config_defaulting(cfg_dict), "apply_b_dec_to_input": False}
    cfg_dict["metadata"] = {
        **cfg_dict.get("metadata", {}),
        "prepend_bos": bool(prepends_bos),
        "corrections": corrections,
        # SAELens fills in a configuration that has no version as if it were an old one, a second time.
        "sae_lens_version": sae_lens.__version__,
    }
    return cfg_dict, corrections


def register_loaders() -> None:
    """Let SAELens' loading find ours by name, as it does its own."""
    NAMED_PRETRAINED_SAE_LOADERS[LOADER_NAME] = apollo_huggingface_loader
    NAMED_PRETRAINED_SAE_CONFIG_GETTERS[LOADER_NAME] = apollo_huggingface_config
    NAMED_PRETRAINED_SAE_LOADERS[CONVERTED_LOADER_NAME] = neuronpedia_apollo_loader
    NAMED_PRETRAINED_SAE_CONFIG_GETTERS[CONVERTED_LOADER_NAME] = neuronpedia_apollo_config


def _overridden(
    cfg_dict: dict[str, Any], state_dict: dict[str, Tensor], device: str, overrides: dict[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    overrides = dict(overrides or {})
    # SAELens' registry gives this along with the settings; it describes the SAE, which its configuration cannot hold.
    neuronpedia_id = overrides.pop("neuronpedia_id", None)
    if neuronpedia_id is not None:
        cfg_dict["metadata"]["neuronpedia_id"] = neuronpedia_id
    return {**cfg_dict, "device": device, **overrides}, {name: tensor.to(device) for name, tensor in state_dict.items()}
