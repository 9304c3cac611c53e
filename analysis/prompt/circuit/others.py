"""What features stand at that are not kept: their mean over a text, or what they are on another text (resampled)."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from analysis.prompt.circuit.nodes import Nodes
from trainer.config import require

Others = Mapping[int, Float[Tensor, "pos block feature"]]
"""activations by layer, at every position of the prompt, or at the one row for all of them"""


def at_mean(nodes: Nodes, features: Mapping[int, pd.DataFrame]) -> Others:
    """Density times mean activation over the text analysed.

    Args:
        features: the table of each layer's analysis.
    """
    found = {}
    for layer, sae in nodes.saes.items():
        mean = torch.tensor((features[layer]["density"] * features[layer]["mean_activation"]).to_numpy())
        found[layer] = mean.view(1, sae.n_blocks, -1).to(sae.W_dec)
    return found


@torch.no_grad()
def resampled(nodes: Nodes, contexts: Sequence[Int[np.ndarray, " pos"]]) -> list[Others]:
    """What they are at the same positions of each of some other contexts, in runs of the model as it is.

    Args:
        contexts: token ids, BOS first.

    Raises:
        ValueError: a context is shorter than the prompt.
    """
    lm, length = nodes.frozen.lm, len(nodes.frozen.tokens)
    shortest = min(map(len, contexts))
    require(shortest >= length, f"the prompt has {length} tokens, a context of other text {shortest}")
    tokens = torch.tensor(np.stack([context[:length] for context in contexts])).long()
    names = {layer: lm.layer(layer).hook_name for layer in nodes.saes}
    z = lm.capture(tokens, list(names.values()))
    of_layers = {layer: sae.encode(z[names[layer]].to(sae.W_dec.dtype)) for layer, sae in nodes.saes.items()}
    return [{layer: f[row] for layer, f in of_layers.items()} for row in range(len(contexts))]
