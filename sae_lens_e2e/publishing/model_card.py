"""The README of a repository of SAEs on the Hugging Face Hub."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from sae_lens_e2e.evaluation.measures import MEASURES
from sae_lens_e2e.markdown import code, plain
from sae_lens_e2e.splice.hooked_transformer import official_model_name

MARK = (
    "<!-- Written by sae-lens-e2e, which writes it anew with every upload. Remove this line to keep your own text. -->"
)
PAPER = (
    "[Identifying Functionally Important Features with End-to-End Sparse Dictionary Learning]"
    "(https://arxiv.org/abs/2405.12241) (Braun, Taylor, Goldowsky-Dill and Sharkey, 2024)"
)
_TAGS = ["sparse-autoencoder", "mechanistic-interpretability", "sae-lens-e2e"]
_TITLES = {measure.name: measure.title for measure in MEASURES.values()} | {
    "layers": "Activations with the SAE spliced in against those without",
    "downstream_mse": "Mean squared error of later activations with the SAE spliced in",
}
# Of an evaluation: what the other tables say, and a histogram.
_NO_FIGURES = ("d_in", "d_sae", "context_size", "hook_head_index", "sparsity", "firing")
_NOTHING = "—"

_Config = Mapping[str, Any]
_Row = Mapping[str, str]


def model_card(
    repo_id: str, configs: Mapping[str, _Config], evaluations: Mapping[str, Mapping[str, Any]] | None = None
) -> str:
    """A model card that says what SAEs are in a repository: their objectives, coefficients, figures and data.

    Args:
        repo_id (str): The repository, as 'owner/name'.
        configs (Mapping): Each SAE's cfg.json, by its id, which is its folder in the repository.
        evaluations (Mapping | None): Of any of them, figures by name, such as `evaluate(...).to_dict()`. A mapping among them becomes a table of its own; what is no number is left out.

    Returns Markdown that starts with YAML, for `huggingface_hub.ModelCard`.
    """
    sections = {
        "SAEs": _table([{"SAE": code(sae_id), **_description(config)} for sae_id, config in configs.items()]),
        "Figures": _figures(evaluations or {}),
        "Finetuning": _table([{"SAE": code(sae_id), **_finetuning(config)} for sae_id, config in configs.items()]),
        "Data": _table([{"SAE": code(sae_id), **_data(config)} for sae_id, config in configs.items()]),
        "Loading": _loading(repo_id, configs),
        "Method": _METHOD,
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items() if text)
    return f"---\n{_front_matter(configs.values())}\n---\n\n{MARK}\n\n# {plain(repo_id)}\n\n{_summary(configs.values())}\n\n{body}\n"


_METHOD = (
    "The objective is what an SAE's output was compared with in training. `local` compares it with the activation that the SAE "
    "was given. End to end, it is put back into the language model: `e2e` compares the next-token distributions, and `e2e_ds` "
    f"those and the activations at later layers. The method is that of {PAPER}."
)


def _front_matter(configs: Iterable[_Config]) -> str:
    metadata = [config.get("metadata", {}) for config in configs]
    data = ModelCardData(
        library_name="saelens",
        tags=_TAGS,
        base_model=_distinct(_model_on_hub(m.get("model_name")) for m in metadata) or None,
        datasets=_distinct(_dataset_on_hub(m.get("dataset_path")) for m in metadata) or None,
    )
    return data.to_yaml().strip()


def _model_on_hub(name: str | None) -> str | None:
    return official_model_name(name or "") or (name if _could_be_on_hub(name) else None)


def _dataset_on_hub(name: str | None) -> str | None:
    return name if _could_be_on_hub(name) else None


def _could_be_on_hub(name: str | None) -> bool:
    if (
        not name
        or "/" not in name
        or PurePosixPath(name).suffix in (".json", ".jsonl", ".parquet", ".csv", ".txt", ".pt")
    ):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _distinct(values: Iterable[str | None]) -> list[str]:
    return list(dict.fromkeys(value for value in values if value))


def _summary(configs: Iterable[_Config]) -> str:
    models = plain(", ".join(_distinct(config.get("metadata", {}).get("model_name") for config in configs)))
    return (
        f"Sparse autoencoders for {models or 'a language model'}, in the format of "
        "[SAELens](https://github.com/decoderesearch/SAELens), uploaded with sae-lens-e2e."
    )


def _description(config: _Config) -> _Row:
    metadata = config.get("metadata", {})
    architecture, trained_as = config.get("architecture"), metadata.get("training_architecture")
    objective = metadata.get("objective") or {}
    return {
        "architecture": plain(
            f"{architecture} (trained as {trained_as})" if trained_as not in (None, architecture) else str(architecture)
        ),
        "d_in": _shown(config.get("d_in")),
        "d_sae": _shown(config.get("d_sae")),
        "hook": _shown(metadata.get("hook_name")),
        "objective": _shown(objective.get("name")),
        "coefficients": _shown(_coefficients(metadata)),
        "finetuned from": _shown(metadata.get("finetuned_from")),
    }


def _coefficients(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What weighs the objective's terms, and the architecture's own."""
    objective = {name: value for name, value in (metadata.get("objective") or {}).items() if name != "name"}
    details = metadata.get("training_architecture_details") or {}
    own = {
        name: value
        for name, value in details.items()
        if name.endswith("coefficient") or name in ("lp_norm", "target_l0")
    }
    others = {"k": details.get("k"), "sparsity": metadata.get("sparsity") if not details else None}
    return _flat({**objective, **own, **others})


def _finetuning(config: _Config) -> _Row:
    """What `finetune` recorded of an SAE's origin."""
    recorded = config.get("metadata", {}).get("finetuning")
    recorded = recorded if isinstance(recorded, Mapping) else {}
    shown = {
        "from": "source",
        "revision": "revision",
        "objective": "objective",
        "tokens": "training_tokens",
        "learning rate": "lr",
        "L0 before": "l0_before",
        "L0": "l0",
    }
    return {title: _shown(recorded.get(key)) for title, key in shown.items()}


def _data(config: _Config) -> _Row:
    metadata = config.get("metadata", {})
    shown = {
        "language model": "model_name",
        "loaded with": "model_from_pretrained_kwargs",
        "dataset": "dataset_path",
        "context size (tokens)": "context_size",
        "BOS prepended": "prepend_bos",
        "positions": "seqpos_slice",
        "tokens left out": "exclude_special_tokens",
    }
    row = {title: metadata.get(key) for title, key in shown.items()}
    row["tokens left out"] = row["tokens left out"] or None
    positions = row["positions"] or ()
    row["positions"] = ":".join("" if p is None else str(p) for p in positions) if any(positions) else None
    return {title: _shown(value) for title, value in row.items()}


def _figures(evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of what is one number, the SAEs side by side, and one of each mapping, the SAEs one below the other."""
    figures = {sae_id: _without_repeats(values) for sae_id, values in evaluations.items()}
    names = _in_order(name for values in figures.values() for name in values)
    numbers = [
        {
            "figure": _title(name),
            **{code(sae_id): _shown(values[name]) for sae_id, values in found.items()},
        }
        for name in names
        if (found := {sae_id: values for sae_id, values in figures.items() if _is_number(values.get(name))})
    ]
    tables = [_table(numbers)]
    for name in names:
        rows = [row for sae_id, values in figures.items() for row in _nested(sae_id, values.get(name))]
        tables += [f"{_title(name)}:\n\n{_table(rows)}"] if rows else []
    return "\n\n".join(table for table in tables if table)


def _without_repeats(figures: Mapping[str, Any]) -> dict[str, Any]:
    left_out = (*_NO_FIGURES, "downstream_mse") if "layers" in figures else _NO_FIGURES
    return {name: value for name, value in figures.items() if name not in left_out}


def _nested(sae_id: str, values: Any) -> list[_Row]:
    """A row of the numbers in a mapping, and one of each mapping in it."""
    if not isinstance(values, Mapping):
        return []
    here, places = _numbers(values), {place: _numbers(v) for place, v in values.items() if isinstance(v, Mapping)}
    rows: list[_Row] = [{"SAE": code(sae_id), **here}] if here else []
    return rows + [{"SAE": code(sae_id), "at": plain(place), **numbers} for place, numbers in places.items() if numbers]


def _numbers(values: Mapping[str, Any]) -> dict[str, str]:
    return {_title(name): _shown(value) for name, value in values.items() if _is_number(value)}


def _in_order(names: Iterable[str]) -> list[str]:
    """Each once, those with a title first, in the order of the titles."""
    titled = list(_TITLES)
    return sorted(dict.fromkeys(names), key=lambda name: titled.index(name) if name in titled else len(titled))


def _loading(repo_id: str, sae_ids: Iterable[str]) -> str:
    lines = [f"SAE.from_pretrained({json.dumps(repo_id)}, {json.dumps(sae_id)})" for sae_id in sae_ids]
    return "\n".join(["```python", "from sae_lens import SAE", "", *lines, "```"])


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers, texts and lists in nested mappings, under dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": v for inner, v in _flat(value).items()}
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            flat |= _flat({f"{name}[{number}]": item for number, item in enumerate(value)})
        elif value not in (None, [], ()):
            flat[name] = value
    return flat


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    if value in (None, "", [], {}):
        return _NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if _is_number(value):
        return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{plain(name)} = {_shown(inner)}" for name, inner in _flat(value).items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(_shown(inner) for inner in value)
    return plain(str(value))


def _title(name: str) -> str:
    return _TITLES.get(name) or plain(name)


def _table(rows: Sequence[_Row]) -> str:
    """Of cells that are Markdown already, without the columns in which no row has anything."""
    columns = [
        c
        for c in dict.fromkeys(c for row in rows for c in row)
        if any(row.get(c, _NOTHING) != _NOTHING for row in rows)
    ]
    if len(columns) < 2:
        return ""
    lines = [columns, ["---"] * len(columns), *([row.get(column, _NOTHING) for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
