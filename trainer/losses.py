"""Loss terms as pure functions: shapes, formula and source with each."""

from jaxtyping import Float
from torch import Tensor


def squared_error(x_hat: Float[Tensor, "... d_head"], x: Float[Tensor, "... d_head"]) -> Float[Tensor, "..."]:
    """|x - x_hat|^2 summed over the last dimension, one number per token and head."""
    return (x - x_hat).pow(2).sum(-1)


def l1_decoder_norm(
    f: Float[Tensor, "batch head feature"], W_dec: Float[Tensor, "head feature d_head"]
) -> Float[Tensor, ""]:
    """mean over the batch of sum_i f_i |d_i|_2, for activations f >= 0.

    Anthropic, Circuits Updates April 2024 ("Update on how we train SAEs"): weighting by the decoder
    norm keeps the decoder free, because shrinking f and growing d no longer lowers the penalty.
    """
    return (f.sum(0) * W_dec.norm(dim=-1)).sum() / f.shape[0]
