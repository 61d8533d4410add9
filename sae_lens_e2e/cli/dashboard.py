"""`sae-lens-e2e dashboard`: what Neuronpedia shows of each feature."""

from pathlib import Path

from sae_lens_e2e.cli.parser import Parser, add_trust


def dashboard(arguments: list[str]) -> None:
    """Run SAEDashboard on an SAE's folder, in an environment of its own, for what Neuronpedia shows of each feature."""
    parser = Parser(
        prog="sae-lens-e2e dashboard",
        description=dashboard.__doc__,
        example="sae-lens-e2e dashboard my_sae --n-features 100 --n-prompts 1024",
    )
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
    from sae_lens_e2e.loading import is_local, load_documents, load_model
    from sae_lens_e2e.publishing.dashboard import make_dashboard
    from sae_lens_e2e.publishing.dashboard.run import load_shown_sae

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
