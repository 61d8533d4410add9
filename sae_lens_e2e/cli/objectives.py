"""`sae-lens-e2e objectives`: what is installed."""

import dataclasses

from sae_lens_e2e.cli.parser import Parser
from sae_lens_e2e.objectives.plugins import available_objectives
from sae_lens_e2e.training.stages import WARM, WARM_UNTIL


def objectives(arguments: list[str]) -> None:
    """Print each objective, the package it is from, and its settings; then how they start from a local one."""
    Parser(
        prog="sae-lens-e2e objectives",
        description="List the objectives that are installed, and where each is from.",
        example="sae-lens-e2e objectives",
    ).parse_args(arguments)
    for name, found in sorted(available_objectives().items()):
        settings = ", ".join(f"{f.name}={f.default!r}" for f in dataclasses.fields(found.objective))
        summary = (found.objective.__doc__ or "").strip().splitlines()[0]
        print(f"{name}  (from {found.origin})\n    {summary}\n    {settings}")
    print(
        f"{WARM}NAME\n    Local for the first {WARM_UNTIL:.0%} of training, then any of these.\n    until={WARM_UNTIL!r}, lr=None, ..."
    )
