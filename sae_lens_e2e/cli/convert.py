"""`sae-lens-e2e convert`: SAEs from elsewhere, as SAELens has them."""

from pathlib import Path
from typing import Any

from sae_lens_e2e.cli.parser import Parser

_METADATA = ("model_name", "dataset_path", "neuronpedia_id")


def convert(arguments: list[str]) -> None:
    """Write an SAE of Apollo's, or any of SAELens', as a folder that SAELens, SAEDashboard and Neuronpedia load."""
    parser = Parser(
        prog="sae-lens-e2e convert",
        description=convert.__doc__,
        example="sae-lens-e2e convert e2e_similar_ce_layer_6 my_sae --neuronpedia-id gpt2-small/6-mine",
    )
    parser.add_argument(
        "source",
        help="a run's folder, a .pt and .yaml pair, e2e_similar_ce_layer_6 and its like, a W&B run (sparsify/gpt2/tvj2owza), a "
        "Neuronpedia id (gpt2-small/6-res_scefr-ajt), a folder of SAELens', or of SAEs that were trained together",
    )
    parser.add_argument("out", type=Path, help="a new folder; a source with several SAEs gets one in it for each")
    parser.add_argument("--hook-name", help="only the SAE at this hook")
    parser.add_argument("--n-samples", type=int, help="which checkpoint of a run (default: the last)")
    parser.add_argument(
        "--no-fold-centring", action="store_true", help="leave the encoder for the residual stream of a processed model"
    )
    for name in _METADATA:
        parser.add_argument(f"--{name.replace('_', '-')}", help=f"{name} in the metadata (default: the source's)")
    parser.add_argument("--overwrite", action="store_true", help="write to a folder that has something in it")
    parsed = parser.parse_args(arguments or ["--help"])
    from sae_lens_e2e.loading.saes import is_joint_folder, load_saes
    from sae_lens_e2e.output import check_free
    from sae_lens_e2e.publishing.neuronpedia import save_for_neuronpedia

    check_free(parsed.out, parsed.overwrite)
    saes = load_saes(
        parsed.source,
        hook_name=parsed.hook_name,
        n_samples=parsed.n_samples,
        fold_centring=False if parsed.no_fold_centring else None,
    )
    metadata = {name: value for name in _METADATA if (value := getattr(parsed, name)) is not None}
    if len(saes) > 1 and parsed.neuronpedia_id is not None:
        raise ValueError(
            f"--neuronpedia-id={parsed.neuronpedia_id!r} is of one SAE, and {parsed.source} holds {', '.join(saes)}; take one of "
            "them with --hook-name"
        )
    together = is_joint_folder(parsed.source)
    for name, sae in saes.items():
        folder = parsed.out if len(saes) == 1 else parsed.out / name
        frequency = _frequency(Path(parsed.source) / name if together else parsed.source)
        save_for_neuronpedia(sae, folder, frequency=frequency, overwrite=parsed.overwrite, **metadata)
        print(f"{name}: {folder}")


def _frequency(folder: str | Path) -> Any:
    """How often each feature fires, if a folder of SAELens' says."""
    from sae_lens.constants import SPARSITY_FILENAME
    from safetensors.torch import load_file

    file = Path(folder) / SPARSITY_FILENAME
    return 10 ** load_file(file)["sparsity"] if file.is_file() else None
