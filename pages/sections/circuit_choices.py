"""What a circuit is of, and how much of it is drawn."""

import re
from contextlib import suppress
from typing import Any, NamedTuple

import streamlit as st

from analysis.prompt.circuit.nodes import Nodes
from analysis.prompt.circuit.target import Target
from analysis.runs.sets import LayerSet, layer_sets
from analysis.tokens import in_text, labels
from pages.components.listing import listing
from pages.shared import circuits
from pages.shared.page import plain
from pages.shared.pick import EXAMPLES, Example, choose, drop, put, select
from trainer.checkpoint import Checkpoint

_PREDICTION = "a prediction"
_NOTHING = "nothing: the logit itself"
_LOG = "all others: its log probability"
_HERE, _ANYWHERE = "at that token", "at any token"
_GRADIENT, _INTEGRATED = "gradient", "integrated gradients"
_ID = re.compile(r"\((\d+)\)$")  # how an option for a token ends
_STEPS = 8  # of integrated gradients


# A tour on the shipped set: what one should see is tested in tests/analysis/prompt/circuit/test_tour.py.
TOUR_OF = "set batchtopk-x4-k32"
TOUR = {
    "Induction": Example(
        EXAMPLES["Induction"].prompt,
        "Open 18.6 at the last token: it reads ' mat', and looks there because of what is at ' mat'. Of that 16.0 is "
        "most, a previous-token head, which reads the ' the' before ' mat'; 17.8 there comes next.",
        {"next": "mat", "against": "park"},
    ),
    "Indirect object": Example(
        EXAMPLES["Indirect object"].prompt,
        "20.0 and 23.3 at ' to' read the second ' John'. 23.7 reads ' Mary', and at the query the largest feature that "
        "makes it look there is 20.0's: who gave decides who is looked for.",
        {"next": "Mary", "against": "John"},
    ),
    "Previous token": Example(
        EXAMPLES["Previous token"].prompt,
        "18.6 at the last ' of' reads ' Representatives', and looks there because 16.0 has read at ' Representatives' "
        "that ' of' was the token before.",
        {"next": "Representatives", "against": "Commons"},
    ),
    "Agreement": Example(
        "The keys to the cabinet",
        "The verb agrees with ' keys', not with ' cabinet': the strongest feature, 26.0's, reads ' keys' from "
        "' cabinet'. Without it the target, 1.2, is below 0. Nearly all it does goes straight to the logits.",
        {"next": "are", "against": "is"},
    ),
}


class Size(NamedTuple):
    """How much of a circuit is traced; arguments of `graph.trace`."""

    features: int
    depth: int
    share: float
    here: bool
    steps: int


def pick_set(checkpoints: list[Checkpoint]) -> LayerSet | None:
    """SAEs of several layers of one model; None, with a sentence, where there are none."""
    sets = {each.name: each for each in layer_sets(checkpoints) if len(each.members) > 1}
    if not sets:
        st.info("A circuit needs SAEs on several layers of one model. This command trains such a set:")
        st.code("python -m trainer --config=sweeps/layers.yaml", language="bash")
        return None
    words = {f"{name}: {len(each.members)} layers": each for name, each in sets.items()}
    return words[select(st, "SAEs", list(words), "saes")]


def token_labels(nodes: Nodes) -> list[str]:
    """Every token by its position, as select boxes name it."""
    return labels(in_text(nodes.frozen.lm.token_strings(nodes.frozen.tokens.tolist())))


def feature_name(layer: int, head: int, feature: int) -> str:
    """As a node and a target are called."""
    return f"{layer}.{head} feature {feature}"


def pick_target(nodes: Nodes) -> Target:
    """What is explained: the prediction after a token, against another one, or a feature that fires there."""
    positions = dict(reversed([*zip(token_labels(nodes), range(len(nodes.frozen.tokens)), strict=True)][1:]))
    a, b = st.columns(2)
    at = positions[select(a, "At token", list(positions), "at")]
    features = {}
    for layer in sorted(nodes.saes.keys() - {0}, reverse=True):  # nothing comes before layer 0
        here = nodes.here(layer, at)
        for head, feature in zip(here.head.tolist(), here.feature.tolist(), strict=True):
            features[feature_name(layer, head, feature)] = layer, feature
    help = "or a feature that fires at this token: type its layer, head or number"
    what = select(b, "Explain", [_PREDICTION, *features], "what", help=help)
    if what in features:
        layer, feature = features[what]
        return Target(at, layer=layer, feature=feature)
    a, b = st.columns(2)
    predicted = circuits.predictions(nodes, at)
    names = {f"{row.token} {row.probability:.0%} ({row.id})": int(row.id) for row in predicted.itertuples()}
    token = _pick_token(nodes, a, "Why", list(names), "next")

    def clicked(predicted: int) -> None:
        put("next", next(name for name, each in names.items() if each == predicted))
        if _token_of(nodes.frozen.lm, st.session_state.get("against") or "") == predicted:
            drop(["against"])

    others = [name for name, each in names.items() if each != token]
    against = _pick_token(nodes, b, "rather than", [*others, _NOTHING, _LOG], "against")
    likely = predicted.rename(columns={"token": "next token"})
    listing(likely, "id", token, clicked, "predictions", height=150, id=None)
    if isinstance(against, int) and against != token:
        return Target(at, token, against)
    return Target(at, token, log_probability=against == _LOG)


def _pick_token(nodes: Nodes, column: Any, label: str, options: list[str], key: str) -> Any:
    """The id of the token that is chosen or typed, or an option that is no token."""
    help = "the likeliest next tokens; or type any other token"
    chosen = select(column, label, options, key, typed=True, help=help)
    if chosen in (_NOTHING, _LOG):
        return chosen
    if (token := _token_of(nodes.frozen.lm, chosen)) is not None:
        return token
    column.warning(f"{plain(chosen[:40])} is no single token of the model: {plain(options[0])} is taken.")
    return int(_ID.search(options[0])[1])  # type: ignore[index]


def _token_of(lm: Any, chosen: str) -> int | None:
    """Of an option, or of what was typed; None where that is no single token."""
    if (of_option := _ID.search(chosen)) and int(of_option[1]) < lm.d_vocab:  # also one of another token's list
        return int(of_option[1])
    for text in (f" {chosen.strip()}", chosen):
        with suppress(ValueError):
            return int(lm.single_token(text))
    return None


def pick_size(target: Target) -> Size:
    """How many features, how many steps back, from which share something is an edge, and where it begins."""
    a, b, c = st.columns(3)
    features = a.slider("Features", 1, 40, 8, key="features", bind="query-params")
    depth = b.slider("Steps back", 0, 4, 2, key="depth", bind="query-params")
    what = "of the largest that goes into the same node so"
    share = c.slider("Edges from", 5, 100, 40, 5, key="share", bind="query-params", format="%d %%", help=what)
    a, b = st.columns([2, 3])
    begins = [_ANYWHERE, _HERE] if target.token is None else [_HERE, _ANYWHERE]
    begin = select(a, "Beginning with features", begins, "begin")
    help = f"{_STEPS} steps, layer by layer: seconds longer; summed over a layer it is what zeroing the layer does"
    by = choose("Attribution by", [_GRADIENT, _INTEGRATED], "by", column=b, help=help)
    return Size(features, depth, share / 100, begin == _HERE, _STEPS if by == _INTEGRATED else 0)
