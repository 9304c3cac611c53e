"""What lies where in a repository of the hub: a folder for each checkpoint, in our files and in those of SAELens.

README.md                         the card
<name>/config.json sae.safetensors run.yaml eval.json metrics.jsonl    the checkpoint
<name>/analysis/                  where it was asked for
<name>/cfg.json sae_weights.safetensors    the same SAE for sae_lens, with its zeros
"""

import re
from collections.abc import Iterable

CARD = "README.md"
FILES = ("config.json", "sae.safetensors", "run.yaml", "eval.json", "metrics.jsonl")
_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.+=-]{0,95}"
_FILE = re.compile(rf"({_NAME})/(?:{'|'.join(map(re.escape, FILES))}|analysis/(?:meta\.json|[a-z_]{{1,40}}\.parquet))")


def is_name(name: str) -> bool:
    """Whether a checkpoint of this name can be shared: it is part of addresses, commands and patterns of file names."""
    return re.fullmatch(_NAME, name) is not None


def checkpoint_files(listed: Iterable[str]) -> dict[str, list[str]]:
    """Our files of each checkpoint in a listing of a repository, by its name; everything else is left out."""
    found: dict[str, list[str]] = {}
    for file in listed:
        if of := _FILE.fullmatch(file):
            found.setdefault(of[1], []).append(file)
    return {
        name: files
        for name, files in sorted(found.items())
        if {f"{name}/config.json", f"{name}/sae.safetensors"} <= set(files)
    }
