"""A language model and its data by name: the embedded ones, a folder's, or the Hub's."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset, load_dataset, load_from_disk
from sae_lens.load_model import HookedProxyLM
from sae_lens.load_model import load_model as load_hub_model
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from safetensors.torch import load_file
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.HookedRootModule import HookedRootModule
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_lens_e2e import embedded
from sae_lens_e2e.apollo.model import load_apollo_model

EMBEDDED = "embedded"
HELD_OUT = 0.1
# Of a dataset on the Hub, which is too large to be counted.
_HELD_OUT_DOCUMENTS = 500
_COLUMNS = ("input_ids", "tokens")


def is_local(name: str) -> bool:
    """Whether `load_model` or `load_documents` finds `name` on this machine."""
    return name == EMBEDDED or Path(name).exists()


def load_model(
    name: str,
    device: str = "cpu",
    model_class_name: str = "HookedTransformer",
    model_from_pretrained_kwargs: Mapping[str, Any] | None = None,
) -> HookedRootModule:
    """The language model called `name`: 'embedded', a folder, a file of weights that Apollo's library saved, or the Hub's.

    A folder holds `transformer_lens/{config.json,model.safetensors}` and the tokenizer in `huggingface/`, or a Hugging Face
    model. Raises OSError if it is not there, or the Hub cannot be reached.
    """
    path = Path(name)
    if name == EMBEDDED:
        return embedded.load_model(device)
    if path.suffix == ".pt" and path.is_file():
        return load_apollo_model(path, device=device)
    if (path / "transformer_lens").is_dir():
        return _load_transformer_lens_folder(path, device)
    if path.is_dir():
        model: Any = AutoModelForCausalLM.from_pretrained(path)
        return HookedProxyLM(model.to(device), AutoTokenizer.from_pretrained(path))
    try:
        return load_hub_model(model_class_name, name, device, dict(model_from_pretrained_kwargs or {}))
    except OSError as error:
        raise _unreachable("model", name) from error
    except ValueError as error:
        # TransformerLens lists the hundreds that it knows.
        raise ValueError(
            f"model {name!r} is none that {model_class_name} knows; with model_class_name='AutoModelForCausalLM' any of the "
            "Hub's can be had, whose hooks are module names"
        ) from error


def load_documents(name: str, held_out: float = HELD_OUT) -> tuple[Dataset | IterableDataset, Dataset]:
    """The documents of a dataset to train on, and those kept for evaluation: the last `held_out` of them.

    `name` is 'embedded', a jsonl, json or parquet file, a folder of them or one that `datasets` saved, or the Hub's.
    Raises OSError if it is not there, or the Hub cannot be reached.
    """
    path = Path(name)
    if name == EMBEDDED:
        return embedded.load_dataset("train"), embedded.load_dataset("held_out")
    if not path.exists():
        try:
            # On the Hub datasets are large: what trains is streamed, and what evaluates is taken from its start.
            stream = load_dataset(name, split="train", streaming=True)
            return stream.skip(_HELD_OUT_DOCUMENTS), Dataset.from_list(list(stream.take(_HELD_OUT_DOCUMENTS)))
        except OSError as error:
            raise _unreachable("dataset", name) from error
    documents: Any = load_from_disk(name) if (path / "dataset_info.json").exists() else _load_files(path)
    n_train = round(len(documents) * (1 - held_out))
    if n_train == len(documents):
        return documents, documents.select([])
    return documents.select(range(n_train)), documents.select(range(n_train, len(documents)))


def tokenised(documents: Any, model: HookedRootModule, context_size: int) -> Any:
    """Rows of `context_size` token ids, BOS first, packed the way SAELens packs them; token ids are passed through.

    Raises ValueError for documents that are neither.
    """
    first: dict[str, Any] = next(iter(documents), {})
    if any(column in first for column in _COLUMNS) or isinstance(documents, IterableDataset):
        return documents
    if "text" not in first:
        raise ValueError(
            f"the dataset has no column of tokens ({', '.join(_COLUMNS)}) or text; it has {', '.join(first) or 'nothing'}"
        )
    tokenizer: Any = model.tokenizer
    texts: Iterable[str] = documents["text"]
    rows = concat_and_batch_sequences(
        (torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts),
        context_size=context_size,
        begin_batch_token_id=tokenizer.bos_token_id,
        sequence_separator_token_id=tokenizer.bos_token_id,
    )
    return Dataset.from_dict({"input_ids": [row.tolist() for row in rows]})


def _load_transformer_lens_folder(folder: Path, device: str) -> HookedTransformer:
    config = json.loads((folder / "transformer_lens" / "config.json").read_text())
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


def _load_files(path: Path) -> Dataset:
    suffixes = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix in suffixes)
    if not files or files[0].suffix not in suffixes:
        raise ValueError(f"dataset {str(path)!r} is no {', '.join(suffixes)} file, nor a folder of them")
    return load_dataset(suffixes[files[0].suffix], data_files=[str(file) for file in files], split="train")


def _unreachable(what: str, name: str) -> ConnectionError:
    return ConnectionError(
        f"{what} {name!r}: there is no such folder here, and it could not be had from the Hugging Face Hub; {EMBEDDED!r} needs "
        "no network"
    )
