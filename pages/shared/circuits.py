"""What is computed once of a prompt in all layers, as in `live`; errors end the page with a sentence."""

import pandas as pd
import streamlit as st

from analysis.prompt.circuit.faithful import curve, ranked
from analysis.prompt.circuit.graph import Circuit, trace
from analysis.prompt.circuit.nodes import Nodes
from analysis.prompt.circuit.others import at_mean, resampled
from analysis.prompt.circuit.target import Number, Target
from analysis.runs.sets import LayerSet
from analysis.tokens import visible
from pages.shared import live
from pages.shared.page import sentences
from trainer.checkpoint import CheckpointError

_PREDICTIONS = 10  # next tokens offered as targets
_CONTEXTS = 4  # of other text, on which features are resampled


@st.cache_resource(max_entries=3, **live.PER_MODEL)
def _of_prompt(of_set: LayerSet, prompt: str) -> list[Nodes]:
    return []


@st.cache_resource(max_entries=32, **live.PER_MODEL)
def _of_target(of_set: LayerSet, prompt: str, target: Target, *size: float) -> list[Circuit]:
    return []


@st.cache_resource(max_entries=32, **live.PER_MODEL)
def _of_curve(of_set: LayerSet, prompt: str, target: Target, *choices: bool) -> list[pd.DataFrame]:
    return []


@sentences(live.FORESEEN)
def run(of_set: LayerSet, prompt: str) -> Nodes:
    """A prompt in all layers."""
    first = next(iter(of_set.members.values()))
    lm = live.language_model(first)

    def compute() -> Nodes:
        from trainer.model.frozen import Frozen

        saes = {layer: live.read_sae(checkpoint) for layer, checkpoint in of_set.members.items()}
        return Nodes(Frozen(lm, lm.to_tokens(prompt)[0]), saes)

    return live.in_turn(_of_prompt(of_set, prompt), "Running the prompt", compute)


def predictions(nodes: Nodes, position: int) -> pd.DataFrame:
    """The likeliest tokens after a position: id, token, probability."""
    frozen = nodes.frozen
    logits = frozen.lm.logits(frozen.final[None, position : position + 1].to(frozen.lm.weights_dtype))[0, 0]
    best = logits.float().softmax(-1).topk(_PREDICTIONS)
    texts = frozen.lm.token_strings(best.indices.tolist())
    return pd.DataFrame(
        {"id": best.indices.tolist(), "token": [visible(text) for text in texts], "probability": best.values.tolist()}
    )


@sentences(live.FORESEEN)
def traced(of_set: LayerSet, prompt: str, target: Target, *size: float) -> Circuit:
    """The circuit of a target; `size` as the last arguments of `trace`."""
    nodes = run(of_set, prompt)

    def compute() -> Circuit:
        names = {layer: checkpoint.name for layer, checkpoint in of_set.members.items()}
        return trace(nodes, target, names, *size)

    return live.in_turn(_of_target(of_set, prompt, target, *size), "Tracing", compute)


@sentences(live.FORESEEN)
def faithfulness(of_set: LayerSet, prompt: str, target: Target, errors: bool, elsewhere: bool) -> pd.DataFrame | None:
    """How much of the target its strongest features make (`faithful.curve`); None where a layer has no analysis.

    Args:
        errors: whether what SAEs leave out stays.
        elsewhere: whether the other features are what they are on other text that was analysed, or at their mean there.
    """
    try:
        analyses = {layer: live.read_analysis(checkpoint) for layer, checkpoint in of_set.members.items()}
        features = {layer: each.features for layer, each in analyses.items()}
        contexts = next(iter(analyses.values())).some_contexts(_CONTEXTS) if elsewhere else []
    except CheckpointError:
        return None
    nodes = run(of_set, prompt)

    def compute() -> pd.DataFrame:
        number = Number(nodes, target)
        others = resampled(nodes, contexts) if elsewhere else [at_mean(nodes, features)]
        densities = {layer: table["density"].to_numpy() for layer, table in features.items()}
        return curve(number, *ranked(number.attribution()), others, densities, errors, draws=2)

    return live.in_turn(_of_curve(of_set, prompt, target, errors, elsewhere), "Keeping features", compute)
