"""What an SAE's metadata may say about loading its language model: they are written by whoever made it, and models can be code."""

from collections.abc import Mapping
from typing import Any

from sae_lens_e2e.loading.models import HOOKED_TRANSFORMER

# How weights are processed, in which numbers, and which version of them.
_MAY_SAY = (
    *("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases", "refactor_factored_attn_matrices"),
    *("dtype", "torch_dtype", "n_ctx", "first_n_layers", "n_devices", "default_prepend_bos", "default_padding_side"),
    *("revision", "checkpoint_index", "checkpoint_value"),
)
# Any other name is that of a repository whose kernels are run.
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flex_attention")

# Its settings load none; those of other ways to quantise may name kernels.
_OF_BITSANDBYTES = (
    *("load_in_8bit", "llm_int8_threshold", "load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"),
    "bnb_4bit_compute_dtype",
)


def model_settings(metadata: Any, name: str | None = None, trust_remote_code: bool = False) -> dict[str, Any]:
    """The arguments of `load_model` for the language model that an SAE's metadata name, or for the one called `name`.

    Of the model's arguments only those that load no code are taken from the metadata; with `trust_remote_code` all are. Raises
    ValueError, naming it, for any other, and if no model is named.
    """
    name = name or metadata.model_name
    if name is None:
        raise ValueError("the SAE's metadata name no model; say which model")
    kwargs = metadata.model_from_pretrained_kwargs or {}
    if not isinstance(kwargs, Mapping):
        raise ValueError(
            f"model_from_pretrained_kwargs={kwargs!r:.80} in the SAE's metadata is no mapping; leave it out"
        )
    for key, value in kwargs.items() if not trust_remote_code else ():
        if not _loads_no_code(key, value):
            raise ValueError(
                f"model_from_pretrained_kwargs: {key}={value!r:.80}, in the SAE's metadata, may run code that comes with the model; if "
                "you trust whoever made the SAE and the model, pass --trust-remote-code (trust_remote_code=True)"
            )
    return {
        "name": str(name),
        "model_class_name": metadata.model_class_name or HOOKED_TRANSFORMER,
        "model_from_pretrained_kwargs": dict(kwargs),
    }


def _loads_no_code(key: str, value: Any) -> bool:
    if key == "attn_implementation":
        return value in _ATTENTION
    if key == "trust_remote_code":
        return not value
    if key == "quantization_config":
        return isinstance(value, Mapping) and all(
            name in _OF_BITSANDBYTES and isinstance(setting, (str, int, float)) for name, setting in value.items()
        )
    if key == "device_map":
        return isinstance(value, str)
    return key in _MAY_SAY and (value is None or isinstance(value, (str, int, float)))
