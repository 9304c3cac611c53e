"""The cache harvested ahead: said first, resumable, read by trainings, and checked against its manifest."""

import json
import shutil

import pytest

from tests.helpers import tiny_run
from tests.processes import commands
from trainer.__main__ import main as train
from trainer.cache import main
from trainer.checkpoint import Checkpoint
from trainer.data import buffer
from trainer.model.lm import LanguageModel


@pytest.fixture
def command(gpt2_folder, text_file, tmp_path, monkeypatch):
    """120 contexts of 31 tokens in 15 shards, of two layers."""
    monkeypatch.setenv("ATTN_SAES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(buffer, "_SHARD_CONTEXTS", 8)
    return [
        f"--model={gpt2_folder}", f"--dataset={text_file}", "--context_size=32", "--hook_layer=[1,2]",
        "--distinct_tokens=3720", "--device=cpu",
    ]  # fmt: skip


def folders(tmp_path):
    found = sorted((tmp_path / "cache" / "activations").iterdir())
    assert ["-1-" in found[0].name, "-2-" in found[1].name] == [True, True] and len(found) == 2
    return found


def test_a_training_reads_what_was_harvested_ahead(command, gpt2_folder, text_file, tmp_path, monkeypatch, capsys):
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "128 bytes a token: 3,720 tokens of 2 layers take 0 MB, of which 0 MB are missing" in said
    assert "It takes about" in said
    monkeypatch.setattr(buffer, "harvest", lambda *a: pytest.fail("the language model ran"))
    run = tiny_run(gpt2_folder, text_file, tmp_path / "out", "--total_training_steps=4", "--batch_size=64")
    wanted = ["--distinct_tokens=3720", "--hook_layer=2", "--eval_every=0", "--total_training_steps=60"]
    assert train([*run, *wanted, "--cache_gb=0", "--name=reads"]) == 0
    assert Checkpoint(tmp_path / "out" / "reads").config.source == "cached", "it is there: it may be as large as it is"
    assert main(command) == 0 and "from the cache" in capsys.readouterr().out


def test_a_stopped_harvest_goes_on(command, tmp_path, monkeypatch, capsys):
    z_of, ran = LanguageModel.z_of, []

    def stops(self, tokens, layers):
        ran.append(len(tokens))
        if len(ran) == 7:
            raise KeyboardInterrupt
        return z_of(self, tokens, layers)

    monkeypatch.setattr("trainer.cache.seconds_per_token", lambda *a: (0.0, 0.0))
    monkeypatch.setattr(LanguageModel, "z_of", stops)
    assert main(command) == 130 and "harvested so far are kept" in capsys.readouterr().err
    assert [len(list(folder.glob("shard-*"))) for folder in folders(tmp_path)] == [6, 6]
    assert main([*command, "--verify"]) == 2 and "2,232 tokens are still to be harvested" in capsys.readouterr().err
    ran.clear()
    ran.append(0)
    monkeypatch.setattr(LanguageModel, "z_of", lambda self, *a: ran.append(len(a[0])) or z_of(self, *a))
    assert main(command) == 0 and sum(ran) == 120 - 6 * 8
    assert main([*command, "--verify"]) == 0 and "3,720 tokens in 15 files" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["byte", "moved", "gone", "older"])
def test_a_file_that_is_not_what_was_written_is_found(command, tmp_path, capsys, fault):
    assert main(command) == 0 and main([*command, "--verify"]) == 0
    folder = folders(tmp_path)[1]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sum(shard["rows"] for shard in manifest["shards"]) == manifest["tokens"] == 3720
    assert manifest["bytes"] == sum((folder / shard["file"]).stat().st_size for shard in manifest["shards"])
    shard = folder / "shard-00003.safetensors"
    if fault == "byte":
        content = bytearray(shard.read_bytes())
        content[-100] ^= 1
        shard.write_bytes(content)
        sentence = "does not match its checksum"
    elif fault == "moved":
        shutil.copy(folder / "shard-00004.safetensors", shard)
        sentence = "is another file than its name says"
    elif fault == "gone":
        shard.unlink()
        sentence = "248 tokens are still to be harvested"
    else:
        (folder / "manifest.json").unlink()
        sentence = "has no manifest.json"
    capsys.readouterr()
    assert main([*command, "--verify"]) == 2 and sentence in capsys.readouterr().err


def test_another_content_than_the_manifest_says_is_found(command, tmp_path, capsys):
    """As after a copy of half of it: each file is whole, but of another harvest."""
    assert main(command) == 0
    file = folders(tmp_path)[0] / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["shards"][2]["checksum"] = "00000000"
    file.write_text(json.dumps(manifest))
    capsys.readouterr()
    assert main([*command, "--verify"]) == 2
    assert "shard-00002.safetensors is not the one of manifest.json" in capsys.readouterr().err


def test_what_cannot_be_is_refused_first(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("trainer.room.free_disk", lambda folder: 100)
    assert main(command) == 2 and "and 0 MB are free: harvest fewer" in capsys.readouterr().err
    assert main([*command, "--hook_layer=9"]) == 2 and "out of range" in capsys.readouterr().err
    assert main([*command, "--hook_layer=[]"]) == 2 and "name at least one" in capsys.readouterr().err
    assert not list(tmp_path.rglob("shard-*"))


def test_processes_share_it(command, tmp_path):
    assert commands(2, main, command) == commands(2, main, [*command, "--verify"]) == [[0, 0]]
    manifest = json.loads((folders(tmp_path)[1] / "manifest.json").read_text())
    assert (manifest["tokens"], len(manifest["shards"])) == (3720, 15)
