"""Finetune SAEs that somebody has trained, with any objective, and say what that has changed."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lens import SAE, TrainingSAE
from sae_lens.config import HfDataset
from transformer_lens.HookedRootModule import HookedRootModule

from sae_lens_e2e.evaluation import evaluate_many, evaluate_together
from sae_lens_e2e.evaluation.files import write_evaluation, write_together
from sae_lens_e2e.finetuning.activations import activations_of
from sae_lens_e2e.finetuning.folding import fold_scale
from sae_lens_e2e.finetuning.holding import balanced_coefficients, calibrate_thresholds
from sae_lens_e2e.finetuning.plan import Plan, make_plan
from sae_lens_e2e.finetuning.result import Finetuned, card
from sae_lens_e2e.finetuning.settings import AnyConfig, read_as
from sae_lens_e2e.finetuning.training import (
    AnyRunner,
    FinetuningRunner,
    JointFinetuningRunner,
    Thresholds,
    coefficient_name,
    has_thresholds,
    held_by,
)
from sae_lens_e2e.loading import HELD_OUT, load_documents, load_model, model_class_of
from sae_lens_e2e.loading.documents import check_held_out, split_documents
from sae_lens_e2e.loading.folder import load_folder
from sae_lens_e2e.output import claim_output, write_whole, written_whole
from sae_lens_e2e.training.group import Group
from sae_lens_e2e.training.multi_config import E2EMultiRunnerConfig
from sae_lens_e2e.training.prompts import PromptBatches
from sae_lens_e2e.training.ready import refuse_ranks
from sae_lens_e2e.training.stages import AnyObjective

FILENAME = "finetuning.json"
"""Beside a finetuned SAE: what it came from, and the evaluations before and after."""
CARD_FILENAME = "README.md"

# Steps' worth of prompts on which the sparsity coefficient is balanced, and forward passes on which scales and thresholds are found.
_BALANCED_ON, _CALIBRATED_ON = 8, 16


@dataclass
class _Data:
    """The language model, what is trained on, what is evaluated on, and which part of the documents that is."""

    model: HookedRootModule
    documents: Any
    held_out: Any
    part: float


def finetune(
    *sources: str | Path | SAE[Any],
    output_path: str | Path | None = "output",
    architecture: str | None = None,
    thresholds: Thresholds = "move",
    hold_l0: bool = True,
    fold_centring: bool | None = None,
    held_out: float | None = None,
    evaluation_tokens: int = 100_000,
    override_model: HookedRootModule | None = None,
    override_dataset: HfDataset | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    **settings: Any,
) -> Finetuned:
    """Finetune released SAEs, or one's own, and evaluate them before and after on the same held-out tokens.

    Model, hook, context and data are those in the metadata. Several are trained together in one spliced pass. Without more the
    recipe is Karvonen's (2025): the objective `kl_mse`, a learning rate of 5e-5 that falls linearly to 0, the gradient clipped at
    1, over 5 % of the tokens that the SAE was trained on, or 25 million where those are not known. Each is saved as a stock folder,
    `output_path` (of several `output_path/NAME`), whose metadata say under `finetuning` what it came from, with evaluation.json,
    finetuning.json and a README.md.

    L0 stays where it was as far as the architecture can: by construction for `topk`; for `batchtopk` by k, and by scaling the threshold
    at the end; for the others by a sparsity penalty that grows with L0, whose coefficient, if it is not given, is the one at which
    the first step leaves the penalty as it is (`balanced_coefficients`), and for `jumprelu` by its thresholds at the end as well.

    Args:
        sources (str | Path | SAE): Each a folder of SAELens', a released SAE (RELEASE/ID of SAELens' registry, OWNER/REPOSITORY:FOLDER of the Hub), whatever `load_apollo_sae` takes, or an SAE. One that holds several means them all.
        output_path (str | Path | None): Where to save; None for nowhere.
        architecture (str | None): The training architecture to go on as; by default `trained_as(sae)`.
        thresholds (str): Of a `jumprelu` SAE: whether its thresholds 'move' or 'stay'.
        hold_l0 (bool): Whether L0 is held.
        fold_centring (bool | None): Whether an SAE of a processed model is made one of the unprocessed, as by `load_apollo_sae`; by default where that is exact.
        held_out (float | None): Which part of the documents is kept for evaluation; by default what the metadata say was kept, or a tenth.
        evaluation_tokens (int): How many of the held-out tokens are evaluated on.
        override_model (HookedRootModule | None): The language model, instead of the one that metadata name.
        override_dataset (HfDataset | None): Documents, of which the last `held_out` are evaluated on, instead of `dataset_path`.
        overwrite (bool): Whether to write over what is in `output_path`.
        trust_remote_code (bool): Whether to load the model with whatever the metadata say, even if that runs code.
        settings (Any): Fields of `E2ERunnerConfig` (`objective`, `lr`, `training_tokens`, `model_name`, `hook_name`, ...), and of the training SAE (`l1_coefficient`, `k`, ...).

    Raises ValueError or OSError, in one line, before the model is loaded, for an unknown release, metadata that lack the model or the
    hook, an architecture that cannot be trained, SAEs of different models, and settings that cannot be honoured.
    """
    refuse_ranks("finetune")
    _check_arguments(sources, output_path, held_out, evaluation_tokens)
    settings["output_path"] = None if output_path is None else str(output_path)
    plan, cfg = make_plan(sources, settings, architecture, thresholds, fold_centring, trust_remote_code)
    if cfg.output_path is not None:
        claim_output(cfg.output_path, overwrite)
    data = _load(plan, cfg, held_out, override_model, override_dataset)
    _read_as(plan, cfg, data)
    options = {"max_tokens": evaluation_tokens, "batch_size_prompts": cfg.store_batch_size_prompts}
    before = evaluate_many(plan.saes, data.model, data.held_out, **options)
    l0 = {name: result.l0 for name, result in before.items()}

    trained = plan.training_saes(l0, _coefficients(plan, data, l0))
    how = {name: held_by(sae, l0[name], hold_l0) for name, sae in trained.items()}
    cfg = plan.config(trained)
    _record_provenance(plan, cfg, trained, l0, how)
    runner = _runner(cfg, trained, data)
    runner.at_the_end = lambda: _calibrate(plan, data, trained) if hold_l0 else None
    runner.run(overwrite)

    folders = _folders(cfg, trained)
    saes = {name: _as_saved(sae, folders.get(name), str(cfg.device)) for name, sae in trained.items()}
    after = evaluate_many(saes, data.model, data.held_out, **options)
    for name, result in after.items():
        plan.note(name, f"L0 {l0[name]:.4g} before, {result.l0:.4g} after: {how[name]}")
    together = {}
    if len(saes) > 1:
        for when, found in (("together_before", plan.saes), ("together_after", saes)):
            together[when] = evaluate_together(found, data.model, data.held_out, **options)
    result = Finetuned(saes, plan.saes, before, after, folders, notes=plan.notes, **together)
    _write(result, cfg)
    return result


def _check_arguments(sources: Any, output_path: Any, held_out: Any, evaluation_tokens: Any) -> None:
    if held_out is not None:
        check_held_out(held_out)
        if not held_out:
            raise ValueError("held_out=0 leaves no documents to compare before and after on; give a part of them")
    if isinstance(evaluation_tokens, bool) or not isinstance(evaluation_tokens, int) or evaluation_tokens < 1:
        raise ValueError(f"evaluation_tokens={evaluation_tokens!r} must be an integer, at least 1")
    for source in sources:
        if output_path is not None and isinstance(source, str | Path) and Path(source).exists():
            inside = (Path(source).resolve(), Path(source).resolve().parent)
            if Path(output_path).resolve() in inside[: 1 if len(sources) == 1 else 2]:
                raise ValueError(
                    f"output_path={str(output_path)!r} holds what is to be finetuned, {str(source)!r}; choose another"
                )


def _load(
    plan: Plan, cfg: AnyConfig, held_out: float | None, model: HookedRootModule | None, dataset: HfDataset | None
) -> _Data:
    """The model and the documents. The config, and with it the metadata, is made to name the class that a model's folder gave."""
    recorded = [
        part
        for sae in plan.saes.values()
        if sae.cfg.metadata.dataset_path == cfg.dataset_path and isinstance(part := sae.cfg.metadata.held_out, float)
    ]
    part = held_out or min(recorded, default=HELD_OUT)
    if dataset is None:
        documents, kept = load_documents(cfg.dataset_path, part, cfg.streaming)
    else:
        documents, kept = split_documents(dataset, "override_dataset", part)
    if len(recorded) < len(plan.saes):
        plan.notes.append(
            f"whether the SAE was trained on the documents of {cfg.dataset_path} that are evaluated on is not known"
        )
    if model is None:
        assert cfg.llm_device is not None
        model = load_model(cfg.model_name, cfg.llm_device, cfg.model_class_name, cfg.model_from_pretrained_kwargs)
    if (had := model_class_of(model)) != cfg.model_class_name:
        plan.run |= {"model_class_name": had, "model_from_pretrained_kwargs": {}}
        cfg.model_class_name, cfg.model_from_pretrained_kwargs = had, {}
    return _Data(model, documents, kept, part)


def _read_as(plan: Plan, cfg: AnyConfig, data: _Data) -> None:
    """Have the SAEs to start from read what the run reads, in the activations' own scale."""
    for name, sae in plan.saes.items():
        read_as(sae, cfg, plan.places[name])
        if sae.cfg.normalize_activations == "expected_average_only_in":
            x = activations_of(sae, data.model, data.documents, cfg.store_batch_size_prompts, _CALIBRATED_ON)
            plan.note(name, fold_scale(sae, x))


def _coefficients(plan: Plan, data: _Data, l0: Mapping[str, float]) -> dict[str, float]:
    """The sparsity coefficients that are not given, balanced at the start of the run; for that SAEs are made and thrown away."""
    trained = plan.training_saes(l0)
    fields = {name: field for name, sae in trained.items() if (field := coefficient_name(sae)) is not None}
    unset = {name: field for name, field in fields.items() if field not in plan.of_saes}
    if not unset:
        return {}

    def group(coefficient: float) -> Group:
        made = plan.training_saes(l0, dict.fromkeys(unset, coefficient))
        return _runner(plan.config(made), made, data).make_group()

    without, with_penalty = group(0.0), group(1.0)
    assert isinstance(without.first.data_provider, PromptBatches)
    prompts = [next(without.first.data_provider) for _ in range(_BALANCED_ON)]
    with without.model.running(), with_penalty.model.running():
        balanced = balanced_coefficients(without, with_penalty, prompts)
    # A run of one SAE has a name of its own for it.
    found = balanced if len(balanced) > 1 else dict(zip(plan.saes, balanced.values(), strict=True))
    for name, field in unset.items():
        plan.note(name, f"{field} = {found[name]:.4g}, at which the first steps leave the sparsity penalty as it is")
    return {name: found[name] for name in unset}


def _record_provenance(
    plan: Plan,
    cfg: AnyConfig,
    trained: Mapping[str, TrainingSAE[Any]],
    l0: Mapping[str, float],
    how: Mapping[str, str],
) -> None:
    """Write into the metadata of what is trained what it comes from, and by what."""
    assert isinstance(cfg.objective, AnyObjective)
    for name, sae in trained.items():
        source = plan.sources[name]
        sae.cfg.metadata.finetuned_from = source.name
        sae.cfg.metadata.finetuning = {
            "source": source.name,
            "revision": source.revision,
            "neuronpedia_id": source.sae.cfg.metadata.neuronpedia_id,
            "trained_as": sae.cfg.architecture(),
            "objective": cfg.objective.name,
            "training_tokens": cfg.training_tokens,
            "lr": cfg.lr,
            "l0_before": l0[name],
            "l0": how[name],
        }


def _runner(cfg: AnyConfig, trained: Mapping[str, TrainingSAE[Any]], data: _Data) -> AnyRunner:
    given: dict[str, Any] = {
        "override_dataset": data.documents,
        "override_model": data.model,
        "held_out": data.part,
    }
    if isinstance(cfg, E2EMultiRunnerConfig):
        return JointFinetuningRunner(cfg, override_saes=dict(trained), **given)
    return FinetuningRunner(cfg, override_sae=next(iter(trained.values())), **given)


def _calibrate(plan: Plan, data: _Data, trained: Mapping[str, TrainingSAE[Any]]) -> None:
    """Scale the thresholds of what was trained until as many features fire as did before."""
    for name, sae in trained.items():
        if has_thresholds(sae):
            prompts = plan.run["store_batch_size_prompts"]
            x = activations_of(plan.saes[name], data.model, data.documents, prompts, _CALIBRATED_ON)
            factor = calibrate_thresholds(sae, plan.saes[name], x)
            plan.note(name, f"thresholds were scaled by {factor:.4g} after training")


def _folders(cfg: AnyConfig, trained: Mapping[str, Any]) -> dict[str, Path]:
    if cfg.output_path is None:
        return {}
    base = Path(cfg.output_path)
    return {name: base / name if isinstance(cfg, E2EMultiRunnerConfig) else base for name in trained}


def _as_saved(sae: TrainingSAE[Any], folder: Path | None, device: str) -> SAE[Any]:
    """What was trained, as anyone would load it."""
    if folder is not None:
        return load_folder(folder, device)
    with tempfile.TemporaryDirectory() as temporary:
        sae.save_inference_model(temporary)
        return load_folder(temporary, device)


def _write(result: Finetuned, cfg: AnyConfig) -> None:
    """Put beside each SAE its evaluation, what it came from, and a card that says so."""
    for name, folder in result.folders.items():
        provenance = result.saes[name].cfg.metadata.finetuning
        write_evaluation(result.after[name], folder)
        record = {**provenance, "notes": result.notes}
        record |= {"before": result.before[name].to_dict(), "after": result.after[name].to_dict()}
        with written_whole(folder) as partial:
            (partial / FILENAME).write_text(json.dumps(record, indent=1), encoding="utf-8")
            (partial / CARD_FILENAME).write_text(card(result, folder.name, provenance), encoding="utf-8")
    if result.together_after is not None and cfg.output_path is not None:
        write_together(result.together_after, cfg.output_path)
        write_whole(Path(cfg.output_path) / CARD_FILENAME, result.summary() + "\n")
