"""Checkpoints to the hub: for this program as they are, for SAELens in its own layout, and a card."""

import json
import os
import re
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from trainer.checkpoint import Checkpoint, CheckpointError
from trainer.config import require
from trainer.files import flaw, read_description
from trainer.imports.hub import asking
from trainer.room import gb
from trainer.saelens import why_not, write_saelens
from trainer.sharing.card import write_card
from trainer.sharing.layout import CARD, FILES, checkpoint_files, is_name

_PLACE = re.compile(r"/|~|file:|[A-Za-z]:[/\\]")


def push(
    paths: Sequence[Path],
    repo: str,
    private: bool = False,
    with_analysis: bool = False,
    message: str | None = None,
    licence: str | None = None,
    replace: bool = False,
) -> str:
    """Put checkpoints into a repository, in one commit; it is made if need be. Returns the address of the commit.

    Each gets a folder of its name. Places on this machine become names: see `without_places`.

    Args:
        paths: checkpoint directories.
        repo: OWNER/REPO.
        private: who may see it if it is made now.
        with_analysis: put analysis/ there too, with the contexts of its examples.
        message: of the commit.
        licence: for the card, as the hub names it; default that of its card, if it has one.
        replace: whether a checkpoint of the same name there gives way.

    Raises:
        ValueError: a checkpoint cannot be shared, or the hub does not take it.
        OSError: there is no room to put the files together.
    """
    from huggingface_hub import HfApi, get_token

    require(not os.path.isdir(repo), f"{repo} is a folder here: name the repository last, as OWNER/REPO")
    require(re.fullmatch(r"[\w.-]+/[\w.-]+", repo) is not None, f"{repo} is no name of a repository: say OWNER/REPO")
    require(
        licence is None or re.fullmatch(r"[a-z0-9.-]+", licence) is not None,
        f"{licence} is no license that the hub knows: say mit, apache-2.0 or another of its identifiers",
    )
    checkpoints = [_shareable(path) for path in paths]
    names = [each.name for each in checkpoints]
    require(len(set(names)) == len(names), "two of these checkpoints have the same name: rename one")
    require(get_token() is not None, "nobody is logged in to the Hugging Face hub: run `hf auth login`")

    api = HfApi()
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for each in checkpoints:
            _stage(each, folder / each.name, with_analysis)
        with asking(repo, repo, "pushed"):
            api.create_repo(repo, private=private or None, exist_ok=True)  # None: what its owner has as a rule
            there = api.model_info(repo)
            require(
                bool(there.private) or not private, "it is there already and everybody can see it: see its settings"
            )
            listed = [file.rfilename for file in there.siblings or []]
            taken = sorted(set(names) & {file.partition("/")[0] for file in listed})
            require(replace or not taken, f"it has {', '.join(taken)} already: say --replace, or rename yours")
            before, others = _there(repo, there.sha, set(listed), names)
        staged = sorted([*(Checkpoint(folder / name) for name in names), *others], key=lambda each: each.name)
        (folder / CARD).write_text(write_card(repo, staged, licence, before), encoding="utf-8")
        with asking(repo, repo, "pushed"), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "It seems that you are about to commit a data file"
            )  # tables of an analysis
            done = api.upload_folder(
                repo_id=repo, folder_path=folder, parent_commit=there.sha,
                delete_patterns=[f"{name}/*" for name in taken] or None,
                commit_message=message or f"Push {', '.join(names)}"[:72],
            )  # fmt: skip
    return str(done.commit_url)


def without_places(value: Any) -> Any:
    """JSON with the last part in place of every absolute path, and `out` as it is by default: where things lie here is
    of no use to others.

    A model or text that lay in a folder is then looked for under that name; its fingerprint tells whether it is found.
    """
    if isinstance(value, dict):
        return {key: "checkpoints" if key == "out" else without_places(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_places(each) for each in value]
    if isinstance(value, str) and _PLACE.match(value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def _shareable(path: Path) -> Checkpoint:
    """A checkpoint that is complete and sound, with a name that the hub can have."""
    checkpoint = Checkpoint(path.resolve() if path.name in ("", ".", "..") else path)
    _ = checkpoint.sae, checkpoint.eval, checkpoint.metrics()
    require(checkpoint.is_complete, f"{path} is still in training: push it when it is complete")
    require(
        is_name(checkpoint.name),
        f"the name {checkpoint.name} cannot be shared: rename it, with letters, digits, _ . + = - alone",
    )
    model, text = checkpoint.config.model.name, checkpoint.config.text.name
    for what, place in (("model", model), ("text", text)):
        if _PLACE.match(place):
            print(f"{path}: its {what} lies here only, so others read {without_places(place)} and name its place "
                  f"with --{what}")  # fmt: skip
    return checkpoint


def _stage(checkpoint: Checkpoint, folder: Path, with_analysis: bool) -> None:
    """Write what is shared of a checkpoint into a folder, and say how large it is."""
    folder.mkdir()
    files = [checkpoint.path / name for name in FILES]
    if with_analysis:
        analysis = checkpoint.path / "analysis"
        require((analysis / "meta.json").exists(), f"{checkpoint.path} has no analysis: leave out --with_analysis")
        (folder / "analysis").mkdir()
        files += [analysis / "meta.json", *sorted(analysis.glob("*.parquet"))]
    for file in files:
        if file.exists():
            _copy(file, folder / file.relative_to(checkpoint.path))
    size = f"{gb((folder / 'sae.safetensors').stat().st_size)} of weights"
    reason = why_not(checkpoint.config.sae)
    if reason is None:
        # Of the staged copy, whose model and text have no places.
        write_saelens(Checkpoint(folder), folder, f"{checkpoint.name} for SAELens")
        size += f", {gb((folder / 'sae_weights.safetensors').stat().st_size)} for SAELens"
    print(f"{checkpoint.name}: {size}" + (f"; {reason}, so it is not for SAELens" if reason else ""))


def _copy(file: Path, to: Path) -> None:
    """Byte for byte, unless it names places."""
    if file.suffix not in (".json", ".yaml") or file.name == "eval.json":
        shutil.copyfile(file, to)
        return
    try:
        text = read_description(file).decode()
        found = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
        require(isinstance(found, dict), "it holds no options")
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise CheckpointError(flaw(file, error)) from error
    clean = without_places(found)
    if clean == found:
        shutil.copyfile(file, to)
    elif file.suffix == ".json":
        to.write_text(json.dumps(clean, indent=1) + "\n")
    else:
        to.write_text(yaml.safe_dump(clean, sort_keys=False))


def _there(repo: str, revision: str | None, listed: set[str], ours: list[str]) -> tuple[str, list[Checkpoint]]:
    """The card of a repository, and what it says of its checkpoints besides ours: without their weights."""
    from huggingface_hub import snapshot_download

    described = [
        file
        for name, files in checkpoint_files(listed).items()
        for file in files
        if name not in ours and file in (f"{name}/config.json", f"{name}/eval.json")
    ]
    wanted = [*described, *({CARD} & listed)]
    if not wanted:
        return "", []
    snapshot = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    before = read_description(snapshot / CARD).decode("utf-8", "replace") if CARD in listed else ""
    others = []
    for name in sorted({file.partition("/")[0] for file in described}):
        try:
            other = Checkpoint(snapshot / name)
            _ = other.eval
            others.append(other)
        except CheckpointError as error:
            print(f"left out of the card: {error}")
    return before, others
