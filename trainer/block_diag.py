"""The block-diagonal sparse autoencoder. It knows blocks and widths; never models, hooks, text or files."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


def parameter_shapes(
    n_blocks: int,
    width: int,
    features_per_block: int,
    activation: str = "relu",
    k: int | None = None,
    k_scope: str = "head",
) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of a `BlockDiagSAE` of these arguments, which is not made for it.

    Raises:
        ValueError: as `BlockDiagSAE`.
    """
    if min(n_blocks, width, features_per_block) < 1:
        raise ValueError(f"sizes must be positive: {n_blocks=}, {width=}, {features_per_block=}")
    if activation not in ("relu", "jumprelu", "topk"):
        raise ValueError(f"unknown activation {activation!r}")
    available = features_per_block * (n_blocks if k_scope == "layer" else 1)
    if (activation == "topk") != (k is not None) or (k is not None and not 1 <= k <= available):
        raise ValueError(f"k must lie between 1 and {available} with topk and be None otherwise, got {k}")
    of_features = (n_blocks, features_per_block)
    shapes = {
        "W_enc": (n_blocks, width, features_per_block),
        "b_enc": of_features,
        "W_dec": (n_blocks, features_per_block, width),
        "b_dec": (n_blocks, width),
    }
    return shapes | ({"threshold": of_features} if activation == "jumprelu" else {})


class BlockDiagSAE(nn.Module):
    """One sparse autoencoder per block, trained and run as a single batched matmul.

        pre_b = z_b W_enc[b] + b_enc[b]          f_b = activation(pre_b)
        z_hat_b = f_b W_dec[b] + b_dec[b]

    A block is an attention head: the block diagonal of a dense SAE on the concatenated heads, without its
    zeros. Every feature reads from and writes to exactly one head; feature `i` of head `h` has the global
    id `h * features_per_block + i`.

    Activations: `relu`; `jumprelu`, pre where pre > threshold of the feature, else 0 (Rajamanoharan et al.
    2024, arXiv:2407.14435; batchtopk and gated SAEs become this for use); `topk`, the k largest
    pre-activations of each block, or of all blocks together (`k_scope="layer"`), clipped at 0 (Gao et al.
    2024, arXiv:2406.04093).

    A dense SAE is the same module with one block, as wide as all heads together. Inputs `[..., head, d_head]` of the
    model are regrouped into blocks by a reshape, so both kinds take and return the same shapes.

    Args:
        n_blocks: number of blocks.
        width: width of a block.
        features_per_block: features of a block.
        activation: relu, jumprelu or topk.
        k, k_scope: of topk only.

    Raises:
        ValueError: a size is not positive, the activation is unknown, or k does not fit.
    """

    def __init__(
        self,
        n_blocks: int,
        width: int,
        features_per_block: int,
        activation: str = "relu",
        k: int | None = None,
        k_scope: str = "head",
    ) -> None:
        super().__init__()
        shapes = parameter_shapes(n_blocks, width, features_per_block, activation, k, k_scope)
        self.n_blocks, self.width, self.features_per_block = n_blocks, width, features_per_block
        self.activation, self.k, self.k_scope = activation, k, k_scope
        rows = nn.functional.normalize(torch.randn(shapes["W_dec"]), dim=-1)
        self.W_enc = nn.Parameter(rows.mT.contiguous())
        self.b_enc = nn.Parameter(torch.zeros(shapes["b_enc"]))
        self.W_dec = nn.Parameter(rows)
        self.b_dec = nn.Parameter(torch.zeros(shapes["b_dec"]))
        if "threshold" in shapes:
            self.threshold = nn.Parameter(torch.zeros(shapes["threshold"]))

    @property
    def is_dense(self) -> bool:
        """One block for all heads: a feature may read and write any of them."""
        return self.n_blocks == 1

    @property
    def d_in(self) -> int:
        return self.n_blocks * self.width

    @property
    def d_sae(self) -> int:
        return self.n_blocks * self.features_per_block

    def blocks(self, z: Float[Tensor, "... head d_head"]) -> Float[Tensor, "... block width"]:
        """The model's heads regrouped into this SAE's blocks (the same, unless it is dense)."""
        return z.reshape(*z.shape[:-2], self.n_blocks, self.width)

    def pre_activations(self, z: Float[Tensor, "... head d_head"]) -> Float[Tensor, "... block feature"]:
        """z W_enc + b_enc."""
        return _per_block(self.blocks(z), self.W_enc) + self.b_enc

    def activate(self, pre: Float[Tensor, "... block feature"]) -> Float[Tensor, "... block feature"]:
        """The activation function; never negative."""
        if self.activation == "jumprelu":
            return torch.where(pre > self.threshold, pre, 0.0).relu()
        if self.activation == "relu":
            return pre.relu()
        assert self.k is not None  # of topk
        rows = pre.flatten(-2) if self.k_scope == "layer" else pre
        top = rows.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(rows).scatter(-1, top.indices, top.values.relu()).view_as(pre)

    def encode(self, z: Float[Tensor, "... head d_head"]) -> Float[Tensor, "... block feature"]:
        """Feature activations of head outputs."""
        return self.activate(self.pre_activations(z))

    def decode(self, f: Float[Tensor, "... block feature"]) -> Float[Tensor, "... block width"]:
        """Head outputs from feature activations, one block at a time."""
        return _per_block(f, self.W_dec) + self.b_dec

    def forward(self, z: Float[Tensor, "... head d_head"]) -> Float[Tensor, "... head d_head"]:
        """The reconstruction, in the shape of the input."""
        return self.decode(self.encode(z)).reshape(z.shape)

    @torch.no_grad()
    def fold_scale(self, scale: Float[Tensor, "block width"]) -> None:
        """Make an SAE trained on `scale * z` one for raw z, with the same features active.

        Unless it is topk, it also gets decoder rows of norm 1: both activations are homogeneous, so a row's
        norm moves into its encoder column and threshold, and the activation becomes the length of the
        feature's contribution to z. TopK selects by size, so there the activations stay as they were trained.
        """
        self.W_enc.mul_(scale[:, :, None])
        self.W_dec.div_(scale[:, None, :])
        self.b_dec.div_(scale)
        if self.activation != "topk":
            norm = self.W_dec.norm(dim=-1).clamp_min(torch.finfo(self.W_dec.dtype).tiny)
            self.W_dec.div_(norm[..., None])
            self.W_enc.mul_(norm[:, None, :])
            self.b_enc.mul_(norm)
            if self.activation == "jumprelu":
                self.threshold.mul_(norm)


def _per_block(x: Float[Tensor, "... block i"], weight: Float[Tensor, "block i o"]) -> Float[Tensor, "... block o"]:
    """x[..., b, :] @ weight[b] for every block, as one batched matmul."""
    flat = x.flatten(0, -3) if x.dim() > 2 else x[None]
    out = torch.bmm(flat.transpose(0, 1), weight).transpose(0, 1)
    return out.reshape(*x.shape[:-1], weight.shape[-1])
