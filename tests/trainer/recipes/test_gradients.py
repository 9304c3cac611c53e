"""Hand-written gradients against autograd in float64 on the obvious path: dense block-diagonal matrices."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import ROOT
from trainer.kernels import dense, sparse
from trainer.optimise.revive import aux_k, resample
from trainer.recipes import RECIPES as ALL
from trainer.recipes import jumprelu
from trainer.recipes.recipe import Step

HEADS, WIDTH, FEATURES, BATCH = 3, 5, 12, 40
RECIPES = ["april", "bricken", "gated", "jumprelu"]


def problem(recipe: str, points: int = 1, seed: int = 0):
    """Random parameters, inputs and coefficients, with features on and off."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    blocks = points * HEADS
    params = {
        "W_enc": 0.4 * normal(blocks, WIDTH, FEATURES),
        "b_enc": 0.3 * normal(blocks, FEATURES),
        "W_dec": 0.5 * normal(blocks, FEATURES, WIDTH),
        "b_dec": 0.2 * normal(blocks, WIDTH),
    }
    if recipe == "gated":
        params |= {"r_mag": 0.3 * normal(blocks, FEATURES), "b_mag": 0.3 * normal(blocks, FEATURES)}
    if recipe == "jumprelu":
        params["log_threshold"] = 0.5 * normal(blocks, FEATURES) - 1
    x = normal(HEADS, BATCH, WIDTH)
    coefficient = torch.rand(points, generator=generator, dtype=torch.float64).repeat_interleave(HEADS)
    return params, x, coefficient


class Jump(torch.autograd.Function):
    """pre where pre > e^t, with the straight-through gradient as Anthropic (January 2025) states it."""

    @staticmethod
    def forward(ctx, pre, t):
        ctx.save_for_backward(pre, t)
        return torch.where(pre > t.exp(), pre, 0.0)

    @staticmethod
    def backward(ctx, df):
        pre, t = ctx.saved_tensors
        near = ((pre - t.exp()).abs() / jumprelu.BANDWIDTH < 0.5).to(df.dtype)
        return df * (pre > t.exp()), -(t.exp() / jumprelu.BANDWIDTH * near * df).sum(0)


def obvious_loss(recipe, params, x, coefficient, active=None):
    """The loss of one point on the concatenated heads, with torch.block_diag."""
    W_enc, W_dec = (torch.block_diag(*params[name]) for name in ("W_enc", "W_dec"))
    b_enc, b_dec = params["b_enc"].flatten(), params["b_dec"].flatten()
    flat = x.transpose(0, 1).flatten(1)
    norm = W_dec.norm(dim=1)
    penalty = 0.0
    weight = coefficient[0]
    if recipe == "gated":
        s = (flat - b_dec) @ W_enc
        gate = (s + b_enc).relu()
        f = (gate > 0) * (s * params["r_mag"].flatten().exp() + params["b_mag"].flatten()).relu()
        frozen = gate @ W_dec.detach() + b_dec.detach()
        penalty = weight * gate.sum(1).mean() + (flat - frozen).pow(2).sum(1).mean()
    elif recipe == "jumprelu":
        t = params["log_threshold"].flatten()
        pre = flat @ W_enc + b_enc
        f = Jump.apply(pre, t)
        penalty = weight * torch.tanh(jumprelu.TANH_SCALE * f * norm).sum(1).mean()
        penalty += jumprelu.PRE_ACTIVATION_COEFFICIENT * ((t.exp() - pre).relu() * norm).sum(1).mean()
    else:
        f = (((flat - b_dec) if recipe == "bricken" else flat) @ W_enc + b_enc).relu()
        if active is not None:
            f = f * active
        penalty = weight * (f * (norm if recipe == "april" else 1.0)).sum(1).mean()
    return (f @ W_dec + b_dec - flat).pow(2).sum(1).mean() + penalty, f


def step_of(coefficient, active_share=1.0, k=(0,), over_layer=True) -> Step:
    groups = torch.zeros(len(k) if over_layer else len(coefficient), dtype=torch.float64)
    return Step(coefficient, tuple(k), over_layer, active_share, groups, groups + torch.nan, 1.0)


def of_point(each, point):
    return {name: value[point * HEADS : (point + 1) * HEADS] for name, value in each.items()}


def check(out, recipe, params, x, coefficient, points, active=None):
    for point in range(points):
        leaves = {name: value.clone().requires_grad_() for name, value in of_point(params, point).items()}
        lam = coefficient[point * HEADS : (point + 1) * HEADS]
        loss, f = obvious_loss(recipe, leaves, x, lam, active)
        loss.backward()
        for name, leaf in leaves.items():
            assert torch.allclose(of_point(out.grads, point)[name], leaf.grad, atol=1e-12), (name, point)
        blocks = slice(point * HEADS, (point + 1) * HEADS)
        terms = {name: term[blocks].sum() for name, term in out.terms.items()}
        weights = ALL[recipe].weights
        ours = out.error[blocks].pow(2).sum() / BATCH + sum(
            weights.get(name, lam[0]) * term for name, term in terms.items()
        )
        assert torch.allclose(ours, loss, atol=1e-12)
        assert torch.equal(out.fired[blocks].flatten(), (f > 0).sum(0).to(out.fired.dtype))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("points", [1, 2])
@pytest.mark.parametrize("tile", [7, 512])
@pytest.mark.parametrize("together", [False, True])
def test_dense_gradients(recipe, points, tile, together, monkeypatch):
    """Tile by tile as on a CPU, and everything in one batched matmul as on a GPU."""
    monkeypatch.setattr(dense, "_TILE_ROWS", tile)
    if together:
        monkeypatch.setattr(dense, "in_tiles", lambda x: False)
    params, x, coefficient = problem(recipe, points)
    check(ALL[recipe].gradients(params, x, step_of(coefficient)), recipe, params, x, coefficient, points)


@settings(max_examples=25, deadline=None)
@given(
    recipe=st.sampled_from(["april", "bricken"]),
    points=st.integers(1, 3),
    seed=st.integers(0, 1000),
    shift=st.floats(-3, 1),
)
def test_sparse_gradients_are_the_dense_ones(recipe, points, seed, shift):
    """From no active feature at all to most of them."""
    params, x, coefficient = problem(recipe, points, seed)
    params["b_enc"] += shift
    few, all_ = (ALL[recipe].gradients(params, x, step_of(coefficient, share)) for share in (0.0, 1.0))
    assert torch.allclose(few.error, all_.error, atol=1e-12) and torch.equal(few.fired, all_.fired)
    assert torch.allclose(few.terms["l1"], all_.terms["l1"], atol=1e-12)
    for name, grad in all_.grads.items():
        assert torch.allclose(few.grads[name], grad, atol=1e-12), name


def dense_mask(active, points):
    mask = torch.zeros(points * HEADS, BATCH, FEATURES)
    mask[active.bag // BATCH, active.bag % BATCH, active.feature % FEATURES] = 1
    assert torch.equal(active.bag // BATCH, active.feature // FEATURES), "a feature belongs to the block of its bag"
    assert (active.bag.diff() >= 0).all()
    return mask


@pytest.mark.parametrize("points", [1, 2])
@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("tile", [1, 2**20])
def test_top_k_is_that_of_the_sorted_activations(points, layer, tile, monkeypatch):
    monkeypatch.setattr(sparse, "_TILE", tile)
    params, x, _ = problem("topk", points)
    k = torch.tensor([3, 5][:points])
    active = sparse.top_k(params, x, k, layer)
    mask = dense_mask(active, points)
    pre = torch.einsum("hbw,phwf->phbf", x, params["W_enc"].view(points, HEADS, WIDTH, FEATURES))
    pre = pre + params["b_enc"].view(points, HEADS, 1, FEATURES)
    for point in range(points):
        rows = pre[point].transpose(0, 1)  # [token, head, feature]
        rows = rows.flatten(1)[:, None] if layer else rows
        limit = rows.sort(-1, descending=True).values[..., k[point] - 1, None].clamp_min(0)
        expected = ((rows >= limit) & (rows > 0)).view(BATCH, HEADS, FEATURES).transpose(0, 1)
        assert torch.equal(mask.view(points, HEADS, BATCH, FEATURES)[point], expected.float())
    # Gradients on those features are those of the loss with the mask held fixed.
    out = sparse.gradients(params, x, active)
    for point in range(points):
        fixed = mask.view(points, HEADS, BATCH, FEATURES)[point].transpose(0, 1).flatten(1)
        leaves = {name: value.clone().requires_grad_() for name, value in of_point(params, point).items()}
        loss, _ = obvious_loss("april", leaves, x, torch.zeros(HEADS, dtype=torch.float64), fixed)
        loss.backward()
        for name, leaf in leaves.items():
            assert torch.allclose(of_point(out.grads, point)[name], leaf.grad, atol=1e-12), name


@pytest.mark.parametrize("recipe", ["topk", "batchtopk"])
@pytest.mark.parametrize("k", [(3, 5), (34, 4)])
@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("guess", [float("nan"), 0.5, 50.0])
def test_selecting_all_at_once_as_on_a_gpu_gives_the_same_step(recipe, k, layer, guess, monkeypatch):
    """Where more are asked for than are positive, too."""
    k = k if layer else tuple(min(each, FEATURES) for each in k)
    params, x, coefficient = problem(recipe, 2)
    params["b_enc"] -= 0.5
    found = []
    for in_tiles in (True, False):
        monkeypatch.setattr(dense, "in_tiles", lambda x, answer=in_tiles: answer)
        step = step_of(coefficient, k=k, over_layer=layer)
        step.guess.fill_(guess)
        found.append((ALL[recipe].gradients(params, x, step), step))
    (few, one), (all_, other) = found
    assert torch.equal(few.fired, all_.fired) and torch.allclose(few.error, all_.error, atol=1e-12)
    for name, grad in few.grads.items():
        assert torch.allclose(all_.grads[name], grad, atol=1e-12), name
    assert torch.allclose(one.threshold, other.threshold) and torch.equal(one.guess.isnan(), other.guess.isnan())


COMPILE = """
import torch
from tests.trainer.recipes.test_gradients import ALL, RECIPES, problem, step_of
from trainer.kernels import dense
dense.in_tiles = lambda x: False
for recipe in [*RECIPES, "topk", "batchtopk"]:
    params, x, coefficient = problem(recipe, 2)
    expected = ALL[recipe].gradients(params, x, step_of(coefficient, k=(3, 5)))
    options = {"backend": "eager", "dynamic": False, "fullgraph": recipe != "batchtopk"}
    found = torch.compile(ALL[recipe].gradients, **options)(params, x, step_of(coefficient, k=(3, 5)))
    for name, grad in expected.grads.items():
        assert torch.allclose(found.grads[name], grad, atol=1e-12), (recipe, name)
"""


@pytest.mark.slow
def test_torch_compile_can_follow_the_whole_step_of_a_gpu():
    """Without a graph break, but for batchtopk, which waits for the number of candidates. In a process of its own,
    where the checks of shapes, which it cannot follow, are not installed."""
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("n", [12, 64, 512, 1024])
@pytest.mark.parametrize("k", [1, 4, 12])
def test_top_of_rows_is_topk(n, k):
    x = torch.randn(2, 9, n)
    value, index = sparse.top_of_rows(x, k)
    assert torch.equal(value, x.topk(k).values) and torch.equal(x.gather(-1, index), value)


@pytest.mark.parametrize("scope", ["layer", "head"])
@pytest.mark.parametrize("guess", [0.0, 0.5, 5.0])
def test_batch_top_k_does_not_depend_on_the_guess(scope, guess):
    points = 2
    params, x, _ = problem("batchtopk", points)
    groups = points if scope == "layer" else points * HEADS
    counts = torch.tensor([2 * BATCH, 4 * BATCH]).repeat_interleave(groups // points)
    active, smallest = sparse.batch_top_k(params, x, counts, torch.full((groups,), guess, dtype=torch.float64))
    mask = dense_mask(active, points).view(groups, -1)
    pre = torch.einsum("hbw,phwf->phbf", x, params["W_enc"].view(points, HEADS, WIDTH, FEATURES))
    pre = (pre + params["b_enc"].view(points, HEADS, 1, FEATURES)).reshape(groups, -1).relu()
    for group, count in enumerate(counts.tolist()):
        kept = pre[group].topk(count).indices[pre[group].topk(count).values > 0]
        assert set(mask[group].nonzero()[:, 0].tolist()) == set(kept.tolist())
        assert smallest[group].item() == pytest.approx(pre[group][kept].min().item())


def test_batch_top_k_keeps_what_is_positive_where_the_budget_exceeds_it():
    params, x, _ = problem("batchtopk")
    params["b_enc"] -= 1.5
    active, smallest = sparse.batch_top_k(params, x, torch.tensor([BATCH * HEADS * FEATURES]), torch.tensor([2.0]))
    pre = torch.einsum("hbw,hwf->hbf", x, params["W_enc"]) + params["b_enc"][:, None]
    assert len(active.bag) == (pre > 0).sum()
    assert smallest.item() == pytest.approx(pre[pre > 0].min().item())
    params["b_enc"] -= 100
    active, smallest = sparse.batch_top_k(params, x, torch.tensor([5]), torch.tensor([0.1]))
    assert len(active.bag) == 0 and smallest == 0
    assert sparse.gradients(params, x, active).grads["W_enc"].abs().sum() == 0


def test_aux_k_trains_only_dead_features():
    """Against autograd on every feature with the living ones masked."""
    params, x, _ = problem("topk", 2)
    dead = torch.rand(2 * HEADS, FEATURES, generator=torch.Generator().manual_seed(3)) < 0.4
    dead[1] = False
    error = torch.randn(2 * HEADS, BATCH, WIDTH, dtype=torch.float64)
    grads, term = aux_k(params, x, error, dead, 2)
    leaves = {name: params[name].clone().requires_grad_() for name in ("W_enc", "b_enc", "W_dec")}
    pre = torch.einsum("hbw,hwf->hbf", x.repeat(2, 1, 1), leaves["W_enc"]) + leaves["b_enc"][:, None]
    top = pre.masked_fill(~dead[:, None], float("-inf")).topk(WIDTH // 2, dim=-1)
    f = torch.zeros_like(pre).scatter(-1, top.indices, top.values.nan_to_num(neginf=0.0))
    e_hat = f @ leaves["W_dec"]
    residual = -error
    losses = []
    for point in range(2):
        blocks = slice(point * HEADS, (point + 1) * HEADS)
        variance = residual[blocks].var(1, correction=0).sum() / x.var(1, correction=0).sum()
        losses.append((residual[blocks] - e_hat[blocks]).pow(2).sum() / BATCH / variance / 32)
    sum(losses).backward()
    assert torch.allclose(term, torch.stack(losses))
    for name, leaf in leaves.items():
        assert torch.allclose(grads[name], leaf.grad, atol=1e-12), name
    assert not grads["b_enc"][~dead].any()


def test_resampling_changes_only_dead_features_and_their_moments():
    params, x, _ = problem("bricken")
    dead = torch.zeros(HEADS, FEATURES, dtype=torch.bool)
    dead[0, 2] = dead[0, 7] = dead[2, 1] = True
    error = torch.zeros(HEADS, BATCH, WIDTH, dtype=torch.float64)
    error[0, 11] = error[2, 30] = 1.0  # the only inputs with a loss
    before = {name: value.clone() for name, value in params.items()}
    moments = [{name: torch.ones_like(value) for name, value in params.items()} for _ in range(2)]
    resample(params, moments, x, error, dead, torch.Generator().manual_seed(0))
    for each, was in [(params, before), *((m, {name: torch.ones_like(v) for name, v in m.items()}) for m in moments)]:
        assert torch.equal(each["W_dec"][~dead], was["W_dec"][~dead])
        assert torch.equal(each["W_enc"].mT[~dead], was["W_enc"].mT[~dead])
        assert torch.equal(each["b_enc"][~dead], was["b_enc"][~dead]) and torch.equal(each["b_dec"], was["b_dec"])
    for each in moments:
        assert not each["W_dec"][dead].any() and not each["W_enc"].mT[dead].any() and not each["b_enc"][dead].any()
    direction = torch.nn.functional.normalize(x[0, 11] - params["b_dec"][0], dim=-1)
    assert torch.allclose(params["W_dec"][0, 2], direction)
    alive = before["W_enc"][0][:, ~dead[0]].norm(dim=0).mean()
    assert torch.allclose(params["W_enc"][0, :, 2], 0.2 * alive * direction)
    assert params["b_enc"][0, 2] == 0
