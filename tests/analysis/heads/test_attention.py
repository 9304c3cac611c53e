"""Heads planted in known layers are found, and every figure is what a whole forward of the model gives."""

from itertools import chain

import numpy as np
import pytest
import torch

from analysis import attribution as dfa
from analysis.attribution import TokenKinds, source_slots
from analysis.corpus import passes
from analysis.corpus.heads import copying
from analysis.corpus.passes import chunks
from analysis.heads import attention
from analysis.heads.attention import attend
from analysis.heads.figures import head_table
from tests.helpers import planted
from trainer.evaluate import repeated_tokens

PLANTED = {"previous": (0, 1), "duplicate": (1, 0), "induction": (2, 1)}  # layer and head


def seen_on_repeats(lm, n: int = 12, half: int = 20):
    tokens = repeated_tokens(lm, n, half, 0)
    return attend(lm, tokens, half + 1, tokens.shape[1], 2.0, False, "")[0]


def test_planted_heads_are_found():
    seen = seen_on_repeats(planted())
    of_slots = dfa.shares(seen.mass.sum(-1))
    for slot, place in PLANTED.items():
        scores = of_slots[:, :, dfa.SLOTS.index(slot)]
        best = divmod(int(scores.argmax()), 2)
        assert best == place, slot
        assert scores[place] > 0.9, slot
        assert scores.flatten().sort().values[-2] < 0.2, f"nobody else is a {slot} head"


def test_a_planted_head_has_its_role_in_the_table():
    lm = planted()
    seen = seen_on_repeats(lm)
    tokens = repeated_tokens(lm, 5, 20, 1)
    text, copied = attend(lm, tokens, 1, 30, 2.0, True, "")
    table = head_table(text, seen, copied, None, None).set_index(["layer", "head"])
    for slot, place in PLANTED.items():
        assert table.loc[place, "repeated_role_attention_besides_bos"] == slot
        assert not table.loc[place, "repeated_near_tie"]
        assert table.loc[place, f"repeated_attention_{slot}"] > 0.9
    assert table.index.tolist() == [(layer, head) for layer in range(3) for head in range(2)]


@pytest.mark.parametrize("model", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("together", [40, 4096], ids=["a context at a time", "all together"])
def test_sums_against_a_whole_forward(model, together, request, monkeypatch):
    """Every layer, each context by itself; also of grouped queries, and of norms after the attention."""
    monkeypatch.setattr(passes, "_LM_TOKENS", together)
    lm = request.getfixturevalue(model)
    contexts = torch.randint(1, 257, (5, 24), generator=torch.Generator().manual_seed(0)) // 8
    contexts[:, 0] = 0
    first = 3
    seen, _ = attend(lm, contexts, first, 24, 2.0, False, "")
    assert torch.allclose(seen.mass.sum(2), torch.full((lm.n_layers, lm.n_heads, 5), 21.0).double(), atol=1e-4)
    _, cache = lm.model.run_with_cache(contexts)
    kinds = TokenKinds(lm, contexts)
    back = torch.arange(24)[:, None] - torch.arange(24)
    by_key = torch.zeros(lm.n_layers, lm.n_heads, lm.d_vocab).double()
    for layer in range(lm.n_layers):
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"].double()
        for context, tokens in enumerate(contexts):
            rows, slots = pattern[context, :, first:], source_slots(tokens, kinds)[first:]
            for index in range(len(dfa.SLOTS)):
                expected = (rows * (slots == index)).sum((1, 2))
                assert torch.allclose(seen.mass[layer, :, index, context], expected, atol=1e-4)
            entropy = -(rows * rows.clamp_min(1e-300).log()).sum((1, 2))
            assert torch.allclose(seen.entropy[layer, :, context], entropy, atol=1e-3)
            assert torch.allclose(seen.maximum[layer, :, context], rows.amax(-1).sum(1), atol=1e-4)
            distance = (rows * back[first:])[..., 1:].sum((1, 2))
            assert torch.allclose(seen.distance[layer, :, context], distance, atol=1e-3)
            by_key[layer].index_add_(1, tokens[1:], rows[..., 1:].sum(1))
        mean = seen.patterns[layer].mean()
        assert torch.allclose(mean, pattern.mean(0), atol=1e-5)
    assert torch.allclose(seen.by_key, by_key[:, :, seen.vocabulary], atol=1e-4)
    assert seen.by_query.sum() == pytest.approx(float(seen.by_key.sum()))


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_copying_is_that_of_each_layer(model, request, monkeypatch):
    monkeypatch.setattr(attention, "_PAIRS", 512)
    monkeypatch.setattr(passes, "_LM_TOKENS", 50)
    lm = request.getfixturevalue(model)
    contexts = torch.randint(1, 257, (6, 20), generator=torch.Generator().manual_seed(0))
    contexts[:, 0] = 0
    _, copied = attend(lm, contexts, 1, 20, 2.0, True, "")
    assert len(copied) == lm.n_layers
    for layer, of_layer in enumerate(copied):
        alone = copying(lm.layer(layer), list(chain(*chunks(lm.layer(layer), contexts, torch.arange(6)))))
        for ours, expected in zip(of_layer, alone, strict=True):
            assert ours[:-1] == pytest.approx(expected[:-1], abs=1e-3)


def test_copying_and_its_error_against_a_loop(gpt2):
    """One head's OV circuit by hand, and its error by leaving out one context after the other."""
    contexts = torch.randint(1, 257, (20, 9), generator=torch.Generator().manual_seed(3))
    contexts[:, 0] = 0
    layer, head = 2, 1
    _, copied = attend(gpt2, contexts, 1, 9, 2.0, True, "")
    _, cache = gpt2.model.run_with_cache(contexts)
    pattern, v = cache[f"blocks.{layer}.attn.hook_pattern"], cache[f"blocks.{layer}.attn.hook_v"]
    sums = []
    for context, tokens in enumerate(contexts):
        value = weight = 0.0
        for query in range(1, 9):
            attended, source = pattern[context, head, query, 1:].max(0)
            logits = v[context, source + 1, head] @ gpt2.model.W_O[layer, head]
            logits = (logits - logits.mean()) @ gpt2.model.W_U
            rank = int((logits > logits[tokens[source + 1]]).sum())
            value, weight = value + float(attended) * (1 - 2 * rank / 256), weight + float(attended)
        sums.append((value, weight))
    value, weight = np.array(sums).T
    assert copied[layer][head].score == pytest.approx(value.sum() / weight.sum(), abs=1e-3)
    without = (value.sum() - value) / (weight.sum() - weight)
    jackknife = np.sqrt(19 / 20 * ((without - without.mean()) ** 2).sum())
    assert copied[layer][head].se == pytest.approx(jackknife, rel=0.1)
