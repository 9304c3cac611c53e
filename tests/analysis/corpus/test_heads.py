"""Heads with a known job come out with that job, and a planted deviant feature is named."""

import math
import re

import numpy as np
import pytest
import torch

from analysis import attribution as dfa
from analysis.attribution import Reader
from analysis.corpus.heads import Roles, copying, head_table, monosemanticity
from analysis.corpus.passes import chunks, feed, sources_on_repeats
from analysis.corpus.running_statistics import FeatureStatistics, Sources
from analysis.logits import head_of_features, inverse_scale, logit_effects, written
from analysis.proportion import wilson
from tests.analysis.test_attribution import previous_token_and_induction_model
from trainer.block_diag import BlockDiagSAE
from trainer.evaluate import repeated_tokens
from trainer.model.lm import LanguageModel

VOCABULARY, LENGTH = 12, 32


@pytest.fixture(scope="module")
def lm():
    lm = previous_token_and_induction_model(VOCABULARY, LENGTH)
    model = lm.model
    second = model.blocks[1].attn
    model.W_U.data[:VOCABULARY] = torch.eye(VOCABULARY)  # logits are the token part of the residual stream
    for token in range(VOCABULARY):
        second.W_O.data[0, token, token] = 1.0  # head 0 copies, head 1 suppresses
        second.W_O.data[1, token, token] = -1.0
    return lm


def repeats(n: int = 12) -> torch.Tensor:
    """BOS, then ten tokens three times: 30 of 31 positions."""
    torch.manual_seed(0)
    rows = [torch.randperm(VOCABULARY - 1)[:10] + 1 for _ in range(n)]
    return torch.stack([torch.cat([torch.zeros(1, dtype=torch.int64), *[row] * 3]) for row in rows])


def token_features(lm) -> BlockDiagSAE:
    """Feature i of a head fires where the head reads token i: v is a one-hot of the token."""
    sae = BlockDiagSAE(2, lm.d_head, VOCABULARY)
    for parameter in sae.parameters():
        parameter.data.zero_()
    for token in range(VOCABULARY):
        sae.W_enc.data[:, token, token] = 1
        sae.W_dec.data[:, token, token] = 1
    sae.b_enc.data[0] = -0.5  # head 0 attends to one token, head 1 to all
    return sae.requires_grad_(False)


@pytest.fixture(scope="module")
def seen(lm):
    sae, contexts = token_features(lm), repeats()
    statistics = FeatureStatistics(Reader(sae, lm.layer(1)), VOCABULARY, n_top=5)
    list(feed(lm, contexts, torch.arange(len(contexts)), {1: [statistics]}))
    return sae, contexts, statistics


def test_the_induction_head_and_its_planted_deviant(lm, seen):
    """Token 0 is BOS, on which the induction head rests: its feature reads from BOS, the others by induction."""
    sae, contexts, statistics = seen
    head = head_of_features(sae, 2)[0].numpy()
    copied = copying(lm.layer(1), next(chunks(lm.layer(1), contexts, torch.arange(12))))
    table = head_table(statistics, Sources(24, 2, None), copied, None, head).set_index("head")
    assert table.loc[0, "mono_role"] == "induction"
    assert table.loc[0, "mono_deviants"].tolist() == [0], "the feature that fires where the head rests"
    assert table.loc[0, "mono_n"] == VOCABULARY
    assert table.loc[0, "mono_share"] == pytest.approx(11 / 12)
    weight = statistics.firings[:VOCABULARY].double()
    assert table.loc[0, "mono_weighted"] == pytest.approx(float(weight[1:].sum() / weight.sum()))
    assert table.loc[0, "role_dfa"] == table.loc[0, "role_attention"] == "induction"
    assert table.loc[0, "agree"]
    assert table.loc[1, "role_attention"] != "induction", "head 1 attends uniformly"
    assert table["L0"].tolist() == pytest.approx((statistics.l0 / statistics.n_tokens).tolist())
    assert table["explained_share"].sum() == pytest.approx(1)
    roles = Roles.of(statistics.sources.mass).slot[:VOCABULARY]
    assert [dfa.SLOTS[role] for role in roles] == ["bos"] + ["induction"] * 11
    ids, _ = statistics.sources.reads.top(24, 1)
    assert ids[:VOCABULARY, 0].tolist() == list(range(VOCABULARY)), "each reads its token"


def test_copying_and_copy_suppression(lm, seen):
    _, contexts, _ = seen
    copies, suppresses = copying(lm.layer(1), next(chunks(lm.layer(1), contexts, torch.arange(12))))
    assert (copies.score, copies.top10) == (pytest.approx(1), pytest.approx(1))
    assert (suppresses.score, suppresses.bottom10) == (pytest.approx(-1), pytest.approx(1))
    assert (copies.examples["rank"] == 0).all()
    assert (suppresses.examples["rank"] == VOCABULARY - 1).all()
    for row in copies.examples.itertuples():
        attention = lm.layer(1).attention(contexts[row.context][None]).pattern[0, 0, row.query]
        assert row.source > 0
        assert row.attention == pytest.approx(float(attention[1:].max())) == pytest.approx(float(attention[row.source]))


def test_repeats_judge_the_second_half_only(lm):
    sae = token_features(lm)
    readers = {1: [Reader(sae, lm.layer(1))]}
    (sources,), _ = sources_on_repeats(lm, readers, 16, 11, seed=0)[1]  # five random tokens, twice
    attention = dfa.shares(sources.head_attention)[0]
    assert attention[dfa.SLOTS.index("induction")] > 0.95
    assert int(sources.head_tokens) == 16 * 5
    f = sae.encode(lm.layer(1).z(repeated_tokens(lm, 16, 5, 0)))
    assert sources.firings.tolist() == (f[:, 6:] > 0).sum((0, 1)).flatten().tolist(), "of the second half"
    assert dfa.SLOTS[int(sources.head_dfa[0].argmax())] == "induction"


def test_wilson_against_published_values():
    """Newcombe 1998, table I: 81 of 263, and 15 of 148; Brown et al.'s behaviour at 0 and 1."""
    assert wilson(81 / 263, 263) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))
    assert wilson(15 / 148, 148) == (pytest.approx(0.0624, abs=1e-4), pytest.approx(0.1605, abs=1e-4))
    assert wilson(0, 20)[0] == pytest.approx(0, abs=1e-12) and 0.1 < wilson(0, 20)[1] < 0.2
    assert np.isnan(wilson(np.nan, 0)).all()


def planted(shares: dict[str, float], of_features: list[str], chance: dict[str, float] | None = None) -> Sources:
    """One head that reads slots with these shares, and features that each read one slot, 20 firings each."""
    sources = Sources(len(of_features), 1, None)
    sources.firings += 20
    for slot, share in shares.items():
        sources.head_dfa[0, dfa.SLOTS.index(slot)] = share
    for slot, share in (chance or {"previous": 1.0}).items():
        sources.chance[dfa.SLOTS.index(slot)] = share
    for feature, slot in enumerate(of_features):
        sources.mass[feature, dfa.SLOTS.index(slot)] = 1
    return sources


@pytest.mark.parametrize(
    ("shares", "of_features", "unclassified", "near_tie", "says"),
    [
        ({"digit": 0.6, "self": 0.4}, ["digit"] * 3, False, False, "Monosemantic: all 3 .* `digit` \\(60% .* 25% by"),
        (
            {"digit": 0.4, "self": 0.35},
            ["digit", "self"],
            False,
            True,
            "Polysemantic: 1 of 2 .*near-tie.* is 1",
        ),
        ({"other": 0.6, "self": 0.4}, ["other"] * 3, True, False, "Unclassified: .* `other` .* none need agree"),
        ({"local": 0.6, "other": 0.4}, ["local"] * 3, True, False, "Unclassified: .* `local` .* none need agree"),
        ({"content": 0.5, "self": 0.2, "bos": 0.3}, ["content"] * 3, True, False, "Unclassified: .* by chance"),
        ({"digit": 1.0}, [], False, False, "Not judged: no feature of it has 10"),
        ({}, ["digit"], False, False, "Not judged: no feature of it fires"),
    ],
)
def test_verdicts(shares, of_features, unclassified, near_tie, says):
    sources = planted(shares, of_features, {"content": 0.6, "digit": 0.25, "self": 0.15})
    row = monosemanticity("", sources, np.full(len(of_features), 20.0), np.zeros(len(of_features), int)).iloc[0]
    assert (row["mono_unclassified"], row["mono_near_tie"]) == (unclassified, near_tie)
    assert re.search(says, row["mono_verdict"]), row["mono_verdict"]
    assert np.isnan(row["mono_share"]) == (unclassified or "Not judged" in says)
    assert not (unclassified and len(row["mono_deviants"]))


def test_columns_of_the_pattern_against_brute_force(lm, seen):
    """Entropy, maximum, distance, the tokens that look and are looked at, and what even attention would read."""
    sae, contexts, statistics = seen
    copied = copying(lm.layer(1), next(chunks(lm.layer(1), contexts, torch.arange(12))))
    table = head_table(statistics, Sources(24, 2, None), copied, None, head_of_features(sae, 2)[0].numpy())
    pattern = lm.layer(1).attention(contexts).pattern.double()
    kinds, even = dfa.TokenKinds(lm, contexts), np.zeros(len(dfa.SLOTS))
    for head in range(2):
        entropy, largest, far, mass = [], [], 0.0, 0.0
        by_query, by_key = np.zeros(VOCABULARY), np.zeros(VOCABULARY)
        for c, tokens in enumerate(contexts.tolist()):
            slots = dfa.source_slots(contexts[c], kinds)
            for q in range(1, len(tokens)):
                row = pattern[c, head, q, : q + 1].numpy()
                entropy.append(-sum(a * math.log(a) for a in row if a > 0))
                largest.append(row.max())
                for s in range(q + 1):
                    even[slots[q, s]] += 0.5 / (q + 1)  # once for each head
                for s in range(1, q + 1):
                    far, mass = far + row[s] * (q - s), mass + row[s]
                    by_query[tokens[q]] += row[s]
                    by_key[tokens[s]] += row[s]
        row = table.iloc[head]
        found = row["entropy"], row["maximum"], row["distance"]
        assert found == pytest.approx((np.mean(entropy), np.mean(largest), far / mass), rel=1e-4)
        for name, expected in (("query", by_query), ("key", by_key)):
            shares = dict(zip(row[f"{name}_ids"].tolist(), row[f"{name}_shares"].tolist(), strict=True))
            assert len(shares) == 10
            assert all(shares[i] == pytest.approx(expected[i] / mass, abs=1e-5) for i in shares)
            assert min(shares.values()) >= np.sort(expected / mass)[-10] - 1e-5
    assert dfa.shares(statistics.sources.chance).numpy() == pytest.approx(even / even.sum(), abs=1e-6)


def test_rare_features_are_not_judged():
    sources = Sources(4, 1, None)
    sources.mass[:, 3] = torch.tensor([5.0, 5.0, 0.0, 5.0])
    sources.mass[3, 2] = 9.0
    sources.firings += torch.tensor([100, 9, 50, 20])
    sources.head_dfa[0, 3] = 1.0
    table = monosemanticity("", sources, np.array([100.0, 9, 50, 20]), np.zeros(4, int))
    assert table.loc[0, "mono_n"] == 2  # 1 fired too rarely, 2 has no positive source
    assert table.loc[0, "mono_share"] == 0.5
    assert table.loc[0, "mono_weighted"] == pytest.approx(100 / 120)
    assert table.loc[0, "mono_deviants"].tolist() == [3]


@pytest.mark.parametrize("model", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("dense", [False, True])
def test_logit_effects_against_autograd(model, dense, request):
    """Through the model's own norms, their scales frozen, and its own unembedding."""
    lm = request.getfixturevalue(model)
    torch.manual_seed(0)
    sae = BlockDiagSAE(1, lm.n_heads * lm.d_head, 9) if dense else BlockDiagSAE(lm.n_heads, lm.d_head, 5)
    sae.requires_grad_(False)
    resid = torch.randn(1, 1, lm.model.cfg.d_model)
    block = lm.model.blocks[1]
    post = getattr(block, "ln1_post", torch.nn.Identity())
    of_others = torch.randn(1, 1, lm.model.cfg.d_model)  # what the norm after the attention is also taken of
    scale = []

    def freeze(value, hook):
        scale.append(value.detach())
        return scale[-1]

    def logits(activation: torch.Tensor) -> torch.Tensor:
        z = sae.decode(activation) - sae.b_dec
        z = z.reshape(lm.n_heads, lm.d_head)
        added = torch.einsum("hd,hdm->m", z, block.attn.W_O)
        names = ["ln_final.hook_scale", *(["blocks.1.ln1_post.hook_scale"] if model == "gemma2" else [])]
        with lm.model.hooks(fwd_hooks=[(name, freeze) for name in names]):
            return lm.model.unembed(lm.model.ln_final(resid + post(of_others + added)))[0, 0]

    jacobian = torch.autograd.functional.jacobian(logits, torch.zeros(sae.n_blocks, sae.features_per_block))
    expected = jacobian.flatten(1).T  # [feature, d_vocab]
    effects = logit_effects(lm, written(sae, lm.layer(1).W_O), 1 / math.prod(each.item() for each in scale))
    values = expected.sort(dim=1, descending=True).values
    assert torch.allclose(effects.top, values[:, :10], atol=1e-5)
    assert torch.allclose(effects.bottom, values.flip(1)[:, :10], atol=1e-5)
    assert torch.allclose(expected.gather(1, effects.top_ids), values[:, :10], atol=1e-5)
    assert torch.allclose(expected.gather(1, effects.bottom_ids), values.flip(1)[:, :10], atol=1e-5)
    for row, histogram in zip(expected, effects.histogram, strict=True):
        counts, _ = np.histogram(row.numpy(), bins=40)
        assert abs(histogram.numpy() - counts).sum() <= 4, "but for rounding at the edges"
        assert histogram.sum() == lm.d_vocab


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_logit_effects_of_a_model_in_half_precision(dtype, gemma2, gemma2_folder, monkeypatch):
    monkeypatch.setattr("trainer.model.lm._COLUMNS", 100)  # fewer than its 257
    half = LanguageModel.load(str(gemma2_folder), dtype=dtype)
    torch.manual_seed(0)
    sae = BlockDiagSAE(gemma2.n_heads, gemma2.d_head, 5).requires_grad_(False)
    ours, exact = (logit_effects(lm, written(sae, lm.layer(1).W_O), 1.0) for lm in (half, gemma2))
    assert torch.allclose(ours.top, exact.top, atol=0.05 * float(exact.top.max()))
    assert torch.allclose(ours.bottom, exact.bottom, atol=0.05 * float(exact.top.max()))


@pytest.mark.parametrize("model", ["llama", "gemma2"])
def test_scales_on_text(model, request):
    lm = request.getfixturevalue(model)
    contexts = torch.randint(1, 257, (3, 20), generator=torch.Generator().manual_seed(0))
    contexts[:, 0] = 0
    _, cache = lm.model.run_with_cache(contexts)
    product = cache["ln_final.hook_scale"]
    if model == "gemma2":
        product = product * cache["blocks.1.ln1_post.hook_scale"]
    assert inverse_scale(lm.layer(1), contexts) == pytest.approx((1 / product[:, 1:]).mean().item(), rel=1e-5)


def test_dense_features_belong_to_the_head_they_write_most_to():
    sae = BlockDiagSAE(1, 12, 3)
    sae.W_dec.data[0] = torch.zeros(3, 12)
    sae.W_dec.data[0, 0, :4] = 1
    sae.W_dec.data[0, 1, 8:] = 2
    sae.W_dec.data[0, 1, 0] = 1
    sae.W_dec.data[0, 2, 4:6] = 1
    head, share = head_of_features(sae, 3)
    assert head.tolist() == [0, 2, 1]
    assert share.tolist() == pytest.approx([1, 16 / 17, 1])
