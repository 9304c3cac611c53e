"""The checkpoint directory: the only contract between training and looking.

    config.json          what was trained, on what, by which versions, and how far it got
    run.yaml             the options of this SAE: `python -m trainer --config` repeats or resumes it
    sae.safetensors      W_enc b_enc W_dec b_dec (and threshold), ready for raw hook_z
    metrics.jsonl        one line per logged step
    eval.json            held-out metrics
    training_state/      what exact resuming needs; dropped when the run completes
    analysis/            written later by `python -m analysis`

Nothing is pickled. Every file is written beside its name and moved into place.
"""

import hashlib
import json
import sys
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import trainer
from trainer.block_diag import BlockDiagSAE
from trainer.config import ActivationsConfig, SAEConfig, TrainingConfig
from trainer.files import write_atomically, write_json

if TYPE_CHECKING:  # it imports transformer_lens, for which pages that run no prompt should not wait
    from trainer.data.text import Corpus
    from trainer.model.lm import LanguageModel, Layer

SCHEMA_VERSION = 3
_PACKAGES = ("torch", "transformer-lens", "transformers", "safetensors", "numpy")
_Part = TypeVar("_Part")


class CheckpointError(ValueError):
    """A file of a checkpoint cannot be used; the message names the file and the reason.

    Args:
        command: what mends it, as one types it beside app.py; None where nothing does.
    """

    def __init__(self, message: str, command: str | None = None) -> None:
        super().__init__(message)
        self.command = command

    def __str__(self) -> str:
        return super().__str__() + (f": run `{self.command}`" if self.command else "")

    @property
    def reason(self) -> str:
        """The message without the command."""
        return super().__str__()


@dataclass(frozen=True)
class Sizes:
    """What an SAE is; `BlockDiagSAE` takes these arguments."""

    n_blocks: int
    width: int
    features_per_block: int
    activation: str = "relu"
    k: int | None = None
    k_scope: str = "head"

    @classmethod
    def of(cls, sae: BlockDiagSAE) -> "Sizes":
        return cls(*(getattr(sae, each.name) for each in fields(cls)))

    @property
    def n_parameters(self) -> int:
        """Weights and biases of its blocks, without zeros around them."""
        features = self.n_blocks * self.features_per_block
        thresholds = features if self.activation == "jumprelu" else 0
        return 2 * features * self.width + features + self.n_blocks * self.width + thresholds


@dataclass(frozen=True)
class Model:
    """The language model whose head outputs were reconstructed; `processing` is what loading does to its weights."""

    name: str
    fingerprint: str
    n_heads: int
    d_head: int
    dtype: str
    processing: dict[str, bool]
    hook_name: str
    hook_layer: int

    @classmethod
    def of(cls, layer: "Layer") -> "Model":
        """Of an SAE that reads this layer."""
        from trainer.model.loading import PROCESSING

        lm = layer.lm
        sizes = (lm.n_heads, lm.d_head)
        return cls(lm.name, lm.fingerprint(), *sizes, lm.dtype, PROCESSING, layer.hook_name, layer.index)


@dataclass(frozen=True)
class Text:
    """The text trained on, and which of it was held out."""

    name: str
    fingerprint: str
    context_size: int
    held_out_fraction: float
    text_column: str
    dataset_config: str | None = None
    dataset_split: str = "train"

    @classmethod
    def of(cls, corpus: "Corpus") -> "Text":
        return cls(*(getattr(corpus, each.name) for each in fields(cls)))


@dataclass(frozen=True)
class Options:
    """Everything that decided a run: `run.yaml`, in parts."""

    activations: ActivationsConfig
    sae: SAEConfig
    training: TrainingConfig


@dataclass(frozen=True)
class Imported:
    """What is known of an SAE that another program trained."""

    source: str
    recipe: str
    l1_coefficient: float | None = None
    k: int | None = None
    fold_value_biases: bool | None = None
    """whether its z had no value biases, as here; where it had, they were moved into b_enc and b_dec"""
    normalize: str | None = None
    """how the scale of its inputs was estimated, where it was lost"""


@dataclass(frozen=True)
class Config:
    """config.json. An SAE was trained here (`options`) or `imported`."""

    sae: Sizes
    model: Model
    text: Text
    group: str
    """shared by the SAEs of one command, also in W&B"""
    options: Options | None = None
    imported: Imported | None = None
    source: str | None = None
    """of activations: cached or live"""
    status: str = "complete"
    """training or complete"""
    steps: int | None = None
    tokens_seen: int | None = None
    wandb_id: str | None = None
    wandb_url: str | None = None
    versions: dict[str, str] = field(default_factory=dict)


class Checkpoint:
    """One checkpoint directory; what it holds is read when it is asked for.

    Raises:
        CheckpointError: config.json is missing, damaged or of another schema version.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config = _read_config(self.path / "config.json")

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def layer(self) -> int:
        return self.config.model.hook_layer

    @property
    def n_heads(self) -> int:
        """Of the model; a dense SAE has one block for all of them."""
        return self.config.model.n_heads

    @property
    def is_dense(self) -> bool:
        return self.config.sae.n_blocks == 1

    @property
    def is_complete(self) -> bool:
        return self.config.status == "complete"

    @property
    def recipe(self) -> str:
        """What tells a family of checkpoints from others: label, preset or recipe."""
        options, imported = self.config.options, self.config.imported
        name = "unknown"
        if options is not None:
            name = options.sae.label or options.sae.preset or options.sae.recipe
        elif imported is not None:
            name = imported.recipe
        return f"{name} (dense)" if self.is_dense else name

    @property
    def sparsity(self) -> str:
        """The coefficient or k, as one reads it."""
        of = self.config.imported if self.config.options is None else self.config.options.sae
        if of is None or (of.k is None and of.l1_coefficient is None):
            return ""
        return f"k {of.k}" if of.k else f"λ {of.l1_coefficient:g}"

    @property
    def site(self) -> str:
        """The model and layer whose head outputs it reconstructs; only SAEs of one site compare."""
        return f"{Path(self.config.model.name).name} layer {self.layer}"

    @property
    def weights(self) -> Path:
        """sae.safetensors"""
        return self.path / "sae.safetensors"

    @property
    def weights_hash(self) -> str:
        """What ties an analysis to the weights that it describes."""
        return hashlib.sha256(self.weights.read_bytes()).hexdigest()[:16]

    @cached_property
    def sae(self) -> BlockDiagSAE:
        """The SAE for raw hook_z, in float32 on the CPU.

        Raises:
            CheckpointError: the weights are missing, damaged or disagree with config.json.
        """
        try:
            tensors = load_file(self.weights)
        except FileNotFoundError:
            raise CheckpointError(f"{self.weights} is missing: the run has not saved weights yet") from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.weights} is damaged: {error}") from error
        try:
            sae = BlockDiagSAE(**asdict(self.config.sae))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{self.path / 'config.json'} does not describe an SAE: {error}") from error
        expected = {name: tuple(p.shape) for name, p in sae.named_parameters()}
        shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        if shapes != expected:
            raise CheckpointError(f"{self.weights} holds {shapes}, but config.json describes {expected}")
        if not all(torch.isfinite(t).all() for t in tensors.values()):
            raise CheckpointError(f"{self.weights} holds values that are not finite")
        sae.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        return sae.eval().requires_grad_(False)

    @cached_property
    def eval(self) -> dict[str, Any] | None:
        """eval.json, or None where the run has not been evaluated yet.

        Raises:
            CheckpointError: it is damaged.
        """
        file = self.path / "eval.json"
        return _read_json(file) if file.exists() else None

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last one that is still being written is left out.

        Raises:
            CheckpointError: it is damaged.
        """
        return read_metrics(self.path)

    def open_model(self, device: str = "cpu") -> "LanguageModel":
        """The language model; other weights than in training are reported on stderr.

        Raises:
            ValueError: it cannot be loaded, or its heads are not those of the checkpoint.
        """
        from trainer.model.lm import LanguageModel

        model = self.config.model
        lm = LanguageModel.load(model.name, device, model.dtype)
        if (lm.n_heads, lm.d_head) != (model.n_heads, model.d_head):
            raise ValueError(
                f"{lm.name} has {lm.n_heads} heads of {lm.d_head}, the checkpoint {model.n_heads} of {model.d_head}"
            )
        if lm.fingerprint() != model.fingerprint:
            print(f"warning: {lm.name} has other weights here than the checkpoint was trained on", file=sys.stderr)
        return lm

    def open_text(self, tokenizer: Any) -> "Corpus":
        """The text, with the same documents held out.

        Raises:
            ValueError: it cannot be read.
        """
        from trainer.data.text import Corpus

        text = self.config.text
        return Corpus(
            text.name, tokenizer, text.context_size, text.held_out_fraction, text.text_column, text.dataset_config,
            text.dataset_split,
        )  # fmt: skip


class Listing(NamedTuple):
    """The directories of a checkpoint folder, by name."""

    readable: list[Checkpoint]
    errors: list[CheckpointError]
    """why the others cannot be used"""


def list_checkpoints(folder: Path | str) -> Listing:
    """Every directory of `folder` that looks like a checkpoint."""
    folder = Path(folder)
    listing = Listing([], [])
    paths = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")) if folder.is_dir() else []
    for path in paths:
        try:
            checkpoint = Checkpoint(path)
            if checkpoint.is_complete and not checkpoint.weights.exists():
                raise CheckpointError(f"{checkpoint.weights} is missing")
            _ = checkpoint.eval
            listing.readable.append(checkpoint)
        except CheckpointError as error:
            listing.errors.append(error)
    return listing


def by_origin(checkpoints: list[Checkpoint]) -> list[list[Checkpoint]]:
    """Checkpoints of one layer, model and text together: they can share every forward."""
    groups: dict[tuple[Any, ...], list[Checkpoint]] = {}
    for checkpoint in checkpoints:
        model, text = checkpoint.config.model, checkpoint.config.text
        groups.setdefault((model.name, model.fingerprint, model.hook_layer, text), []).append(checkpoint)
    return list(groups.values())


def save(path: Path, sae: BlockDiagSAE, config: Config) -> None:
    """Write `sae.safetensors` and `config.json`.

    Args:
        path: the checkpoint directory, made if needed.
        sae: weights for raw hook_z (scales folded in).
    """
    path.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sae.named_parameters()}
    write_atomically(path / "sae.safetensors", lambda p: save_file(tensors, p))
    save_config(path, config)


def save_config(path: Path, config: Config) -> None:
    """Write `config.json` alone, with the versions of this program and its packages."""
    write_json(path / "config.json", {"schema_version": SCHEMA_VERSION, **asdict(config), "versions": versions()})


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """`Checkpoint.metrics` of a directory that may have no config.json yet."""
    file = path / "metrics.jsonl"
    if not file.exists():
        return []
    lines = file.read_text().splitlines(keepends=True)
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error


def versions() -> dict[str, str]:
    """Versions of this program, and of the packages that numbers depend on."""
    found = {"attn-saes": trainer.__version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error


def _read_config(file: Path) -> Config:
    data = _read_json(file)
    schema = data.get("schema_version") if isinstance(data, dict) else None
    if schema not in (2, SCHEMA_VERSION):
        raise CheckpointError(f"{file} has schema version {schema}, this program reads 2 and {SCHEMA_VERSION}")
    try:
        if schema == 2:
            data = _from_schema_2(data)
        options, imported = data["options"], data["imported"]
        return _part(
            Config,
            data
            | {
                "sae": _part(Sizes, data["sae"]),
                "model": _part(Model, data["model"]),
                "text": _part(Text, data["text"]),
                "options": options
                and Options(
                    _part(ActivationsConfig, options["activations"]),
                    _part(SAEConfig, options["sae"]),
                    _part(TrainingConfig, options["training"]),
                ),
                "imported": imported and _part(Imported, imported),
            },
        )
    except KeyError as error:
        raise CheckpointError(f"{file} has no {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} does not describe an SAE: {error}") from error


def _part(kind: type[_Part], data: dict[str, Any]) -> _Part:
    """A dataclass from those of its fields that a JSON object has; what it has besides is left out."""
    return kind(**{each.name: data[each.name] for each in fields(kind) if each.name in data})  # type: ignore[arg-type]


def _from_schema_2(data: dict[str, Any]) -> dict[str, Any]:
    """Until version 0.1: options in one flat object, blocks called heads, no run.yaml."""
    sae, flat = data["sae"], data["training"]
    sizes = {"n_blocks": sae["n_heads"], "width": sae["d_head"], "features_per_block": sae["features_per_head"]}
    imported = data.get("imported_from")
    return data | {
        "sae": sae | sizes,
        "options": None if imported else {"activations": flat, "sae": flat, "training": flat},
        "imported": imported and {**flat, "source": imported, "recipe": flat.get("label") or flat["recipe"]},
        "source": data.get("activations"),
    }
