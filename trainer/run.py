"""One SAE in training: its parameters on scaled inputs, its optimizer, its directory and its log."""

import copy
import time
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer import checkpoint
from trainer.block_diag import BlockDiagSAE
from trainer.config import TrainingConfig
from trainer.log import MetricsLog
from trainer.losses import l1_decoder_norm, squared_error


class Run:
    """One SAE in training: parameters on scaled inputs, optimizer, its directory and its log.

    The SAE sees `scale * z`. What is saved for use is a copy with the scale folded in.
    """

    def __init__(self, path: Path, l1_coefficient: float, description: dict[str, Any], cfg: TrainingConfig) -> None:
        self.path, self.l1_coefficient, self.cfg = path, l1_coefficient, cfg
        self.description = description
        self.step = 0
        self.log: MetricsLog | None = None
        self.latest: dict[str, Any] = {}

    def start(self, sae: BlockDiagSAE, scale: Float[Tensor, "block width"]) -> None:
        """Begin with a fresh SAE, or where `training_state/` says."""
        self.sae, self.scale = sae, scale
        self.unfired = torch.zeros(sae.b_enc.shape, dtype=torch.int64, device=scale.device)
        self.optimizer = torch.optim.Adam(sae.parameters(), lr=self.cfg.lr, betas=(0.9, 0.999), fused=True)
        if (self.path / "training_state").exists():
            self._load_state()
        self.path.mkdir(parents=True, exist_ok=True)
        checkpoint.save_config(self.path, self.sae, self._config("training"))
        self.log = MetricsLog(
            self.path, self.step, self.cfg.wandb, self.cfg.wandb_project, self.description["group"], self.description
        )

    def update(self, z: Float[Tensor, "batch head d_head"]) -> None:
        """One optimizer step of recipe `april` on raw activations; logs every `log_every` steps.

        Loss: E[|x - x_hat|^2 + lambda sum_i f_i |d_i|_2] with x = scale * z, |.|^2 summed over all heads
        (Anthropic, Circuits Updates April 2024).
        """
        cfg, started = self.cfg, time.perf_counter()
        total = cfg.total_training_steps
        lr = cfg.lr * lr_factor(self.step, total, cfg.lr_warm_up_fraction, cfg.lr_decay_fraction)
        warm_up = cfg.l1_warm_up_fraction * total
        l1_now = self.l1_coefficient * min(1.0, self.step / warm_up if warm_up else 1.0)

        x = self.sae.blocks(z) * self.scale
        f = self.sae.encode(x)
        x_hat = self.sae.decode(f)
        mse = squared_error(x_hat, x).sum(-1).mean()
        l1 = l1_decoder_norm(f, self.sae.W_dec)
        loss = mse + l1_now * l1
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.sae.parameters(), cfg.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()

        fired = (f.detach() > 0).any(0)
        self.unfired = torch.where(fired, 0, self.unfired + len(x))
        self.step += 1
        if self.step % cfg.log_every == 0 or self.step == total:
            if not torch.isfinite(loss):
                raise ValueError(f"the loss of {self.path.name} is not finite at step {self.step}: lower lr")
            self.latest = {
                "step": self.step,
                "tokens": self.step * cfg.batch_size,
                "loss": loss.item(),
                "loss_mse": mse.item(),
                "loss_l1": l1.item(),
                **self._figures(z, x_hat.detach(), f.detach()),
                "lr": lr,
                "l1_coefficient": l1_now,
                "grad_norm": grad_norm.item(),
                "tokens_per_second": len(x) / (time.perf_counter() - started),
            }
            self.log.write(self.latest)

    def _figures(self, z: Tensor, x_hat: Tensor, f: Tensor) -> dict[str, Any]:
        """Figures of this batch in raw units, so that curves and eval.json can share an axis."""
        z_hat = (x_hat / self.scale).reshape(z.shape)
        error = squared_error(z_hat, z).mean(0)
        deviation = squared_error(z.mean(0), z).mean(0).clamp_min(1e-12)
        fired = (f > 0).float().sum(-1).mean(0)
        dead = (self.unfired >= self.cfg.dead_after_tokens).float().mean(-1)
        return {
            "L0": fired.sum().item(),
            "L0_per_head": fired.tolist(),
            "MSE": error.sum().item(),
            "FVU": (error.sum() / deviation.sum()).item(),
            "FVU_per_head": (error / deviation).tolist(),
            "dead_fraction": dead.mean().item(),
            "dead_fraction_per_head": dead.tolist(),
        }

    def folded(self) -> BlockDiagSAE:
        """A copy of the SAE for raw hook_z."""
        sae = copy.deepcopy(self.sae)
        sae.fold_scale(self.scale)
        return sae.eval().requires_grad_(False)

    def save(self, status: str) -> None:
        """Write weights for use and, unless the run is complete, everything that resuming needs.

        No random state is part of it: after initialisation the only randomness is the order of the
        rows, a function of the seed and the step.
        """
        checkpoint.save(self.path, self.folded(), self._config(status))
        folder = self.path / "training_state"
        if status == "complete" and not self.cfg.keep_training_state:
            if folder.exists():
                (folder / "state.safetensors").unlink(missing_ok=True)
                folder.rmdir()
            return
        state = {"scale": self.scale, "unfired": self.unfired}
        for name, parameter in self.sae.named_parameters():
            moments = self.optimizer.state[parameter]
            state |= {name: parameter.detach(), f"adam.exp_avg.{name}": moments["exp_avg"]}
            state |= {f"adam.exp_avg_sq.{name}": moments["exp_avg_sq"]}
        state = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
        folder.mkdir(exist_ok=True)
        metadata = {"step": str(self.step)}
        checkpoint.write_atomically(folder / "state.safetensors", lambda p: save_file(state, p, metadata))

    def _load_state(self) -> None:
        file = self.path / "training_state" / "state.safetensors"
        try:
            with safe_open(file, framework="pt", device=str(self.scale.device)) as state:
                self.step = int(state.metadata()["step"])
                self.scale, self.unfired = state.get_tensor("scale"), state.get_tensor("unfired")
                for name, parameter in self.sae.named_parameters():
                    parameter.data.copy_(state.get_tensor(name))
                    self.optimizer.state[parameter] = {
                        "step": torch.tensor(float(self.step), device=self.scale.device),
                        "exp_avg": state.get_tensor(f"adam.exp_avg.{name}"),
                        "exp_avg_sq": state.get_tensor(f"adam.exp_avg_sq.{name}"),
                    }
        except (SafetensorError, OSError, RuntimeError) as error:
            raise checkpoint.CheckpointError(f"{file} is damaged: {error}") from error

    def _config(self, status: str) -> dict[str, Any]:
        progress = {"status": status, "steps": self.step, "tokens_seen": self.step * self.cfg.batch_size}
        return {**self.description, **progress}


def lr_factor(step: int, total: int, warm_up_fraction: float, decay_fraction: float) -> float:
    """Share of the peak learning rate at `step` of `total`: linear rise, plateau, linear fall to 0."""
    warm_up, decay = warm_up_fraction * total, decay_fraction * total
    rising = (step + 1) / warm_up if warm_up else 1.0
    falling = (total - step) / decay if decay else 1.0
    return min(1.0, rising, falling)
