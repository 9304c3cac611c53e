"""Planted redundancy comes out, and nothing else does."""

import numpy as np
import pandas as pd
import pytest
import torch

from analysis.attribution import Chunk, Firings
from analysis.corpus import pairs
from analysis.corpus.running_statistics import Cofiring

HEAD = np.repeat([0, 1], 6)


def planted(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two heads of six features. Features 6, 7, 8 fire with 0, 1, 2: 6 and 7 write the same direction as those
    (7 misses a fifth of 1's tokens), 8 another one. 9 writes what 3 writes, but fires elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    f = torch.zeros(60, 51, 2, 6)
    base = torch.rand(60, 50, 9, generator=generator)
    fires = torch.rand(60, 50, 9, generator=generator) < 0.1
    f[:, 1:, 0] = (base * fires)[..., :6]
    f[:, 1:, 1, :3] = f[:, 1:, 0, :3] * 2
    f[:, 1:, 1, 1] *= torch.rand(60, 50, generator=generator) < 0.8
    f[:, 1:, 1, 3:] = (base * fires)[..., 6:]
    directions = torch.linalg.qr(torch.randn(32, 12, generator=generator)).Q.T.clone()  # orthogonal
    directions[6], directions[7], directions[9] = directions[0], directions[1], directions[3]
    return f, directions


def compare(f: torch.Tensor, directions: torch.Tensor) -> pairs.Redundancy:
    cofiring = Cofiring()
    for ids in torch.arange(len(f)).split(7):
        tokens = torch.zeros(len(ids), f.shape[1], dtype=torch.int64)
        cofiring.add(Firings.of(f[ids]), Chunk(ids, tokens, *[torch.empty(0)] * 4))
    return pairs.compare_features(cofiring, directions, HEAD, 2)


def test_planted_redundancy(capsys):
    f, directions = planted()
    found = compare(f, directions)
    assert "Comparing features: 100%" in capsys.readouterr().err
    flat = f[:, 1:].flatten(0, 1).flatten(1)
    assert found.l0 == pytest.approx(float((flat > 0).sum(1).float().mean()))
    curve = found.merging.set_index(["criterion", "threshold"])
    together = float(((flat[:, 0] > 0) & (flat[:, 6] > 0)).float().mean())
    overlap = float(((flat[:, 1] > 0) & (flat[:, 7] > 0)).float().mean())
    third = float(((flat[:, 2] > 0) & (flat[:, 8] > 0)).float().mean())
    copies = float(((flat[:, 3] > 0) & (flat[:, 9] > 0)).float().mean())
    assert curve.loc[("both", 1.0), "L0"] == pytest.approx(found.l0 - together)
    assert curve.loc[("both", 0.7), "L0"] == pytest.approx(found.l0 - together - overlap)
    assert curve.loc[("both", 0.7), ["clusters", "largest"]].tolist() == [2, 2]
    assert curve.loc[("jaccard", 1.0), "L0"] == pytest.approx(found.l0 - together - third)
    assert curve.loc[("cosine", 1.0), "L0"] == pytest.approx(found.l0 - together - overlap - copies)
    assert found.heads == [[0, 2], [2, 0]]


def test_the_figures_of_a_pair():
    f, directions = planted()
    table = compare(f, directions).neighbours.set_index(["feature", "other"])
    a, b = (f[:, 1:].flatten(0, 1).flatten(1)[:, i] for i in (1, 7))
    row = table.loc[(1, 7)]
    assert row["across"]
    assert row["jaccard"] == pytest.approx(float(((a > 0) & (b > 0)).sum() / ((a > 0) | (b > 0)).sum()))
    assert row["correlation"] == pytest.approx(float(np.corrcoef(a, b)[0, 1]), abs=1e-3)
    assert row["cosine"] == pytest.approx(1, abs=1e-5)
    assert not table.loc[(0, 1), "across"]
    assert (0, 0) not in table.index
    assert table.loc[(3, 9), "cosine"] == pytest.approx(1, abs=1e-5)


def test_blocks_of_rows_change_nothing(monkeypatch):
    f, directions = planted(1)
    whole = compare(f, directions)
    monkeypatch.setattr(pairs, "_ROWS", 5)
    cut = compare(f, directions)
    pd.testing.assert_frame_equal(cut.merging, whole.merging)
    assert cut.heads == whole.heads
    one, other = (each.neighbours.sort_values(["feature", "other"], ignore_index=True) for each in (cut, whole))
    pd.testing.assert_frame_equal(one, other, atol=1e-6)  # a matmul of other shapes rounds differently


def test_clusters_over_blocks_are_connected_components():
    """A chain 0-6, 6-1, 1-7 over several blocks is one cluster, at each of its links' thresholds."""
    forest = pairs._empty_forest(12)
    for a, b, score in ((0, 6, 0.9), (1, 6, 0.7), (1, 7, 0.8), (0, 7, 0.3)):
        forest = pairs._spanning_forest(forest, np.array([a]), np.array([b]), np.array([score]))
    assert sorted(forest.data.tolist()) == pytest.approx([0.7, 0.8, 0.9]), "the weakest link of a cycle is left out"


def test_features_that_hardly_fire_are_left_out():
    f, directions = planted()
    f[..., 0, 4] = f[..., 1, 5] = 0
    f[0, 1, 0, 4] = f[0, 1, 1, 5] = 1  # once, together
    found = compare(f, torch.ones_like(directions))
    assert not {4, 11} & set(found.neighbours["feature"])


def test_an_sae_that_never_fires():
    found = compare(torch.zeros(3, 5, 2, 6), torch.randn(12, 8))
    assert found.neighbours.empty
    assert (found.merging["L0"] == 0).all()
