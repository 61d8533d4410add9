"""Write transcoders of all layers as the set that circuit-tracer makes a replacement model of, and attribution graphs."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from sae_lens import SAE
from safetensors.torch import save_file
from torch import Tensor

from sae_lens_e2e.architectures.transcoder import is_transcoder, widths_of
from sae_lens_e2e.output import check_free, written_whole
from sae_lens_e2e.publishing.neuronpedia import stock_sae

CONFIG = "config.yaml"
_PLACE = re.compile(r"blocks\.(\d+)\.(.+)")


def save_for_circuit_tracer(
    transcoders: Mapping[str, SAE[Any]],
    folder: str | Path,
    *,
    n_layers: int | None = None,
    repo_id: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write transcoders, one for each layer of a TransformerLens model, as a `transcoder_set` of circuit-tracer 0.5.

    In `folder` are config.yaml and a layer_N.safetensors for each, W_enc as (d_sae, d_in), as its `single_layer_transcoder` reads them:
    `load_transcoder_from_hub` and `circuit-tracer attribute --transcoder_set` take the absolute path of the folder, wherever it is moved.
    circuit-tracer leaves the first position alone (BOS), wherever its replacement model is run for attribution.

    Args:
        transcoders (Mapping): By any names, in any order, trained ones or of SAELens' inference classes; their metadata say where each sits.
        folder (str | Path): New or empty.
        n_layers (int | None): How many layers the model has; left out, the set must have all up to its last.
        repo_id (str | None): The repository, OWNER/NAME, that the folder is to be put in: config.yaml then points there, and not to the files here.
        overwrite (bool): Whether to write to a folder that has something in it.

    Raises ValueError, before anything is written, for a set that lacks a layer, and for one that circuit-tracer cannot load: other
    hooks or sizes in one layer than in another, widths that differ, a skip in some layers only.
    """
    check_free(folder, overwrite)
    if not transcoders:
        raise ValueError("transcoders is empty; give one for each layer")
    of_layer: dict[int, SAE[Any]] = {}
    places: dict[str, tuple[str, str]] = {}
    names: dict[int, str] = {}
    for name, sae in transcoders.items():
        layer, places[name] = _place(name, sae)
        if layer in names:
            raise ValueError(f"{names[layer]} and {name} are both of layer {layer}; give one")
        names[layer] = name
        of_layer[layer] = stock_sae(sae)
    _check_layers(names, n_layers)
    _check_alike({name: _kind(of_layer[layer], places[name]) for layer, name in sorted(names.items())})
    read, write = next(iter(places.values()))
    where = f"hf://{repo_id}" if repo_id is not None else str(Path(folder).absolute())
    files = {layer: f"layer_{layer}.safetensors" for layer in sorted(of_layer)}
    config = {
        "model_name": next(iter(transcoders.values())).cfg.metadata.model_name,
        "model_kind": "transcoder_set",
        "feature_input_hook": read,
        "feature_output_hook": write,
        "scan": repo_id or Path(folder).name,
        "transcoders": [f"{where}/{file}" for file in files.values()],
    }
    with written_whole(folder) as partial:
        for layer, file in files.items():
            save_file(_tensors(of_layer[layer]), partial / file)
        (partial / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False))
    return Path(folder)


def _place(name: str, sae: SAE[Any]) -> tuple[int, tuple[str, str]]:
    """The layer that a transcoder replaces a part of, and what it reads and writes there."""
    if not is_transcoder(sae.cfg):
        raise ValueError(
            f"{name}: a {sae.cfg.architecture()} writes what it reads, and circuit-tracer takes transcoders only"
        )
    metadata = sae.cfg.metadata
    if metadata.model_class_name not in (None, "HookedTransformer"):
        raise ValueError(
            f"{name}: it is of a {metadata.model_class_name}, whose hooks have other names; circuit-tracer runs a HookedTransformer"
        )
    hooks = {"hook_name": metadata.hook_name, "hook_name_out": metadata.hook_name_out}
    found = {key: _PLACE.fullmatch(str(hook)) for key, hook in hooks.items()}
    for key, match in found.items():
        if match is None:
            raise ValueError(f"{name}: {key}={hooks[key]!r} is no hook of a block, such as blocks.0.hook_mlp_out")
    (layer, read), (layer_out, write) = (match.groups() for match in found.values() if match is not None)
    if layer != layer_out:
        raise ValueError(
            f"{name}: it reads layer {layer} and writes layer {layer_out}, and circuit-tracer's write their own"
        )
    return int(layer), (read, write)


def _check_layers(names: Mapping[int, str], n_layers: int | None) -> None:
    wanted = range(n_layers if n_layers is not None else max(names) + 1)
    if beyond := sorted(set(names).difference(wanted)):
        raise ValueError(
            f"n_layers={n_layers}: {names[beyond[0]]} is of layer {beyond[0]}; set it to what the model has"
        )
    if lacking := [layer for layer in wanted if layer not in names]:
        raise ValueError(
            f"transcoders has none for layer {', '.join(map(str, lacking))} of {len(wanted)}; circuit-tracer needs one for each layer"
        )


def _kind(sae: SAE[Any], place: tuple[str, str]) -> dict[str, Any]:
    """What all of a set must have in common."""
    (d_in, d_out), (read, write) = widths_of(sae.cfg), place
    if d_in != d_out:
        raise ValueError(
            f"d_in={d_in} and d_out={d_out} differ, and circuit-tracer's are as wide as the residual stream"
        )
    has_skip = "W_skip" in sae.state_dict()
    metadata = sae.cfg.metadata
    return {
        **{"hook_name": f"blocks.N.{read}", "hook_name_out": f"blocks.N.{write}", "model_name": metadata.model_name},
        **{"d_in": d_in, "d_sae": sae.cfg.d_sae, "a skip": has_skip},
    }


def _check_alike(kinds: Mapping[str, Mapping[str, Any]]) -> None:
    (first, expected), *others = kinds.items()
    for name, kind in others:
        for key, value in kind.items():
            if value != expected[key]:
                raise ValueError(
                    f"{first} and {name} differ in {key} ({expected[key]!r} and {value!r}), which is one for a set of circuit-tracer's"
                )


def _tensors(sae: SAE[Any]) -> dict[str, Tensor]:
    weights = sae.state_dict()
    tensors = {name: weights[name] for name in ("W_dec", "b_enc", "b_dec")} | {"W_enc": weights["W_enc"].T}
    if "threshold" in weights:
        # In SAELens a ReLU comes first, under which a negative one acts as 0.
        tensors["activation_function.threshold"] = weights["threshold"].clamp(min=0)
    if "W_skip" in weights:
        tensors["W_skip"] = weights["W_skip"]
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
