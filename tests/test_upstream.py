"""What we lean on in SAELens and TransformerLens is still there, and has the signatures we use."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import sae_lens_e2e
from sae_lens_e2e._upstream import LEANED_ON

PACKAGE = Path(sae_lens_e2e.__file__).parent
ROOMS = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "_upstream.py"]


@pytest.mark.parametrize(
    ("owner", "method"), [(owner, method) for owner, methods in LEANED_ON.items() for method in methods]
)
def test_a_method_has_the_parameters_we_use(owner: type, method: str) -> None:
    parameters = tuple(inspect.signature(getattr(owner, method)).parameters)
    assert parameters[: len(LEANED_ON[owner][method])] == LEANED_ON[owner][method], (
        f"{owner.__name__}.{method}{parameters} has changed: see what of ours overrides or calls it"
    )


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_names_are_imported_in_one_place_only(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("sae_lens", "transformer_lens"):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            assert not [name for name in names if name.startswith("_")], f"line {node.lineno}: move it to _upstream.py"


def test_what_is_listed_can_be_imported() -> None:
    module = importlib.import_module("sae_lens_e2e._upstream")
    assert all(hasattr(module, name) for name in module.__all__)
