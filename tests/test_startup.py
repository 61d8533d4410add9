"""What answers at once does so: without torch or SAELens, and within a second of CPU. And whoever imports SAELens has ours."""

import ast
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sae_lens.loading.pretrained_sae_loaders import NAMED_PRETRAINED_SAE_CONFIG_GETTERS, NAMED_PRETRAINED_SAE_LOADERS
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

import sae_lens_e2e
from sae_lens_e2e import cli
from sae_lens_e2e.apollo import loaders
from sae_lens_e2e.cli import main
from sae_lens_e2e.cli.known_flags import unknown_flag
from sae_lens_e2e.cli.settings_parser import SettingsParser
from sae_lens_e2e.cli.short_help import HELP_ALL, SHORT
from sae_lens_e2e.registration import LOADERS
from tests.processes import run_fresh, run_stock

HEAVY = ("torch", "sae_lens", "transformer_lens", "transformers", "pandas", "wandb")
AT_ONCE = [
    (["--version"], 0, sae_lens_e2e.__version__),
    (["--help"], 0, "commands:"),
    (["objectives"], 0, "downstream_coefficient=2.5"),
    (["trian"], 2, "there is no command 'trian'; did you mean train?"),
    (["--wrong", "train"], 2, "unrecognized arguments: --wrong"),
    (["evaluate", "my_sae", "--max-tokns", "3"], 2, "--max-tokns 3; did you mean --max-tokens?"),
    (["train", "--objektive", "e2e"], 2, "unrecognized arguments: --objektive; did you mean --objective?"),
    (["finetune", "my_sae", "--training_token=3"], 2, "--training_token; did you mean --training_tokens?"),
    *(([name, "--help"], 0, "example:") for name in cli.COMMANDS),
]
"""Arguments, the code that they end with, and something of what is said."""


@pytest.mark.parametrize(
    ("arguments", "code", "says"), AT_ONCE, ids=lambda p: "-".join(p) if isinstance(p, list) else ""
)
def test_it_answers_without_the_libraries_below(arguments: list[str], code: int, says: str) -> None:
    program = (
        "import sys\n"
        "from sae_lens_e2e.cli import main\n"
        "try:\n    code = main(sys.argv[1:])\n"
        "except SystemExit as done:\n    code = done.code\n"
        f"print([name for name in {HEAVY} if name in sys.modules])\n"
        "sys.exit(code)\n"
    )
    done = run_fresh("-c", program, *arguments)
    assert done.returncode == code
    assert says in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert len(done.stderr.splitlines()) == (1 if code else 0)


@pytest.mark.parametrize("arguments", [["--version"], ["objectives"], ["report", "--help"]], ids=" ".join)
def test_it_answers_within_a_second_of_cpu(arguments: list[str]) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "sae_lens_e2e", *arguments], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_the_public_names_are_the_same_wherever_they_are_listed() -> None:
    tree = ast.parse(Path(sae_lens_e2e.__file__).read_text())
    (for_checkers,) = (node for node in tree.body if isinstance(node, ast.If))
    imported = {
        alias.name: node.module
        for node in for_checkers.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == sae_lens_e2e._HOME
    assert sorted(imported) == sorted(sae_lens_e2e.__all__)
    assert set(sae_lens_e2e.__all__) <= set(dir(sae_lens_e2e))
    for name in sae_lens_e2e.__all__:
        assert getattr(sae_lens_e2e, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'E3E'"):
        _ = sae_lens_e2e.E3E  # pyright: ignore[reportAttributeAccessIssue]


# What it needs has been imported by the process that this is a copy of, which takes the seconds; it has not.
WITHOUT_SAE_LENS = """
import sys
for name in [name for name in sys.modules if name.partition(".")[0] == "sae_lens"]:
    del sys.modules[name]
"""
REGISTERED = """
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.loading.pretrained_sae_loaders import NAMED_PRETRAINED_SAE_LOADERS
assert {"apollo", "transcoder", "jumprelu_skip_transcoder"} <= SAE_TRAINING_CLASS_REGISTRY.keys()
assert "apollo_neuronpedia" in NAMED_PRETRAINED_SAE_LOADERS
"""


@pytest.mark.parametrize(
    "first",
    [
        "import sae_lens_e2e; assert 'sae_lens' not in sys.modules; import sae_lens",
        "import sae_lens; import sae_lens_e2e",
        # SAELens is then asked for in the middle of one of ours, which others of ours need.
        "import sae_lens_e2e.output",
        "import sae_lens_e2e.architectures.apollo",
    ],
)
def test_sae_lens_knows_ours_in_whatever_order_they_are_imported(first: str, tmp_path: Path) -> None:
    done = run_stock(f"{WITHOUT_SAE_LENS}{first}\n{REGISTERED}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_loaders_that_are_registered_are_those_that_apollo_has() -> None:
    for name, (loader, config) in LOADERS.items():
        assert NAMED_PRETRAINED_SAE_LOADERS[name] is getattr(loaders, loader)
        assert NAMED_PRETRAINED_SAE_CONFIG_GETTERS[name] is getattr(loaders, config)


@pytest.mark.parametrize("command", SHORT)
def test_the_short_help_names_flags_that_there_are(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = ""
    for architecture in ([], ["--architecture", "topk"]) if command == "train" else ([],):
        with pytest.raises(SystemExit):
            main([command, *architecture, HELP_ALL])
        said += capsys.readouterr().out
    for flag in (flag for flags in SHORT[command][1].values() for flag in flags if flag != HELP_ALL):
        assert re.search(rf"^ .*{flag}\b", said, flags=re.MULTILINE), flag


@pytest.mark.parametrize("command", SHORT)
def test_no_flag_that_there_is_is_taken_for_unknown(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there_are: set[str] = set()
    parse = SettingsParser.parse_args

    def note(parser: Any, *arguments: Any) -> Any:
        try:
            return parse(parser, *arguments)
        finally:
            there_are.update(parser._option_string_actions)

    monkeypatch.setattr(SettingsParser, "parse_args", note)
    for architecture in SAE_TRAINING_CLASS_REGISTRY if command == "train" else ["standard"]:
        # What it is given besides is wrong, so that nothing is done.
        assert (
            main([command, *(["sae"] if command == "finetune" else []), "--architecture", architecture, "--lr", "none"])
            == 2
        )
    assert len(there_are) > 100
    assert unknown_flag(command, sorted(there_are)) is None
    assert unknown_flag(command, ["--lr", "--wrong"]) == "--wrong"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_every_command_ends_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0
    example = capsys.readouterr().out.split("\nexample:\n")[1]
    assert example.startswith(f"  sae-lens-e2e {command}")
    assert max(map(len, example.splitlines())) <= 80


def test_what_other_processes_find_in_the_environment_is_no_rank() -> None:
    done = run_fresh("-m", "sae_lens_e2e", "objectives", RANK="0", WORLD_SIZE="1")
    assert done.returncode == 0, done.stderr
