"""Disks that are full, folders that may not be read or written, or are gone: for everything that writes or reads."""

import ctypes
import hashlib
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryFile

import pytest

from analysis.__main__ import main as analyse
from analysis.comments import Comments
from analysis.labels import Labels
from analysis.lists import Lists
from analysis.match.__main__ import main as match
from analysis.match.read import Match
from analysis.runs import progress, tables
from analysis.search import Tokens
from analysis.store import Analysis
from tests.helpers import PATIENCE, ROOT
from trainer.checkpoint import Checkpoint, list_checkpoints

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="permissions and sizes are limited as on Linux")
AREA = "disks"
A, B, DENSE = "batchtopk", "block-l1_1", "dense"
# Runs commands one after the other; a file may have `size` bytes and no more, which to a writer is a full disk.
_CHILD = """
import contextlib, importlib, io, json, resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for line in sys.stdin:
    size, module, function, arguments = json.loads(line)
    call = getattr(importlib.import_module(module), function)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size or hard, hard))
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
            status = call(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    print(json.dumps([status, said.getvalue()]), flush=True)
"""
_TEXT = ("--tokens=300", "--device=cpu")


def _without_privileges() -> None:
    """Permissions bind root too: without the capabilities that pass them over."""
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


class Child:
    """A process in which commands run."""

    def __init__(self) -> None:
        self._said = TemporaryFile("w+")  # noqa: SIM115 - ends with the process; a pipe that nobody reads fills up
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD], cwd=ROOT, text=True, preexec_fn=_without_privileges,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said,
        )  # fmt: skip

    def run(self, module: str, *arguments: object, size: int = 0) -> tuple[int, str]:
        """Exit status of a command line, and the last line that it says."""
        status, said = self.call(module, "main", [*map(str, arguments)], size=size)
        return status, (said.strip().splitlines() or [""])[-1]

    def call(self, module: str, function: str, *arguments: object, size: int = 0):
        """What a function returns, and what it says."""
        assert self._process.stdin and self._process.stdout
        print(json.dumps([size, module, function, arguments]), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            self._process.wait(PATIENCE)
            self._said.seek(0)
            raise AssertionError(self._said.read()[-3000:])  # a traceback
        return json.loads(answer)

    def end(self) -> None:
        self._process.communicate(timeout=PATIENCE)


@pytest.fixture
def child(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("ATTN_SAES_CACHE", str(tmp_path_factory.mktemp("cache")))
    started = Child()
    yield started
    started.end()


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    """Three checkpoints, one with an analysis and labels."""
    for name in (A, B, DENSE):
        shutil.copytree(trained / name, tmp_path / "checkpoints" / name)
    assert analyse([str(tmp_path / "checkpoints" / A), *_TEXT, "--examples=2", "--quantile_examples=1"]) == 0
    Labels(tmp_path / "checkpoints" / A).put(1, "of", "", seen=0.0)
    Lists(tmp_path / "checkpoints" / A).put(1, ["mine"])
    Comments(tmp_path / "checkpoints" / A).add(1, "Ada", "a comment")
    return tmp_path / "checkpoints"


def writers(folder: Path) -> dict[str, tuple[object, ...]]:
    """Command lines of everything that writes, but training."""
    a, b, dense, out = folder / A, folder / B, folder / DENSE, folder.parent / "out"
    return {
        "analysis": ("analysis.__main__", a, *_TEXT, "--examples=2", "--quantile_examples=1"),
        "one-to-one": ("analysis.match.__main__", a, b, *_TEXT),
        "split": ("analysis.match.__main__", a, dense, *_TEXT),
        "evaluate": ("trainer.evaluate", a, "--tokens=200", "--device=cpu"),
        "csv": ("analysis.export_csv", a, out / "csv"),
        "sae-vis": ("analysis.sae_vis", a, out / "a.html", "--features_per_head=1", "--tokens=400"),
        "SAELens": ("trainer.saelens", "export", a, out / "exported"),
    }


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    """Files that are not as before; complete new ones are allowed of several that a command writes."""
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def sentence(said: str, of: Path) -> None:
    assert said.startswith("error: ") and len(said) < 800 and "Traceback" not in said, said
    assert str(of) in said, said


@pytest.mark.slow
def test_no_room_left(child, folder, tries, fault):
    (folder.parent / "out").mkdir()
    draw, n, refused = random.Random(3), tries(1, 4), 0
    for name, command in writers(folder).items():
        for _ in range(n):
            before = contents(folder.parent)
            status, said = child.run(*command, size=round(10 ** draw.uniform(3, 4)))
            if status == 0:
                continue
            refused += 1
            assert status == 2
            sentence(said, folder.parent)
            touched = changed(before, contents(folder.parent))
            assert not touched or name == "csv", touched  # whose files are each whole
            assert not [file for file in touched if "partial" in file]
        assert child.run(*command)[0] == 0
    assert refused
    fault(AREA, "no room left while analysing, matching, evaluating or exporting", n * len(writers(folder)),
          "one sentence that names the file, what was there is as before; works after room was made")  # fmt: skip


@pytest.mark.slow
def test_folders_that_may_not_be_written(child, folder, fault):
    (folder.parent / "out").mkdir()
    whole = contents(folder.parent)
    for path in (folder / A, folder / B, folder / DENSE, folder.parent / "out"):
        path.chmod(0o555)
    for command in writers(folder).values():
        status, said = child.run(*command)
        assert status == 2
        sentence(said, folder.parent)
    assert contents(folder.parent).items() >= whole.items()
    assert not list(folder.glob("*/.*")), "nothing is left"
    fault(AREA, "a folder that may not be written", len(writers(folder)), "one sentence before the work begins")


def reads(folder: str) -> list[str]:
    """Read what the pages do; what cannot be read is a sentence."""
    listing = list_checkpoints(folder)
    said = [str(error) for error in listing.errors]
    progress.progress(listing.readable, 0.0)
    tables.summary(listing.readable)
    for one in listing.readable:
        for look in (
            lambda one=one: one.sae,
            lambda one=one: tables.curves([one]),
            lambda one=one: Analysis(one).feature(1),
            lambda one=one: Analysis(one).examples(1),
            lambda one=one: Analysis(one).neighbours(1),
            lambda one=one: Analysis(one).detection(1),
            lambda one=one: Analysis(one).search(Tokens("the")),
            lambda one=one: Analysis(one).heads,
            lambda one=one: Analysis(one).copying,
            lambda one=one: Analysis(one).patterns,
            lambda one=one: Analysis(one).merging,
            lambda one=one: Analysis(one).strings,
            lambda one=one: Match(one, Checkpoint(Path(folder) / B)).per_head() if one.name == A else None,
            lambda one=one: Match(one, Checkpoint(Path(folder) / B)).pairs if one.name == A else None,
            lambda one=one: Labels(one.path).table(),
            lambda one=one: Lists(one.path).all(),
            lambda one=one: Comments(one.path).table(),
        ):
            try:
                look()
            except ValueError as error:
                said.append(str(error))
    return said


@pytest.mark.slow
def test_what_may_not_be_read(child, folder, fault):
    assert match([str(folder / A), str(folder / B), *_TEXT]) == 0
    usual, _ = child.call("tests.faults.test_disks", "reads", str(folder))
    closed = [(folder, 0o000), (folder, 0o444), (folder / A, 0o000), (folder / A, 0o444)]
    closed += [(path, 0o000) for path in sorted((folder / A).rglob("*")) if path.name != "run.yaml"]
    for path, mode in closed:
        before = path.stat().st_mode
        path.chmod(mode)
        said, _ = child.call("tests.faults.test_disks", "reads", str(folder))
        path.chmod(before)
        new = [sentence for sentence in said if sentence not in usual]
        assert new, path
        for each in new:
            assert str(folder) in each and "\n" not in each and len(each) < 900 and "missing" not in each, each
            assert "damaged" not in each, each
    fault(AREA, "a folder or file of a checkpoint that may not be read", len(closed), "one sentence")


@pytest.mark.slow
def test_labels_without_room(child, folder, fault):
    for size in (1, 4096, 8192):
        said, _ = child.call("tests.faults.test_disks", "label", str(folder / B), "x" * 9000, size=size)
        assert said.startswith(str(folder / B / "labels.sqlite")) and "\n" not in said
        assert Labels(folder / B).table().empty
    assert child.call("tests.faults.test_disks", "label", str(folder / B), "x")[0] == "written"
    fault(AREA, "no room left for a label", 3, "one sentence, written after room was made")


def label(checkpoint: str, text: str) -> str:
    try:
        Labels(checkpoint).put(1, text, "", seen=0.0)
    except ValueError as error:
        return str(error)
    return "written"
