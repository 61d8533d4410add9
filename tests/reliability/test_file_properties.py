"""Whatever is in a file of Apollo's or in an SAE's folder: it is read for what it says, or refused in one line."""

import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hypothesis")
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_lens_e2e import E2ERunnerConfig
from sae_lens_e2e.apollo import load_apollo_saes
from sae_lens_e2e.evaluation import evaluate
from sae_lens_e2e.loading.folder import load_folder
from sae_lens_e2e.loading.metadata import model_settings
from tests.apollo import HOOK, apollo_forward, parameters, run_config, state_dict
from tests.models import dataset_of, random_model, random_tokens
from tests.reliability.test_properties import VALUES, few, said_in_one_line
from tests.saes import inference_sae

# Each reads and writes files.
fewer = settings(few, max_examples=60)

MODEL = random_model()
TOKENS = dataset_of(random_tokens(8, 12, 61))


@contextmanager
def or_one_line() -> Iterator[None]:
    """Whatever is wrong is an error of those that say it themselves, in one line."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        said_in_one_line(error)


def paths(content: Any, at: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every key of nested mappings, by those that lead to it."""
    if not isinstance(content, dict):
        return []
    return [path for key, value in content.items() for path in ((*at, key), *paths(value, (*at, key)))]


GONE = object()


def changed(content: dict[str, Any], changes: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    """A copy in which some keys have other values, or are gone."""
    content = copy.deepcopy(content)
    for (*sections, key), value in changes.items():
        section: Any = content
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
        if not isinstance(section, dict):
            continue
        section.pop(key, None)
        if value is not GONE:
            section[key] = value
    return content


def changes_of(content: dict[str, Any]) -> st.SearchStrategy[dict[tuple[str, ...], Any]]:
    return st.dictionaries(st.sampled_from(paths(content)), st.just(GONE) | VALUES, min_size=1, max_size=3)


CHANGES_OF_A_TENSOR: dict[str, Callable[[Tensor], Any]] = {
    "nan": lambda tensor: tensor * float("nan"),
    "zeros": torch.zeros_like,
    "enormous": lambda tensor: tensor * 1e30,
    "double": Tensor.double,
    "half": Tensor.bfloat16,
    "complex": lambda tensor: tensor.to(torch.complex64),
    "integers": Tensor.int,
    "transposed": lambda tensor: tensor.T.contiguous() if tensor.ndim == 2 else tensor[None],
    "shorter": lambda tensor: tensor[:-1].contiguous(),
    "wider": lambda tensor: torch.cat([tensor, tensor], -1),
    "empty": lambda tensor: tensor[:0].contiguous(),
    "scalar": lambda tensor: tensor.flatten()[0].clone(),
    "gone": lambda _: GONE,
}
TENSOR_CHANGES = st.dictionaries(st.integers(0, 3), st.sampled_from(list(CHANGES_OF_A_TENSOR)), min_size=1, max_size=2)


def with_tensors_changed(tensors: dict[str, Tensor], changes: dict[int, str]) -> dict[str, Tensor]:
    names = sorted(tensors)
    new = {
        names[i % len(names)]: CHANGES_OF_A_TENSOR[change](tensors[names[i % len(names)]])
        for i, change in changes.items()
    }
    return {name: value for name, value in (tensors | new).items() if value is not GONE}


@contextmanager
def a_run(config: dict[str, Any], checkpoint: Any) -> Iterator[Path]:
    """A folder as a run of Apollo's library leaves it."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "final_config.yaml").write_text(yaml.dump(config))
        torch.save(checkpoint, Path(folder) / "samples_1600.pt")
        yield Path(folder)


CONFIG = run_config()
WEIGHTS = parameters()
X = torch.randn(8, 16, generator=torch.Generator().manual_seed(3))


@fewer
@given(changes_of(CONFIG))
def test_an_apollo_config_is_followed_or_refused(changes: dict[tuple[str, ...], Any]) -> None:
    config = changed(CONFIG, changes)
    with a_run(config, state_dict({HOOK: WEIGHTS})) as folder:
        with or_one_line():
            (sae,) = load_apollo_saes(folder).values()
            # Which of the weights are meant, no config says.
            torch.testing.assert_close(sae.decode(sae.encode(X)), apollo_forward(WEIGHTS, X)[1])
            assert sae.cfg.metadata.hook_name == HOOK
        with or_one_line():
            cfg = E2ERunnerConfig.from_apollo(folder, d_in=16)
            assert cfg.lr == float(config["lr"])
            assert cfg.training_tokens == int(config["n_samples"]) * cfg.context_size
            assert cfg.hook_name in str(config["saes"]["sae_positions"])


@fewer
@given(TENSOR_CHANGES)
def test_an_apollo_checkpoint_is_read_or_refused(changes: dict[int, str]) -> None:
    tensors = with_tensors_changed(WEIGHTS, changes)
    with a_run(CONFIG, state_dict({HOOK: tensors})) as folder, or_one_line():
        (sae,) = load_apollo_saes(folder).values()
        expected = apollo_forward({name: tensor.float() for name, tensor in tensors.items()}, X)[1]
        torch.testing.assert_close(sae.decode(sae.encode(X)), expected)


@fewer
@given(VALUES | st.dictionaries(st.text(max_size=8) | st.integers(), VALUES | st.just(torch.ones(2)), max_size=3))
def test_whatever_else_torch_saves_is_refused(content: Any) -> None:
    with a_run(CONFIG, content) as folder, pytest.raises(ValueError, match=r"samples_1600\.pt") as error:
        load_apollo_saes(folder)
    said_in_one_line(error.value)


SAES = {architecture: inference_sae(architecture) for architecture in ("standard", "topk", "jumprelu", "gated")}
CFGS = {architecture: json.loads(json.dumps(sae.cfg.to_dict())) for architecture, sae in SAES.items()}


@contextmanager
def a_folder(architecture: str) -> Iterator[Path]:
    """A folder as SAELens saves an SAE."""
    with tempfile.TemporaryDirectory() as folder:
        SAES[architecture].save_model(folder)
        yield Path(folder)


def looked_at(folder: Path) -> None:
    """Load, and ask what is asked of every SAE: which model it is of, and what it costs."""
    sae = load_folder(folder)
    model_settings(sae.cfg.metadata)
    found = evaluate(sae, MODEL, TOKENS, batch_size_prompts=4, max_tokens=48, verbose=False)
    assert found.n_tokens == 48
    assert found.l0 >= 0


@fewer
@given(st.sampled_from(list(CFGS)), st.data())
def test_an_saes_cfg_is_followed_or_refused(architecture: str, data: st.DataObject) -> None:
    cfg = changed(CFGS[architecture], data.draw(changes_of(CFGS[architecture])))
    with a_folder(architecture) as folder, or_one_line():
        (folder / "cfg.json").write_text(json.dumps(cfg))
        looked_at(folder)


@fewer
@given(st.sampled_from(list(SAES)), TENSOR_CHANGES)
def test_an_saes_weights_are_taken_or_refused(architecture: str, changes: dict[int, str]) -> None:
    with a_folder(architecture) as folder, or_one_line():
        weights = with_tensors_changed(load_file(folder / "sae_weights.safetensors"), changes)
        save_file(weights, folder / "sae_weights.safetensors")
        looked_at(folder)
        assert all(tensor.isfinite().all() for tensor in weights.values())


@fewer
@given(
    st.sampled_from(["cfg.json", "sae_weights.safetensors"]),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=3),
    st.floats(0, 1),
)
def test_damaged_bytes_are_refused_or_do_no_harm(file: str, bytes_at: list[tuple[float, int]], end: float) -> None:
    with a_folder("topk") as folder, or_one_line():
        content = bytearray((folder / file).read_bytes())
        for at, byte in bytes_at:
            # The beginning of weights says what they are.
            content[int(at * (min(len(content), 300) - 1))] = byte
        (folder / file).write_bytes(content[: int(end * len(content)) + 1 if end < 0.5 else None])
        looked_at(folder)
