"""All heads of a model: which model and SAEs, a map and a scatter, a finder, and one head."""

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import pandas as pd
import streamlit as st

from analysis.heads.table import ModelHeads, list_models
from analysis.runs.model import ROLES, columns_of, roles_of
from analysis.runs.sets import LayerSet, layer_sets
from pages.charts import model as charts
from pages.charts.common import clicked
from pages.components.listing import listing
from pages.sections import head_card
from pages.shared import live
from pages.shared.exports import downloads
from pages.shared.page import ARROW, LINKED, folder, plain, typed
from pages.shared.pick import best, number, put, select
from trainer.checkpoint import Checkpoint, CheckpointError

_NO_SAES = "none"
_MAP, _X, _Y = "induction", "previous", "zero_KL"  # shown first, where they are known


class Shown(NamedTuple):
    """What the page is about."""

    model: str
    heads: ModelHeads | None
    """None where nothing is known of the model but its SAEs"""
    saes: LayerSet | None
    table: pd.DataFrame
    """`model.head_table`"""


def pick(checkpoints: list[Checkpoint]) -> Shown | None:
    """The model, and the SAEs whose figures stand beside its own; None where there is neither."""
    described = list_models(folder())
    heads = {each.meta["model"]["fingerprint"]: live.same_heads(each) for each in described.readable}
    names = {of: each.name for of, each in heads.items()}
    names |= {each.config.model.fingerprint: each.config.model.name.rpartition("/")[2] for each in checkpoints}
    if not names:
        return None
    order = sorted(names, key=lambda of: (of not in heads, names[of], of))
    words = {f"{names[of]} ({of[:6]})" if list(names.values()).count(names[of]) > 1 else names[of]: of for of in order}
    left, right, _ = st.columns([2, 4, 3])
    model = select(left, "Model", list(words), "model")
    of_model = words[model]
    of_all = layer_sets([each for each in checkpoints if each.config.model.fingerprint == of_model])
    of_all.sort(key=lambda each: (-len(each.members), best(checkpoints) not in each.members.values()))
    sets = {each.name: each for each in of_all}
    options = [*(f"{each.name}: {_layers(each)}" for each in of_all), _NO_SAES]
    chosen = select(right, "SAEs", options, "saes")
    of_set = None if chosen == _NO_SAES else sets[chosen.rpartition(": ")[0]]
    try:
        table, errors = live.model_table(heads.get(of_model), of_set)
    except CheckpointError as error:
        table, errors = live.model_table(None, of_set)
        errors = [error, *errors]
    _refused([*described.errors, *errors])
    if of_model not in heads:
        st.text(f"Only layers with SAEs are shown. This command looks at every head of {model}, without SAEs:")
        st.code(f"python -m analysis.heads {model}", language="bash")
    return Shown(model, heads.get(of_model), of_set, table)


def _layers(of_set: LayerSet) -> str:
    n = len(of_set.members)
    return f"layer {next(iter(of_set.members))}" if n == 1 else f"{n} layers"


def _refused(errors: list[CheckpointError]) -> None:
    """What is left out, and why."""
    if errors:
        with st.expander(f"{len(errors)} part(s) cannot be read", icon=":material/warning:"):
            for error in errors:
                st.text(typed(str(error)))


def overview(shown: Shown) -> None:
    """The map of all heads, coloured by a figure or a role, beside two figures against each other."""
    table = shown.table
    figures, roles = columns_of(table), roles_of(table)
    if not figures:
        st.info("Nothing is known of these heads yet: their SAEs are still training.")
        return
    spoken = {name: name.replace("_", " ") for name in (*figures, *roles)}
    left, right = st.columns(2)
    with left:
        colour = select(st, "Colour", _first(_MAP, [*figures, *roles], table), "colour", format_func=spoken.get)
        chart = charts.head_map(table, colour, _chosen(table))
        st.altair_chart(chart, key="map", on_select=partial(_clicked, "map"))
        st.caption(f"Colour: {(figures | roles)[colour]}. A click opens a head.")
    with right:
        a, b = st.columns(2)
        x = select(a, "Across", _first(_X, figures, table), "x", format_func=spoken.get)
        y = select(
            b, "Up", _first(_Y, [*(name for name in figures if name != x), x], table), "y", format_func=spoken.get
        )
        known = table.dropna(subset=[x, y])
        if len(known):
            chart = charts.scatter(known, x, y, _chosen(table))
            st.altair_chart(chart, width="stretch", key="scatter", on_select=partial(_clicked, "scatter"))
        else:
            st.info("No head has both figures.")
        st.caption(f"Across: {figures[x]}. Up: {figures[y]}.")


def finder(shown: Shown) -> None:
    """The heads whose figure is at least or at most something, sorted by it; one is chosen by a click."""
    table, figures = shown.table, columns_of(shown.table)
    if not figures:
        return
    st.subheader("Find heads", anchor=False)
    spoken = {name: name.replace("_", " ") for name in figures}
    a, b, c, _ = st.columns([3, 2, 2, 4])
    figure = select(a, "Heads whose", _first(_MAP, figures, table), "find", format_func=spoken.get)
    side = select(b, "is", ["at least", "at most"], "side")
    bound = number(c, "this", key="bound", value=0.0, step=0.1, format="%.4g")
    values = table[figure]
    found = table[values >= bound if side == "at least" else values <= bound]
    found = found.sort_values(figure, ascending=side == "at most", kind="stable").reset_index(drop=True)
    shown_columns = list(dict.fromkeys(["name", figure, *(name for name in _COLUMNS if name in found)]))
    st.caption(
        f"{len(found):,} of {len(table):,} heads. A click on a row opens the head, one on a column's name sorts."
    )
    rows = found[shown_columns].dropna(axis="columns", how="all")
    rows.insert(0, "row", found.index)
    chosen = found.index[found["name"] == _chosen(table)]
    names = found["name"].tolist()
    listing(
        rows, "row", int(chosen[0]) if len(chosen) else None, lambda row: put("at", names[row]), "heads",
        height=320, row=None,
    )  # fmt: skip
    with st.expander("These heads as a file, with every column"):
        plain_columns = [
            name
            for name in found
            if not found[name].map(lambda value: hasattr(value, "__len__") and not isinstance(value, str)).any()
        ]
        downloads(found[plain_columns], "Heads", f"{shown.model}-heads")


_COLUMNS = (
    "induction", "previous", "duplicate", "copying", "zero_KL", "zero_CE", "repeated_zero_CE", "L0", "FVU", "KL_score",
    *ROLES,
)  # fmt: skip


def one_head(shown: Shown) -> None:
    """The card of the chosen head, and where to go from it."""
    table = shown.table
    names = table["name"].tolist()
    st.subheader("One head", anchor=False)
    name = select(st.columns([1, 5])[0], "Layer and head", names, "at", index=_shown_first(table))
    row = table[table["name"] == name].iloc[0]
    index = int(row.name)
    checkpoint = shown.saes.members.get(int(row["layer"])) if shown.saes else None
    left, right = st.columns([2, 3])
    with left:
        features = None
        if checkpoint is not None and (checkpoint.path / "analysis").is_dir():
            try:
                features = head_card.frequent(checkpoint, live.read_analysis(checkpoint))
                features = features[features["head"] == row["head"]]
            except CheckpointError:
                features = None  # said above
        head_card.show(f"Head {name}", row, _pictures(shown, index), "", checkpoint, features)
    with right:
        if checkpoint is None:
            st.text(f"There is no SAE of layer {row['layer']} here.")
        else:
            st.markdown(f"Its SAE: {plain(checkpoint.name)}")
            query = {"checkpoint": checkpoint.name}
            head = str(row["head"])
            for page, label, more in (
                ("heads", f"All heads of layer {row['layer']}", {}),
                ("features", "Its features", {"head": head}),
                ("prompt", "What fires in it on a prompt", {"head": head}),
            ):
                st.page_link(
                    f"pages/{page}.py", label=label, icon=ARROW, query_params={LINKED: query["checkpoint"], **more}
                )
        _every_figure(row, columns_of(table))


def _every_figure(row: pd.Series, figures: dict[str, str]) -> None:
    rows = [
        (name.replace("_", " "), row[name], row.get(f"{name}_se"), what)
        for name, what in figures.items()
        if pd.notna(row[name])
    ]
    frame = pd.DataFrame(rows, columns=["figure", "value", "±", "what it is"]).astype({"value": float, "±": float})
    digits = {name: st.column_config.NumberColumn(format="%.4g") for name in ("value", "±")}
    st.dataframe(frame, hide_index=True, height=300, column_config=digits)


def _pictures(shown: Shown, index: int) -> dict:
    if shown.heads is None:
        return {}
    try:
        of_all = shown.heads.patterns
    except CheckpointError as error:
        st.text(typed(str(error)))
        return {}
    return {"text": of_all["text"][index], "repeated tokens": of_all["repeated"][index]}


def _chosen(table: pd.DataFrame) -> str:
    """The head that is chosen below: its box is not drawn yet, and an address may say which."""
    name = st.session_state.get("at") or st.query_params.get("at")
    return str(name if name in set(table["name"]) else table["name"].iloc[_shown_first(table)])


def _shown_first(table: pd.DataFrame) -> int:
    """The place of the head that one sees before choosing: the strongest induction head, where that is known."""
    scores = table.get(_MAP, pd.Series(dtype=float))
    return int(scores.to_numpy().argmax()) if len(scores) and scores.notna().all() else 0


def _clicked(key: str) -> None:
    if name := clicked(st.session_state[key]["selection"], "head", "name"):
        put("at", name)


def _first(wanted: str, names: Iterable[str], table: pd.DataFrame) -> list[str]:
    """With one before the others that is known of most heads: the one that is wanted, if it is."""
    names = list(names)
    known = table[names].notna().sum()
    first = max(names, key=lambda name: (known[name], name == wanted))
    return [first, *(name for name in names if name != first)]
