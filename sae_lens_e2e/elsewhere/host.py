"""Have a driver do the job in this folder: `python -I host.py DRIVER`, with the Python environment that has the program it drives.

Started by its path, so it imports nothing of this package: that environment has not got it, and has older versions of the
libraries. A driver is a file with a function `run(job, load_model)`.
"""

import json
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

JOB = "job.json"
"""What the driver is asked to do."""
MODEL = "model"
"""The folder that `export_model` writes."""
TOKENS = "tokens.safetensors"
"""`tokens`, (prompts, pos)."""
ERROR = "error.txt"

# Two versions of TransformerLens differ by rounding; a model that was read wrongly differs by its own size.
_LARGEST_DIFFERENCE = 0.02


def main(driver: str) -> int:
    """Do the job. Returns the exit status, after writing what went wrong to a file if something did."""
    try:
        runpy.run_path(driver)["run"](json.loads(Path(JOB).read_text()), load_model)
    except Exception as error:
        traceback.print_exc()
        Path(ERROR).write_text(f"{type(error).__name__}: {error}")
        return 1
    return 0


def load_model(folder: Path, hook_name: str, device: str = "cpu") -> Any:
    """The model that `export_model` wrote, computing what it computed there, whatever version of TransformerLens this is.

    Raises ValueError if it has other weights here, or another activation at `hook_name`.
    """
    # Here, so that a program that is missing is said before these are waited for.
    from dataclasses import fields
    from importlib.metadata import version

    import torch
    from sae_lens import HookedSAETransformer
    from safetensors.torch import load_file
    from transformer_lens import HookedTransformerConfig
    from transformers import PreTrainedTokenizerFast

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


def _difference(model: Any, expected: dict[str, Any], hook_name: str) -> float:
    """How far the model's activation is from what it should be, as a fraction of its norm."""
    _, cache = model.run_with_cache(expected["tokens"], names_filter=hook_name)
    activation = expected["activation"].float()
    return float((cache[hook_name].detach().cpu().float() - activation).norm() / activation.norm())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
