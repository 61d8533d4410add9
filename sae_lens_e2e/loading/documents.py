"""The documents of a dataset by name, and which of them are kept for evaluation: one rule for all that trains or measures."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from sae_lens import SAE

from sae_lens_e2e import embedded
from sae_lens_e2e.errors import named_line
from sae_lens_e2e.loading.models import COLUMN, EMBEDDED, unreachable

HELD_OUT = 0.1
"""Which part of the documents is kept for evaluation, unless something else is asked for."""

# Of a dataset on the Hub, which is too large to be counted.
_HELD_OUT_DOCUMENTS = 500
_TRAIN, _EVALUATION = "train", ("validation", "test")
_BUILDERS = {
    **{".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".txt": "text"},
    ".arrow": "arrow",
}
_COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
# What `datasets` and the Hub write beside the data.
_NO_DATA = ("config.json", "dataset_info.json", "dataset_infos.json")


class HeldOut(NamedTuple):
    """Documents to evaluate SAEs on, and what keeps one from being sure that none was trained on them."""

    documents: Dataset
    caveat: str | None


def load_documents(
    name: str, held_out: float = HELD_OUT, streaming: bool = True
) -> tuple[Dataset | IterableDataset, Dataset]:
    """The documents of a dataset to train on, and those kept for evaluation: its own other split, or the last `held_out` of them.

    `name` is 'embedded', a file (parquet, jsonl, json, csv, tsv or txt, or one of them compressed), a folder of such files, as a clone of
    one of the Hub's is, a folder that `datasets` saved, or the Hub's; NAME::COLUMN reads that column of it. What is kept of the
    Hub's, which is read with `streaming`, is its first 500 documents. Raises OSError if it is not there, or the Hub cannot be
    reached, ValueError if it cannot be read.
    """
    check_held_out(held_out)
    place, _, column = name.partition(COLUMN)
    if not place:
        raise ValueError(f"dataset {name!r} is no name; give {EMBEDDED!r}, a file, a folder or a name on the Hub")
    if place == EMBEDDED:
        parts = embedded.load_dataset("train"), embedded.load_dataset("held_out")
    elif Path(place).exists():
        parts = split_documents(_load_local(Path(place)), place, held_out)
    else:
        parts = _parts_of_hubs(place, held_out, streaming)
    return (_of_column(parts[0], column, place), _of_column(parts[1], column, place)) if column else parts


def validation_documents(
    name: str, held_out: float = HELD_OUT, part: float = HELD_OUT
) -> tuple[Dataset | IterableDataset, Dataset]:
    """What `load_documents` gives to train on, in two: documents to train on, and the last `part` of them to choose settings by.

    Of the Hub's they are the first 500 of those to train on. None of those kept for evaluation is among either.
    """
    documents: Any = load_documents(name, held_out)[0]
    if isinstance(documents, Dataset):
        return _last_apart(documents, part)
    chosen_by = Dataset.from_list(list(documents.take(_HELD_OUT_DOCUMENTS)))
    return documents.skip(_HELD_OUT_DOCUMENTS), chosen_by


def held_out_documents(
    saes: Mapping[str, SAE[Any]], dataset: str | None = None, load: Callable[[str, float], Any] = load_documents
) -> HeldOut:
    """The documents of a dataset, by default the one in the SAEs' metadata, that none of the SAEs was trained on.

    `metadata.held_out` is the part that was kept. Of an SAE that was trained on the dataset and does not say, the caveat speaks.
    Raises ValueError if the metadata name no dataset, and what `load_documents` raises.
    """
    name = dataset or next((path for sae in saes.values() if (path := sae.cfg.metadata.dataset_path)), None)
    if name is None:
        raise ValueError("the SAE's metadata name no dataset_path; say which dataset")
    kept = {sae: one.cfg.metadata.held_out for sae, one in saes.items() if _same(one.cfg.metadata.dataset_path, name)}
    unsure = [sae for sae, part in kept.items() if not part]
    # The least is in what each of the others kept.
    _, documents = load(name, min((part for part in kept.values() if part), default=HELD_OUT))
    if not unsure:
        return HeldOut(documents, None)
    return HeldOut(
        documents,
        f"{', '.join(unsure)}: nothing in the metadata (held_out) says that documents of {name} were kept back, so these may have been "
        "trained on",
    )


def check_held_out(held_out: Any) -> None:
    """Raise ValueError for what is no part of the documents that can be kept."""
    if isinstance(held_out, bool) or not isinstance(held_out, (int, float)) or not 0 <= held_out < 1:
        raise ValueError(f"held_out={held_out!r} is no part of the documents; give a number from 0 to less than 1")


def _same(path: str | None, name: str) -> bool:
    return path is not None and Path(path).absolute() == Path(name).absolute()


def _load_local(path: Path) -> Any:
    """Everything at a path, with its splits if it has any."""
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return load_from_disk(str(path))
    files = [Path(path.name)] if path.is_file() else sorted(f.relative_to(path) for f in path.rglob("*") if f.is_file())
    suffixes = {suffix: _BUILDERS[suffix] for file in files if (suffix := _suffix(file)) in _BUILDERS}
    if len(set(suffixes.values())) > 1:
        # Notes, and lists of what is there.
        suffixes.pop(".txt", None)
    if not suffixes:
        raise ValueError(f"dataset {str(path)!r} is no {', '.join(_BUILDERS)} file, nor a folder of them")
    if len(builders := set(suffixes.values())) > 1:
        raise ValueError(
            f"dataset {str(path)!r} holds {' and '.join(suffixes)} files; give a folder of one kind, or one file"
        )
    try:
        if path.is_file():
            return _load_file(builders.pop(), path)
        # Sizes that are written beside the data may be of more than is there.
        return load_dataset(str(path), verification_mode="no_checks")
    except Exception as error:  # whatever the libraries that read files make of what is in them
        reason = named_line(error.__cause__ or error)
        raise ValueError(f"dataset {str(path)!r} is empty or cannot be read ({reason})") from error


def _load_file(builder: str, path: Path) -> Dataset:
    if builder == "tsv":
        return load_dataset("csv", data_files=str(path), split=_TRAIN, sep="\t")
    return load_dataset(builder, data_files=str(path), split=_TRAIN)


def _suffix(file: Path) -> str:
    """The suffix that tells what a file of a dataset is; nothing for one that holds no data."""
    hidden = any(part.startswith((".", "__")) for part in file.parts)
    suffixes = [suffix for suffix in file.suffixes if suffix not in _COMPRESSED]
    return "" if hidden or file.name in _NO_DATA or not suffixes else suffixes[-1]


def split_documents(documents: Any, name: str, held_out: float) -> tuple[Dataset, Dataset]:
    """What is trained on and what is kept of documents, called `name`: their own splits, or the last `held_out` of them."""
    if isinstance(documents, DatasetDict):
        own = next((documents[split] for split in _EVALUATION if split in documents), None)
        if _TRAIN in documents and own is not None:
            return documents[_TRAIN], own
        if _TRAIN not in documents and len(documents) > 1:
            raise ValueError(
                f"dataset {name!r} has the splits {', '.join(map(str, documents))}; name one of them {_TRAIN!r}"
            )
        documents = documents[_TRAIN] if _TRAIN in documents else next(iter(documents.values()))
    return _last_apart(documents, held_out)


def _last_apart(documents: Dataset, part: float) -> tuple[Dataset, Dataset]:
    """All but the last `part` of documents, and that; at least one on either side, unless the part is 0."""
    n = len(documents)
    n_first = max(min(round(n * (1 - part)), n - 1), 1) if part else n
    return documents.select(range(n)[:n_first]), documents.select(list(range(n)[n_first:]))


def _parts_of_hubs(name: str, held_out: float, streaming: bool) -> tuple[Dataset | IterableDataset, Dataset]:
    try:
        documents: Any = load_dataset(name, split=_TRAIN, streaming=streaming)
        # On the Hub datasets are large: what trains is streamed, and what evaluates is taken from its start.
        kept = Dataset.from_list(list(documents.take(_HELD_OUT_DOCUMENTS)))
    except OSError as error:
        raise unreachable("dataset", name) from error
    return documents.skip(_HELD_OUT_DOCUMENTS) if held_out else documents, kept


def _of_column(documents: Any, column: str, name: str) -> Any:
    """The one column of documents that is asked for, under the name by which it is read."""
    row = next(iter(documents), {column: ""})
    if column not in row:
        raise ValueError(f"dataset {name!r} has no column {column!r}; it has {', '.join(row)}")
    read_as = "input_ids" if isinstance(row[column], list) else "text"
    documents = documents.select_columns([column])
    return documents if column == read_as else documents.rename_column(column, read_as)
