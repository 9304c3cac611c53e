"""One SAE of a run: its checkpoint directory, its log and its saved states."""

import os
import shlex
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from trainer import checkpoint, ranks
from trainer.block_diag import BlockDiagSAE
from trainer.checkpoint import Checkpoint, CheckpointError, Config, Model, Options, Sizes, Text
from trainer.config import ActivationsConfig, SAEConfig, TrainingConfig
from trainer.files import load_tensors, make_writable, save_tensors, sweep, write_atomically, write_json
from trainer.locks import locked
from trainer.log import MetricsLog
from trainer.tracking import Mode

# What may differ between a run and its continuation; what is read is compared by what it is (`Run.describe`).
_NOT_COMPARED = {"resume", "name", "label", "out", "device", "lm_device", "wandb", "wandb_project"}
_NOT_COMPARED |= {"keep_training_state", "buffer_tokens", "buffer_gb"}
_NOT_COMPARED |= {"model", "dataset", "context_size", "text_column", "dataset_config", "dataset_split"}
_NOT_COMPARED |= {f"{what}_every" for what in ("log", "save", "eval")}


class Run:
    """A checkpoint directory that is being written: by the first process, where several train.

    Args:
        path: the directory.
        options: what is trained, on what, and how.
        group: name that the SAEs of one command share, also in W&B.
    """

    def __init__(self, path: Path, options: Options, group: str) -> None:
        self.path, self.options, self.group = path, options, group
        self.sae, self.training = options.sae, options.training
        self.log: MetricsLog
        self.latest: dict[str, Any] = {}
        self._config: Config
        self._begun: Config | None = None  # config.json of the run that is continued

    @property
    def is_new(self) -> bool:
        """Whether there is nothing to continue."""
        return self._begun is None

    @property
    def begun_as(self) -> tuple[str | None, int] | None:
        """Source of activations and tokens shuffled together, where there is something to continue."""
        if self._begun is None or self._begun.options is None:
            return None
        return self._begun.source, self._begun.options.training.buffer_tokens

    def check(self, resume: bool) -> bool:
        """Whether there is anything to do.

        Raises:
            ValueError: the directory exists and may not be continued.
        """
        if not (self.path / "config.json").exists() and not (self.path / "sae.safetensors").exists():
            return True
        if not resume:
            # By its place, not by the one in run.yaml: the folder may have been moved.
            place = ["--config", str(self.path / "run.yaml"), "--out", str(self.path.parent), "--name", self.path.name]
            again = f"python -m trainer {shlex.join(place)} --resume=true"
            raise CheckpointError(
                f"{self.path} exists already: choose another --name or --out, or continue it with --resume=true",
                again if (self.path / "run.yaml").exists() else None,
            )
        begun = Checkpoint(self.path).config
        if begun.options is None:
            raise ValueError(f"{self.path} was imported: there is nothing to resume")
        before = _flat(begun.options)
        for key, value in _flat(self.options).items():
            if key not in _NOT_COMPARED and before[key] != value:
                was = f"{key}={before[key]}"
                raise ValueError(
                    f"{self.path} was begun with {was}, not {value}: resume it with the same configuration"
                )
        self._begun = begun
        if begun.status == "complete" and not self.training.keep_training_state:
            self.drop_states(keep=None)  # it was killed between its last two writes
        return begun.status != "complete"

    def describe(self, model: Model, text: Text, source: str, buffer_tokens: int) -> None:
        """Say what the run reads.

        Args:
            source: of activations: cached or live.
            buffer_tokens: that are shuffled together; kept in place of what was asked for, where that was more.

        Raises:
            ValueError: the run was begun on others.
        """
        begun = self._begun
        if begun is not None:
            moved = replace(begun.model, name=model.name), replace(begun.text, name=text.name)
            pairs = {"model": (moved[0], model), "text": (moved[1], text)}
            for what, (before, now) in pairs.items():
                if before != now:
                    raise ValueError(f"{self.path} was begun on another {what} than it would go on with: train anew")
        self._model, self._text, self._source = model, text, source
        self.training = replace(self.training, buffer_tokens=buffer_tokens)
        self.options = replace(self.options, training=self.training)

    @ranks.by_first
    def begin(self, step: int, sae: BlockDiagSAE, mode: Mode) -> None:
        """Open the log at `step`, with W&B as `trainer.tracking.reachable` says; the app shows the run from now on."""
        self.path.mkdir(parents=True, exist_ok=True)
        for folder in (self.path, self._folder):
            sweep(folder)
        wandb_id = (self._begun and self._begun.wandb_id) or uuid.uuid4().hex[:8]
        self._config = Config(
            sae=Sizes.of(sae), group=self.group, options=self.options, wandb_id=wandb_id, status="training", steps=step,
            tokens_seen=step * self.training.batch_size, versions=checkpoint.versions(), model=self._model,
            text=self._text, source=self._source, world_size=ranks.size(),
        )  # fmt: skip
        checkpoint.save_config(self.path, self._config)
        read = {"model": self._model.name, "dataset": self._text.name, "context_size": self._text.context_size}
        # Absolute, so that the file means this run from wherever it is used.
        place = {"out": os.path.abspath(self.path.parent), "name": self.path.name}
        options = to_flags(self.options) | place | {"resume": False} | read
        write_atomically(self.path / "run.yaml", lambda p: p.write_text(yaml.safe_dump(options, sort_keys=False)))
        self.log = MetricsLog(self.path, step, mode, self.training.wandb_project, self._config)
        if self.log.url:
            self._config = replace(self._config, wandb_url=self.log.url)
            checkpoint.save_config(self.path, self._config)

    def record(self, step: int, figures: dict[str, Any], histograms: dict[str, Tensor]) -> None:
        """Write one line of figures."""
        self.latest = {"step": step, "tokens": step * self.training.batch_size, **figures}
        if ranks.is_first():
            self.log.write(self.latest, histograms)

    @ranks.by_first
    def save(self, sae: BlockDiagSAE, step: int, status: str) -> None:
        """Write the weights for use and the config."""
        tokens = step * self.training.batch_size
        self._config = replace(self._config, status=status, steps=step, tokens_seen=tokens)
        checkpoint.save(self.path, sae, self._config)

    @ranks.by_first
    def complete(self, sae: BlockDiagSAE, result: dict[str, Any]) -> None:
        """Write eval.json and the weights for use, and close the log."""
        write_json(self.path / "eval.json", result)
        self.save(sae, self.training.total_training_steps, "complete")
        if not self.training.keep_training_state:
            self.drop_states(keep=None)
        self.log.finish(result)

    @ranks.by_first
    def save_state(self, step: int, state: dict[str, Tensor]) -> None:
        """Write what resuming at `step` needs, beside what is there."""
        self._folder.mkdir(exist_ok=True)
        save_tensors(self._state(step), state, f"step {step}")

    def saved_steps(self) -> set[int]:
        """Steps from which this run can go on."""
        return saved_steps(self.path)

    def load_state(self, step: int) -> dict[str, Tensor]:
        """What `save_state` wrote.

        Raises:
            CheckpointError: the file is damaged.
        """
        try:
            return load_tensors(self._state(step), f"step {step}")
        except ValueError as error:
            denied = isinstance(error.__cause__, PermissionError)
            way_out = "" if denied else f": delete {self.path} and train it again"
            raise CheckpointError(f"{error}{way_out}") from error

    @ranks.by_first
    def drop_states(self, keep: int | None) -> None:
        """Delete saved states but that of step `keep`."""
        if keep is None:
            shutil.rmtree(self._folder, ignore_errors=True)
        for step in self.saved_steps() - {keep}:
            self._state(step).unlink()

    @property
    def _folder(self) -> Path:
        return self.path / "training_state"

    def _state(self, step: int) -> Path:
        return self._folder / f"step-{step:07d}.safetensors"


def saved_steps(path: Path) -> set[int]:
    """Steps from which the run of a checkpoint directory can go on."""
    steps = [file.stem.removeprefix("step-") for file in (path / "training_state").glob("step-*.safetensors")]
    return {int(step) for step in steps if step.isdecimal()}


def to_flags(options: Options) -> dict[str, Any]:
    """Options as the command line names them."""
    flags = _flat(options)
    return {"l1_coefficients" if key == "l1_coefficient" else key: value for key, value in flags.items()}


@contextmanager
def plan(activations: ActivationsConfig, saes: list[SAEConfig], training: TrainingConfig) -> Iterator[list[Run]]:
    """Decide every checkpoint directory before anything is computed; those that are complete are left out.

    Inside, no other command trains them.

    Raises:
        ValueError: two SAEs would share a directory, one exists or is being trained, or nothing can be written there.
    """
    base = training.name or Path(os.path.abspath(activations.model)).name
    runs = []
    for sae in saes:
        dense = "" if sae.block == "head" else "-dense"
        what = f"{sae.label or sae.preset or sae.recipe}{dense}-x{sae.expansion_factor}-{sae.sparsity}"
        name = training.name if training.name and len(saes) == 1 else f"{base}-L{sae.hook_layer}-{what}"
        runs.append(Run(Path(training.out) / name, Options(activations, sae, training), base))
    names = [run.path.name for run in runs]
    for part in (training.name, *(sae.label for sae in saes)):
        if part is not None and (part != Path(part).name or part.startswith(".")):
            raise ValueError(f"{part!r} cannot be part of a checkpoint's name: leave out slashes and a leading dot")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two SAEs would both be called {twice[0]}: tell them apart with a label")
    if ranks.is_first():
        make_writable(Path(training.out))
    with locked([run.path for run in runs if ranks.is_first()]):
        left = [run for run in runs if run.check(training.resume)]
        if not left:
            raise ValueError(f"{runs[0].path} is complete: there is nothing to resume")
        new = [run for run in left if run.is_new]
        if training.resume and len(new) == len(left):  # perhaps it was begun in another folder
            print(f"Nothing to resume: {os.path.abspath(runs[0].path)} is not there, training begins")
        if new and any(run.saved_steps() for run in left):
            raise ValueError(
                f"{new[0].path} is not part of the interrupted run: resume that one, then train the new one"
            )
        yield left


def _flat(options: Options) -> dict[str, Any]:
    return {**asdict(options.activations), **asdict(options.sae), **asdict(options.training)}
