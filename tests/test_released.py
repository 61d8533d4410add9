"""SAEs by the names under which they were released: SAELens' registry, and the Hub, which is one on this machine."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

from sae_lens_e2e.apollo.sources import HUB_NAMES
from sae_lens_e2e.bench.members import collect
from sae_lens_e2e.loading.released import Released, find_released, load_released, released_config, revision_of
from sae_lens_e2e.loading.saes import load_sae, load_saes
from tests.saes import activations, inference_sae
from tests.servers import Hub, hub

JB = "gpt2-small-res-jb"
REPOSITORY = "jbloom/GPT2-Small-SAEs-Reformatted"


def files(sae: SAE[Any], folder: Path, where: str) -> dict[str, bytes]:
    """An SAE's files as a repository has them."""
    sae.save_model(folder)
    return {f"{where}/{file.name}": file.read_bytes() for file in folder.iterdir()}


def weights_asked_for(server: Hub) -> list[str]:
    return [path for path in server.downloads() if path.endswith("sae_weights.safetensors")]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (f"{JB}/blocks.4.hook_resid_pre", (JB, "blocks.4.hook_resid_pre")),
        (f"{JB}:blocks.4.hook_resid_pre", (JB, "blocks.4.hook_resid_pre")),
        ("gemma-scope-2b-pt-res/layer_0/width_16k/average_l0_46", None),
        (f"{REPOSITORY}/blocks.4.hook_resid_pre", (REPOSITORY, "blocks.4.hook_resid_pre")),
        ("me/mine:late/e2e_ds", ("me/mine", "late/e2e_ds")),
        ("gpt2-small/6-res_scefr-ajt", None),
        ("sparsify/gpt2/tvj2owza", None),
        ("wandb:sparsify/gpt2/tvj2owza", None),
        (HUB_NAMES[0], None),
        (f"apollo-research/e2e-saes-gpt2/{HUB_NAMES[0]}", None),
        ("nonsense", None),
        ("./not/there", None),
        ("/not/there", None),
    ],
)
def test_what_a_name_stands_for(source: str, expected: tuple[str, str] | None) -> None:
    if source.startswith("gemma"):
        release, _, sae_id = source.partition("/")
        assert sae_id in get_pretrained_saes_directory()[release].saes_map
        expected = (release, sae_id)
    assert find_released(source) == (None if expected is None else Released(*expected))


def test_what_is_on_this_machine_is_no_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / JB / "blocks.4.hook_resid_pre").mkdir(parents=True)
    assert find_released(f"{JB}/blocks.4.hook_resid_pre") is None


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (f"{JB}b/blocks.4.hook_resid_pre", f"no release '{JB}b' in SAELens' registry; the nearest are {JB}, "),
        ("gemma-scope-2b-res/x", "no release 'gemma-scope-2b-res'.*gemma-scope-2b-pt-res"),
        ("zzzzzz:x", "no release 'zzzzzz' in SAELens' registry; of the Hub's give OWNER/REPOSITORY:FOLDER"),
        (JB, f"release '{JB}' has no SAE ''; it has 13: blocks.0.hook_resid_pre, "),
        (f"{JB}/blocks.40.hook_resid_pre", f"release '{JB}' has no SAE 'blocks.40.hook_resid_pre'.* blocks.4"),
        ("me/mine", "nothing of that name on this machine, nor in SAELens' registry; of the Hub's give OWNER/"),
        ("me/mine:", "of the Hub's give OWNER/"),
    ],
)
def test_an_unknown_name_is_told_the_nearest_and_asks_nobody(source: str, message: str) -> None:
    with hub({}) as server:
        with pytest.raises(ValueError, match=message) as raised:
            load_saes(source)
        assert "\n" not in str(raised.value)
        assert server.requests == []


def test_an_sae_of_the_registry(tmp_path: Path) -> None:
    """At the path that the registry has for it, with what the registry knows of it: the model was processed."""
    sae = inference_sae("standard")
    with hub(files(sae, tmp_path, f"{REPOSITORY}/blocks.4.hook_resid_pre")) as server:
        found = Released(JB, "blocks.4.hook_resid_pre")
        assert revision_of(found) is None
        cfg = released_config(found)
        assert (cfg["architecture"], cfg["metadata"]["hook_name"]) == ("standard", "blocks.1.hook_resid_pre")
        assert weights_asked_for(server) == []
        loaded = load_sae(f"{JB}/blocks.4.hook_resid_pre")
        assert torch.equal(loaded(activations()), sae(activations()))
        assert len(weights_asked_for(server)) == 1
        assert revision_of(found) == server.commit


def test_an_sae_of_a_repository(tmp_path: Path) -> None:
    sae = inference_sae("jumprelu")
    with hub(files(sae, tmp_path, "me/mine/late")) as server:
        (hook, loaded), *others = load_saes("me/mine:late").items()
        assert (hook, others) == ("blocks.1.hook_resid_pre", [])
        assert torch.equal(loaded(activations()), sae(activations()))
        assert revision_of(Released("me/mine", "late")) == server.commit


def test_a_report_takes_released_saes(tmp_path: Path) -> None:
    with hub(files(inference_sae("jumprelu"), tmp_path, "me/mine/late")):
        (member,), skipped = collect(["me/mine:late"])
    assert (member.source, skipped) == ("me/mine:late", [])
    with pytest.raises(ValueError, match=r"is no SAE, nor a folder of them.*the nearest are gpt2-small-res-jb"):
        collect(["gpt2-small-res-jbb/x"])


def test_what_cannot_be_had_says_so_in_one_line(tmp_path: Path) -> None:
    content = files(inference_sae("standard"), tmp_path, "me/mine/late")
    content["me/mine/odd/cfg.json"] = json.dumps({"architecture": "standard"}).encode()
    content["me/mine/odd/sae_weights.safetensors"] = b"no weights"
    with hub(content):
        for source, kind, message in (
            ("me/mine:early", OSError, "'me/mine/early'.*could not be had from the Hugging Face Hub"),
            ("you/yours:early", OSError, "'you/yours/early'.*could not be had"),
            ("me/mine:odd", ValueError, "'me/mine/odd' is none that SAELens can read"),
        ):
            with pytest.raises(kind, match=message) as raised:
                load_released(find_released(source) or Released("", ""))
            assert "\n" not in str(raised.value)
