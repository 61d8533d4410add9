"""A small trained language model and stories to run it on, shipped with the package so that nothing is downloaded.

`MODEL_CARD.md` beside this file says what they are and how they were made.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
from transformers import AutoTokenizer

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

__all__ = [
    "CONTEXT_SIZE",
    "D_MODEL",
    "HOOK_NAME",
    "MODEL_NAME",
    "SPLITS",
    "EmbeddedFileError",
    "load_dataset",
    "load_model",
]

MODEL_NAME = "sae-lens-e2e-stories"
# Half of the layers lie before it and half after it, so a dictionary there has both something to read and something
# to spoil.
HOOK_NAME = "blocks.3.hook_resid_pre"
D_MODEL = 64
CONTEXT_SIZE = 256
SPLITS = ("train", "held_out")

_FOLDER = Path(__file__).parent
_REINSTALL = "pip install --force-reinstall --no-deps sae-lens-e2e"


class EmbeddedFileError(RuntimeError):
    """Tells a broken installation (a shipped file is missing or damaged) from an error of the caller's."""


def load_model(device: str | torch.device = "cpu") -> HookedTransformer:
    """A trained model to try things on that needs no network: 6 layers, d_model 64, context 256, 1,024 pieces.

    device: where its float32 weights go.

    Returns a new model each time, in eval mode and with its weights unprocessed (LayerNorm is not folded in). Its
    tokenizer's only special token is `<|endoftext|>`, both BOS and EOS.

    Raises EmbeddedFileError where a shipped file is missing or damaged.
    """
    # Late, as TransformerLens 4, which says what to do, has none.
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    cfg = HookedTransformerConfig(**json.loads(_read("config.json")), device=str(device), init_weights=False)
    weights = safetensors.torch.load(_read("model.safetensors"))
    # The two are one matrix in training, so only the embedding is shipped.
    weights["unembed.W_U"] = weights["embed.W_E"].T.contiguous()
    weights["unembed.b_U"] = torch.zeros(cfg.d_vocab)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        _read(name)
    model = HookedTransformer(cfg, tokenizer=AutoTokenizer.from_pretrained(str(_FOLDER), local_files_only=True))
    # Not strict because the causal mask's buffers are in some TransformerLens state dicts and not in others.
    model.load_state_dict(weights, strict=False)
    return model.eval()


def load_dataset(split: str = "train") -> datasets.Dataset:
    """Stories to run the model on, ready for SAELens' ActivationsStore: column `input_ids`, rows of 256 tokens.

    split: "train", which the model was trained on too, or "held_out", which it never saw.

    Every row starts with the BOS (`<|endoftext|>`), so nothing needs prepending; the same token further on separates
    two stories. The dataset lies in memory (about 10 MB), and nothing is cached or written.

    Raises ValueError for another split, and EmbeddedFileError where a shipped file is missing or damaged.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    column = pq.read_table(io.BytesIO(_read(f"{split}.parquet"))).column("input_ids")
    # Stored in 16 bits for size; torch has no embedding lookup for those.
    tokens = np.concatenate([chunk.flatten().to_numpy() for chunk in column.chunks]).astype(np.int64)
    rows = pa.FixedSizeListArray.from_arrays(pa.array(tokens), CONTEXT_SIZE)
    return datasets.Dataset(pa.table({"input_ids": rows}), split=datasets.NamedSplit(split))


def _read(name: str) -> bytes:
    """The bytes of a shipped file, once they are known to be the bytes that were shipped."""
    try:
        content = (_FOLDER / name).read_bytes()
        digests = json.loads((_FOLDER / "checksums.json").read_bytes())
        damaged = hashlib.sha256(content).hexdigest() != digests[name]
    except FileNotFoundError as error:
        raise _broken(Path(str(error.filename)).name, "is missing") from error
    except OSError as error:
        raise _broken(name, f"cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise _broken("checksums.json", "is damaged") from error
    if damaged:
        raise _broken(name, "is damaged")
    return content


def _broken(name: str, what: str) -> EmbeddedFileError:
    return EmbeddedFileError(f"embedded file {_FOLDER / name} {what}; reinstall it with: {_REINSTALL}")
