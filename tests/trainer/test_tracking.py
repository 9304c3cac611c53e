"""W&B that does not answer: training goes on offline."""

import json
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

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


class Server(ThreadingHTTPServer):
    """As much of W&B's as opening a run asks for; another key than forty times a is refused."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class _Answers(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers.get("Content-Length") or 0)).lower()
        is_known = "YXBpOmFh" in self.headers.get("Authorization", "")  # api:aa in base64
        answer: dict = {"viewer": {"id": "x", "username": "me", "entity": "me", "flags": "{}", "teams": {"edges": []}}}
        if b"upsertbucket" in asked:
            project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "me"}}
            bucket = {"id": "b", "name": "abc", "displayName": "d", "config": "{}", "historyLineCount": 0}
            answer = {"upsertBucket": {"bucket": bucket | {"project": project}, "inserted": True}}
        elif b"viewer" not in asked:
            answer = {}
        data = json.dumps({"data": answer} if is_known else {"errors": [{"message": "invalid key"}]}).encode()
        self.send_response(200 if is_known else 401)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *said) -> None:
        pass


_TRACKED = """
from pathlib import Path
from trainer import tracking
tracking._SENDING, tracking._PATIENCE = 1, 600  # a busy machine is no reason
tracked = tracking.Tracked(Path("."), mode := tracking.reachable(None), project="p")
print(mode, tracked.url, flush=True)
input()
for step in range(3):
    tracked.send(lambda run: run.log({"loss": step}))
tracked.send(lambda run: run.finish())
print("went on")
"""


@pytest.mark.parametrize("key", ["a", "b"])
def test_a_wandb_that_refuses_the_key_or_breaks_in_mid_run(key, tmp_path):
    server = Server()
    environment = {
        "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}", "WANDB_API_KEY": key * 40, "HOME": str(tmp_path),
        "PATH": "", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    run = subprocess.Popen(
        [sys.executable, "-c", _TRACKED], cwd=tmp_path, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    said = run.stdout.readline()
    while said and not said.startswith(("online", "offline")):
        assert "invalid key" in said and "wandb sync" in said and key == "b"
        said = run.stdout.readline()
    server.close()
    rest, errors = run.communicate("\n", timeout=PATIENCE)
    assert run.returncode == 0 and rest == "went on\n", errors
    assert said == (f"online {environment['WANDB_BASE_URL']}/me/p/runs/abc\n" if key == "a" else "offline None\n")
    assert list(tmp_path.glob("wandb/*run-*/*.wandb")), "what was logged is kept"


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
