"""`sae-lens-e2e features`: top activating passages and more of an SAE's features, on one page."""

from pathlib import Path

from sae_lens_e2e.cli.parser import Parser, add_trust, device


def features(arguments: list[str]) -> None:
    """Look at an SAE's features and write one self-contained HTML page on them, which needs no network.

    Without --feature it takes live features spread over how often they fire; with --compare first those that one of the two SAEs has
    and the other lacks.
    """
    parser = Parser(
        prog="sae-lens-e2e features",
        description=features.__doc__,
        example="sae-lens-e2e features my_sae --compare my_finetuned_sae --output features.html",
    )
    parser.add_argument("sae", help="an SAE: a folder, a released SAE by name, or Apollo's (see load_apollo_sae)")
    parser.add_argument("--feature", nargs="+", action="extend", type=int, help="these features, by number")
    parser.add_argument("--compare", metavar="OTHER", help="another SAE of the same hook")
    parser.add_argument("--output", type=Path, default=Path("features.html"), help="(default: features.html)")
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.7,
        help="an SAE lacks a feature of the other if the largest cosine similarity to it is less (default: 0.7)",
    )
    parser.add_argument("--n-features", type=int, default=12, help="in each section, without --feature (default: 12)")
    parser.add_argument("--n-passages", type=int, default=8, help="of each feature (default: 8)")
    parser.add_argument("--model", help="'embedded', a folder or a name on the Hub (default: as in the SAE's metadata)")
    parser.add_argument(
        "--dataset", help="'embedded', a file, a folder or a name on the Hub (default: as in the metadata)"
    )
    parser.add_argument("--max-tokens", type=int, default=500_000, help="to read (default: 500000)")
    parser.add_argument("--batch-size-prompts", type=int, default=16, help="prompts a forward pass (default: 16)")
    parser.add_argument("--title", help="of the page")
    parser.add_argument("--device", type=device, default="cpu", help="(default: cpu)")
    add_trust(parser)
    parsed = parser.parse_args(arguments or ["--help"])
    from sae_lens_e2e.features import make_features_page

    page = make_features_page(
        parsed.sae,
        parsed.output,
        features=parsed.feature,
        compare=parsed.compare,
        threshold=parsed.threshold,
        n_features=parsed.n_features,
        n_passages=parsed.n_passages,
        model=parsed.model,
        dataset=parsed.dataset,
        max_tokens=parsed.max_tokens,
        batch_size_prompts=parsed.batch_size_prompts,
        title=parsed.title,
        device=parsed.device,
        trust_remote_code=parsed.trust_remote_code,
    )
    print(page)
