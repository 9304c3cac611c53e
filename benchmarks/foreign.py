"""Training steps of other projects, to be timed side by side with ours on the same activations.

reference: the block-diagonal SAE of shehper/attn_saes, at commit 76504d8, as its step is described: the SAE
itself lives in a fork of SAELens (branch block_diag_sae) whose other bookkeeping is not repeated here, so
the time is a lower bound on theirs.
SAELens 6.54.12: its own classes and its own `SAETrainer.step`, whatever that does.

Every function makes parameters on `device` and returns `step(x[batch, head, d_head]) -> loss`: forward,
loss, backward, clipping to norm 1, Adam. Reading the loss waits for the device, so a clock around a step is
honest on a GPU too. Parameters come from torch's global generator: seed it first.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

Step = Callable[[Float[Tensor, "batch head d_head"]], float]


def reference_step(
    n_heads: int,
    d_head: int,
    features_per_head: int,
    l1_coefficient: float = 2.0,
    lr: float = 5e-5,
    device: str = "cpu",
) -> Step:
    """|x_hat - x|^2 + l1_coefficient * sum_i f_i |d_i|, mean over the batch; an encoder and a decoder per head.

    f = relu(x E^T + b_enc), x_hat = f D^T + b_dec with E `[d_sae, d_in]` and D `[d_in, d_sae]` dense block
    diagonals of the heads' weights, d_i a column of D. Weights and biases start as nn.Linear has them.
    """
    encoders = nn.ModuleList(nn.Linear(d_head, features_per_head, device=device) for _ in range(n_heads))
    decoders = nn.ModuleList(nn.Linear(features_per_head, d_head, device=device) for _ in range(n_heads))
    parameters = [*encoders.parameters(), *decoders.parameters()]
    adam = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.999))

    def dense(layers: nn.ModuleList) -> Float[Tensor, "out in"]:
        return torch.block_diag(*(layer.weight for layer in layers))

    def bias(layers: nn.ModuleList) -> Float[Tensor, " out"]:
        return torch.cat([layer.bias for layer in layers])

    def step(x: Float[Tensor, "batch head d_head"]) -> float:
        x = x.to(device).flatten(1)
        f = nn.functional.linear(x, dense(encoders), bias(encoders)).relu()
        x_hat = nn.functional.linear(f, dense(decoders), bias(decoders))
        norms = dense(decoders).norm(dim=0)  # made a second time: the penalty of the reference asks anew
        loss = (x_hat - x).pow(2).sum(-1).mean() + l1_coefficient * (f * norms).sum(-1).mean()
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        return loss.item()

    return step


def saelens_step(
    kind: Literal["standard", "topk", "batchtopk"],
    n_heads: int,
    d_head: int,
    features_per_head: int,
    k: int = 4,
    l1_coefficient: float = 2.0,
    lr: float = 5e-5,
    device: str = "cpu",
    block: Literal["head", "dense"] = "dense",
    autocast: bool = False,
) -> Step:
    """SAELens' training step with its defaults, in the order in which `SAETrainer.fit` calls its parts.

    Its topk stays on dense tensors, the default: `use_sparse_activations` fails in the backward pass of
    `rescale_acts_by_decoder_norm`, the other default (torch 2.13). An auxiliary loss is first paid after
    1,000 steps, when features may count as dead.

    Args:
        k: active features per head and token (topk, batchtopk); a dense SAE keeps k * n_heads per token.
        l1_coefficient: weight of the penalty (standard); the auxiliary loss of the others keeps weight 1.
        block: dense is one SAE, x flattened to `[batch, d_in]`, `[d_in, d_sae]` full: all that SAELens has.
            head is the way around that: n_heads SAEs of `[batch, d_head]` with a trainer each, one after the
            other; every SAE then clips its own gradient, and the loss is the sum over the heads.
        autocast: SAELens' `autocast`, forward and loss in bfloat16 where torch.autocast allows it.
    """
    # Imported here because it takes seconds, and the reference's step needs nothing but torch.
    from sae_lens import SAETrainer
    from sae_lens.config import SAETrainerConfig
    from sae_lens.registry import get_sae_training_class

    if block not in ("head", "dense"):
        raise ValueError(f"block must be head or dense, got {block!r}")
    n_saes, heads_per_sae = (n_heads, 1) if block == "head" else (1, n_heads)
    options = {
        "standard": {"l1_coefficient": l1_coefficient},
        "topk": {"k": k * heads_per_sae},
        "batchtopk": {"k": float(k * heads_per_sae)},
    }[kind]
    sae_class, config_class = get_sae_training_class(kind)

    def trainer() -> SAETrainer:
        config = config_class(
            d_in=heads_per_sae * d_head, d_sae=heads_per_sae * features_per_head, device=device, **options
        )
        # Both sample counts only serve schedules and statistics that nothing here reads: lr is constant.
        trainer_config = SAETrainerConfig(
            total_training_samples=1, train_batch_size_samples=1, lr=lr, lr_end=lr, device=device, autocast=autocast
        )
        return SAETrainer(trainer_config, sae_class(config), data_provider=iter(()))  # step() is given its batch

    trainers = [trainer() for _ in range(n_saes)]

    def step(x: Float[Tensor, "batch head d_head"]) -> float:
        losses = []
        for one, batch in zip(trainers, x.reshape(len(x), n_saes, -1).unbind(1), strict=True):
            one.maybe_reset_sparsity()
            losses.append(one.step(batch).loss.detach())
            one.n_training_steps += 1  # fit() counts, not step()
        return torch.stack(losses).sum().item()

    return step
