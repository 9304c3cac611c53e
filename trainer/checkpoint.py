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
import os
import sys
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import trainer
from trainer.block_diag import BlockDiagSAE, parameter_shapes
from trainer.config import ActivationsConfig, SAEConfig, TrainingConfig, require
from trainer.errors import one_line
from trainer.figures import Count, Positive, parse_evaluation, parse_line
from trainer.files import flaw, read_json, require_file, write_atomically, write_json

if TYPE_CHECKING:  # it imports transformer_lens, for which pages that run no prompt should not wait
    from trainer.data.text import Corpus
    from trainer.model.lm import LanguageModel, Layer

SCHEMA_VERSION = 3
_PACKAGES = ("torch", "transformer-lens", "transformers", "safetensors", "numpy")
_DTYPES = ("F32", "F16", "BF16")  # of weights; float64 would lose digits, and the others are no weights
HEADS = ".heads"  # ends the name of a folder beside checkpoints that describes a model (`analysis.heads`)
_LONGEST_LINE = 2**24  # bytes of metrics.jsonl, which has no end of its own


class CheckpointError(ValueError):
    """A file of a checkpoint cannot be used; the message, one line, names the file and the reason.

    Args:
        command: what mends it, as one types it beside app.py; None where nothing does.
    """

    def __init__(self, message: str, command: str | None = None) -> None:
        super().__init__(one_line(message))
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

    def __post_init__(self) -> None:
        require(self.k_scope in ("head", "layer"), f"k_scope must be head or layer, got {self.k_scope!r}")
        require(
            min(self.n_blocks, self.width, self.features_per_block) >= 1 and self.n_parameters <= 2**53,
            f"sizes must be positive, and of an SAE that can be: {self.n_blocks} blocks of width {self.width} with "
            f"{self.features_per_block} features",
        )

    @classmethod
    def of(cls, sae: BlockDiagSAE) -> "Sizes":
        return cls(*(getattr(sae, each.name) for each in fields(cls)))

    @property
    def d_sae(self) -> int:
        return self.n_blocks * self.features_per_block

    @property
    def n_parameters(self) -> int:
        """Weights and biases of its blocks, without zeros around them."""
        features = self.d_sae
        thresholds = features if self.activation == "jumprelu" else 0
        return 2 * features * self.width + features + self.n_blocks * self.width + thresholds


@dataclass(frozen=True)
class Model:
    """The language model whose head outputs were reconstructed; `processing` is what loading does to its weights."""

    name: str
    fingerprint: str
    n_heads: Positive
    d_head: Positive
    dtype: str
    processing: dict[str, bool]
    hook_name: str
    hook_layer: Count

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
    context_size: Positive
    held_out_fraction: Annotated[float, msgspec.Meta(ge=0, le=1)]
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
    steps: Count | None = None
    tokens_seen: Count | None = None
    world_size: Positive = 1
    """processes that trained it, since it was last resumed"""
    wandb_id: str | None = None
    wandb_url: str | None = None
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sae, model = self.sae, self.model
        require(self.status in ("training", "complete"), f"status is training or complete, not {self.status!r}")
        require(
            sae.n_blocks in (1, model.n_heads) and sae.n_blocks * sae.width == model.n_heads * model.d_head,
            f"{sae.n_blocks} blocks of width {sae.width} are neither the heads nor the layer of a model with "
            f"{model.n_heads} heads of {model.d_head}",
        )


class Checkpoint:
    """One checkpoint directory; what it holds is read when it is asked for.

    Raises:
        CheckpointError: config.json is missing, damaged or of another schema version, or the name is no UTF-8, which
            no page, table or address could show.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            str(self.path).encode()
        except UnicodeEncodeError:
            raise CheckpointError(f"the name of {self.path} is no UTF-8: rename it") from None
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
        """What ties an analysis to the weights that it describes.

        Raises:
            CheckpointError: as `check_weights`.
        """
        self.check_weights()
        return hashlib.sha256(self.weights.read_bytes()).hexdigest()[:16]

    def check_weights(self) -> None:
        """Compare what sae.safetensors says of its tensors with config.json; no tensor is read or made.

        Raises:
            CheckpointError: the weights are missing, damaged or disagree with config.json.
        """
        try:
            expected = {name: list(shape) for name, shape in parameter_shapes(**asdict(self.config.sae)).items()}
        except ValueError as error:
            raise CheckpointError(f"{self.path / 'config.json'} does not describe an SAE: {error}") from error
        try:
            require_file(self.weights)
            with safe_open(self.weights, framework="pt") as file:
                found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                shapes = {name: part.get_shape() for name, part in found.items()}
                dtypes = {name: part.get_dtype() for name, part in found.items()}
        except FileNotFoundError:
            raise CheckpointError(f"{self.weights} is missing: the run has not saved weights yet") from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(flaw(self.weights, error)) from error
        for name in sorted(expected.keys() | shapes.keys()):
            have, want = (f"{name} {of[name]}" if name in of else f"no {name}" for of in (shapes, expected))
            if have != want:
                raise CheckpointError(f"{self.weights} holds {have}, but config.json describes {want}")
            if dtypes[name] not in _DTYPES:
                raise CheckpointError(f"{self.weights} holds {name} as {dtypes[name]}, not one of {', '.join(_DTYPES)}")

    @cached_property
    def sae(self) -> BlockDiagSAE:
        """The SAE for raw hook_z, in float32 on the CPU.

        Raises:
            CheckpointError: as `check_weights`, or a weight is not finite.
        """
        self.check_weights()
        try:
            tensors = load_file(self.weights)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(flaw(self.weights, error)) from error
        if not all(torch.isfinite(t).all() for t in tensors.values()):
            raise CheckpointError(f"{self.weights} holds values that are not finite")
        sae = BlockDiagSAE(**asdict(self.config.sae))
        sae.load_state_dict(tensors)
        return sae.eval().requires_grad_(False)

    @cached_property
    def eval(self) -> dict[str, Any] | None:
        """eval.json (`trainer.figures.Evaluation`), or None where the run has not been evaluated yet.

        Raises:
            CheckpointError: it is damaged.
        """
        file = self.path / "eval.json"
        try:
            return parse_evaluation(read_json(file, dict[str, Any]), self.config.sae.n_blocks, self.n_heads)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise CheckpointError(flaw(file, error)) from error

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last one that is still being written is left out.

        Raises:
            CheckpointError: it is damaged.
        """
        return read_metrics(self.path)

    def place_of(self, name: str) -> str:
        """Where the model or the text of a name lies.

        A relative path is of the folder in which training was begun: the current one, or one above the checkpoint.
        """
        if os.path.exists(name) or not any(sign in name for sign in "./"):
            return name
        places = (str(folder / name) for folder in self.path.resolve().parents)
        return next((place for place in places if os.path.exists(place)), name)

    def open_model(self, device: str = "cpu", place: str | None = None) -> "LanguageModel":
        """The language model; where config.json names one with other weights than in training, stderr says so.

        Args:
            place: where it lies now, if elsewhere than config.json says: a folder or a name. Of the same model.

        Raises:
            ValueError: it cannot be loaded, its heads are not those of the checkpoint, or `place` is another model.
        """
        from trainer.model.lm import LanguageModel

        model = self.config.model
        try:
            lm = LanguageModel.load(place or self.place_of(model.name), device, model.dtype)
        except ValueError as error:
            if place:
                raise
            raise ValueError(f"{error} (of {self.path}): if it was moved, name its place with --model") from error
        if (lm.n_heads, lm.d_head) != (model.n_heads, model.d_head):
            raise ValueError(
                f"{lm.name} has {lm.n_heads} heads of {lm.d_head}, the checkpoint {model.n_heads} of {model.d_head}"
            )
        if lm.fingerprint() != model.fingerprint:
            _report(f"{lm.name} has other weights than the model that {self.path} was trained on", place)
        return lm

    def open_text(self, tokenizer: Any, place: str | None = None) -> "Corpus":
        """The text, with the same documents held out; where it is another than in training, stderr says so.

        Args:
            place: where it lies now, if elsewhere than config.json says. Of the same text.

        Raises:
            ValueError: it cannot be read, or `place` is another text.
        """
        from trainer.data.text import Corpus

        text = self.config.text
        try:
            corpus = Corpus(
                place or self.place_of(text.name), tokenizer, text.context_size, text.held_out_fraction,
                text.text_column, text.dataset_config, text.dataset_split,
            )  # fmt: skip
        except ValueError as error:
            if place:
                raise
            raise ValueError(f"{error} (of {self.path}): if it was moved, name its place with --text") from error
        if corpus.fingerprint != text.fingerprint:
            _report(f"{corpus.name} is another text than {self.path} was trained on", place)
        return corpus


class Listing(NamedTuple):
    """The directories of a checkpoint folder, by name."""

    readable: list[Checkpoint]
    errors: list[CheckpointError]
    """why the others cannot be used"""


def list_checkpoints(folder: Path | str) -> Listing:
    """Every directory of `folder` that looks like a checkpoint; the readable ones can be drawn without a further look.

    Their weights are compared with config.json, but not read; logs and analyses are not looked at.
    """
    folder = Path(folder)
    listing = Listing([], [])
    try:
        names = [name for name in os.listdir(folder) if not name.startswith(".") and not name.endswith(HEADS)]
        paths = sorted(folder / name for name in names)
    except (FileNotFoundError, NotADirectoryError):
        return listing
    except OSError as error:
        return Listing([], [CheckpointError(f"{folder} cannot be read: {error.strerror}")])
    if paths and not os.access(folder, os.X_OK):  # names may be listed, but what they are is not told
        return Listing([], [CheckpointError(f"{folder} may not be entered")])
    for path in paths:
        if not os.path.isdir(path):
            continue
        try:
            checkpoint = Checkpoint(path)
            if checkpoint.is_complete or os.path.lexists(checkpoint.weights):
                checkpoint.check_weights()
            _ = checkpoint.eval
            listing.readable.append(checkpoint)
        except CheckpointError as error:
            listing.errors.append(error)
    return listing


def _report(what: str, place: str | None) -> None:
    """What is found where config.json says is used with a warning, what somebody names is refused."""
    require(place is None, what)
    print(f"warning: {what}", file=sys.stderr)


def by_origin(checkpoints: list[Checkpoint], place: str | None = None) -> list[list[Checkpoint]]:
    """Checkpoints of one model and text together, by layer: they can share every forward.

    Args:
        place: where the model of all of them lies.

    Raises:
        ValueError: that is named, but they are of several models.
    """
    several = len({each.config.model.fingerprint for each in checkpoints}) > 1
    require(place is None or not several, "--model names one model, but these checkpoints are of several")
    groups: dict[tuple[Any, ...], list[Checkpoint]] = {}
    for checkpoint in checkpoints:
        model, text = checkpoint.config.model, checkpoint.config.text
        groups.setdefault((model.name, model.fingerprint, text), []).append(checkpoint)
    return [sorted(group, key=lambda each: each.layer) for group in groups.values()]


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
    file, lines = path / "metrics.jsonl", []
    try:
        require_file(file)
        with file.open("rb") as log:
            while (line := log.readline(_LONGEST_LINE)).endswith(b"\n"):
                lines.append(parse_line(line))
        require(len(line) < _LONGEST_LINE, "a line does not end")
    except FileNotFoundError:
        return []
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{flaw(file, error)} (line {len(lines) + 1})") from error
    return lines


def versions() -> dict[str, str]:
    """Versions of this program, and of the packages that numbers depend on."""
    found = {"attn-saes": trainer.__version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _read_config(file: Path) -> Config:
    try:
        data = read_json(file, dict[str, Any])
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing") from None
    except ValueError as error:
        raise CheckpointError(flaw(file, error)) from error
    schema = data.get("schema_version")
    if schema not in (2, SCHEMA_VERSION):
        raise CheckpointError(f"{file} has schema version {schema}, this program reads 2 and {SCHEMA_VERSION}")
    try:
        return msgspec.convert(_from_schema_2(data) if schema == 2 else data, Config)
    except KeyError as error:
        raise CheckpointError(f"{file} has no {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} does not describe an SAE: {error}") from error


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
