"""The sums that circuits are made of are the model's own numbers, on a random tiny model of each kind, in float64."""

import numpy as np
import pandas as pd
import pytest
import torch

from analysis.prompt.circuit.looks import at_key, at_query, pairs, scores
from analysis.prompt.circuit.nodes import Nodes
from analysis.prompt.circuit.reads import upstream
from analysis.prompt.circuit.target import Number, Target
from tests.helpers import save_tiny_gemma2, save_tiny_gpt2, save_tiny_llama, save_tiny_neox
from trainer.block_diag import BlockDiagSAE
from trainer.model.frozen import Frozen
from trainer.model.lm import LanguageModel

KINDS = {"gpt2": save_tiny_gpt2, "llama": save_tiny_llama, "neox": save_tiny_neox, "gemma2": save_tiny_gemma2}
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(scope="module", params=KINDS)
def nodes(request, tmp_path_factory):
    """A prompt of twelve tokens; block-diagonal SAEs on every layer but 1, a dense one on the last."""
    folder = tmp_path_factory.mktemp(request.param)
    KINDS[request.param](folder)
    lm = LanguageModel.load(str(folder), dtype="float64")
    torch.manual_seed(3)
    saes = {}
    for layer in range(lm.n_layers):
        dense = layer == lm.n_layers - 1
        blocks, width = (1, lm.n_heads * lm.d_head) if dense else (lm.n_heads, lm.d_head)
        sae = BlockDiagSAE(blocks, width, 2 * width).double()
        with torch.no_grad():
            sae.b_dec.normal_(std=0.2)
            sae.b_enc.normal_(std=0.2)
        if layer != 1:
            saes[layer] = sae
    tokens = torch.tensor([0, *torch.randint(1, 256, (11,)).tolist()])
    return Nodes(Frozen(lm, tokens), saes)


def test_the_residual_stream_is_the_sum_of_what_was_written(nodes):
    frozen, lm = nodes.frozen, nodes.frozen.lm
    for layer in range(lm.n_layers):
        name = f"blocks.{layer}.hook_resid_pre"
        assert torch.allclose(frozen.entering(layer), lm.capture(frozen.tokens[None], [name])[name][0], **CLOSE)
    assert torch.allclose(frozen.entering(lm.n_layers), frozen.final, **CLOSE)


def test_nodes_are_what_they_wrote(nodes):
    """Every node's vector, and of each layer their sum."""
    frozen, layer, at = nodes.frozen, nodes.n_layers - 1, 5
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(1, frozen.final.shape[1], dtype=torch.float64, generator=generator)
    reading = frozen.read(0, "V", 0, torch.zeros(1, frozen.lm.d_head, dtype=torch.float64), torch.tensor([at]))
    parts = nodes.split(reading._replace(direction=direction), torch.tensor([at]), layer).table()
    assert set(parts["kind"]) == {"feature", "error", "bias", "output bias", "mlp", "embedding"}
    assert parts["value"].sum() == pytest.approx(float(frozen.entering(layer)[at] @ direction[0]), rel=1e-9)
    for row in parts.itertuples():
        vector = nodes.vector(row.kind, row.layer, row.head, row.feature, at)
        assert float(vector @ direction[0]) == pytest.approx(row.value, rel=1e-9, abs=1e-12)


def test_a_feature_reads_the_sum_of_what_was_written(nodes):
    """Each source's parts sum to its DFA, which sum to the pre-activation less its constant."""
    frozen, lm = nodes.frozen, nodes.frozen.lm
    for layer in sorted(nodes.saes):
        sae = nodes.saes[layer]
        attention = lm.layer(layer).attention(frozen.tokens[None])
        of_layer = (nodes.firing.layer == layer).nonzero()[:, 0].tolist()
        for firing in of_layer[::17]:
            _, q, block, index, *_ = (int(column[firing]) for column in nodes.firing)
            parts = upstream(nodes, layer, block * sae.features_per_block + index, q)
            w = sae.W_enc.detach()[block, :, index].view(-1, lm.d_head)
            heads = slice(None) if sae.is_dense else slice(block, block + 1)
            reads = ((attention.v[0] - lm.layer(layer).b_V)[:, heads] * w).sum(-1)  # [source, head]
            dfa = (attention.pattern[0, heads, q].T * reads).sum(1)[: q + 1]
            # A norm that keeps its bias has it in b_V, so nothing is left over in models that are loaded here.
            assert torch.allclose(parts.sums(q + 1), dfa, **CLOSE)
            constant = (lm.layer(layer).b_V[heads] * w).sum() + sae.b_enc.detach()[block, index]
            assert float(dfa.sum() + constant) == pytest.approx(float(nodes.firing.activation[firing]), rel=1e-9)


def test_scores_split_over_key_query_and_pairs(nodes):
    frozen, lm = nodes.frozen, nodes.frozen.lm
    for layer, head, query, source in ((0, 0, 11, 3), (1, 1, 7, 7), (2, 3, 11, 1), (2, 0, 1, 1)):
        whole = scores(nodes, layer, head, query)
        name = f"blocks.{layer}.attn.hook_attn_scores"
        model = lm.capture(frozen.tokens[None], [name])[name][0, head, query, : query + 1]
        cap = lm.model.cfg.attn_scores_soft_cap
        assert torch.allclose(cap * (whole / cap).tanh() if cap > 0 else whole, model, **CLOSE)
        above = float(whole[source] - whole[1 : query + 1].mean())
        keys, queries = (side(nodes, layer, head, query, source).table() for side in (at_key, at_query))
        assert keys["value"].sum() == pytest.approx(above, abs=1e-9)
        assert queries["value"].sum() == pytest.approx(above, abs=1e-9)
        some = (table.loc[table["value"].abs().nlargest(6).index] for table in (queries, keys))
        here = [table[~table["activation"].isna() | (table["feature"] < 0)] for table in some]
        both = pairs(nodes, layer, head, query, source, *here)
        assert both.to_numpy().sum() == pytest.approx(float(whole[source]), abs=1e-9)
        assert both.index[-1] == both.columns[-1] == "all others" and len(both) > 1 and len(both.columns) > 1


def test_the_mean_of_a_row_is_taken_from_each_node(nodes):
    """Over the sources of a row but BOS, what a node adds above its mean sums to nothing."""
    layer, head, query = 2, 1, 9
    tables = [at_key(nodes, layer, head, query, source).table() for source in range(1, query + 1)]
    total = pd.concat(tables).groupby(["kind", "layer", "head", "feature"])["value"].sum()
    assert np.allclose(total, 0, atol=1e-9)


def targets(nodes):
    last = len(nodes.frozen.tokens) - 1
    layer = nodes.n_layers - 1
    feature = int(nodes.here(layer, last).feature[0])
    return [
        Target(last, token=7),
        Target(last, token=7, against=9),
        Target(last - 2, token=7, log_probability=True),
        Target(last, layer=layer, feature=feature),
    ]


def test_attribution_is_the_gradient(nodes):
    """Nodes of a head sum to z . g, and g is what finite differences say."""
    frozen, lm = nodes.frozen, nodes.frozen.lm
    for target in targets(nodes):
        number = Number(nodes, target)
        gradient = number.gradient()
        assert len(gradient) == number.n_layers
        table = number.attribution()
        of_head = table[table["layer"] == 0].groupby(["position", "head"])["attribution"].sum()
        expected = (frozen.layers[0].z * gradient[0]).sum(-1)
        assert np.allclose(of_head.unstack().to_numpy(), expected, atol=1e-9)
        generator = torch.Generator().manual_seed(2)
        for layer in range(number.n_layers):
            step = 1e-5 * torch.randn(frozen.layers[layer].z.shape, dtype=torch.float64, generator=generator)
            values = []
            for sign in (1, -1):
                z = frozen.layers[layer].z + sign * step
                edit = (f"blocks.{layer}.attn.hook_z", lambda value, rows, z=z: z[None][rows])
                got = lm.capture(frozen.tokens[None], [number.hook], edits=[edit])[number.hook]
                values.append(float(number.of(got)))
            expected = float((gradient[layer] * step).sum())
            assert values[0] - values[1] == pytest.approx(2 * expected, rel=1e-5, abs=1e-11)


def test_what_a_removal_does_is_what_a_whole_run_without_the_node_does(nodes):
    """At every position, also behind the target's, where it does nothing."""
    lm, frozen = nodes.frozen.lm, nodes.frozen
    for target in targets(nodes):
        number = Number(nodes, target)
        table = number.attribution()
        some = table[(table["position"] > 0) & (table["activation"] > 0)].iloc[::9]
        assert {target.position} < set(some["position"])
        for row in number.removed(some).itertuples():
            z = frozen.layers[row.layer].z.clone()
            z[row.position] -= nodes.written("feature", row.layer, row.head, row.feature, row.position)
            edit = (f"blocks.{row.layer}.attn.hook_z", lambda value, rows, z=z: z[None][rows])
            got = lm.capture(frozen.tokens[None], [number.hook], edits=[edit])[number.hook]
            assert row.effect == pytest.approx(number.value() - float(number.of(got)), abs=1e-9)
            if row.position > target.position:
                assert row.effect == pytest.approx(0, abs=1e-9)


def test_a_node_of_the_last_layer_acts_directly_and_integrated_gradients_sum_to_the_effect(nodes):
    lm, last = nodes.frozen.lm, len(nodes.frozen.tokens) - 1
    number = Number(nodes, Target(last, token=7, against=9))
    table = number.attribution()
    of_last = table[(table["layer"] == nodes.n_layers - 1) & (table["position"] == last) & (table["kind"] == "feature")]
    attn_only = number.removed(of_last.nlargest(3, "attribution"))
    parallel = lm.model.cfg.parallel_attn_mlp
    if parallel:  # else the MLP of the layer comes after
        assert np.allclose(attn_only["effect"], attn_only["direct"], atol=1e-9)
    assert (attn_only["effect"] != 0).all()
    if nodes.frozen.layers[0].write_scale.ne(1).any():
        return  # after a norm a layer's output is the same however small z is, down to nothing: no steps see that
    layer = nodes.n_layers - 1
    gone = number.gradient(steps=64)
    zeroed = nodes.frozen.layers[layer].z.clone()
    zeroed[1:] = 0
    edit = (f"blocks.{layer}.attn.hook_z", lambda value, rows: zeroed[None][rows])
    got = lm.capture(nodes.frozen.tokens[None], [number.hook], edits=[edit])[number.hook]
    sums = float((gone[layer][1:] * nodes.frozen.layers[layer].z[1:]).sum())
    assert sums == pytest.approx(number.value() - float(number.of(got)), rel=2e-2, abs=1e-3)


def test_what_cannot_be_a_target_is_a_sentence(nodes):
    for target, why in (
        (Target(0, token=1), "position 0"),
        (Target(3, token=999), "no token 999"),
        (Target(3, layer=1, feature=0), "layer 1 has no SAE"),
        (Target(3, layer=0, feature=10_000), "no feature 10000"),
    ):
        with pytest.raises(ValueError, match=why):
            Number(nodes, target)
    with pytest.raises(ValueError, match="token or a feature"):
        Target(3)
