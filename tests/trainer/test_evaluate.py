"""The identities that every evaluation satisfies, on a grouped-query and on an ordinary model."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer.block_diag import BlockDiagSAE
from trainer.clustered import ratio
from trainer.effects import Effect, Effects, measurable
from trainer.evaluate import evaluate, evaluate_tokens, repeated_tokens
from trainer.files import save_tensors
from trainer.model.lm import LanguageModel
from trainer.scores import prediction

_NO_HEADS = [Effect(torch.empty(0), torch.empty(0))] * 2


def identity(lm) -> BlockDiagSAE:
    """relu(z) - relu(-z) = z: an exact identity inside the SAE's own class."""
    sae = BlockDiagSAE(lm.n_heads, lm.d_head, 2 * lm.d_head)
    eye = torch.eye(lm.d_head)
    sae.W_enc.data = torch.cat([eye, -eye], dim=1).expand(lm.n_heads, -1, -1).clone()
    sae.W_dec.data = sae.W_enc.data.mT.clone()
    for bias in (sae.b_enc, sae.b_dec):
        bias.data.zero_()
    return sae


def zero(lm) -> BlockDiagSAE:
    sae = identity(lm)
    sae.W_dec.data.zero_()
    return sae


@pytest.fixture(params=["gpt2", "llama"])
def lm(request):
    return request.getfixturevalue(request.param)


def contexts(lm, n=24, pos=24):
    """Words, not noise: on a few letters even a random model's layers have a measurable effect."""
    ids = lm.tokenizer("the head reads a token and writes it back again " * 20)["input_ids"]
    starts = range(n)
    return torch.tensor([[lm.tokenizer.bos_token_id, *ids[s : s + pos - 1]] for s in starts])


def test_identity_and_zero_reconstruction(lm):
    exact, nothing = evaluate_tokens(lm.layer(1), [identity(lm), zero(lm)], contexts(lm), 1)
    assert exact["FVU"] == pytest.approx(0, abs=1e-9)
    assert exact["MSE"] == pytest.approx(0, abs=1e-6)
    assert exact["CE_sae"] == pytest.approx(exact["CE_clean"], abs=1e-5)
    assert exact["KL_score"] == pytest.approx(1, abs=1e-4)
    assert nothing["KL_score"] == pytest.approx(0, abs=1e-9)
    assert nothing["CE_sae"] == pytest.approx(nothing["CE_zero"], abs=1e-6)
    for ideal, result in ((1, exact), (0, nothing)):
        measurable = [s for s in (result["CE_score"], *result["CE_score_per_head"]) if s is not None]
        assert measurable, "nothing to check"
        assert measurable == pytest.approx([ideal] * len(measurable), abs=1e-3)
    assert nothing["KL_score_per_head"] == pytest.approx([0] * lm.n_heads, abs=1e-6)


def test_heads_sum_to_the_total(lm):
    torch.manual_seed(0)
    sae = BlockDiagSAE(lm.n_heads, lm.d_head, 3 * lm.d_head)
    (result,) = evaluate_tokens(lm.layer(1), [sae], contexts(lm), 1, per_head=False)
    assert sum(result["L0_per_head"]) == pytest.approx(result["L0"])
    assert sum(result["MSE_per_head"]) == pytest.approx(result["MSE"])
    for counts, l0 in zip(result["L0_histogram_per_head"], result["L0_per_head"], strict=True):
        assert sum(counts) == result["n_tokens"]
        assert sum(i * c for i, c in enumerate(counts)) / result["n_tokens"] == pytest.approx(l0)


def test_figures_against_a_direct_computation(lm):
    """MSE, FVU, CE and KL of one SAE, recomputed without the evaluator's batching, hooks or folding."""
    torch.manual_seed(0)
    sae, layer, tokens = BlockDiagSAE(lm.n_heads, lm.d_head, 3 * lm.d_head), 1, contexts(lm)
    (result,) = evaluate_tokens(lm.layer(layer), [sae], tokens, 1, per_head=False)
    name = f"blocks.{layer}.attn.hook_z"
    with torch.no_grad():
        logits, cache = lm.model.run_with_cache(tokens)
        z = cache[name]
        z_hat = sae(z)
        z_hat[:, 0] = z[:, 0]
        spliced = lm.model.run_with_hooks(tokens, fwd_hooks=[(name, lambda value, hook: z_hat)])
    x, x_hat = z[:, 1:].flatten(0, 1).flatten(1).double(), z_hat[:, 1:].flatten(0, 1).flatten(1).double()
    error = (x - x_hat).pow(2).sum()
    assert result["MSE"] == pytest.approx((error / len(x)).item(), rel=1e-5)
    assert result["FVU"] == pytest.approx((error / (x - x.mean(0)).pow(2).sum()).item(), rel=1e-5)
    clean, sae_log = (each[:, 1:-1].log_softmax(-1) for each in (logits, spliced))
    ce = -sae_log.gather(-1, tokens[:, 2:, None]).mean().item()
    kl = (clean.exp() * (clean - sae_log)).sum(-1).mean().item()
    assert result["CE_sae"] == pytest.approx(ce, rel=1e-5)
    assert result["KL_sae"] == pytest.approx(kl, rel=1e-4)


def assert_same_figures(one, other) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_same_figures(value, other[key])
    elif isinstance(one, list):
        for pair in zip(one, other, strict=True):
            assert_same_figures(*pair)
    elif one is None or other is None:  # not measurable
        assert one is other
    else:
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)


def test_one_call_for_several_saes_equals_one_call_each(lm):
    torch.manual_seed(0)
    saes = [BlockDiagSAE(lm.n_heads, lm.d_head, lm.d_head), identity(lm)]
    tokens = contexts(lm, n=6)
    together = evaluate(lm.layer(1), saes, tokens, 1, seed=0)
    apart = [evaluate(lm.layer(1), [sae], tokens, 1, seed=0)[0] for sae in saes]
    for one, other in zip(together, apart, strict=True):
        assert_same_figures(one, other)
    assert set(together[0]["induction"]) == set(together[0]) - {"induction", "n_documents", "schema_version"}


def test_what_no_sae_changes_is_kept_for_the_next_one(lm, tmp_path):
    layer, tokens = lm.layer(1), contexts(lm)

    def figures(sae, cache, first=1):
        return evaluate_tokens(layer, [sae], tokens, first, cache=cache)[0]

    alone = [figures(sae(lm), None) for sae in (identity, zero)]
    assert_same_figures(figures(identity(lm), tmp_path), alone[0])
    (file,) = tmp_path.iterdir()
    assert_same_figures(figures(zero(lm), tmp_path), alone[1])
    assert list(tmp_path.iterdir()) == [file]
    kept = load_file(file)
    save_tensors(file, kept | {"zero.kl": kept["zero.kl"] + 1})
    assert figures(zero(lm), tmp_path)["KL_zero"] == pytest.approx(alone[1]["KL_zero"] + 1)
    save_file(kept | {"zero.kl": kept["zero.kl"] + 2}, file)  # values that are not those of a checksum
    assert_same_figures(figures(zero(lm), tmp_path), alone[1])

    assert_same_figures(figures(zero(lm), tmp_path, first=3), figures(zero(lm), None, first=3))
    assert len(list(tmp_path.iterdir())) == 2, "what is scored is part of the name"
    os.truncate(file, 100)
    assert_same_figures(figures(zero(lm), tmp_path), alone[1])
    assert_same_figures(figures(zero(lm), file / "no folder"), alone[1])


def test_a_score_without_a_measurable_effect_is_not_a_number(gpt2):
    """With the last layer's output cut off, zeroing changes nothing: no score, and heads are tried on more tokens."""
    layer = gpt2.n_layers - 1
    W_O = gpt2.model.blocks[layer].attn.W_O
    before = W_O.data.clone()
    (whole,) = evaluate_tokens(gpt2.layer(layer), [zero(gpt2)], contexts(gpt2), 1)
    try:
        W_O.data.zero_()
        (result,) = evaluate_tokens(gpt2.layer(layer), [zero(gpt2)], contexts(gpt2), 1)
    finally:
        W_O.data.copy_(before)
    assert result["CE_score"] is None and result["KL_score_per_head"] == [None] * gpt2.n_heads
    assert None not in whole["KL_score_per_head"]
    # Of 24 contexts with 22 scored tokens an eighth is 3, but 8 are the least, and half is 12.
    assert whole["n_tokens_per_head"] == 8 * 22 and result["n_tokens_per_head"] == 12 * 22
    assert whole["n_contexts_per_head"] == 8 and whole["n_contexts"] == 24


def test_a_score_needs_an_ablation_that_costs(gpt2):
    """Where removing something helps, there is nothing that an SAE could keep a share of."""
    torch.manual_seed(0)
    loss = 1 + torch.rand(12, 30)
    assert measurable(loss) and not measurable(-loss) and not measurable(loss - loss.mean())
    assert measurable(torch.stack([loss, -loss])).tolist() == [True, False]
    nothing = Effects(loss, *(Effect(each, each.abs()) for each in (loss - 1, loss + 1, loss[None] + 0.1)), *_NO_HEADS)
    figures = prediction(nothing, 0)
    assert figures["CE_zero"] < figures["CE_clean"] and figures["CE_score"] is figures["CE_score_se"] is None
    assert figures["KL_score"] is not None


def test_errors_are_clustered_by_context(gpt2):
    """Against an own computation per figure; where contexts differ they are larger than errors over tokens."""
    torch.manual_seed(0)
    sae, layer = BlockDiagSAE(gpt2.n_heads, gpt2.d_head, 3 * gpt2.d_head), gpt2.layer(1)
    tokens = contexts(gpt2, n=9)
    tokens[:4, 1:] = tokens[:4, 1:2]  # four contexts of one token each
    (result,) = evaluate_tokens(layer, [sae], tokens, 1)
    z = layer.z(tokens)[:, 1:].float()
    active = (sae.encode(z.flatten(0, 1)) > 0).flatten(1).sum(1).double().view(9, -1)
    over_contexts = (active.mean(1).std() / 3).item()
    assert result["L0_se"] == pytest.approx(over_contexts, rel=1e-6)
    assert result["L0_se"] > 1.5 * (active.std() / active.numel() ** 0.5).item()

    x_hat = sae(z.flatten(0, 1)).view_as(z)
    error, spread = (z - x_hat).pow(2).sum((1, 2, 3)).double(), (z - z.mean((0, 1))).pow(2).sum((1, 2, 3)).double()
    assert result["FVU_se"] == pytest.approx(jackknife(error, spread), rel=0.2)
    norms, dot = (x_hat.flatten(2).norm(dim=-1) / z.flatten(2).norm(dim=-1)).double(), (z * x_hat).sum((1, 2, 3))
    assert result["norm_ratio"] == pytest.approx(norms.mean().item(), rel=1e-5)
    assert result["norm_ratio_se"] == pytest.approx((norms.mean(1).std() / 3).item(), rel=1e-4)
    assert result["bias"] == pytest.approx((x_hat.pow(2).sum() / dot.sum()).item(), rel=1e-4)
    for name in ("L0", "MSE", "FVU", "norm_ratio", "bias", "CE_clean", "CE_sae", "CE_zero", "CE_mean", "KL_sae"):
        assert result[f"{name}_se"] > 0, name
    for name in ("L0", "MSE", "FVU", "norm_ratio", "bias", "CE_zero", "CE_sae", "KL_zero"):
        errors = result[f"{name}_per_head_se"]
        assert len(errors) == gpt2.n_heads and min(errors) > 0, name
    (single,) = evaluate_tokens(layer, [sae], tokens[:1], 1)
    assert single["L0"] > 0 and single["L0_se"] is single["KL_score"] is None, "one context has no spread"


def jackknife(numerator, denominator) -> float:
    n = len(numerator)
    left_out = (numerator.sum() - numerator) / (denominator.sum() - denominator)
    return ((n - 1) / n * (left_out - left_out.mean()).pow(2).sum()).sqrt().item()


def test_a_ratio_over_clusters():
    torch.manual_seed(0)
    n, d = torch.rand(3, 40), 1 + torch.rand(3, 40)
    value, se = ratio(n, d)
    assert value.tolist() == pytest.approx((n.sum(1) / d.sum(1)).tolist())
    assert se.tolist() == pytest.approx(
        [jackknife(*each) for each in zip(n.double(), d.double(), strict=True)], rel=0.05
    )
    assert ratio(n, torch.zeros(3, 1))[0].isnan().all() and ratio(n[:, :1], d[:, :1])[1].isnan().all()


def test_a_model_in_bfloat16_is_evaluated_with_a_float32_sae(gpt2, gpt2_folder):
    half = LanguageModel.load(str(gpt2_folder), dtype="bfloat16")
    tokens = contexts(gpt2, n=6)
    (exact,) = evaluate_tokens(half.layer(1), [identity(half)], tokens, 1, per_head=False)
    assert exact["FVU"] == pytest.approx(0, abs=1e-6)
    assert exact["KL_score"] == pytest.approx(1, abs=0.01)


def test_repeated_tokens_repeat_and_hold_no_special_token(gpt2):
    tokens = repeated_tokens(gpt2, 5, 10, seed=0)
    assert tokens.shape == (5, 21)
    assert torch.equal(tokens[:, 1:11], tokens[:, 11:])
    assert (tokens[:, 1:] != gpt2.tokenizer.bos_token_id).all()
