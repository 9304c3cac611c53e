"""One training step: ours by each path, the reference's as it computes it, SAELens', and plain matmul.

    python -m benchmarks.steps [batch ...] [part of a row's name ...]

At the reference's shape: 12 heads, d_head 64, 2,048 features per head, fp32. SAELens is dense: the same
width without the block structure, which is what a user of SAELens would train on the same heads.
"""

import os
import sys
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.foreign import reference_step, saelens_step
from benchmarks.timing import peak_mb, rounds, spread
from trainer.config import SAEOptions, TrainingConfig
from trainer.kernels import l1, sparse
from trainer.kernels.dense import Outcome
from trainer.optimise import stack
from trainer.optimise.initialise import initial_params, input_scale

HEADS, D_HEAD, FEATURES = 12, 64, 2048
ONE_MATMUL = 2 * HEADS * D_HEAD * FEATURES  # floating-point operations of a token
ROUNDS = 5


def inputs(batch: int, device: str = "cpu") -> torch.Tensor:
    return torch.randn(batch, HEADS, D_HEAD, generator=torch.Generator().manual_seed(0)).to(device)


def plain_matmul(batch: int) -> Callable[[], object]:
    """As many operations as the encoder, in one large matmul of the library."""
    a, b = torch.randn(ONE_MATMUL * batch // (2 * 2048**2), 2048), torch.randn(2048, 2048)
    return lambda: torch.mm(a, b)


def encoder(batch: int) -> Callable[[], object]:
    """x W_enc + b_enc of all heads and nothing else, in the tiles of the training step."""
    z = inputs(batch)
    params = Ours("topk", batch, k=16, k_scope="head").stack.params
    x = z.transpose(0, 1).contiguous()
    return lambda: sparse._of_pre_activations(lambda block, start, pre: None, params, x)


class Ours:
    """A step of `Stack`; `share` shifts the encoder biases so that about this share of features is active."""

    def __init__(
        self,
        recipe: str,
        batch: int,
        share: float | None = None,
        below: float | None = None,
        device: str = "cpu",
        points: int = 1,
        training: TrainingConfig | None = None,
        **options,
    ):
        z = inputs(batch)
        self.z, self.below = z.to(device), below
        (sae,) = SAEOptions(recipe=recipe, hook_layer=0, **{"expansion_factor": 32, "lr": 1e-9} | options).decide()
        x = z * input_scale(z, "per_head")
        params = initial_params(sae, x, FEATURES, torch.Generator().manual_seed(0))
        if share is not None:
            pre = torch.einsum("bhd,hdf->hbf", x[:256], params["W_enc"]) + params["b_enc"][:, None]
            params["b_enc"] -= pre.flatten(1).kthvalue(int((1 - share) * pre[0].numel()), dim=1).values[:, None]
        scale = input_scale(z, "per_head").to(device)
        self.stack = stack.Stack([sae] * points, [params] * points, scale, training or TrainingConfig(batch_size=batch))
        self.stack.active_share.zero_()  # the path is chosen by `below`, from the first step on

    def __call__(self) -> None:
        before = l1.SPARSE_BELOW
        if self.below is not None:
            l1.SPARSE_BELOW = self.below
        self.stack.update(self.z)
        l1.SPARSE_BELOW = before


class Autograd(Ours):
    """The dense step of april with its gradients by autograd: the same blocks, in one batched matmul."""

    def __call__(self) -> None:
        by_hand, self.stack._gradients = self.stack._gradients, self._gradients
        self.stack.update(self.z)
        self.stack._gradients = by_hand

    @torch.enable_grad()
    def _gradients(self, points: slice, x: torch.Tensor) -> Outcome:
        p = {name: value.detach().requires_grad_() for name, value in self.stack.params.items()}
        f = torch.baddbmm(p["b_enc"][:, None], x, p["W_enc"]).relu()
        error = torch.baddbmm(p["b_dec"][:, None], f, p["W_dec"]) - x
        penalty = (f * p["W_dec"].norm(dim=-1)[:, None]).sum() / x.shape[1]
        loss = error.pow(2).sum() / x.shape[1] + self.stack.cfg.l1_coefficient * penalty
        loss.backward()
        fired = (f > 0).sum(1).to(f.dtype)
        return Outcome({name: value.grad for name, value in p.items()}, error.detach(), fired, {"l1": fired.sum(1)})


def foreign(make: Callable[..., Callable], batch: int, *arguments) -> Callable[[], object]:
    step, z = make(*arguments, HEADS, D_HEAD, FEATURES), inputs(batch)
    return lambda: step(z)


# name -> (how it is built, matmuls of the useful size in it)
CANDIDATES: dict[str, tuple[Callable, int]] = {
    "plain matmul, as many operations as the encoder": (plain_matmul, 1),
    "encoder alone": (encoder, 1),
    "reference: dense block_diag": (partial(foreign, reference_step), 5),
    "SAELens standard (dense)": (partial(foreign, partial(saelens_step, k=16)), 5),
    "SAELens topk k=192 (dense)": (partial(foreign, partial(saelens_step, k=16)), 5),
    "SAELens batchtopk k=192 (dense)": (partial(foreign, partial(saelens_step, k=16)), 5),
    "block-diagonal april with autograd": (partial(Autograd, "april"), 5),
    "ours april, dense path": (partial(Ours, "april", below=0.0), 5),
    "ours april, 5 % active, dense path": (partial(Ours, "april", share=0.05, below=0.0), 5),
    "ours april, 5 % active, sparse path": (partial(Ours, "april", share=0.05, below=1.0), 5),
    "ours april, 1 % active, sparse path": (partial(Ours, "april", share=0.01, below=1.0), 5),
    "ours jumprelu": (partial(Ours, "jumprelu"), 5),
    "ours gated": (partial(Ours, "gated"), 7),
    "ours topk k=16 per head": (partial(Ours, "topk", k=16, k_scope="head"), 5),
    "ours topk k=192 of the layer": (partial(Ours, "topk", k=192), 5),
    "ours batchtopk k=192 of the layer": (partial(Ours, "batchtopk", k=192), 5),
}
KINDS = {"SAELens standard": "standard", "SAELens topk": "topk", "SAELens batchtopk": "batchtopk"}


def build(name: str, batch: int) -> Callable[[], object]:
    """A candidate by name; a function of strings and numbers, so that another process can call it."""
    make, _ = CANDIDATES[name]
    kind = next((kind for prefix, kind in KINDS.items() if name.startswith(prefix)), None)
    if kind:
        return make(batch, kind)
    return make(batch) if name.startswith(("plain", "encoder", "reference")) else make(batch=batch)


def main(batches: list[int], names: list[str]) -> None:
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {threads} threads, {os.cpu_count()} cores, fp32, {ROUNDS} rounds side by side\n")
    for batch in batches:
        candidates = {name: build(name, batch) for name in names}
        seconds = rounds(candidates, ROUNDS)
        del candidates
        reference = spread(seconds["reference: dense block_diag"])[0]
        alone = spread(seconds["encoder alone"])[0]
        print(f"batch {batch:,}\n")
        print("| step | ms (quartiles) | reference / this | this / encoder | tokens/s | useful GFLOP/s | peak MB |")
        print("|---|---|---|---|---|---|---|")
        for name, values in seconds.items():
            median, low, high = spread(values)
            flops = CANDIDATES[name][1] * ONE_MATMUL * batch / median / 1e9
            print(
                f"| {name} | {median * 1e3:,.0f} ({low * 1e3:,.0f} to {high * 1e3:,.0f}) | {reference / median:.1f} "
                f"| {median / alone:.1f} | {batch / median:,.0f} | {flops:.0f} | {peak_mb(build, name, batch):,.0f} |",
                flush=True,
            )
        print()


if __name__ == "__main__":
    batches = [int(each) for each in sys.argv[1:] if each.isdigit()]
    only = ["reference", "encoder", *(each for each in sys.argv[1:] if not each.isdigit())]
    chosen = [name for name in CANDIDATES if len(only) == 2 or any(each in name for each in only)]
    main(batches or [1024, 4096], chosen)
