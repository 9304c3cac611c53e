"""An SAE as another program trained it, and the same SAE for raw hook_z."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from trainer.block_diag import BlockDiagSAE
from trainer.config import require


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Weights in full, and what their files say of the training: None where they do not.

        pre = (scale z) W_enc + b_enc          scale z_hat = f W_dec + b_dec

    A decoder bias that is subtracted from the input is in b_enc.
    """

    source: str
    """the program, and its architecture"""
    layer: int
    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]
    threshold: Float[Tensor, " d_sae"] | None = None
    """of jumprelu"""
    topk: int | None = None
    scale: float | None = 1.0
    """of its inputs; None where they were scaled and the factor is lost"""
    folds_value_biases: bool | None
    """whether its model was loaded with the value biases in the output bias, so that its z has none"""
    model: str | None = None
    dataset: str | None = None
    text_column: str | None = None
    dataset_config: str | None = None
    dataset_split: str | None = None
    context_size: int | None = None
    held_out_fraction: float | None = None
    recipe: str | None = None
    l1_coefficient: float | None = None
    k: int | None = None

    @torch.no_grad()
    def for_raw_z(
        self, n_heads: int, scale: Float[Tensor, " d_in"], b_V: Float[Tensor, " d_in"] | None = None
    ) -> BlockDiagSAE:
        """The same features active and the same reconstructions, from raw z.

        One block per head where every feature reads and writes one head, and heads have equally many in order; else
        one dense block. Unless it is topk, decoder rows get norm 1 (`BlockDiagSAE.fold_scale`), which rescales a
        feature's activation by a constant.

        Args:
            n_heads: of the model; d_in is a multiple of it.
            scale: factor of the inputs that it was trained on.
            b_V: what the z that it was trained on has more than ours.

        Raises:
            ValueError: a weight is not finite, or k does not fit.
        """
        b_enc, b_dec = self.b_enc, self.b_dec
        if b_V is not None:
            more = scale * b_V
            b_enc, b_dec = b_enc + more @ self.W_enc, b_dec - more
        fits = len(b_enc) % n_heads == 0
        is_block_diagonal = fits and all(
            torch.block_diag(*_blocks(W, n_heads)).equal(W) for W in (self.W_enc, self.W_dec)
        )
        n_blocks = n_heads if is_block_diagonal else 1
        activation = "topk" if self.topk is not None else "relu" if self.threshold is None else "jumprelu"
        sae = BlockDiagSAE(n_blocks, len(b_dec) // n_blocks, len(b_enc) // n_blocks, activation, self.topk, "layer")
        sae.W_enc.copy_(_blocks(self.W_enc, n_blocks))
        sae.W_dec.copy_(_blocks(self.W_dec, n_blocks))
        sae.b_enc.copy_(b_enc.view_as(sae.b_enc))
        sae.b_dec.copy_(b_dec.view_as(sae.b_dec))
        if self.threshold is not None:
            sae.threshold.copy_(self.threshold.clamp_min(0).view_as(sae.threshold))
        sae.fold_scale(scale.view_as(sae.b_dec))
        finite = all(parameter.isfinite().all() for parameter in sae.parameters())
        require(finite, f"the {self.source} SAE holds values that are not finite")
        return sae.eval().requires_grad_(False)


def _blocks(weight: Float[Tensor, "rows columns"], n_blocks: int) -> Float[Tensor, "block row column"]:
    """The blocks on the diagonal."""
    grid = weight.unflatten(1, (n_blocks, -1)).unflatten(0, (n_blocks, -1))
    return grid.diagonal(dim1=0, dim2=2).movedim(-1, 0)
