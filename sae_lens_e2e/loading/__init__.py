"""A language model and its data by name: the embedded ones, a folder's, or the Hub's."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset, load_dataset, load_from_disk
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from transformer_lens.HookedRootModule import HookedRootModule

from sae_lens_e2e import embedded
from sae_lens_e2e.columns import column_of
from sae_lens_e2e.loading.models import EMBEDDED, is_local, load_model, model_class_of, unreachable

__all__ = ["EMBEDDED", "HELD_OUT", "is_local", "load_documents", "load_model", "model_class_of", "tokenised"]

HELD_OUT = 0.1
# Of a dataset on the Hub, which is too large to be counted.
_HELD_OUT_DOCUMENTS = 500


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
            raise unreachable("dataset", name) from error
    documents: Any = load_from_disk(name) if (path / "dataset_info.json").exists() else _load_files(path)
    n_train = round(len(documents) * (1 - held_out))
    if n_train == len(documents):
        return documents, documents.select([])
    return documents.select(range(n_train)), documents.select(range(n_train, len(documents)))


def tokenised(documents: Any, model: HookedRootModule, context_size: int) -> Any:
    """Rows of `context_size` token ids, BOS first, packed the way SAELens packs them; token ids are passed through.

    Raises ValueError for documents that are neither.
    """
    column = column_of(next(iter(documents), {}))
    if column.is_tokens or isinstance(documents, IterableDataset):
        return documents
    tokenizer: Any = model.tokenizer
    texts: Iterable[str] = documents[column.name]
    rows = concat_and_batch_sequences(
        (torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts),
        context_size=context_size,
        begin_batch_token_id=tokenizer.bos_token_id,
        sequence_separator_token_id=tokenizer.bos_token_id,
    )
    return Dataset.from_dict({"input_ids": [row.tolist() for row in rows]})


def _load_files(path: Path) -> Dataset:
    suffixes = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix in suffixes)
    if not files or files[0].suffix not in suffixes:
        raise ValueError(f"dataset {str(path)!r} is no {', '.join(suffixes)} file, nor a folder of them")
    return load_dataset(suffixes[files[0].suffix], data_files=[str(file) for file in files], split="train")
