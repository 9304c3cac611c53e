"""Checkpoints that are one SAE on several layers of a model: of one command, and alike in all but the layer."""

from dataclasses import dataclass, replace
from typing import Any

from trainer.checkpoint import Checkpoint


@dataclass(frozen=True)
class LayerSet:
    """What stands for a model where one checkpoint stands for a layer."""

    name: str
    """that of its checkpoints, without the layer where they have several"""
    members: dict[int, Checkpoint]
    """by layer, ascending"""


def layer_sets(checkpoints: list[Checkpoint]) -> list[LayerSet]:
    """Every checkpoint in one set, those of most layers first, then by name; one that is alone is a set of its own."""
    groups: dict[Any, dict[int, Checkpoint]] = {}
    for checkpoint in checkpoints:
        members = groups.setdefault(_kind(checkpoint), {})
        if checkpoint.layer in members:  # of another folder name: it may have been copied
            groups[checkpoint.path] = {checkpoint.layer: checkpoint}
        else:
            members[checkpoint.layer] = checkpoint
    sets = [LayerSet(_name(members), dict(sorted(members.items()))) for members in groups.values()]
    return sorted(sets, key=lambda each: (-len(each.members), each.name))


def counterpart(checkpoint: Checkpoint, others: list[Checkpoint]) -> Checkpoint | None:
    """The one of `others`, which are of another layer, that is the same SAE there; None where there is none."""
    kind = _kind(checkpoint)
    return next((each for each in others if _kind(each) == kind), None)


def _kind(checkpoint: Checkpoint) -> Any:
    """Equal for checkpoints of one set."""
    config = checkpoint.config
    if config.options is None:
        return checkpoint.path
    sae = replace(config.options.sae, hook_layer=0)
    return config.group, config.model.fingerprint, config.text.fingerprint, sae, config.options.training.seed


def _name(members: dict[int, Checkpoint]) -> str:
    (layer, first), *more = members.items()
    return first.name.replace(f"-L{layer}-", "-", 1) if more else first.name
