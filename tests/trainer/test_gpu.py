"""On a GPU the same SAE is trained as on a CPU. Skipped where there is none, as in CI."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tests.helpers import ROOT, tiny_run
from tests.trainer.optimise.test_stack import HEADS, SPARSITIES, build, config, data
from trainer.checkpoint import list_checkpoints
from trainer.optimise.stack import Stack

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


def compare(recipe: str, scope: str, dead_after_tokens: int, compiled: bool) -> None:
    """30 steps of two points here and there, in float64, so that no selection depends on rounding."""
    torch.set_default_dtype(torch.float64)
    try:
        rows = data()
        revive = {"resample_fraction": 0.25} if recipe == "bricken" else {}
        saes = [config(recipe, each, k_scope=scope, **revive) for each in SPARSITIES[recipe]]
        here = build(saes, rows, dead_after_tokens=dead_after_tokens)
        start = [
            {name: value[i * HEADS : (i + 1) * HEADS].clone() for name, value in here.params.items()} for i in range(2)
        ]
        there = Stack(saes, start, here.scale.cuda(), replace(here.training, compile=compiled))
        for z in rows[: 30 * 64].split(64):
            here.update(z)
            there.update(z.cuda())
        for name, value in here.params.items():
            torch.testing.assert_close(there.params[name].cpu(), value, msg=lambda m, name=name: f"{name}: {m}")
        for point in range(2):
            ours, theirs = here.figures(point)[0], there.figures(point)[0]
            assert ours == {key: pytest.approx(value) for key, value in theirs.items()}
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("recipe", list(SPARSITIES))
@pytest.mark.parametrize("scope", ["layer", "head"])
@pytest.mark.parametrize("dead_after_tokens", [300, 10**6])
def test_a_stack_on_the_gpu_is_the_one_on_the_cpu(recipe, scope, dead_after_tokens):
    compare(recipe, scope, dead_after_tokens, compiled=False)


def test_a_compiled_one_too():
    """In a process of its own, without the checks of shapes, which torch.compile cannot follow."""
    script = f"from tests.trainer.test_gpu import compare\nfor r in {list(SPARSITIES)}: compare(r, 'layer', 300, True)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("cache_gb", [16, 0])
def test_a_run_on_the_gpu_ends_where_one_on_the_cpu_does(gpt2_folder, text_file, tmp_path, cache_gb):
    """By the command line as people use it there: in TF32 and compiled, which are the defaults; and resumed."""
    environment = os.environ | {"ATTN_SAES_CACHE": str(tmp_path / "cache")}
    more = ["--batch_size=128", "--k=[4,8]", "--lr=5e-3", "--total_training_steps=60", f"--cache_gb={cache_gb}"]
    found = {}
    for name, device, options in (
        ("cpu", "cpu", []),
        ("plain", "cuda", ["--tf32=false", "--compile=false"]),
        ("default", "cuda", ["--save_every=20"]),
    ):
        run = [*tiny_run(gpt2_folder, text_file, tmp_path / name, *more), f"--device={device}", *options]
        done = subprocess.run(
            [sys.executable, "-m", "trainer", *run], cwd=ROOT, capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found[name] = [each.eval["FVU"] for each in list_checkpoints(tmp_path / name).readable]
    assert found["plain"] == pytest.approx(found["cpu"], rel=0.02) and len(found["cpu"]) == 2
    assert found["default"] == pytest.approx(found["cpu"], rel=0.02)
