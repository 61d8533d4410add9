"""A language model by name: the embedded one, one on this machine, or the Hub's."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_lens.load_model import HookedProxyLM
from sae_lens.load_model import load_model as load_saelens_model
from safetensors.torch import load_file
from torch import nn
from transformer_lens.HookedRootModule import HookedRootModule
from transformers import AutoTokenizer

from sae_lens_e2e import embedded
from sae_lens_e2e.apollo.model import load_apollo_model
from sae_lens_e2e.splice.bridge import MODEL_CLASS as BRIDGE
from sae_lens_e2e.splice.bridge import check_has_bridge, is_bridge, load_bridge
from sae_lens_e2e.yaml_file import read_json

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

EMBEDDED = "embedded"
COLUMN = "::"
"""Between the name of a dataset and that of the column of it that is read."""
HOOKED_TRANSFORMER = "HookedTransformer"
HUGGING_FACE = "AutoModelForCausalLM"

_CONFIG = "config.json"


def is_local(name: str) -> bool:
    """Whether a model or dataset of that name, whichever column of it is read, is on this machine."""
    place = name.partition(COLUMN)[0]
    return place == EMBEDDED or Path(place).exists()


def load_model(
    name: str,
    device: str = "cpu",
    model_class_name: str = HOOKED_TRANSFORMER,
    model_from_pretrained_kwargs: Mapping[str, Any] | None = None,
) -> HookedRootModule:
    """The language model called `name`: 'embedded', a folder, a file of weights that Apollo's library saved, or the Hub's.

    A folder holds `transformer_lens/{config.json,model.safetensors}` and the tokenizer in `huggingface/`, or a Hugging Face
    model (in `huggingface/` too), of which `model_class_name` makes a 'TransformerBridge' or an 'AutoModelForCausalLM', its hooks
    module names, with `model_from_pretrained_kwargs`. A 'HookedTransformer' is taken as it was saved. Where a folder has none, only a
    Hugging Face model, it gives that as an 'AutoModelForCausalLM', since it is the default; `model_class_of` tells which was had.
    Raises ValueError for a class that cannot be had of it or kwargs that would be ignored, OSError if it is not there, or
    the Hub cannot be reached.
    """
    kwargs = dict(model_from_pretrained_kwargs or {})
    if not is_local(name):
        return _from_hub(name, device, model_class_name, kwargs)
    path = Path(name)
    is_apollos, is_saved = path.suffix == ".pt" and path.is_file(), (path / "transformer_lens").is_dir()
    if model_class_name == HOOKED_TRANSFORMER:
        _check_as_saved(name, kwargs)
        if name == EMBEDDED:
            return embedded.load_model(device)
        if is_apollos:
            return load_apollo_model(path, device=device)
        if is_saved:
            return _load_transformer_lens_folder(path, device)
        model_class_name, kwargs = HUGGING_FACE, {}
    folder = next((place for place in (path, path / "huggingface") if (place / _CONFIG).is_file()), None)
    if folder is None and (name == EMBEDDED or is_apollos or is_saved):
        raise ValueError(
            f"model_class_name={model_class_name!r}: model {name!r} can be had as a {HOOKED_TRANSFORMER} only; leave it at that"
        )
    if folder is None:
        raise FileNotFoundError(f"model {name!r} holds neither transformer_lens/{_CONFIG} nor a Hugging Face {_CONFIG}")
    if model_class_name == BRIDGE:
        return load_bridge(str(folder), device, kwargs)
    if model_class_name == HUGGING_FACE:
        return load_saelens_model(HUGGING_FACE, str(folder), device, kwargs)
    raise ValueError(
        f"model_class_name={model_class_name!r} must be one of {HOOKED_TRANSFORMER}, {BRIDGE}, {HUGGING_FACE} for {name!r}"
    )


def model_class_of(model: nn.Module) -> str:
    """The `model_class_name` that gives such a model."""
    if is_bridge(model):
        return BRIDGE
    return HUGGING_FACE if isinstance(model, HookedProxyLM) else HOOKED_TRANSFORMER


def unreachable(what: str, name: str) -> ConnectionError:
    """The error for a name that is neither on this machine nor to be had from the Hub."""
    return ConnectionError(
        f"{what} {name!r}: there is no such folder here, and it could not be had from the Hugging Face Hub; {EMBEDDED!r} needs "
        "no network"
    )


def _from_hub(name: str, device: str, model_class_name: str, kwargs: dict[str, Any]) -> HookedRootModule:
    if model_class_name == BRIDGE:
        check_has_bridge()
    try:
        if model_class_name == BRIDGE:
            return load_bridge(name, device, kwargs)
        return load_saelens_model(model_class_name, name, device, kwargs)
    except OSError as error:
        raise unreachable("model", name) from error
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"model {name!r} runs code of its own repository; if you trust it, set model_from_pretrained_kwargs="
                "{'trust_remote_code': True}"
            ) from error
        # TransformerLens lists the hundreds that it knows.
        raise ValueError(
            f"model {name!r} is none that {model_class_name} knows; with model_class_name={HUGGING_FACE!r} any of the "
            "Hub's can be had, whose hooks are module names"
        ) from error


def _check_as_saved(name: str, kwargs: Mapping[str, Any]) -> None:
    # SAELens' own default says that the weights are not to be processed.
    wanted = {key: value for key, value in kwargs.items() if value}
    if wanted:
        raise ValueError(
            f"model_from_pretrained_kwargs={wanted}: model {name!r} is taken as it was saved; leave them out, or process and save it "
            "first"
        )


def _load_transformer_lens_folder(folder: Path, device: str) -> "HookedTransformer":
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = read_json(folder / "transformer_lens" / _CONFIG)
    model = HookedTransformer(
        HookedTransformerConfig(**config, device=device, init_weights=False),
        tokenizer=AutoTokenizer.from_pretrained(folder / "huggingface"),
    )
    weights = load_file(folder / "transformer_lens" / "model.safetensors")
    # The unembedding may be tied.
    weights.setdefault("unembed.W_U", weights["embed.W_E"].T.contiguous())
    missing = model.load_state_dict(weights, strict=False).missing_keys
    parameters = {name for name, _ in model.named_parameters()} - {"unembed.b_U"}
    if absent := sorted(parameters.intersection(missing)):
        raise ValueError(f"{folder}/transformer_lens/model.safetensors has no {absent[0]}")
    return model.eval()
