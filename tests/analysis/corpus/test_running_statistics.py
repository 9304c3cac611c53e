"""The running statistics against brute force over all activations at once."""

from collections import Counter

import numpy as np
import pytest
import torch

from analysis import attribution as dfa
from analysis.attribution import Reader
from analysis.corpus.passes import Strips, choose_examples, feed
from analysis.corpus.running_statistics import FeatureStatistics, Tally, load_state, state
from trainer.block_diag import BlockDiagSAE

LAYER, CONTEXTS, LENGTH = 1, 40, 24


@pytest.fixture(scope="module", params=["block", "dense", "topk"])
def seen(request, gpt2):
    """A first pass over random tokens, and the same activations computed at once."""
    torch.manual_seed(0)
    if request.param == "dense":
        sae = BlockDiagSAE(1, gpt2.n_heads * gpt2.d_head, 24)
    else:
        sae = BlockDiagSAE(gpt2.n_heads, gpt2.d_head, 6, *(("topk", 5, "layer") if request.param == "topk" else ()))
    sae.b_enc.data.normal_(-1)
    sae.requires_grad_(False)
    contexts = torch.randint(1, 40, (CONTEXTS, LENGTH))
    contexts[:, 0] = 0
    statistics = FeatureStatistics(Reader(sae, gpt2.layer(LAYER)), gpt2.d_vocab, n_top=7)
    list(feed(gpt2, contexts, torch.arange(CONTEXTS), {LAYER: [statistics]}))
    z = gpt2.layer(LAYER).z(contexts)
    f = sae.encode(z)
    f[:, 0] = 0
    return gpt2, sae, contexts, statistics, z, f.flatten(2)


def test_activations(seen):
    _, sae, _, statistics, z, f = seen
    n = CONTEXTS * (LENGTH - 1)
    assert int(statistics.n_tokens) == n
    assert torch.equal(statistics.firings, (f > 0).sum((0, 1)))
    assert torch.allclose(statistics.total, f.double().sum((0, 1)))
    assert torch.equal(statistics.maximum, f.amax((0, 1)))
    per_block = (f > 0).sum((0, 1)).view(sae.n_blocks, -1).sum(1).double()
    assert torch.equal(statistics.l0, per_block)
    kept = z[:, 1:].flatten(0, 1)
    assert torch.allclose(statistics.deviation(), (kept - kept.mean(0)).pow(2).sum((0, 2)).double(), rtol=1e-4)
    error = (sae(z)[:, 1:] - z[:, 1:]).pow(2).sum((0, 1, 3)).double()
    assert torch.allclose(statistics.error, error, rtol=1e-4)


def test_histograms(seen):
    _, _, _, statistics, _, f = seen
    fired = 0
    for feature in range(f.shape[-1]):
        values = f[..., feature][f[..., feature] > 0].numpy()
        if not len(values):
            assert statistics.histogram[feature].sum() == 0
            continue
        end = 2.0 ** int(statistics.exponent[feature])
        assert end / 2 <= values.max() < end
        expected, _ = np.histogram(values, bins=64, range=(0, end))
        assert statistics.histogram[feature].tolist() == expected.tolist()
        fired += 1
    assert fired > 10


def test_top_examples(seen):
    """One a context, strongest first."""
    _, _, _, statistics, _, f = seen
    best, position = f.max(1)  # [context, feature]
    for feature in range(f.shape[-1]):
        order = best[:, feature].argsort(descending=True, stable=True)[:7]
        order = order[best[order, feature] > 0]
        at = order * LENGTH + position[order, feature]
        assert statistics.top.at[feature, : len(at)].tolist() == at.tolist()
        assert torch.equal(statistics.top.value[feature, : len(at)], best[order, feature])
        assert (statistics.top.at[feature, len(at) :] == -1).all()


def test_the_sample_is_of_real_firings_and_uniform(seen):
    _, _, _, statistics, _, f = seen
    flat = f.flatten(0, 1)
    ranks = []
    for feature in range(f.shape[-1]):
        fired = flat[:, feature].nonzero()[:, 0]
        at = statistics.sample.at[feature]
        at = at[at >= 0]
        assert len(at) == min(64, len(fired)) == len(at.unique())
        assert torch.equal(statistics.sample.value[feature, : len(at)], flat[at, feature])
        if len(fired) > 128:
            values = flat[fired, feature].sort().values
            ranks.append(
                [
                    (torch.searchsorted(fired, at) / len(fired)),
                    torch.searchsorted(values, flat[at, feature]) / len(fired),
                ]
            )
    by_place, by_value = (torch.cat(each) for each in zip(*ranks, strict=True))
    for each in (by_place, by_value):
        assert each.mean().item() == pytest.approx(0.5, abs=4 / np.sqrt(12 * len(each)))


def test_tokens_that_features_fire_on_and_read(seen):
    lm, sae, contexts, statistics, _, f = seen
    _, v, pattern = lm.layer(LAYER).attention(contexts)
    W_enc = sae.W_enc.view(lm.n_heads, lm.d_head, -1)
    dense = sae.is_dense
    fires, reads = statistics.fires_on.top(sae.d_sae, 3), statistics.sources.reads.top(sae.d_sae, 3)
    mass = torch.zeros(sae.d_sae, len(dfa.SLOTS), dtype=torch.float64)
    kinds = dfa.TokenKinds(lm, contexts)
    slots = [dfa.source_slots(row, kinds) for row in contexts]
    for feature in range(sae.d_sae):
        heads = range(lm.n_heads) if dense else [feature // sae.features_per_block]
        index = feature if dense else feature % sae.features_per_block
        on, read = Counter(), Counter()
        for c, q in (f[..., feature] > 0).nonzero().tolist():
            on[int(contexts[c, q])] += 1
            by_head = {
                h: pattern[c, h, q] * ((v[c, :, h] - lm.layer(LAYER).b_V[h]) @ W_enc[h, :, index]) for h in heads
            }
            total = sum(by_head.values())
            if total.max() > 0:
                read[int(contexts[c, total.argmax()])] += 1
            for s in range(q + 1):
                mass[feature, slots[c][q, s]] += sum(max(0.0, float(row[s])) for row in by_head.values())
        for counter, (ids, counts), off in ((on, fires, 0), (read, reads, 1)):  # of two sources almost as large: either
            expected = sorted(counter.values(), reverse=True)[:3]
            assert counts[feature][: len(expected)].tolist() == pytest.approx(expected, abs=off)
            found = dict(zip(ids[feature].tolist(), counts[feature].tolist(), strict=True))
            assert all(abs(counter[i] - n) <= off for i, n in found.items() if n)
    assert torch.allclose(statistics.sources.mass, mass, rtol=1e-4, atol=1e-5)
    by_head = torch.zeros(lm.n_heads, len(dfa.SLOTS), dtype=torch.float64)
    if not dense:
        by_head.index_add_(0, torch.arange(sae.d_sae) // sae.features_per_block, mass)
        assert torch.allclose(statistics.sources.head_dfa, by_head, rtol=1e-4, atol=1e-5)
    assert statistics.sources.head_dfa.sum().item() == pytest.approx(mass.sum().item(), rel=1e-4)
    expected = sum(dfa.mass_per_slot(p, s).double() for p, s in zip(pattern, slots, strict=True))
    assert torch.allclose(statistics.sources.head_attention, expected, rtol=1e-4)


def test_the_strips_of_examples(seen):
    lm, sae, contexts, statistics, z, f = seen
    table = choose_examples(statistics, 4, LENGTH)
    assert set(table["kind"]) == {"top", "quantile"}
    assert table["feature"].is_monotonic_increasing
    strips = Strips(Reader(sae, lm.layer(LAYER)), table)
    list(feed(lm, contexts, strips.contexts, {LAYER: [strips]}))
    parts = state(strips)
    _, v, pattern = lm.layer(LAYER).attention(contexts)
    W_enc, b_V = sae.W_enc.view(lm.n_heads, lm.d_head, -1), lm.layer(LAYER).b_V
    pre = sae.pre_activations(z).flatten(2)
    for row in table.sample(60, random_state=0).itertuples():
        c, q, feature = row.context, row.position, row.feature
        assert f[c, q, feature] == row.activation
        mine = {
            name: parts[name][parts[f"{kind}_example"] == row.Index].float()
            for kind, names in (("active", ("position", "value")), ("source", ("position", "dfa", "attention")))
            for name in (f"{kind}_{n}" for n in names)
        }
        along = torch.zeros(LENGTH)
        along[mine["active_position"].long()] = mine["active_value"]
        assert torch.allclose(along, f[c, :, feature], rtol=1e-3)
        dense = sae.is_dense
        heads = list(range(lm.n_heads)) if dense else [feature // sae.features_per_block]
        index = feature if dense else feature % sae.features_per_block
        by_head = torch.stack([pattern[c, h, q] * ((v[c, :, h] - b_V[h]) @ W_enc[h, :, index]) for h in heads])
        found = torch.zeros(LENGTH)
        found[mine["source_position"].long()] = mine["source_dfa"]
        size = by_head.sum(0).abs().max()
        assert (found - by_head.sum(0)).abs().max() < 0.0101 * size
        assert float(strips.dfa_sum[row.Index]) == pytest.approx(float(by_head.sum()), abs=1e-4)
        constant = sum(b_V[h] @ W_enc[h, :, index] for h in heads) + sae.b_enc.flatten()[feature]
        assert float(strips.dfa_sum[row.Index] + constant) == pytest.approx(float(pre[c, q, feature]), abs=1e-4)
        head = heads[int(by_head.sum(1).argmax())]
        assert int(strips.head[row.Index]) == head
        looks = torch.zeros(LENGTH)
        looks[mine["source_position"].long()] = mine["source_attention"]
        assert (looks - pattern[c, head, q]).abs().max() < 0.0101


def test_quantile_examples_lie_in_their_quantiles(seen):
    _, _, _, statistics, _, f = seen
    table = choose_examples(statistics, 4, LENGTH)
    for feature, group in table[table["kind"] == "quantile"].groupby("feature"):
        values = f[..., feature][f[..., feature] > 0]
        assert group["activation"].is_monotonic_decreasing
        assert len(group) == min(4, len(values))
        if 4 < len(values) <= 64:  # all of them were drawn
            for row in group.itertuples():  # equal activations, of equal prefixes, share an interval
                below, up_to = ((each).float().mean() for each in (values < row.activation, values <= row.activation))
                assert below - 1e-6 <= row.quantile <= up_to + 1e-6


def test_an_interrupted_stream_goes_on_exactly(seen):
    lm, sae, contexts, statistics, _, _ = seen
    reader = Reader(sae, lm.layer(LAYER))
    first, second = (FeatureStatistics(reader, lm.d_vocab, n_top=7) for _ in range(2))
    list(feed(lm, contexts, torch.arange(21), {LAYER: [first]}))
    load_state(second, {name: value.clone() for name, value in state(first).items()})
    list(feed(lm, contexts, torch.arange(21, CONTEXTS), {LAYER: [second]}))
    for each in (second, statistics):
        each.fires_on.top(sae.d_sae, 1)  # counts what is pending
        each.sources.reads.top(sae.d_sae, 1)
    expected, found = state(statistics), state(second)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        close = torch.allclose(found[name].double(), value.double(), rtol=1e-4, atol=1e-5)
        assert close, name  # batches of other sizes round differently


def test_a_tally_that_overflows_says_by_how_much_it_is_too_low():
    torch.manual_seed(0)
    tally = Tally(d_vocab=1000, capacity=200)
    counts = Counter()
    for _ in range(30):
        token = (torch.randn(2000).abs() * 150).long().clamp_max(999)
        feature = torch.randint(3, (2000,))
        tally.add(feature, token)
        tally._merge()
        counts.update(zip(feature.tolist(), token.tolist(), strict=True))
    ids, found = tally.top(3, 5)
    floor = int(tally.floor)
    assert floor > 0 and len(tally.keys) <= 200
    for feature in range(3):
        for token, n in zip(ids[feature].tolist(), found[feature].tolist(), strict=True):
            assert n <= counts[feature, token] <= n + floor
