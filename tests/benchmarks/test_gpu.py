"""The GPU benchmark in its small form on a CPU: every row is built and takes its steps."""

import subprocess
import sys

import pytest

from benchmarks import gpu
from tests.helpers import ROOT


@pytest.mark.slow
def test_every_row_of_the_gpu_benchmark_runs():
    command = [sys.executable, "-m", "benchmarks.gpu", "--device=cpu", "--small"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {line.split(" | ")[0].removeprefix("| ") for line in done.stdout.splitlines()}
    steps = {name for name, precision, _ in gpu.sae_steps(gpu.SMALL, "cpu") if precision == "float32"}
    assert steps | {"model and batchtopk, 8 points, contexts of 16"} <= rows
