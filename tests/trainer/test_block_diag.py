"""BlockDiagSAE against the obvious path: dense matrices from torch.block_diag, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.block_diag import BlockDiagSAE


def random_sae(n_heads, d_head, features, k=None, seed=0, scope="head", activation=None) -> BlockDiagSAE:
    activation = activation or ("relu" if k is None else "topk")
    sae = BlockDiagSAE(n_heads, d_head, features, activation, k, scope).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return sae


def obvious(sae: BlockDiagSAE, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations and reconstruction by dense block-diagonal matrices."""
    W_enc, W_dec = torch.block_diag(*sae.W_enc), torch.block_diag(*sae.W_dec)
    pre = z.flatten(-2) @ W_enc + sae.b_enc.flatten()
    f = pre.relu()
    if sae.activation == "jumprelu":
        f = f * (pre > sae.threshold.flatten())
    if sae.activation == "topk":
        rows = pre.unflatten(-1, sae.b_enc.shape) if sae.k_scope == "head" else pre[..., None, :]
        kth = rows.sort(-1, descending=True).values[..., sae.k - 1, None]
        f = (rows * (rows >= kth)).relu().flatten(-2)
    return f, (f @ W_dec + sae.b_dec.flatten()).unflatten(-1, sae.b_dec.shape)


@settings(max_examples=40, deadline=None)
@given(
    n_heads=st.integers(1, 5),
    d_head=st.integers(1, 6),
    features=st.integers(1, 9),
    batch=st.sampled_from([(), (1,), (7,), (2, 3)]),
    activation=st.sampled_from(["relu", "jumprelu", "topk"]),
    scope=st.sampled_from(["head", "layer"]),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients_equal_the_dense_block_diagonal(n_heads, d_head, features, batch, activation, scope, seed):
    k = 1 + seed % features if activation == "topk" else None
    sae = random_sae(n_heads, d_head, features, k, seed, scope, activation)
    z = torch.randn(*batch, n_heads, d_head, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    f_dense, z_hat_dense = obvious(sae, z)
    assert torch.allclose(sae.encode(z).flatten(-2), f_dense, atol=1e-12)
    assert sae(z).shape == z.shape
    assert torch.allclose(sae(z), z_hat_dense, atol=1e-12)

    def gradients(z_hat):
        return torch.autograd.grad((z_hat - z).pow(2).sum(), list(sae.parameters()), allow_unused=True)

    for ours, theirs in zip(gradients(sae(z)), gradients(obvious(sae, z)[1]), strict=True):
        assert (ours is None and theirs is None) or torch.allclose(ours, theirs, atol=1e-10)


@pytest.mark.parametrize("k", [None, 2])
def test_gradcheck(k):
    sae = random_sae(3, 4, 5, k)
    z = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    names, values = zip(*sae.named_parameters(), strict=True)

    def loss(z, *parameters):
        f = torch.func.functional_call(sae, dict(zip(names, parameters, strict=True)), (z,))
        return (f - z).pow(2).sum()

    assert torch.autograd.gradcheck(loss, (z, *values))


def test_a_dense_sae_is_one_block_over_flattened_heads():
    dense = random_sae(1, 12, 20)
    z = torch.randn(5, 3, 4, dtype=torch.float64)
    flat = z.flatten(1)
    f = (flat @ dense.W_enc[0] + dense.b_enc[0]).relu()
    assert torch.allclose(dense.encode(z)[:, 0], f)
    assert torch.allclose(dense(z).flatten(1), f @ dense.W_dec[0] + dense.b_dec[0])
    assert dense(z).shape == z.shape


def test_no_feature_reads_or_writes_another_head():
    sae = random_sae(3, 4, 6)
    z = torch.randn(1, 3, 4, dtype=torch.float64)
    other = z.clone()
    other[:, 1] += 1
    same = [0, 2]
    assert torch.equal(sae.encode(z)[:, same], sae.encode(other)[:, same])
    assert torch.equal(sae(z)[:, same], sae(other)[:, same])
    assert not torch.equal(sae(z)[:, 1], sae(other)[:, 1])


def test_topk_keeps_at_most_k_per_head_and_never_a_negative():
    sae = random_sae(4, 8, 16, k=3)
    f = sae.encode(torch.randn(50, 4, 8, dtype=torch.float64))
    assert (f >= 0).all()
    assert ((f > 0).sum(-1) <= 3).all() and ((f > 0).sum(-1) == 3).any()


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk"])
@pytest.mark.parametrize("scope", ["head", "layer"])
def test_fold_scale_gives_the_same_reconstruction_of_raw_z(activation, scope):
    sae = random_sae(3, 4, 8, 3 if activation == "topk" else None, 0, scope, activation)
    scale = torch.rand(3, 1, dtype=torch.float64).add(0.5).expand(3, 4)
    z = torch.randn(20, 3, 4, dtype=torch.float64)
    f, expected = sae.encode(z * scale), sae(z * scale) / scale
    sae.fold_scale(scale)
    assert torch.allclose(sae(z), expected)
    assert torch.equal(sae.encode(z) > 0, f > 0)
    if activation != "topk":
        assert torch.allclose(sae.W_dec.norm(dim=-1), torch.ones(3, 8, dtype=torch.float64))


@pytest.mark.parametrize("sizes", [(0, 4, 4), (2, 4, 0)])
def test_sizes_are_checked(sizes):
    with pytest.raises(ValueError, match="positive"):
        BlockDiagSAE(*sizes)
    with pytest.raises(ValueError, match="k must lie"):
        BlockDiagSAE(2, 4, 8, "topk", k=9)
    assert BlockDiagSAE(2, 4, 8, "topk", k=9, k_scope="layer").k == 9
    with pytest.raises(ValueError, match="k must lie"):
        BlockDiagSAE(2, 4, 8, "relu", k=3)
    with pytest.raises(ValueError, match="unknown activation"):
        BlockDiagSAE(2, 4, 8, "gelu")
