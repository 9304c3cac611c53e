"""W&B that does not answer: training goes on offline."""

import socket
import subprocess
import sys

import pytest
import wandb

from tests.helpers import PATIENCE, ROOT
from trainer.tracking import Tracked


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
        asked = "from trainer import tracking; tracking._PATIENCE = 1; print(tracking.reachable(None))"
        said = subprocess.run(
            [sys.executable, "-c", asked],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE,
        )  # fmt: skip
    assert said.stdout.endswith("offline\n"), said.stderr
    assert "W&B cannot be used" in said.stdout and "wandb sync" in said.stdout


def test_a_run_that_breaks_ends_the_sending(monkeypatch, tmp_path, capsys):
    sent = []

    class Broken:
        url = None

        def log(self, figures):
            sent.append(figures)
            raise BrokenPipeError("its process is gone")

    monkeypatch.setattr(wandb, "init", lambda **settings: Broken())
    tracked = Tracked(tmp_path / "a", "online", project="p")
    for step in range(2):
        tracked.send(lambda run: run.log({"step": step}))  # noqa: B023 - called at once
    assert sent == [{"step": 0}]
    assert capsys.readouterr().out == "W&B receives no more figures of a (its process is gone)\n"


def test_a_run_that_cannot_be_opened_goes_on_offline(monkeypatch, tmp_path, capsys):
    modes = []

    def init(mode, **settings):
        modes.append(mode)
        if mode == "online":
            raise wandb.errors.CommError("no answer")

    monkeypatch.setattr(wandb, "init", init)
    assert Tracked(tmp_path, "online").url is None and modes == ["online", "offline"]
    assert "W&B cannot be used (no answer)" in capsys.readouterr().out
