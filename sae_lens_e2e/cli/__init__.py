"""The command line, `sae-lens-e2e`: one module a command, or a few that belong together."""

import argparse
import sys
from collections.abc import Callable, Sequence

import torch

from sae_lens_e2e import __version__
from sae_lens_e2e._upstream import InterruptedException
from sae_lens_e2e.cli.features import features
from sae_lens_e2e.cli.finetune import finetune
from sae_lens_e2e.cli.measure import evaluate, sweep
from sae_lens_e2e.cli.objectives import objectives
from sae_lens_e2e.cli.report import report
from sae_lens_e2e.cli.share import convert, dashboard, upload
from sae_lens_e2e.cli.train import train
from sae_lens_e2e.errors import named_line, one_line
from sae_lens_e2e.training import ranks
from sae_lens_e2e.training.trainer import NonFiniteLossError

COMMANDS: dict[str, tuple[Callable[[list[str]], None], str]] = {
    "train": (train, "train an SAE, or several together; every field of the config is a flag"),
    "finetune": (finetune, "finetune SAEs that somebody has trained, and compare before and after"),
    "sweep": (sweep, "train and evaluate a grid of SAEs from one file"),
    "evaluate": (evaluate, "measure what SAEs cost their language model"),
    "report": (report, "everything the paper measured and drew, of any SAEs, on one page"),
    "features": (features, "what an SAE's features fire on and do, on one page; two SAEs side by side"),
    "objectives": (objectives, "list the objectives that are installed, and where each is from"),
    "convert": (convert, "turn Apollo's SAEs, or any of SAELens', into folders for Neuronpedia"),
    "dashboard": (dashboard, "run SAEDashboard on a folder"),
    "upload": (upload, "put folders on the Hugging Face Hub, with a model card"),
}


_IN_STEP = ("train", "sweep", "finetune")
"""Commands in which ranks take part that torchrun has started; the others are rank 0's."""

_SAY_IT_THEMSELVES = (ValueError, TypeError, OSError, ImportError, NonFiniteLossError, argparse.ArgumentError)
"""Errors whose message names what is to be put right; of any other the kind is said too."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, 2 after a one-line message for whatever went wrong, or 130 if interrupted.

    Of several ranks the one that something went wrong on says it, and the others wait until it has. With --debug, anywhere on the command line, an error is raised instead.
    """
    parser = argparse.ArgumentParser(
        prog="sae-lens-e2e",
        description="Train sparse autoencoders end to end with SAELens.",
        epilog="commands:\n" + "\n".join(f"  {name:<12} {help_text}" for name, (_, help_text) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--debug", action="store_true", help="show where an error comes from, not only what it says")
    parser.add_argument("command", choices=COMMANDS, metavar="command", help="see below; each takes --help")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parsed = parser.parse_args(argv)
    arguments = [argument for argument in parsed.arguments if argument != "--debug"]
    debug = parsed.debug or len(arguments) < len(parsed.arguments)
    try:
        ranks.begin()
        if ranks.is_first() or parsed.command in _IN_STEP:
            COMMANDS[parsed.command][0](arguments)
    except InterruptedException:
        if ranks.is_first():
            print(
                f"sae-lens-e2e {parsed.command}: interrupted; what was trained is in the checkpoints", file=sys.stderr
            )
        ranks.outlive(0)
        return 130
    except ranks.RankError as error:
        ranks.outlive(error.rank)
        return 2
    except ranks.RankLost as error:
        if ranks.is_first() or isinstance(error.__cause__, torch.OutOfMemoryError):
            print(f"sae-lens-e2e {parsed.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"sae-lens-e2e {parsed.command}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        print(f"sae-lens-e2e {parsed.command}: {_said(error)}", file=sys.stderr)
        return 2
    return 0


def _said(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return f"out of memory; run fewer prompts at a time, or fewer SAEs together ({named_line(error)})"
    if isinstance(error, _SAY_IT_THEMSELVES) and str(error).strip():
        return one_line(error)
    return f"{named_line(error)} (--debug shows where)"
