"""`sae-lens-e2e report`: everything the paper measured and drew, on one page."""

from pathlib import Path

from sae_lens_e2e.cli.parser import Parser, add_trust, device


def report(arguments: list[str]) -> None:
    """Measure SAEs and write one self-contained HTML page on them, with what agrees with the paper and what does not."""
    parser = Parser(
        prog="sae-lens-e2e report",
        description=report.__doc__,
        example="sae-lens-e2e report output/my_sweep --output report.html --max-tokens 100000",
    )
    parser.add_argument("folder", nargs="+", help="SAEs, sweeps, or SAEs of Apollo's (see load_apollo_sae)")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="(default: report.html)")
    parser.add_argument("--model", help="'embedded', a folder or a name on the Hub (default: as in the SAEs' metadata)")
    parser.add_argument(
        "--dataset", help="'embedded', a file, a folder or a name on the Hub (default: as in the metadata)"
    )
    parser.add_argument("--hook-name", help="the SAEs at this hook only")
    parser.add_argument("--max-tokens", type=int, default=500_000, help="to evaluate on (default: 500000)")
    parser.add_argument("--batch-size-prompts", type=int, default=16, help="prompts a forward pass (default: 16)")
    parser.add_argument("--measures", nargs="+", help="evaluation, geometry, directions, faithfulness (default: all)")
    parser.add_argument("--figures", nargs="+", help="(default: all that there is something to draw in)")
    parser.add_argument("--title", help="of the page")
    parser.add_argument("--device", type=device, default="cpu", help="(default: cpu)")
    add_trust(parser)
    parsed = parser.parse_args(arguments or ["--help"])
    from sae_lens_e2e.report import MEASURES, make_report

    page = make_report(
        parsed.folder,
        parsed.output,
        model=parsed.model,
        dataset=parsed.dataset,
        hook_name=parsed.hook_name,
        max_tokens=parsed.max_tokens,
        measures=parsed.measures or MEASURES,
        figures=parsed.figures,
        title=parsed.title,
        batch_size_prompts=parsed.batch_size_prompts,
        device=parsed.device,
        trust_remote_code=parsed.trust_remote_code,
    )
    print(page)
