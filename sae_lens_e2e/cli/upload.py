"""`sae-lens-e2e upload`: SAEs to the Hub."""

from pathlib import Path

from sae_lens_e2e.cli.parser import Parser


def upload(arguments: list[str]) -> None:
    """Put SAEs on the Hugging Face Hub, where SAE.from_pretrained finds them, with a model card."""
    parser = Parser(
        prog="sae-lens-e2e upload",
        description=upload.__doc__,
        example="sae-lens-e2e upload me/my-saes output/my_sweep/e2e output/my_sweep/local --private",
    )
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
    from sae_lens_e2e.evaluation.files import read_evaluation
    from sae_lens_e2e.publishing.hub import upload_to_hub

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
