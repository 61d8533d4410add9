"""Apollo's SAEs as SAELens' `standard` SAEs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import sae_lens
import torch.nn.functional as F
from jaxtyping import Float
from sae_lens import StandardSAE
from sae_lens.util import extract_layer_from_tlens_hook_name
from torch import Tensor

from sae_lens_e2e.apollo.checkpoint import ONLY_SAE, ApolloWeights, read_checkpoint, sae_name
from sae_lens_e2e.apollo.model import PROCESSED
from sae_lens_e2e.apollo.run_config import (
    as_list,
    check_whole_names,
    model_name,
    objective,
    prepends_bos,
    read_run_config,
    setting,
)
from sae_lens_e2e.apollo.sources import ApolloFiles, find
from sae_lens_e2e.splice.hooked_transformer import official_model_name

# Processing the weights of a model with LayerNorm takes the mean over d_model out of these; with RMSNorm it leaves them.
_CENTRED = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
# It leaves these, with either norm.
_UNCHANGED = ("mlp.hook_pre", "mlp.hook_post")
# How TransformerLens' names of models begin, by their norm. Where it has exceptions (shortformer, SoLU, an embedding with a
# norm of its own) a family is in neither.
_LAYER_NORM = (
    *("gpt2", "distilgpt2", "stanford-crfm/", "EleutherAI/", "roneneldan/", "facebook/opt", "stabilityai/stablelm-"),
    *("microsoft/phi-1", "microsoft/phi-2", "bigcode/santacoder", "allenai/OLMo-1B-hf", "allenai/OLMo-7B-hf"),
)
_RMS_NORM = (
    *("google/", "meta-llama/", "llama-", "codellama/", "mistralai/", "Qwen/", "01-ai/", "microsoft/Phi-3"),
    *("microsoft/phi-4", "allenai/OLMo-2", "allenai/Olmo-3", "allenai/OLMoE", "swiss-ai/", "openai/gpt-oss"),
)


def load_apollo_sae(
    source: str | Path,
    hook_name: str | None = None,
    *,
    n_samples: int | None = None,
    fold_centring: bool | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    force_download: bool = False,
) -> StandardSAE:
    """An SAE trained with Apollo's library, as a SAELens SAE for the language model as SAELens runs it.

    `source` is a run's folder or one `samples_N.pt` in it, a `.pt` and `.yaml` pair, one of the Hub's 18
    (`e2e_similar_ce_layer_6`), a W&B run (`sparsify/gpt2/tvj2owza`) or a Neuronpedia id (`gpt2-small/6-res_scefr-ajt`).

    Args:
        source (str | Path): Where it is from.
        hook_name (str | None): Which SAE, of a checkpoint that holds several.
        n_samples (int | None): Which checkpoint of a run; by default the last.
        fold_centring (bool | None): Whether to subtract from W_enc its mean over d_in, so that the SAE does on the model's own residual stream what it did on the centred one of a processed model. By default it is done for a run whose config names a LayerNorm model; a run with tlens_model_path used the model as saved. What was done is in the metadata as `centring_folded`.
        device (str): Where to put it.
        dtype (str): The type of its weights.
        force_download (bool): Whether to download what is already here.

    Raises ValueError or OSError, in one line, for whatever is no such SAE.
    """
    files = find(source, n_samples=n_samples, force_download=force_download)
    return _standard_sae(*sae_components(files, hook_name, fold_centring), device, dtype)


def load_apollo_saes(
    source: str | Path,
    *,
    n_samples: int | None = None,
    fold_centring: bool | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    force_download: bool = False,
) -> dict[str, StandardSAE]:
    """Every SAE of a checkpoint of Apollo's, by hook name. The arguments are those of `load_apollo_sae`."""
    files = find(source, n_samples=n_samples, force_download=force_download)
    config, weights = _read(files)
    components = {hook: _components(config, files, hook, weights, fold_centring) for hook in weights}
    return {hook: _standard_sae(*components[hook], device, dtype) for hook in components}


def sae_components(
    files: ApolloFiles, hook_name: str | None = None, fold_centring: bool | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """SAELens' config dictionary and state dict for the SAE at a hook, or for the only one in the checkpoint."""
    config, weights = _read(files)
    hook = _pick(hook_name, list(weights), files.checkpoint)
    return _components(config, files, hook, weights, fold_centring)


def standard_weights(weights: ApolloWeights, fold_centring: bool) -> dict[str, Tensor]:
    """Apollo's parameters under SAELens' names, the decoder normalised as in each of Apollo's forward passes.

    Gives W_enc (d_in, d_sae), b_enc (d_sae,), W_dec (d_sae, d_in) with unit rows, and b_dec (d_in,).
    """
    W_enc = weights.encoder_weight.T
    return {
        "W_enc": (without_mean(W_enc) if fold_centring else W_enc).contiguous(),
        "b_enc": weights.encoder_bias,
        "W_dec": F.normalize(weights.decoder_weight, dim=0).T.contiguous(),
        "b_dec": weights.decoder_bias,
    }


def without_mean(W_enc: Float[Tensor, "d_in d_sae"]) -> Float[Tensor, "d_in d_sae"]:
    """The encoder that reads from an activation what `W_enc` reads from it less its mean over d_in."""
    return W_enc - W_enc.mean(0, keepdim=True)


def _read(files: ApolloFiles) -> tuple[dict[str, Any], dict[str, ApolloWeights]]:
    """The run's config, and its SAEs by hook. Raises ValueError if the two do not belong together."""
    config, weights = read_run_config(files.config), read_checkpoint(files.checkpoint)
    positions = as_list(setting(config, "saes.sae_positions"))
    if ONLY_SAE in weights:
        check_whole_names(f"{files.config}: saes.sae_positions", positions)
        if len(positions) != 1:
            raise ValueError(
                f"{files.config}: saes.sae_positions={positions} does not say where the one SAE of {files.checkpoint} sits"
            )
        return config, {positions[0]: weights[ONLY_SAE]}
    for hook in weights:
        # A position may be part of a name.
        if not any(str(position) in hook for position in positions):
            raise ValueError(
                f"{files.checkpoint} holds an SAE at {hook}, which {files.config} does not have in saes.sae_positions={positions}; "
                "put the config of that run beside it"
            )
    return config, weights


def _pick(hook_name: str | None, hooks: list[str], checkpoint: Path) -> str:
    if hook_name is None and len(hooks) == 1:
        return hooks[0]
    if hook_name is None:
        raise ValueError(
            f"{checkpoint} holds {len(hooks)} SAEs; choose one with load_apollo_sae(..., hook_name=...), of {', '.join(hooks)}"
        )
    if hook_name not in hooks:
        raise ValueError(f"hook_name={hook_name!r}: {checkpoint} holds SAEs at {', '.join(hooks)} only")
    return hook_name


def _components(
    config: Mapping[str, Any],
    files: ApolloFiles,
    hook: str,
    saes: Mapping[str, ApolloWeights],
    fold_centring: bool | None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    fold, weights = _folds_centring(config, hook, fold_centring), saes[hook]
    cfg_dict = {
        "architecture": "standard",
        "d_in": weights.d_in,
        "d_sae": weights.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {**_metadata(config, files, hook, weights.d_in, fold), **_companions(hook, saes)},
    }
    return cfg_dict, standard_weights(weights, fold)


def _companions(hook: str, saes: Mapping[str, ApolloWeights]) -> dict[str, Any]:
    """What the SAEs of a joint run have in their metadata, for one of several that were trained in one spliced pass."""
    if len(saes) == 1:
        return {}
    others = {sae_name(other): {"hook_name": other, "hook_head_index": None} for other in saes if other != hook}
    return {"name_in_run": sae_name(hook), "companions": others}


def _standard_sae(cfg_dict: dict[str, Any], state_dict: dict[str, Tensor], device: str, dtype: str) -> StandardSAE:
    sae = StandardSAE.from_dict({**cfg_dict, "device": device, "dtype": dtype})
    sae.load_state_dict(state_dict)
    return sae


def _folds_centring(config: Mapping[str, Any], hook: str, wanted: bool | None) -> bool:
    change = _change_by_processing(config, hook)
    if change == "none" and wanted:
        raise ValueError(
            f"fold_centring=True: at {hook} this run saw what the language model has unprocessed, so there is nothing to fold; leave it out"
        )
    if change == "unknown" and wanted is None:
        raise ValueError(
            f"whether {config['tlens_model_name']} has LayerNorm is not known here; pass fold_centring=True if it has, else False"
        )
    if change == "other" and wanted is not False:
        raise ValueError(
            f"the SAE at {hook} was trained on {config['tlens_model_name']} with processed weights, which changes more there than "
            "can be folded into an SAE; pass fold_centring=False, and run it on the processed model as its metadata says"
        )
    return change != "none" and wanted is not False


def change_by_processing(model_name: str, hook: str) -> Literal["none", "centred", "unknown", "other"]:
    """What processing the weights of a model that TransformerLens knows by name does to the activations at a hook.

    With LayerNorm it takes their mean over d_model out of the residual stream, with RMSNorm it leaves that; elsewhere it may do more.
    """
    name = official_model_name(model_name) or model_name
    layer_norm, rms_norm = name.startswith(_LAYER_NORM), name.startswith(_RMS_NORM)
    if hook.endswith(_CENTRED):
        return "centred" if layer_norm else "none" if rms_norm else "unknown"
    return "none" if hook.endswith(_UNCHANGED) and (layer_norm or rms_norm) else "other"


def _change_by_processing(config: Mapping[str, Any], hook: str) -> Literal["none", "centred", "unknown", "other"]:
    """What the run saw at the hook, next to the language model as SAELens loads it."""
    name = config.get("tlens_model_name")
    return "none" if name is None else change_by_processing(str(name), hook)


def _metadata(config: Mapping[str, Any], files: ApolloFiles, hook: str, d_in: int, folded: bool) -> dict[str, Any]:
    data = config["train_data"]
    processed = _change_by_processing(config, hook) != "none" and not folded
    return {
        "sae_lens_version": sae_lens.__version__,
        "sae_lens_training_version": None,
        "model_name": model_name(config),
        "model_class_name": "HookedTransformer",
        "model_from_pretrained_kwargs": dict(PROCESSED) if processed else {},
        "hook_name": hook,
        "hook_layer": extract_layer_from_tlens_hook_name(hook),
        "hook_head_index": None,
        "dataset_path": data.get("dataset_name"),
        "context_size": data.get("n_ctx"),
        "prepend_bos": prepends_bos(config),
        "exclude_special_tokens": False,
        "neuronpedia_id": files.neuronpedia_id,
        "training_library": "e2e_sae",
        "centring_folded": folded,
        "objective": _objective(config, d_in),
        "sparsity": config["loss"].get("sparsity"),
        "checkpoint": files.checkpoint.name,
    }


def _objective(config: Mapping[str, Any], d_in: int) -> dict[str, Any]:
    try:
        return objective(config, d_in).to_dict()
    except ValueError:
        return {"name": "apollo", **config["loss"]}
