"""What each head does: its role card, whether it copies, and whether its features agree (monosemanticity)."""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from analysis import attribution as dfa
from analysis.attribution import Chunk
from analysis.corpus.running_statistics import FeatureStatistics, Sources
from analysis.proportion import wilson
from trainer.clustered import ratio
from trainer.kernels import workers
from trainer.model.lm import Layer

MIN_ATTRIBUTED = 10  # attributed firings from which a feature's role is judged
_PAIRS = 512  # (query, source) pairs per head of which the copying rank is taken, of one layer
_EXAMPLES = 20  # of them kept
_TOKENS = 10  # kept of those that a head looks from, and at
_NEAR_TIE = 0.1  # lead of the largest slot below which it is marked


class Copying(NamedTuple):
    """Rank of the attended token's own logit in what a head writes when it reads that token."""

    score: float
    """Mean of 1 - 2 rank / (d_vocab - 1), weighted by attention: 1 copies, 0 is chance, -1 suppresses."""
    se: float
    """clustered by context, as the others (`trainer.clustered.ratio`)"""
    top10: float
    """Share of the pairs (weighted) in which the token is among the 10 most promoted."""
    top10_se: float
    bottom10: float
    """The same for the 10 most suppressed: copy suppression (McDougall et al. 2023, arXiv:2310.04625)."""
    bottom10_se: float
    examples: pd.DataFrame
    """context, query, source, attention, rank: the pairs with most attention."""


class Reads(NamedTuple):
    """Queries of a text, and the source but BOS to which each head attends most from there."""

    context: Int[Tensor, " pair"]
    """its place in the text"""
    query: Int[Tensor, " pair"]
    source: Int[Tensor, "pair head"]
    token: Int[Tensor, "pair head"]
    """at the source"""
    attention: Float[Tensor, "pair head"]
    v: Float[Tensor, "pair head d_head"]
    """at the source"""

    @classmethod
    def joined(cls, parts: "list[Reads]") -> "Reads":
        """Of several parts of a text."""
        return cls(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def spread(n_contexts: int, length: int, pairs: int = _PAIRS) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"]]:
    """Contexts and positions of queries that are spread evenly over a text; BOS is none."""
    n = n_contexts * (length - 1)
    picks = torch.linspace(0, n - 1, min(pairs, n)).long()
    return picks // (length - 1), picks % (length - 1) + 1


def most_attended(chunk: Chunk, context: Int[Tensor, " pair"], query: Int[Tensor, " pair"]) -> Reads:
    """What every head of the chunk's layer attends to most.

    Args:
        context: within the chunk.
    """
    heads = torch.arange(chunk.pattern.shape[1])
    attention, source = chunk.pattern[context, :, query, 1:].max(-1)
    source += 1
    token, v = chunk.tokens[context[:, None], source], chunk.v[context[:, None], source, heads]
    return Reads(chunk.ids[context], query, source, token, attention, v)


def copying(layer: Layer, chunks: list[Chunk]) -> list[Copying]:
    """`copying_of` the queries of some chunks, spread evenly over them."""
    context, query = spread(sum(len(chunk.tokens) for chunk in chunks), chunks[0].tokens.shape[1])
    parts, first = [], 0
    for chunk in chunks:
        inside = (context >= first) & (context < first + len(chunk.tokens))
        parts.append(most_attended(chunk, context[inside] - first, query[inside]))
        first += len(chunk.tokens)
    return copying_of(layer, Reads.joined(parts))


@torch.no_grad()
def copying_of(layer: Layer, reads: Reads) -> list[Copying]:
    """Whether each head's OV circuit raises or lowers the logit of what it reads, on text.

    A pair is a query and the source but BOS to which it attends most. The direct path alone: v through W_O, the norms
    (whose scale changes no rank) and W_U.
    """
    lm, W_O, b_V = layer.lm, layer.W_O.float(), layer.b_V.float()
    contexts, cluster = reads.context.unique(return_inverse=True)

    def of_head(head: int) -> Copying:
        token, attention = reads.token[:, head], reads.attention[:, head].double().cpu()
        logits = lm.unembed((reads.v[:, head].float() - b_V[head]) @ W_O[head])
        rank = (logits > logits.gather(1, token[:, None])).sum(1).double().cpu()
        value = 1 - 2 * rank / (lm.d_vocab - 1)
        values = torch.stack([value, (rank < 10).double(), (rank >= lm.d_vocab - 10).double(), torch.ones_like(value)])
        *sums, total = torch.zeros(4, len(contexts), dtype=torch.float64).index_add_(1, cluster, values * attention)
        (score, se), (top10, top10_se), (bottom10, bottom10_se) = (
            (figure.item() for figure in ratio(each, total)) for each in sums
        )
        most = attention.argsort(descending=True)[:_EXAMPLES]
        columns = {
            "context": reads.context, "query": reads.query, "source": reads.source[:, head].cpu(),
            "attention": reads.attention[:, head].cpu(),
        }  # fmt: skip
        examples = pd.DataFrame({name: column[most].numpy() for name, column in columns.items()})
        examples = examples.assign(rank=rank[most].long().numpy())
        examples.insert(0, "head", head)
        return Copying(score, se, top10, top10_se, bottom10, bottom10_se, examples)

    return workers.each(of_head, range(lm.n_heads))


def head_table(
    statistics: FeatureStatistics,
    repeats: Sources,
    copied: list[Copying],
    evaluation: dict[str, Any] | None,
    head: np.ndarray,
) -> pd.DataFrame:
    """One row per head: its share of the layer, its role card and its monosemanticity sheet.

    Columns beginning with `repeated_` are on random tokens repeated once, the others on text. Roles are the
    largest slot by attention and by DFA, and by attention without BOS, on which heads rest; `agree` is true where the
    role by DFA is one of the two by attention. `mono_` columns are those of `monosemanticity`. L0 and dead features of
    a dense SAE go to the head that a feature writes to.

    Of attention: `entropy` (nats) and `maximum` of a row, means over queries; `distance`, the mean number of tokens
    back, BOS left out. `query_ids` and `key_ids` are the tokens that most attention besides BOS comes from and goes to,
    with their shares of it; -1 and 0 where there are fewer.

    Args:
        evaluation: eval.json, for the KL scores.
        head: of each feature.
    """
    n_heads, n = len(copied), float(statistics.n_tokens)
    deviation = statistics.deviation()
    explained = deviation - statistics.error
    firings = statistics.firings.double().numpy()
    l0 = np.bincount(head, firings, n_heads) / n
    features = np.bincount(head, minlength=n_heads)
    table = pd.DataFrame(
        {
            "head": range(n_heads),
            "L0": l0,
            "L0_share": l0 / max(l0.sum(), 1e-30),
            "MSE": (statistics.error / n).numpy(),
            "FVU": (statistics.error / deviation).numpy(),
            "explained_share": (explained / explained.sum()).numpy(),
            "features": features,
            "dead": features - np.bincount(head[firings > 0], minlength=n_heads),
            "KL_score": (evaluation or {}).get("KL_score_per_head", [None] * n_heads),
            "KL_share": _kl_share(evaluation, n_heads),
            "copying": [of_head.score for of_head in copied],
            "copying_se": [of_head.se for of_head in copied],
            "copying_top10": [of_head.top10 for of_head in copied],
            "copying_bottom10": [of_head.bottom10 for of_head in copied],
        }
    ).astype({"KL_score": float, "KL_share": float})
    on_repeats = repeats.firings.double().numpy()
    for prefix, sources, count in (("", statistics.sources, firings), ("repeated_", repeats, on_repeats)):
        parts = [_roles(prefix, sources), _pattern(prefix, sources), monosemanticity(prefix, sources, count, head)]
        table = pd.concat([table, *parts], axis=1)
    for what, mass in (("query", statistics.sources.by_query), ("key", statistics.sources.by_key)):
        table[f"{what}_ids"], table[f"{what}_shares"] = top_tokens(mass, torch.arange(mass.shape[1]))
    return table


def top_tokens(
    mass: Float[Tensor, "head token"], ids: Int[Tensor, " token"]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The tokens with most of each head's mass, and their shares of it; -1 and 0 where there are fewer.

    Args:
        ids: of the columns.
    """
    share, place = (mass / mass.sum(1, keepdim=True).clamp_min(1e-30)).topk(min(_TOKENS, mass.shape[1]))
    return list(ids[place].masked_fill(share == 0, -1).int().numpy()), list(share.float().numpy())


class Roles(NamedTuple):
    """The largest source slot of features or heads."""

    shares: np.ndarray
    """of positive DFA [row, slot]"""
    slot: np.ndarray
    """index into SLOTS [row]; -1 where there is none"""
    share: np.ndarray
    """of the largest slot [row]"""
    lead: np.ndarray
    """of the largest slot over the next [row]"""

    @classmethod
    def of(cls, mass: Float[Tensor, "row slot"]) -> "Roles":
        """From sums of positive DFA."""
        shares = dfa.shares(mass).float().numpy()
        first, second = np.sort(shares)[:, :-3:-1].T
        return cls(shares, np.where(first > 0, shares.argmax(1), -1), first, first - second)

    @property
    def near_tie(self) -> np.ndarray:
        """Whether the largest slot leads by less than 10 points [row]."""
        return (self.slot >= 0) & (self.lead < _NEAR_TIE)


def monosemanticity(prefix: str, sources: Sources, firings: np.ndarray, head: np.ndarray) -> pd.DataFrame:
    """Which features share the dominant role of their head, and which deviate.

    Shehper's definition: one deviating feature makes a head polysemantic. So `mono_deviants` names them, most
    frequent first. Features with fewer than 10 attributed firings are not judged. Intervals are Wilson's (95 %); the
    weighted share counts a feature by how often it fires, with Kish's effective number of features.

    A head is `mono_unclassified` where its largest slot is a residual one (`local`, `other`), in which two features
    need not agree, or has no more than attention spread evenly would give it; there shares are nan and nobody
    deviates. `mono_near_tie` marks a largest slot that leads by less than 10 points; `mono_verdict` says it in words.

    Args:
        firings: of each feature, the weights.
        head: of each feature.
    """
    role, of_heads = Roles.of(sources.mass).slot, Roles.of(sources.head_dfa)
    by_chance = dfa.shares(sources.chance).numpy()
    unclassified = np.isin(of_heads.slot, [dfa.SLOTS.index(slot) for slot in dfa.RESIDUAL])
    unclassified |= (of_heads.slot >= 0) & (of_heads.share <= by_chance[of_heads.slot])
    judged = (sources.firings.numpy() >= MIN_ATTRIBUTED) & (role >= 0)
    rows = []
    for index, main in enumerate(of_heads.slot):
        own = np.flatnonzero(judged & (head == index))
        agree = role[own] == main
        weight = firings[own]
        total = max(weight.sum(), 1e-30)
        effective = total**2 / max((weight**2).sum(), 1e-30)
        if len(own) and main >= 0 and not unclassified[index]:
            share, weighted = agree.mean(), weight[agree].sum() / total
            deviants = own[~agree][np.argsort(-weight[~agree], kind="stable")].astype(np.int32)
        else:
            share, weighted, deviants = np.nan, np.nan, np.empty(0, np.int32)
        intervals = (share, *wilson(share, len(own)), weighted, *wilson(weighted, effective))
        verdict = _verdict(
            of_heads.shares[index], by_chance, bool(unclassified[index]), len(own), intervals[:3], deviants
        )
        named = dfa.SLOTS[main] if main >= 0 else None
        marks = unclassified[index], of_heads.near_tie[index], verdict
        rows.append((named, len(own), *intervals, deviants, *marks))
    figures = ["share", "low", "high", "weighted", "weighted_low", "weighted_high"]
    columns = ["role", "n", *figures, "deviants", "unclassified", "near_tie", "verdict"]
    return pd.DataFrame(rows, columns=columns).add_prefix(f"{prefix}mono_")


def _verdict(
    shares: np.ndarray,
    by_chance: np.ndarray,
    unclassified: bool,
    n: int,
    interval: tuple[float, float, float],
    deviants: np.ndarray,
) -> str:
    """What a head is, why, and what its interval is one of.

    Args:
        shares, by_chance: of its DFA, and of attention spread evenly [slot].
        n: features judged.
        interval: the share of them that have the head's role, and Wilson's bounds.
    """
    first, second = np.argsort(-shares, kind="stable")[:2]
    if not shares[first]:
        return "Not judged: no feature of it fires."
    slot, chance = dfa.SLOTS[first], by_chance[first]
    read = f"`{slot}` ({shares[first]:.0%} of what they read, {chance:.0%} by chance; then `{dfa.SLOTS[second]}` "
    read += f"{shares[second]:.0%}{', a near-tie' if shares[first] - shares[second] < _NEAR_TIE else ''})"
    if unclassified:
        why = "a residual class in which none need agree" if slot in dfa.RESIDUAL else "no more than by chance"
        return f"Unclassified: its features read mostly {read}, {why}."
    if not n:
        return f"Not judged: no feature of it has {MIN_ATTRIBUTED} attributed firings."
    _, low, high = interval
    open_ = f"({low:.0%} to {high:.0%}: what a random sample of {n} would leave open; these are all that fire often)"
    if len(deviants):
        have = f"{n - len(deviants)} of {n} features judged {open_} read mostly {read}"
        return f"Polysemantic: {have}; the most frequent that deviates is {deviants[0]}."
    return f"Monosemantic: all {n} features judged {open_} read mostly {read}."


def _roles(prefix: str, sources: Sources) -> pd.DataFrame:
    columns: dict[str, Any] = {}
    roles = {}
    for what, mass in (("attention", sources.head_attention), ("dfa", sources.head_dfa)):
        shares = dfa.shares(mass).numpy()
        columns |= {f"{prefix}{what}_{slot}": shares[:, i] for i, slot in enumerate(dfa.SLOTS)}
        columns[f"{prefix}role_{what}"] = roles[what] = largest_slots(mass)
    busy = slots_besides_bos(sources.head_attention)
    columns[f"{prefix}role_attention_besides_bos"] = busy
    columns[f"{prefix}agree"] = [
        reads in looks for reads, *looks in zip(roles["dfa"], roles["attention"], busy, strict=True)
    ]
    return pd.DataFrame(columns)


def largest_slots(mass: Float[Tensor, "head slot"]) -> list[str | None]:
    """The role of each head; None of one without any mass."""
    return [dfa.SLOTS[row.argmax()] if row.sum() > 0 else None for row in dfa.shares(mass).numpy()]


def slots_besides_bos(mass: Float[Tensor, "head slot"]) -> list[str]:
    """Heads rest on BOS: where they look otherwise is what their features can agree with."""
    return [dfa.SLOTS[1 + row.argmax()] for row in dfa.shares(mass)[:, 1:]]


def _pattern(prefix: str, sources: Sources) -> pd.DataFrame:
    n = float(sources.head_tokens)
    besides_bos = sources.head_attention[:, 1:].sum(1).clamp_min(1e-30)
    columns = {
        "entropy": sources.entropy / n,
        "maximum": sources.maximum / n,
        "distance": sources.distance / besides_bos,
    }
    return pd.DataFrame({f"{prefix}{name}": column.numpy() for name, column in columns.items()})


def _kl_share(evaluation: dict[str, Any] | None, n_heads: int) -> list[float | None]:
    """Each head's part of the KL divergence that all heads recover, one replaced at a time."""
    if not evaluation or "KL_zero_per_head" not in evaluation:
        return [None] * n_heads
    recovered = Tensor(evaluation["KL_zero_per_head"]) - Tensor(evaluation["KL_sae_per_head"])
    return (recovered / recovered.sum()).tolist()
