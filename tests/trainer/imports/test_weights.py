"""Weights of others: nothing in them is run, nothing larger than the file is allocated."""

import pickle
import zipfile
from collections import OrderedDict
from contextlib import suppress

import pytest
import torch
from safetensors.torch import save_file

from trainer.imports.weights import read_pickle, read_safetensors


class Evil:
    """What a pickle can do: it calls a function when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').write('ran')",)


def test_tensors_are_read_in_float32(tmp_path):
    weights = OrderedDict(a=torch.randn(3, 4).half(), b=torch.nn.Parameter(torch.randn(5)))
    torch.save(weights, tmp_path / "w.pt")
    found = read_pickle(tmp_path / "w.pt")
    assert {name: (value.dtype, value.shape) for name, value in found.items()} == {
        "a": (torch.float32, (3, 4)),
        "b": (torch.float32, (5,)),
    }
    assert torch.equal(found["a"], weights["a"].float()) and torch.equal(found["b"], weights["b"].detach())


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare", "beside tensors"])
def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(kind, tmp_path):
    evil, file = Evil(tmp_path / "ran"), tmp_path / "w.pt"
    if kind == "bare":
        file.write_bytes(pickle.dumps(evil))
    else:
        value = {"W_enc": torch.ones(2), "W_dec": evil} if kind == "beside tensors" else evil
        torch.save(value, file, _use_new_zipfile_serialization=kind != "legacy")
    with pytest.raises(ValueError, match=r"refused|damaged") as error:
        read_pickle(file)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()
    with suppress(Exception):
        torch.load(file, weights_only=False)
    assert (tmp_path / "ran").exists()  # it is a real one


def test_a_compressed_archive_is_refused(tmp_path):
    torch.save({"a": torch.randn(1000)}, tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "w.pt") as stored, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as bomb:
        for entry in stored.infolist():
            bomb.writestr(entry.filename, stored.read(entry), zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="is compressed, which"):
        read_pickle(tmp_path / "bomb.pt")


def test_a_tensor_that_claims_more_than_the_file_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1).expand(10**12)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="4,000,000,000,000 bytes, which is more than it has"):
        read_pickle(tmp_path / "w.pt")


@pytest.mark.parametrize(
    "value",
    [
        [torch.ones(2)],
        torch.ones(2),
        {"a": 1},
        {1: torch.ones(2)},
        {"a": torch.ones(2, dtype=torch.int64)},
        {"a": torch.ones(2, 2).to_sparse()},
        {"a": torch.ones(2, device="meta")},
        {"a": {"b": torch.ones(2)}},
    ],
)
def test_what_is_no_dictionary_of_floats_is_refused(value, tmp_path):
    torch.save(value, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt holds") as error:
        read_pickle(tmp_path / "w.pt")
    assert "\n" not in str(error.value)


def test_one_tensor_of_safetensors(tmp_path):
    save_file({"a": torch.ones(2), "n": torch.tensor(3)}, tmp_path / "w.safetensors")
    assert list(read_safetensors(tmp_path / "w.safetensors", only="a")) == ["a"]
    assert read_safetensors(tmp_path / "w.safetensors", only="b") == {}
    with pytest.raises(ValueError, match="'n', which is no tensor of floating point"):
        read_safetensors(tmp_path / "w.safetensors")


@pytest.mark.parametrize("read", [read_pickle, read_safetensors])
def test_a_missing_file_is_named(read, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pt is missing"):
        read(tmp_path / "none.pt")
