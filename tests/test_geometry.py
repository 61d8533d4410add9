"""Nearest cosine similarities against sums written out, and the bootstrap against the normal theory of a mean."""

import json
import math
from typing import Any

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sae_lens_e2e.studies import geometry as geometry_module
from sae_lens_e2e.studies.geometry import (
    Geometry,
    Interval,
    bootstrap_difference,
    bootstrap_mean,
    compare,
    geometry,
    geometry_difference,
    geometry_frame,
    geometry_summary,
    live_features,
    nearest_cosines,
    unit_vectors,
)

D_SAE, D_IN = 50, 8


def dictionary(n: int = D_SAE, d_in: int = D_IN, seed: int = 0, **to: Any) -> Tensor:
    """Rows of every length."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d_in, generator=generator)
    return (rows * torch.rand(n, 1, generator=generator).mul(6).exp()).to(**to)


def mask(*dead: int, n: int = D_SAE) -> Tensor:
    alive = torch.ones(n, dtype=torch.bool)
    alive[list(dead)] = False
    return alive


def cosine(a: Tensor, b: Tensor) -> float:
    dot = sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))
    return dot / math.sqrt(sum(x * x for x in a.tolist()) * sum(y * y for y in b.tolist()))


def by_hand(W: Tensor, other: Tensor | None, rows: list[int], columns: list[int]) -> list[float]:
    """max_j cos(W_i, V_j), a pair at a time."""
    return [
        max(cosine(W[i], (W if other is None else other)[j]) for j in columns if other is not None or i != j)
        for i in rows
    ]


def sae_with(W_dec: Tensor) -> StandardSAE:
    sae = StandardSAE(StandardSAEConfig(d_in=W_dec.shape[1], d_sae=len(W_dec)))
    sae.W_dec.data = W_dec.clone()
    return sae


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.parametrize("chunk_size", [1, 7, 25, 49, 50, 51, 1000])
def test_each_feature_has_its_nearest_whatever_the_chunk(chunk_size: int) -> None:
    W, other = dictionary(), dictionary(33, seed=1)
    within = nearest_cosines(W, chunk_size=chunk_size)
    across = nearest_cosines(W, other, chunk_size=chunk_size)
    assert within.tolist() == pytest.approx(by_hand(W, None, [*range(50)], [*range(50)]), abs=1e-6)
    assert across.tolist() == pytest.approx(by_hand(W, other, [*range(50)], [*range(33)]), abs=1e-6)


@pytest.mark.parametrize("chunk_size", [4, 1000])
def test_dead_features_and_rows_without_a_direction_are_left_out_on_both_sides(chunk_size: int) -> None:
    W, other = dictionary(), dictionary(33, seed=1)
    W[[3, 20]] = 0
    other[5] = 0
    W[7], other[2] = 2 * W[8], 3 * W[8]  # dead ones, which would be the nearest of all to feature 8
    alive, other_alive = mask(0, 7, 49), mask(1, 2, 32, n=33)
    rows = [i for i in range(50) if i not in (0, 3, 7, 20, 49)]
    columns = [j for j in range(33) if j not in (1, 2, 5, 32)]
    assert live_features(W, alive).tolist() == rows
    within = nearest_cosines(W, alive=alive, chunk_size=chunk_size)
    across = nearest_cosines(W, other, alive=alive, other_alive=other_alive, chunk_size=chunk_size)
    assert within.tolist() == pytest.approx(by_hand(W, None, rows, rows), abs=1e-6)
    assert across.tolist() == pytest.approx(by_hand(W, other, rows, columns), abs=1e-6)


def test_known_arrangements() -> None:
    assert nearest_cosines(5 * torch.eye(6)).tolist() == [0.0] * 6
    corners = 4 * torch.eye(4) - 1  # of a regular simplex about the origin: every angle has cosine -1/3
    assert nearest_cosines(corners).tolist() == pytest.approx([-1 / 3] * 4)
    assert nearest_cosines(torch.tensor([[1.0, 0], [-2, 0]])).tolist() == [-1.0, -1.0]


@pytest.mark.parametrize("chunk_size", [1, 2, 100])
def test_a_duplicate_is_a_neighbour_and_the_feature_itself_is_not(chunk_size: int) -> None:
    W = dictionary(9)
    W[8] = 3 * W[0]
    found = nearest_cosines(W, chunk_size=chunk_size)
    assert found[[0, 8]].tolist() == pytest.approx([1, 1], abs=1e-6)
    assert float(found[1:8].max()) < 0.99
    assert float(nearest_cosines(W, W, chunk_size=chunk_size).min()) == pytest.approx(1, abs=1e-6)
    many = dictionary(2000, 64)
    assert float(nearest_cosines(many, many).max()) == 1  # and not 1.0000002, as rounding has it


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_compared_in_float32(dtype: torch.dtype) -> None:
    W = dictionary(40, 64, dtype=torch.float32).clamp(-100, 100).to(dtype)
    found = nearest_cosines(W)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nearest_cosines(W), found)
    assert found.dtype == torch.float32
    # bfloat16 arithmetic is off by some 1e-3 here.
    assert found.tolist() == pytest.approx(by_hand(W.double(), None, [*range(40)], [*range(40)]), abs=1e-6)


def test_double_precision_is_kept_and_the_weights_need_no_gradient() -> None:
    W = torch.nn.Parameter(dictionary(dtype=torch.float64))
    found = nearest_cosines(W)
    assert found.dtype == torch.float64
    assert not found.requires_grad
    assert found.tolist() == pytest.approx(by_hand(W.detach(), None, [*range(50)], [*range(50)]), abs=1e-14)


def test_the_length_of_a_row_does_not_matter_even_where_its_square_is_no_number() -> None:
    W = dictionary()
    scaled = W.clone()
    scaled[::3] *= 1e-25
    scaled[1::3] *= 1e25
    torch.testing.assert_close(nearest_cosines(scaled), nearest_cosines(W), rtol=0, atol=1e-6)


def test_similarities_never_exist_all_at_once() -> None:
    W = dictionary(20_000, 64)
    with Largest() as made:
        found = nearest_cosines(W, chunk_size=1024)
    assert made.numel <= max(W.numel(), 1024**2) < len(W) ** 2 / 100
    rows = torch.tensor([0, 1023, 1024, 13_000, 19_999])
    unit = W.double() / W.double().norm(dim=1, keepdim=True)
    cosines = unit[rows] @ unit.T
    cosines[range(5), rows] = -1
    torch.testing.assert_close(found[rows].double(), cosines.amax(1), rtol=0, atol=1e-6)


def test_the_bootstrap_is_that_of_a_mean() -> None:
    values = torch.rand(2000, generator=torch.Generator().manual_seed(0)) ** 2
    half = 1.959964 * float(values.std()) / math.sqrt(2000)
    found = bootstrap_mean(values, n_resamples=4000)
    assert found.mean == pytest.approx(float(values.double().mean()), rel=1e-12)
    assert (found.high - found.mean, found.mean - found.low) == pytest.approx((half, half), rel=0.06)
    narrow = bootstrap_mean(values, n_resamples=4000, confidence=0.5)
    assert (narrow.high - narrow.low) / (found.high - found.low) == pytest.approx(0.67449 / 1.959964, rel=0.06)


def test_the_bootstrap_of_a_difference_adds_the_variances() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(1500, generator=generator) + 0.3, 2 * torch.rand(800, generator=generator)
    half = 1.959964 * math.sqrt(float(first.var()) / 1500 + float(second.var()) / 800)
    found = bootstrap_difference(first, second, n_resamples=4000)
    assert found.mean == pytest.approx(float(first.double().mean() - second.double().mean()), abs=1e-12)
    assert (found.high - found.mean, found.mean - found.low) == pytest.approx((half, half), rel=0.06)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    held = 0
    for seed in range(300):
        drawn = torch.rand(60, generator=torch.Generator().manual_seed(1000 + seed))
        found = bootstrap_mean(drawn, n_resamples=300, seed=seed)
        held += found.low <= 0.5 <= found.high
    # 285 are expected, give or take 4; a percentile interval of 60 values is a little narrow.
    assert 268 <= held <= 297


def test_the_bootstrap_is_repeatable_and_bounded_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    values = dictionary(300, 1)[:, 0]
    found = bootstrap_mean(values, seed=3)
    assert found == bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)
    first, again, other = (bootstrap_difference(values, values + 1, seed=seed) for seed in (3, 3, 4))
    assert first == again != other
    monkeypatch.setattr(geometry_module, "_DRAWS_AT_ONCE", 1000)
    with Largest() as made:
        chunked = bootstrap_mean(values, seed=3)
    assert made.numel <= 1000
    assert chunked.mean == found.mean
    assert chunked.high - chunked.low == pytest.approx(found.high - found.low, rel=0.2)
    assert bootstrap_mean(torch.tensor([2.5])) == Interval(2.5, 2.5, 2.5)


def test_geometry_of_saes() -> None:
    W, other = dictionary(), dictionary(33, seed=1)
    other[4] = W[9]
    alive, other_alive = mask(0, 7), mask(4, n=33)
    within = geometry(sae_with(W), alive=alive)
    across = compare(
        sae_with(W), sae_with(other), compared_with="seed 1", kind="another seed", alive=alive, other_alive=other_alive
    )
    assert (within.kind, within.compared_with, within.d_sae) == ("same dictionary", "itself", 50)
    assert (across.kind, across.compared_with, across.d_sae) == ("another seed", "seed 1", 50)
    rows = [i for i in range(50) if i not in (0, 7)]
    columns = [j for j in range(33) if j != 4]
    for found, expected in ((within, by_hand(W, None, rows, rows)), (across, by_hand(W, other, rows, columns))):
        assert list(found.features) == rows
        assert list(found.cosines) == pytest.approx(expected, abs=1e-6)
        assert found.interval.mean == pytest.approx(sum(expected) / len(rows), abs=1e-6)
        assert found.interval.low < found.interval.mean < found.interval.high
        assert found.interval == bootstrap_mean(torch.tensor(found.cosines), 1000, 0)
        assert Geometry.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_frames_are_tidy() -> None:
    a, b = sae_with(dictionary()), sae_with(dictionary(seed=1))
    to_b = compare(a, b, compared_with="b", kind="another kind", alive=mask(2))
    results = {"a": [geometry(a), to_b], "b": geometry(b)}
    frame, summary = geometry_frame(results), geometry_summary(results)
    assert list(frame) == ["sae", "compared_with", "kind", "feature", "cosine"]
    assert len(frame) == 50 + 49 + 50
    one = frame[(frame.sae == "a") & (frame.compared_with == "b") & (frame.feature == 3)]
    assert one.kind.item() == "another kind"
    assert one.cosine.item() == to_b.cosines[2]
    assert list(summary) == ["sae", "compared_with", "kind", "n_features", "d_sae", "mean", "low", "high"]
    assert summary.n_features.tolist() == [50, 49, 50]
    means = frame.groupby(["sae", "compared_with"]).cosine.mean()
    for _, row in summary.iterrows():
        assert row["mean"] == pytest.approx(means[row.sae, row.compared_with], rel=1e-9)
    assert list(geometry_frame({})) == list(frame)


def test_a_more_orthogonal_dictionary_is_told_from_a_less_orthogonal_one() -> None:
    # Rows about one direction are near each other; the others as far as eight dimensions allow.
    crowded = geometry(sae_with(dictionary() / dictionary().norm(dim=1, keepdim=True) + 2 * torch.eye(8)[0]))
    spread = geometry(sae_with(dictionary()))
    difference = geometry_difference(crowded, spread)
    assert difference.mean == pytest.approx(crowded.interval.mean - spread.interval.mean, abs=1e-9)
    assert 0 < difference.low < difference.mean < difference.high
    assert geometry_difference(spread, crowded).high < 0


def test_errors_say_what_to_do() -> None:
    W = dictionary()
    with pytest.raises(ValueError, match="W_dec has no live feature among 50"):
        nearest_cosines(W, alive=torch.zeros(50, dtype=torch.bool))
    with pytest.raises(ValueError, match="other has no live feature among 4"):
        nearest_cosines(W, torch.zeros(4, D_IN))
    with pytest.raises(ValueError, match="one live feature"):
        nearest_cosines(W, alive=~mask(6))
    assert len(nearest_cosines(W, W, alive=~mask(6))) == 1
    with pytest.raises(ValueError, match="W_dec is 8 wide and other 9"):
        nearest_cosines(W, dictionary(d_in=9))
    with pytest.raises(ValueError, match=r"one bool for each of 50 features, got shape \(49,\)"):
        nearest_cosines(W, alive=mask(n=49))
    with pytest.raises(ValueError, match="int64"):
        nearest_cosines(W, alive=mask().long())
    with pytest.raises(ValueError, match="other_alive was given without other"):
        nearest_cosines(W, other_alive=mask())
    with pytest.raises(ValueError, match="chunk_size=0"):
        nearest_cosines(W, chunk_size=0)
    W[4, 2] = torch.nan
    with pytest.raises(ValueError, match="e2e has rows that are not finite"):
        unit_vectors(W, name="e2e")
    assert len(nearest_cosines(W, alive=mask(4))) == 49
    with pytest.raises(ValueError, match="n_resamples=0"):
        geometry(sae_with(W), n_resamples=0)
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_mean(torch.empty(0))
    with pytest.raises(ValueError, match="second must be at least one number, and finite"):
        bootstrap_difference(torch.ones(2), torch.tensor([torch.inf]))
    with pytest.raises(ValueError, match="confidence=95"):
        bootstrap_mean(torch.ones(2), confidence=95)
