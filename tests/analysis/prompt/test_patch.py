"""Patching against hooks written here, which see the other prompt's own forward."""

import pytest
import torch

from analysis.prompt.patch import Patch, patch, patch_every_head, proposed_shift
from analysis.prompt.run import run_prompt
from trainer.block_diag import BlockDiagSAE

LAYER, A, B = 1, "the head reads the head", "one tail wrote one tail"
HOOK = f"blocks.{LAYER}.attn.hook_z"


def runs(lm, sae, *prompts):
    return [run_prompt(lm.layer(LAYER), sae, prompt) for prompt in prompts]


def with_z(lm, prompt, edit):
    """Logits of a prompt with its z edited by a hook."""
    return lm.model.run_with_hooks(lm.to_tokens(prompt), fwd_hooks=[(HOOK, lambda z, hook: edit(z.clone()))])[0]


@pytest.mark.parametrize("kind", ["z of head", "z of layer", "feature", "features of head"])
def test_a_run_patched_with_itself_is_the_run(lm, sae, kind):
    (run,) = runs(lm, sae, A)
    found = patch(lm.layer(LAYER), sae, run, run, Patch(kind, 2))
    assert torch.allclose(found.full, found.clean, atol=1e-4) and torch.allclose(found.direct, found.clean, atol=1e-4)


def test_all_heads_at_all_positions(lm, sae):
    run, other = runs(lm, sae, A, B)
    z_of_other = lm.model.run_with_cache(lm.to_tokens(B))[1][HOOK]

    def edit(z):
        z[:, 1:] = z_of_other[:, 1:]
        return z

    found = patch(lm.layer(LAYER), sae, run, other, Patch("z of layer"))
    assert torch.allclose(found.full, with_z(lm, A, edit)[-1], atol=1e-4)
    assert (found.full - found.clean).abs().max() > 1e-2, "nothing to see"


@pytest.mark.parametrize("shift", [0, -4, 3])
def test_one_head_in_a_span_with_a_shift(lm, sae, shift):
    prompt = B[:shift] if shift < 0 else B + " so"[:shift]
    run, other = runs(lm, sae, A, prompt)
    assert proposed_shift(run, other) == shift
    z_of_other = lm.model.run_with_cache(lm.to_tokens(prompt))[1][HOOK]

    def edit(z):
        for p in range(7, 10):
            z[0, p, 2] = z_of_other[0, p + shift, 2]
        return z

    found = patch(lm.layer(LAYER), sae, run, other, Patch("z of head", 2, 7, 9, shift))
    assert torch.allclose(found.full, with_z(lm, A, edit)[-1], atol=1e-4)
    assert (found.full - found.clean).abs().max() > 1e-3, "nothing to see"
    assert torch.allclose(found.direct, found.clean, atol=1e-5), "the last position is not patched"


@pytest.mark.parametrize("shift", [-4, 3])
def test_without_a_span_it_reaches_as_far_as_both_prompts(lm, sae, shift):
    run, other = runs(lm, sae, A, B[:shift] if shift < 0 else B + " so"[:shift])
    n = len(run.tokens)
    for given in (0, shift):
        first, last = max(1, 1 - given), min(n, len(other.tokens) - given) - 1
        default = patch(lm.layer(LAYER), sae, run, other, Patch("z of head", 1, shift=given))
        spelt = patch(lm.layer(LAYER), sae, run, other, Patch("z of head", 1, first, last, given))
        assert torch.allclose(default.full, spelt.full, atol=1e-5)
        for span in ((first - 1, last), (first, last + 1)):
            with pytest.raises(ValueError, match="are no span of 1 to"):
                patch(lm.layer(LAYER), sae, run, other, Patch("z of head", 1, *span, given))


@pytest.mark.parametrize("kind", ["feature", "features of head"])
def test_contributions(lm, sae, kind):
    run, other = runs(lm, sae, A, B)
    change = (other.f - run.f).abs().sum(0)
    which = int(change.argmax()) if kind == "feature" else 2
    longest = sae.W_dec.view(sae.d_sae, -1, lm.d_head).norm(dim=-1).argmax(1)

    def edit(z):
        into = torch.zeros(z.shape[1], sae.n_blocks, sae.width)
        for feature in range(sae.d_sae):
            block, index = divmod(feature, sae.features_per_block)
            head = int(longest[feature]) if sae.is_dense else block
            if which == (feature if kind == "feature" else head):
                difference = (other.f - run.f)[1:, block, index]
                into[1:, block] += difference[:, None] * sae.W_dec[block, index]
        return z + into.view(z.shape)

    found = patch(lm.layer(LAYER), sae, run, other, Patch(kind, which))
    assert torch.allclose(found.full, with_z(lm, A, edit)[-1], atol=1e-4)
    assert (found.full - found.clean).abs().max() > 1e-3, "nothing to see"


def test_the_direct_answer(gpt2):
    """By hand, for a LayerNorm whose scale is frozen."""
    sae = BlockDiagSAE(gpt2.n_heads, gpt2.d_head, 5).requires_grad_(False)
    run, other = runs(gpt2, sae, A, B)
    written = (other.z - run.z)[-1, 2] @ gpt2.model.W_O[LAYER, 2]
    last = gpt2.model.run_with_cache(gpt2.to_tokens(A))[1]["ln_final.hook_scale"][0, -1]
    wanted = (written - written.mean()) / last @ gpt2.model.W_U
    found = patch(gpt2.layer(LAYER), sae, run, other, Patch("z of head", 2))
    assert torch.allclose(found.direct - found.clean, wanted, atol=1e-4)
    assert wanted.abs().max() > 1e-2, "nothing to see"


@pytest.mark.parametrize("kind", ["z of head", "features of head"])
def test_every_head(lm, sae, kind):
    run, other = runs(lm, sae, A, B[:-4])
    shift, (a, b) = proposed_shift(run, other), (7, 40)
    table = patch_every_head(lm.layer(LAYER), sae, run, other, Patch(kind, first=6, shift=shift), (a, b))
    assert table["head"].tolist() == list(range(lm.n_heads))
    in_other = lm.model(lm.to_tokens(B[:-4]))[0, -1]
    for row in table.itertuples():
        found = patch(lm.layer(LAYER), sae, run, other, Patch(kind, row.head, 6, shift=shift))
        clean, direct, full = (float(logits[a] - logits[b]) for logits in found)
        assert (row.clean, row.direct, row.patched) == tuple(pytest.approx(x, abs=1e-4) for x in (clean, direct, full))
        assert row.other == pytest.approx(float(in_other[a] - in_other[b]), abs=1e-4)
        assert row.recovered == pytest.approx((full - clean) / (row.other - clean), abs=1e-2)
    assert table["recovered"].nunique() > 1


def test_nothing_to_recover_is_no_number(lm, sae):
    (run,) = runs(lm, sae, A)
    assert patch_every_head(lm.layer(LAYER), sae, run, run, Patch("z of head"), (7, 40))["recovered"].isna().all()


def test_what_is_not_there(gpt2):
    layer = gpt2.layer(LAYER)
    sae, another = (BlockDiagSAE(gpt2.n_heads, gpt2.d_head, 5).requires_grad_(False) for _ in range(2))
    run, other = runs(gpt2, sae, A, B[:-4])
    with pytest.raises(ValueError, match="run through different checkpoints"):
        patch(layer, sae, run, *runs(gpt2, another, B), Patch("z of layer"))
    with pytest.raises(ValueError, match="there is no head 4"):
        patch(layer, sae, run, other, Patch("z of head", 4))
    with pytest.raises(ValueError, match="there is no feature 20"):
        patch(layer, sae, run, other, Patch("feature", 20))
    with pytest.raises(ValueError, match="a z of layer is not patched head by head"):
        patch_every_head(layer, sae, run, other, Patch("z of layer"), (7, 40))
    with pytest.raises(ValueError, match="the other prompt has no position 23"):
        patch_every_head(layer, sae, run, other, Patch("z of head"), (7, 40))
