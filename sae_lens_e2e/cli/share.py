"""`sae-lens-e2e convert`, `dashboard` and `upload`: SAEs from elsewhere, and to elsewhere."""

from pathlib import Path
from typing import Any

from sae_lens.constants import SPARSITY_FILENAME
from safetensors.torch import load_file

from sae_lens_e2e.cli.parser import Parser, add_trust
from sae_lens_e2e.evaluation.files import read_evaluation
from sae_lens_e2e.loading import is_local, load_documents, load_model
from sae_lens_e2e.loading.saes import is_joint_folder, load_saes
from sae_lens_e2e.output import check_free
from sae_lens_e2e.publishing.dashboard import make_dashboard
from sae_lens_e2e.publishing.dashboard.run import load_shown_sae
from sae_lens_e2e.publishing.hub import upload_to_hub
from sae_lens_e2e.publishing.neuronpedia import save_for_neuronpedia

_METADATA = ("model_name", "dataset_path", "neuronpedia_id")


def convert(arguments: list[str]) -> None:
    """Write an SAE of Apollo's, or any of SAELens', as a folder that SAELens, SAEDashboard and Neuronpedia load."""
    parser = Parser(prog="sae-lens-e2e convert", description=convert.__doc__)
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
    file = Path(folder) / SPARSITY_FILENAME
    return 10 ** load_file(file)["sparsity"] if file.is_file() else None


def dashboard(arguments: list[str]) -> None:
    """Run SAEDashboard on an SAE's folder, in an environment of its own, for what Neuronpedia shows of each feature."""
    parser = Parser(prog="sae-lens-e2e dashboard", description=dashboard.__doc__)
    parser.add_argument("folder", type=Path, help="an SAE as `convert` or SAELens writes it")
    parser.add_argument("output", nargs="?", type=Path, help="where batch-N.json go (default: FOLDER/dashboard)")
    parser.add_argument("--model", help="'embedded' or a folder (default: as in the SAE's metadata)")
    parser.add_argument("--dataset", help="'embedded', a file or a folder (default: as in the metadata)")
    parser.add_argument("--n-features", type=int, help="only the first so many (default: all)")
    parser.add_argument("--n-prompts", type=int, default=4096, help="prompts to look at (default: 4096)")
    parser.add_argument("--n-prompts-in-forward-pass", type=int, default=32, help="(default: 32)")
    parser.add_argument("--n-features-at-a-time", type=int, default=128, help="(default: 128)")
    parser.add_argument("--device", help="where SAEDashboard computes (default: what it finds)")
    add_trust(parser)
    parser.add_argument("--python", help="an environment's python that has sae-dashboard (default: one is made, once)")
    parser.add_argument("--overwrite", action="store_true", help="write to a folder that has something else in it")
    parsed = parser.parse_args(arguments or ["--help"])
    metadata = load_shown_sae(parsed.folder, needs_dataset_path=parsed.dataset is None).cfg.metadata
    model_name, dataset_name = parsed.model or metadata.model_name, parsed.dataset or metadata.dataset_path
    model = load_model(model_name) if is_local(model_name) else None
    if is_local(dataset_name) and model is None:
        raise ValueError(
            f"dataset {dataset_name!r} is on this machine and model {model_name!r} is not; give --model a folder"
        )
    batches = make_dashboard(
        parsed.folder,
        parsed.output or parsed.folder / "dashboard",
        model=model,  # pyright: ignore[reportArgumentType]
        dataset=load_documents(dataset_name, held_out=0)[0] if is_local(dataset_name) else None,
        n_features=parsed.n_features,
        n_prompts=parsed.n_prompts,
        n_prompts_in_forward_pass=parsed.n_prompts_in_forward_pass,
        n_features_at_a_time=parsed.n_features_at_a_time,
        device=parsed.device,
        python=parsed.python,
        trust_remote_code=parsed.trust_remote_code,
        overwrite=parsed.overwrite,
    )
    print("\n".join(str(batch) for batch in batches))


def upload(arguments: list[str]) -> None:
    """Put SAEs on the Hugging Face Hub, where SAE.from_pretrained finds them, with a model card."""
    parser = Parser(prog="sae-lens-e2e upload", description=upload.__doc__)
    parser.add_argument("repo_id", help="OWNER/NAME, made if it does not exist")
    parser.add_argument(
        "folder", nargs="+", type=Path, help="SAEs as `train`, `sweep` or `convert` write them; the name is the id"
    )
    parser.add_argument("--revision", default="main", help="the branch (default: main)")
    parser.add_argument("--private", action="store_true", default=None, help="make a private repository")
    parser.add_argument("--no-card", action="store_true", help="leave the repository's README.md alone")
    parsed = parser.parse_args(arguments or ["--help"])
    folders = {folder.resolve().name: folder for folder in parsed.folder}
    if len(folders) < len(parsed.folder):
        raise ValueError("two folders have the same name, which is the SAE's id on the Hub; rename one")
    stored = {name: read_evaluation(folder) for name, folder in folders.items()}
    evaluations = {name: evaluation for name, evaluation in stored.items() if evaluation is not None}
    print(
        upload_to_hub(
            folders,
            parsed.repo_id,
            revision=parsed.revision,
            private=parsed.private,
            evaluations=evaluations,
            write_card=not parsed.no_card,
        )
    )
