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

from analysis import store
from analysis.corpus import running
from analysis.corpus.pairs import MIN_FIRINGS
from analysis.corpus.passes import chunks
from analysis.corpus.running import Cofiring, Firings
from analysis.logits import head_of_features
from trainer import checkpoint
from trainer.block_diag import BlockDiagSAE
from trainer.checkpoint import Checkpoint
from trainer.model.lm import Layer, pick_device

THRESHOLD = 0.5  # score from which two features are a pair: Jaccard 0.36 at cosine 0.7, 0.25 at cosine 1
PART = 0.4  # score from which a block feature is part of a dense one; both similarities are of parts, so lower
N_PARTS = 6  # kept of a dense feature
LARGEST_ASSIGNMENT = 4096  # features of a block: 2 s; the time grows with the cube
_CANDIDATES = 16  # of each feature that the greedy pairing chooses from
_ROWS = 256
_PRODUCTS = 1e10  # multiplications that co-firing may take: with a high L0 fewer tokens have to do


class Side(NamedTuple):
    """One of the two SAEs and what it did on the tokens."""

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
    def of(cls, sae: BlockDiagSAE, fires: sp.csr_matrix, n_heads: int) -> "Side":
        """An SAE of a model with `n_heads`."""
        direction = torch.nn.functional.normalize(sae.W_dec.detach().flatten(0, 1), dim=1).cpu().numpy()
        firings = np.bincount(fires.indices, minlength=fires.shape[1])
        return cls(fires, firings, direction, head_of_features(sae, n_heads)[0].numpy(), sae.n_blocks)

    @property
    def binary(self) -> sp.csr_matrix:
        """1 where a feature fires."""
        return self.fires.astype(bool).astype(np.float32)

    def live(self, block: int) -> np.ndarray:
        """Features of a block that fire."""
        size = len(self.firings) // self.n_blocks
        return block * size + np.flatnonzero(self.firings[block * size : (block + 1) * size])


class Tables(NamedTuple):
    """What is written."""

    pairs: pd.DataFrame
    """One-to-one: a, b, head, cosine, jaccard, score. Split: a row per part: a (the dense feature), b, head, cosine,
    b_given_a, a_given_b, norm_share (of the dense feature in that head), score."""
    features: pd.DataFrame
    """A row per feature that fires: side (a or b), feature, head, firings; one-to-one: nearest, nearest_score and
    partner (-1: none); split: parts (of it, or that it is), and of the dense ones covered, chance, norm_shares."""


def one_to_one(a: Side, b: Side) -> Tables:
    """Pair the features of two SAEs with the same blocks, each with at most one.

    A pair of which neither fires on MIN_FIRINGS tokens has no score: two features that fire once, on the same token,
    say nothing.
    """
    rows = a.binary.T.tocsr(), b.binary.T.tocsr()
    pairs, nearest = [], ([], [])
    for block in range(a.n_blocks):
        chosen, best = _match_block(a, b, rows, a.live(block), b.live(block))
        pairs.append(chosen)
        for found, each in zip(nearest, best, strict=True):
            found.append(each)
    of_a, of_b = np.concatenate(pairs).T
    together = _together(rows, of_a, of_b)
    cosine = np.einsum("id,id->i", a.direction[of_a], b.direction[of_b])
    jaccard = together / (a.firings[of_a] + b.firings[of_b] - together)
    figures = {"cosine": cosine, "jaccard": jaccard, "score": np.sqrt(np.maximum(cosine, 0) * jaccard)}
    table = _pairs(of_a, of_b, a.head[of_a], figures)
    partners = dict(zip(of_a, of_b, strict=True)), dict(zip(of_b, of_a, strict=True))
    parts = []
    for name, side, partner, found in zip("ab", (a, b), partners, nearest, strict=True):
        of_side = _firing_features(name, side).merge(pd.concat(found, ignore_index=True), on="feature")
        of_side["partner"] = of_side["feature"].map(partner).fillna(-1).astype(np.int32)
        parts.append(of_side)
    return Tables(table, pd.concat(parts, ignore_index=True))


def split(a: Side, b: Side) -> Tables:
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
    rows, columns = (a.binary.T.tocsr(), b.binary.T.tocsr()), b.binary
    judged, candidates = (np.flatnonzero(side.firings >= MIN_FIRINGS) for side in (a, b))
    slices = a.direction.reshape(len(a.firings), n_heads, -1)
    norm_shares = np.square(slices).sum(-1)
    unit = slices / np.sqrt(np.maximum(norm_shares, 1e-30))[..., None]
    chosen = [np.zeros((0, 2), dtype=np.int64)]
    for start in range(0, len(judged) if len(candidates) else 0, _ROWS):
        block = judged[start : start + _ROWS]
        together = (rows[0][block] @ columns).toarray()[:, candidates]
        ochiai = together / np.sqrt(np.outer(a.firings[block], b.firings[candidates]))
        cosine = np.empty_like(ochiai)
        for head in range(n_heads):
            of_head = b.head[candidates] == head
            cosine[:, of_head] = unit[block, head] @ b.direction[candidates[of_head]].T
        row, column = _best_of_rows(np.sqrt(np.maximum(cosine, 0) * ochiai), N_PARTS, PART)
        chosen.append(np.stack([block[row], candidates[column]], 1))
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
    for features, side, ids in ((of_a, a, dense), (of_b, b, part)):
        features["parts"] = np.bincount(ids, minlength=len(side.firings))[features["feature"]].astype(np.int32)
    covered, chance = _coverage(a, rows[1], dense, part)
    live = of_a["feature"]
    of_a["covered"], of_a["chance"] = covered[live], chance[live]
    of_a["norm_shares"] = list(norm_shares[live].astype(np.float32))
    return Tables(table, pd.concat([of_a, of_b], ignore_index=True))


@torch.no_grad()
def firings(layer: Layer, contexts: Int[Tensor, "context pos"], saes: list[BlockDiagSAE]) -> list[Cofiring]:
    """What each SAE fires on, from one forward for all of them; it ends early where the firings fill the memory."""
    found = [Cofiring() for _ in saes]
    length = contexts.shape[1]
    with tqdm(desc="Matching", total=len(contexts) * (length - 1), unit="tok", unit_scale=True) as bar:
        for batch in chunks(layer, contexts, torch.arange(len(contexts))):
            for chunk in batch:
                for sae, each in zip(saes, found, strict=True):
                    f = sae.encode(chunk.z.float())
                    f[:, 0] = 0  # BOS
                    each.add(Firings.of(f), chunk.tokens.shape)
                bar.update(chunk.tokens[:, 1:].numel())
            if any(each.pairs >= running.COFIRING_PAIRS for each in found):
                break
    return found


def match(first: Path, others: list[Path], tokens: int = 20_000, device: str = "auto") -> list[Path]:
    """Match a checkpoint with others, all on one stream of its held-out text. Returns the folders written.

    Raises:
        ValueError: a checkpoint cannot be used, they are not of one model and layer, or the text has no tokens.
    """
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    trained = _load([first, *others])
    lm = trained[0].open_model(pick_device(device))
    for each in trained:
        if each.sae.d_in != lm.n_heads * lm.d_head:
            raise ValueError(
                f"{each.path} reads {each.sae.d_in} dimensions, but {lm.name} has {lm.n_heads * lm.d_head}"
            )
    corpus = trained[0].open_text(lm.tokenizer)
    saes = [each.sae.to(lm.device) for each in trained]
    cofiring = firings(lm.layer(trained[0].layer), corpus.held_out_tokens(tokens), saes)
    text = {"name": corpus.name, "fingerprint": corpus.fingerprint, "context_size": corpus.context_size}
    written = []
    for i in range(1, len(trained)):
        a, b = (0, i)
        if saes[b].is_dense and not saes[a].is_dense:
            a, b = b, a  # the dense one is split
        fires = _matrices([cofiring[a], cofiring[b]], [saes[a].d_sae, saes[b].d_sae])
        sides = [Side.of(saes[j], each, lm.n_heads) for j, each in zip((a, b), fires, strict=True)]
        same = sides[0].n_blocks == sides[1].n_blocks
        print(f"Comparing {trained[a].path.name} with {trained[b].path.name}", flush=True)
        tables = one_to_one(*sides) if same else split(*sides)
        meta = {
            "kind": "one-to-one" if same else "split",
            "greedy": same and max(map(_largest_block, sides)) > LARGEST_ASSIGNMENT,
            "threshold": THRESHOLD if same else PART,
            "min_firings": MIN_FIRINGS,
            "n_tokens": fires[0].shape[0],
            "text": text,
            "model": asdict(trained[0].config.model),
        }
        written.append(_write(trained[a], trained[b], meta, tables))
    return written


def _load(paths: list[Path]) -> list[Checkpoint]:
    """The checkpoints in the order of `paths`.

    Raises:
        ValueError: they are not of one model and layer.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError("a checkpoint cannot be matched with itself: name different ones")
    trained = [Checkpoint(path) for path in paths]
    for each in trained[1:]:
        for key, what in (("fingerprint", "model"), ("hook_layer", "layer"), ("processing", "processing of the model")):
            ours, theirs = (getattr(one.config.model, key) for one in (trained[0], each))
            if ours != theirs:
                raise ValueError(
                    f"{trained[0].path} and {each.path} are not of the same {what} ({ours} and {theirs}), "
                    "so their features cannot be matched"
                )
    return trained


def _write(a: Checkpoint, b: Checkpoint, meta: dict[str, Any], tables: Tables) -> Path:
    """Write into the folder of `a`, in place of what either order has left."""
    folder = a.path / "matches" / b.path.name
    meta |= {
        "a": a.path.name,
        "b": b.path.name,
        "weights": [each.weights_hash for each in (a, b)],
        "versions": checkpoint.versions(),
    }
    store.write(folder, meta, tables._asdict())
    shutil.rmtree(b.path / "matches" / a.path.name, ignore_errors=True)
    return folder


def _matrices(cofiring: list[Cofiring], d_sae: list[int]) -> list[sp.csr_matrix]:
    """Activations [token, feature] on the first tokens that both have, as many as the products have time for."""
    per_token = [each.tokens() for each in cofiring]
    n = min(map(len, per_token))
    products = np.cumsum(np.prod([each[:n].astype(float) for each in per_token], axis=0))
    n = max(1, int(np.searchsorted(products, _PRODUCTS, "right")))
    return [each.matrix(n, width) for each, width in zip(cofiring, d_sae, strict=True)]


def _match_block(
    a: Side, b: Side, rows: tuple[sp.csr_matrix, sp.csr_matrix], of_a: np.ndarray, of_b: np.ndarray
) -> tuple[np.ndarray, list[pd.DataFrame]]:
    """Pairs [pair, 2] of the features of one block that fire, and the nearest of each feature of either side.

    Args:
        rows: [feature, token] of either side, 1 where it fires.
    """
    if not (len(of_a) and len(of_b)):
        return np.zeros((0, 2), dtype=np.int64), [_nearest(of_a, None, of_a), _nearest(of_b, None, of_b)]
    exact = max(len(of_a), len(of_b)) <= LARGEST_ASSIGNMENT
    columns = rows[1][of_b].T.tocsr()
    count_a, count_b = a.firings[of_a], b.firings[of_b]
    whole = np.zeros((len(of_a), len(of_b)), dtype=np.float32) if exact else None
    best_a, score_a = np.zeros(len(of_a), dtype=int), np.zeros(len(of_a), dtype=np.float32)
    best_b, score_b = np.zeros(len(of_b), dtype=int), np.full(len(of_b), -1, dtype=np.float32)
    candidates = []
    for start in range(0, len(of_a), _ROWS):
        part = slice(start, start + _ROWS)
        together = (rows[0][of_a[part]] @ columns).toarray()
        jaccard = together / (count_a[part][:, None] + count_b - together)
        score = np.sqrt(np.maximum(a.direction[of_a[part]] @ b.direction[of_b].T, 0) * jaccard).astype(np.float32)
        score[np.maximum(count_a[part][:, None], count_b) < MIN_FIRINGS] = 0
        best_a[part], score_a[part] = score.argmax(1), score.max(1)
        better = score.max(0) > score_b
        best_b[better], score_b[better] = start + score.argmax(0)[better], score.max(0)[better]
        if exact:
            whole[part] = score
        else:
            row, column = _best_of_rows(score, _CANDIDATES, THRESHOLD)
            candidates.append((start + row, column, score[row, column]))
    if exact:
        whole[whole < THRESHOLD] = 0  # what is no pair must not take a pair's place
        row, column = linear_sum_assignment(whole, maximize=True)
        paired = whole[row, column] > 0
        row, column = row[paired], column[paired]
    else:
        row, column = _greedy(*map(np.concatenate, zip(*candidates, strict=True)))
    nearest = [_nearest(of_a, score_a, of_b[best_a]), _nearest(of_b, score_b, of_a[best_b])]
    return np.stack([of_a[row], of_b[column]], 1), nearest


def _nearest(features: np.ndarray, score: np.ndarray | None, nearest: np.ndarray) -> pd.DataFrame:
    """feature, nearest, nearest_score; -1 and 0 where no feature has a score."""
    if score is None:
        score = np.zeros(len(features))
    return pd.DataFrame(
        {
            "feature": features.astype(np.int32),
            "nearest": np.where(score > 0, nearest, -1).astype(np.int32),
            "nearest_score": score.astype(np.float32),
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


def _best_of_rows(score: np.ndarray, n: int, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of up to n entries of each row that reach `least`, the largest first."""
    n = min(n, score.shape[1])
    best = np.argpartition(-score, n - 1, axis=1)[:, :n]
    order = np.take_along_axis(score, best, 1).argsort(axis=1)[:, ::-1]
    best = np.take_along_axis(best, order, 1)
    row, place = np.nonzero(np.take_along_axis(score, best, 1) >= least)
    return row, best[row, place]


def _together(rows: tuple[sp.csr_matrix, sp.csr_matrix], of_a: np.ndarray, of_b: np.ndarray) -> np.ndarray:
    """Tokens on which both features of each pair fire."""
    return np.asarray(rows[0][of_a].multiply(rows[1][of_b]).sum(1)).ravel()


def _pairs(of_a: np.ndarray, of_b: np.ndarray, head: np.ndarray, figures: dict[str, np.ndarray]) -> pd.DataFrame:
    return pd.DataFrame(
        {"a": of_a.astype(np.int32), "b": of_b.astype(np.int32), "head": head.astype(np.int16)}
        | {name: value.astype(np.float32) for name, value in figures.items()}
    )


def _coverage(a: Side, rows_b: sp.csr_matrix, dense: np.ndarray, part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """covered and chance of every feature of `a`, NaN where it has no parts or does not fire."""
    values = a.fires.tocsc()
    covered = np.full(a.fires.shape[1], np.nan, dtype=np.float32)
    chance = covered.copy()
    fires = np.zeros(a.fires.shape[0], dtype=bool)
    for feature, parts in pd.Series(part).groupby(dense):
        tokens = rows_b[parts.to_numpy()].indices
        fires[tokens] = True
        own = slice(values.indptr[feature], values.indptr[feature + 1])
        value = values.data[own]
        covered[feature] = value[fires[values.indices[own]]].sum() / value.sum()
        chance[feature] = fires.mean()
        fires[tokens] = False
    return covered, chance


def _firing_features(name: str, side: Side) -> pd.DataFrame:
    firings = side.firings
    live = np.flatnonzero(firings)
    return pd.DataFrame(
        {
            "side": name,
            "feature": live.astype(np.int32),
            "head": side.head[live].astype(np.int16),
            "firings": firings[live].astype(np.int32),
        }
    )


def _largest_block(side: Side) -> int:
    return max(len(side.live(block)) for block in range(side.n_blocks))
