"""Circuits: a known one comes out exactly, edges keep their sums however much is pruned, and files round-trip."""

import numpy as np
import pandas as pd
import pytest
import torch

from analysis.prompt.circuit import group
from analysis.prompt.circuit.faithful import curve, kept, random_like
from analysis.prompt.circuit.graph import Circuit, trace
from analysis.prompt.circuit.looks import at_key
from analysis.prompt.circuit.nodes import Nodes
from analysis.prompt.circuit.others import resampled
from analysis.prompt.circuit.reads import upstream
from analysis.prompt.circuit.target import Number, Target
from tests.helpers import edit_json, planted
from trainer.block_diag import BlockDiagSAE
from trainer.model.frozen import Frozen


def one_hot_sae(n_heads: int, d_head: int) -> BlockDiagSAE:
    """A feature for each dimension of each head."""
    sae = BlockDiagSAE(n_heads, d_head, d_head)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(d_head).expand_as(sae.W_enc))
        sae.W_dec.copy_(torch.eye(d_head).expand_as(sae.W_dec))
    return sae


@pytest.fixture(scope="module")
def known():
    """`<s> 7 11 3 9 7` through a previous-token head 0.1 and an induction head 2.1 that predicts 11."""
    lm = planted()
    saes = {layer: one_hot_sae(lm.n_heads, lm.d_head) for layer in (0, 2)}
    return Nodes(Frozen(lm, torch.tensor([0, 7, 11, 3, 9, 7])), saes)


@pytest.fixture(scope="module")
def random(llama):
    torch.manual_seed(5)
    saes = {layer: BlockDiagSAE(llama.n_heads, llama.d_head, 16) for layer in range(3)}
    for sae in saes.values():
        with torch.no_grad():
            sae.b_dec.normal_(std=0.1)
            sae.b_enc.normal_(std=0.1)
    return Nodes(Frozen(llama, torch.tensor([0, 9, 4, 9, 77, 30, 4, 9])), saes)


def edges(circuit: Circuit, by: str) -> list:
    found = [edge for edge in circuit.edges if edge.by == by]
    return [(None if e.writer is None else circuit.nodes[e.writer], e.reader, e.value, e.source) for e in found]


def test_the_planted_circuit_comes_out(known):
    """The prediction <- the induction feature <- the token at the source, found by the previous-token feature there."""
    circuit = trace(known, Target(5, token=11), {0: "before", 2: "after"}, features=1)
    (found, reader, value, _), (rest, *_, left, _) = edges(circuit, "attribution")
    assert (found.kind, found.layer, found.head, found.position) == ("feature", 2, 1, 5) and found.feature % 61 == 11
    assert reader is None and rest is None
    assert value == pytest.approx(1, abs=1e-3) == found.attribution == found.effect == found.direct
    assert value + left == pytest.approx(circuit.value, abs=1e-3)
    (read, reader, value, _), (rest, *_, left, _), (before, earlier, of_before, _), _ = edges(circuit, "OV")
    assert circuit.nodes[reader] == found
    assert (read.kind, read.position) == ("embedding", 2) and value == pytest.approx(1, abs=1e-3)
    assert rest is None and left == pytest.approx(0, abs=1e-3)
    key = circuit.nodes[earlier]
    assert (key.kind, key.layer, key.head, key.position) == ("feature", 0, 1, 2) and key.feature % 61 == 7
    assert (before.kind, before.position) == ("embedding", 1) and of_before == pytest.approx(1, abs=1e-3)
    keys = [edge for edge in edges(circuit, "K") if edge[2] > 0 and circuit.nodes[edge[1]] == found]
    ((node, _, value, source),) = [edge for edge in keys if edge[0] is not None]
    assert node == key and source == 2
    # gain of query and key, and a fifth taken away: the mean over five sources of which one has it
    assert value == pytest.approx(40 * 40 / 61**0.5 * 4 / 5, rel=1e-3)
    asked = [edge for edge in edges(circuit, "Q") if edge[0] is not None and circuit.nodes[edge[1]] == found]
    assert [(node.kind, node.position) for node, *_ in asked] == [("embedding", 5)]
    assert asked[0][2] == pytest.approx(value, rel=1e-3)


def test_pruning_never_changes_a_sum(random):
    target = Target(7, token=30, against=5)
    fine, coarse = (trace(random, target, {}, features=4, share=share) for share in (0.01, 0.3))
    assert len(fine.edges) > len(coarse.edges)
    for circuit in (fine, coarse):
        readers = {edge.reader for edge in circuit.edges if edge.reader is not None}
        assert readers
        for reader in readers:
            node = circuit.nodes[reader]
            dfa = float(upstream(random, node.layer, node.feature, node.position).value.sum())
            of_reader = [edge for edge in circuit.edges if edge.reader == reader]
            assert sum(edge.value for edge in of_reader if edge.by == "OV") == pytest.approx(dfa, abs=1e-4)
            sums = [sum(edge.value for edge in of_reader if edge.by == by) for by in ("K", "Q")]
            assert sums[0] == pytest.approx(sums[1], abs=1e-3)  # both are the score above its mean
        total = Number(random, target).attribution()["attribution"].sum()
        assert sum(edge.value for edge in circuit.edges if edge.reader is None) == pytest.approx(total, abs=1e-4)


def test_groups_keep_sums_and_count_a_score_once(random):
    circuit = trace(random, Target(7, token=30, against=5), {}, features=12, share=0.2, here=False)
    of_heads = group.heads(circuit)
    assert max(len(each.members) for each in of_heads) > 1
    merged = group.grouped(circuit, of_heads)
    assert len(merged.nodes) < len(circuit.nodes)
    for by in ("attribution", "OV"):
        sums = [sum(edge.value for edge in each.edges if edge.by == by) for each in (circuit, merged)]
        assert sums[0] == pytest.approx(sums[1], abs=1e-4)
    for of_head in of_heads:
        index = next(i for i, node in enumerate(merged.nodes) if node.members == of_head.members)
        node, members = merged.nodes[index], [circuit.nodes[i] for i in of_head.members]
        assert (node.kind, node.name) == ("group", f"{members[0].layer}.{members[0].head}")
        assert node.attribution == pytest.approx(sum(each.attribution or 0 for each in members), abs=1e-5)
        sources = {edge.source for edge in merged.edges if edge.reader == index and edge.by == "K"}
        for source in sources:  # however many of its features look there, the score is one
            found = [edge.value for edge in merged.edges if (edge.reader, edge.by, edge.source) == (index, "K", source)]
            score = at_key(random, members[0].layer, members[0].head, members[0].position, source).value.sum().item()
            assert sum(found) == pytest.approx(score, abs=1e-3)
    assert group.grouped(circuit, []) == circuit


def test_what_is_within_a_group_leads_from_it_to_itself(known):
    circuit = trace(known, Target(5, token=11), {}, features=1)
    both = group.Group("induction", [i for i, node in enumerate(circuit.nodes) if node.kind == "feature"])
    merged = group.grouped(circuit, [both, group.Group("late", both.members)])
    (index,) = [i for i, node in enumerate(merged.nodes) if node.kind == "group"]
    assert merged.nodes[index].name == "induction" and merged.nodes[index].layer == 2
    assert [edge.by for edge in merged.edges if edge.writer == index == edge.reader] == ["K"]


def test_a_file_says_what_was_traced(random, tmp_path):
    circuit = trace(random, Target(7, token=30), {0: "a", 2: "c"}, features=3)
    (tmp_path / "circuit.json").write_text(circuit.json())
    assert Circuit.load(tmp_path / "circuit.json") == circuit


@pytest.mark.parametrize("spoil", [{"schema_version": 9}, {"nodes": []}, {"edges": "none"}, {"value": None}])
def test_what_is_no_circuit_is_a_sentence(random, tmp_path, spoil):
    file = tmp_path / "circuit.json"
    file.write_text(trace(random, Target(7, token=30), {}, features=3).json())
    edit_json(file, **spoil)
    with pytest.raises(ValueError, match=r"circuit\.json"):
        Circuit.load(file)
    file.write_text("[1")
    with pytest.raises(ValueError, match=r"circuit\.json"):
        Circuit.load(file)


def every_feature(nodes) -> pd.DataFrame:
    length = len(nodes.frozen.tokens)
    at = np.arange(1, length)
    ids = {layer: np.arange(sae.d_sae) for layer, sae in nodes.saes.items()}
    parts = [pd.MultiIndex.from_product([[layer], at, of]).to_frame(index=False) for layer, of in ids.items()]
    return pd.concat(parts, ignore_index=True).set_axis(["layer", "position", "feature"], axis=1)


def test_all_that_is_kept_is_the_model_and_nothing_kept_is_the_mean(random):
    number = Number(random, Target(7, token=30, against=5))
    means = {layer: torch.rand(1, sae.n_blocks, sae.features_per_block) for layer, sae in random.saes.items()}
    everything = every_feature(random)
    all_kept, as_it_is, none = kept(number, [everything, None, everything.head(0)], means)
    assert float(all_kept) == pytest.approx(number.value(), abs=1e-4) == float(as_it_is)
    # By hand: the features that fire on the last token of layer 0 stand at their mean, in the model as it is.
    assert float(none) != pytest.approx(number.value(), abs=1e-3)
    lm, frozen = random.frozen.lm, random.frozen
    last = everything[(everything["layer"] == 0) & (everything["position"] == 7)].index
    sae, z = random.saes[0], frozen.layers[0].z.clone()
    change = sae.decode(means[0][0]) - sae.decode(sae.encode(z[7]))
    z[7] += change.detach().view_as(z[7])
    edit = ("blocks.0.attn.hook_z", lambda value, rows: z[None][rows])
    got = lm.capture(frozen.tokens[None], [number.hook], edits=[edit])[number.hook]
    (without,) = kept(number, [everything.drop(last)], means)
    assert float(without) == pytest.approx(float(number.of(got)), abs=1e-4)
    (spliced,) = kept(number, [None], means, errors=False)
    assert float(spliced) != pytest.approx(number.value(), abs=1e-3)


def test_features_resampled_on_the_prompt_itself_change_nothing(random):
    number = Number(random, Target(7, token=30, against=5))
    tokens, nothing = random.frozen.tokens.tolist(), every_feature(random).head(0)
    itself, other = resampled(random, [np.array([*tokens, 3]), np.array([tokens[0], *reversed(tokens[1:]), 3])])
    assert float(kept(number, [nothing], itself)) == pytest.approx(number.value(), abs=1e-4)
    assert float(kept(number, [nothing], other)) != pytest.approx(number.value(), abs=1e-3)
    densities = {layer: np.zeros(sae.d_sae) for layer, sae in random.saes.items()}
    found = curve(number, every_feature(random), [0], [itself, other], densities, draws=1)
    both = [float(kept(number, [nothing], each)) for each in (itself, other)]
    assert found["value"].tolist() == pytest.approx([sum(both) / 2], abs=1e-4)
    with pytest.raises(ValueError, match="the prompt has 8 tokens, a context of other text 5"):
        resampled(random, [np.array(tokens[:5])])


def test_the_curve_ends_at_one_and_random_features_are_like_the_kept_ones(random):
    number = Number(random, Target(7, token=30, against=5))
    means = {layer: torch.zeros(1, sae.n_blocks, sae.features_per_block) for layer, sae in random.saes.items()}
    densities = {layer: np.linspace(0, 1, sae.d_sae) for layer, sae in random.saes.items()}
    everything = every_feature(random)
    found = curve(number, everything, [0, 40, len(everything)], [means], densities, draws=2)
    assert found["faithfulness"].tolist()[0] == pytest.approx(0, abs=1e-6)
    assert found["faithfulness"].tolist()[-1] == pytest.approx(1, abs=1e-3)
    some = everything[(everything["layer"] == 1) & (everything["position"] == 3)].iloc[10:20]
    drawn = random_like(some, densities, np.random.default_rng(0), near=5)
    assert (drawn[["layer", "position"]] == some[["layer", "position"]]).all(axis=None)
    assert not set(drawn["feature"]) & set(some["feature"]) and drawn["feature"].is_unique
    near = np.abs(densities[1][drawn["feature"]] - densities[1][some["feature"]])
    assert near.max() <= densities[1][15]
