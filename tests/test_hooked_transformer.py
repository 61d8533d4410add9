"""TransformerLens' own models are told from others without importing them, and everything else runs where there are none."""

from pathlib import Path

import pytest

from sae_lens_e2e.splice.hooked_transformer import is_hooked_transformer, official_model_name
from tests.models import any_model
from tests.processes import run_stock

# What TransformerLens 4 has taken away, taken away from 3.9. SAELens 6.54, which imports some of it, has had it by then.
WITHOUT = """
import sys
import sae_lens
import transformer_lens
from transformer_lens.model_bridge import TransformerBridge

GONE = ("HookedTransformer", "HookedTransformerConfig", "components", "loading_from_pretrained", "utils")

def removed(name):
    raise ImportError(f"{name!r} was removed in TransformerLens 4.0")

transformer_lens.__getattr__ = removed
for name in GONE:
    vars(transformer_lens).pop(name, None)
for name in list(sys.modules):
    if name.startswith(tuple(f"transformer_lens.{gone}" for gone in GONE)) and "utilities" not in name:
        sys.modules[name] = None
"""
TRAINS = """
import importlib, pkgutil
from datasets import Dataset
import sae_lens_e2e
from sae_lens_e2e import E2ERunnerConfig, E2ETrainingRunner
from sae_lens_e2e.evaluation import evaluate

rooms = [one.name for one in pkgutil.walk_packages(sae_lens_e2e.__path__, "sae_lens_e2e.")]
for name in rooms:
    # What runs within other programs' own environments, and the program.
    if not name.endswith((".driver", "__main__")):
        importlib.import_module(name)

model = TransformerBridge.boot_native(
    {"n_layers": 3, "d_model": 16, "n_heads": 4, "d_head": 4, "d_mlp": 32, "n_ctx": 16, "d_vocab": 61, "act_fn": "gelu",
     "normalization_type": "LN", "seed": 0},
    device="cpu",
)
data = Dataset.from_dict({"input_ids": [[(7 * row + 3 * pos) % 61 for pos in range(16)] for row in range(64)]})
cfg = E2ERunnerConfig(
    sae=sae_lens.TopKTrainingSAEConfig(d_in=16, d_sae=32, k=4),
    objective="e2e_ds",
    model_class_name="TransformerBridge",
    hook_name="blocks.1.hook_resid_pre",
    context_size=16,
    prepend_bos=False,
    store_batch_size_prompts=2,
    train_batch_size_tokens=32,
    training_tokens=256,
    output_path=None,
    checkpoint_path=None,
    logger=sae_lens.LoggingConfig(log_to_wandb=False),
)
sae = E2ETrainingRunner(cfg, override_model=model, override_dataset=data).run()
print(evaluate(sae, model, data, max_tokens=256).kl > 0)
"""
EMBEDDED = """
from sae_lens_e2e import embedded

embedded.load_model()
"""


@pytest.mark.parametrize("kind", ["HookedTransformer", "TransformerBridge", "llama"])
def test_which_is_one(kind: str) -> None:
    assert is_hooked_transformer(any_model(kind)) == (kind == "HookedTransformer")


def test_what_the_hub_calls_a_model() -> None:
    assert official_model_name("tiny-stories-1M") == "roneneldan/TinyStories-1M"
    assert official_model_name("no/model") is None


def test_the_engine_runs_where_there_are_none(tmp_path: Path) -> None:
    done = run_stock(WITHOUT + TRAINS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == "True"


def test_what_needs_one_says_so(tmp_path: Path) -> None:
    done = run_stock(WITHOUT + EMBEDDED, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "ImportError: 'HookedTransformer' was removed in TransformerLens 4.0"
    )
