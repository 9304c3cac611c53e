"""Why a head looks where it looks: its attention scores, split over who wrote what key and query were made of.

score[q, s] = q . k / scale before the softmax (and before a soft cap, where a model has one). Key and query are each
linear in their residual stream, with its norm's scale as it is and rotation applied, so a score is a sum over nodes at
the key with the query as it is, over nodes at the query with the key as it is, and over pairs of both. What a softmax
sees of a row is its differences: every value has the mean of its node over the row's sources taken away, BOS left out,
on which heads rest.
"""

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from analysis.prompt.circuit.nodes import Nodes
from analysis.prompt.circuit.parts import Parts
from trainer.config import require


@torch.no_grad()
def scores(nodes: Nodes, layer: int, head: int, query: int) -> Float[Tensor, " source"]:
    """Scores of one row, as the model has them before its softmax; in full, without the mean taken away."""
    parts, constant = _keys(nodes, layer, head, query)
    return parts.sums(query + 1) + constant


@torch.no_grad()
def at_key(nodes: Nodes, layer: int, head: int, query: int, source: int) -> Parts:
    """What every node at the source adds to the score, above its mean over the row; with all of them, score - mean.

    A node that is only elsewhere in the row has a value, too: what it adds there is in the mean.

    Raises:
        ValueError: there is no such head or position.
    """
    _check(nodes, layer, head, query, source)
    parts, constant = _keys(nodes, layer, head, query)
    of_class, example = parts.of_class()
    here, counted = parts.row == source, parts.row >= min(query, 1)
    mean, value = parts.value.new_zeros(2, len(example))
    mean.index_add_(0, of_class[counted], parts.value[counted] / max(query, 1))
    value.index_add_(0, of_class[here], parts.value[here])
    activation = torch.full_like(value, torch.nan)
    activation[of_class[here]] = parts.activation[here]
    found = parts.only(example)
    found = found._replace(position=torch.full_like(found.position, source), activation=activation, value=value - mean)
    rest = constant[source] - constant[1 : query + 1].mean() if query else constant[source]
    return _with_bias(found, "key bias", layer, head, source, rest)


@torch.no_grad()
def at_query(nodes: Nodes, layer: int, head: int, query: int, source: int) -> Parts:
    """What every node at the query adds to score - mean of the row, with the keys as they are.

    Raises:
        ValueError: there is no such head or position.
    """
    _check(nodes, layer, head, query, source)
    frozen = nodes.frozen
    key = _key(nodes, layer, head, query)
    difference = key[source] - key[1 : query + 1].mean(0) if query else key[source]
    at = torch.tensor([query], device=difference.device)
    along = frozen.unrotated(layer, difference[None] / frozen.score_scale(layer), at)
    reading = frozen.read(layer, "Q", head, along, at)
    return _with_bias(nodes.split(reading, at, layer), "query bias", layer, head, query, reading.constant[0])


@torch.no_grad()
def pairs(
    nodes: Nodes, layer: int, head: int, query: int, source: int, at_query: pd.DataFrame, at_key: pd.DataFrame
) -> pd.DataFrame:
    """What pairs of nodes add to the score itself: rows are nodes at the query, columns nodes at the key.

    The last row and column are all others, so that the sum is the score.

    Args:
        at_query, at_key: nodes with kind, layer, head, feature: some rows of those functions' tables.
    """
    _check(nodes, layer, head, query, source)
    frozen = nodes.frozen
    made = []
    for side, table, at in (("Q", at_query, query), ("K", at_key, source)):
        table = table[~table["kind"].isin(("key bias", "query bias"))]
        chosen = [nodes.vector(row.kind, row.layer, row.head, row.feature, at) for row in table.itertuples()]
        vectors = torch.stack(chosen) if chosen else frozen.final.new_empty(0, frozen.final.shape[1])
        parts = frozen.projected(layer, "Q" if side == "Q" else "K", head, vectors, at)
        whole = frozen.layers[layer].q[at, head] if side == "Q" else _key(nodes, layer, head, query)[source]
        names = [f"{row.kind} {row.layer}.{row.head} {row.feature}" for row in table.itertuples()]
        made.append(([*names, "all others"], torch.cat([parts, (whole - parts.sum(0))[None]])))
    (rows, q), (columns, k) = made
    return pd.DataFrame((q @ k.T / frozen.score_scale(layer)).cpu().numpy(), rows, columns)


def _with_bias(found: Parts, kind: str, layer: int, head: int, position: int, value: Float[Tensor, ""]) -> Parts:
    """Nodes, and a last one for the bias of the head's key or query where it gives something."""
    found = found._replace(row=torch.zeros_like(found.row))
    of_layer, of_head, at = (found.row.new_tensor([each]) for each in (layer, head, position))
    bias = Parts.rest(kind, of_layer, at, value[None, None])._replace(head=of_head)
    return Parts.joined([found, bias]) if value else found


def _keys(nodes: Nodes, layer: int, head: int, query: int) -> tuple[Parts, Float[Tensor, " source"]]:
    """Nodes at the key of every source of a row, and what the key's bias adds."""
    frozen = nodes.frozen
    at = torch.arange(query + 1, device=frozen.final.device)
    vector = frozen.layers[layer].q[query, head] / frozen.score_scale(layer)
    along = frozen.unrotated(layer, vector.expand(len(at), -1), at)
    reading = frozen.read(layer, "K", head, along, at)
    return nodes.split(reading, at, layer), reading.constant


def _key(nodes: Nodes, layer: int, head: int, query: int) -> Float[Tensor, "source d_head"]:
    """Keys of a head up to a position, as queries meet them."""
    return nodes.frozen.layers[layer].k[: query + 1, head]


def _check(nodes: Nodes, layer: int, head: int, query: int, source: int) -> None:
    require(0 <= layer < nodes.n_layers, f"there is no layer {layer}")
    require(0 <= head < nodes.n_heads, f"there is no head {head}")
    require(0 <= source <= query < len(nodes.frozen.tokens), f"position {query} does not see {source}")
