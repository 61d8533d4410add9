"""The command line, `sae-lens-e2e`: a module a command, imported when that is given, and what it runs when its arguments are known to be right."""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from sae_lens_e2e import __version__
from sae_lens_e2e.cli.examples import TRAIN
from sae_lens_e2e.cli.known_flags import refuse_unknown_flags
from sae_lens_e2e.cli.messages import told
from sae_lens_e2e.cli.parser import Parser, nearest
from sae_lens_e2e.cli.short_help import HELP_ALL, SHORT, is_asked, short_help
from sae_lens_e2e.cli.terminal import RED, styled
from sae_lens_e2e.errors import named_line, one_line
from sae_lens_e2e.launch import has_ranks

PROG = "sae-lens-e2e"

Command = Callable[[list[str]], None]


def _late(name: str) -> Command:
    """The function of a command's name in the module of its name, which is imported when it is called."""

    def command(arguments: list[str]) -> None:
        if is_asked(name, arguments):
            print(short_help(name), end="")
            raise SystemExit(0)
        if name in SHORT:
            refuse_unknown_flags(name, arguments)
        arguments = ["--help" if argument == HELP_ALL else argument for argument in arguments]
        getattr(import_module(f"{__name__}.{name}"), name)(arguments)

    return command


# A new one is a module cli/NAME.py with a function NAME, and a line here.
_SAID = {
    "train": "train an SAE, or several together; every field of the config is a flag",
    "finetune": "finetune SAEs that somebody has trained, and compare before and after",
    "sweep": "train and evaluate a grid of SAEs from one file",
    "evaluate": "measure what SAEs cost their language model",
    "report": "everything the paper measured and drew, of any SAEs, on one page",
    "features": "what an SAE's features fire on and do, on one page; two SAEs side by side",
    "objectives": "list the objectives that are installed, and where each is from",
    "convert": "turn Apollo's SAEs, or any of SAELens', into folders for Neuronpedia",
    "dashboard": "run SAEDashboard on a folder",
    "saebench": "run SAEBench's core evaluation on SAEs, for a report to show beside ours",
    "upload": "put folders on the Hugging Face Hub, with a model card",
}

COMMANDS: dict[str, tuple[Command, str]] = {name: (_late(name), said) for name, said in _SAID.items()}

_IN_STEP = ("train", "sweep", "finetune")
"""Commands in which ranks take part that torchrun has started; the others are rank 0's."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, 2 after a one-line message for whatever went wrong, or 130 if interrupted.

    Of several ranks the one that something went wrong on says it, and the others wait until it has. With --debug, anywhere on the command line, an error is raised instead.
    """
    try:
        parsed = _parser().parse_args(argv)
    except ValueError as error:
        return _failed(PROG, f"{error} (--help shows what there is)")
    arguments = [argument for argument in parsed.arguments if argument not in ("--debug", "-v")]
    if parsed.command not in COMMANDS:
        near = nearest(parsed.command, COMMANDS)
        return _failed(PROG, f"there is no command {parsed.command!r}{near} (--help lists them)")
    prog = f"{PROG} {parsed.command}"
    with told(parsed.verbose or "-v" in parsed.arguments):
        return _run(parsed.command, arguments, prog, parsed.debug or "--debug" in parsed.arguments)


def _parser() -> Parser:
    parser = Parser(
        prog=PROG,
        description="Train sparse autoencoders end to end with SAELens.",
        epilog="commands:\n" + "\n".join(f"  {name:<12} {said}" for name, (_, said) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        example=TRAIN,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--debug", action="store_true", help="show where an error comes from, not only what it says")
    parser.add_argument("-v", dest="verbose", action="store_true", help="say more of what is done, and every warning")
    parser.add_argument("command", metavar="command", help="see below; each takes --help, and --debug and -v as well")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _run(command: str, arguments: list[str], prog: str, debug: bool) -> int:
    try:
        if _takes_part(command):
            COMMANDS[command][0](arguments)
    except _raised_by("sae_lens_e2e._upstream", "InterruptedException"):
        from sae_lens_e2e.training import ranks

        if ranks.is_first():
            _failed(prog, "interrupted; what was trained is in the checkpoints")
        ranks.outlive(0)
        return 130
    except _raised_by("sae_lens_e2e.training.ranks", "RankError") as error:
        from sae_lens_e2e.training import ranks

        ranks.outlive(error.rank)  # pyright: ignore[reportAttributeAccessIssue]
        return 2
    except _raised_by("sae_lens_e2e.training.ranks", "RankLost") as error:
        from sae_lens_e2e.training import ranks

        return _failed(prog, str(error)) if ranks.is_first() or _is_out_of_memory(error.__cause__) else 2
    except KeyboardInterrupt:
        return _failed(prog, "interrupted", 130)
    except Exception as error:
        if debug:
            raise
        return _failed(prog, _said(error))
    return 0


def _takes_part(command: str) -> bool:
    """Whether this process runs a command, once it knows of the others that torchrun has started, if it has."""
    if not has_ranks():
        return True
    from sae_lens_e2e.training import ranks

    ranks.begin()
    return ranks.is_first() or command in _IN_STEP


def _raised_by(module: str, name: str) -> tuple[type[BaseException], ...]:
    """An exception class of a module, or none where that has not been imported, so that nothing can have raised it."""
    return (getattr(sys.modules[module], name),) if module in sys.modules else ()


def _is_out_of_memory(error: BaseException | None) -> bool:
    return isinstance(error, (MemoryError, *_raised_by("torch", "OutOfMemoryError")))


def _failed(prog: str, said: str, code: int = 2) -> int:
    print(f"{styled(f'{prog}:', RED, sys.stderr)} {said}", file=sys.stderr)
    return code


def _said(error: Exception) -> str:
    if _is_out_of_memory(error):
        return f"out of memory; run fewer prompts at a time, or fewer SAEs together ({named_line(error)})"
    # Their messages name what is to be put right; of any other error the kind is said too.
    non_finite = _raised_by("sae_lens_e2e.training.trainer", "NonFiniteLossError")
    if (
        isinstance(error, (ValueError, TypeError, OSError, ImportError, argparse.ArgumentError, *non_finite))
        and str(error).strip()
    ):
        return one_line(error)
    return f"{named_line(error)} (--debug shows where)"
