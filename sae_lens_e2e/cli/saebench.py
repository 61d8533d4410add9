"""`sae-lens-e2e saebench`: SAEBench's core evaluation of SAEs, beside ours."""

from pathlib import Path

from sae_lens_e2e.cli.parser import Parser, add_trust, device


def saebench(arguments: list[str]) -> None:
    """Run SAEBench's core evaluation on SAEs, in an environment of its own; a report then shows its figures beside ours."""
    parser = Parser(
        prog="sae-lens-e2e saebench",
        description=saebench.__doc__,
        example="sae-lens-e2e saebench output/my_sweep --max-tokens 100000",
    )
    parser.add_argument("folder", nargs="+", help="SAEs, or sweeps")
    parser.add_argument("--model", help="'embedded', a folder or a name on the Hub (default: as in the SAEs' metadata)")
    parser.add_argument(
        "--dataset", help="'embedded', a file, a folder or a name on the Hub (default: as in the metadata)"
    )
    parser.add_argument("--hook-name", help="the SAEs at this hook only")
    parser.add_argument("--max-tokens", type=int, default=500_000, help="to evaluate on (default: 500000)")
    parser.add_argument("--batch-size-prompts", type=int, default=16, help="prompts a forward pass (default: 16)")
    parser.add_argument("--device", type=device, default="cpu", help="(default: cpu)")
    add_trust(parser)
    parser.add_argument(
        "--python", type=Path, help="an environment's python that has sae-bench (default: one is made, once)"
    )
    parsed = parser.parse_args(arguments or ["--help"])
    from sae_lens_e2e.cli.tables import saebench_as_text
    from sae_lens_e2e.saebench import evaluate_with_saebench, read_core_results

    files = evaluate_with_saebench(
        parsed.folder,
        model=parsed.model,
        dataset=parsed.dataset,
        hook_name=parsed.hook_name,
        max_tokens=parsed.max_tokens,
        batch_size_prompts=parsed.batch_size_prompts,
        device=parsed.device,
        python=parsed.python,
        trust_remote_code=parsed.trust_remote_code,
    )
    found = {name: read_core_results(file.parent) for name, file in files.items()}
    print(saebench_as_text({name: one for name, one in found.items() if one is not None}))
    print("\n".join(map(str, files.values())))
