"""DFA is exact, slots are exclusive, and heads with a known job come out with that job."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformer_lens import HookedTransformer, HookedTransformerConfig

from analysis import attribution as dfa
from analysis.corpus.passes import chunks
from analysis.prompt.run import PromptRun, active_features, role_table, roles, run_prompt, source_attribution
from tests.helpers import ToyTokenizer
from trainer.block_diag import BlockDiagSAE
from trainer.model.lm import LanguageModel


def with_value_bias(n_key_value_heads: int | None) -> LanguageModel:
    """A random model whose value biases are not folded away, so that the constant term matters."""
    torch.manual_seed(0)
    cfg = HookedTransformerConfig(
        n_layers=2, d_model=24, n_ctx=32, d_head=4, n_heads=6, d_vocab=50, act_fn="gelu", init_weights=True,
        n_key_value_heads=n_key_value_heads, initializer_range=0.4,
    )  # fmt: skip
    model = HookedTransformer(cfg)
    for block in model.blocks:
        for name, parameter in block.attn.named_parameters():
            if name.endswith("b_V"):
                parameter.data.normal_()
    return toy(model)


def toy(model: HookedTransformer) -> LanguageModel:
    """Its tokens are pieces of words, which have no class."""
    lm = LanguageModel(model, "toy")
    lm.tokenizer = ToyTokenizer(["<s>"] + ["ab"] * (lm.d_vocab - 1))
    return lm


@pytest.mark.parametrize("n_key_value_heads", [None, 2], ids=["ordinary", "grouped-query"])
@pytest.mark.parametrize("dense", [False, True])
def test_sources_and_constants_are_the_pre_activation(n_key_value_heads, dense):
    lm = with_value_bias(n_key_value_heads)
    torch.manual_seed(1)
    sae = BlockDiagSAE(1, 24, 40) if dense else BlockDiagSAE(6, 4, 10)
    sae.b_enc.data.normal_()
    tokens = torch.randint(50, (1, 20))
    reader = dfa.Reader(sae, lm.layer(1))
    assert reader.b_V.abs().min() > 0
    (chunk,) = next(chunks(lm.layer(1), tokens, torch.tensor([0])))
    everything = dfa.Firings.of(torch.ones(1, 20, sae.n_blocks, sae.features_per_block))
    sources = reader.attribute(chunk, reader.reads(chunk), everything)
    assert sources.shape == (20 * sae.d_sae, 6 if dense else 1, 20)
    total = sources.sum((1, 2)).view(20, -1) + reader.constants()
    assert torch.allclose(total, sae.pre_activations(chunk.z[0]).flatten(1), atol=1e-5)


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_the_table_of_one_feature_adds_up(model, request):
    lm = request.getfixturevalue(model)
    torch.manual_seed(0)
    sae = BlockDiagSAE(lm.n_heads, lm.d_head, 12)
    run = run_prompt(lm.layer(1), sae, "the head reads the head")
    table = active_features(run, None, None)
    fires = (run.f[1:] > 0).sum(0).flatten()
    assert sorted(table["feature"]) == fires.nonzero()[:, 0].tolist(), "one row each"
    assert table["firings"].tolist() == fires[table["feature"].tolist()].tolist()
    assert table["activation"].is_monotonic_decreasing
    for row in table.head(20).itertuples():
        index = row.feature - row.head * 12
        assert row.activation == run.f[1:, row.head, index].max()
        assert (row.along == run.f[:, row.head, index].numpy()).all()
        sources = source_attribution(run, row.head, index, row.position)
        constant = dfa.Reader(sae, lm.layer(1)).constants()[row.feature].item()
        assert sources["dfa"].sum() + constant == pytest.approx(row.activation, abs=1e-4)
        read = sources.loc[sources["token"] == row._9, "dfa"].sum()  # "reads from"
        assert read == pytest.approx(sources["dfa"].max(), abs=1e-5)
        assert sources["attention"].sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("dense", [False, True])
def test_sources_of_a_prompt_leave_value_biases_out(dense, monkeypatch):
    """Their sum and the constant are the activation; what a feature reads from most is the largest of them."""
    lm = with_value_bias(2)
    torch.manual_seed(1)
    sae = (BlockDiagSAE(1, 24, 40) if dense else BlockDiagSAE(6, 4, 10)).requires_grad_(False)
    tokens = torch.randint(50, (1, 20))
    monkeypatch.setattr(lm, "to_tokens", lambda prompt: tokens)
    lm.tokenizer.texts = [str(i) for i in range(50)]
    run, constants = run_prompt(lm.layer(1), sae, "any"), dfa.Reader(sae, lm.layer(1)).constants()
    for row in active_features(run, None, None).head(20).itertuples():
        block, index = divmod(row.feature, run.features_per_block)
        sources = source_attribution(run, block, index, row.position).groupby("token")["dfa"].sum()
        assert sources.sum() + constants[row.feature].item() == pytest.approx(row.activation, abs=1e-4)
        assert sources[row._9] == pytest.approx(sources.max(), abs=1e-5)  # "reads from"


TEXTS = ["<s>", " war", "war", " the", " The", ".", "\n\n", " 7", ' "', " peace", "!)"]
# Which of them mean the same: words of peace and war, and articles.
DIRECTIONS = [0, 1, 1, 2, 2, 3, 4, 5, 6, 1, 7]
CLASSES = {"." : "punctuation", ' "': "punctuation", "!)": "punctuation", "\n\n": "newline", " 7": "digit",
           " The": "capitalised", " the": "function", " war": "content", " peace": "content"}  # fmt: skip


class Embedded:
    """A language model as `TokenKinds` knows it; tokens of one direction are at a cosine of 1 or 0.6."""

    d_vocab = len(TEXTS)

    def token_strings(self, ids: list[int]) -> list[str]:
        return [TEXTS[i] for i in ids]

    def embeddings(self, tokens: torch.Tensor) -> torch.Tensor:
        rows = torch.eye(9, dtype=torch.float64)[DIRECTIONS]
        rows[TEXTS.index(" peace")] = torch.tensor([0, 0.6, 0, 0, 0, 0, 0, 0, 0.8])
        return rows[tokens] * (1 + tokens[:, None])  # lengths do not count


def starts_sentence(texts: list[str], place: int) -> bool:
    """The definition in words, one token after another."""
    if not texts[place].strip()[:1].isupper():
        return False
    before = [text for text in texts[1:place] if text not in ("\n\n", ' "')]
    return bool(before) and before[-1] in (".", "!)")


@settings(max_examples=150, deadline=None)
@example([5, 6, 8, 4, 7, 9, 2, 1, 3, 7], 0.7)  # . \\n\\n " The 7 peace war _war _the 7
@example([10, 9, 4, 2, 2, 7, 7, 3, 1, 5, 2, 8], 2.0)
@given(st.lists(st.integers(1, len(TEXTS) - 1), min_size=0, max_size=14), st.sampled_from([0.5, 0.7, 2.0]))
def test_slots_against_their_definitions(ids, fuzzy_from):
    tokens = [0, *ids]  # 0 is BOS
    texts = [TEXTS[i] for i in tokens]
    slots = dfa.source_slots(torch.tensor(tokens), dfa.TokenKinds(Embedded(), torch.tensor(tokens), fuzzy_from))
    unit = torch.nn.functional.normalize(Embedded().embeddings(torch.tensor(tokens)), dim=1)

    def similar(a: int, b: int) -> bool:
        return float(unit[a] @ unit[b]) >= fuzzy_from

    for q in range(len(tokens)):
        for s in range(len(tokens)):
            if s > q:
                expected = -1
            elif s == 0:
                expected = "bos"
            elif s == q:
                expected = "self"
            elif tokens[s - 1] == tokens[q]:
                expected = "induction"
            elif tokens[s] == tokens[q]:
                expected = "duplicate"
            elif s == q - 1:
                expected = "previous"
            elif similar(s - 1, q):
                expected = "fuzzy_induction"
            elif similar(s, q):
                expected = "fuzzy_duplicate"
            elif starts_sentence(texts, s):
                expected = "sentence_start"
            elif texts[s] in CLASSES:
                expected = CLASSES[texts[s]]
            elif q - s <= 5:
                expected = "local"
            else:
                expected = "other"
            assert slots[q, s] == (expected if expected == -1 else dfa.SLOTS.index(expected)), (q, s, texts)


def test_similar_is_what_one_random_pair_in_a_thousand_reaches(gpt2):
    tokens = torch.randint(1, 257, (400,), generator=torch.Generator().manual_seed(0))
    ids = tokens.unique()
    unit = torch.nn.functional.normalize(gpt2.model.W_E[ids].double(), dim=1)
    null = sorted(float(unit[i] @ unit[j]) for i in range(len(ids)) for j in range(i))
    threshold = dfa.similarity_threshold(gpt2, tokens)
    assert threshold == pytest.approx(null[len(null) - int(len(null) / 1000) - 1], abs=1e-6)
    assert dfa.similarity_threshold(gpt2, tokens[:1]) > 1, "no pair, so nothing is similar"


def test_positive_mass_against_a_loop_over_features():
    torch.manual_seed(0)
    pattern, reads = torch.rand(2, 5, 5), torch.randn(2, 5, 7)
    active = (torch.rand(5, 2, 7) > 0.5).float()
    expected = torch.zeros(2, 5, 5)
    for head in range(2):
        for q in range(5):
            for f in range(7):
                if active[q, head, f]:
                    expected[head, q] += (pattern[head, q] * reads[head, :, f]).clamp_min(0)
    assert torch.allclose(dfa.positive_mass(pattern, reads, active), expected, atol=1e-6)


def previous_token_and_induction_model(vocabulary: int = 12, n_ctx: int = 32) -> LanguageModel:
    """Two attention-only layers whose head 0 attends exactly to the previous token, and by induction.

    The residual stream has one-hot parts: token, position, previous token (written by layer 0).
    Head 1 of each layer attends uniformly. The induction head rests on BOS where nothing matches.
    """
    token, position, previous = 0, vocabulary, vocabulary + n_ctx
    d_model, d_head, gain = 2 * vocabulary + n_ctx, max(vocabulary, n_ctx) + 1, 30.0
    cfg = HookedTransformerConfig(
        n_layers=2, d_model=d_model, n_ctx=n_ctx, d_head=d_head, n_heads=2, d_vocab=vocabulary,
        attn_only=True, normalization_type=None, init_weights=False,
    )  # fmt: skip
    model = HookedTransformer(cfg)
    for parameter in model.parameters():
        parameter.data.zero_()
    model.W_E.data[:, token : token + vocabulary] = torch.eye(vocabulary)
    model.W_pos.data[:, position : position + n_ctx] = torch.eye(n_ctx)
    first, second = model.blocks[0].attn, model.blocks[1].attn
    for p in range(n_ctx):
        first.W_Q.data[0, position + p, p] = gain
        if p:
            first.W_K.data[0, position + p - 1, p] = gain
    for t in range(vocabulary):
        second.W_Q.data[0, token + t, t] = gain
        second.W_Q.data[0, token + t, d_head - 1] = gain / 2
        second.W_K.data[0, previous + t, t] = gain
        for attn in (first, second):
            attn.W_V.data[:, token + t, t] = 1
        first.W_O.data[0, t, previous + t] = 1
    second.W_K.data[0, position, d_head - 1] = gain
    return toy(model)


def hand_run(layer: int) -> PromptRun:
    lm = previous_token_and_induction_model()
    torch.manual_seed(0)
    sae = BlockDiagSAE(2, lm.d_head, 64)
    sae.b_enc.data.zero_()
    block = torch.tensor([3, 7, 4, 9, 5, 8])
    tokens = torch.cat([torch.tensor([0]), block, block, block])
    (z, v, pattern), resid_pre, final = lm.layer(layer).forward(tokens[None])
    return PromptRun(
        tokens=tokens,
        strings=[str(t) for t in tokens.tolist()],
        f=sae.encode(z[0]).detach(),
        z=z[0],
        pattern=pattern[0],
        values=(v[0] - lm.layer(layer).b_V).transpose(0, 1),
        W_enc=sae.W_enc.detach(),
        slots=dfa.source_slots(tokens, dfa.TokenKinds(lm, tokens)),
        resid_pre=resid_pre[0],
        final=final[0],
    )


@pytest.mark.parametrize(("layer", "role"), [(0, "previous"), (1, "induction")])
def test_hand_built_heads_come_out_as_what_they_are(layer, role):
    run = hand_run(layer)
    table = role_table(roles(run)).set_index("head")
    assert table.loc[0, "by attention"] == role
    assert table.loc[0, "by DFA"] == role
    assert table.loc[0, "agree"]
    assert table.loc[1, "by attention"] != role, "the uniform head has no such role"
    late = dfa.shares(dfa.mass_per_slot(run.pattern, run.slots, first_query=8))  # from the first repeat on
    if role == "induction":
        assert late[0, dfa.SLOTS.index(role)] > 0.99
