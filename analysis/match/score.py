"""Which features of two SAEs of one layer are the same: `python -m analysis.match checkpoints/A checkpoints/B`.

The score of two features is the geometric mean of two similarities that a feature of another SAE rarely has by
chance at once: the cosine of their decoder rows (in the z of their head) and the Jaccard index of their firings
(tokens on which both fire over tokens on which either does). Neither changes if a feature is scaled.

    block, block    one-to-one within each head, the pairs with the largest sum of scores (linear assignment; by
                    decoder cosine alone: Paulo and Belrose 2025, arXiv:2501.16615). Pairs below THRESHOLD are none.
    dense, dense    the same in one block, up to LARGEST_ASSIGNMENT features that fire. Beyond that the assignment
                    would take hours, so pairs are taken greedily, the largest score first: every pair of mutual
                    nearest features is among them.
    dense, block    a dense feature may do what features of several heads do, so it is split: see `split`.

Written to `<A>/matches/<B>/` (the dense one's, if only one is dense), which analysing A again leaves alone.
"""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from jaxtyping import Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from tqdm import tqdm

from analysis import schema, store
from analysis.attribution import Firings, Reader
from analysis.corpus import running_statistics
from analysis.corpus.pairs import MIN_FIRINGS, best_of_rows, cofirings, firing
from analysis.corpus.passes import chunks
from analysis.corpus.running_statistics import Cofiring
from analysis.logits import head_of_features
from analysis.match.read import difference, match_folder
from trainer import checkpoint
from trainer.block_diag import BlockDiagSAE
from trainer.checkpoint import Checkpoint
from trainer.config import require
from trainer.files import make_writable
from trainer.model.lm import Layer, pick_device

THRESHOLD = 0.5  # score from which two features are a pair: Jaccard 0.36 at cosine 0.7, 0.25 at cosine 1
PART = 0.4  # score from which a block feature is part of a dense one; both similarities are of parts, so lower
N_PARTS = 6  # kept of a dense feature
LARGEST_ASSIGNMENT = 4096  # features of a block: 2 s; the time grows with the cube
_CANDIDATES = 16  # of each feature that the greedy pairing chooses from
_PRODUCTS = 1e10  # multiplications that co-firing may take: with a high L0 fewer tokens have to do


class Fired(NamedTuple):
    """One of the two SAEs, and what it fired on."""

    fires: sp.csr_matrix
    """[token, feature]: the activations."""
    firings: np.ndarray
    """Tokens on which each feature fires."""
    direction: np.ndarray
    """[feature, width of a block]: decoder rows, of length 1."""
    head: np.ndarray
    """Head of each feature; of a dense one that with the largest part of its decoder norm."""
    n_blocks: int

    @classmethod
    def of(cls, sae: BlockDiagSAE, fires: sp.csr_matrix, n_heads: int) -> "Fired":
        """An SAE of a model with `n_heads`."""
        direction = torch.nn.functional.normalize(sae.W_dec.detach().flatten(0, 1), dim=1).cpu().numpy()
        firings = np.bincount(fires.indices, minlength=fires.shape[1])
        return cls(fires, firings, direction, head_of_features(sae, n_heads)[0].numpy(), sae.n_blocks)

    @property
    def columns(self) -> sp.csr_matrix:
        """[token, feature]: 1 where a feature fires."""
        return firing(self.fires)

    @property
    def rows(self) -> sp.csr_matrix:
        """[feature, token]: 1 where a feature fires."""
        return firing(self.fires).T.tocsr()

    def live(self, block: int) -> np.ndarray:
        """Features of a block that fire."""
        size = len(self.firings) // self.n_blocks
        return block * size + np.flatnonzero(self.firings[block * size : (block + 1) * size])

    @property
    def largest_block(self) -> int:
        """Features that fire in the block where most do."""
        return max(len(self.live(block)) for block in range(self.n_blocks))


class Tables(NamedTuple):
    """What is written."""

    pairs: pd.DataFrame
    """One-to-one: a, b, head, cosine, jaccard, score. Split: a row per part: a (the dense feature), b, head, cosine,
    b_given_a, a_given_b, norm_share (of the dense feature in that head), score."""
    features: pd.DataFrame
    """A row per feature that fires: side (a or b), feature, head, firings; one-to-one: nearest, nearest_score and
    partner (-1: none); split: parts (of it, or that it is), and of the dense ones covered, chance, norm_shares."""


def one_to_one(a: Fired, b: Fired) -> Tables:
    """Pair the features of two SAEs with the same blocks, each with at most one.

    A pair of which neither fires on MIN_FIRINGS tokens has no score: two features that fire once, on the same token,
    say nothing.
    """
    rows, columns = (a.rows, b.rows), b.columns
    with tqdm(desc="Pairing", total=int((a.firings > 0).sum()), unit="feature", dynamic_ncols=True) as bar:
        blocks = [
            _match_block(a, b, rows[0], columns, a.live(block), b.live(block), bar) for block in range(a.n_blocks)
        ]
    of_a, of_b = np.concatenate([block.pairs for block in blocks]).T
    together = _together(rows, of_a, of_b)
    cosine = np.einsum("id,id->i", a.direction[of_a], b.direction[of_b])
    jaccard = together / (a.firings[of_a] + b.firings[of_b] - together)
    figures = {"cosine": cosine, "jaccard": jaccard, "score": np.sqrt(np.maximum(cosine, 0) * jaccard)}
    features = []
    for name, fired, nearest, own, other in (
        ("a", a, [block.nearest_a for block in blocks], of_a, of_b),
        ("b", b, [block.nearest_b for block in blocks], of_b, of_a),
    ):
        of_side = _firing_features(name, fired).merge(pd.concat(nearest, ignore_index=True), on="feature")
        partner = dict(zip(own, other, strict=True))
        of_side["partner"] = of_side["feature"].map(partner).fillna(-1).astype(np.int32)
        features.append(of_side)
    return Tables(_pairs(of_a, of_b, a.head[of_a], figures), pd.concat(features, ignore_index=True))


def split(a: Fired, b: Fired) -> Tables:
    """The block features of `b` that each feature of a dense SAE `a` splits into.

    Parts are the block features, of any head, with the largest geometric mean of two similarities: the cosine of
    their decoder row with the dense row's slice in their head, and the co-firing √(P(b|a) P(a|b)) (Ochiai 1957). The
    latter is 1 for features that always fire together, and 1/√n for each of n features of which the dense one is the
    union; the Jaccard index would be 1/n. Features that fire on fewer than MIN_FIRINGS tokens are left out.

    covered: share of the dense feature's summed activation on tokens where one of its parts fires.
    chance: share of all tokens where one of its parts fires, which is what `covered` would be by chance.
    norm_shares: share of its squared decoder norm in each head.
    """
    n_heads = b.n_blocks
    rows = a.rows, b.rows
    judged, candidates = (np.flatnonzero(fired.firings >= MIN_FIRINGS) for fired in (a, b))
    slices = a.direction.reshape(len(a.firings), n_heads, -1)  # [dense feature, head, d_head]
    norm_shares = np.square(slices).sum(-1)
    unit = slices / np.sqrt(np.maximum(norm_shares, 1e-30))[..., None]
    chosen = [np.zeros((0, 2), dtype=np.int64)]
    bar = tqdm(desc="Splitting", total=len(judged), unit="feature", dynamic_ncols=True)
    # In the loop: [dense feature of the block, candidate].
    for block, together in cofirings(rows[0][judged], b.columns[:, candidates], bar):
        whole = judged[block]
        ochiai = together / np.sqrt(np.outer(a.firings[whole], b.firings[candidates]))
        cosine = np.empty_like(ochiai)
        for head in range(n_heads):
            of_head = b.head[candidates] == head
            cosine[:, of_head] = unit[whole, head] @ b.direction[candidates[of_head]].T
        row, column = best_of_rows(np.sqrt(np.maximum(cosine, 0) * ochiai), N_PARTS, PART)
        chosen.append(np.stack([whole[row], candidates[column]], 1))
    bar.close()
    dense, part = np.concatenate(chosen).T
    together = _together(rows, dense, part)
    head = b.head[part]
    figures = {
        "cosine": np.einsum("id,id->i", unit[dense, head], b.direction[part]),
        "b_given_a": together / a.firings[dense],
        "a_given_b": together / b.firings[part],
        "norm_share": norm_shares[dense, head],
    }
    ochiai = np.sqrt(figures["b_given_a"] * figures["a_given_b"])
    figures["score"] = np.sqrt(np.maximum(figures["cosine"], 0) * ochiai)
    table = _pairs(dense, part, head, figures)
    of_a, of_b = _firing_features("a", a), _firing_features("b", b)
    for features, fired, ids in ((of_a, a, dense), (of_b, b, part)):
        features["parts"] = np.bincount(ids, minlength=len(fired.firings))[features["feature"]].astype(np.int32)
    covered, chance = _coverage(a, rows[1], dense, part)
    live = of_a["feature"]
    of_a["covered"], of_a["chance"] = covered[live], chance[live]
    of_a["norm_shares"] = list(norm_shares[live].astype(np.float32))
    return Tables(table, pd.concat([of_a, of_b], ignore_index=True))


def firings(layer: Layer, contexts: Int[Tensor, "context pos"], saes: list[BlockDiagSAE]) -> list[Cofiring]:
    """What each SAE fires on, from one forward for all of them; it ends early where the firings fill the memory."""
    fired = [(Reader(sae, layer), Cofiring()) for sae in saes]
    length = contexts.shape[1]
    with tqdm(desc="Matching", total=len(contexts) * (length - 1), unit="tok", unit_scale=True) as bar:
        for batch in chunks(layer, contexts, torch.arange(len(contexts))):
            for chunk in batch:
                for reader, cofiring in fired:
                    if cofiring.pairs < running_statistics.COFIRING_PAIRS:
                        cofiring.add(Firings.of(reader.encode(chunk)), chunk)
                bar.update(chunk.tokens[:, 1:].numel())
            if any(cofiring.pairs >= running_statistics.COFIRING_PAIRS for _, cofiring in fired):
                break
    return [cofiring for _, cofiring in fired]


def match(
    first: Path,
    others: list[Path],
    tokens: int = 20_000,
    device: str = "auto",
    model: str | None = None,
    text: str | None = None,
) -> list[Path]:
    """Match a checkpoint with others, all on one stream of its held-out text. Returns the folders written.

    Args:
        model, text: where they lie now, if elsewhere than in training.

    Raises:
        ValueError: a checkpoint cannot be used, they are not of one model and layer, the text has no tokens, or nothing
            can be written there.
    """
    require(tokens >= 1, f"tokens must be at least 1, got {tokens}")
    saved = _load([first, *others])
    lm = saved[0].open_model(pick_device(device), model)
    for one in saved:
        require(
            one.sae.d_in == lm.n_heads * lm.d_head,
            f"{one.path} reads {one.sae.d_in} dimensions, but {lm.name} has {lm.n_heads * lm.d_head}",
        )
    corpus = saved[0].open_text(lm.tokenizer, text)
    saes = [one.sae for one in saved]
    # The dense one is split.
    orders = [(i, 0) if saes[i].is_dense and not saes[0].is_dense else (0, i) for i in range(1, len(saved))]
    for a, b in orders:
        make_writable(match_folder(saved[a], saved[b]).parent)
    cofiring = firings(lm.layer(saved[0].layer), corpus.held_out_tokens(tokens), saes)
    read = {"name": corpus.name, "fingerprint": corpus.fingerprint, "context_size": corpus.context_size}
    written = []
    for a, b in orders:
        fires = _matrices([cofiring[a], cofiring[b]], [saes[a].d_sae, saes[b].d_sae])
        fired = [Fired.of(saes[j], matrix, lm.n_heads) for j, matrix in zip((a, b), fires, strict=True)]
        same = saes[a].n_blocks == saes[b].n_blocks
        print(f"Comparing {saved[a].name} with {saved[b].name}", flush=True)
        tables = one_to_one(*fired) if same else split(*fired)
        meta = {
            "kind": "one-to-one" if same else "split",
            "greedy": same and max(of_sae.largest_block for of_sae in fired) > LARGEST_ASSIGNMENT,
            "threshold": THRESHOLD if same else PART,
            "min_firings": MIN_FIRINGS,
            "n_tokens": fires[0].shape[0],
            "text": read,
            "model": asdict(saved[0].config.model),
        }
        written.append(_write(saved[a], saved[b], meta, tables))
    return written


def _load(paths: list[Path]) -> list[Checkpoint]:
    """The checkpoints in the order of `paths`.

    Raises:
        ValueError: they are not of one model and layer.
    """
    distinct = {path.resolve() for path in paths}
    require(len(distinct) == len(paths), "a checkpoint cannot be matched with itself: name different ones")
    first, *others = saved = [Checkpoint(path) for path in paths]
    for other in others:
        what = difference(first, other)
        require(
            what is None,
            f"{first.path} and {other.path} are not of the same {what}, so their features cannot be matched",
        )
    return saved


def _write(a: Checkpoint, b: Checkpoint, meta: dict[str, Any], tables: Tables) -> Path:
    """Write into the folder of `a`, in place of what either order has left."""
    meta |= {"a": a.name, "b": b.name, "weights": [a.weights_hash, b.weights_hash], "versions": checkpoint.versions()}
    store.write(match_folder(a, b), schema.MATCH_VERSION, meta, tables._asdict())
    shutil.rmtree(match_folder(b, a), ignore_errors=True)
    return match_folder(a, b)


def _matrices(cofiring: list[Cofiring], d_sae: list[int]) -> list[sp.csr_matrix]:
    """Activations [token, feature] on the first tokens that both have, as many as the products have time for."""
    active = [fired.tokens() for fired in cofiring]
    n = min(map(len, active))
    products = np.cumsum(np.prod([of_sae[:n].astype(float) for of_sae in active], axis=0))
    n = max(1, int(np.searchsorted(products, _PRODUCTS, "right")))
    return [fired.matrix(n, width) for fired, width in zip(cofiring, d_sae, strict=True)]


class _Matched(NamedTuple):
    """Pairs [pair, 2] of the features of one block that fire, and the nearest of each feature of either side."""

    pairs: np.ndarray
    nearest_a: pd.DataFrame
    nearest_b: pd.DataFrame


def _match_block(
    a: Fired,
    b: Fired,
    rows_a: sp.csr_matrix,
    columns_b: sp.csr_matrix,
    of_a: np.ndarray,
    of_b: np.ndarray,
    bar: tqdm,
) -> _Matched:
    """Match the features `of_a` with those `of_b`."""
    score_a, best_a = np.zeros(len(of_a), dtype=np.float32), np.zeros(len(of_a), dtype=int)
    score_b, best_b = np.zeros(len(of_b), dtype=np.float32), np.zeros(len(of_b), dtype=int)
    if not (len(of_a) and len(of_b)):
        return _Matched(np.zeros((0, 2), dtype=np.int64), _nearest(of_a, score_a, -1), _nearest(of_b, score_b, -1))
    exact = max(len(of_a), len(of_b)) <= LARGEST_ASSIGNMENT
    whole = np.zeros((len(of_a), len(of_b)) if exact else 0, dtype=np.float32)
    candidates = []
    # In the loop: [feature of a in this part of the block, feature of b].
    for part, together in cofirings(rows_a[of_a], columns_b[:, of_b], bar):
        count_a, count_b = a.firings[of_a[part], None], b.firings[of_b]
        cosine, jaccard = a.direction[of_a[part]] @ b.direction[of_b].T, together / (count_a + count_b - together)
        score = np.sqrt(np.maximum(cosine, 0) * jaccard).astype(np.float32)
        score[np.maximum(count_a, count_b) < MIN_FIRINGS] = 0
        best_a[part], score_a[part] = score.argmax(1), score.max(1)
        better = score.max(0) > score_b
        best_b[better], score_b[better] = part.start + score.argmax(0)[better], score.max(0)[better]
        if exact:
            whole[part] = score
        else:
            row, column = best_of_rows(score, _CANDIDATES, THRESHOLD)
            candidates.append((part.start + row, column, score[row, column]))
    if exact:
        whole[whole < THRESHOLD] = 0  # what is no pair must not take a pair's place
        row, column = linear_sum_assignment(whole, maximize=True)
        paired = whole[row, column] > 0
        row, column = row[paired], column[paired]
    else:
        row, column = _greedy(*map(np.concatenate, zip(*candidates, strict=True)))
    pairs = np.stack([of_a[row], of_b[column]], 1)
    return _Matched(pairs, _nearest(of_a, score_a, of_b[best_a]), _nearest(of_b, score_b, of_a[best_b]))


def _nearest(features: np.ndarray, score: np.ndarray, nearest: np.ndarray | int) -> pd.DataFrame:
    """feature, nearest, nearest_score; -1 and 0 where no feature has a score."""
    return pd.DataFrame(
        {
            "feature": features.astype(np.int32),
            "nearest": np.where(score > 0, nearest, -1).astype(np.int32),
            "nearest_score": score,
        }
    )


def _greedy(row: np.ndarray, column: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of candidate pairs the one with the largest score, then the largest of what is free, and so on."""
    taken_rows, taken_columns, chosen = set(), set(), []
    for i in np.argsort(-score, kind="stable"):
        if row[i] not in taken_rows and column[i] not in taken_columns:
            taken_rows.add(row[i])
            taken_columns.add(column[i])
            chosen.append(i)
    return row[chosen], column[chosen]


def _together(rows: tuple[sp.csr_matrix, sp.csr_matrix], of_a: np.ndarray, of_b: np.ndarray) -> np.ndarray:
    """Tokens on which both features of each pair fire."""
    return np.asarray(rows[0][of_a].multiply(rows[1][of_b]).sum(1)).ravel()


def _pairs(of_a: np.ndarray, of_b: np.ndarray, head: np.ndarray, figures: dict[str, np.ndarray]) -> pd.DataFrame:
    return pd.DataFrame(
        {"a": of_a.astype(np.int32), "b": of_b.astype(np.int32), "head": head.astype(np.int16)}
        | {name: value.astype(np.float32) for name, value in figures.items()}
    )


def _coverage(a: Fired, rows_b: sp.csr_matrix, dense: np.ndarray, part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """covered and chance of every feature of `a`, NaN where it has no parts or does not fire."""
    values = a.fires.tocsc()
    covered = np.full(a.fires.shape[1], np.nan, dtype=np.float32)
    chance = covered.copy()
    fires = np.zeros(a.fires.shape[0], dtype=bool)
    for feature in np.unique(dense):
        tokens = rows_b[part[dense == feature]].indices
        fires[tokens] = True
        own = slice(values.indptr[feature], values.indptr[feature + 1])
        value = values.data[own]
        covered[feature] = value[fires[values.indices[own]]].sum() / value.sum()
        chance[feature] = fires.mean()
        fires[tokens] = False
    return covered, chance


def _firing_features(name: str, fired: Fired) -> pd.DataFrame:
    live = np.flatnonzero(fired.firings)
    return pd.DataFrame(
        {
            "side": name,
            "feature": live.astype(np.int32),
            "head": fired.head[live].astype(np.int16),
            "firings": fired.firings[live].astype(np.int32),
        }
    )
