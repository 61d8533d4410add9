"""Uploading to a Hugging Face Hub: what arrives there, what the model card says, and what is refused before anything does."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from sae_lens import SAE

from sae_lens_e2e.evaluation import evaluate
from sae_lens_e2e.publishing.hub import model_card, upload_to_hub
from sae_lens_e2e.publishing.model_card import MARK
from sae_lens_e2e.publishing.neuronpedia import save_for_neuronpedia
from tests.models import dataset_of, random_model, random_tokens
from tests.saes import COMPLETE, D_SAE, activations, features_and_output, inference_sae, training_sae
from tests.training import make_runner, runner_config
from tests.upload_server import UploadHub, upload_hub

REPO = "me/stories-saes"
E2E_DS = {
    "name": "e2e_ds",
    "kl_coefficient": 0.5,
    "downstream_coefficient": 2.5,
    "downstream_hooks": ["blocks.2.hook_resid_pre"],
    "mse_coefficient": 0.0,
}


@dataclass(frozen=True)
class Measured:
    """Figures, some of which are no numbers."""

    ce_loss_increase: float = 0.18123

    def to_dict(self) -> dict[str, Any]:
        return {
            "n_tokens": 110592,
            "ce_loss_increase": self.ce_loss_increase,
            "kl": 0.25,
            "l0": 12.7,
            "n_alive": 31,
            "own_figure": 3,
            "finished": True,
            "frequency": [0.1] * D_SAE,
            "downstream_mse": {"blocks.2.hook_resid_pre": 0.2, "blocks.2.hook_resid_post": 0.3},
        }


@pytest.fixture
def hub() -> Iterator[UploadHub]:
    with upload_hub() as hub:
        yield hub


def card_on(hub: UploadHub, branch: str = "main") -> ModelCard:
    return ModelCard(hub.branches[REPO][branch]["README.md"].decode())


def rows_of(text: str, section: str) -> list[dict[str, str]]:
    """The tables of a section, as one dictionary a row."""
    rows: list[dict[str, str]] = []
    titles: list[str] | None = None
    for line in text.split(f"## {section}\n")[1].split("\n## ")[0].splitlines():
        cells = [cell.strip(" `") for cell in line.strip("|").split(" | ")] if line.startswith("|") else None
        if cells is None:
            titles = None
        elif titles is None:
            titles = cells
        elif set(cells[0]) != {"-"}:
            rows.append(dict(zip(titles, cells, strict=True)))
    return rows


# What arrives


def test_what_was_uploaded_is_the_sae(hub: UploadHub, tmp_path: Path) -> None:
    sae = training_sae("batchtopk", {**COMPLETE, "objective": E2E_DS})
    folder = save_for_neuronpedia(inference_sae("gated"), tmp_path / "gated", frequency=torch.full((D_SAE,), 0.01))
    saes = {"layer_1/e2e_ds": sae, "gated": folder}
    url = upload_to_hub(saes, REPO, evaluations={"layer_1/e2e_ds": Measured()})

    assert url == f"{hub.url}/{REPO}"
    assert sorted(hub.branches[REPO]["main"]) == [
        "README.md",
        "gated/cfg.json",
        "gated/sae_weights.safetensors",
        "gated/sparsity.safetensors",
        "layer_1/e2e_ds/cfg.json",
        "layer_1/e2e_ds/evaluation.json",
        "layer_1/e2e_ds/sae_weights.safetensors",
    ]
    received = hub.write(REPO, tmp_path / "received")
    uploaded = SAE.load_from_disk(received / "layer_1" / "e2e_ds")
    expected = SAE.load_from_disk(save_for_neuronpedia(sae, tmp_path / "expected"))
    features, output = features_and_output(expected, activations())
    assert torch.equal(uploaded.encode(activations()), features)
    assert torch.equal(uploaded(activations()), output)
    gated = SAE.load_from_disk(received / "gated")
    assert torch.equal(gated(activations()), inference_sae("gated")(activations()))
    assert (received / "gated/sparsity.safetensors").read_bytes() == (folder / "sparsity.safetensors").read_bytes()
    evaluation = json.loads((received / "layer_1/e2e_ds/evaluation.json").read_text())
    assert evaluation == Measured().to_dict()
    assert len(hub.lfs) == 3, "weights go through large file storage"
    messages = [commit.message for commit in hub.commits]
    assert messages == ["Upload SAE layer_1/e2e_ds", "Upload SAE gated", "Model card and evaluations"]


def test_it_is_loaded_as_the_card_says(hub: UploadHub) -> None:
    upload_to_hub({"a/b": inference_sae("jumprelu")}, REPO)
    program = card_on(hub).text.split("```python")[1].split("```")[0]
    assert f'SAE.from_pretrained("{REPO}", "a/b")' in program
    names: dict[str, Any] = {}
    exec(program.replace("SAE.from_pretrained", "sae = SAE.from_pretrained"), names)
    assert torch.equal(names["sae"](activations()), inference_sae("jumprelu")(activations()))


def test_a_run_of_ours_is_uploaded_from_its_folder(hub: UploadHub, tmp_path: Path) -> None:
    cfg = runner_config(dataset_path="me/stories", model_name="gpt2-small", output_path=str(tmp_path / "run"))
    trained = make_runner(cfg).run()
    upload_to_hub({"run": str(tmp_path / "run")}, REPO)
    received = hub.write(REPO, tmp_path / "received") / "run"
    loaded = SAE.load_from_disk(received)
    assert torch.allclose(loaded(activations()), trained(activations()), atol=1e-6)
    for name in ("sparsity.safetensors", "runner_cfg.json"):
        assert (received / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    (row,) = rows_of(card_on(hub).text, "SAEs")
    assert row["objective"] == "e2e_ds"
    assert "kl_coefficient = 0.5" in row["coefficients"]
    assert "l1_coefficient = 0.02" in row["coefficients"]


def test_the_callers_saes_are_as_they_were(hub: UploadHub) -> None:  # noqa: ARG001
    sae = training_sae("topk")
    before = (sae.cfg.to_dict(), {name: tensor.clone() for name, tensor in sae.state_dict().items()})
    upload_to_hub({"a": sae}, REPO, evaluations={"a": Measured()})
    assert sae.cfg.to_dict() == before[0]
    assert all(torch.equal(sae.state_dict()[name], before[1][name]) for name in before[1])


@pytest.mark.parametrize(("private", "visibility"), [(True, "private"), (False, "public"), (None, None)])
def test_a_repository_is_made_as_private_as_wanted(
    hub: UploadHub, private: bool | None, visibility: str | None
) -> None:
    upload_to_hub({"a": inference_sae("standard")}, REPO, private=private)
    assert hub.visibility[REPO] == visibility


def test_a_branch_is_made(hub: UploadHub) -> None:
    hub.make(REPO, {"README.md": b"theirs, on main"})
    url = upload_to_hub({"a": inference_sae("standard")}, REPO, revision="v2", write_card=False)
    assert url == f"{hub.url}/{REPO}/tree/v2"
    assert hub.branches[REPO]["main"] == {"README.md": b"theirs, on main"}
    assert "a/cfg.json" in hub.branches[REPO]["v2"]
    upload_to_hub({"b": inference_sae("standard")}, REPO, revision="v2", write_card=False)
    assert {"a/cfg.json", "b/cfg.json"} <= hub.branches[REPO]["v2"].keys()


# Uploading again


def test_the_card_covers_what_was_uploaded_before_with_its_figures(hub: UploadHub) -> None:
    upload_to_hub({"b": training_sae("topk")}, REPO, evaluations={"b": Measured(0.5)})
    upload_to_hub({"a": inference_sae("gated")}, REPO, evaluations={"a": Measured(0.25)})
    text = card_on(hub).text
    assert [(row["SAE"], row["architecture"]) for row in rows_of(text, "SAEs")] == [("a", "gated"), ("b", "topk")]
    assert rows_of(text, "Figures")[0] == {"figure": "CE loss increase (nats)", "a": "0.25", "b": "0.5"}
    assert text.count(MARK) == 1


def test_an_sae_that_is_replaced_leaves_nothing_of_its_own_behind(hub: UploadHub, tmp_path: Path) -> None:
    first = save_for_neuronpedia(inference_sae("gated"), tmp_path / "gated", frequency=torch.zeros(D_SAE))
    upload_to_hub({"a": first, "b": inference_sae("topk")}, REPO, evaluations={"a": Measured(), "b": Measured()})
    upload_to_hub({"a": inference_sae("jumprelu")}, REPO)
    assert sorted(hub.branches[REPO]["main"]) == [
        "README.md",
        "a/cfg.json",
        "a/sae_weights.safetensors",
        "b/cfg.json",
        "b/evaluation.json",
        "b/sae_weights.safetensors",
    ]
    assert rows_of(card_on(hub).text, "Figures")[0].keys() == {"figure", "b"}


def test_figures_are_replaced(hub: UploadHub) -> None:
    for increase in (0.5, 0.25):
        upload_to_hub({"a": inference_sae("gated")}, REPO, evaluations={"a": Measured(increase)})
    assert json.loads(hub.branches[REPO]["main"]["a/evaluation.json"])["ce_loss_increase"] == 0.25
    assert rows_of(card_on(hub).text, "Figures")[0] == {"figure": "CE loss increase (nats)", "a": "0.25"}


@pytest.mark.parametrize(
    "theirs", [b"# My SAEs\n", b"---\nlibrary_name: saelens\n---\n\n# SAEs for use with SAELens\n"]
)
def test_a_readme_that_is_not_ours_is_left_alone(hub: UploadHub, theirs: bytes) -> None:
    hub.make(REPO, {"README.md": theirs})
    with pytest.raises(FileExistsError, match=r"me/stories-saes has a README.md .* pass write_card=False to keep it"):
        upload_to_hub({"a": inference_sae("standard")}, REPO)
    assert hub.changes == []
    upload_to_hub({"a": inference_sae("standard")}, REPO, write_card=False, evaluations={"a": Measured()})
    assert hub.branches[REPO]["main"]["README.md"] == theirs
    assert "a/evaluation.json" in hub.branches[REPO]["main"]


def test_a_card_of_ours_that_somebody_made_their_own_is_left_alone(hub: UploadHub) -> None:
    upload_to_hub({"a": inference_sae("standard")}, REPO)
    files = hub.branches[REPO]["main"]
    files["README.md"] = files["README.md"].replace(MARK.encode(), b"") + b"My own words.\n"
    with pytest.raises(FileExistsError, match=r"README\.md"):
        upload_to_hub({"a": inference_sae("standard")}, REPO)
    assert files["README.md"].endswith(b"My own words.\n")


# What is refused, before anything is uploaded


def test_what_is_missing_is_named_for_every_sae_before_anything_is_uploaded(hub: UploadHub, tmp_path: Path) -> None:
    incomplete = {name: value for name, value in COMPLETE.items() if name != "dataset_path"}
    folder = tmp_path / "folder"
    inference_sae("standard", {}).save_model(folder)
    saes = {"good": inference_sae("standard"), "bad": inference_sae("standard", incomplete), "folder": folder}
    with pytest.raises(
        ValueError, match=r"^bad: .* no dataset_path; .*; folder: .* no model_name, hook_name, "
    ) as raised:
        upload_to_hub(saes, REPO)
    assert "\n" not in str(raised.value)
    assert hub.requests == []


def test_folders_that_hold_no_sae(hub: UploadHub, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a: .*nowhere' has no cfg.json"):
        upload_to_hub({"a": tmp_path / "nowhere"}, REPO)
    folder = save_for_neuronpedia(inference_sae("standard"), tmp_path / "sae")
    weights = (folder / "sae_weights.safetensors").read_bytes()
    (folder / "sae_weights.safetensors").write_bytes(weights[:100])
    with pytest.raises(
        ValueError, match=r"a: .*sae' cannot be loaded as an inference SAE of SAELens \(SafetensorError"
    ):
        upload_to_hub({"a": folder}, REPO)
    shutil.rmtree(folder)
    training_sae("batchtopk").save_model(folder)
    with pytest.raises(ValueError, match=r"cannot be loaded as an inference SAE of SAELens \(KeyError: 'batchtopk'\)"):
        upload_to_hub({"a": folder}, REPO)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("saes", "repo_id", "evaluated", "message"),
    [
        ([], REPO, [], "nothing to upload"),
        (["a"], "stories", [], r"repo_id='stories' has no owner; make it 'owner/stories'"),
        (["a"], "me/../you", [], "me/../you"),
        (["../a"], REPO, [], r"SAE id '../a' cannot be a folder"),
        (["/a"], REPO, [], r"SAE id '/a' cannot be a folder"),
        (["a b"], REPO, [], r"SAE id 'a b' cannot be a folder"),
        ([""], REPO, [], r"SAE id '' cannot be a folder"),
        (["a"], REPO, ["b", "c"], r"evaluations of b, c: no such SAE is uploaded; there are a"),
    ],
)
def test_names_that_cannot_be(
    hub: UploadHub, saes: list[str], repo_id: str, evaluated: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        upload_to_hub(
            {sae_id: inference_sae("standard") for sae_id in saes},
            repo_id,
            evaluations={sae_id: Measured() for sae_id in evaluated},
        )
    assert hub.requests == []


def test_without_the_right_to_write_nothing_arrives(hub: UploadHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    with pytest.raises(Exception, match="401"):
        upload_to_hub({"a": inference_sae("standard")}, REPO)
    assert hub.branches == {}


# The card


def config(architecture: str = "standard", **metadata: Any) -> dict[str, Any]:
    return training_sae(architecture, {**COMPLETE, **metadata}).cfg.get_inference_sae_cfg_dict()


def test_the_card_is_one_that_the_hub_reads(tmp_path: Path) -> None:
    saes = {"a": config(), "b": config(model_name="tiny-stories-1M", dataset_path="stories.jsonl")}
    (tmp_path / "README.md").write_text(model_card(REPO, saes))
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert data == {
        "library_name": "saelens",
        "tags": ["sparse-autoencoder", "mechanistic-interpretability", "sae-lens-e2e"],
        "base_model": ["gpt2", "roneneldan/TinyStories-1M"],
        "datasets": ["NeelNanda/pile-10k"],
    }


@pytest.mark.parametrize("name", ["embedded", "/home/me/models/mine", "./mine", "data/train.jsonl", ""])
def test_names_that_are_none_on_the_hub_are_not_claimed_to_be(name: str) -> None:
    data = ModelCard(model_card(REPO, {"a": config(model_name=name, dataset_path=name)})).data.to_dict()
    assert data.keys() == {"library_name", "tags"}


def test_the_card_states_objective_coefficients_and_hook() -> None:
    saes = {
        "a": config("batchtopk", objective=E2E_DS),
        "b": config("standard", objective={"name": "local", "mse_coefficient": 1.0}, finetuned_from="gpt2-small/6-res"),
    }
    first, second = rows_of(model_card(REPO, saes), "SAEs")
    assert first["SAE"] == "a"
    assert first["architecture"] == "jumprelu (trained as batchtopk)"
    assert (first["d_in"], first["d_sae"], first["hook"]) == ("16", "40", "blocks.1.hook_resid_pre")
    assert first["objective"] == "e2e_ds"
    assert first["coefficients"] == (
        "kl_coefficient = 0.5, downstream_coefficient = 2.5, downstream_hooks = blocks.2.hook_resid_pre, "
        "mse_coefficient = 0, aux_loss_coefficient = 1, k = 7"
    )
    assert first["finetuned from"] == "—"
    assert (second["architecture"], second["objective"]) == ("standard", "local")
    assert "l1_coefficient = 1, lp_norm = 1" in second["coefficients"]
    assert second["finetuned from"] == "gpt2-small/6-res"


def test_the_card_states_an_sae_of_apollos_as_its_metadata_do() -> None:
    """Whose coefficients are its own run's, and not those of an architecture of SAELens."""
    sae = inference_sae("standard", {**COMPLETE, "objective": E2E_DS, "sparsity": {"p_norm": 1.0, "coeff": 1.5}})
    (row,) = rows_of(model_card(REPO, {"a": sae.cfg.to_dict()}), "SAEs")
    assert row["coefficients"].endswith("sparsity.p_norm = 1, sparsity.coeff = 1.5")


def test_the_card_states_the_data() -> None:
    processing = {"center_writing_weights": True, "fold_ln": True}
    saes = {
        "a": config(model_from_pretrained_kwargs=processing, context_size=1024, prepend_bos=True),
        "b": config(seqpos_slice=[2, None], exclude_special_tokens=[0, 5]),
    }
    first, second = rows_of(model_card(REPO, saes), "Data")
    assert first["language model"] == "gpt2-small"
    assert first["loaded with"] == "center_writing_weights = yes, fold_ln = yes"
    assert first["dataset"] == "NeelNanda/pile-10k"
    assert (first["context size (tokens)"], first["BOS prepended"]) == ("1,024", "yes")
    assert (first["positions"], first["tokens left out"]) == ("—", "—")
    assert (second["positions"], second["tokens left out"], second["BOS prepended"]) == ("2:", "0 5", "no")


def test_the_card_states_every_figure_that_is_a_number() -> None:
    evaluations = {"a": Measured().to_dict(), "b": {"kl": 0.5}}
    *numbers, downstream = rows_of(model_card(REPO, {"a": config(), "b": config()}, evaluations), "Figures")
    assert numbers == [
        {"figure": "CE loss increase (nats)", "a": "0.1812", "b": "—"},
        {"figure": "KL divergence (nats)", "a": "0.25", "b": "0.5"},
        {"figure": "L0", "a": "12.7", "b": "—"},
        {"figure": "alive features", "a": "31", "b": "—"},
        {"figure": "tokens evaluated", "a": "110,592", "b": "—"},
        {"figure": "own_figure", "a": "3", "b": "—"},
    ]
    assert downstream == {"SAE": "a", "blocks.2.hook_resid_pre": "0.2", "blocks.2.hook_resid_post": "0.3"}


def test_the_card_states_what_evaluate_measures() -> None:
    model, tokens = random_model(), dataset_of(random_tokens(8, 12, 61))
    sae = inference_sae("standard")
    evaluation = evaluate(sae, model, tokens, batch_size_prompts=4)
    rows = rows_of(model_card(REPO, {"a": sae.cfg.to_dict()}, {"a": evaluation.to_dict()}), "Figures")
    figures = {row["figure"]: row["a"] for row in rows if "figure" in row}
    assert float(figures["CE loss increase (nats)"]) == pytest.approx(evaluation.ce_loss_increase, rel=1e-3)
    assert float(figures["KL divergence (nats)"]) == pytest.approx(evaluation.kl, rel=1e-3)
    assert float(figures["L0"]) == pytest.approx(evaluation.l0, rel=1e-3)
    assert figures["alive features"] == str(evaluation.n_alive)
    assert figures["tokens evaluated"] == "96"
    assert "d_sae" not in figures
    layers = {row["at"]: float(row["MSE (squared activation)"]) for row in rows if "figure" not in row}
    assert layers.keys() == evaluation.layers.keys()
    assert all(layers[hook] == pytest.approx(evaluation.layers[hook].mse, rel=1e-3) for hook in layers)


def test_the_card_of_saes_without_figures_or_metadata() -> None:
    text = model_card(REPO, {"a": {"architecture": "standard", "d_in": 16, "d_sae": 40}})
    assert "## Figures" not in text
    assert "## Data" not in text
    assert rows_of(text, "SAEs") == [{"SAE": "a", "architecture": "standard", "d_in": "16", "d_sae": "40"}]
    assert "https://arxiv.org/abs/2405.12241" in text
    assert "None" not in text


def test_nothing_in_the_metadata_breaks_the_tables() -> None:
    (row,) = rows_of(model_card(REPO, {"a": config(dataset_path="a|b")}), "Data")
    assert row["dataset"] == "a\\|b"
