"""`sae-lens-e2e evaluate`: what each of some SAEs costs its language model."""

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_lens_e2e.cli.parser import Parser, add_trust, device
from sae_lens_e2e.errors import one_line

if TYPE_CHECKING:
    from sae_lens import SAE
    from transformer_lens.HookedRootModule import HookedRootModule

    from sae_lens_e2e.evaluation import Evaluation, TogetherEvaluation


def evaluate(arguments: list[str]) -> None:
    """Evaluate SAEs one by one, each on the model and data in its metadata unless told otherwise.

    Those of a folder of SAEs that were trained together are evaluated together as well.
    """
    parser = Parser(
        prog="sae-lens-e2e evaluate",
        description=evaluate.__doc__,
        example="sae-lens-e2e evaluate my_sae gpt2-small-res-jb/blocks.4.hook_resid_pre --max-tokens 100000",
    )
    parser.add_argument(
        "sae",
        nargs="+",
        help="a folder of SAELens', of SAEs that were trained together, or an SAE of Apollo's (see load_apollo_sae)",
    )
    parser.add_argument("--model", help="'embedded', a folder or a name on the Hub (default: as in the SAE's metadata)")
    parser.add_argument(
        "--dataset", help="'embedded', a file, a folder or a name on the Hub (default: as in the metadata)"
    )
    parser.add_argument("--max-tokens", type=int, default=500_000, help="(default: 500000)")
    parser.add_argument("--batch-size-prompts", type=int, default=16, help="prompts a forward pass (default: 16)")
    parser.add_argument("--device", type=device, default="cpu", help="(default: cpu)")
    add_trust(parser)
    parsed = parser.parse_args(arguments or ["--help"])
    from sae_lens_e2e.cli.tables import as_text, together_as_text
    from sae_lens_e2e.evaluation import evaluate_many, evaluate_together, evaluation_frame
    from sae_lens_e2e.evaluation.files import write_evaluation, write_together
    from sae_lens_e2e.loading import held_out_documents, load_documents, load_model, model_settings
    from sae_lens_e2e.loading.saes import is_joint_folder, is_sae_folder

    # SAEs of one model are many, and it may be large.
    models: dict[str, HookedRootModule] = {}
    load_documents_once = cache(load_documents)
    results: dict[str, Evaluation] = {}
    together: dict[str, TogetherEvaluation] = {}
    skipped: dict[str, str] = {}
    caveats: list[str] = []
    for source in parsed.sae:
        try:
            saes = _saes_at(source, parsed.device)
            settings = model_settings(next(iter(saes.values())).cfg.metadata, parsed.model, parsed.trust_remote_code)
            if (key := json.dumps(settings)) not in models:
                models[key] = load_model(device=parsed.device, **settings)
            held_out = held_out_documents(saes, parsed.dataset, load_documents_once)
            data = (models[key], held_out.documents)
            options = {"max_tokens": parsed.max_tokens, "batch_size_prompts": parsed.batch_size_prompts}
            found = evaluate_many(saes, *data, **options)
            if is_joint_folder(source):
                by_name = {Path(folder).name: sae for folder, sae in saes.items()}
                together[source] = evaluate_together(by_name, *data, **options)
        except Exception as error:  # whatever is wrong with one SAE does not concern the others
            skipped[source] = one_line(error)
            continue
        caveats += [] if held_out.caveat is None else [held_out.caveat]
        results |= found
        for name in filter(is_sae_folder, found):
            write_evaluation(found[name], name)
        if source in together:
            write_together(together[source], source)
    if results:
        print("\n".join([as_text(evaluation_frame(results)), *caveats]))
    for source, found in together.items():
        print(f"\n{source}, spliced in together, in order of depth:\n{together_as_text(found)}")
    if skipped:
        raise ValueError("; ".join(f"{source} was skipped: {reason}" for source, reason in skipped.items()))


def _saes_at(source: str, device: str) -> "dict[str, SAE[Any]]":
    """The SAE at a place, or those in a folder of several that were trained together, by where each is."""
    from sae_lens_e2e.loading.saes import is_joint_folder, load_sae, load_saes

    if not is_joint_folder(source):
        return {source: load_sae(source, device)}
    return {f"{source}/{name}": sae for name, sae in load_saes(source, device).items()}
