"""Data sets read by `datasets`, record by record: from the Hugging Face hub, a local folder, or saved to disk."""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from trainer.data.textfiles import is_saved
from trainer.errors import first_line

_SHUFFLED = 10_000  # records mixed, because a stream cannot be permuted whole
_WAITS = (1, 5, 30, 120, 300)  # seconds before a stream that broke off is opened again
_NETWORK = {"aiohttp", "asyncio", "fsspec", "http", "httpcore", "httpx", "huggingface_hub", "requests", "urllib3"}


def stream(name: str, config: str | None, split: str) -> Iterator[dict[str, Any]]:
    """Records in a fixed shuffled order. One that breaks off goes on at the record where it broke.

    Args:
        name: of a data set on the hub, or a local folder.
        config: which of its configurations; None where it has one.

    Raises:
        ValueError: it cannot be opened, a record cannot be read, or it broke off and several attempts failed.
    """
    n_read = failures = 0
    opened = False
    while True:
        try:
            records = _open(name, config, split)
            opened = True
            for record in islice(records, n_read, None):  # reading again is exact, a saved position is not
                n_read += 1
                failures = 0
                yield record
            return
        except Exception as error:
            reason = first_line(error)
            if not opened or not _may_pass(error):
                missing = _missing(name, config, split) if isinstance(error, ValueError) and not opened else None
                raise ValueError(missing or f"data set {name!r} could not be read: {reason}") from error
            if failures == len(_WAITS):
                raise ValueError(
                    f"data set {name!r} broke off after {n_read:,} records ({reason}) and could not be opened again in "
                    f"{failures} attempts: run the same command again, with --resume=true where training had begun; "
                    "what was harvested and saved stays"
                ) from error
            wait = _WAITS[failures]
            failures += 1
            print(
                f"data set {name!r} broke off after {n_read:,} records ({reason}): opened again in {wait} s, "
                f"attempt {failures} of {len(_WAITS)}",
                file=sys.stderr,
                flush=True,
            )
            time.sleep(wait)


def listing(folder: str) -> str:
    """Names and sizes of the files of a local data set: what it is, wherever it lies."""
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    kept = [path for path in files if not path.name.startswith((".", "cache-"))]  # `datasets` writes those
    return ", ".join(sorted(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}" for path in kept))


def _open(name: str, config: str | None, split: str) -> Iterable[dict[str, Any]]:
    import datasets  # slow to import, and only needed here

    folder = Path(name).expanduser()
    if not is_saved(folder):
        records = datasets.load_dataset(str(folder) if folder.is_dir() else name, config, split=split, streaming=True)
        return records.shuffle(seed=0, buffer_size=_SHUFFLED)
    saved = datasets.load_from_disk(str(folder))
    splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    if config is not None or split not in splits:
        raise ValueError(f"it was saved to disk without configurations, with the split {_listed(splits)}")
    return splits[split].to_iterable_dataset().shuffle(seed=0, buffer_size=_SHUFFLED)


def _missing(name: str, config: str | None, split: str) -> str | None:
    """Which configurations or splits there are, where the one asked for is none of them."""
    import datasets

    if is_saved(Path(name).expanduser()):
        return None
    with suppress(Exception):  # what is wrong is then something else, and was said already
        configs = datasets.get_dataset_config_names(name)
        if config not in configs and (config is not None or len(configs) > 1):
            return f"data set {name!r} has the configurations {_listed(configs)}: name one with --dataset_config"
        splits = datasets.get_dataset_split_names(name, config)
        if split not in splits:
            return f"data set {name!r} has the splits {_listed(splits)}: name one with --dataset_split"
    return None


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _may_pass(error: Exception) -> bool:
    """Whether the network is at fault, not the data set: its libraries' errors have no common base."""
    if isinstance(error, (FileNotFoundError, PermissionError)):
        return False
    return isinstance(error, OSError) or any(kind.__module__.split(".")[0] in _NETWORK for kind in type(error).__mro__)
