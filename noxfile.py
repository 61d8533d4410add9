"""The suite on every Python, and on the oldest and newest versions that pyproject allows: `nox` (or `make test-matrix`) for all of it.

uv installs, and brings the Pythons that this machine lacks. UV_TORCH_BACKEND=cpu takes PyTorch's small build from its own index.
"""

import nox

nox.needs_version = ">=2025.2"
nox.options.default_venv_backend = "uv"
nox.options.error_on_missing_interpreters = False

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
# What touches the libraries below: their private names, their models, stores, configs and trainers, and their files.
FAST = tuple(
    f"tests/test_{room}.py"
    for room in (
        "upstream",
        "runner",
        "saes",
        "splice",
        "store",
        "startup",
        "hooked_transformer",
        "neuronpedia",
        "figures",
    )
)


def run(session: nox.Session, resolution: str, *tests: str) -> None:
    """Install as somebody would, with no exact versions but those that the bounds leave, and run tests."""
    session.install("--resolution", resolution, "--editable", ".[test]")
    session.run("python", "-m", "pytest", "-n", "auto", "--dist", "worksteal", *tests, *session.posargs)


@nox.session(python=PYTHONS)
def newest(session: nox.Session) -> None:
    """All tests on the newest versions."""
    run(session, "highest")


@nox.session(python=PYTHONS)
def oldest(session: nox.Session) -> None:
    """All tests on the lower bounds of what we ask for."""
    run(session, "lowest-direct")


@nox.session(default=False)
def fast(session: nox.Session) -> None:
    """Minutes of it: what touches the libraries below, on the lower bounds and the Python that runs this."""
    run(session, "lowest-direct", *FAST)
