"""Every head of a model in one table: what it does without an SAE, and what the SAEs of a set keep of it."""

from typing import Any

import pandas as pd

from analysis.attribution import SLOTS
from analysis.heads.table import ModelHeads
from analysis.runs import tables
from analysis.runs.sets import LayerSet
from analysis.store import Analysis
from trainer.checkpoint import CheckpointError

# What a map is coloured by and a scatter drawn of, with its meaning: figures of the model, then of SAEs.
OF_MODEL = {
    "induction": "attention to the token after an earlier copy, repeated random tokens",
    "previous": "attention to the token before, repeated random tokens",
    "duplicate": "attention to an earlier copy, repeated random tokens",
    "copying": "1 raises the logit of what is read, 0 is chance, -1 lowers it",
    "zero_KL": "KL divergence where the head is zeroed (nats), text",
    "zero_CE": "rise of the loss where the head is zeroed (nats), text",
    "mean_KL": "KL divergence where the head is at its mean (nats), text",
    "mean_CE": "rise of the loss where the head is at its mean (nats), text",
    "resample_KL": "KL divergence where the head is that of another context (nats), text",
    "resample_CE": "rise of the loss where the head is that of another context (nats), text",
    "repeated_zero_KL": "KL divergence where the head is zeroed (nats), repeated random tokens",
    "repeated_zero_CE": "rise of the loss where the head is zeroed (nats), repeated random tokens",
    "entropy": "of attention (nats), text",
    "maximum": "largest weight of attention, mean over tokens of text",
    "distance": "mean number of tokens back, BOS left out, text",
    **{f"attention_{slot}": f"attention to the source slot {slot.replace('_', ' ')}, text" for slot in SLOTS},
}
OF_SAES = {
    "L0": "active features per token",
    "FVU": "fraction of variance unexplained",
    "KL_score": "KL score, only this head replaced",
    "CE_score": "CE score, only this head replaced",
    "KL_share": "share of the KL divergence that the layer's heads recover",
    "norm_ratio": "norm of the reconstruction over that of z",
    "silent_fraction": "features that fire on none of the tokens evaluated on",
    "mono_share": "share of its features that have its role (monosemanticity)",
    **{f"dfa_{slot}": f"share of its features' DFA on the source slot {slot.replace('_', ' ')}" for slot in SLOTS},
}
ROLES = {
    "role_attention_besides_bos": "slot with most attention besides BOS, text",
    "repeated_role_attention_besides_bos": "slot with most attention besides BOS, repeated random tokens",
    "role_dfa": "slot that its features read most (DFA), text",
    "repeated_role_dfa": "slot that its features read most (DFA), repeated random tokens",
}
_SCORES = ("induction", "previous", "duplicate")


def head_table(heads: ModelHeads | None, of_set: LayerSet | None) -> tuple[pd.DataFrame, list[CheckpointError]]:
    """A row per layer and head, sorted: `name` (17.4), `layer`, `head`, and what is known of it; nan where nothing is.

    Errors of the model's figures stand beside them as `<column>_se`.

    Args:
        heads: of the model; None where `python -m analysis.heads` was not run: then only layers of the set have rows.
        of_set: SAEs of the same model; dense ones have figures of heads where these have a meaning.

    Returns:
        The table, and why parts of a set are not in it.
    """
    saes, errors = _of_saes(of_set)
    if heads is None:
        table = saes
    else:
        table = heads.heads.assign(**_scores(heads.heads))
        if len(saes):
            new = [name for name in saes if name not in table or name in ("layer", "head")]
            table = table.merge(saes[new], "left", ["layer", "head"])
    names = [f"{layer}.{head}" for layer, head in zip(table["layer"], table["head"], strict=True)]
    return table.assign(name=names).reset_index(drop=True), errors


def columns_of(table: pd.DataFrame) -> dict[str, str]:
    """The figures of a table that have a value somewhere, with their meanings."""
    return {name: what for name, what in (OF_MODEL | OF_SAES).items() if name in table and table[name].notna().any()}


def roles_of(table: pd.DataFrame) -> dict[str, str]:
    """The roles of a table that are known somewhere, with their meanings."""
    return {name: what for name, what in ROLES.items() if name in table and table[name].notna().any()}


def _of_saes(of_set: LayerSet | None) -> tuple[pd.DataFrame, list[CheckpointError]]:
    """What eval.json and the analysis of each layer say; a layer that cannot be read is left out."""
    parts: list[pd.DataFrame] = []
    errors = []
    for layer, checkpoint in of_set.members.items() if of_set else ():
        part = pd.DataFrame({"layer": layer, "head": range(checkpoint.n_heads)})
        figures: dict[str, Any] = {}
        try:
            figures = checkpoint.eval or {}
        except CheckpointError as error:
            errors.append(error)
        if figures:
            part = part.merge(tables.per_head(figures, checkpoint.n_heads), on="head")
        if (checkpoint.path / "analysis").is_dir():
            try:
                analysed = Analysis(checkpoint).heads
            except CheckpointError as error:
                errors.append(error)
            else:
                analysed = analysed.assign(**_scores(analysed))
                part = part.merge(analysed[["head", *(name for name in analysed if name not in part)]], on="head")
        parts.append(part)
    if not parts:
        return pd.DataFrame({"layer": [], "head": []}, dtype=int), errors
    return pd.concat(parts, ignore_index=True).sort_values(["layer", "head"], ignore_index=True), errors


def _scores(heads: pd.DataFrame) -> dict[str, pd.Series]:
    """Attention on repeated tokens by the names that such heads have, with errors where there are some."""
    known = {f"{score}{end}": f"repeated_attention_{score}{end}" for score in _SCORES for end in ("", "_se")}
    return {name: heads[column] for name, column in known.items() if column in heads}
