"""What a feature reads upstream: each source of its exact DFA, split over who wrote it (recursive DFA).

DFA[q, s] = A[q, s] (v[s] - b_V) . w, and with the norm's scale at s as it is, v[s] is linear in the residual stream,
which is a sum of nodes. After the recursive DFA of Kissane et al. 2024 (arXiv:2406.17759).
"""

import torch

from analysis.prompt.circuit.nodes import Nodes
from analysis.prompt.circuit.parts import Parts
from trainer.config import require


@torch.no_grad()
def upstream(nodes: Nodes, layer: int, feature: int, query: int) -> Parts:
    """Every node that a feature reads at each source of a position; `row` and `position` are the source.

    The values of a source sum to its DFA but for what the bias of a norm before the layer gives (none where loading
    folded it). Of a dense SAE the DFA is summed over heads.

    Raises:
        ValueError: there is no such feature or position.
    """
    frozen, sae = nodes.frozen, nodes.saes.get(layer)
    require(sae is not None, f"layer {layer} has no SAE here")
    assert sae is not None
    require(0 <= feature < sae.d_sae, f"there is no feature {feature} of layer {layer}")
    require(0 <= query < len(frozen.tokens), f"there is no position {query}")
    block, index = divmod(feature, sae.features_per_block)
    n_heads, d_head = frozen.lm.n_heads, frozen.lm.d_head
    reads = sae.W_enc.detach()[block, :, index].view(-1, d_head)  # by every head that the block has
    heads = range(n_heads) if sae.is_dense else [block]
    at = torch.arange(query + 1, device=frozen.final.device)
    direction = frozen.final.new_zeros(len(at), frozen.final.shape[1])
    constant = frozen.final.new_zeros(len(at))
    for head, w in zip(heads, reads, strict=True):
        attention = frozen.layers[layer].pattern[head, query, : query + 1]
        reading = frozen.read(layer, "V", head, w.expand(len(at), -1), at)
        direction += attention[:, None] * reading.direction
        constant += attention * reading.constant
    return nodes.split(reading._replace(direction=direction, constant=constant), at, layer)
