"""Data sets read by `datasets`, record by record: from the Hugging Face hub, a local folder, or saved to disk.

A data set is cut into streams, each of some of its files, that are read side by side: by one process all, by several
each its share. How many there are depends on the data set alone, so that what is read does not depend on who reads it.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from trainer.data.textfiles import is_saved
from trainer.errors import first_line

_SHUFFLED = 10_000  # records mixed, because a stream cannot be permuted whole; all streams together
_MOST_STREAMS = 16  # a process that reads them all has as many files open
_FILES_OF_A_STREAM = 4  # at least: of fewer, a short one ends its stream long before the others
_WAITS = (1, 5, 30, 120, 300)  # seconds before a stream that broke off is opened again
_NETWORK = {"aiohttp", "asyncio", "fsspec", "http", "httpcore", "httpx", "huggingface_hub", "requests", "urllib3"}


def n_streams(name: str, config: str | None, split: str) -> int:
    """Into how many streams a data set is cut; its files, or rows if it was saved to disk, decide.

    At most an eighth of the files is left over, by which some streams are longer than others.

    Raises:
        ValueError: it cannot be opened.
    """
    try:
        found = _load(name, config, split)
        n_files = len(found) if hasattr(found, "to_iterable_dataset") else found.num_shards
    except Exception as error:
        raise _refused(name, config, split, error) from error
    most = min(_MOST_STREAMS, n_files // _FILES_OF_A_STREAM)
    return max((n for n in range(1, most + 1) if n_files % n <= n_files // 8), default=1)


def which(index: int, of: int) -> str:
    """Of the streams of a data set, for messages: nothing where there is one."""
    return f", stream {index + 1} of {of}" if of > 1 else ""


def stream(
    name: str, config: str | None, split: str, index: int = 0, of: int = 1, start: int = 0
) -> Iterator[dict[str, Any]]:
    """Records in a fixed shuffled order. One that breaks off goes on at the record where it broke.

    Args:
        name: of a data set on the hub, or a local folder.
        config: which of its configurations; None where it has one.
        index, of: which one of how many streams; without them the whole data set is one.
        start: records to leave out at the beginning.

    Raises:
        ValueError: it cannot be opened, a record cannot be read, or it broke off and several attempts failed.
    """
    n_read, failures = start, 0
    what = f"data set {name!r}{which(index, of)}"
    opened = False
    while True:
        try:
            records = _open(name, config, split, index, of)
            opened = True
            for record in islice(records, n_read, None):  # reading again is exact, a saved position is not
                n_read += 1
                failures = 0
                yield record
            return
        except Exception as error:
            reason = first_line(error)
            if not opened:
                raise _refused(name, config, split, error) from error
            if not _may_pass(error):
                raise ValueError(f"{what} could not be read: {reason}") from error
            if failures == len(_WAITS):
                raise ValueError(
                    f"{what} broke off after {n_read:,} records ({reason}) and could not be opened again in "
                    f"{failures} attempts: run the same command again, with --resume=true where training had begun; "
                    "what was harvested and saved stays"
                ) from error
            wait = _WAITS[failures]
            failures += 1
            print(
                f"{what} broke off after {n_read:,} records ({reason}): opened again in {wait} s, "
                f"attempt {failures} of {len(_WAITS)}",
                file=sys.stderr,
                flush=True,
            )
            time.sleep(wait)
            _load.cache_clear()


def listing(folder: str) -> str:
    """Names and sizes of the files of a local data set: what it is, wherever it lies."""
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    kept = [path for path in files if not path.name.startswith((".", "cache-"))]  # `datasets` writes those
    return ", ".join(sorted(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}" for path in kept))


def _open(name: str, config: str | None, split: str, index: int, of: int) -> Iterable[dict[str, Any]]:
    found = _load(name, config, split)
    if hasattr(found, "to_iterable_dataset"):
        found = found.to_iterable_dataset(num_shards=of)
    return found.shard(of, index, contiguous=False).shuffle(seed=0, buffer_size=_SHUFFLED // of)


@lru_cache(maxsize=1)  # opened many times, and looking for the files of one on the hub takes seconds
def _load(name: str, config: str | None, split: str) -> Any:
    """Of `datasets` a `Dataset`, if it was saved to disk, or an `IterableDataset`."""
    import datasets  # slow to import, and only needed here

    folder = Path(name).expanduser()
    if not is_saved(folder):
        return datasets.load_dataset(str(folder) if folder.is_dir() else name, config, split=split, streaming=True)
    saved = datasets.load_from_disk(str(folder))
    splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    if config is not None or split not in splits:
        raise ValueError(f"it was saved to disk without configurations, with the split {_listed(splits)}")
    return splits[split]


def _refused(name: str, config: str | None, split: str, error: Exception) -> ValueError:
    """Why it cannot be opened."""
    missing = _missing(name, config, split) if isinstance(error, ValueError) else None
    return ValueError(missing or f"data set {name!r} could not be read: {first_line(error)}")


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
