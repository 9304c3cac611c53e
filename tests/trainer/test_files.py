"""Files: checksums, locks, what is left of dead processes, and disks that are full."""

import os
import subprocess
import sys

import pytest
import torch

from trainer.files import load_tensors, save_tensors, sweep, write_json


def test_every_bit_of_a_file_of_tensors_counts(tmp_path):
    file = tmp_path / "x.safetensors"
    tensors = {"half": torch.arange(3.0).half(), "one": torch.tensor(7), "brain": torch.ones(2, 2).bfloat16()}
    save_tensors(file, tensors, "x")
    assert all(torch.equal(value, tensors[name]) for name, value in load_tensors(file, "x").items())
    content = file.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    for bit in range(8 * begin, 8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        with pytest.raises(ValueError, match=r"x\.safetensors is damaged"):
            load_tensors(file, "x")


def test_partial_files_of_dead_processes_are_swept(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = [f".a.json.{pid}.partial" for pid in (dead.pid, os.getpid())]
    for name in names:
        (tmp_path / name).touch()
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == names[1:]
    for name in (names[0], f".b.json.{dead.pid}.partial"):
        (tmp_path / name).touch()
    write_json(tmp_path / "a.json", {})
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", f".b.json.{dead.pid}.partial"}


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(OSError, match=r"x\.json could not be written"):
        write_json(tmp_path / "gone" / "x.json", {})
