"""Help of the commands whose flags are the fields of a config: those that most runs set, said without SAELens, which has the others."""

from sae_lens_e2e.cli.examples import FINETUNE, TRAIN
from sae_lens_e2e.cli.parser import Parser

HELP_ALL = "--help-all"

_ALL = {
    HELP_ALL: "every flag; with --architecture NAME those of that SAE, with --config FILE those of its run. Takes seconds, as SAELens is imported"
}
_TRAIN = {
    "the language model and its data": {
        "--model_name": "'embedded', a folder, or a name on the Hub",
        "--hook_name": "where the SAE reads, and writes: blocks.3.hook_resid_pre",
        "--hook_name_out": "where a transcoder writes",
        "--dataset_path": "'embedded', a file, a folder, or a name on the Hub",
        "--context_size": "tokens a prompt",
    },
    "the SAE": {
        "--architecture": "standard, topk, batchtopk, jumprelu, gated, transcoder, apollo, ...",
        "--d_in": "width of the activations at the hook",
        "--d_sae": "features",
        "--l1_coefficient": "weight of the sparsity loss, of a standard SAE",
        "--k": "features that fire on a token, of a topk or batchtopk SAE",
    },
    "training": {
        "--objective": "local, e2e, e2e_ds, ce, kl_mse, warm_e2e_ds, ..., or its settings as JSON; `sae-lens-e2e objectives` lists them",
        "--training_tokens": "to train on, in all",
        "--train_batch_size_tokens": "an optimizer step",
        "--store_batch_size_prompts": "prompts a forward pass",
        "--lr": "learning rate",
        "--max_grad_norm": "to which each step's gradient is clipped",
        "--seed": "of the SAE's first weights",
        "--device": "cpu, cuda, cuda:1, ...",
    },
    "what is written": {
        "--output_path": "the folder of the SAE",
        "--overwrite": "write there even if it holds something else",
        "--held_out": "part of the documents kept for evaluation",
        "--n_checkpoints": "written on the way",
        "--resume_from_checkpoint": "a checkpoint to go on from",
        "--log_to_wandb": "false for no Weights & Biases",
    },
    "more": {
        "--config": "take settings from a YAML or JSON file, of several SAEs too; flags override it",
        **_ALL,
    },
}
_FINETUNE = {
    "training": {
        "--objective": "what is compared (default: kl_mse)",
        "--training_tokens": "(default: 5 %% of what the SAE was trained on)",
        "--lr": "learning rate, which falls to 0",
        "--architecture": "to go on as (default: as it was trained)",
        "--hold_l0": "whether L0 is held (default: true)",
        "--thresholds": "move or stay, of a jumprelu SAE",
        "--fold_centring": "make an SAE of a processed model one of the unprocessed",
        "--device": "cpu, cuda, cuda:1, ...",
    },
    "what is evaluated and written": {
        "--held_out": "part of the documents kept for evaluation",
        "--evaluation_tokens": "held-out tokens to evaluate on, before and after",
        "--report": "write a page on both, before and after",
        "--output_path": "the folder of the SAE, or of each",
        "--overwrite": "write over what is there",
        "--log_to_wandb": "true for Weights & Biases",
    },
    "more": {
        "--trust-remote-code": "load the model with whatever the SAE's metadata say",
        **_ALL,
    },
}
SHORT = {
    "train": (
        "Train an SAE with an end-to-end objective, or several together. Every field of E2ERunnerConfig, and of the SAE's config, is a "
        "flag; these are the ones that most runs set.",
        _TRAIN,
        TRAIN,
    ),
    "finetune": (
        "Finetune SAEs that somebody has trained on the model, hook and data in their metadata, at the L0 they had. Every field of a run and "
        "of a training SAE is a flag; these are the ones that most runs set.",
        _FINETUNE,
        FINETUNE,
    ),
}
"""By command: what it does, its groups of flags, and an example."""


def is_asked(command: str, arguments: list[str]) -> bool:
    """Whether a command of these is given without more than the wish for help."""
    return command in SHORT and arguments in ([], ["-h"], ["--help"])


def short_help(command: str) -> str:
    """The short help of one of these commands."""
    description, groups, example = SHORT[command]
    usage = f"sae-lens-e2e {command} {'SOURCE [SOURCE ...] ' if command == 'finetune' else ''}--NAME VALUE ...\n\noptions: --NAME VALUE, or --NAME=VALUE"
    parser = Parser(usage=usage, description=description, example=example, add_help=False)
    for title, flags in groups.items():
        group = parser.add_argument_group(title)
        for flag, said in flags.items():
            group.add_argument(flag, help=said, metavar="")
    return parser.format_help()
