"""SAEs in training: stacked as alone, folded as trained, and a planted dictionary found by every recipe."""

import dataclasses

import pytest
import torch
from torch.nn.functional import normalize

from tests.helpers import decided
from tests.trainer.recipes.test_gradients import obvious_loss
from trainer import cli
from trainer.config import SAEConfig, TrainingConfig
from trainer.kernels import l1
from trainer.optimise.initialise import geometric_median, initial_params, input_scale
from trainer.optimise.stack import Stack, lr_factor

HEADS, WIDTH = 3, 8
SPARSITIES = {
    "april": [0.5, 3.0], "bricken": [0.5, 3.0], "gated": [0.5, 3.0], "jumprelu": [0.5, 3.0], "topk": [4, 9],
    "batchtopk": [4, 9],
}  # fmt: skip


def config(recipe, sparsity, **options) -> SAEConfig:
    key = "k" if recipe in ("topk", "batchtopk") else "l1_coefficient"
    return decided(**{"hook_layer": 0, "expansion_factor": 4, "recipe": recipe, key: sparsity} | options)


def build(saes, rows, together=None, n_features=None, **training) -> Stack:
    scale = input_scale(rows, saes[0].normalize)
    if saes[0].block == "dense":
        scale = scale.view(1, -1)
    x = rows.reshape(len(rows), *scale.shape) * scale
    n_features = n_features or scale.shape[1] * saes[0].expansion_factor
    params = [initial_params(sae, x, n_features, torch.Generator().manual_seed(0)) for sae in saes]
    cfg = TrainingConfig(**{"total_training_steps": 30, "batch_size": 64} | training)
    return Stack(saes, params, scale, cfg, together)


def data(n=4096):
    """Heads of very different size, off centre."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(n, HEADS, 2 * WIDTH, generator=generator).relu()
    mixed = torch.einsum("nhi,hio->nho", mixed, torch.randn(HEADS, 2 * WIDTH, WIDTH, generator=generator))
    return (mixed + torch.randn(HEADS, WIDTH, generator=generator)) * torch.tensor([1.0, 0.1, 5.0])[:, None]


@pytest.mark.parametrize("recipe", list(SPARSITIES))
@pytest.mark.parametrize("scope", ["layer", "head"])
def test_a_batched_stack_equals_each_point_alone(recipe, scope, float64):
    """All points in one matmul, and taking turns as on a CPU.

    Not to the bit: how a sum rounds depends on the shapes and on the processor.
    """
    rows = data()
    options = {"dead_after_tokens": 300}
    revive = {"resample_fraction": 0.25} if recipe == "bricken" else {}
    saes = [config(recipe, each, k_scope=scope, **revive) for each in SPARSITIES[recipe]]
    batched, turns = build(saes, rows, together=True, **options), build(saes, rows, **options)
    alone = [build([sae], rows, **options) for sae in saes]
    for z in rows[: 30 * 64].split(64):
        for each in (batched, turns, *alone):
            each.update(z)
    for point, single in enumerate(alone):
        expected = dict(single.finished(0).named_parameters())
        for stack in (turns, batched):
            for name, value in stack.finished(point).named_parameters():
                assert torch.allclose(value, expected[name], rtol=1e-7, atol=1e-9), name


@pytest.mark.parametrize("recipe", list(SPARSITIES))
@pytest.mark.parametrize("block", ["head", "dense"])
def test_folded_weights_on_raw_z_are_the_training_forward_on_scaled_z(recipe, block, float64):
    """x_hat in raw units, and the same features active. batchtopk: where training's threshold was its average.

    In float64, where no pre-activation is so near its threshold that rounding decides.
    """
    rows = data()
    stack = build([config(recipe, SPARSITIES[recipe][1], block=block)], rows)
    for z in rows[: 29 * 64].split(64):
        stack.update(z)
    sae, z = stack.finished(0), rows[-64:]
    if recipe == "batchtopk":
        before = stack.threshold.clone()
        smallest = stack._guess.clone()
        assert (before > 0).all()
        f = sae.encode(z)
        # The threshold of use, in trained units, is the running mean of the smallest activations kept.
        x = (z.reshape(64, *stack.scale.shape) * stack.scale).transpose(0, 1)
        pre = torch.bmm(x, stack.params["W_enc"]) + stack.params["b_enc"][:, None]
        assert torch.equal(f > 0, (pre > before).transpose(0, 1))
        stack.update(z)
        expected = before + (20 / 30) * (stack._guess / 0.9 - before)
        assert torch.allclose(stack.threshold, expected) and not torch.equal(smallest, stack._guess)
        return
    out = stack._gradients(slice(0, 1), (z.reshape(64, *stack.scale.shape) * stack.scale).transpose(0, 1).contiguous())
    error = (out.error.transpose(0, 1) / stack.scale).reshape(z.shape)
    assert torch.allclose(sae(z) - z, error, atol=2e-4)
    assert torch.equal((sae.encode(z) > 0).sum(0), out.fired.long())


@pytest.mark.parametrize("recipe", ["bricken", "gated", "topk", "batchtopk"])
def test_decoder_rows_keep_norm_1_after_the_step(recipe):
    rows = data()
    stack = build([config(recipe, SPARSITIES[recipe][1], lr=0.1)], rows)
    for z in rows[: 10 * 64].split(64):
        before = stack.params["W_dec"].clone()
        stack.update(z)
        assert torch.allclose(stack.params["W_dec"].norm(dim=-1), torch.ones(()), atol=1e-6)
        assert not torch.equal(stack.params["W_dec"], before)
    free = build([config(recipe, SPARSITIES[recipe][1], lr=0.1, decoder_norm="free")], rows)
    free.update(z)
    assert (free.params["W_dec"].norm(dim=-1) - 1).abs().max() > 1e-3


def test_each_point_is_clipped_by_its_own_norm():
    rows = data()
    stack = build([config("april", 0.5), config("april", 300.0)], rows)
    grads = {name: torch.ones_like(value) for name, value in stack.params.items()}
    for grad in grads.values():
        grad[HEADS:] *= 1e-4
    norms = stack._clip(grads)
    after = torch.stack([grad.view(2, -1).pow(2).sum(1) for grad in grads.values()]).sum(0).sqrt()
    assert norms[0] > 10 and after[0].item() == pytest.approx(1, abs=1e-4)
    assert norms[1] < 1 and torch.allclose(after[1], norms[1])


def test_dead_features_are_counted_in_tokens_since_they_fired():
    rows = data()
    stack = build([config("april", 0.0)], rows, dead_after_tokens=128)
    stack.params["b_enc"][1, 5] = -1e4
    for z in rows[: 3 * 64].split(64):
        stack.update(z)
    assert stack.unfired[1, 5] == 192
    figures, _ = stack.figures(0)
    assert figures["dead_fraction_per_head"][1] == pytest.approx((stack.unfired[1] >= 128).float().mean().item())
    assert figures["dead_fraction_per_head"][1] >= 1 / 32


def test_dead_features_come_back_by_aux_k_and_by_resampling():
    rows = data(8192)
    for recipe, options in (("topk", {}), ("bricken", {"resample_fraction": 0.25})):
        for revive in (True, False):
            saes = [
                config(recipe, SPARSITIES[recipe][0], lr=1e-2, **(options if revive else {"resample_fraction": 0.0}))
            ]
            stack = build(saes, rows, total_training_steps=120, dead_after_tokens=256 if revive else 10**9)
            stack.params["b_enc"][:, :8] -= 2.0
            for z in rows[: 120 * 64].split(64):
                stack.update(z)
            silent = (stack.unfired[:, :8] > 1500).float().mean()
            assert silent < 0.3 if revive else silent > 0.5, (recipe, revive, silent)


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(recipe, marks=[] if recipe == "batchtopk" else pytest.mark.slow) for recipe in SPARSITIES],
)
def test_a_planted_dictionary_is_recovered(recipe):
    """z_h = sum of a few of 32 known unit directions per head: training finds them, their L0 and a low FVU."""
    n_heads, d_head, planted, probability, steps = 3, 24, 32, 0.04, 1000 if recipe == "batchtopk" else 2000
    generator = torch.Generator().manual_seed(0)
    directions = normalize(torch.randn(n_heads, planted, d_head, generator=generator), dim=-1)

    def sample(n):
        on = torch.rand(n, n_heads, planted, generator=generator) < probability
        strength = on * (0.5 + torch.rand(n, n_heads, planted, generator=generator))
        return torch.einsum("nhf,hfd->nhd", strength, directions), on

    sparsity = {"april": 2.0, "bricken": 2.0, "gated": 4.0, "jumprelu": 2.0, "topk": 4, "batchtopk": 4}[recipe]
    z, _ = sample(8192)
    sae = config(recipe, sparsity, lr=3e-3)
    stack = build([sae], z, n_features=planted, total_training_steps=steps, batch_size=512, dead_after_tokens=20_000)
    for _ in range(steps):
        stack.update(sample(512)[0])
    folded = stack.finished(0)
    cosine = torch.einsum("hpd,hfd->hpf", directions, normalize(folded.W_dec, dim=-1))
    assert cosine.amax(-1).mean() > 0.9
    z, on = sample(4096)
    f = folded.encode(z)
    fvu = (folded(z) - z).pow(2).sum() / (z - z.mean(0)).pow(2).sum()
    assert fvu < (0.12 if recipe == "topk" else 0.1)  # 4 for every token, where the planted number varies
    l0, planted_l0 = ((each > 0).sum((1, 2)).float().mean().item() for each in (f, on))
    assert l0 == pytest.approx(planted_l0, rel=0.35)  # L1 leaves a haze of weak firings: 5.0 for 3.8


@pytest.mark.parametrize("n_features", [32, 256])
@pytest.mark.parametrize("recipe", ["april", "bricken"])
def test_initialisation_reconstructs_at_the_scale_of_the_data(recipe, n_features):
    torch.manual_seed(0)
    z = 5 * torch.randn(4, 16) + torch.randn(2000, 4, 16)
    sae = build([config(recipe, 1.0)], z, n_features=n_features).finished(0)
    mean = z.mean(0)
    slope = ((sae(z) - mean) * (z - mean)).sum() / (z - mean).pow(2).sum()
    assert slope.item() == pytest.approx(1, abs=0.15)


def test_linear_initialisation_is_that_of_nn_linear():
    params = initial_params(config("april", 1.0, init="linear", b_dec_init="linear"), data(), 32, torch.Generator())
    for name, bound in (("W_enc", 8**-0.5), ("b_enc", 8**-0.5), ("W_dec", 32**-0.5), ("b_dec", 32**-0.5)):
        assert 0.85 * bound < params[name].abs().max() <= bound, name


def test_decoder_bias_choices():
    rows = data()
    rows[0] += 1e5  # an outlier moves the mean, not the geometric median
    biases = {kind: initial_params(config("april", 1.0, b_dec_init=kind), rows, 32, torch.Generator())["b_dec"]
              for kind in ("mean", "zeros", "geometric_median")}  # fmt: skip
    assert torch.allclose(biases["mean"], rows.mean(0)) and not biases["zeros"].any()
    assert (
        (biases["geometric_median"] - rows[1:].mean(0)).abs().max()
        < 5
        < (biases["mean"] - rows[1:].mean(0)).abs().max()
    )
    square = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])[:, None]
    assert torch.allclose(geometric_median(square), torch.ones(1, 2), atol=1e-4)


def test_schedules():
    factors = [lr_factor(step, 100, 0.1, 0.2) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1 and factors[80] == 1
    assert factors[90] == pytest.approx(0.5) and factors[99] == pytest.approx(0.05)
    assert lr_factor(0, 100, 0.0, 0.0) == 1


PRESETS = {
    "reference": {
        "recipe": "april", "block": "head", "expansion_factor": 32, "l1_coefficient": 2.0, "normalize": "global",
        "init": "linear", "b_dec_init": "linear", "decoder_norm": "free", "lr": 5e-5, "beta2": 0.999,
        "lr_warm_up_fraction": 0.0, "lr_decay_fraction": 0.0, "sparsity_warm_up_fraction": 0.05, "max_grad_norm": 1.0,
        "resample_fraction": 0.0,
    },
    "kissane": {
        "recipe": "bricken", "block": "dense", "expansion_factor": 32, "l1_coefficient": 2.0, "normalize": "none",
        "init": "transpose", "b_dec_init": "zeros", "decoder_norm": "unit", "lr": 1.2e-3, "beta2": 0.99,
        "lr_warm_up_fraction": 0.0, "lr_decay_fraction": 0.2, "sparsity_warm_up_fraction": 0.05, "max_grad_norm": 0.0,
        "resample_fraction": 0.125,
    },
}  # fmt: skip


@pytest.mark.parametrize("preset", list(PRESETS))
def test_presets_are_pinned(preset):
    found = dataclasses.asdict(decided(preset=preset, hook_layer=4))
    irrelevant = {"k": None, "k_scope": "layer", "label": None}
    assert found == PRESETS[preset] | irrelevant | {"preset": preset, "hook_layer": 4}


def test_a_preset_can_be_changed_one_switch_at_a_time():
    sae = decided(preset="reference", hook_layer=4, normalize="per_head")
    assert (sae.normalize, sae.init, sae.lr) == ("per_head", "linear", 5e-5)
    other = decided(preset="reference", recipe="batchtopk", hook_layer=4)
    assert (other.recipe, other.k, other.l1_coefficient, other.normalize) == ("batchtopk", 32, None, "global")
    assert other.decoder_norm == "unit", "what makes the recipe stays"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "topk", "k": "a"}, "points: k cannot be 'a'"),
        ({"recipe": "topk", "k": 2.5}, "points: k cannot be 2.5"),
        ({"recipe": "topk", "k": True}, "points: k cannot be True"),
        ({"recipe": "topk", "lr": "fast"}, "points: lr cannot be 'fast'"),
        ({"recipe": "topk", "normalize": "perhead"}, "points: normalize cannot be 'perhead'"),
        ({"recipe": "topk", "block": "Dense"}, "points: block cannot be 'Dense'"),
        ({"recipe": "topk", "label": [1]}, "points: label cannot be"),
        ({"recipe": "bogus"}, "points: recipe cannot be 'bogus'"),
        ({"preset": "bogus"}, "points: preset cannot be 'bogus'"),
        ({"recipe": "april", "l1_coefficients": []}, "name at least one"),
        ({"recipe": "april", "resample_fraction": 0.1}, "april has no resample_fraction"),
        ({"recipe": "bricken", "resample_fraction": 0.3}, "between 0 and 0.25"),
        ({"preset": "reference", "k": 3}, "april has no k"),
        ({"depth": 3}, "unknown option depth"),
    ],
)
def test_a_wrong_point_of_a_sweep_is_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        cli.build({"points": [options]})
    with pytest.raises(ValueError, match="points is empty"):
        cli.build({"points": []})


@pytest.mark.parametrize(
    ("recipe", "options", "training", "split"),
    [
        ("bricken", {"resample_fraction": 0.25}, {"total_training_steps": 200, "dead_after_tokens": 300}, 52),
        pytest.param(
            *("bricken", {"resample_fraction": 0.25}, {"total_training_steps": 200, "dead_after_tokens": 300}, 99),
            marks=pytest.mark.slow,
        ),
        ("topk", {}, {"total_training_steps": 60, "dead_after_tokens": 200}, 30),
        ("batchtopk", {}, {"total_training_steps": 60, "dead_after_tokens": 200}, 30),
        ("april", {}, {"total_training_steps": 40}, 20),
        ("jumprelu", {}, {"total_training_steps": 40}, 20),
        ("gated", {}, {"total_training_steps": 40}, 20),
    ],
)
def test_the_saved_state_is_all_that_matters(recipe, options, training, split, monkeypatch):
    """Stopped anywhere and built anew from its states, a stack ends with the same weights to the bit."""
    monkeypatch.setattr("trainer.kernels.l1.SPARSE_BELOW", 0.5)  # april crosses it: the path depends on the state
    rows = data(training["total_training_steps"] * 64)
    saes = [config(recipe, each, lr=5e-3, **options) for each in SPARSITIES[recipe]]
    whole, first = (build(saes, rows[:500], **training) for _ in range(2))
    for stack in (whole, first):  # some features are silent, so that reviving them is part of it
        stack.params["b_enc"][:, :4] -= 2.0
    batches = rows.split(64)
    for z in batches:
        whole.update(z)
    for z in batches[:split]:
        first.update(z)
    states = [{name: value.clone() for name, value in sorted(first.state(p).items())} for p in range(2)]
    params = [{name: state[name] for name in reversed(state) if name in first.params} for state in states]
    second = Stack(saes, params, states[0]["scale"], first.training)
    second.load_states(split, states)
    for z in batches[split:]:
        second.update(z)
    for name, value in whole.params.items():
        assert torch.equal(second.params[name], value), name
    assert torch.equal(second.unfired, whole.unfired) and torch.equal(second.threshold, whole.threshold)


@pytest.mark.parametrize("recipe", ["april", "bricken"])
def test_the_sparse_path_trains_the_same_sae(recipe, monkeypatch):
    rows = data()
    found, paths = [], []
    monkeypatch.setattr(l1, "_sparse", lambda *a, original=l1._sparse: paths.append("sparse") or original(*a))
    for below in (0.0, 1.1):
        monkeypatch.setattr("trainer.kernels.l1.SPARSE_BELOW", below)
        stack = build([config(recipe, each, lr=5e-3) for each in SPARSITIES[recipe]], rows)
        for z in rows[: 30 * 64].split(64):
            stack.update(z)
        found.append(stack.params)
        assert len(paths) == (0 if below == 0 else 60)
    for name, value in found[0].items():
        assert torch.allclose(value, found[1][name], rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize("recipe", ["april", "bricken", "gated", "jumprelu"])
def test_the_logged_loss_is_the_loss(recipe):
    """Halfway through the warm-up of the coefficient, in float64 by the obvious path."""
    rows = data()
    sae = config(recipe, SPARSITIES[recipe][1], sparsity_warm_up_fraction=1.0)
    stack = build([sae], rows)
    for z in rows[: 14 * 64].split(64):
        stack.update(z)
    params = {name: value.double() for name, value in stack.params.items()}
    z = rows[-64:]
    x = ((z * stack.scale).transpose(0, 1)).double()
    coefficient = torch.full((HEADS,), sae.l1_coefficient * 14 / 30, dtype=torch.float64)
    expected, _ = obvious_loss(recipe, params, x, coefficient)
    stack.update(z)
    figures, _ = stack.figures(0)
    assert figures["loss"] == pytest.approx(expected.item(), rel=1e-4)
