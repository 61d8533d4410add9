"""`sae-lens-e2e finetune`: SAEs that somebody has trained, finetuned, and before and after in one table."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sae_lens_e2e.cli.examples import FINETUNE
from sae_lens_e2e.cli.parser import add_trust
from sae_lens_e2e.cli.settings_parser import SettingsParser
from sae_lens_e2e.cli.train_flags import flags_of_a_finetune, parsed_yaml
from sae_lens_e2e.finetuning import Finetuned
from sae_lens_e2e.finetuning import finetune as run_finetune
from sae_lens_e2e.finetuning.settings import RECIPE, TRAINING_TOKENS, run_fields, sae_fields

REPORT_FILENAME = "report.html"
_REPORTED = ("evaluation", "geometry")


def finetune(arguments: list[str]) -> None:
    """Finetune SAEs, several of them together, and print what that changed."""
    parsed = parse_finetune(arguments or ["--help"])
    report = parsed.pop("report")
    result = run_finetune(*parsed.pop("sources"), **parsed)
    print(result.summary())
    for name, folder in result.folders.items():
        print(f"{name}: {folder}")
    if report:
        print(_report(result))


def parse_finetune(arguments: Sequence[str]) -> dict[str, Any]:
    """The arguments of `finetune` that flags mean, `sources` and `report` among them: only what is given, for the rest has defaults."""
    parser = SettingsParser(
        prog="sae-lens-e2e finetune",
        allow_abbrev=False,
        description="Finetune SAEs on the model, hook and data in their metadata: objective "
        f"{RECIPE['objective']}, learning rate {RECIPE['lr']} falling linearly to 0, over 5 %% of the tokens that they were trained on or, where "
        f"those are not known, {TRAINING_TOKENS:,}. Several are trained together. L0 is held as far as the architecture can. Every "
        "field of a run is a flag, and so is every setting of a training SAE (--l1_coefficient, --k, ...).",
        example=FINETUNE,
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="RELEASE/ID of SAELens' registry (gpt2-small-res-jb/blocks.4.hook_resid_pre), OWNER/REPOSITORY:FOLDER of the Hub, a folder, "
        "or an SAE of Apollo's (see load_apollo_sae)",
    )
    # Those of `finetune` itself; what is not given has its default there.
    own: dict[str, dict[str, Any]] = {
        "architecture": {"help": "the training architecture to go on as (default: as it was trained)"},
        "thresholds": {"choices": ["move", "stay"], "help": "of a jumprelu SAE, while it is trained (default: move)"},
        "hold_l0": {"type": parsed_yaml, "metavar": "bool", "help": "whether L0 is held (default: True)"},
        "fold_centring": {
            "type": parsed_yaml,
            "metavar": "bool",
            "help": "whether an SAE of a processed model is made one of the unprocessed (default: where that is exact)",
        },
        "held_out": {
            "type": float,
            "help": "part of the documents kept for evaluation (default: as the metadata say, or 0.1)",
        },
        "evaluation_tokens": {
            "type": int,
            "help": "held-out tokens to evaluate on, before and after (default: 100000)",
        },
        "overwrite": {"action": "store_true", "help": "write over what is in output_path"},
    }
    for name, options in own.items():
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, **options)
    for name in sorted(sae_fields() - run_fields() - own.keys()):
        parser.add_argument(f"--{name}", type=parsed_yaml, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.add_argument("--report", action="store_true", help=f"write {REPORT_FILENAME} on both, before and after")
    add_trust(parser)
    parser.add_arguments(flags_of_a_finetune(), dest="cfg")
    parsed = vars(parser.parse_args(arguments))
    cfg, given = parsed.pop("cfg"), _names(arguments)
    # A logger's settings are not the run's: one of them given is a logger given.
    settings = {name: getattr(cfg, name) for name in run_fields() if name in given}
    if given & set(vars(cfg.logger)):
        cfg.logger.log_to_wandb = cfg.logger.log_to_wandb if "log_to_wandb" in given else False
        settings["logger"] = cfg.logger
    return {**parsed, **settings}


def _names(arguments: Sequence[str]) -> set[str]:
    """The names of the flags that are given."""
    return {part[2:].split("=")[0] for part in arguments if part.startswith("--")}


def _report(result: Finetuned) -> Path:
    """A report of the SAEs before and after, in the folder of the last of them."""
    # Here, because the other commands do without the extra that figures need.
    from sae_lens_e2e.report import make_report

    folders = list(result.folders.values())
    if not folders:
        raise ValueError("--report is written into output_path; give one")
    with TemporaryDirectory() as temporary:
        before = {name: Path(temporary) / f"{name}-before" for name in result.sources}
        for name, folder in before.items():
            result.sources[name].save_model(folder)
        pages = [
            make_report(
                [before[name], folder],
                folder / REPORT_FILENAME,
                max_tokens=result.after[name].n_tokens,
                measures=_REPORTED,
            )
            for name, folder in result.folders.items()
        ]
    return pages[-1]
