"""W&B that does not answer: training goes on offline."""

import socket
import subprocess
import sys

import pytest

from tests.helpers import PATIENCE, ROOT


@pytest.mark.parametrize("server", ["refuses", "accepts and never answers"])
def test_wandb_that_does_not_answer_is_used_offline(server, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        if server == "refuses":
            listening.close()
        environment = {
            "WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_API_KEY": "a" * 40, "HOME": str(tmp_path),
            "PATH": "", "WANDB_DIR": str(tmp_path),
        }  # fmt: skip
        said = subprocess.run(
            [sys.executable, "-c", "from trainer import log; log._PATIENCE = 1; print(log.reachable(None))"],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE,
        )  # fmt: skip
    assert said.stdout.endswith("offline\n"), said.stderr
    assert "W&B cannot be used" in said.stdout and "wandb sync" in said.stdout
