"""Runs in the layouts of Apollo's library for the tests, and what its SAE computes."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from torch import Tensor

from tests.models import GOLDEN

HOOK = "blocks.2.hook_resid_pre"
REFERENCE = Path(__file__).parents[2] / "shared" / "apollo"


def reference(name: str) -> Path:
    """A folder that Apollo's own library wrote, where there is one beside this repository; skips the test where not."""
    if not (REFERENCE / name).is_dir():
        pytest.skip(f"the reference data that Apollo's own library wrote ({name}) are not beside this repository")
    return REFERENCE / name


def run_config(changes: Mapping[str, Any] | None = None, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """The settings of the reference run e2e_ds, with some changed or left out, by dotted name."""
    config = yaml.safe_load((GOLDEN / "apollo_e2e_ds_final_config.yaml").read_text())
    for name, value in (changes or {}).items():
        *sections, key = name.split(".")
        _section(config, sections)[key] = copy.deepcopy(value)
    for name in without:
        *sections, key = name.split(".")
        del _section(config, sections)[key]
    return config


def named_model(name: str, hook: str = HOOK, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The settings of a run on a model that was loaded by name, and so processed."""
    named = {"tlens_model_name": name, "tlens_model_path": None, "saes.sae_positions": [hook]}
    return run_config({**named, **(changes or {})})


def parameters(d_in: int = 16, d_sae: int = 48, seed: int = 0) -> dict[str, Tensor]:
    """An SAE in Apollo's names, its decoder not normalised, whose features fire on about a sixth of inputs of scale 1."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "encoder.weight": F.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1),
        "encoder.bias": -1 + 0.1 * torch.randn(d_sae, generator=generator),
        "decoder.weight": 2 * torch.randn(d_in, d_sae, generator=generator),
        "decoder.bias": 0.3 * torch.randn(d_in, generator=generator),
    }


def golden_parameters(run: str) -> dict[str, Tensor]:
    """The trained SAE of a reference run, in Apollo's names."""
    golden = load_file(GOLDEN / f"apollo_{run}.safetensors")
    prefix = f"param.{HOOK.replace('.', '-')}."
    found = {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}
    return {name.replace("encoder.0.", "encoder."): tensor for name, tensor in found.items()}


def apollo_forward(sae: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The features and the reconstruction of Apollo's SAE, as the paper has them (section 2.1)."""
    features = torch.relu(x @ sae["encoder.weight"].T + sae["encoder.bias"])
    dictionary = sae["decoder.weight"] / sae["decoder.weight"].norm(dim=0, keepdim=True)
    return features, features @ dictionary.T + sae["decoder.bias"]


def write_run(
    folder: Path, config: Mapping[str, Any], saes: Mapping[str, Mapping[str, Tensor]], n_samples: int = 1600
) -> Path:
    """A folder as a run of Apollo's library leaves it, with the SAEs by hook name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "final_config.yaml").write_text(yaml.dump(dict(config)))
    torch.save(state_dict(saes), folder / f"samples_{n_samples}.pt")
    return folder


def state_dict(saes: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What a run's checkpoint holds."""
    return {
        f"{hook.replace('.', '-')}.{name.replace('encoder.', 'encoder.0.')}": tensor.clone()
        for hook, sae in saes.items()
        for name, tensor in sae.items()
    }


def write_pair(folder: Path, name: str, config: Mapping[str, Any], sae: Mapping[str, Tensor]) -> Path:
    """One SAE as those on the Hub are: a pair of files, the decoder normalised already; the path without a suffix."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.yaml").write_text(yaml.dump(dict(config)))
    torch.save({**sae, "decoder.weight": F.normalize(sae["decoder.weight"], dim=0)}, folder / f"{name}.pt")
    return folder / name


def write_tiny4l(folder: Path) -> Path:
    """The reference runs' language model as Apollo's library saved it; the path of its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "final_config.yaml").write_text((GOLDEN / "tiny4l_final_config.yaml").read_text())
    torch.save(load_file(GOLDEN / "tiny4l.safetensors"), folder / "model.pt")
    return folder / "model.pt"


def _section(config: dict[str, Any], names: list[str]) -> dict[str, Any]:
    for name in names:
        if config.get(name) is None:
            config[name] = {}
        config = config[name]
    return config
