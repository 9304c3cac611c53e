"""What runs say they will take before they start, and what they then take.

    python -m benchmarks.cost

Memory is the largest resident size of the process, as the system counts it.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMON = ["--expansion_factor=4", "--total_training_steps=24", "--wandb=disabled", "--eval_tokens=254"]
RUNS = {
    "3 layers, streamed": ["--hook_layer=[5,11,17]", "--batch_size=2048", "--cache_gb=0"],
    "layer 11, 4 points, cached": ["--hook_layer=11", "--k=[8,16,32,64]", "--batch_size=2048"],
    "10 layers, streamed": ["--hook_layer=0-9", "--batch_size=1024", "--cache_gb=0", "--eval_tokens=127"],
}
SAID = re.compile(r"takes about (.+) \((.+)\), (.+) of memory and (.+) of disk")


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def run(options: list[str], folder: Path) -> tuple[list[str], float, float, int]:
    """The parts of the sentence; seconds from it to the end; bytes of memory, and of disk when half of it is done."""
    environment = {**os.environ, "ATTN_SAES_CACHE": str(folder / "cache"), "PYTHONUNBUFFERED": "1"}
    models = Path(os.environ.get("ATTN_SAES_CACHE") or Path.home() / ".cache/attn-saes") / "models"
    (folder / "cache").mkdir(parents=True)
    (folder / "cache" / "models").symlink_to(models)
    command = [sys.executable, "-m", "trainer", *COMMON, *options, f"--out={folder / 'out'}"]
    kept = [*command, "--keep_training_state=true"]
    process = subprocess.Popen(kept, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    said, started = None, 0.0
    for line in process.stdout:
        if found := SAID.search(line):
            said, started = list(found.groups()), time.perf_counter()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0 and said, "the run failed"
    return said, time.perf_counter() - started, usage.ru_maxrss * 1024, size(folder / "out") + size(folder / "cache")


def main() -> None:
    print(f"{os.cpu_count()} cores, 24 steps of batchtopk, expansion 4, evaluation on 254 tokens\n")
    print("| | said | took | memory said | taken | disk said | taken |\n|---|---|---|---|---|---|---|")
    for name, options in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            (duration, parts, memory, disk), seconds, resident, written = run(options, Path(folder))
        taken = f"{duration} ({parts}) | {seconds:,.0f} s | {memory} | {resident / 1e9:.1f} GB | {disk}"
        print(f"| {name} | {taken} | {written / 1e6:,.0f} MB |", flush=True)


if __name__ == "__main__":
    main()
