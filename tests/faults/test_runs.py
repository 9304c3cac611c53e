"""Bulk trials of what may happen to a run: kills, flipped bits, swapped shards, full disks, two at once."""

import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

from tests.helpers import OTHERS, PATIENCE, ROOT, tiny_run
from trainer.__main__ import main
from trainer.checkpoint import Checkpoint
from trainer.data import buffer
from trainer.optimise.stack import Stack

AREA = "runs"
# A file may have this many bytes and no more: to a writer it is a full disk, and no root is needed.
FULL = """
import resource, signal, sys
from trainer.__main__ import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
size = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture
def command(gpt2_folder, text_file, tmp_path, monkeypatch):
    """A short run; returns a function of its name and the arguments beside it, and the folder."""
    monkeypatch.setenv("ATTN_SAES_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "checkpoints"
    more = ("--total_training_steps=60", "--batch_size=64", "--save_every=5", "--keep_training_state=true")
    arguments = tiny_run(gpt2_folder, text_file, out, *more)
    return lambda name, *more: [*arguments, f"--name={name}", *more], out


def same(one, other):
    one, other = (load_file(path / "sae.safetensors") for path in (one, other))
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def flip(path, draw):
    """One bit of a file; returns what it was."""
    before = path.read_bytes()
    changed = bytearray(before)
    begin = 8 + int.from_bytes(before[:8], "little")
    at = draw.randrange(8 * begin, 8 * len(before))
    changed[at // 8] ^= 1 << at % 8
    path.write_bytes(changed)
    return before


def test_kills_at_any_moment(command, tries, fault):
    arguments, out = command
    assert main(arguments("whole")) == 0
    draw, n = random.Random(0), tries(0, 4)
    if not n:
        pytest.skip("test_train.py kills a run too; this one takes a minute")
    for trial in range(n):
        name, spent = f"killed{trial}", 0
        shutil.rmtree(out.parent / "cache", ignore_errors=True)
        started = time.time()
        while True:
            run = subprocess.Popen(
                [sys.executable, "-m", "trainer", *arguments(name, "--resume=true")],
                cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            )  # fmt: skip
            try:
                _, said = run.communicate(timeout=draw.uniform(4, 12) if spent < 2 else PATIENCE)
                break
            except subprocess.TimeoutExpired:
                run.send_signal(signal.SIGKILL)
                run.communicate()
                spent += 1
        assert run.returncode == 0 or b"is complete" in said, (said, time.time() - started)
        assert same(out / "whole", out / name)
        assert not list(out.glob("*/.*.partial"))
    fault(AREA, "SIGKILL at a random moment, harvest and saves included", n, "resumed to the bit")


def test_flipped_bits(command, tries, fault, capsys):
    arguments, out = command
    assert main(arguments("run")) == 0
    (state,) = (out / "run" / "training_state").iterdir()
    shard = next((out.parent / "cache" / "activations").rglob("shard-00000.safetensors"))
    draw, n = random.Random(1), tries(2, 20)
    # As it was before its end, so that there is something to resume.
    config = out / "run" / "config.json"
    config.write_text(config.read_text().replace('"status": "complete"', '"status": "training"'))
    state = state.rename(state.with_name("step-0000060.safetensors"))
    for _ in range(n):
        whole = flip(state, draw)
        assert main(arguments("run", "--resume=true")) == 2
        assert "does not match its checksum" in capsys.readouterr().err
        state.write_bytes(whole)
        whole = flip(shard, draw)
        shutil.rmtree(out / "other", ignore_errors=True)
        assert main(arguments("other")) == 2
        assert "does not match its checksum" in capsys.readouterr().err
        shard.write_bytes(whole)
    fault(AREA, "one bit flipped in a saved state or an activation shard", 2 * n, "refused, the file named")


@pytest.mark.slow
def test_full_disks(command, tries, fault):
    arguments, out = command
    assert main(arguments("whole")) == 0
    draw, n, refused = random.Random(2), tries(1, 4), 0
    for trial in range(n):
        name, size = f"full{trial}", round(10 ** draw.uniform(2, 5))
        shutil.rmtree(out.parent / "cache", ignore_errors=True)
        run = subprocess.run(
            [sys.executable, "-c", FULL, str(size), *arguments(name)],
            cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE,
        )  # fmt: skip
        assert run.returncode in (0, 2) and "Traceback" not in run.stderr, run.stderr[-2000:]
        refused += run.returncode == 2
        why = ("could not be written", "could not be loaded", "cannot be")
        assert run.returncode == 0 or any(each in run.stderr for each in why), run.stderr
        assert run.returncode == 0 or main(arguments(name, "--resume=true")) == 0
        assert same(out / "whole", out / name)
    assert refused
    fault(AREA, "no room left, at a random size of file", n, "one sentence, resumed to the bit after room was made")


def test_one_constant_head(gpt2_folder, text_file, tmp_path, tries, fault, monkeypatch, capsys):
    """It costs the others nothing, neither in training nor at the end of it."""
    monkeypatch.setenv("ATTN_SAES_CACHE", str(tmp_path / "cache"))
    folder, out = shutil.copytree(gpt2_folder, tmp_path / "constant"), tmp_path / "checkpoints"
    model = GPT2LMHeadModel.from_pretrained(folder)
    model.transformer.h[1].attn.c_attn.weight.data[:, 64 + 16 : 64 + 24] = 0  # the values of head 2
    model.save_pretrained(folder)
    more = ("--total_training_steps=40", "--batch_size=128", "--lr=1e-3")
    recipes = {"april": "--l1_coefficients=1", **OTHERS}
    kinds = [(recipe, block) for recipe in recipes for block in ("head", "dense")]
    kinds = [kind for kind in kinds if tries(kind[0] in ("april", "bricken"), True)]
    for recipe, block in kinds:
        name = f"{recipe}-{block}"
        arguments = (*more, f"--recipe={recipe}", recipes[recipe], f"--block={block}", f"--name={name}")
        assert main(tiny_run(folder, text_file, out, *arguments)) == 0, name
        assert "head 2 is constant" in capsys.readouterr().out
        figures = Checkpoint(out / name).eval
        assert [fvu is None for fvu in figures["FVU_per_head"]] == [False, False, True, False]
    fault(AREA, "one head of a layer is constant", len(kinds), "named; the others are trained and evaluated")


@pytest.mark.slow
def test_folders_that_vanish(command, fault, monkeypatch, capsys):
    arguments, out = command
    cache, steps = out.parent / "cache", "--total_training_steps=300"  # three shards
    monkeypatch.setattr("trainer.train._STATISTICS_ROWS", 64)  # else all of them are read before the first step
    assert main(arguments("whole", steps)) == 0
    whole = out.rename(out.parent / "whole") / "whole"
    update, save = Stack.update, buffer.save_tensors

    def while_training(stack, z):
        update(stack, z)
        if stack.step == 17:
            shutil.rmtree(gone)

    def while_harvesting(path, *more):
        shutil.rmtree(cache)
        save(path, *more)

    for gone, module, name, instead in (
        (out / "run", Stack, "update", while_training),
        (out, Stack, "update", while_training),
        (cache, Stack, "update", while_training),
        (cache, buffer, "save_tensors", while_harvesting),
    ):
        if instead is while_harvesting:
            shutil.rmtree(cache)
        shutil.rmtree(out, ignore_errors=True)
        with monkeypatch.context() as patch:
            patch.setattr(module, name, instead)
            assert main(arguments("run", steps)) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("error: ") and str(gone) in said
        assert main(arguments("run", steps, "--resume=true")) == 0
        assert same(whole, out / "run")
    fault(AREA, "the folder of the checkpoint, of all, or of the cache deleted in mid-run", 4,
          "one sentence, to the bit with --resume=true")  # fmt: skip
