"""From sums by context to the table of heads: every figure with its standard error, clustered by context."""

from collections.abc import Iterator
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from analysis import attribution as dfa
from analysis.corpus.heads import Copying, Roles, largest_slots, slots_besides_bos, top_tokens
from analysis.corpus.mean_pattern import pattern_table
from analysis.heads.attention import Attention
from analysis.heads.removal import Removal
from trainer.clustered import ratio

Figure = tuple[str, Float[Tensor, "layer head"], Float[Tensor, "layer head"]]


def head_table(
    text: Attention,
    repeated: Attention,
    copied: list[list[Copying]],
    removal: Removal | None,
    repeated_removal: Removal | None,
) -> pd.DataFrame:
    """One row per layer and head; docs/metrics.md has what the columns are.

    Columns beginning with `repeated_` are on random tokens repeated once, the others on text.
    """
    n_layers, n_heads = text.entropy.shape[:2]
    table = pd.DataFrame(
        {
            "layer": torch.arange(n_layers).repeat_interleave(n_heads).int().numpy(),
            "head": torch.arange(n_heads).repeat(n_layers).int().numpy(),
        }
    )
    figures = [*_attention("", text), *_attention("repeated_", repeated), *_copying(copied)]
    for prefix, of in (("", removal), ("repeated_", repeated_removal)):
        figures += _removal(prefix, of) if of else []
    columns: dict[str, Any] = {}
    for name, value, se in figures:
        columns |= {name: value.flatten().float().numpy(), f"{name}_se": se.flatten().float().numpy()}
    for prefix, seen in (("", text), ("repeated_", repeated)):
        mass = seen.mass.sum(-1).flatten(0, 1)
        columns[f"{prefix}role_attention"] = largest_slots(mass)
        columns[f"{prefix}role_attention_besides_bos"] = slots_besides_bos(mass)
        columns[f"{prefix}near_tie"] = Roles.of(mass).near_tie
    for what, by_token in (("query", text.by_query), ("key", text.by_key)):
        columns[f"{what}_ids"], columns[f"{what}_shares"] = top_tokens(by_token.flatten(0, 1), text.vocabulary)
    return pd.concat([table, pd.DataFrame(columns)], axis=1)


def patterns_of_layers(text: Attention, repeated: Attention) -> pd.DataFrame:
    """`pattern_table` of every layer, one below the other."""
    pairs = zip(text.patterns, repeated.patterns, strict=True)
    tables = [pattern_table(*pair).assign(layer=layer) for layer, pair in enumerate(pairs)]
    return pd.concat(tables, ignore_index=True)[["layer", "head", "text", "repeated"]].astype({"layer": "int32"})


def _attention(prefix: str, seen: Attention) -> Iterator[Figure]:
    queries = torch.full((seen.mass.shape[-1],), float(seen.n_queries))
    for index, slot in enumerate(dfa.SLOTS):
        yield f"{prefix}attention_{slot}", *ratio(seen.mass[:, :, index], seen.mass.sum(2))
    yield f"{prefix}entropy", *ratio(seen.entropy, queries)
    yield f"{prefix}maximum", *ratio(seen.maximum, queries)
    yield f"{prefix}distance", *ratio(seen.distance, seen.mass[:, :, 1:].sum(2))


def _copying(copied: list[list[Copying]]) -> Iterator[Figure]:
    names = {"copying": "score", "copying_top10": "top10", "copying_bottom10": "bottom10"}
    for name, field in names.items():
        se = "se" if field == "score" else f"{field}_se"
        value, error = (Tensor([[getattr(of, each) for of in layer] for layer in copied]) for each in (field, se))
        yield name, value, error


def _removal(prefix: str, removal: Removal) -> Iterator[Figure]:
    tokens = torch.full_like(removal.clean_ce, removal.n_scored)
    for ablation in removal.ce:
        yield f"{prefix}{ablation}_CE", *ratio(removal.ce[ablation], tokens)
        yield f"{prefix}{ablation}_KL", *ratio(removal.kl[ablation], tokens)
