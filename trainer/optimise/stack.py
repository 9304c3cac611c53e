"""SAEs that differ only in their sparsity, in training as one batched matmul [points * heads]."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from trainer import ranks
from trainer.block_diag import BlockDiagSAE
from trainer.config import SAEConfig, TrainingConfig
from trainer.errors import first_line
from trainer.kernels.dense import Outcome, Params, in_tiles
from trainer.optimise.revive import aux_k, resample
from trainer.recipes import RECIPES
from trainer.recipes.recipe import Step

_REWARM_FRACTION = 0.02  # share of the steps over which the learning rate recovers from a resampling

_HEALTH_ROWS = 256  # of a batch, to see whether an SAE has exploded: all figures of it grow at once


class Batch(NamedTuple):
    """The last batch of a stack, for its figures: rows and errors of this process, the rest of all of them."""

    z: Float[Tensor, "batch head d_head"]
    out: Outcome
    grad_norm: Float[Tensor, " point"]


class Stack:
    """Parameters on scaled inputs, optimizer and counters of several SAEs ("points") of one layer.

    A block is a head of a point: block p * n_heads + h. The points share every batch, and are otherwise
    as if each were trained alone: each has its own coefficient or k, its own gradient clipping, its own
    dead features. On a CPU, where stacking a matmul gains nothing, the points take turns in the cache.

    Where several processes train (`trainer.ranks`), each has a share of every batch and the same stack: what is summed
    over rows is summed over all of them, so all take the step that one would take on the whole batch.

    Args:
        cfgs: one per point, equal but for l1_coefficient and k.
        params: of each point, on scaled inputs.
        scale: of every input dimension.
        together: all points in one batched matmul; default everywhere but on a CPU.
    """

    def __init__(
        self,
        cfgs: list[SAEConfig],
        params: list[Params],
        scale: Float[Tensor, "head width"],
        training: TrainingConfig,
        together: bool | None = None,
    ) -> None:
        self.cfg, self.cfgs, self.training, self.scale = cfgs[0], cfgs, training, scale
        self.recipe = RECIPES[self.cfg.recipe]
        compiled = training.compile and scale.device.type == "cuda"
        self._gradients_of = torch.compile(self.recipe.gradients, dynamic=False) if compiled else self.recipe.gradients
        self.n_points, self.n_heads = len(cfgs), len(scale)
        # In a fixed order: the gradient norm is a sum over it, and a resumed run has to round as the whole one did.
        self.params = {name: torch.cat([each[name] for each in params]).to(scale.device) for name in sorted(params[0])}
        self.optimizer = torch.optim.Adam(
            list(self.params.values()), lr=self.cfg.lr, betas=(0.9, self.cfg.beta2), fused=scale.device.type != "mps"
        )
        self.step = 0
        self.resampled_at = -1
        self.unfired = torch.zeros_like(self.params["b_enc"], dtype=torch.int64)
        self.active_share = torch.ones(self.n_points, device=scale.device)
        # Made once: what is copied to a device waits for it.
        self._coefficients = torch.tensor([cfg.l1_coefficient or 0.0 for cfg in cfgs], device=scale.device)
        self.threshold = torch.zeros(self._n_groups, device=scale.device)
        self._guess = torch.full_like(self.threshold, float("nan"))
        self._last: Batch
        together = scale.device.type != "cpu" if together is None else together
        self._passes = [slice(0, self.n_points)] if together else [slice(p, p + 1) for p in range(self.n_points)]

    @property
    def _n_groups(self) -> int:
        """Sets of features that share a batchtopk budget: the points, or the blocks."""
        return self.n_points * (1 if self.cfg.k_scope == "layer" else self.n_heads)

    @torch.no_grad()
    def update(self, z: Float[Tensor, "batch head d_head"]) -> None:
        """One optimizer step of every point on raw activations, which are this process's share of the batch.

        Raises:
            ValueError: torch.compile failed.
        """
        x = (z.reshape(len(z), *self.scale.shape) * self.scale).transpose(0, 1).contiguous()
        out = _join([self._gradients(points, x) for points in self._passes])
        dead = self.unfired >= self.training.dead_after_tokens
        if self.recipe.sparsity == "k" and dead.any():
            extra, term = aux_k(self.params, x, out.error, dead, self.n_points)
            for name, grad in extra.items():
                out.grads[name] += grad
            out.terms["aux_k"] = term
        out = _over_ranks(out)
        tokens = len(z) * ranks.size()
        grad_norm = self._clip(out.grads)
        self._descend(out.grads)
        self.unfired = torch.where(out.fired > 0, 0, self.unfired + tokens)
        self.active_share = out.fired.view(self.n_points, -1).mean(1) / tokens
        self.step += 1
        self._resample(x, out.error)
        self._last = Batch(z, out, grad_norm)

    def _gradients(self, points: slice, x: Float[Tensor, "head batch width"]) -> Outcome:
        blocks = slice(points.start * self.n_heads, points.stop * self.n_heads)
        groups = slice(*(each * self._n_groups // self.n_points for each in (points.start, points.stop)))
        # Long runs average thresholds over 1,000 steps (Bussmann et al.); a short one cannot look back that far.
        rate = 1.0 if self.step == 0 else max(0.001, min(1.0, 20 / self.training.total_training_steps))
        step = Step(
            coefficient=(self._coefficients[points] * self._sparsity_factor(self.step)).repeat_interleave(self.n_heads),
            k=tuple(cfg.k or 0 for cfg in self.cfgs[points]),
            over_layer=self.cfg.k_scope == "layer",
            active_share=self.active_share[points].max().item() if in_tiles(x) else 1.0,
            threshold=self.threshold[groups],
            guess=self._guess[groups],
            rate=rate,
        )
        try:
            return self._gradients_of({name: value[blocks] for name, value in self.params.items()}, x, step)
        except TorchDynamoException as error:
            raise ValueError(
                f"torch.compile failed ({first_line(error)}): --compile=false trains without it"
            ) from error

    def _clip(self, grads: Params) -> Float[Tensor, " point"]:
        """Scale the gradient of each point to at most max_grad_norm; returns the norms before.

        Where decoder rows keep norm 1, the component along the row is removed first.
        """
        if self.cfg.decoder_norm == "unit":
            rows = self.params["W_dec"]
            grads["W_dec"] = grads["W_dec"] - (grads["W_dec"] * rows).sum(-1, keepdim=True) * rows
        squares = [grad.reshape(self.n_points, -1).pow(2).sum(1) for grad in grads.values()]
        norm = torch.stack(squares).sum(0).sqrt()
        if self.cfg.max_grad_norm:
            factor = (self.cfg.max_grad_norm / (norm + 1e-6)).clamp_max(1.0).repeat_interleave(self.n_heads)
            for grad in grads.values():
                grad.mul_(factor.view(-1, *[1] * (grad.dim() - 1)))
        return norm

    def _descend(self, grads: Params) -> None:
        total, cfg = self.training.total_training_steps, self.cfg
        factor = lr_factor(self.step, total, cfg.lr_warm_up_fraction, cfg.lr_decay_fraction)
        if self.resampled_at >= 0:
            factor *= min(1.0, (self.step - self.resampled_at + 1) / max(1.0, _REWARM_FRACTION * total))
        self.optimizer.param_groups[0]["lr"] = cfg.lr * factor
        for name, parameter in self.params.items():
            parameter.grad = grads[name]
        self.optimizer.step()
        for parameter in self.params.values():
            parameter.grad = None
        if cfg.decoder_norm == "unit":
            self.params["W_dec"].div_(self.params["W_dec"].norm(dim=-1, keepdim=True).clamp_min(1e-12))

    def _resample(self, x: Tensor, error: Tensor) -> None:
        """At 1, 2, 3 and 4 times the interval, features silent for the second half of it (Bricken et al.)."""
        total = self.training.total_training_steps
        interval = round(self.cfg.resample_fraction * total)
        if not interval or self.step % interval or not self.step // interval <= 4 or self.step >= total:
            return
        dead = self.unfired >= interval // 2 * self.training.batch_size
        x, error = (ranks.gathered(each, dim=1) for each in (x, error))  # inputs are drawn from the whole batch
        moments = [
            {name: self.optimizer.state[parameter][key] for name, parameter in self.params.items()}
            for key in ("exp_avg", "exp_avg_sq")
        ]
        for point in range(self.n_points):  # the generator starts anew, so that a point draws as it would alone
            blocks = slice(point * self.n_heads, (point + 1) * self.n_heads)
            generator = torch.Generator().manual_seed(self.training.seed * 1_000_003 + self.step)
            of_point = [{name: value[blocks] for name, value in each.items()} for each in (self.params, *moments)]
            resample(of_point[0], of_point[1:], x, error[blocks], dead[blocks], generator)
        self.unfired[dead] = 0
        self.resampled_at = self.step

    def _sparsity_factor(self, step: int) -> float:
        warm_up = self.cfg.sparsity_warm_up_fraction * self.training.total_training_steps
        return min(1.0, step / warm_up) if warm_up else 1.0

    def figures(self, point: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What is logged of one point's last step, in raw units, so that curves and eval.json can share an axis.

        Returns:
            Figures, lists being per head, and values of every feature, for histograms.
        """
        blocks = slice(point * self.n_heads, (point + 1) * self.n_heads)
        z, out, grad_norm = self._last
        tokens = len(z) * ranks.size()
        error = out.error[blocks]
        mse = ranks.total(error.pow(2).sum()).item() / tokens
        raw = ranks.mean((error.transpose(0, 1) / self.scale).reshape(z.shape).pow(2).sum(-1).mean(0))
        deviation = ranks.mean((z - ranks.mean(z.mean(0))).pow(2).sum(-1).mean(0)).clamp_min(1e-12)
        fired, dead = out.fired[blocks], (self.unfired[blocks] >= self.training.dead_after_tokens).float()
        W_enc, W_dec = self.params["W_enc"][blocks].mT, self.params["W_dec"][blocks]
        norms = {"encoder_norm": W_enc.norm(dim=-1), "decoder_norm": W_dec.norm(dim=-1)}
        cosine = torch.nn.functional.cosine_similarity(W_enc, W_dec, dim=-1)
        terms = {name: term.view(self.n_points, -1)[point].sum().item() for name, term in out.terms.items()}
        loss = mse + self._weighted(terms, point)
        l0 = fired.sum(1) / tokens
        figures = {
            "loss": loss,
            "squared_error": mse,
            **terms,
            "grad_norm": grad_norm[point].item(),
            "lr": self.optimizer.param_groups[0]["lr"],
            "L0": l0.sum().item(),
            "L0_per_head": l0.tolist(),
            "MSE": raw.sum().item(),
            "FVU": (raw.sum() / deviation.sum()).item(),
            "FVU_per_head": (raw / deviation).tolist(),
            "dead_fraction": dead.mean().item(),
            "dead_fraction_per_head": dead.mean(1).tolist(),
            **{name: value.mean().item() for name, value in norms.items()},
            "encoder_decoder_cosine": cosine.mean().item(),
        }
        return figures, {**norms, "encoder_decoder_cosine": cosine, "density": fired / tokens}

    @torch.no_grad()
    def relative_error(self, point: int) -> float:
        """Squared error over squared norm of a point as it is now, after its step, on rows of the last batch."""
        z = self._last.z[:_HEALTH_ROWS]
        blocked = z.reshape(len(z), self.n_heads, -1)
        error = (self.finished(point)(blocked) - blocked) * self.scale
        wrong, whole = ranks.reduced([], [error.pow(2).sum(), (blocked * self.scale).pow(2).sum()])[1]
        return (wrong / whole.clamp_min(1e-12)).item()

    def _weighted(self, terms: dict[str, float], point: int) -> float:
        """The loss terms beside the squared error, with their coefficients (those of the step just taken)."""
        coefficient = (self.cfgs[point].l1_coefficient or 0.0) * self._sparsity_factor(self.step - 1)
        return sum((self.recipe.weights.get(name, coefficient) * term for name, term in terms.items()), 0.0)

    @torch.no_grad()
    def finished(self, point: int) -> BlockDiagSAE:
        """A point as an SAE for raw hook_z."""
        blocks = slice(point * self.n_heads, (point + 1) * self.n_heads)
        trained = {name: value[blocks].detach().clone() for name, value in self.params.items()}
        weights = self.recipe.for_use(trained, self.threshold.view(self.n_points, -1)[point])
        cfg, activation, (_, width, n_features) = self.cfgs[point], self.recipe.activation, weights["W_enc"].shape
        sae = BlockDiagSAE(
            self.n_heads, width, n_features, activation, cfg.k if activation == "topk" else None, cfg.k_scope
        )
        sae = sae.to(self.scale.device)
        for name, parameter in sae.named_parameters():
            parameter.copy_(weights[name])
        sae.fold_scale(self.scale)
        return sae.eval().requires_grad_(False)

    def state(self, point: int) -> dict[str, Tensor]:
        """Everything of one point that resuming needs. No random state is part of it: after initialisation
        whatever is random is a function of the seed and the step."""
        blocks = slice(point * self.n_heads, (point + 1) * self.n_heads)
        state = {
            "scale": self.scale,
            "unfired": self.unfired[blocks],
            "active_share": self.active_share[point : point + 1],
            "threshold": self.threshold.view(self.n_points, -1)[point],
            "resampled_at": torch.tensor(self.resampled_at),
        }
        for name, parameter in self.params.items():
            state[name] = parameter[blocks]
            moments = self.optimizer.state[parameter]
            for key in ("exp_avg", "exp_avg_sq"):
                state[f"adam.{key}.{name}"] = moments[key][blocks]
        return state

    def load_states(self, step: int, states: list[dict[str, Tensor]]) -> None:
        """Go on from the states of all points, as saved after `step` steps."""
        self.step = step
        device = self.scale.device

        def joined(name: str) -> Tensor:
            return torch.cat([state[name] for state in states]).to(device)

        self.scale = states[0]["scale"].to(device)
        self.unfired, self.threshold = joined("unfired"), joined("threshold")
        self.active_share = joined("active_share")
        self.resampled_at = int(states[0]["resampled_at"])
        for name, parameter in self.params.items():
            parameter.copy_(joined(name))
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(step), device=device),
                "exp_avg": joined(f"adam.exp_avg.{name}"),
                "exp_avg_sq": joined(f"adam.exp_avg_sq.{name}"),
            }


def lr_factor(step: int, total: int, warm_up_fraction: float, decay_fraction: float) -> float:
    """Share of the peak learning rate at `step` of `total`: linear rise, plateau, linear fall to 0."""
    warm_up, decay = warm_up_fraction * total, decay_fraction * total
    rising = (step + 1) / warm_up if warm_up else 1.0
    falling = (total - step) / decay if decay else 1.0
    return min(1.0, rising, falling)


def _over_ranks(out: Outcome) -> Outcome:
    """What the whole batch says, whose rows the processes share evenly; the errors stay where the rows are."""
    means, (fired,) = ranks.reduced([*out.grads.values(), *out.terms.values()], [out.fired])
    grads, terms = means[: len(out.grads)], means[len(out.grads) :]
    return Outcome(dict(zip(out.grads, grads, strict=True)), out.error, fired, dict(zip(out.terms, terms, strict=True)))


def _join(outcomes: list[Outcome]) -> Outcome:
    if len(outcomes) == 1:
        return outcomes[0]
    grads = {name: torch.cat([each.grads[name] for each in outcomes]) for name in outcomes[0].grads}
    terms = {name: torch.cat([each.terms[name] for each in outcomes]) for name in outcomes[0].terms}
    return Outcome(grads, torch.cat([each.error for each in outcomes]), torch.cat([e.fired for e in outcomes]), terms)
