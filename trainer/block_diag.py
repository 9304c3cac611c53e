"""The block-diagonal sparse autoencoder. It knows heads and widths; never models, hooks, text or files."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class BlockDiagSAE(nn.Module):
    """One sparse autoencoder per attention head, trained and run as a single batched matmul.

        pre_h = z_h W_enc[h] + b_enc[h]          f_h = activation(pre_h)
        z_hat_h = f_h W_dec[h] + b_dec[h]

    for every head h: the block diagonal of a dense SAE on the concatenated heads, without its zeros.
    Every feature reads from and writes to exactly one head; feature `i` of head `h` has the global
    id `h * features_per_head + i`.

    Activations: `relu`; `jumprelu`, pre where pre > threshold of the feature, else 0 (Rajamanoharan et al.
    2024, arXiv:2407.14435; batchtopk and gated SAEs become this for use); `topk`, the k largest
    pre-activations of each head, or of all heads together (`k_scope="layer"`), clipped at 0 (Gao et al.
    2024, arXiv:2406.04093).

    A dense SAE is the same module with `n_heads=1, d_head=d_in`. Inputs `[..., head, d_head]` of the
    model are regrouped into blocks by a reshape, so both kinds take and return the same shapes.

    Args:
        n_heads: number of blocks.
        d_head: width of a block.
        features_per_head: features of a block.
        activation: relu, jumprelu or topk.
        k, k_scope: of topk only.

    Raises:
        ValueError: a size is not positive, the activation is unknown, or k does not fit.
    """

    def __init__(
        self,
        n_heads: int,
        d_head: int,
        features_per_head: int,
        activation: str = "relu",
        k: int | None = None,
        k_scope: str = "head",
    ) -> None:
        super().__init__()
        if min(n_heads, d_head, features_per_head) < 1:
            raise ValueError(f"sizes must be positive: {n_heads=}, {d_head=}, {features_per_head=}")
        if activation not in ("relu", "jumprelu", "topk"):
            raise ValueError(f"unknown activation {activation!r}")
        available = features_per_head * (n_heads if k_scope == "layer" else 1)
        if (activation == "topk") != (k is not None) or (k is not None and not 1 <= k <= available):
            raise ValueError(f"k must lie between 1 and {available} with topk and be None otherwise, got {k}")
        self.n_heads, self.d_head, self.features_per_head = n_heads, d_head, features_per_head
        self.activation, self.k, self.k_scope = activation, k, k_scope
        rows = nn.functional.normalize(torch.randn(n_heads, features_per_head, d_head), dim=-1)
        self.W_enc = nn.Parameter(rows.mT.contiguous())
        self.b_enc = nn.Parameter(torch.zeros(n_heads, features_per_head))
        self.W_dec = nn.Parameter(rows)
        self.b_dec = nn.Parameter(torch.zeros(n_heads, d_head))
        if activation == "jumprelu":
            self.threshold = nn.Parameter(torch.zeros(n_heads, features_per_head))

    @property
    def d_in(self) -> int:
        return self.n_heads * self.d_head

    @property
    def d_sae(self) -> int:
        return self.n_heads * self.features_per_head

    def blocks(self, z: Float[Tensor, "... head d_head"]) -> Float[Tensor, "... block width"]:
        """The model's heads regrouped into this SAE's blocks (the same, unless it is dense)."""
        return z.reshape(*z.shape[:-2], self.n_heads, self.d_head)

    def pre_activations(self, z: Float[Tensor, "... head d_head"]) -> Float[Tensor, "... block feature"]:
        """z W_enc + b_enc."""
        return _per_head(self.blocks(z), self.W_enc) + self.b_enc

    def activate(self, pre: Float[Tensor, "... block feature"]) -> Float[Tensor, "... block feature"]:
        """The activation function; never negative."""
        if self.activation == "jumprelu":
            return torch.where(pre > self.threshold, pre, 0.0).relu()
        if self.activation == "relu":
            return pre.relu()
        rows = pre.flatten(-2) if self.k_scope == "layer" else pre
        top = rows.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(rows).scatter(-1, top.indices, top.values.relu()).view_as(pre)

    def encode(self, z: Float[Tensor, "... head d_head"]) -> Float[Tensor, "... block feature"]:
        """Feature activations of head outputs."""
        return self.activate(self.pre_activations(z))

    def decode(self, f: Float[Tensor, "... block feature"]) -> Float[Tensor, "... block width"]:
        """Head outputs from feature activations, one block at a time."""
        return _per_head(f, self.W_dec) + self.b_dec

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


def _per_head(x: Float[Tensor, "... head i"], weight: Float[Tensor, "head i o"]) -> Float[Tensor, "... head o"]:
    """x[..., h, :] @ weight[h] for every head, as one batched matmul."""
    flat = x.flatten(0, -3) if x.dim() > 2 else x[None]
    out = torch.bmm(flat.transpose(0, 1), weight).transpose(0, 1)
    return out.reshape(*x.shape[:-1], weight.shape[-1])
