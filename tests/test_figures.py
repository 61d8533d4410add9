"""Every figure holds the numbers of its frame, is told apart without colour, and is written whole."""

import io
import itertools
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata

from sae_lens_e2e.evaluation import (
    Evaluation,
    FiringHistogram,
    LayerEvaluation,
    evaluate_many,
    evaluate_together,
    evaluation_frame,
    firing_frame,
    layers_frame,
    together_frame,
)
from sae_lens_e2e.figures import (
    FIGURES,
    comparison_html,
    comparison_png,
    directions_figure,
    figure_kind,
    firing_figure,
    geometry_figure,
    history_figure,
    history_frame,
    layers_figure,
    layers_plotly,
    norms_figure,
    norms_plotly,
    pareto_figure,
    pareto_plotly,
    save,
    with_objectives,
)
from sae_lens_e2e.figures.names import hook_labels, labels, tick_number
from sae_lens_e2e.figures.style import style, styles
from sae_lens_e2e.studies.directions import directions_frame, measure_directions
from sae_lens_e2e.studies.geometry import compare, geometry, geometry_frame
from sae_lens_e2e.training.history import read_history, write_history
from tests.models import dataset_of, random_model, random_tokens

HOOK = "blocks.1.hook_resid_pre"
HOOKS = (HOOK, "blocks.2.hook_resid_pre", "blocks.2.hook_resid_post")


def layer(mse: float, first: float | None = 0.9) -> LayerEvaluation:
    return LayerEvaluation(
        mse=mse,
        explained_variance=1 - mse,
        mse_ln=mse,
        explained_variance_ln=1 - mse,
        l2_ratio=0.8,
        l2_ratio_first=first,
        l2_ratio_later=1 - mse / 2,
        cosine=0.8,
        cosine_first=first,
        cosine_later=1 - mse / 4,
    )


def result(objective: str | None, l0: float, increase: float, n_alive: int = 90, mse: float = 0.1) -> Evaluation:
    return Evaluation(
        objective=objective,
        architecture="standard",
        sparsity={"l1_coefficient": 1.0},
        model_name="tiny",
        hook_name=HOOK,
        hook_head_index=None,
        context_size=16,
        d_in=16,
        d_sae=100,
        n_tokens=1000,
        n_tokens_measured=1000,
        n_tokens_alive=1000,
        ce_loss_without_sae=2.0,
        ce_loss_with_sae=2.0 + increase,
        ce_loss_with_ablation=5.0,
        kl=increase,
        kl_with_ablation=3.0,
        top1_agreement=0.9,
        top1_accuracy_without_sae=0.4,
        top1_accuracy_with_sae=0.3,
        statistical_distance=0.1,
        l0=l0,
        l1=9.0,
        n_alive=n_alive,
        firing=FiringHistogram((-3.0, -2.0, -1.0, 0.0), (2, n_alive - 12, 10), 100 - n_alive),
        layers={hook: layer(mse * (i + 1)) for i, hook in enumerate(HOOKS)},
    )


FEW = {
    "local": result("local", 20.0, 0.4, 95, mse=0.1),
    "e2e": result("e2e", 10.0, 0.3, 80, mse=0.4),
    "e2e_ds": result("e2e_ds", 12.0, 0.2, 85, mse=0.2),
}
# The third of each is beaten by its first, in L0 and in alive features.
MANY = {
    f"{name}-{i}": result(name, l0 * factor, increase * worse / factor, int(alive * factor), mse / factor)
    for name, l0, increase, alive, mse in (
        ("local", 20, 0.4, 60, 0.1),
        ("e2e", 10, 0.3, 50, 0.4),
        ("e2e_ds", 12, 0.2, 55, 0.2),
    )
    for i, (factor, worse) in enumerate(((1.0, 1.0), (1.5, 1.0), (1.2, 3.0)))
}


def make_sae(seed: int, hook_name: str = HOOK) -> StandardSAE:
    metadata = SAEMetadata(hook_name=hook_name, context_size=12, prepend_bos=False)
    torch.manual_seed(seed)
    return StandardSAE(StandardSAEConfig(d_in=16, d_sae=40, metadata=metadata))


@pytest.fixture(scope="module")
def real_frames() -> dict[str, pd.DataFrame]:
    """Every frame, as it comes from two SAEs with random weights on a random model."""
    model, tokens = random_model(), random_tokens(8, 12, 61)
    saes = {"one": make_sae(0), "two": make_sae(1)}
    several = {"one": make_sae(0), **{f"at_{i}": make_sae(i, hook_name=f"blocks.{i}.hook_mlp_out") for i in range(3)}}
    results = evaluate_many(saes, model, dataset_of(tokens), batch_size_prompts=4, verbose=False)
    geometries = {
        "one": [geometry(saes["one"]), compare(saes["one"], saes["two"], compared_with="two", kind="another seed")],
        "two": [geometry(saes["two"])],
    }
    directions = {
        name: measure_directions(sae, model, tokens, n_kl_prompts=4 if name == "one" else 0)
        for name, sae in saes.items()
    }
    histories = {name: history(200, scale) for name, scale in (("one", 1.0), ("two", 3.0))}
    return {
        "evaluation": evaluation_frame(results),
        "layers": layers_frame(results),
        "firing": firing_frame(results),
        "geometry": geometry_frame(geometries),
        "directions": directions_frame(directions),
        "history": history_frame(histories),
        "together": together_frame(
            {"run": evaluate_together(several, model, dataset_of(tokens), batch_size_prompts=4, verbose=False)}
        ),
    }


def history(n_steps: int, scale: float = 1.0) -> list[dict[str, float]]:
    return [
        {
            "step": step,
            "losses/overall_loss": scale * (1 + 1 / (step + 1)),
            "losses/kl": scale / (step + 1),
            "losses/my_own_term": 2.0,
            "metrics/l0": 50.0 - step / 10,
            "details/n_training_samples": 100.0 * (step + 1),
        }
        for step in range(n_steps)
    ]


def lines(axes: Axes, label: str | None = None) -> list[tuple[list[float], list[float]]]:
    """The points of every line, or of those of this name."""
    drawn: list[Any] = [line for line in axes.get_lines() if label in (None, line.get_label())]
    return [(list(map(float, line.get_xdata())), list(map(float, line.get_ydata()))) for line in drawn]


def tick_labels(axes: Axes, name: str = "x") -> list[str]:
    found = axes.get_xticklabels() if name == "x" else axes.get_yticklabels()
    return [text.get_text() for text in found]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def traces(figure: go.Figure, name: str | None = None) -> list[Any]:
    """Every trace, or those of this name."""
    drawn: Any = figure.data
    return [trace for trace in drawn if name in (None, trace.name)]


# What each figure shows


def test_pareto_joins_the_front_and_leaves_the_beaten_hollow() -> None:
    figure = pareto_figure(evaluation_frame(MANY))
    by_l0, by_alive = figure.axes
    (front, beaten) = lines(by_l0, "e2e")
    assert front == ([10.0, 15.0], pytest.approx([0.3, 0.2]))
    assert beaten == ([12.0], pytest.approx([0.75]))
    hollow = [line.get_markerfacecolor() for line in by_l0.get_lines() if line.get_linestyle() == "None"]
    assert hollow == ["white"] * 3
    assert lines(by_alive, "local") == [([60, 90], pytest.approx([0.4, 0.4 / 1.5])), ([72], pytest.approx([1.0]))]
    assert by_l0.get_xlabel() == "L0 (features active a token)"
    assert by_alive.get_xlabel() == "alive features"
    assert by_l0.get_ylabel() == by_alive.get_ylabel() == "CE loss increase (nats a token)"
    assert by_l0.get_xlim()[0] == by_l0.get_ylim()[0] == 0
    assert legend(figure) == ["local", "e2e", "e2e_ds"]


def test_pareto_in_the_browser_has_the_names_under_the_pointer() -> None:
    figure = pareto_plotly(evaluation_frame(MANY))
    front, beaten = traces(figure, "e2e")[:2]
    assert list(front.x) == [10.0, 15.0]
    assert list(front.y) == pytest.approx([0.3, 0.2])
    assert list(front.text) == ["e2e-0", "e2e-1"]
    assert "%{text}" in front.hovertemplate
    # One name for all points is in the template, for plotly's templates do not see a lone text.
    assert "<b>e2e-2</b>" in beaten.hovertemplate
    assert [trace.showlegend for trace in traces(figure, "e2e")] == [True, False, False, False]
    assert beaten.marker.symbol == "square-open"


def test_pareto_of_values_far_apart_is_logarithmic() -> None:
    frame = evaluation_frame({"a": result("local", 3.0, 0.5), "b": result("local", 200.0, 0.01)})
    axes = pareto_figure(frame).axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert set(tick_labels(axes)) >= {"5", "10", "100", "200"}
    nothing_gained = evaluation_frame({"a": result("local", 3.0, 0.5), "b": result("local", 200.0, -0.01)})
    axes = pareto_figure(nothing_gained).axes[0]
    assert axes.get_yscale() == "linear"
    assert axes.get_ylim()[0] < -0.01


def test_layers_are_in_order_with_a_line_each() -> None:
    figure = layers_figure(layers_frame(FEW))
    mse, explained = figure.axes
    assert tick_labels(mse) == tick_labels(explained) == ["1.resid_pre", "2.resid_pre", "2.resid_post"]
    assert lines(mse, "e2e") == [([0, 1, 2], pytest.approx([0.4, 0.8, 1.2]))]
    assert lines(explained, "local") == [([0, 1, 2], pytest.approx([0.9, 0.8, 0.7]))]
    assert mse.get_ylabel() == "MSE (squared activation)"
    assert explained.get_ylabel() == "explained variance (fraction)"
    assert legend(figure) == list(FEW)


def test_of_many_saes_the_objectives_means_are_drawn_before_them() -> None:
    frame = with_objectives(layers_frame(MANY), evaluation_frame(MANY))
    figure = layers_figure(frame)
    drawn = lines(figure.axes[0], "local (mean)")
    assert len(drawn) == 4
    mean = np.mean([[0.1 * (i + 1) / factor for i in range(3)] for factor in (1, 1.5, 1.2)], axis=0)
    assert drawn[-1] == ([0, 1, 2], pytest.approx(mean.tolist()))
    faint = [line.get_alpha() for line in figure.axes[0].get_lines() if line.get_label() == "local (mean)"]
    assert faint == [0.35, 0.35, 0.35, None]
    assert legend(figure) == ["local (mean)", "e2e (mean)", "e2e_ds (mean)"]
    assert "local, mean of 3" in traces(layers_plotly(frame), "local (mean)")[3].hovertemplate
    # Without objectives each has a look of its own.
    assert legend(layers_figure(layers_frame(MANY))) == list(MANY)


def test_norms_have_a_row_an_sae_and_none_for_what_was_not_measured() -> None:
    figure = norms_figure(layers_frame(FEW))
    ratio, cosine = figure.axes
    assert tick_labels(ratio, "y") == list(FEW)
    assert lines(ratio, "position 0") == [([0.9] * 3, [0, 1, 2])]
    assert lines(ratio, "later positions") == [(pytest.approx([0.95, 0.8, 0.9]), [0, 1, 2])]
    assert lines(cosine, "later positions") == [(pytest.approx([0.975, 0.9, 0.95]), [0, 1, 2])]
    assert ratio.get_xlabel() == "L2 ratio, output / input"
    assert ratio.get_ylim() == (2.6, -0.6), "the first is on top"
    without = {name: replace(found, layers={HOOK: layer(0.1, None)}) for name, found in FEW.items()}
    assert legend(norms_figure(layers_frame(without))) == ["later positions"]
    assert len(traces(norms_plotly(layers_frame(without)))) == 2


def test_firing_shows_every_bin_and_those_that_never_fire() -> None:
    figure = firing_figure(firing_frame(FEW))
    (axes,) = figure.axes
    steps, never = lines(axes, "e2e")
    assert steps == (pytest.approx([1e-3, 1e-2, 1e-1, 1]), [2, 68, 10, 10])
    assert never[1] == [20]
    assert never[0][0] < 1e-3
    assert axes.get_lines()[0].get_drawstyle() == "steps-post"
    assert tick_labels(axes) == ["never", "0.001", "0.01", "0.1", "1"]
    assert axes.get_xlabel() == "firing frequency (fraction of tokens)"
    dead = replace(FEW["e2e"], firing=FiringHistogram((-3.0, -2.0, -1.0, 0.0), (0, 0, 0), 100))
    (axes,) = firing_figure(firing_frame({"dead": dead})).axes
    assert lines(axes, "dead")[1][1] == [100]


def test_geometry_is_a_histogram_a_kind(real_frames: dict[str, pd.DataFrame]) -> None:
    frame = real_frames["geometry"]
    figure = geometry_figure(frame)
    within, seeds = figure.axes
    assert within.get_title() == "nearest in the same dictionary"
    assert seeds.get_title() == "nearest in another seed's\n(two)"
    cosines = frame[(frame.sae == "one") & (frame.kind == "same dictionary")].cosine
    steps, mean = lines(within, "one")
    assert mean == ([pytest.approx(cosines.mean())], [0])
    assert sum(steps[1][:-1]) == pytest.approx(1)
    edges = np.array(steps[0])
    for low, high, height in zip(edges[:-1], edges[1:], steps[1], strict=False):
        assert height == pytest.approx(((cosines >= low) & (cosines < high)).mean(), abs=1e-9)
    assert within.get_xlabel() == "largest cosine similarity"
    assert within.get_ylabel() == "fraction of features\n(bins of 0.05)"
    assert [len(lines(seeds, name)) for name in ("one", "two")] == [2, 0]


def test_geometry_with_several_others_has_a_panel_for_each(real_frames: dict[str, pd.DataFrame]) -> None:
    frame = real_frames["geometry"]
    other = frame.loc[frame.kind == "another seed"].assign(compared_with="three")
    titles = [axes.get_title() for axes in geometry_figure(pd.concat([frame, other])).axes]
    assert titles[1:] == ["nearest in another seed's\n(two)", "nearest in another seed's\n(three)"]


def test_directions_by_rank_and_by_importance(real_frames: dict[str, pd.DataFrame]) -> None:
    frame = real_frames["directions"]
    by_rank, by_kl = directions_figure(frame).axes
    known = frame.loc[frame.correlation.notna()]
    for name in ("one", "two"):
        rows = known.loc[known.sae == name]
        assert lines(by_rank, name) == [((rows.direction + 1).tolist(), pytest.approx(rows.correlation.tolist()))]
    # The second brought no KL: it is the model's, and the first has it.
    assert frame[frame.sae == "two"].kl.isna().all()
    kl = frame[frame.sae == "one"].set_index("direction").kl
    expected = known.loc[(known.sae == "two") & known.direction.map(kl).gt(0)]
    assert lines(by_kl, "two") == [
        (pytest.approx(expected.direction.map(kl).tolist()), pytest.approx(expected.correlation.tolist()))
    ]
    assert by_kl.get_xlabel() == "KL under resample ablation (nats a token)"
    assert by_kl.get_xscale() == "log"
    assert len(directions_figure(frame.assign(kl=math.nan)).axes) == 1
    assert directions_figure(frame.assign(correlation=math.nan)).axes


def test_history_has_a_panel_a_loss_and_l0_last(tmp_path: Path) -> None:
    write_history(history(200), tmp_path)
    figure = history_figure(history_frame({"a": read_history(tmp_path), "b": history(50), "empty": []}))
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "total loss",
        "KL divergence (nats a token)",
        "my own term",
        "L0 (features active a token)",
    ]
    x, y = lines(figure.axes[1], "a")[0]
    assert x == [100.0 * (step + 1) for step in range(200)]
    assert y == pytest.approx([1 / (step + 1) for step in range(200)])
    assert len(lines(figure.axes[3], "b")[0][0]) == 50
    assert {axes.get_xlabel() for axes in figure.axes} == {"tokens"}
    assert legend(figure) == ["a", "b"]


def test_what_is_no_number_is_left_out() -> None:
    rows = history(10)
    rows[3]["losses/kl"], rows[5]["losses/kl"] = math.inf, math.nan
    (axes, kl, *_) = history_figure(history_frame({"a": rows})).axes
    assert (len(lines(axes, "a")[0][0]), len(lines(kl, "a")[0][0])) == (10, 8)


def test_a_long_history_is_drawn_as_means() -> None:
    rows = history(1000)
    x, y = lines(history_figure(history_frame({"a": rows})).axes[1], "a")[0]
    assert len(x) == 250
    assert x[0] == pytest.approx(np.mean([100, 200, 300, 400]))
    assert y[0] == pytest.approx(np.mean([1, 1 / 2, 1 / 3, 1 / 4]))


# Styles and names


def luminance(colour: str) -> float:
    """Relative luminance, as in WCAG 2."""
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return float(np.dot((0.2126, 0.7152, 0.0722), linear))


def test_the_first_styles_are_told_apart_in_grey_and_seen_on_white() -> None:
    looks = [style(i) for i in range(6)]
    for one, other in itertools.combinations(looks, 2):
        assert one.colour != other.colour
        assert one.marker != other.marker
        assert one.plotly_marker != other.plotly_marker
        assert one.dash != other.dash
        assert one.plotly_dash != other.plotly_dash
    for look in looks:
        assert (1 + 0.05) / (luminance(look.colour) + 0.05) > 2
    assert len({style(i) for i in range(168)}) == 168


def test_an_objective_looks_the_same_whoever_is_beside_it() -> None:
    assert styles(["e2e_ds", "mine", "local"])["local"] == styles(["local"])["local"] == style(0)
    assert styles(["mine", "local", "other"])["mine"] == style(1)
    named = {"x": FEW["local"], "y": FEW["e2e_ds"], "z": replace(FEW["e2e_ds"], l0=3.0)}
    frame = with_objectives(layers_frame(named), evaluation_frame(named))
    x, y, z = layers_figure(frame).axes[0].get_lines()
    assert (x.get_color(), y.get_color(), z.get_color()) == (style(0).colour, style(2).colour, style(2).colour)
    assert len({str(line.get_marker()) for line in (x, y, z)}) == 3
    alone = layers_figure(frame.loc[frame["sae"] != "z"]).axes[0].get_lines()
    assert [line.get_marker() for line in alone] == [style(0).marker, style(2).marker]


def test_names_are_made_to_fit() -> None:
    long = "a_very_long_name_for_an_sae_that_was_swept_over_l1_coefficient=0.{}"
    names = [f"runs/gpt2/{long.format(i)}" for i in range(3)]
    short = labels(names)
    assert len(set(short.values())) == 3
    assert max(map(len, short.values())) <= 44
    assert short[names[1]].startswith("a_very_long")
    assert short[names[1]].endswith("l1_coefficient=0.1")
    same_ends = [f"{'x' * 30}{i}{'y' * 30}" for i in range(3)]
    assert len(set(labels(same_ends).values())) == 3
    assert labels(["runs/a"]) == {"runs/a": "runs/a"}
    assert list(hook_labels(["blocks.4.hook_resid_pre", "blocks.5.attn.hook_z"]).values()) == [
        "4.resid_pre",
        "5.attn.z",
    ]
    deep = [f"base_model.model.transformer.h.{i}.post_attention_layernorm" for i in (4, 5)]
    assert list(hook_labels(deep).values()) == ["h.4", "h.5"]
    assert [tick_number(x) for x in (1e-5, 2e-4, 0.001, 0.5, 1, 20, 1e6)] == [
        "10⁻⁵",
        "2·10⁻⁴",
        "0.001",
        "0.5",
        "1",
        "20",
        "10⁶",
    ]


def test_any_name_can_be_drawn(recwarn: pytest.WarningsRecorder) -> None:
    strange = {f"_${i}^ <b>%{{x}}</b>": replace(found, objective="_$a^ <i>") for i, found in enumerate(FEW.values())}
    evaluations, layers = evaluation_frame(strange), layers_frame(strange)
    for figure in (pareto_figure(evaluations), layers_figure(layers), norms_figure(layers)):
        figure.savefig(io.BytesIO(), format="png")
    assert legend(layers_figure(layers))[0] == r" _\$0^ <b>%{x}</b>"
    assert not [warning for warning in recwarn if "legend" in str(warning.message)]
    (trace, *_) = traces(pareto_plotly(evaluations))
    assert trace.name == "_&#36;a^ &lt;i&gt;"
    assert all("<b>" not in text for text in trace.text or [])
    assert "%{x}</b>" not in trace.hovertemplate


def test_crowds_fit_the_page() -> None:
    hooks = [f"blocks.{i}.hook_resid_pre" for i in range(30)]
    crowd = {
        f"an_sae_with_a_name_as_long_as_those_of_a_sweep-{i}": replace(
            found, layers={hook: layer(0.1 * (j + 1)) for j, hook in enumerate(hooks)}, hook_name=hooks[0]
        )
        for i, found in enumerate([FEW["local"]] * 14)
    }
    figures: list[Any] = [layers_figure(layers_frame(crowd)), norms_figure(layers_frame(crowd))]
    for figure in figures:
        renderer = figure.canvas.get_renderer()
        figure.canvas.draw()
        page, key = figure.bbox, figure.legends[0].get_window_extent(renderer)
        assert page.x0 <= key.x0
        assert key.x1 <= page.x1
        for axes in figure.axes:
            assert not key.overlaps(axes.get_window_extent(renderer))
            for box in visible_tick_labels(axes, renderer):
                assert page.x0 - 1 <= box.x0
                assert box.x1 <= page.x1 + 1
                assert not key.overlaps(box)
    assert len(figures[0].axes[0].get_xticks()) <= 12


def visible_tick_labels(axes: Any, renderer: Any) -> list[Any]:
    """Where the labels are of those ticks that lie within the axes."""
    boxes = []
    for axis, (low, high) in ((axes.xaxis, sorted(axes.get_xlim())), (axes.yaxis, sorted(axes.get_ylim()))):
        ticks = zip(axis.get_majorticklocs(), axis.get_ticklabels(), strict=True)
        boxes += [text.get_window_extent(renderer) for at, text in ticks if low <= at <= high and text.get_text()]
    return boxes


# All figures


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_draws_what_is_really_measured(
    name: str, real_frames: dict[str, pd.DataFrame], tmp_path: Path
) -> None:
    kind = FIGURES[name]
    frame = real_frames[kind.frame]
    before = frame.copy()
    figure = kind.draw(frame)
    interactive = kind.interactive(frame)
    for ending, magic in ((".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")):
        save(figure, tmp_path / f"{name}{ending}")
        assert (tmp_path / f"{name}{ending}").read_bytes().startswith(magic)
    assert b"/Type3" not in (tmp_path / f"{name}.pdf").read_bytes(), "journals refuse these fonts"
    assert json.loads(interactive.to_json() or "")["data"]
    drawn = [y for axes in figure.axes for x, y in lines(axes) if len(x) > 2]
    shown = [list(map(float, trace.y)) for trace in traces(interactive)]
    assert all(values in shown for values in drawn)
    for axes in figure.axes:
        assert axes.get_xlabel()
        assert axes.get_ylabel() or name == "norms"
    pd.testing.assert_frame_equal(frame, before)


@pytest.mark.parametrize("name", FIGURES)
def test_one_sae_is_enough_and_none_is_an_error(name: str, real_frames: dict[str, pd.DataFrame]) -> None:
    kind = FIGURES[name]
    frame = real_frames[kind.frame]
    assert kind.draw(frame.loc[frame["sae"] == "one"]).axes
    with pytest.raises(ValueError, match="the frame has no rows"):
        kind.draw(frame.head(0))
    with pytest.raises(ValueError, match=r"the frame has no column .*sae.*(give|takes)"):
        kind.draw(frame.drop(columns=["sae"]))
    with pytest.raises(ValueError, match=r"the frame has no column .*(give|takes)"):
        kind.draw(pd.DataFrame({"sae": ["one"]}))


def test_the_list_of_figures() -> None:
    assert list(FIGURES) == [kind.name for kind in FIGURES.values()]
    assert figure_kind("norms") is FIGURES["norms"]
    with pytest.raises(ValueError, match="there is no figure 'umap'; there are pareto, layers, geometry, norms"):
        figure_kind("umap")
    for kind in FIGURES.values():
        assert 0 < len(kind.title) < 40
        assert kind.caption.endswith(".")


@pytest.mark.parametrize("draw", [layers_figure, norms_figure])
def test_saes_of_different_hooks_are_refused(draw: Callable[[pd.DataFrame], Figure]) -> None:
    elsewhere = replace(FEW["e2e"], layers={"blocks.0.hook_resid_pre": layer(0.1)}, hook_name="blocks.0.hook_resid_pre")
    with pytest.raises(ValueError, match=r"different hooks .*'local' sits at blocks.1.hook_resid_pre.*draw them apart"):
        draw(layers_frame({"local": FEW["local"], "e2e": elsewhere}))
    with pytest.raises(ValueError, match="different hook_name"):
        pareto_figure(evaluation_frame({"local": FEW["local"], "e2e": elsewhere}))


def test_directions_of_different_hooks_are_refused(real_frames: dict[str, pd.DataFrame]) -> None:
    frame = real_frames["directions"]
    with pytest.raises(ValueError, match="different hooks"):
        directions_figure(frame.assign(hook=frame["sae"]))


# Files


def test_no_settings_but_ours(tmp_path: Path) -> None:
    frame = layers_frame(FEW)
    save(layers_figure(frame), tmp_path / "plain.pdf")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "lines.linewidth": 9, "pdf.fonttype": 3}):
        before = dict(matplotlib.rcParams)
        save(layers_figure(frame), tmp_path / "styled.pdf")
        assert dict(matplotlib.rcParams) == before
    assert (tmp_path / "styled.pdf").read_bytes() == (tmp_path / "plain.pdf").read_bytes()


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure, path = layers_figure(layers_frame(FEW)), tmp_path / "new" / "figure.png"
    for wrong, kind in (("a.jpg", figure), ("a.html", figure), ("a.png", layers_plotly(layers_frame(FEW)))):
        with pytest.raises(ValueError, match=rf"{wrong}' must end in \."):
            save(kind, tmp_path / wrong)
    save(figure, path)
    written = path.read_bytes()

    def half(target: Path, **_: Any) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(figure, "savefig", half)
    with pytest.raises(OSError, match="disk full"):
        save(figure, path)
    assert path.read_bytes() == written
    assert [found.name for found in path.parent.iterdir()] == ["figure.png"]


def test_comparison_png(tmp_path: Path) -> None:
    comparison_png(FEW, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_comparison_html_needs_no_network_and_holds_the_figures(tmp_path: Path) -> None:
    comparison_html(FEW, tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text()
    assert not re.search(r"<(script|link)[^>]+(src|href)=", text)
    for wanted in ("local", "e2e_ds", "2.resid_post", "nats a token", "L0 (features active a token)"):
        assert wanted in text
    assert "1.resid_pre" not in text, "the SAE's own hook is not a later one"
