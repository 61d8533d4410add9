"""Datasets as people have them: which documents are trained on, and which are kept."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from sae_lens import SAE, StandardSAE, StandardSAEConfig

from sae_lens_e2e.loading import documents, held_out_documents, is_local, load_documents

TEXTS = [f"Once upon a time there were {n} little birds." for n in range(20)]
OTHERS = ["The end."] * 3


def texts(values: list[str] = TEXTS) -> Dataset:
    return Dataset.from_dict({"text": values})


def in_order(documents: Any) -> list[str]:
    return [row["text"] for row in documents]


def write_jsonl(path: Path) -> None:
    texts().to_json(str(path))


def write_lines(path: Path) -> None:
    path.write_text("\n".join(TEXTS))


def tabs() -> str:
    return "n\ttext\n" + "".join(f"{n}\t{text}\n" for n, text in enumerate(TEXTS))


def write_tabs(path: Path) -> None:
    path.write_text(tabs())


def write_compressed(path: Path) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()))


def write_folder(path: Path) -> None:
    path.mkdir()
    texts().to_parquet(str(path / "a.parquet"))
    # Sizes of the whole, of which this is a part.
    (path / "dataset_infos.json").write_text('{"default": {"splits": {"train": {"num_examples": 10000}}}}')


def write_parts(path: Path) -> None:
    path.mkdir()
    texts(TEXTS[:5]).to_parquet(str(path / "train-00000-of-00002.parquet"))
    texts(TEXTS[5:]).to_parquet(str(path / "train-00001-of-00002.parquet"))


ONE_SPLIT: dict[str, Callable[[Path], object]] = {
    "a.jsonl": write_jsonl,
    "a.parquet": lambda path: texts().to_parquet(str(path)),
    "a.csv": lambda path: texts().to_csv(str(path)),
    "a.tsv": write_tabs,
    "a.tsv.gz": lambda path: path.write_bytes(gzip.compress(tabs().encode())),
    "tabs": lambda path: (path.mkdir(), write_tabs(path / "a.tsv")),
    "a.txt": write_lines,
    "a.jsonl.gz": write_compressed,
    "folder": write_folder,
    "parts": write_parts,
    "saved": lambda path: texts().save_to_disk(str(path)),
    "saved_dict": lambda path: DatasetDict({"train": texts()}).save_to_disk(str(path)),
    ".hidden": write_parts,
}


@pytest.mark.parametrize("name", ONE_SPLIT)
def test_of_one_split_the_last_tenth_is_kept(name: str, tmp_path: Path) -> None:
    path = str(tmp_path / name)
    ONE_SPLIT[name](Path(path))
    train, held_out = load_documents(path)
    assert isinstance(train, Dataset)
    assert list(train["text"]) == TEXTS[:18]
    assert list(held_out["text"]) == TEXTS[18:]
    whole, nothing = load_documents(path, held_out=0)
    assert isinstance(whole, Dataset)
    assert list(whole["text"]) == TEXTS
    assert len(nothing) == 0
    assert len(load_documents(path, held_out=0.001)[1]) == 1


def write_clone(path: Path) -> None:
    (path / "data").mkdir(parents=True)
    texts().to_parquet(str(path / "data" / "train-00000-of-00001.parquet"))
    texts(OTHERS).to_parquet(str(path / "data" / "validation-00000-of-00001.parquet"))
    (path / "README.md").write_text("---\nlicense: mit\n---\nBirds")
    (path / ".gitattributes").write_text("*.parquet")
    (path / "notes.txt").write_text("Birds")


def write_side_by_side(path: Path) -> None:
    path.mkdir()
    texts().to_parquet(str(path / "train.parquet"))
    texts(OTHERS).to_parquet(str(path / "validation.parquet"))


SPLITS: dict[str, Callable[[Path], object]] = {
    "clone": write_clone,
    "side_by_side": write_side_by_side,
    "saved": lambda path: DatasetDict({"train": texts(), "validation": texts(OTHERS)}).save_to_disk(str(path)),
    "saved_test": lambda path: DatasetDict({"test": texts(OTHERS), "train": texts()}).save_to_disk(str(path)),
}


@pytest.mark.parametrize("name", SPLITS)
def test_a_split_of_its_own_is_what_is_kept_and_never_trained_on(name: str, tmp_path: Path) -> None:
    SPLITS[name](tmp_path / name)
    for part in (0.1, 0.5):
        train, held_out = load_documents(str(tmp_path / name), part)
        assert isinstance(train, Dataset)
        assert list(train["text"]) == TEXTS
        assert list(held_out["text"]) == OTHERS


def test_a_column_by_name(tmp_path: Path) -> None:
    path = tmp_path / "stories.jsonl"
    Dataset.from_dict({"story": TEXTS, "text": ["x"] * 20, "ids": [[1, 2]] * 20}).to_json(str(path))
    train, held_out = load_documents(f"{path}::story")
    assert train.column_names == ["text"]
    assert list(held_out["text"]) == TEXTS[18:]
    assert load_documents(f"{path}::text")[1]["text"][:] == ["x", "x"]
    assert load_documents(f"{path}::ids")[1]["input_ids"][:] == [[1, 2]] * 2
    assert is_local(f"{path}::story")
    assert not is_local("someone/no-such::story")
    with pytest.raises(ValueError, match="has no column 'tale'; it has story, text, ids"):
        load_documents(f"{path}::tale")


@pytest.mark.parametrize("streaming", [True, False])
def test_of_the_hubs_the_start_is_kept(streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"document {n}" for n in range(600)]

    def load(name: str, split: str, streaming: bool) -> Dataset | IterableDataset:
        assert (name, split) == ("someone/documents", "train")
        return Dataset.from_dict({"text": names}).to_iterable_dataset() if streaming else texts(names)

    monkeypatch.setattr(documents, "load_dataset", load)
    train, held_out = load_documents("someone/documents", 0.1, streaming)
    assert isinstance(train, IterableDataset if streaming else Dataset)
    assert in_order(train) == names[500:]
    assert list(held_out["text"]) == names[:500]
    assert in_order(load_documents("someone/documents", 0, streaming)[0]) == names


def write_mixed(path: Path) -> None:
    path.mkdir()
    texts().to_json(str(path / "a.jsonl"))
    texts().to_parquet(str(path / "b.parquet"))


def write_two_shapes(path: Path) -> None:
    path.mkdir()
    texts().to_json(str(path / "a.jsonl"))
    Dataset.from_dict({"text": [[1]], "other": [2]}).to_json(str(path / "b.jsonl"))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_mixed, "holds .jsonl and .parquet files; give a folder of one kind, or one file"),
        (write_two_shapes, r"cannot be read \("),
        (lambda path: path.write_bytes(b"PAR1 no parquet"), "is no "),
        (
            lambda path: DatasetDict({"a": texts(), "b": texts()}).save_to_disk(str(path)),
            "has the splits a, b; name one of them",
        ),
        (lambda path: path.mkdir(), "is no .parquet, .jsonl"),
    ],
)
def test_what_cannot_be_read_says_so_in_one_line(write: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    write(tmp_path / "data")
    with pytest.raises(ValueError, match=message) as error:
        load_documents(str(tmp_path / "data"))
    assert "\n" not in str(error.value)
    assert str(tmp_path / "data") in str(error.value)


@pytest.mark.parametrize("held_out", [-0.1, 1, "a tenth", None])
def test_what_is_no_part_of_the_documents(held_out: object) -> None:
    with pytest.raises(ValueError, match=f"held_out={held_out!r} is no part"):
        load_documents("embedded", held_out)  # pyright: ignore[reportArgumentType]


def sae_trained_on(path: str, held_out: float | None) -> SAE:
    sae = StandardSAE(StandardSAEConfig(d_in=2, d_sae=2))
    sae.cfg.metadata.dataset_path = path
    if held_out is not None:
        sae.cfg.metadata.held_out = held_out
    return sae


def test_saes_are_evaluated_on_what_all_of_them_kept(tmp_path: Path) -> None:
    path, other = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    write_jsonl(Path(path))
    write_jsonl(Path(other))
    known = {"tenth": sae_trained_on(path, 0.1), "fifth": sae_trained_on(path, 0.2), "half": sae_trained_on(other, 0.5)}
    kept, caveat = held_out_documents(known)
    assert (list(kept["text"]), caveat) == (TEXTS[18:], None)
    assert list(held_out_documents({"fifth": known["fifth"]}).documents["text"]) == TEXTS[16:]
    # On data that none was trained on there is nothing to say.
    assert held_out_documents({"this": sae_trained_on(path, None)}, other).caveat is None
    for part in (None, 0):
        kept, caveat = held_out_documents({**known, "this": sae_trained_on(path, part)})
        assert list(kept["text"]) == TEXTS[18:]
        assert caveat is not None
        assert caveat.startswith(
            f"this: nothing in the metadata (held_out) says that documents of {path} were kept back"
        )
        assert "\n" not in caveat
    with pytest.raises(ValueError, match="no dataset_path"):
        held_out_documents({"none": StandardSAE(StandardSAEConfig(d_in=2, d_sae=2))})
