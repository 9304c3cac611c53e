"""What a circuit is of, and how much of it is drawn."""

from typing import NamedTuple

import streamlit as st

from analysis.prompt.circuit.nodes import Nodes
from analysis.prompt.circuit.target import Target
from analysis.runs.sets import LayerSet, layer_sets
from analysis.tokens import in_text, labels
from pages.shared import circuits
from pages.shared.pick import choose, select
from trainer.checkpoint import Checkpoint

_PREDICTION = "a prediction"
_NOTHING = "nothing: the logit itself"
_LOG = "all others: its log probability"
_HERE, _ANYWHERE = "at that token", "at any token"
_GRADIENT, _INTEGRATED = "gradient", "integrated gradients"
_STEPS = 8  # of integrated gradients


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
    tokens = token_labels(nodes)[1:]
    a, b = st.columns(2)
    at = 1 + tokens.index(select(a, "At token", tokens, "at", index=len(tokens) - 1))
    features = {feature_name(*ids): ids for ids in nodes.firing(at) if ids[0] > 0}  # nothing comes before layer 0
    help = "or a feature that fires at this token: type its layer, head or number"
    what = select(b, "Explain", [_PREDICTION, *features], "what", help=help)
    if what in features:
        layer, _, feature = features[what]
        return Target(at, layer=layer, feature=feature)
    a, b = st.columns(2)
    predicted = circuits.predictions(nodes, at)
    names = {f"{row.token} {row.probability:.0%} ({row.id})": int(row.id) for row in predicted.itertuples()}
    token = names[select(a, "Why", list(names), "next", help="the likeliest next tokens")]
    others = [name for name, each in names.items() if each != token]
    against = select(b, "rather than", [*others, _NOTHING, _LOG], "against")
    if against in names:
        return Target(at, token, names[against])
    return Target(at, token, log_probability=against == _LOG)


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
