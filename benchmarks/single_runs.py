"""Whether a change leaves single runs what they were: short runs over architectures, places and models, written down to be compared.

    python benchmarks/single_runs.py before.json            # in a checkout of the commit before, with its tests/ beside it
    python benchmarks/single_runs.py after.json             # in this one
    python benchmarks/single_runs.py --compare before.json after.json

What is written are digests of the trained weights, bit for bit, and every logged figure but the seconds.
"""

import argparse
import hashlib
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sae_lens import LoggingConfig
from sae_lens.load_model import HookedProxyLM
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

# The tests' own small models and configs, of the checkout this is run in.
sys.path.insert(0, str(Path.cwd()))

import sae_lens_e2e  # noqa: F401 (registers the `apollo` architecture)

try:
    from sae_lens_e2e.training.history import read_history
except ImportError:  # as it was called in 0.1
    from sae_lens_e2e.history import read_history  # pyright: ignore[reportMissingImports]
from tests.models import random_model
from tests.training import make_runner, runner_config

_SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
}


def hugging_face(config: Any) -> HookedProxyLM:
    torch.manual_seed(0)
    tokenizer: Any = None
    return HookedProxyLM(AutoModelForCausalLM.from_config(config), tokenizer)


MODELS: dict[str, Callable[[], Any]] = {
    "layer norm": random_model,
    "rms norm": lambda: random_model("RMS"),
    "llama": lambda: hugging_face(LlamaConfig(**_SIZES, tie_word_embeddings=True)),
    "gemma2": lambda: hugging_face(
        Gemma2Config(**_SIZES, head_dim=4, sliding_window=4, final_logit_softcapping=3.0, attn_logit_softcapping=5.0)
    ),
}


def sae(architecture: str, d_in: int = 16, **settings: Any) -> Any:
    own: dict[str, Any] = {"d_in": d_in, "d_sae": 40, **settings}
    if "topk" in architecture:
        own["k"] = 5
    if architecture.startswith("matryoshka"):
        own["matryoshka_widths"] = [10, 20]
    if architecture in ("standard", "gated"):
        own["l1_coefficient"] = 0.02
    return SAE_TRAINING_CLASS_REGISTRY[architecture][1](**own)


def cases() -> dict[str, dict[str, Any]]:
    """The settings of each run, over those of the tests."""
    architectures = ("standard", "topk", "batchtopk", "jumprelu", "gated", "matryoshka_batchtopk", "apollo")
    hooks = ("blocks.1.hook_mlp_out", "blocks.0.hook_resid_mid", "blocks.0.hook_resid_pre")
    of_logits = ("blocks.1.hook_resid_post", "blocks.2.hook_resid_pre")
    masked = {"exclude_special_tokens": list(range(8)), "seqpos_slice": (1, -2)}
    hugging_face_hooks = {
        "llama": ("model.layers.0", "model.layers.1.mlp"),
        "gemma2": ("model.layers.0", "model.layers.1.self_attn"),
    }
    return {
        **{architecture: {"sae": sae(architecture)} for architecture in architectures},
        **{hook: {"hook_name": hook} for hook in hooks},
        **{hook: {"hook_name": hook, "objective": "e2e"} for hook in of_logits},
        "one head": {"hook_name": "blocks.1.attn.hook_z", "hook_head_index": 2, "sae": sae("standard", 4)},
        "all heads": {"hook_name": "blocks.1.attn.hook_z"},
        "local": {"objective": "local"},
        "e2e": {"objective": "e2e"},
        "masked": {**masked, "train_batch_size_tokens": 4 * 9, "training_tokens": 5 * 36},
        "autocast": {"autocast": True},
        "autocast_lm": {"autocast_lm": True},
        "rms norm": {"model": "rms norm"},
        **{
            f"{model} {hook}": {"model": model, "hook_name": hook, "model_class_name": "AutoModelForCausalLM"}
            for model, of_model in hugging_face_hooks.items()
            for hook in of_model
        },
    }


def run(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train, and say what came of it."""
    model = MODELS[settings.pop("model", "layer norm")]()
    logger = LoggingConfig(log_to_wandb=False, wandb_log_frequency=1)
    trained = make_runner(runner_config(logger=logger, output_path=str(folder), **settings), model).run()
    digests = {
        name: hashlib.sha256(value.detach().contiguous().numpy().tobytes()).hexdigest()
        for name, value in trained.state_dict().items()
    }
    history = [{k: v for k, v in row.items() if k != "details/seconds"} for row in read_history(folder)]
    return {"weights": digests, "history": history, "l0": trained.cfg.metadata.l0}


def compare(before: Path, after: Path) -> int:
    """Say which runs differ; how many do."""
    then, now = (json.loads(path.read_text()) for path in (before, after))
    different = [name for name in then if then[name] != now.get(name)]
    for name in different:
        print(f"{name}: not the same")
    print(f"{len(then) - len(different)} of {len(then)} runs are the same, bit for bit")
    return len(different)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", action="store_true", help="compare two files instead")
    parser.add_argument("files", nargs="+", type=Path)
    arguments = parser.parse_args()
    if arguments.compare:
        sys.exit(compare(*arguments.files) > 0)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = {
        name: run(settings, arguments.files[0].parent / "single_runs" / name) for name, settings in cases().items()
    }
    arguments.files[0].write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
