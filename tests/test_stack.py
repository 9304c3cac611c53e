"""SAEs in training: stacked as alone, folded as trained, and a planted dictionary found by every recipe."""

import pytest
import torch
from torch.nn.functional import normalize

from trainer.config import TrainingConfig
from trainer.initialise import geometric_median, initial_params, input_scale
from trainer.recipes import SAEConfig
from trainer.stack import Stack, lr_factor

HEADS, WIDTH = 3, 8
SPARSITIES = {
    "april": [0.5, 3.0], "bricken": [0.5, 3.0], "gated": [0.5, 3.0], "jumprelu": [0.5, 3.0], "topk": [4, 9],
    "batchtopk": [4, 9],
}  # fmt: skip


def config(recipe, sparsity, **options) -> SAEConfig:
    key = "k" if recipe in ("topk", "batchtopk") else "l1_coefficient"
    return SAEConfig.resolve(**{"hook_layer": 0, "expansion_factor": 4, "recipe": recipe, key: sparsity} | options)


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
def test_a_batched_stack_equals_each_point_alone(recipe, scope):
    """All points in one matmul to float tolerance; taking turns, as on a CPU, to the bit."""
    rows = data()
    options = {"dead_after_tokens": 300}
    saes = [config(recipe, each, k_scope=scope, resample_fraction=0.25) for each in SPARSITIES[recipe]]
    batched, turns = build(saes, rows, together=True, **options), build(saes, rows, **options)
    alone = [build([sae], rows, **options) for sae in saes]
    for z in rows[: 30 * 64].split(64):
        for each in (batched, turns, *alone):
            each.update(z)
    for point, single in enumerate(alone):
        expected = dict(single.finished(0).named_parameters())
        for name, value in turns.finished(point).named_parameters():
            assert torch.equal(value, expected[name]), name
        for name, value in batched.finished(point).named_parameters():
            assert torch.allclose(value, expected[name], rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize("recipe", list(SPARSITIES))
@pytest.mark.parametrize("block", ["head", "dense"])
def test_folded_weights_on_raw_z_are_the_training_forward_on_scaled_z(recipe, block):
    """x_hat in raw units, and the same features active. batchtopk: where training's threshold was its average."""
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
        batch = stack.update(z)
    assert stack.unfired[1, 5] == 192
    figures, _ = stack.figures(0, batch)
    assert figures["dead_fraction_per_head"][1] == pytest.approx((stack.unfired[1] >= 128).float().mean().item())
    assert figures["dead_fraction_per_head"][1] >= 1 / 32


def test_dead_features_come_back_by_aux_k_and_by_resampling():
    rows = data(8192)
    for recipe, options in (("topk", {}), ("bricken", {"resample_fraction": 0.25})):
        for revive in (True, False):
            saes = [config(recipe, SPARSITIES[recipe][0], lr=1e-2, **options if revive else {"resample_fraction": 0.0})]
            stack = build(saes, rows, total_training_steps=120, dead_after_tokens=256 if revive else 10**9)
            stack.params["b_enc"][:, :8] -= 2.0
            for z in rows[: 120 * 64].split(64):
                stack.update(z)
            silent = (stack.unfired[:, :8] > 1500).float().mean()
            assert silent < 0.3 if revive else silent > 0.5, (recipe, revive, silent)


@pytest.mark.parametrize("recipe", list(SPARSITIES))
def test_a_planted_dictionary_is_recovered(recipe):
    """z_h = sum of a few of 32 known unit directions per head: training finds them, their L0 and a low FVU."""
    n_heads, d_head, planted, probability, steps = 3, 24, 32, 0.04, 2000
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


def test_the_reference_preset_is_what_the_reference_did():
    sae = SAEConfig.resolve(preset="reference", hook_layer=4, l1_coefficient=2.0)
    assert (sae.recipe, sae.block, sae.expansion_factor, sae.normalize) == ("april", "head", 32, "global")
    assert (sae.init, sae.b_dec_init, sae.decoder_norm) == ("linear", "linear", "free")
    assert (sae.lr, sae.beta2, sae.lr_warm_up_fraction, sae.lr_decay_fraction) == (5e-5, 0.999, 0.0, 0.0)
    assert (sae.sparsity_warm_up_fraction, sae.max_grad_norm, sae.resample_fraction) == (0.05, 1.0, 0.0)


def test_the_kissane_preset_is_a_dense_bricken():
    sae = SAEConfig.resolve(preset="kissane", hook_layer=5)
    assert (sae.recipe, sae.block, sae.decoder_norm, sae.beta2, sae.lr) == ("bricken", "dense", "unit", 0.99, 1.2e-3)
    assert sae.resample_fraction == 0.125 and sae.max_grad_norm == 0


def test_a_preset_can_be_changed_one_switch_at_a_time():
    sae = SAEConfig.resolve(preset="reference", hook_layer=4, normalize="per_head")
    assert (sae.normalize, sae.init, sae.lr) == ("per_head", "linear", 5e-5)
    other = SAEConfig.resolve(preset="reference", recipe="batchtopk", hook_layer=4)
    assert (other.recipe, other.k, other.l1_coefficient, other.normalize) == ("batchtopk", 32, None, "global")
