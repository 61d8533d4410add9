"""Replacement models: passes in which only some are spliced in, what all cost at once, and its figure in a report."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, LoggingConfig

from sae_lens_e2e import E2E, CrossEntropy, E2EDownstream
from sae_lens_e2e.evaluation import evaluate_replacement, evaluate_together
from sae_lens_e2e.evaluation.files import write_together
from sae_lens_e2e.objectives.plugins import make_objective
from sae_lens_e2e.splice import Site, frozen
from tests.models import dataset_of, random_model
from tests.saes import inference_sae, randomised
from tests.test_joint_equations import assert_gradients, mask_of, naive_gradients
from tests.test_report import BATCH, Elements, data, report
from tests.test_transcoders import TOKENS, config, naive_loss, transcoder
from tests.training import group_gradients, make_multi_runner, multi_config

SITES = {f"mlp{i}": Site(f"blocks.{i}.hook_resid_mid", (f"blocks.{i}.hook_mlp_out",)) for i in (2, 0, 1)}


def make_runner(objective: Any, architecture: str = "skip_transcoder", **overrides: Any) -> Any:
    saes = {name: (site, config(architecture)) for name, site in SITES.items()}
    settings: dict[str, Any] = {"objective": objective, "store_batch_size_prompts": 4, **overrides}
    runner = make_multi_runner(multi_config(saes, **settings))
    for i, sae in enumerate(runner.saes.values()):
        randomised(sae, seed=i)
    return runner


# Passes


@pytest.mark.parametrize(
    ("splices", "passes"),
    [
        (("all",), ["abc"]),
        ("each_alone", ["a", "b", "c"]),
        (("all", "each_alone"), ["abc", "a", "b", "c"]),
        (["halves", "all"], ["a", "bc", "abc"]),
    ],
)
def test_which_are_spliced_in_together(splices: Any, passes: list[str]) -> None:
    for objective in (E2E(splices=splices), E2EDownstream(splices=splices), CrossEntropy(splices=splices)):
        assert ["".join(names) for names in objective.passes("abc")] == passes
        # Of one there is one pass, however it is asked for.
        assert [list(names) for names in objective.passes(["only"])] == [["only"]]
        assert make_objective(objective.to_dict()) == objective


@pytest.mark.parametrize("splices", [(), "each", ("all", "all"), ("all", 3), 3, None])
def test_passes_that_there_are_not(splices: Any) -> None:
    with pytest.raises(ValueError, match=r"^e2e: splices=.* must name") as raised:
        E2E(splices=splices)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("splices", [("all", "each_alone"), ("halves",)])
def test_the_loss_is_the_sum_over_passes(splices: tuple[str, ...]) -> None:
    """Every pass has the objective's terms, of what is given to each transcoder there; an own term counts once."""
    objective = E2E(kl_coefficient=0.7, mse_coefficient=0.3, splices=splices)
    runner = make_runner(objective)
    saes, names = runner.saes, sorted(SITES)
    sets = {"halves": [names[:1], names[1:]], "all": [names], "each_alone": [[name] for name in names]}
    counted: set[str] = set()
    losses = []
    with frozen(runner.model):
        for of_pass in (of_pass for splice in splices for of_pass in sets[splice]):
            again = {name: saes[name].cfg.l1_coefficient for name in counted.intersection(of_pass)}
            for name in again:
                saes[name].cfg.l1_coefficient = 0.0
            of_names = {name: SITES[name] for name in of_pass}
            losses.append(naive_loss(runner.model, of_names, {n: saes[n] for n in of_names}, objective, mask_of(False)))
            for name, coefficient in again.items():
                saes[name].cfg.l1_coefficient = coefficient
            counted.update(of_pass)
        expected = naive_gradients(torch.stack(losses).sum(), saes)
    group = runner.make_group()
    with runner.splice.running():
        assert_gradients(group_gradients(group, TOKENS), expected, 1e-5)
        group.step(TOKENS)
    for output in group.outputs.values():
        torch.testing.assert_close(output.loss, torch.stack(losses).sum().detach(), rtol=1e-6, atol=0)
        assert output.n_tokens == TOKENS.numel()


def test_a_threshold_moves_once_and_on_the_first_of_the_passes() -> None:
    thresholds = {}
    for splices in (("all",), ("all", "each_alone"), ("each_alone", "all")):
        group = make_runner(E2E(splices=splices), "batchtopk_transcoder").make_group()
        with group.model.running():
            group.step(TOKENS)
        thresholds[splices] = {name: float(t.sae.topk_threshold) for name, t in group.trainers.items()}
    assert thresholds["all",] == thresholds["all", "each_alone"]
    # The first is given the clean stream either way.
    assert thresholds["each_alone", "all"]["mlp0"] == thresholds["all",]["mlp0"]
    assert thresholds["each_alone", "all"]["mlp2"] != thresholds["all",]["mlp2"]


def test_a_run_in_passes_is_logged_by_pass(tmp_path: Path) -> None:
    runner = make_runner(
        {"name": "e2e", "splices": ["all", "each_alone"]},
        output_path=str(tmp_path),
        logger=LoggingConfig(log_to_wandb=False, wandb_log_frequency=1),
    )
    runner.run()
    columns = (tmp_path / "history.csv").read_text().splitlines()[0].split(",")
    assert {"mlp2/losses/kl/mlp0+mlp1+mlp2", "mlp2/losses/kl/mlp1"} <= set(columns)
    assert SAE.load_from_disk(tmp_path / "mlp1").cfg.metadata.objective["splices"] == ["all", "each_alone"]


# Evaluated, and in a report


def transcoders(**metadata: Any) -> dict[str, SAE[Any]]:
    return {
        name: transcoder(site.read, site.writes[0], 16, seed=i, **metadata)
        for i, (name, site) in enumerate(SITES.items())
    }


def test_a_replacement_model_is_made_of_transcoders() -> None:
    options: dict[str, Any] = {"batch_size_prompts": 4, "verbose": False}
    found = evaluate_replacement(transcoders(), random_model(), dataset_of(TOKENS), **options)
    assert found == evaluate_together(transcoders(), random_model(), dataset_of(TOKENS), **options)
    assert found.hook_names_out == {f"mlp{i}": f"blocks.{i}.hook_mlp_out" for i in range(3)}
    sae = make_runner(E2E()).saes | {"sae": inference_sae("standard")}
    with pytest.raises(ValueError, match=r"^sae: a standard stands for what it reads and replaces no part"):
        evaluate_replacement(sae, random_model(), dataset_of(TOKENS), **options)


def test_the_report_of_one_hook_shows_what_the_whole_run_costs(tmp_path: Path) -> None:
    run, saes = tmp_path / "run", transcoders(model_name="tiny", dataset_path="random", context_size=12)
    for name, sae in saes.items():
        sae.save_model(run / name)
    found = evaluate_replacement(saes, random_model(), data(), batch_size_prompts=BATCH, verbose=False)
    write_together(found, run)
    options: dict[str, Any] = {"hook_name": SITES["mlp1"].read, "measures": ["evaluation"]}
    page = Elements(report([run], tmp_path / "page.html", **options))
    head, *rows = page.tables["replacement"]
    assert head[:4] == ["run", "spliced in", "SAEs", "down to"]
    assert [row[1:4] for row in rows[3:]] == [["together", str(i + 1), SITES[f"mlp{i}"].read] for i in range(3)]
    assert rows[-1][4] == f"{found.ce_loss_increase:.3f}"
    assert "plot-replacement" in {attributes.get("id") for _, attributes in page.elements}
    (run / "together.json").write_text("{}")
    damaged = report([run], tmp_path / "page.html", **options).read_text()
    assert "What run costs at once is left out" in damaged
    assert "plot-replacement" not in damaged


def test_the_example_prints_a_row_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = Path(__file__).parent.parent / "examples" / "replacement_model.py"
    sizes = ["--tokens", "4096", "--d-sae", "64", "--context", "64", "--evaluation-tokens", "2048"]
    monkeypatch.setattr("sys.argv", [str(example), *sizes, "--output", str(tmp_path)])
    runpy.run_path(str(example), run_name="__main__")
    head, _, *rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in head] == [
        *("recipe", *(f"first {i}" for i in range(1, 7)), "each alone, summed", "KL", "top-1")
    ]
    assert [row[0].strip() for row in rows] == [
        f"apart for 70%{then}" for then in (" only", ", then jointly", ", then in passes")
    ]
    assert all(float(cell) > 0 for row in rows for cell in row[1:])
    first, then, _ = rows
    assert float(then[-2]) < float(first[-2])
    assert (tmp_path / "then_in_passes" / "mlp5" / "sae_weights.safetensors").is_file()
