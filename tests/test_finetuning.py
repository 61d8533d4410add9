"""Finetuning SAEs from wherever they are: what is trained, what is held, what is recorded, and what is refused."""

import copy
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from sae_lens import SAE, LoggingConfig, TrainingSAE
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from transformer_lens import HookedTransformer

from sae_lens_e2e import (
    E2E,
    BatchTopKTrainingTranscoderConfig,
    E2EMultiRunnerConfig,
    E2EMultiTrainingRunner,
    E2ERunnerConfig,
    E2ETrainingRunner,
    Stage,
    embedded,
    finetune,
)
from sae_lens_e2e.cli import main
from sae_lens_e2e.cli.finetune import parse_finetune
from sae_lens_e2e.evaluation import Evaluation, evaluate, evaluate_together
from sae_lens_e2e.finetuning.folding import fold_centring, fold_scale
from sae_lens_e2e.finetuning.holding import POWER, balanced_coefficients, calibrate_thresholds, hold_l0
from sae_lens_e2e.finetuning.settings import run_settings
from sae_lens_e2e.loading import load_documents
from sae_lens_e2e.publishing.model_card import model_card
from tests.models import dataset_of, random_model, random_tokens
from tests.saes import COMPLETE, activations, inference_sae, training_sae
from tests.servers import hub
from tests.test_released import files, weights_asked_for
from tests.training import make_runner, runner_config

CONTEXT = 256
QUICK: dict[str, Any] = {
    "train_batch_size_tokens": 2 * CONTEXT,
    "training_tokens": 8 * CONTEXT,
    "evaluation_tokens": 4 * CONTEXT,
    "checkpoint_path": None,
    "verbose": False,
}
OF_EMBEDDED: dict[str, Any] = {
    "model_name": "embedded",
    "hook_name": embedded.HOOK_NAME,
    "dataset_path": "embedded",
    "context_size": CONTEXT,
    "prepend_bos": False,
}


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return embedded.load_model()


def sae_at(hook_name: str = embedded.HOOK_NAME, architecture: str = "standard", **settings: Any) -> SAE[Any]:
    """An SAE of random weights on the embedded model."""
    return inference_sae(architecture, {**OF_EMBEDDED, "hook_name": hook_name}, d_in=64, d_sae=96, **settings)


def locally_trained(model: HookedTransformer, architecture: str, folder: Path, **settings: Any) -> Path:
    """An SAE that was trained a little, without an objective but its reconstruction."""
    documents, _ = load_documents("embedded")
    cfg = E2ERunnerConfig(
        sae=SAE_TRAINING_CLASS_REGISTRY[architecture][1](d_in=64, d_sae=128, **settings),
        objective="local",
        **OF_EMBEDDED,
        store_batch_size_prompts=2,
        train_batch_size_tokens=2 * CONTEXT,
        training_tokens=150 * 2 * CONTEXT,
        lr=5e-3,
        output_path=str(folder),
        checkpoint_path=None,
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
    )
    E2ETrainingRunner(cfg, override_dataset=documents, override_model=model, held_out=0.1).run()
    return folder


# What it does


def test_transcoders_go_on_together_in_stages_from_where_they_read_to_where_they_write(
    model: HookedTransformer, tmp_path: Path
) -> None:
    documents, _ = load_documents("embedded")
    places = {
        f"mlp{block}": (f"blocks.{block}.ln2.hook_normalized", f"blocks.{block}.hook_mlp_out") for block in (2, 3)
    }
    cfg = E2EMultiRunnerConfig(
        saes={name: BatchTopKTrainingTranscoderConfig(d_in=64, d_out=64, d_sae=96, k=8) for name in places},
        objective="local",
        hook_names={name: read for name, (read, _) in places.items()},
        hook_names_out={name: write for name, (_, write) in places.items()},
        **{name: value for name, value in OF_EMBEDDED.items() if name != "hook_name"},
        store_batch_size_prompts=2,
        train_batch_size_tokens=2 * CONTEXT,
        training_tokens=20 * 2 * CONTEXT,
        lr=5e-3,
        output_path=str(tmp_path / "apart"),
        checkpoint_path=None,
        logger=LoggingConfig(log_to_wandb=False),
    )
    E2EMultiTrainingRunner(cfg, override_dataset=documents, override_model=model, held_out=0.1).run()
    objective = [Stage("local", until=0.5), Stage(E2E(splices=("all", "each_alone")))]
    done = finetune(
        *(tmp_path / "apart" / name for name in places),
        output_path=tmp_path / "together",
        objective=objective,
        override_model=model,
        **{field: value for field, value in QUICK.items() if field != "verbose"},
    )
    for name, (read, write) in places.items():
        (saved,) = [sae for sae in done.saes.values() if sae.cfg.metadata.hook_name == read]
        assert (saved.cfg.architecture(), saved.cfg.metadata.hook_name_out) == ("jumprelu_transcoder", write)
        (was,) = [sae for sae in done.sources.values() if sae.cfg.metadata.hook_name == read]
        assert not torch.equal(saved.W_dec, was.W_dec), name
    assert done.together_after is not None


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("standard", {"l1_coefficient": 1.0}),
        ("batchtopk", {"k": 16}),
        ("jumprelu", {"l0_coefficient": 0.1, "jumprelu_init_threshold": 0.1}),
    ],
)
def test_it_costs_the_model_less_at_the_l0_it_had(
    architecture: str, settings: dict[str, Any], model: HookedTransformer, tmp_path: Path
) -> None:
    source = locally_trained(model, architecture, tmp_path / "local", **settings)
    amounts = {"training_tokens": 30 * 2 * CONTEXT, "lr": 3e-3, "evaluation_tokens": 24 * CONTEXT}
    result = finetune(source, override_model=model, output_path=tmp_path / "out", **{**QUICK, **amounts})
    (before,), (after,), (sae,) = result.before.values(), result.after.values(), result.saes.values()
    assert after.kl < 0.95 * before.kl
    assert after.l0 == pytest.approx(before.l0, rel=0.04)
    assert after == evaluated(SAE.load_from_disk(tmp_path / "out"), model, amounts["evaluation_tokens"])
    assert sae.cfg.metadata.training_architecture == architecture


def evaluated(sae: SAE[Any], model: HookedTransformer, max_tokens: int) -> Evaluation:
    held_out = load_documents("embedded")[1]
    return evaluate(sae, model, held_out, max_tokens=max_tokens, batch_size_prompts=2)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [("abstopk", {"k": 7}), ("gated", {}), ("matching_pursuit", {"max_iterations": 6})],
)
def test_every_architecture_is_trained_and_saved_as_what_it_was(
    architecture: str, settings: dict[str, Any], model: HookedTransformer, tmp_path: Path
) -> None:
    sae = sae_at(architecture=architecture, **settings)
    before = copy.deepcopy(sae.state_dict())
    result = finetune(sae, override_model=model, output_path=tmp_path / "out", lr=1e-3, **QUICK)
    saved = SAE.load_from_disk(tmp_path / "out")
    assert type(saved) is type(sae)
    assert not torch.equal(saved.W_dec, sae.W_dec)
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items()), "the caller's SAE"
    said = (
        "held by construction, k = 7"
        if "topk" in architecture
        else "held at"
        if architecture == "gated"
        else "not held"
    )
    assert sum(f"after: {said}" in note for note in result.notes) == 1


def test_thresholds_stay_where_they_are_if_asked(model: HookedTransformer, tmp_path: Path) -> None:
    sae: Any = sae_at(architecture="jumprelu")
    for thresholds in ("stay", "move"):
        out = tmp_path / thresholds
        finetune(sae, thresholds=thresholds, override_model=model, output_path=out, lr=1e-3, **QUICK)  # pyright: ignore[reportArgumentType]
        saved: Any = SAE.load_from_disk(out)
        assert torch.equal(saved.threshold, sae.threshold) == (thresholds == "stay")
        assert not torch.equal(saved.W_enc, sae.W_enc)


def test_several_are_trained_together_and_each_is_saved(model: HookedTransformer, tmp_path: Path) -> None:
    late, early = sae_at("blocks.4.hook_resid_pre", "topk"), sae_at("blocks.2.hook_resid_pre")
    late.save_model(tmp_path / "late")
    result = finetune(
        tmp_path / "late", early, override_model=model, output_path=tmp_path / "out", lr=1e-3, **several()
    )
    names = ["blocks.4.hook_resid_pre", "blocks.2.hook_resid_pre"]
    assert list(result.saes) == names
    for name, source in zip(names, (str(tmp_path / "late"), early.get_name()), strict=True):
        metadata = SAE.load_from_disk(tmp_path / "out" / name).cfg.metadata
        assert metadata.finetuned_from == metadata.finetuning["source"] == source
        assert set(metadata.companions) == set(names) - {name}
    held_out = load_documents("embedded")[1]
    options = {"max_tokens": QUICK["evaluation_tokens"], "batch_size_prompts": 2}
    saved = {name: SAE.load_from_disk(tmp_path / "out" / name) for name in names}
    assert result.together_after == evaluate_together(saved, model, held_out, **options)
    assert result.together_before == evaluate_together(result.sources, model, held_out, **options)
    header, *rows = result.table().splitlines()
    columns = [cell.strip() for cell in header.strip("|").split("|")][1:]
    assert columns == [f"{name} {when}" for name in (*names, "all together") for when in ("before", "after")]
    assert sum("L0" in row for row in rows) == 1
    # What came out goes on as it is: a folder of several.
    again = finetune(tmp_path / "out", override_model=model, output_path=None, lr=1e-3, **several())
    assert list(again.saes) == names


def several() -> dict[str, Any]:
    return {name: value for name, value in QUICK.items() if name != "verbose"}


# What it goes by


def test_the_recipe_and_what_the_metadata_say(model: HookedTransformer, tmp_path: Path) -> None:
    sae = inference_sae("topk", {**OF_EMBEDDED, "seqpos_slice": [2, None]}, d_in=64, d_sae=96)
    sae.save_model(tmp_path / "sae")
    # 5 % of this, in whole batches of 16 prompts with 254 tokens each.
    (tmp_path / "sae" / "runner_cfg.json").write_text(json.dumps({"training_tokens": 100_000}))
    finetune(tmp_path / "sae", override_model=model, output_path=tmp_path / "out", evaluation_tokens=5000)
    ran = json.loads((tmp_path / "out" / "runner_cfg.json").read_text())
    assert ran["objective"]["name"] == "kl_mse"
    assert (ran["lr"], ran["max_grad_norm"]) == (5e-5, 1.0)
    assert (ran["lr_scheduler_name"], ran["lr_warm_up_steps"], ran["lr_decay_steps"]) == ("constant", 0, 1)
    assert (ran["train_batch_size_tokens"], ran["store_batch_size_prompts"]) == (16 * 254, 16)
    assert ran["training_tokens"] == 16 * 254
    assert ran["seqpos_slice"] == [2, None]
    assert {name: ran[name] for name in OF_EMBEDDED} == OF_EMBEDDED
    assert not ran["logger"]["log_to_wandb"]


def test_the_learning_rate_falls_to_nothing(model: HookedTransformer) -> None:
    settings = run_settings({"sae": sae_at()}, {"training_tokens": 10 * 512, "train_batch_size_tokens": 512}, None)
    cfg = E2ERunnerConfig(sae=training_sae("standard", d_in=64).cfg, **{**settings, "hook_name": embedded.HOOK_NAME})
    scheduler = E2ETrainingRunner(cfg, embedded.load_dataset(), model).make_trainer().lr_scheduler
    rates = []
    for _ in range(10):
        rates.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    falling = [5e-5 * (10 - step) / 10 for step in range(10)]
    if Version(torch.__version__) < Version("2.10"):
        # PyTorch's SequentialLR used to begin a step late.
        falling = [5e-5, *falling[:-1]]
    assert rates == pytest.approx(falling)
    assert run_settings({"sae": sae_at()}, {}, None)["training_tokens"] == 25_000_000 // 4096 * 4096


def test_what_is_recorded(tmp_path: Path, model: HookedTransformer) -> None:
    sae = inference_sae("standard", {**OF_EMBEDDED, "neuronpedia_id": "stories/3-res"}, d_in=64, d_sae=96)
    content = files(sae, tmp_path / "files", "me/mine/late")
    with hub(content) as server:
        result = finetune(
            "me/mine:late", override_model=model, output_path=tmp_path / "out", objective="e2e", lr=1e-3, **QUICK
        )
        commit = server.commit
    metadata = json.loads((tmp_path / "out" / "cfg.json").read_text())["metadata"]
    assert (metadata["finetuned_from"], metadata["neuronpedia_id"]) == ("me/mine:late", None)
    recorded = metadata["finetuning"]
    (before,) = result.before.values()
    expected = {
        "source": "me/mine:late",
        "revision": commit,
        "neuronpedia_id": "stories/3-res",
        "trained_as": "standard",
        "objective": "e2e",
        "training_tokens": QUICK["training_tokens"],
        "lr": 1e-3,
        "l0_before": before.l0,
    }
    assert {name: recorded[name] for name in expected} == expected
    readme = (tmp_path / "out" / "README.md").read_text()
    assert all(said in readme for said in ("`me/mine:late`", commit, result.table()))
    found = json.loads((tmp_path / "out" / "finetuning.json").read_text())
    assert Evaluation.from_dict(found["before"]) == before
    card = model_card("me/new", {"late": json.loads((tmp_path / "out" / "cfg.json").read_text())})
    assert "## Finetuning" in card
    assert commit in card
    assert any("is not known" in note for note in result.notes)


# Normalisation and processed models


def test_a_scale_that_is_not_in_the_sae_is_estimated_and_folded_in(model: HookedTransformer) -> None:
    """As SAELens does it when it trains: sqrt(d_in) / E‖x‖."""
    sae = sae_at(normalize_activations="expected_average_only_in")
    tokens = torch.tensor(embedded.load_dataset().select(range(32))["input_ids"])
    x = model.run_with_cache(tokens, names_filter=embedded.HOOK_NAME)[1][embedded.HOOK_NAME]
    scale = 64**0.5 / float(x.norm(dim=-1).mean())
    result = finetune(sae, override_model=model, output_path=None, lr=1e-3, **QUICK)
    (before,) = result.sources.values()
    assert before.cfg.normalize_activations == "none"
    assert torch.allclose(before.W_enc, sae.W_enc * scale, rtol=1e-4)
    assert f"estimated as {scale:.4g}" in " ".join(result.notes)
    assert next(iter(result.saes.values())).cfg.normalize_activations == "none"


def test_a_scale_is_folded_so_that_what_comes_out_is_in_the_activations_own_scale() -> None:
    sae, x = inference_sae("standard", normalize_activations="expected_average_only_in"), activations()
    scale = 16**0.5 / float(x.norm(dim=-1).mean())
    expected = copy.deepcopy(sae)(x * scale) / scale
    fold_scale(sae, [x])
    assert torch.allclose(sae(x), expected, atol=1e-4)


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
def test_the_centring_of_a_processed_model_is_folded_in(architecture: str, apply_b_dec_to_input: bool) -> None:
    """On an activation the SAE does what it did on that activation less its mean over d_model."""
    kwargs = {"center_writing_weights": True, "fold_ln": True, "dtype": "float32"}
    metadata = {**COMPLETE, "model_from_pretrained_kwargs": kwargs}
    sae = inference_sae(architecture, metadata, apply_b_dec_to_input=apply_b_dec_to_input)
    x = activations() + 0.8
    expected = sae.encode(x - x.mean(-1, keepdim=True))
    assert not torch.allclose(sae.encode(x), expected, atol=1e-3)
    assert "folded" in str(fold_centring(sae))
    assert torch.allclose(sae.encode(x), expected, atol=1e-4)
    assert sae.cfg.metadata.model_from_pretrained_kwargs == {"dtype": "float32"}
    assert sae.cfg.metadata.centring_folded


@pytest.mark.parametrize(
    ("metadata", "settings"),
    [
        ({"hook_name": "blocks.1.attn.hook_z"}, {}),
        ({"model_name": "somebody/unknown"}, {}),
        ({}, {"normalize_activations": "constant_norm_rescale"}),
    ],
)
def test_what_cannot_be_folded_stays_on_the_processed_model(metadata: dict[str, Any], settings: dict[str, Any]) -> None:
    kwargs = {"center_writing_weights": True}
    sae = inference_sae("standard", {**COMPLETE, "model_from_pretrained_kwargs": kwargs, **metadata}, **settings)
    before = sae.W_enc.clone()
    assert fold_centring(sae) is None
    assert torch.equal(sae.W_enc, before)
    assert sae.cfg.metadata.model_from_pretrained_kwargs == kwargs
    with pytest.raises(ValueError, match=r"fold_centring=True: what processing changes at .* cannot be folded"):
        fold_centring(sae, wanted=True)


# Holding L0


def test_the_penalty_grows_with_l0() -> None:
    sae = training_sae("standard", l1_coefficient=0.4)
    x = activations()
    plain, l0 = losses(sae, x), float((sae.encode(x) != 0).float().sum(-1).mean())
    hold_l0(sae, 1.1 * l0)
    held = losses(sae, x)
    assert held["l1_loss"] == pytest.approx(plain["l1_loss"] * (1 / 1.1) ** POWER, rel=1e-5)
    assert held["mse_loss"] == plain["mse_loss"]


def losses(sae: TrainingSAE[Any], x: torch.Tensor) -> dict[str, float]:
    from sae_lens.saes.sae import TrainStepInput

    coefficients: Any = {"l1": sae.cfg.l1_coefficient}
    given = TrainStepInput(x, coefficients, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False)
    return {name: float(value) for name, value in sae.training_forward_pass(given).losses.items()}


def test_the_balanced_coefficient_leaves_the_penalty_as_it_is() -> None:
    """Against gradients of the two by hand: of SAELens' reconstruction, and of λ Σ f ‖W_dec‖."""
    tokens = [random_tokens(4, 12, 61, seed=seed) for seed in (5, 6)]
    groups = []
    for coefficient in (0.0, 1.0):
        sae = training_sae("standard", l1_coefficient=coefficient)
        cfg = runner_config(sae=sae.cfg, objective="local")
        groups.append(make_runner(cfg, random_model(), dataset_of(torch.cat(tokens)), sae).make_group())
    before = copy.deepcopy(groups[0].first.sae.state_dict())
    (found,) = balanced_coefficients(groups[0], groups[1], tokens).values()

    sae: Any = training_sae("standard")
    g = h = torch.zeros(())
    for prompts in tokens:
        x = random_model().run_with_cache(prompts)[1]["blocks.1.hook_resid_pre"].flatten(0, 1).detach()
        f = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
        mse = (f @ sae.W_dec + sae.b_dec - x).square().sum(-1).mean()
        l1 = (f * sae.W_dec.norm(dim=1)).sum(-1).mean()
        parameters = [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec]
        g = g + flat(torch.autograd.grad(mse, parameters, retain_graph=True))
        h = h + flat(torch.autograd.grad(l1, parameters, allow_unused=True))
    expected = float(-(g * h).sum() / h.square().sum())
    assert found == pytest.approx(max(expected, 0), rel=1e-3)
    assert expected != 0
    assert all(torch.equal(value, before[name]) for name, value in groups[0].first.sae.state_dict().items())


def flat(gradients: Any) -> torch.Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("architecture", ["batchtopk", "jumprelu"])
def test_thresholds_are_scaled_until_as_many_fire(architecture: str, tmp_path: Path) -> None:
    sae: Any = training_sae(architecture)
    if architecture == "batchtopk":
        sae.topk_threshold.fill_(1.0)
    source, x = inference_sae("standard"), activations(256)
    n_before = int((source.encode(x) != 0).sum())
    calibrate_thresholds(sae, source, [x])
    sae.save_inference_model(tmp_path)
    assert int((SAE.load_from_disk(tmp_path).encode(x) != 0).sum()) == pytest.approx(n_before, abs=1)


# What is refused


@pytest.mark.parametrize(
    ("sae", "message"),
    [
        ({"model_name": None}, "metadata name no model_name; say which, with model_name= "),
        ({"hook_name": None}, "metadata name no hook_name; say which, with hook_name= "),
        ({"dataset_path": None}, "metadata name no dataset_path"),
        ({"context_size": None}, "metadata name no context_size"),
        ({"model_from_pretrained_kwargs": {"trust_remote_code": True}}, "may run code that comes with the model"),
    ],
)
def test_what_the_metadata_lack_or_may_not_say(sae: dict[str, Any], message: str, tmp_path: Path) -> None:
    given = {key: value for key, value in {**OF_EMBEDDED, **sae}.items() if value is not None}
    refused(message, tmp_path, inference_sae("standard", given))


def refused(message: str, tmp_path: Path, *sources: Any, **settings: Any) -> None:
    """Before any long work, in one line, and nothing is left."""
    out = tmp_path / "out"
    with pytest.raises((ValueError, OSError), match=message) as raised:
        finetune(*sources, output_path=settings.pop("output_path", out), **settings)
    assert "\n" not in str(raised.value)
    assert not out.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lrr": 1e-3}, "lrr=0.001 is no setting of a finetune; did you mean lr?"),
        ({"l0_coefficient": 1.0}, "l0_coefficient=1.0 is no setting of 'standard'"),
        ({"d_sae": 3}, "d_sae=3: the SAE has d_sae=96 already"),
        ({"architecture": "topk"}, "architecture='topk' does not compute what 'standard' does"),
        ({"thresholds": "stay"}, "thresholds='stay' is for 'jumprelu'"),
        ({"thresholds": "stays"}, "thresholds='stays' must be 'move' or 'stay'"),
        ({"objective": "kl_ms"}, "kl_ms"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"context_size": "long"}, "context_size='long' must be an integer"),
        ({"train_batch_size_tokens": 300}, "train_batch_size_tokens=300"),
        ({"held_out": 0}, "held_out=0 leaves no documents"),
        ({"held_out": 2}, "held_out=2 is no part"),
        ({"evaluation_tokens": 0}, "evaluation_tokens=0 must be an integer, at least 1"),
        ({"fold_centring": True}, "metadata name no processed model"),
        ({"device": "cuda:99"}, "device='cuda:99'"),
    ],
)
def test_settings_that_cannot_be_honoured(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused(message, tmp_path, sae_at(), **settings)


def test_saes_that_do_not_go_together(tmp_path: Path) -> None:
    other = {**OF_EMBEDDED, "model_name": "gpt2-small", "hook_name": "blocks.1.hook_resid_pre"}
    refused(
        "of different models cannot be finetuned together.*'embedded'.*'gpt2-small'",
        tmp_path,
        sae_at(),
        inference_sae("standard", other),
    )
    short = {**OF_EMBEDDED, "context_size": 128, "hook_name": "blocks.1.hook_resid_pre"}
    refused("differ in context_size", tmp_path, sae_at(), inference_sae("standard", short, d_in=64))
    refused(f"both sit at {embedded.HOOK_NAME}", tmp_path, sae_at(), sae_at(architecture="topk"))
    refused(
        "hook_name='x' is of one SAE, and 2 are", tmp_path, sae_at(), sae_at("blocks.1.hook_resid_pre"), hook_name="x"
    )
    refused("no SAE to finetune", tmp_path)
    refused("a StandardTrainingSAE is a training SAE", tmp_path, training_sae("standard"))


def test_what_is_finetuned_is_not_written_over(tmp_path: Path) -> None:
    sae_at().save_model(tmp_path / "sae")
    with pytest.raises(ValueError, match="holds what is to be finetuned"):
        finetune(tmp_path / "sae", output_path=tmp_path / "sae", overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("Dear")
    with pytest.raises(FileExistsError, match="is not one of our runs"):
        finetune(tmp_path / "sae", output_path=tmp_path / "mine")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "temporal", "d_out": 16}, "architecture 'temporal' cannot be finetuned; standard, topk"),
        ({"metadata": {"hook_name": "blocks.1.hook_resid_pre"}}, "metadata name no model_name"),
    ],
)
def test_a_released_sae_is_refused_before_its_weights_are_downloaded(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    content = files(inference_sae("standard"), tmp_path / "sae", "me/mine/late")
    cfg = json.loads(content["me/mine/late/cfg.json"])
    change = {**change, "metadata": {**change.get("metadata", COMPLETE), "sae_lens_version": "6.0.0"}}
    content["me/mine/late/cfg.json"] = json.dumps({**cfg, **change}).encode()
    with hub(content) as server:
        refused(message, tmp_path, "me/mine:late")
        assert weights_asked_for(server) == []


# The command line


def test_the_command_line_gives_what_is_given_and_nothing_else() -> None:
    flags = ["a", "b", "--lr", "1e-3", "--objective", '{"name": "e2e", "kl_coefficient": 2}', "--l1_coefficient", "0.2"]
    parsed = parse_finetune([*flags, "--output_path", "out", "--hold_l0", "false", "--seqpos_slice", "2", "9"])
    assert parsed == {
        "sources": ["a", "b"],
        "report": False,
        "trust_remote_code": False,
        "lr": 1e-3,
        "objective": {"name": "e2e", "kl_coefficient": 2},
        "l1_coefficient": 0.2,
        "output_path": "out",
        "hold_l0": False,
        "seqpos_slice": (2, 9),
    }
    logged = parse_finetune(["a", "--wandb_project", "mine"])["logger"]
    assert (logged.wandb_project, logged.log_to_wandb) == ("mine", False)


def test_the_command_finetunes_prints_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sae_at(architecture="topk").save_model(tmp_path / "sae")
    flags = [f"--{name}={'' if value is None else value}" for name, value in several().items() if value is not None]
    out = tmp_path / "out"
    assert main(["finetune", str(tmp_path / "sae"), "--output_path", str(out), *flags, "--report", "--debug"]) == 0
    printed = capsys.readouterr().out
    assert "| before" in printed
    assert "held by construction, k = 7" in printed
    assert (out / "report.html").is_file()
    assert json.loads((out / "runner_cfg.json").read_text())["training_tokens"] == QUICK["training_tokens"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpt2-small-res-jbb/blocks.4.hook_resid_pre"], "the nearest are gpt2-small-res-jb"),
        (["a", "--lrr", "1"], "--lrr"),
        (["a", "--thresholds", "wander"], "wander"),
        (["not_there"], "nothing of that name"),
    ],
)
def test_the_command_refuses_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["finetune", *arguments]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1]
    assert said[-1].startswith("sae-lens-e2e finetune: ")


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "examples")
    example: Any = importlib.import_module("finetune")
    monkeypatch.setattr(example, "TOKENS", 10 * 1024)
    monkeypatch.setattr("sys.argv", ["finetune.py", "--output", str(tmp_path)])
    monkeypatch.setitem(example.BATCH, "evaluation_tokens", 2048)
    monkeypatch.setattr(example, "train_locally", lambda folder: sae_at(architecture="topk").save_model(folder))
    example.main()
    assert "held by construction, k = 7" in capsys.readouterr().out
    assert SAE.load_from_disk(tmp_path / "finetuned").cfg.metadata.finetuning["source"] == str(tmp_path / "local")
