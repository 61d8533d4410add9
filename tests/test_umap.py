"""Dictionaries on one plane: where like directions must land. Embeds where umap-learn is installed."""

import sys
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from sae_lens_e2e.studies.umap import umap_of

D_IN = 12


def clusters(per_cluster: int, seed: int) -> Tensor:
    """Rows about four orthogonal directions, in turn, of every length."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.eye(D_IN)[torch.arange(4 * per_cluster) % 4] + 0.05 * torch.randn(
        4 * per_cluster, D_IN, generator=generator
    )
    return rows * torch.rand(len(rows), 1, generator=generator).mul(4).exp()


needs_umap = pytest.mark.skipif(
    find_spec("umap") is None, reason="umap-learn is not installed: pip install 'sae-lens-e2e[umap]'"
)


@needs_umap
def test_like_directions_of_two_dictionaries_land_together() -> None:
    local, e2e = clusters(20, seed=0), clusters(15, seed=1)
    local[5] = 0
    alive = torch.ones(60, dtype=torch.bool)
    alive[[0, 59]] = False
    found = umap_of({"local": local, "e2e": e2e.bfloat16()}, alive={"e2e": alive})

    assert list(found) == ["sae", "feature", "x", "y"]
    assert found[found.sae == "local"].feature.tolist() == [i for i in range(80) if i != 5]
    assert found[found.sae == "e2e"].feature.tolist() == list(range(1, 59))
    plane = torch.tensor(found[["x", "y"]].values.tolist())
    assert bool(plane.isfinite().all())
    # Each cluster of the one lies nearest that of the other, though the rows' lengths differ by a factor of 50.
    centres = [
        torch.stack([plane[((found.sae == sae) & (found.feature % 4 == i)).tolist()].mean(0) for i in range(4)])
        for sae in ("local", "e2e")
    ]
    distances = torch.cdist(centres[0], centres[1])
    assert distances.argmin(1).tolist() == [0, 1, 2, 3]
    assert distances.argmin(0).tolist() == [0, 1, 2, 3]


@needs_umap
def test_the_seed_decides() -> None:
    dictionaries = {"local": clusters(10, seed=0)}
    first, second, third = (umap_of(dictionaries, n_neighbors=5, seed=seed) for seed in (0, 0, 1))
    assert first.equals(second)
    assert not first.equals(third)


def test_errors_say_what_to_do_before_umap_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    W = clusters(10, seed=0)
    with pytest.raises(ImportError, match=r"pip install 'sae-lens-e2e\[umap\]'"):
        umap_of({"local": W})
    with pytest.raises(ValueError, match="e2e has no live feature among 40"):
        umap_of({"local": W, "e2e": W}, alive={"e2e": torch.zeros(40, dtype=torch.bool)})
    with pytest.raises(ValueError, match="alive names e2e"):
        umap_of({"local": W}, alive={"e2e": torch.ones(40, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"must be of one width, got .*'e2e': 11"):
        umap_of({"local": W, "e2e": W[:, :11]})
    with pytest.raises(ValueError, match="n_neighbors=15 is too many for 16 live features"):
        umap_of({"local": W[:10], "e2e": W[:6]})
    with pytest.raises(ValueError, match="too many for 0 live"):
        umap_of({})
