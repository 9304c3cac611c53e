"""Pairs of features: neighbours, and redundancy across heads.

Two features are redundant where they fire on the same tokens (Jaccard: tokens on which both fire over tokens on
which either does) and write the same direction (cosine of what they add to the residual stream). Co-firing comes
from sparse matrix products, a block of rows at a time; no d_sae x d_sae matrix is ever held.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from jaxtyping import Float
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree
from torch import Tensor
from tqdm import tqdm

from analysis.corpus.running_statistics import Cofiring

N_NEIGHBOURS = 8  # kept of a feature by each measure, within its head and across heads
MIN_FIRINGS = 10  # in the co-firing sample: two features that fire once, on the same token, say nothing
REDUNDANT = 0.5  # Jaccard and cosine from which a pair is counted in the head x head map
THRESHOLDS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
CRITERIA = ("both", "jaccard", "cosine")
_ROWS = 256
_PRODUCTS = 4e9  # multiplications that the co-firing products may take: with a high L0 fewer tokens have to do
_CURVE_PAIRS = 2_000_000  # (token, feature) pairs on which L0 after merging is counted


class Redundancy(NamedTuple):
    """What `compare_features` returns."""

    neighbours: pd.DataFrame
    """feature, other, across, jaccard, correlation, cosine: the nearest by either measure."""
    merging: pd.DataFrame
    """criterion, threshold, L0, clusters, largest: L0 where a cluster of linked features counts once."""
    heads: list[list[int]]
    """[head][other]: live features of a head that have a redundant partner in the other."""
    n_tokens: int
    """Tokens of the co-firing sample."""
    l0: float
    """L0 without merging, on the tokens of the curve."""


def compare_features(
    cofiring: Cofiring, written: Float[Tensor, "feature d_model"], head: np.ndarray, n_heads: int
) -> Redundancy:
    """Compare every feature with every other one.

    Features are linked across heads only: by `both` where Jaccard and cosine reach the threshold, by `jaccard` or
    `cosine` where that one does. Clusters are connected components (single linkage), so at low thresholds they
    chain; `largest` shows where.

    Args:
        head: of each feature.
    """
    matrix = _sample(cofiring, len(head))  # [token, feature]
    n_tokens, count = matrix.shape[0], np.bincount(matrix.indices, minlength=len(head)).astype(np.float32)
    counted = matrix[: max(1, int(np.searchsorted(matrix.indptr, _CURVE_PAIRS, "right")) - 1)]
    live = np.flatnonzero(count >= MIN_FIRINGS)
    matrix, count, head_of_live = matrix[:, live], count[live], head[live]
    mean = np.asarray(matrix.sum(0)).ravel() / n_tokens
    variance = np.asarray(matrix.multiply(matrix).sum(0)).ravel() / n_tokens - mean**2
    deviation = np.sqrt(np.maximum(variance, 1e-30))
    direction = torch.nn.functional.normalize(written, dim=1).cpu().numpy()[live]
    binary, value_rows = firing(matrix), matrix.T.tocsr()
    forests = {name: _empty_forest(len(head)) for name in CRITERIA}
    partners = np.zeros((n_heads, n_heads), dtype=int)
    neighbours = [_nearest(live[:0], live[:0], *np.zeros((4, 0, 0)))]
    bar = tqdm(desc="Comparing features", total=len(live), unit="feature", dynamic_ncols=True)
    # Everything in the loop is [feature of the block, live feature].
    for block, together in cofirings(binary.T.tocsr(), binary, bar):
        jaccard = together / (count[block, None] + count - together)
        moment = (value_rows[block] @ matrix).toarray() / n_tokens
        correlation = (moment - mean[block, None] * mean) / (deviation[block, None] * deviation)
        cosine = direction[block] @ direction.T
        across = head_of_live[block, None] != head_of_live
        row = np.arange(len(live))[block]
        jaccard[row - row[0], row] = cosine[row - row[0], row] = -1  # a feature with itself
        neighbours.append(_nearest(live[block], live, across, jaccard, correlation, cosine))
        both = np.minimum(jaccard, cosine)
        redundant = (both >= REDUNDANT) & across
        for other in range(n_heads):
            has = redundant[:, head_of_live == other].any(1)
            partners[:, other] += np.bincount(head_of_live[block][has], minlength=n_heads)
        later = np.arange(len(live)) > row[:, None]  # each pair once
        for name, score in (("both", both), ("jaccard", jaccard), ("cosine", cosine)):
            a, b = np.nonzero((score >= THRESHOLDS[-1]) & across & later)
            forests[name] = _spanning_forest(forests[name], live[row[a]], live[b], score[a, b])
    bar.close()
    return Redundancy(
        pd.concat(neighbours, ignore_index=True),
        _merging_curve(counted, forests),
        partners.tolist(),
        n_tokens,
        counted.nnz / counted.shape[0],
    )


def firing(activations: sp.csr_matrix) -> sp.csr_matrix:
    """1 where a feature fires."""
    return activations.astype(bool).astype(np.float32)


def cofirings(rows: sp.csr_matrix, columns: sp.csr_matrix, bar: tqdm) -> Iterator[tuple[slice, np.ndarray]]:
    """Tokens on which two features fire, for some features of `rows` at a time with all of `columns`.

    Args:
        rows, columns: [feature, token] and [token, feature], 1 where a feature fires.
        bar: is told the features of `rows` that are done with.
    """
    for start in range(0, rows.shape[0], _ROWS):
        block = slice(start, start + _ROWS)
        together = (rows[block] @ columns).toarray()
        yield block, together
        bar.update(len(together))


def best_of_rows(score: np.ndarray, n: int, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of up to n entries of each row that reach `least`, the largest first."""
    n = min(n, score.shape[1])
    if not n:
        return np.zeros(0, int), np.zeros(0, int)
    best = np.argpartition(-score, n - 1, axis=1)[:, :n]  # [row, place]: a column
    order = np.take_along_axis(score, best, 1).argsort(axis=1)[:, ::-1]
    best = np.take_along_axis(best, order, 1)
    row, place = np.nonzero(np.take_along_axis(score, best, 1) >= least)
    return row, best[row, place]


def _sample(cofiring: Cofiring, d_sae: int) -> sp.csr_matrix:
    """Activations of the first tokens, as many as the products have time for."""
    n = max(1, int(np.searchsorted(np.cumsum(cofiring.tokens().astype(float) ** 2), _PRODUCTS)))
    return cofiring.matrix(n, d_sae)


def _nearest(
    block: np.ndarray,
    live: np.ndarray,
    across: np.ndarray,
    jaccard: np.ndarray,
    correlation: np.ndarray,
    cosine: np.ndarray,
) -> pd.DataFrame:
    """The nearest features of each row by either measure, within its head and across heads."""
    wanted = np.zeros(across.shape, dtype=bool)
    for measure in (jaccard, cosine):
        for where in (across, ~across.astype(bool)):
            wanted[best_of_rows(np.where(where, measure, -np.inf), N_NEIGHBOURS, 1e-30)] = True
    a, b = np.nonzero(wanted)
    return pd.DataFrame(
        {
            "feature": block[a].astype(np.int32),
            "other": live[b].astype(np.int32),
            "across": across[a, b].astype(bool),
            "jaccard": jaccard[a, b].astype(np.float32),
            "correlation": correlation[a, b].astype(np.float32),
            "cosine": cosine[a, b].astype(np.float32),
        }
    )


def _empty_forest(n: int) -> sp.coo_matrix:
    return sp.coo_matrix((n, n))


def _spanning_forest(forest: sp.coo_matrix, a: np.ndarray, b: np.ndarray, score: np.ndarray) -> sp.coo_matrix:
    """The maximum spanning forest of a forest and new links.

    It has the components of all links seen so far at every threshold (Gower and Ross 1969), in d_sae - 1 links.
    """
    rows, columns = np.concatenate([forest.row, a]), np.concatenate([forest.col, b])
    weight = 2 - np.concatenate([forest.data, score])  # positive: a stored 0 would be no link
    tree = minimum_spanning_tree(sp.csr_matrix((weight, (rows, columns)), shape=forest.shape)).tocoo()
    return sp.coo_matrix((2 - tree.data, (tree.row, tree.col)), shape=forest.shape)


def _merging_curve(fires: sp.csr_matrix, forests: dict[str, sp.coo_matrix]) -> pd.DataFrame:
    """L0 where features that are linked count once, over the threshold from which they are linked."""
    token = np.repeat(np.arange(fires.shape[0]), np.diff(fires.indptr))
    rows = []
    for name, forest in forests.items():
        for threshold in THRESHOLDS:
            kept = forest.data >= threshold - 1e-5  # rounding of a cosine of 1
            links = sp.coo_matrix((forest.data[kept], (forest.row[kept], forest.col[kept])), shape=forest.shape)
            n_clusters, label = connected_components(links, directed=False)
            distinct = np.unique(token * np.int64(n_clusters) + label[fires.indices])
            sizes = np.bincount(label)
            rows.append((name, threshold, len(distinct) / fires.shape[0], int((sizes > 1).sum()), int(sizes.max())))
    return pd.DataFrame(rows, columns=["criterion", "threshold", "L0", "clusters", "largest"])
