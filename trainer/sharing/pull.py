"""Checkpoints from the hub. What comes from there is somebody else's: it is looked at before it takes its place."""

import os
import re
import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from trainer import ranks
from trainer.checkpoint import Checkpoint, CheckpointError
from trainer.config import require
from trainer.errors import one_line
from trainer.files import new_folder
from trainer.imports.hub import asking
from trainer.room import require_disk
from trainer.sharing.layout import checkpoint_files

OUT = Path("checkpoints")
_ADDRESS = re.compile(r"hf://?([^/@]+/[^/@]+)/([^/@]+)(?:@(.+))?")  # one slash is what pathlib leaves of two


def located(path: str | Path) -> Path:
    """A checkpoint directory, also of hf://OWNER/REPO/NAME[@REVISION]: that is pulled into checkpoints/ if need be.

    Commands write beside the weights, so a folder of the hub's cache would not do.

    Raises:
        ValueError: as `pull`, or the address is none.
    """
    if not str(path).startswith("hf:/"):
        return Path(path)
    found = _ADDRESS.fullmatch(str(path))
    if found is None:
        raise ValueError(f"{path} is no address of a checkpoint: hf://OWNER/REPO/NAME or hf://OWNER/REPO/NAME@REVISION")
    repo, name, revision = found.groups()
    # Nothing tells the others when the first one has it: they have not joined yet.
    require(
        ranks.asked() == 1,
        f"several processes would pull {path}: before them run `python -m trainer.hub pull {repo}/{name}`",
    )
    return pull(repo, name, OUT, revision)[0]


def pull(repo: str, name: str | None = None, out: Path = OUT, revision: str | None = None) -> list[Path]:
    """Checkpoints of a repository as directories of `out`; one that is there with the same weights stays as it is.

    Only files that a checkpoint has are taken, through the cache of the hub. They are read as any checkpoint is before
    any of them is moved into place, so an error leaves nothing.

    Args:
        repo: OWNER/REPO.
        name: of one of them; None for all.
        out: the folder of checkpoints.
        revision: branch, tag or commit; default the newest.

    Raises:
        ValueError: the hub cannot be reached or has no such thing, what it has is no checkpoint, or there is another
            one of that name here.
    """
    folders = _cached(repo, name, out, revision)
    for folder in folders:
        try:
            _check(folder, out / folder.name)
        except ValueError as error:  # it names the folder of the cache
            raise ValueError(one_line(str(error).replace(str(folder), f"hf://{repo}/{folder.name}"))) from error
    with ExitStack() as stack:
        for folder in folders:
            if not (out / folder.name).exists():
                _copy(folder, stack.enter_context(new_folder(out / folder.name)))
    return [out / folder.name for folder in folders]


def _cached(repo: str, name: str | None, out: Path, revision: str | None) -> list[Path]:
    """Folders of the hub's cache with our files of the checkpoints; without network, what it has of them."""
    import requests
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    with asking(repo, repo, "pulled"):
        try:
            listed = HfApi().model_info(repo, revision=revision, files_metadata=True).siblings or []
        except (requests.ConnectionError, requests.Timeout, OfflineModeIsEnabled):
            snapshot = Path(snapshot_download(repo, revision=revision, local_files_only=True))
            files = [str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file()]
            return [snapshot / each for each in _chosen(repo, name, files)]
        sizes = {file.rfilename: file.size or 0 for file in listed}
        chosen = _chosen(repo, name, sizes)
        wanted = [file for files in chosen.values() for file in files]
        for place in (Path(constants.HF_HUB_CACHE), out):
            require_disk(place, sum(sizes[file] for file in wanted), "make room, or pull one of them")
        snapshot = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    return [snapshot / each for each in chosen]


def _chosen(repo: str, name: str | None, listed: Iterable[str]) -> dict[str, list[str]]:
    """The files of the checkpoint of this name, or of all, in a listing."""
    listed = list(listed)
    found = checkpoint_files(listed)
    others = sorted(file.removesuffix("/cfg.json") for file in listed if file.endswith("/cfg.json"))
    theirs = f", but {repo}:{others[0]} for `python -m trainer.saelens import`" if others else ""
    require(bool(found), f"it has no checkpoint that `python -m trainer.hub push` made{theirs}")
    if name is None:
        return found
    require(name in found, f"it has no checkpoint {name}, but {', '.join(list(found)[:4])}")
    return {name: found[name]}


def _check(folder: Path, place: Path) -> None:
    """ValueError unless a folder is a checkpoint, whole and sound, and its place is free or has the same one."""
    theirs = Checkpoint(folder)
    _ = theirs.sae, theirs.eval, theirs.metrics()
    if not os.path.lexists(place):
        return
    try:
        same = Checkpoint(place).weights_hash == theirs.weights_hash
    except CheckpointError:
        same = False
    require(same, f"{place} exists already, with other weights than {folder}: rename it, or pull into another --out")
    print(f"{place} is here already, with the same weights")


def _copy(folder: Path, into: Path) -> None:
    """Our files of a cached checkpoint, which are links there; nothing else that lies beside them."""
    listed = (f"{folder.name}/{path.relative_to(folder)}" for path in folder.rglob("*"))
    for file in checkpoint_files(listed)[folder.name]:
        path = into / Path(file).relative_to(folder.name)
        path.parent.mkdir(exist_ok=True)
        shutil.copyfile(folder.parent / file, path)
