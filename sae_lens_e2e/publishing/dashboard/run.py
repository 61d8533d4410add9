"""Have SAEDashboard, in its own environment, describe the features of an SAE."""

import json
import math
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from sae_lens import SAE, logger
from sae_lens.config import HfDataset
from sae_lens.constants import SAE_CFG_FILENAME
from sae_lens.util import extract_layer_from_tlens_hook_name
from safetensors.torch import save_file
from torch import Tensor

from sae_lens_e2e.architectures.transcoder import widths_of
from sae_lens_e2e.elsewhere.export import export_model
from sae_lens_e2e.elsewhere.host import MODEL, TOKENS
from sae_lens_e2e.elsewhere.program import Program
from sae_lens_e2e.evaluation.tokens import Setting, token_batches
from sae_lens_e2e.loading.folder import load_folder
from sae_lens_e2e.loading.metadata import model_settings
from sae_lens_e2e.loading.saes import is_sae_folder
from sae_lens_e2e.output import claim_output, written_whole
from sae_lens_e2e.publishing.neuronpedia import REQUIRED
from sae_lens_e2e.splice import SplicedModel, check_sites
from sae_lens_e2e.splice.hooked_transformer import is_hooked_transformer

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

RECORD = "dashboard.json"
"""What was asked of SAEDashboard, and of which SAE; also what tells a folder of ours."""

SAE_DASHBOARD = Program("SAEDashboard", "sae-dashboard", "0.8.0", Path(__file__).parent)

_OUTPUTS = "outputs"
ARCHITECTURES = ("standard", "topk", "jumprelu", "gated")
# SAEDashboard reads a dataset so many prompts at a time, and leaves out what does not fill one time.
_PROMPTS_READ_AT_A_TIME = 8


def make_dashboard(
    sae_folder: str | Path,
    output: str | Path,
    *,
    model: "HookedTransformer | None" = None,
    dataset: HfDataset | None = None,
    n_features: int | None = None,
    n_prompts: int = 4096,
    n_prompts_in_forward_pass: int = 32,
    n_features_at_a_time: int = 128,
    device: str | None = None,
    python: str | Path | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    verbose: bool = True,
) -> list[Path]:
    """Write what Neuronpedia shows of each feature: the prompts it is most active on, its logits, its density.

    sae_folder: an SAE as `save_for_neuronpedia` or SAELens saves it.
    output: a new or empty folder, or one that this function wrote; it gets batch-0.json and on, and dashboard.json.
    model: the language model, for one that is on this machine only; left out, SAEDashboard loads `model_name` from the Hub, as
        SAELens does: unprocessed but for what `model_from_pretrained_kwargs` say.
    dataset: one split, tokenised or text, read as for training; it needs `model`. Left out, SAEDashboard reads `dataset_path`
        in its own way, which cuts documents to the context size and passes over shorter ones.
    n_features: only the first so many; left out, all.
    n_prompts: distinct prompts of the SAE's context size that are looked at; fewer if the dataset has no more.
    n_prompts_in_forward_pass, n_features_at_a_time: what memory allows. Each file holds at most so many features.
    device: where SAEDashboard computes; left out, it takes what it finds.
    python: the interpreter of an environment that has sae-dashboard; left out, one is made in the user's cache folder and kept.
    overwrite: whether to write to a folder that has something else in it.
    trust_remote_code: load the model with whatever the SAE's metadata say, even if that runs code of the model's repository.
    verbose: show SAEDashboard's progress.

    While it runs, SAEDashboard keeps the prompts' activations at the hook on disk, in `output`.
    With both `model` and `dataset`, nothing is asked of the network (but to make the environment). Returns the batch files, in
    order. In them `frac_nonzero` is the fraction of all tokens on which a feature fires, to five digits after the point, BOS,
    EOS, padding and positions outside the SAE's `seqpos_slice` counting as tokens on which none does.

    Raises, before any long work, ValueError for an SAE that SAEDashboard cannot show, metadata that are missing or arguments that
    do not fit, and FileExistsError for an output that is somebody else's. Raises ChildProcessError if SAEDashboard fails or
    cannot be installed. Nothing is left in `output` then.
    """
    _check_positive(
        n_features=n_features,
        n_prompts=n_prompts,
        n_prompts_in_forward_pass=n_prompts_in_forward_pass,
        n_features_at_a_time=n_features_at_a_time,
    )
    sae = load_shown_sae(sae_folder, needs_dataset_path=dataset is None)
    metadata = sae.cfg.metadata
    kwargs = model_settings(metadata, trust_remote_code=trust_remote_code)["model_from_pretrained_kwargs"]
    n_shown: int = n_features or sae.cfg.d_sae
    if n_shown > sae.cfg.d_sae:
        raise ValueError(f"n_features={n_features}: the SAE has {sae.cfg.d_sae} features; ask for no more")
    _check_source(sae, model, dataset, n_prompts)
    claim_output(output, overwrite, made_by=RECORD)
    given = None if python is None else SAE_DASHBOARD.checked_python(python)
    with written_whole(output) as partial, tempfile.TemporaryDirectory(dir=partial) as folder:
        working = Path(folder)
        if model is not None:
            export_model(model, working / MODEL, metadata.hook_name, metadata.context_size)
        if model is not None and dataset is not None:
            batches = token_batches(dataset, model, Setting.of(sae, model), batch_size_prompts=1)
            tokens = distinct_prompts(batches, n_prompts, model.cfg.d_vocab)
            n_prompts = len(tokens)
            save_file({"tokens": tokens}, working / TOKENS)
        runner = {
            "sae_path": str(Path(sae_folder).resolve()),
            "from_local_sae": True,
            "sae_set": _set_name(metadata.neuronpedia_id, Path(sae_folder)),
            "outputs_dir": _OUTPUTS,
            "huggingface_dataset_path": metadata.dataset_path or "local",
            "n_prompts_total": n_prompts,
            "n_tokens_in_prompt": metadata.context_size,
            "n_prompts_in_forward_pass": n_prompts_in_forward_pass,
            "n_features_at_a_time": n_features_at_a_time,
            "ignore_positions": _ignored_positions(metadata.context_size, metadata.seqpos_slice),
            "model_n_devices": 1,
            **dict.fromkeys(("sae_device", "model_device", "activation_store_device"), device),
        }
        job = {
            "runner": runner,
            "n_features": n_shown,
            "hook_name": metadata.hook_name,
            "model_from_pretrained_kwargs": kwargs,
            "model": MODEL,
            "tokens": TOKENS,
        }
        # In a new folder: SAEDashboard takes activations that it finds where it runs for those of the tokens it is given.
        SAE_DASHBOARD.run(job, working, given or SAE_DASHBOARD.own_python(), verbose)
        written = list(working.glob(f"{_OUTPUTS}/**/batch-*.json"))
        if len(written) != math.ceil(n_shown / n_features_at_a_time):
            raise ChildProcessError(f"SAEDashboard ended without an error, but wrote {len(written)} files only")
        for batch in written:
            batch.replace(partial / batch.name)
        asked = {name: value for name, value in runner.items() if name not in ("sae_path", "outputs_dir")}
        asked |= {"n_features": n_shown, **metadata.to_dict()}
        (partial / RECORD).write_text(json.dumps(asked, indent=1))
    batches = [Path(output) / batch.name for batch in written]
    for stale in set(Path(output).glob("batch-*.json")).difference(batches):
        stale.unlink()
    return sorted(batches, key=_number)


def load_shown_sae(folder: str | Path, needs_dataset_path: bool = True) -> SAE[Any]:
    """An SAE that SAEDashboard can show. Raises ValueError, naming what is wrong with it, for any other, or for a folder of none."""
    if not is_sae_folder(folder):
        raise ValueError(
            f"{str(folder)!r} is no SAE: it lacks cfg.json or sae_weights.safetensors; write one with save_for_neuronpedia"
        )
    sae = load_folder(folder)
    metadata = sae.cfg.metadata
    required = [key for key in REQUIRED if needs_dataset_path or key != "dataset_path"]
    missing = [key for key in required if metadata[key] in (None, "")]
    if missing:
        raise ValueError(
            f"the metadata in {str(Path(folder) / SAE_CFG_FILENAME)!r} have no {', '.join(missing)}; write the SAE with "
            f"save_for_neuronpedia(sae, path, {missing[0]}=...)"
        )
    shown = {
        "architecture": (sae.cfg.architecture(), sae.cfg.architecture() in ARCHITECTURES, " or ".join(ARCHITECTURES)),
        "hook_name": (
            metadata.hook_name,
            extract_layer_from_tlens_hook_name(metadata.hook_name) is not None,
            "blocks.N...",
        ),
        "hook_head_index": (metadata.hook_head_index, metadata.hook_head_index is None, "None"),
        "model_class_name": (
            metadata.model_class_name,
            metadata.model_class_name in (None, "HookedTransformer"),
            "HookedTransformer",
        ),
    }
    for name, (value, fits, wanted) in shown.items():
        if not fits:
            raise ValueError(f"{name}={value!r} is nothing that SAEDashboard shows, which takes {wanted}")
    return sae


def distinct_prompts(
    batches: Iterable[Int[Tensor, "batch pos"]], n_prompts: int, d_vocab: int
) -> Int[Tensor, "prompts pos"]:
    """The first `n_prompts` prompts, of each only one, or all if there are fewer.

    Raises ValueError for a token that the model does not know.
    """
    prompts: dict[tuple[int, ...], None] = {}
    for batch in batches:
        prompts.update(dict.fromkeys(map(tuple, batch.tolist())))
        if len(prompts) >= n_prompts:
            break
    else:
        if len(prompts) < n_prompts:
            logger.warning(f"the dataset has {len(prompts)} different prompts, fewer than n_prompts={n_prompts}")
    tokens = torch.tensor(list(prompts)[:n_prompts])
    if int(tokens.max()) >= d_vocab:
        raise ValueError(
            f"the dataset has token {int(tokens.max())} and the model knows {d_vocab}; tokenise it with the model's tokenizer"
        )
    return tokens


def _check_source(sae: SAE[Any], model: "HookedTransformer | None", dataset: HfDataset | None, n_prompts: int) -> None:
    metadata = sae.cfg.metadata
    if dataset is None and n_prompts % _PROMPTS_READ_AT_A_TIME:
        raise ValueError(
            f"n_prompts={n_prompts} is no multiple of {_PROMPTS_READ_AT_A_TIME}, by which SAEDashboard reads dataset_path; "
            "round it, or give dataset="
        )
    if model is None:
        if dataset is not None:
            raise ValueError(
                "dataset= needs model=, which it is tokenised for; load it with "
                f"HookedTransformer.from_pretrained_no_processing({metadata.model_name!r})"
            )
        return
    if not is_hooked_transformer(model):
        raise ValueError(f"model is a {type(model).__name__}, and SAEDashboard runs a HookedTransformer")
    setting, splice = Setting.of(sae, model), SplicedModel(model)
    setting.check(splice.n_ctx)
    check_sites(splice, {"sae": setting.site}, {"sae": widths_of(sae.cfg)})


def _check_positive(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name}={count}; set it to 1 or more")


def _set_name(neuronpedia_id: str | None, folder: Path) -> str:
    """What Neuronpedia calls the SAE's family: the `res_mine` of gpt2-small/6-res_mine, or the folder's name."""
    if neuronpedia_id is None:
        return folder.resolve().name
    return neuronpedia_id.split("/")[-1].split("-", 1)[-1]


def _ignored_positions(context_size: int, seqpos_slice: Iterable[int | None] | None) -> list[int]:
    used = range(context_size)[slice(*(seqpos_slice or (None,)))]
    return [position for position in range(context_size) if position not in used]


def _number(batch: Path) -> int:
    return int(re.findall(r"\d+", batch.name)[0])
