"""Plugins: the example, really installed and trained with; names that clash; and plugins that are broken."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from typing_extensions import override

from sae_lens_e2e import (
    E2E,
    Batch,
    CrossEntropy,
    E2EDownstream,
    KLAndMSE,
    Local,
    Objective,
    PluginWarning,
    Term,
    available_objectives,
    get_objective,
    hookimpl,
)
from sae_lens_e2e.objectives.plugins import OWN_PACKAGE, make_objective, plugin_manager
from sae_lens_e2e.splice import Where
from sae_lens_e2e.splice.unembedding import LinearUnembedding
from tests.processes import run_fresh, run_stock

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "plugin_objective"
BROKEN = {
    "cannot-be-imported": "import a_module_that_nobody_has\n",
    "raises-on-register": (
        "from sae_lens_e2e import hookimpl\n"
        "@hookimpl\n"
        "def register_objectives(register):\n"
        "    raise RuntimeError('out of order')\n"
    ),
    "registers-a-string": (
        "from sae_lens_e2e import hookimpl\n@hookimpl\ndef register_objectives(register):\n    register('e2e_fast')\n"
    ),
}

WHERE_IT_IS_INSTALLED = """
import json, sys, warnings
import torch

sys.path.insert(0, sys.argv[1])

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from sae_lens_e2e import PluginWarning, available_objectives
    objectives = {name: found.origin for name, found in available_objectives().items()}
told = [str(w.message) for w in caught if issubclass(w.category, PluginWarning)]

from tests.models import random_model
from tests.training import make_runner, runner_config

warnings.simplefilter("ignore")
cfg = runner_config(objective="token_weighted_kl", training_tokens=2 * 48)
runner = make_runner(cfg, random_model())
before = {name: p.detach().clone() for name, p in runner.sae.named_parameters()}
sae = runner.run()
moved = [name for name, p in sae.named_parameters() if not torch.equal(p, before[name])]
print(json.dumps({
    "objectives": objectives, "warnings": told, "moved": moved,
    "finite": all(bool(p.isfinite().all()) for p in sae.parameters()), "metadata": sae.cfg.metadata.objective,
}))
"""


def fake_install(site: Path, package: str, source: str) -> None:
    """What pip leaves behind for a package of one module with an entry point in our group."""
    module = package.replace("-", "_")
    (site / f"{module}.py").write_text(source)
    info = site / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[sae_lens_e2e]\n{module} = {module}\n")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the example was installed by pip."""
    source = tmp_path_factory.mktemp("source") / "plugin"
    shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    site = tmp_path_factory.mktemp("site")
    installed = run_fresh(
        *("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"),
        *("--disable-pip-version-check", "--target", str(site), str(source)),
        cwd=ROOT,
    )
    assert installed.returncode == 0, installed.stderr
    return site


@pytest.fixture(scope="module")
def report(site: Path) -> dict[str, Any]:
    """What a process sees that imports this package with the example installed, and broken plugins beside it."""
    for package, source in BROKEN.items():
        fake_install(site, package, source)
    run = run_stock(WHERE_IT_IS_INSTALLED, str(site), cwd=ROOT)
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    return json.loads(run.stdout.splitlines()[-1])


def test_installed_plugin_is_listed_with_its_package(report: dict[str, Any]) -> None:
    assert report["objectives"] == {
        "local": OWN_PACKAGE,
        "e2e": OWN_PACKAGE,
        "e2e_ds": OWN_PACKAGE,
        "ce": OWN_PACKAGE,
        "kl_mse": OWN_PACKAGE,
        "token_weighted_kl": "sae-lens-e2e-token-weighted",
    }


def test_installed_plugin_trains(report: dict[str, Any]) -> None:
    assert sorted(report["moved"]) == ["W_dec", "W_enc", "b_dec", "b_enc"]
    assert report["finite"]
    assert report["metadata"] == {"name": "token_weighted_kl", "kl_coefficient": 1.0}


@pytest.mark.parametrize(
    ("package", "says"),
    [
        ("cannot-be-imported", "ModuleNotFoundError: No module named 'a_module_that_nobody_has'"),
        ("raises-on-register", "RuntimeError: out of order"),
        ("registers-a-string", "TypeError: 'e2e_fast' is not a subclass of sae_lens_e2e.Objective"),
    ],
)
def test_broken_plugin_is_named_and_left_out(report: dict[str, Any], package: str, says: str) -> None:
    assert set(BROKEN) == {"cannot-be-imported", "raises-on-register", "registers-a-string"}
    assert f"plugin {package} was left out: {says}" in report["warnings"]


def test_each_broken_plugin_is_told_of_when_found(report: dict[str, Any]) -> None:
    assert len(report["warnings"]) == len(BROKEN)


@pytest.fixture
def token_weighted_kl(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Objective]]:
    """The class of the installed example."""
    monkeypatch.syspath_prepend(site)
    import sae_lens_e2e_token_weighted as plugin  # pyright: ignore[reportMissingImports]

    assert Path(plugin.__file__ or "").is_relative_to(site)
    yield plugin.TokenWeightedKL
    sys.modules.pop("sae_lens_e2e_token_weighted")


def test_example_weighs_every_distinct_token_alike(token_weighted_kl: type[Objective]) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.tensor([7, 7, 7, 2, 2, 9])
    spliced, clean = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 11, generator=generator, dtype=torch.float64)
    where = Where.everywhere(tokens[None])
    batch = Batch(tokens[None], where, {}, {}, {}, clean, spliced, LinearUnembedding(weight))
    log_p, log_q = (clean @ weight).log_softmax(-1), (spliced @ weight).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    expected = (kl[:3].mean() + kl[3:5].mean() + kl[5]) / 3
    (term,) = token_weighted_kl().terms(batch).values()
    assert float(term.value()) == pytest.approx(float(expected), rel=1e-6)
    assert float(term.value()) != pytest.approx(float(kl.mean()), rel=1e-2)
    assert term.coefficient == 1.0


# Names


@dataclass(frozen=True)
class Mine(Objective):
    name: ClassVar[str] = "mine"
    compares_logits: ClassVar[bool] = False
    mse_coefficient: float = 1.0
    scales: tuple[float, ...] = (1.0,)

    @override
    def terms(self, batch: Batch) -> dict[str, Term]:
        return {"mse_loss": Term(self.mse_coefficient, lambda: batch.mse_loss)}


@dataclass(frozen=True)
class Theirs(Mine):
    """Another objective by the same name."""


@dataclass(frozen=True)
class Nameless(Objective):
    @override
    def terms(self, batch: Batch) -> dict[str, Term]:
        return {"mse_loss": Term(1.0, lambda: batch.mse_loss)}


def plugin_with(*objectives: Any, then_raise: Exception | None = None) -> ModuleType:
    @hookimpl
    def register_objectives(register: Callable[[Any], None]) -> None:
        for objective in objectives:
            register(objective)
        if then_raise is not None:
            raise then_raise

    module = ModuleType("a_plugin")
    module.register_objectives = register_objectives  # pyright: ignore[reportAttributeAccessIssue]
    return module


@contextmanager
def installed(**plugins: Any) -> Iterator[None]:
    """Plugins registered by those names until the block is left."""
    manager = plugin_manager()
    for name, plugin in plugins.items():
        manager.register(plugin, name=name)
    try:
        yield
    finally:
        for name in plugins:
            manager.unregister(name=name)


def test_built_in_objectives_are_registered_by_this_package() -> None:
    built_in = {name: found for name, found in available_objectives().items() if found.origin == OWN_PACKAGE}
    assert {name: found.objective for name, found in built_in.items()} == {
        "local": Local,
        "e2e": E2E,
        "e2e_ds": E2EDownstream,
        "ce": CrossEntropy,
        "kl_mse": KLAndMSE,
    }
    assert list(available_objectives())[:5] == ["local", "e2e", "e2e_ds", "ce", "kl_mse"]


def test_a_plugins_objective_goes_by_its_name_while_it_is_installed() -> None:
    with installed(mypackage=plugin_with(Mine)):
        assert available_objectives()["mine"].origin == "mypackage"
        assert get_objective("mine") is Mine
        assert make_objective("mine") == Mine()
        assert make_objective({"name": "mine", "mse_coefficient": 2}) == Mine(mse_coefficient=2)
    assert "mine" not in available_objectives()


def test_unknown_name_lists_those_that_exist_and_the_closest() -> None:
    with installed(mypackage=plugin_with(Mine)), pytest.raises(ValueError, match="'e2e_sd' is not installed") as error:
        get_objective("e2e_sd")
    message = str(error.value)
    for name, origin in {"local": OWN_PACKAGE, "e2e": OWN_PACKAGE, "e2e_ds": OWN_PACKAGE, "mine": "mypackage"}.items():
        assert f"{name!r} ({origin})" in message
    assert message.endswith("did you mean 'e2e_ds'?")


def test_a_name_like_no_other_gets_no_suggestion() -> None:
    with pytest.raises(ValueError, match="not installed") as error:
        make_objective("zzzz")
    assert "did you mean" not in str(error.value)


@pytest.mark.parametrize(
    ("plugins", "packages"),
    [
        ({"first": plugin_with(Mine), "second": plugin_with(Theirs)}, ("first", "second")),
        ({"first": plugin_with(type("Hijack", (E2E,), {}))}, (OWN_PACKAGE, "first")),
        ({"first": plugin_with(Mine, Theirs)}, ("first", "first")),
    ],
    ids=["two plugins", "a built-in's name", "twice in one plugin"],
)
def test_a_name_taken_twice_names_both_packages(plugins: dict[str, Any], packages: tuple[str, str]) -> None:
    name = "e2e" if OWN_PACKAGE in packages else "mine"
    with installed(**plugins):
        with pytest.raises(ValueError, match=f"{name!r} is registered by both {packages[0]} and {packages[1]}"):
            available_objectives()
        with pytest.raises(ValueError, match="uninstall one"):
            get_objective(name)
    assert available_objectives()


def test_the_same_class_twice_is_no_clash() -> None:
    with installed(first=plugin_with(Mine), second=plugin_with(Mine)):
        assert available_objectives()["mine"].origin == "first"


@pytest.mark.parametrize(
    ("registered", "says"),
    [
        ("e2e_fast", "'e2e_fast' is not a subclass of sae_lens_e2e.Objective"),
        (Mine(), "is not a subclass of sae_lens_e2e.Objective"),
        (dict, "<class 'dict'> is not a subclass"),
        (Nameless, "Nameless has no `name`"),
    ],
    ids=["a string", "an instance", "another class", "no name"],
)
def test_what_is_no_objective_is_reported_and_the_rest_of_it_left_out(registered: Any, says: str) -> None:
    with (
        installed(culprit=plugin_with(Theirs, registered), bystander=plugin_with(Mine)),
        pytest.warns(PluginWarning, match="plugin culprit was left out") as told,
    ):
        found = available_objectives()
    assert says in str(told[0].message)
    assert found["mine"].objective is Mine
    assert found["mine"].origin == "bystander"
    assert {"local", "e2e", "e2e_ds"} < set(found)


def test_a_register_hook_that_raises_is_reported_and_left_out() -> None:
    with (
        installed(culprit=plugin_with(Theirs, then_raise=RuntimeError("half way")), bystander=plugin_with(Mine)),
        pytest.warns(PluginWarning, match="plugin culprit was left out: RuntimeError: half way"),
    ):
        assert available_objectives()["mine"].objective is Mine


# What a user may write for an objective


@pytest.mark.parametrize(
    ("spec", "objective"),
    [
        ("local", Local()),
        ("e2e_ds", E2EDownstream()),
        (E2E(kl_coefficient=3), E2E(kl_coefficient=3)),
        ({"name": "e2e"}, E2E()),
        ({"name": "e2e_ds", "downstream_hooks": ["a", "b"]}, E2EDownstream(downstream_hooks=("a", "b"))),
    ],
    ids=str,
)
def test_what_names_an_objective(spec: Any, objective: Objective) -> None:
    assert make_objective(spec) == objective


@pytest.mark.parametrize("spec", [None, 3, ["e2e"], E2E], ids=repr)
def test_what_cannot_name_an_objective_is_refused(spec: Any) -> None:
    with pytest.raises(TypeError, match="must be the name of an objective or an Objective"):
        make_objective(spec)


def test_settings_without_a_name_are_refused() -> None:
    with pytest.raises(ValueError, match="has no 'name'"):
        make_objective({"kl_coefficient": 1.0})


def test_unknown_setting_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match="'e2e' has no setting 'kl'; it has splices, kl_coefficient, mse_coefficient"):
        make_objective({"name": "e2e", "kl": 1.0})


def test_settings_with_any_sequence_survive_json() -> None:
    objective = Mine(scales=(1.0, 2.0))
    with installed(mypackage=plugin_with(Mine)):
        again = make_objective(json.loads(json.dumps(objective.to_dict())))
    assert again == objective
