"""What each head does: its role card, whether it copies, and whether its features agree (monosemanticity)."""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analysis import attribution as dfa
from analysis.attribution import Chunk
from analysis.corpus.running_statistics import FeatureStatistics, Sources
from trainer.model.lm import Layer

MIN_ATTRIBUTED = 10  # attributed firings from which a feature's role is judged
_PAIRS = 512  # (query, source) pairs per head of which the copying rank is taken
_EXAMPLES = 20  # of them kept


class Copying(NamedTuple):
    """Rank of the attended token's own logit in what a head writes when it reads that token."""

    score: float
    """Mean of 1 - 2 rank / (d_vocab - 1), weighted by attention: 1 copies, 0 is chance, -1 suppresses."""
    se: float
    top10: float
    """Share of the pairs (weighted) in which the token is among the 10 most promoted."""
    bottom10: float
    """The same for the 10 most suppressed: copy suppression (McDougall et al. 2023, arXiv:2310.04625)."""
    examples: pd.DataFrame
    """context, query, source, attention, rank: the pairs with most attention."""


@torch.no_grad()
def copying(layer: Layer, chunks: list[Chunk]) -> list[Copying]:
    """Whether each head's OV circuit raises or lowers the logit of what it reads, on text.

    A pair is a query and the source but BOS to which it attends most; queries are spread evenly over the chunks. The
    direct path alone: v through W_O, the norms (whose scale changes no rank) and W_U.
    """
    lm, W_O, b_V = layer.lm, layer.W_O.float(), layer.b_V.float()
    ids, tokens, v, pattern = (
        torch.cat([getattr(c, name) for c in chunks]) for name in ("ids", "tokens", "v", "pattern")
    )
    n_contexts, length = tokens.shape
    picks = torch.linspace(0, n_contexts * (length - 1) - 1, min(_PAIRS, n_contexts * (length - 1))).long()
    context, query = picks // (length - 1), picks % (length - 1) + 1
    of_heads = []
    for head in range(lm.n_heads):
        attention, source = pattern[context, head, query, 1:].max(1)
        source += 1
        token = tokens[context, source]
        logits = lm.unembed((v[context, source, head].float() - b_V[head]) @ W_O[head])
        rank = (logits > logits.gather(1, token[:, None])).sum(1).double().cpu()
        weight = attention.double().cpu() / attention.double().sum().cpu()
        value = 1 - 2 * rank / (lm.d_vocab - 1)
        score = (weight * value).sum()
        se = (weight * (value - score)).pow(2).sum().sqrt()
        top10, bottom10 = (weight * (rank < 10)).sum(), (weight * (rank >= lm.d_vocab - 10)).sum()
        most = weight.argsort(descending=True)[:_EXAMPLES]
        columns = {"context": ids[context], "query": query, "source": source.cpu(), "attention": attention.cpu()}
        examples = pd.DataFrame({name: column[most].numpy() for name, column in columns.items()})
        examples = examples.assign(rank=rank[most].long().numpy())
        examples.insert(0, "head", head)
        of_heads.append(Copying(score.item(), se.item(), top10.item(), bottom10.item(), examples))
    return of_heads


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
    role by DFA is one of the two by attention. `mono_role` is the role by DFA, and the `mono_` columns say how many of
    the head's features have it. L0 and dead features of a dense SAE go to the head that a feature writes to.

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
        table = pd.concat([table, _roles(prefix, sources), monosemanticity(prefix, sources, count, head)], axis=1)
    return table


def feature_roles(sources: Sources) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shares of positive DFA by slot [feature, slot], the largest slot (-1 where there is none), and its share."""
    shares = dfa.shares(sources.mass).float().numpy()
    largest = shares.argmax(1)
    return shares, np.where(shares.sum(1) > 0, largest, -1), shares.max(1)


def monosemanticity(prefix: str, sources: Sources, firings: np.ndarray, head: np.ndarray) -> pd.DataFrame:
    """Which features share the dominant role of their head, and which deviate.

    Shehper's definition: one deviating feature makes a head polysemantic. So `mono_deviants` names them, most
    frequent first. Features with fewer than 10 attributed firings are not judged. Intervals are Wilson's (95 %); the
    weighted share counts a feature by how often it fires, with Kish's effective number of features.

    Args:
        firings: of each feature, the weights.
        head: of each feature.
    """
    _, role, _ = feature_roles(sources)
    dominant = sources.head_dfa.argmax(1).numpy()
    judged = (sources.firings.numpy() >= MIN_ATTRIBUTED) & (role >= 0)
    rows = []
    for index, main in enumerate(dominant):
        own = np.flatnonzero(judged & (head == index))
        agree = role[own] == main
        weight = firings[own]
        total = max(weight.sum(), 1e-30)
        effective = total**2 / max((weight**2).sum(), 1e-30)
        share, weighted = (agree.mean(), weight[agree].sum() / total) if len(own) else (np.nan, np.nan)
        deviants = own[~agree][np.argsort(-weight[~agree], kind="stable")].astype(np.int32)
        main_slot = dfa.SLOTS[main] if sources.head_dfa[index].sum() > 0 else None
        intervals = (share, *wilson(share, len(own)), weighted, *wilson(weighted, effective))
        rows.append((main_slot, len(own), *intervals, deviants))
    figures = ["share", "low", "high", "weighted", "weighted_low", "weighted_high"]
    return pd.DataFrame(rows, columns=["role", "n", *figures, "deviants"]).add_prefix(f"{prefix}mono_")


def wilson(share: float | int, n: float | int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927)."""
    if not n or np.isnan(share):
        return np.nan, np.nan
    z = 1.959964
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    return middle - half, middle + half


def _roles(prefix: str, sources: Sources) -> pd.DataFrame:
    columns: dict[str, Any] = {}
    roles = {}
    for what, mass in (("attention", sources.head_attention), ("dfa", sources.head_dfa)):
        shares = dfa.shares(mass).numpy()
        columns |= {f"{prefix}{what}_{slot}": shares[:, i] for i, slot in enumerate(dfa.SLOTS)}
        roles[what] = [dfa.SLOTS[row.argmax()] if row.sum() > 0 else None for row in shares]
        columns[f"{prefix}role_{what}"] = roles[what]
    # Heads rest on BOS: where they look otherwise is what their features can agree with.
    busy = [dfa.SLOTS[1 + row.argmax()] for row in dfa.shares(sources.head_attention)[:, 1:]]
    columns[f"{prefix}role_attention_besides_bos"] = busy
    columns[f"{prefix}agree"] = [
        reads in looks for reads, *looks in zip(roles["dfa"], roles["attention"], busy, strict=True)
    ]
    return pd.DataFrame(columns)


def _kl_share(evaluation: dict[str, Any] | None, n_heads: int) -> list[float | None]:
    """Each head's part of the KL divergence that all heads recover, one replaced at a time."""
    if not evaluation or "KL_zero_per_head" not in evaluation:
        return [None] * n_heads
    recovered = Tensor(evaluation["KL_zero_per_head"]) - Tensor(evaluation["KL_sae_per_head"])
    return (recovered / recovered.sum()).tolist()
