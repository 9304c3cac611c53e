"""What the attention of whole heads comes to on one context, summed over queries."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from analysis import attribution as dfa


class RowSums(NamedTuple):
    """Sums over the queries of a context that count; a row is the attention of one of them, which sums to 1."""

    mass: Float[Tensor, "head slot"]
    """attention on each source slot"""
    entropy: Float[Tensor, " head"]
    """of the rows, in nats"""
    maximum: Float[Tensor, " head"]
    """largest attention of a row"""
    distance: Float[Tensor, " head"]
    """attention besides BOS times the number of tokens back"""
    by_query: Float[Tensor, "head query"]
    """attention besides BOS of each query that counts; no sum"""
    by_key: Float[Tensor, "head key"]
    """attention on each source but BOS"""


def row_sums(
    pattern: Float[Tensor, "head query source"], slots: Int[Tensor, "query source"], first_query: int
) -> RowSums:
    """Of one context.

    Args:
        slots: of `source_slots`.
        first_query: position of the first query that counts; at least 1, because BOS sees only itself.
    """
    rows = pattern[:, first_query:]
    besides_bos = rows[..., 1:]
    place = torch.arange(pattern.shape[1], device=pattern.device)
    distance = (place[first_query:, None] - place[1:]).float()  # [query, source]; negative where attention is 0
    return RowSums(
        dfa.mass_per_slot(pattern, slots, first_query),
        torch.special.entr(rows).sum((1, 2)),
        rows.amax(2).sum(1),
        (besides_bos * distance).sum((1, 2)),
        besides_bos.sum(2),
        besides_bos.sum(1),
    )
