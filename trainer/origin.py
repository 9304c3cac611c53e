"""What finished checkpoints were trained on, opened again: the language model and the text."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

from trainer import checkpoint
from trainer.block_diag import BlockDiagSAE
from trainer.data.text import Corpus
from trainer.model.lm import LanguageModel


class Trained(NamedTuple):
    """A checkpoint with its weights in memory."""

    path: Path
    sae: BlockDiagSAE
    config: dict[str, Any]


def load_by_origin(paths: list[Path]) -> list[list[Trained]]:
    """Load checkpoints; those of one layer, model and text come together, so that they share every forward.

    Raises:
        CheckpointError: one of them cannot be used.
    """
    groups: dict[tuple, list[Trained]] = {}
    for path in paths:
        sae, config = checkpoint.load(path)
        model, text = config["model"], config["text"]
        key = (model["name"], model["fingerprint"], model["hook_layer"], *sorted(map(str, text.items())))
        groups.setdefault(key, []).append(Trained(Path(path), sae, config))
    return list(groups.values())


def open_model(config: dict[str, Any], device: str = "cpu") -> LanguageModel:
    """The language model of a checkpoint; other weights than in training are reported on stderr.

    Raises:
        ValueError: it cannot be loaded, or its heads are not those of the checkpoint.
    """
    model = config["model"]
    lm = LanguageModel.load(model["name"], device, model["dtype"])
    if (lm.n_heads, lm.d_head) != (model["n_heads"], model["d_head"]):
        raise ValueError(
            f"{lm.name} has {lm.n_heads} heads of {lm.d_head}, the checkpoint {model['n_heads']} of {model['d_head']}"
        )
    if lm.fingerprint() != model["fingerprint"]:
        print(f"warning: {lm.name} has other weights here than the checkpoint was trained on", file=sys.stderr)
    return lm


def open_text(text: dict[str, Any], tokenizer: Any) -> Corpus:
    """The text of a checkpoint (`config["text"]`), with the same documents held out.

    Raises:
        ValueError: it cannot be read.
    """
    return Corpus(text["name"], tokenizer, text["context_size"], text["held_out_fraction"], text["text_column"])
