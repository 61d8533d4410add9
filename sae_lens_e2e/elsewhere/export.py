"""Hand a language model to older versions of the libraries, in files that those can read."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from sae_lens_e2e.splice import SplicedModel

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer, HookedTransformerConfig


def export_model(model: "HookedTransformer", folder: Path, hook_name: str, context_size: int) -> None:
    """Write a model to a new folder: its config and tokenizer as JSON, its weights and one activation as safetensors.

    The activation, at `hook_name` on `context_size` tokens, is there for whoever reads the model to see that it computes the
    same. Raises ValueError for a hook that the model does not have, or a model without a fast tokenizer.
    """
    tokenizer: Any = model.tokenizer
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError(
            "model has no tokenizer that can be written as a tokenizer.json; make it with "
            "HookedTransformer(cfg, tokenizer=PreTrainedTokenizerFast(...))"
        )
    tokens = (torch.arange(context_size) % model.cfg.d_vocab)[None]
    splice = SplicedModel(model)
    splice.check_hook(hook_name)
    with splice.running():
        activation = splice.clean(tokens.to(splice.device), hooks=[hook_name], final=False).at[hook_name]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(_settings(model.cfg), indent=1))
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    special = {f"{kind}_token": getattr(tokenizer, f"{kind}_token") for kind in ("bos", "eos", "pad", "unk")}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.cfg.n_ctx}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | special, indent=1))
    # Copies, because safetensors refuses tensors that share memory.
    weights = {name: weight.detach().to("cpu", copy=True).contiguous() for name, weight in model.named_parameters()}
    save_file(weights, folder / "model.safetensors")
    save_file({"tokens": tokens, "activation": activation.cpu().contiguous()}, folder / "activation.safetensors")


def _settings(cfg: "HookedTransformerConfig") -> dict[str, Any]:
    """All that a config says about the model, and not about where it runs."""
    settings = {
        name: value for name, value in cfg.to_dict().items() if name not in ("device", "n_devices", "init_weights")
    }
    return settings | {"dtype": str(cfg.dtype).removeprefix("torch.")}
