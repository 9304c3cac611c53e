"""The JSON file beside weights of others, checked against what is read of it."""

import json
import math
import re
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from jaxtyping import Float
from torch import Tensor

from trainer.config import require
from trainer.files import flaw, read_description

Described = TypeVar("Described")


def read_json(file: Path) -> dict[str, Any]:
    """An object of JSON; a number that is not finite says nothing, and is None.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is damaged or no object.
    """
    try:
        found = json.loads(read_description(file), parse_constant=lambda _: None, parse_float=_finite)
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(flaw(file, error)) from error
    require(isinstance(found, dict), f"{file} is damaged: it holds no object")
    return found


def checked(found: dict[str, Any], kind: type[Described]) -> Described:
    """What is known of the fields of `kind`; anything else is left out.

    Raises:
        ValueError: a field is missing or of another type.
    """
    try:
        return msgspec.convert(found, kind)
    except msgspec.ValidationError as error:
        raise ValueError(f"its configuration cannot be used: {error}") from error


def check_shapes(
    tensors: dict[str, Float[Tensor, "..."]], expected: dict[str, tuple[int, ...]], optional: tuple[str, ...] = ()
) -> None:
    """ValueError unless the tensors have these shapes, and there are no others."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name not in optional}
    missing, unknown = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
    require(not missing, f"its weights lack {', '.join(missing)}")
    require(not unknown, f"its weights hold {', '.join(unknown[:4])}, which this architecture does not have")
    for name, shape in expected.items():
        require(
            shapes[name] == shape,
            f"its {name} is {list(shapes[name])}, but its configuration describes {list(shape)}",
        )


def layer_of(hook_name: str | None) -> int:
    """The layer of `blocks.L.attn.hook_z`.

    Raises:
        ValueError: it is another hook.
    """
    found = re.fullmatch(r"blocks\.([0-9]{1,6})\.attn\.hook_z", str(hook_name))
    if found is None:
        raise ValueError(f"it reads {hook_name}, not the head outputs of a layer (blocks.L.attn.hook_z)")
    return int(found[1])


def _finite(number: str) -> float | None:
    return value if math.isfinite(value := float(number)) else None
