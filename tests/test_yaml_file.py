"""Settings in files: numbers as one writes them, and what is too large to be settings."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from sae_lens_e2e.yaml_file import parse_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1e-3", 0.001),
        ("1e-05", 1e-05),
        ("-2E4", -2e4),
        ("1.e+2", 100.0),
        (".5e1", 5.0),
        ("5.5", 5.5),
        (".inf", float("inf")),
    ],
)
def test_a_number_is_a_number_in_both(text: str, number: float) -> None:
    read = parse_yaml(f"lr: {text}\nlist: [{text}]")
    assert read == {"lr": number, "list": [number]}
    assert {type(value) for value in (read["lr"], *read["list"])} == {float}


@pytest.mark.parametrize(
    "text",
    ["12", "'1e-3'", "1e", "e3", "2026-01-02", "0x1f", "yes", "null", "~", "1.2.3", "1-3", "1_000", "[a, 1, 1.5]"],
)
def test_all_else_is_what_it_was(text: str) -> None:
    assert parse_yaml(text) == yaml.safe_load(text)


def test_json_by_its_own_reader() -> None:
    assert parse_yaml('{"a": 1e-05, "b":\t"1e-05"}') == {"a": 1e-05, "b": "1e-05"}


def bomb(line: str) -> str:
    """Ten lines, each nine times the one before."""
    first = "a0: &a0 {k: v}\n"
    return first + "".join(f"a{i}: &a{i} {line.format(', '.join([f'*a{i - 1}'] * 9))}\n" for i in range(1, 10))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 3000 + "]" * 3000, "nested more than 50 deep"),
        ("[" * 60 + "]" * 60, "nested more than 50 deep"),
        ("{a: " * 3000 + "1" + "}" * 3000, "nested more than 50 deep"),
        ("{a: " * 60 + "1" + "}" * 60, "nested more than 50 deep"),
        (bomb("[{}]"), "aliases stand for more than 100,000 values"),
        (bomb("{{<<: [{}]}}"), "aliases stand for more than 100,000 values"),
        ("a: &a [*a]", "an alias stands for what it is part of"),
        ("a" * 1_000_001, "1,000,001 characters"),
        ("a: [", "neither YAML nor JSON"),
        ("!!python/object/apply:os.getcwd []", "neither YAML nor JSON"),
    ],
)
def test_what_is_no_settings_is_refused_in_one_short_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_yaml(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_aliases_that_are_used_with_measure_are_taken() -> None:
    read: Any = parse_yaml("base: &b {lr: 1e-3}\nothers: [*b, *b]\nmore: {<<: *b, k: 4}")
    assert read == {"base": {"lr": 0.001}, "others": [{"lr": 0.001}] * 2, "more": {"lr": 0.001, "k": 4}}
