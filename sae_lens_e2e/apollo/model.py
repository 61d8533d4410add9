"""The language model that an Apollo run was trained on."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sae_lens import logger
from sae_lens.util import str_to_dtype
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sae_lens_e2e.apollo.checkpoint import load_tensors
from sae_lens_e2e.yaml_file import read_yaml

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

PROCESSED = {"fold_ln": True, "center_writing_weights": True, "center_unembed": True, "fold_value_biases": True}
"""How Apollo's library loads a model by name, as SAELens' `model_from_pretrained_kwargs`."""


def load_apollo_model(
    path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None, device: str | torch.device = "cpu"
) -> "HookedTransformer":
    """A language model saved by Apollo's library: the file of weights at `path`, with its `final_config.yaml` beside it.

    Unprocessed, as Apollo ran it. Without `tokenizer`, the one its config names is looked for beside the model and on the
    Hub; a model whose tokenizer is nowhere takes tokens only. Raises FileNotFoundError or ValueError for what is no model.
    """
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    path = Path(path)
    settings, weights = _model_settings(path), load_tensors(path)
    name = settings.pop("tokenizer_name", None)
    if tokenizer is None and name is not None:
        tokenizer = _tokenizer(name, path.parent)
    try:
        settings |= {
            "dtype": str_to_dtype(settings.get("dtype", "float32")),
            "device": str(device),
            "init_weights": False,
        }
        model = HookedTransformer(HookedTransformerConfig(**settings), tokenizer)
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"{_config_of(path)}: tlens_config does not make a model ({_one_line(error)})") from error
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the model in its config ({_one_line(error)})") from error
    # The causal mask's buffers are in some TransformerLens state dicts and not in others.
    wrong = [key for key in (*missing, *unexpected) if not key.endswith((".mask", ".IGNORE"))]
    if wrong:
        raise ValueError(f"{path} does not fit the model in its config: {wrong[0]} is missing or unknown")
    return model.eval()


def find_model(config_path: str | Path, tlens_model_path: str) -> Path | None:
    """The file that a run's `tlens_model_path` means: from here, from the run's folder, or from the one around it."""
    run = Path(config_path) if Path(config_path).is_dir() else Path(config_path).parent
    places = (folder / tlens_model_path for folder in (Path(), run, run.parent))
    return next((place for place in places if place.is_file()), None)


def d_model(config_path: str | Path, config: Mapping[str, Any]) -> int:
    """Width of the residual stream of a run's language model. Raises ValueError if it cannot be found out."""
    name, path = config.get("tlens_model_name"), config.get("tlens_model_path")
    if name is None and path is not None:
        file = find_model(config_path, path)
        width = file and _model_settings(file).get("d_model")
        if not isinstance(width, int):
            raise ValueError(f"the width of tlens_model_path={path!r} could not be looked up; pass d_in=")
        return width
    try:
        from transformer_lens.loading_from_pretrained import get_pretrained_model_config

        return get_pretrained_model_config(str(name)).d_model
    except Exception as error:
        raise ValueError(f"the width of tlens_model_name={name!r} could not be looked up; pass d_in=") from error


def _model_settings(path: Path) -> dict[str, Any]:
    file = _config_of(path)
    if not path.is_file() or not file.is_file():
        raise FileNotFoundError(
            f"{path} is not a model of Apollo's library: it is a .pt file with final_config.yaml beside it"
        )
    config = read_yaml(file)
    if not isinstance(config, dict) or not isinstance(config.get("tlens_config"), dict):
        raise ValueError(f"{file} is not the config of a language model: it has no 'tlens_config'")
    return dict(config["tlens_config"])


def _config_of(path: Path) -> Path:
    return path.parent / "final_config.yaml"


def _tokenizer(name: str, folder: Path) -> PreTrainedTokenizerBase | None:
    local = next((str(place / name) for place in (Path(), folder, folder.parent) if (place / name).is_dir()), None)
    try:
        return AutoTokenizer.from_pretrained(local or name, local_files_only=local is not None)
    except (OSError, ValueError):
        logger.warning(f"tokenizer {name!r} was not found: the model takes tokens only; pass tokenizer= for text")
        return None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
