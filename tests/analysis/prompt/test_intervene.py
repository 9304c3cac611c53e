"""Direct effects against hand computation, full effects against hooks written here."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from analysis.prompt.intervene import Intervention, intervene
from analysis.prompt.run import active_features, direct_effects, run_prompt, source_attribution

LAYER, PROMPT = 1, "the head reads the head"


def ablated_z(lm, sae, z, kind, which):
    """z [pos, head, d_head] with the ablation, by loops."""
    z = z.clone()
    f = sae.encode(z)
    for q in range(1, len(z)):
        if kind.endswith("reconstruction"):
            heads = [which] if kind.startswith("head") else list(range(lm.n_heads))
            z[q, heads] = sae(z)[q, heads]
            continue
        for block in range(sae.n_blocks):
            for index in range(sae.features_per_block):
                row = sae.W_dec[block, index]
                if sae.n_blocks == lm.n_heads:
                    head, gone = block, torch.zeros(lm.n_heads, lm.d_head)
                    gone[block] = row
                else:
                    gone = row.view(lm.n_heads, lm.d_head)
                    head = int(gone.norm(dim=1).argmax())
                if (kind == "scale feature" and block * sae.features_per_block + index == which) or (
                    kind == "scale features of head" and head == which
                ):
                    z[q] -= f[q, block, index] * gone
    return z


def with_frozen_norms(lm, cache, change, position):
    """Logits at a position with something added to the output of all heads, by the scales that norms had without."""
    last = cache[f"blocks.{lm.n_layers - 1}.hook_resid_post"][0, position]
    block, cap = lm.model.blocks[LAYER], lm.model.cfg.output_logits_soft_cap
    if hasattr(block, "ln1_post"):
        change = change / cache[f"blocks.{LAYER}.ln1_post.hook_scale"][0, position] * block.ln1_post.w
    frozen = cache["ln_final.hook_scale"][0, position]
    centre = (lambda x: x - x.mean()) if "LN" in lm.model.cfg.normalization_type else (lambda x: x)
    logits = centre(last + change) / frozen @ lm.model.W_U + lm.model.b_U
    return cap * (logits / cap).tanh() if cap > 0 else logits


@pytest.mark.parametrize("lm", ["gpt2", "llama", "gemma2"], indirect=True)
@pytest.mark.parametrize(
    "kind", ["scale feature", "scale features of head", "head by reconstruction", "layer by reconstruction"]
)
def test_direct_and_full(lm, sae, kind):
    tokens = lm.to_tokens(PROMPT)
    _, cache = lm.model.run_with_cache(tokens)
    z = cache[f"blocks.{LAYER}.attn.hook_z"][0]
    which = int(sae.encode(z)[-1].argmax()) if kind == "scale feature" else 2
    wanted = ablated_z(lm, sae, z, kind, which)
    found = intervene(lm.layer(LAYER), sae, run_prompt(lm.layer(LAYER), sae, PROMPT), Intervention(kind, which))

    clean = lm.model(tokens)[0, -1]
    assert torch.allclose(found.clean, clean, atol=1e-4)
    full = lm.model.run_with_hooks(
        tokens, fwd_hooks=[(f"blocks.{LAYER}.attn.hook_z", lambda value, hook: wanted[None])]
    )[0, -1]
    assert torch.allclose(found.full, full, atol=1e-4)
    assert (full - clean).abs().max() > 1e-2, "nothing to see"

    change = sum((wanted - z)[-1, h] @ lm.model.W_O[LAYER, h] for h in range(lm.n_heads))
    direct = with_frozen_norms(lm, cache, change, -1)
    assert torch.allclose(found.direct, direct, atol=1e-4)
    assert (direct - full).abs().max() > 1e-3, "the two are not the same thing"

    table = found.table(found.most_changed(4)).set_index("id")
    best = int(clean.argmax())
    assert best in table.index
    row = table.loc[best]
    assert row["direct logit change"] == pytest.approx(float(direct[best] - clean[best]), abs=1e-3)
    expected = float(full.log_softmax(-1)[best] - clean.log_softmax(-1)[best])
    assert row["full log-probability change"] == pytest.approx(expected, abs=1e-3)


def test_the_prediction_after_an_earlier_token(lm, sae):
    tokens = lm.to_tokens(PROMPT)
    z = lm.layer(LAYER).z(tokens)[0]
    wanted = ablated_z(lm, sae, z, "scale features of head", 1)
    full = lm.model.run_with_hooks(
        tokens, fwd_hooks=[(f"blocks.{LAYER}.attn.hook_z", lambda value, hook: wanted[None])]
    )
    run = run_prompt(lm.layer(LAYER), sae, PROMPT)
    found = intervene(lm.layer(LAYER), sae, run, Intervention("scale features of head", 1), position=4)
    assert torch.allclose(found.clean, lm.model(tokens)[0, 4], atol=1e-4)
    assert torch.allclose(found.full, full[0, 4], atol=1e-4)


def test_one_position_only(lm, sae):
    tokens = lm.to_tokens(PROMPT)
    z = lm.layer(LAYER).z(tokens)[0]
    wanted = z.clone()
    wanted[3] = ablated_z(lm, sae, z, "scale features of head", 1)[3]
    full = lm.model.run_with_hooks(
        tokens, fwd_hooks=[(f"blocks.{LAYER}.attn.hook_z", lambda value, hook: wanted[None])]
    )
    run = run_prompt(lm.layer(LAYER), sae, PROMPT)
    found = intervene(lm.layer(LAYER), sae, run, Intervention("scale features of head", 1, first=3, last=3))
    assert torch.allclose(found.full, full[0, -1], atol=1e-4)
    assert torch.allclose(found.direct, found.clean, atol=1e-5), "another position does not reach the last one directly"


def close(a, b):
    """Two effects are the same."""
    return all(torch.allclose(x, y, atol=1e-4) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", ["scale feature", "scale features of head"])
def test_scaling(lm, sae, kind):
    """By 1 nothing changes; the change of z is linear in the factor, and leaves at most what the span is."""
    layer = lm.layer(LAYER)
    run = run_prompt(layer, sae, PROMPT)
    which = int(run.f[-1].argmax()) if kind == "scale feature" else 2
    same = intervene(layer, sae, run, Intervention(kind, which, 1.0))
    assert close((same.direct, same.full), (same.clean, same.clean))
    gone = ablated_z(lm, sae, run.z, kind, which) - run.z
    assert gone.abs().max() > 0.1, "nothing to see"
    for factor in (0.0, 3.0, -1.0):
        wanted = torch.zeros_like(gone)
        wanted[4:] = (1 - factor) * gone[4:]
        found = intervene(layer, sae, run, Intervention(kind, which, factor, 4, len(run.tokens) - 1))
        full = layer.logits(run.resid_pre[None], (run.z + wanted)[None])[0, -1]
        assert torch.allclose(found.full, full, atol=1e-4)
        assert (found.full - found.clean).abs().max() > 1e-3


def test_clamping(lm, sae):
    """A feature gets its value also where it does not fire; its own value changes nothing."""
    layer = lm.layer(LAYER)
    run = run_prompt(layer, sae, PROMPT)
    silent = int((run.f[3] == 0).flatten().nonzero()[0])
    block, index = divmod(silent, sae.features_per_block)
    z = run.z.clone()
    z[3] += 2.5 * (
        sae.W_dec[block, index].view(lm.n_heads, lm.d_head)
        if sae.is_dense
        else torch.eye(lm.n_heads)[block, :, None] * sae.W_dec[block, index]
    )
    found = intervene(layer, sae, run, Intervention("clamp feature", silent, 2.5, 3, 3), 3)  # Gemma's window is short
    assert torch.allclose(found.full, layer.logits(run.resid_pre[None], z[None])[0, 3], atol=1e-4)
    assert (found.full - found.clean).abs().max() > 1e-3
    firing = int(run.f[3].argmax())
    own = intervene(layer, sae, run, Intervention("clamp feature", firing, float(run.f[3].flatten()[firing]), 3, 3))
    assert close((own.direct, own.full), (own.clean, own.clean))
    zero = intervene(layer, sae, run, Intervention("clamp feature", firing, 0.0))
    assert close(zero, intervene(layer, sae, run, Intervention("scale feature", firing, 0.0)))


def test_the_logit_difference(lm, sae):
    found = intervene(lm.layer(LAYER), sae, run_prompt(lm.layer(LAYER), sae, PROMPT), Intervention("scale feature"))
    difference = found.logit_difference(7, 40)
    assert difference.keys() == {"clean", "direct", "full"}
    for name, logits in zip(difference, found, strict=True):
        assert difference[name] == pytest.approx(float(logits[7]) - float(logits[40]), abs=1e-5)


def test_ten_sessions_share_one_model(lm, sae):
    """Hooks of one thread in a forward of another would change its answer."""

    def answer(session: int) -> list[torch.Tensor]:
        run = run_prompt(lm.layer(LAYER), sae, "the head reads " + "the " * session)
        found = intervene(lm.layer(LAYER), sae, run, Intervention("scale features of head", session % lm.n_heads))
        return [run.f, run.final, found.clean, found.full, direct_effects(lm.layer(LAYER), sae, run, 40)]

    alone = [answer(session) for session in range(10)]
    with ThreadPoolExecutor(10) as pool:
        together = list(pool.map(answer, list(range(10)) * 5))
    for session, found in enumerate(together):  # a thread may have another number of threads for a matmul
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(alone[session % 10], found, strict=True))


def test_what_is_not_there(lm, sae):
    run = run_prompt(lm.layer(LAYER), sae, "the head")
    with pytest.raises(ValueError, match=f"there is no feature {sae.d_sae}"):
        intervene(lm.layer(LAYER), sae, run, Intervention("scale feature", sae.d_sae))
    with pytest.raises(ValueError, match="there is no head -1"):
        intervene(lm.layer(LAYER), sae, run, Intervention("scale features of head", -1))
    for first, last in ((0, 3), (99, None), (5, 3), (2, len(run.tokens))):
        with pytest.raises(ValueError, match=f"positions {first} to .* are no span of 1 to {len(run.tokens) - 1}"):
            intervene(lm.layer(LAYER), sae, run, Intervention("scale feature", first=first, last=last))
    with pytest.raises(ValueError, match="position 99 is out of range"):
        intervene(lm.layer(LAYER), sae, run, Intervention("scale feature"), position=99)


@pytest.mark.parametrize("lm", ["gpt2", "llama", "gemma2"], indirect=True)
def test_direct_effects_of_firings_are_what_their_ablation_takes_away(lm, sae):
    run = run_prompt(lm.layer(LAYER), sae, PROMPT)
    token, cap = 40, lm.model.cfg.output_logits_soft_cap
    before_cap = (lambda logit: cap * (logit / cap).atanh()) if cap > 0 else (lambda logit: logit)
    effect = direct_effects(lm.layer(LAYER), sae, run, token)
    last = len(run.tokens) - 1
    table = active_features(run, span=(last, last), effect=effect)
    assert table["effect"].abs().is_monotonic_decreasing and len(table) == int((run.f[last] > 0).sum())
    for row in table.head(4).itertuples():
        found = intervene(lm.layer(LAYER), sae, run, Intervention("scale feature", int(row.feature)))
        taken = before_cap(found.clean[token]) - before_cap(found.direct[token])
        assert row.effect == pytest.approx(float(taken), abs=1e-4)


def test_ranking_by_one_source(lm, sae):
    run = run_prompt(lm.layer(LAYER), sae, PROMPT)
    table = active_features(run, source=2)
    assert table["from source"].is_monotonic_decreasing and (table["from source"] > 0).all()
    assert len(table) > 3
    for row in table.head(5).itertuples():
        block, index = divmod(row.feature, run.features_per_block)
        sources = source_attribution(run, block, index, row.position)
        assert row._5 == pytest.approx(sources.loc[sources["source"] == 2, "dfa"].sum(), abs=1e-5)  # "from source"


def test_a_span_of_positions(lm, sae):
    run = run_prompt(lm.layer(LAYER), sae, PROMPT)
    table = active_features(run, span=(3, 5))
    assert set(table["position"]) <= {3, 4, 5}
    fires = (run.f[3:6] > 0).sum(0).flatten()
    assert sorted(table["feature"]) == fires.nonzero()[:, 0].tolist() and len(table) > 0
    assert table["firings"].tolist() == fires[table["feature"].tolist()].tolist()
    few = active_features(run, span=(3, 5), limit=2)
    assert few.groupby("head").size().max() <= 2
    assert few["feature"].tolist() == table.groupby("head").head(2)["feature"].tolist()
