"""Have SAEBench, in its own environment, evaluate SAEs on the tokens that ours are evaluated on."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from sae_lens import logger
from sae_lens.util import extract_layer_from_tlens_hook_name
from safetensors.torch import save_file
from transformer_lens.HookedRootModule import HookedRootModule

from sae_lens_e2e.architectures.transcoder import is_transcoder
from sae_lens_e2e.bench.bench import set_up
from sae_lens_e2e.bench.members import Member, collect
from sae_lens_e2e.elsewhere.export import export_model
from sae_lens_e2e.elsewhere.host import MODEL, TOKENS
from sae_lens_e2e.elsewhere.program import Program
from sae_lens_e2e.output import write_whole
from sae_lens_e2e.saebench.results import FILENAME, core_results
from sae_lens_e2e.splice.hooked_transformer import is_hooked_transformer

SAE_BENCH = Program("SAEBench", "sae-bench", "0.6.0", Path(__file__).parent)


def evaluate_with_saebench(
    sources: Sequence[str | Path],
    *,
    model: str | HookedRootModule | None = None,
    dataset: str | Dataset | None = None,
    hook_name: str | None = None,
    max_tokens: int = 500_000,
    batch_size_prompts: int = 16,
    device: str = "cpu",
    python: str | Path | None = None,
    trust_remote_code: bool = False,
    verbose: bool = True,
) -> dict[str, Path]:
    """Run SAEBench's core evaluation on SAEs, and leave its result file in the folder of each, where `make_report` finds it.

    sources: folders of SAELens', or of a sweep.
    model, dataset, hook_name, max_tokens, batch_size_prompts: as for `make_report`, which reads the same tokens if these are the same.
    device: where both are computed.
    python: the interpreter of an environment that has sae-bench; left out, one is made in the user's cache folder and kept.
    trust_remote_code: load the model with whatever the SAEs' metadata say, even if that runs code of the model's repository.
    verbose: show progress.

    SAEBench takes the mean over all tokens but BOS, EOS and padding. Returns the files by the SAEs' names. Raises, before any long work,
    ValueError or OSError for SAEs that SAEBench cannot evaluate and for what `make_report` refuses; ChildProcessError if SAEBench fails or
    cannot be installed, and nothing is written then.
    """
    members, skipped = collect(sources, device, hook_name, any_model=model is not None)
    for member in members:
        _check(member)
    given = None if python is None else SAE_BENCH.checked_python(python)
    bench, members, misfits = set_up(members, model, dataset, max_tokens, batch_size_prompts, device, trust_remote_code)
    if not is_hooked_transformer(bench.model):
        raise ValueError(f"model is a {type(bench.model).__name__}, and SAEBench runs a HookedTransformer")
    for one in (*skipped, *misfits):
        logger.warning(f"{one.name} is left out: {one.reason}")
    with tempfile.TemporaryDirectory() as folder:
        working = Path(folder)
        export_model(bench.model, working / MODEL, bench.setting.hook_name, bench.setting.context_size)
        save_file({"tokens": bench.tokens}, working / TOKENS)
        results = {member.name: working / f"result-{number}.json" for number, member in enumerate(members)}
        job: dict[str, Any] = {
            "saes": {member.name: str(Path(member.source).resolve()) for member in members},
            "results": {name: str(path) for name, path in results.items()},
            "model": MODEL,
            "tokens": TOKENS,
            "model_name": bench.model_name,
            "dataset": bench.dataset_name,
            "hook_name": bench.setting.hook_name,
            "batch_size_prompts": bench.batch_size_prompts,
            "leave_special_tokens": bool(bench.setting.exclude_special_tokens),
            "device": device,
        }
        SAE_BENCH.run(job, working, given or SAE_BENCH.own_python(), verbose)
        written = {name: path.read_text() for name, path in results.items()}
    files: dict[str, Path] = {}
    for member in members:
        # That the report will understand it.
        core_results(json.loads(written[member.name]))
        files[member.name] = Path(member.source) / FILENAME
        write_whole(files[member.name], written[member.name])
    return files


def _check(member: Member) -> None:
    """Raise ValueError, naming what is in the way, for an SAE that SAEBench cannot evaluate."""
    metadata = member.sae.cfg.metadata
    if member.folder is None:
        raise ValueError(f"{member.source!r} is not an SAE's folder; make it one with `sae-lens-e2e convert`")
    taken = {
        "architecture": (member.sae.cfg.architecture(), not is_transcoder(member.sae.cfg), "SAEs and no transcoders"),
        "hook_name": (
            metadata.hook_name,
            extract_layer_from_tlens_hook_name(metadata.hook_name) is not None,
            "blocks.N...",
        ),
        "model_class_name": (
            metadata.model_class_name,
            metadata.model_class_name in (None, "HookedTransformer"),
            "HookedTransformer",
        ),
        "seqpos_slice": (
            metadata.seqpos_slice,
            tuple(metadata.seqpos_slice or (None,)) == (None,),
            "SAEs of all positions",
        ),
    }
    for name, (value, fits, wanted) in taken.items():
        if not fits:
            raise ValueError(
                f"{member.name}: {name}={value!r} is nothing that SAEBench evaluates, which takes {wanted}"
            )
