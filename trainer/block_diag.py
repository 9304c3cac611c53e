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

    The activation is ReLU, or TopK where `k` is given: the k largest pre-activations of each head,
    clipped at 0 (Gao et al. 2024, arXiv:2406.04093).

    A dense SAE is the same module with `n_heads=1, d_head=d_in`. Inputs `[..., head, d_head]` of the
    model are regrouped into blocks by a reshape, so both kinds take and return the same shapes.

    Args:
        n_heads: number of blocks.
        d_head: width of a block.
        features_per_head: features of a block.
        k: features kept per block; None for ReLU.

    Raises:
        ValueError: a size is not positive, or k exceeds features_per_head.
    """

    def __init__(self, n_heads: int, d_head: int, features_per_head: int, k: int | None = None) -> None:
        super().__init__()
        if min(n_heads, d_head, features_per_head) < 1:
            raise ValueError(f"sizes must be positive: {n_heads=}, {d_head=}, {features_per_head=}")
        if k is not None and not 1 <= k <= features_per_head:
            raise ValueError(f"k must lie between 1 and features_per_head={features_per_head}, got {k}")
        self.n_heads, self.d_head, self.features_per_head, self.k = n_heads, d_head, features_per_head, k
        self.W_enc = nn.Parameter(torch.empty(n_heads, d_head, features_per_head))
        self.b_enc = nn.Parameter(torch.zeros(n_heads, features_per_head))
        self.W_dec = nn.Parameter(torch.empty(n_heads, features_per_head, d_head))
        self.b_dec = nn.Parameter(torch.zeros(n_heads, d_head))
        self.initialise()

    @property
    def d_in(self) -> int:
        return self.n_heads * self.d_head

    @property
    def d_sae(self) -> int:
        return self.n_heads * self.features_per_head

    @torch.no_grad()
    def initialise(
        self, mean: Float[Tensor, "block width"] | None = None, generator: torch.Generator | None = None
    ) -> None:
        """Random decoder directions, W_enc = W_dec transposed, biases that centre the data on `mean`.

        With ReLU about half of the features fire at first and their sum overshoots the input by
        features_per_head / (2 d_head); rows of norm sqrt(2 d_head / features_per_head) undo that. TopK
        selects, so its rows have norm 1.
        """
        norm = min(1.0, (2 * self.d_head / self.features_per_head) ** 0.5) if self.k is None else 1.0
        rows = torch.randn(self.W_dec.shape, generator=generator)
        self.W_dec.copy_(norm * nn.functional.normalize(rows, dim=-1))
        self.W_enc.copy_(self.W_dec.mT)
        self.b_dec.zero_() if mean is None else self.b_dec.copy_(mean)
        self.b_enc.copy_(-(self.b_dec[:, None] @ self.W_enc)[:, 0])

    def blocks(self, z: Float[Tensor, "... head d_head"]) -> Float[Tensor, "... block width"]:
        """The model's heads regrouped into this SAE's blocks (the same, unless it is dense)."""
        return z.reshape(*z.shape[:-2], self.n_heads, self.d_head)

    def pre_activations(self, z: Float[Tensor, "... head d_head"]) -> Float[Tensor, "... block feature"]:
        """z W_enc + b_enc."""
        return _per_head(self.blocks(z), self.W_enc) + self.b_enc

    def activate(self, pre: Float[Tensor, "... block feature"]) -> Float[Tensor, "... block feature"]:
        """ReLU, or TopK of each head; never negative."""
        if self.k is None:
            return pre.relu()
        top = pre.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())

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

        A ReLU SAE also gets decoder rows of norm 1: relu is homogeneous, so a row's norm moves into its
        encoder column and the activation becomes the length of the feature's contribution to z.
        TopK selects by size, so there the activations stay as they were trained.
        """
        self.W_enc.mul_(scale[:, :, None])
        self.W_dec.div_(scale[:, None, :])
        self.b_dec.div_(scale)
        if self.k is None:
            norm = self.W_dec.norm(dim=-1).clamp_min(torch.finfo(self.W_dec.dtype).tiny)
            self.W_dec.div_(norm[..., None])
            self.W_enc.mul_(norm[:, None, :])
            self.b_enc.mul_(norm)


def _per_head(x: Float[Tensor, "... head i"], weight: Float[Tensor, "head i o"]) -> Float[Tensor, "... head o"]:
    """x[..., h, :] @ weight[h] for every head, as one batched matmul."""
    flat = x.flatten(0, -3) if x.dim() > 2 else x[None]
    out = torch.bmm(flat.transpose(0, 1), weight).transpose(0, 1)
    return out.reshape(*x.shape[:-1], weight.shape[-1])
