"""A stand-in of the Hugging Face hub's HTTP API on this machine: what pushing and pulling models needs, no more.

Written after huggingface_hub's client; whether the hub itself answers so, it cannot tell.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
import yaml

TOKEN, READ_ONLY = "hf_writes", "hf_reads"
LARGE = (".safetensors", ".parquet")  # uploaded by the protocol of git-lfs, the others within the commit


@dataclass
class Repo:
    """A repository: its files after each commit, by the commit's hash."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.head]

    def commit(self, files: dict[str, bytes], message: str = "") -> str:
        self.messages.append(message)
        sha = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[sha] = files
        return sha


class Hub:
    """The repositories, and what was asked."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.sizes: dict[str, int] = {}
        """what it claims of files, where that is not true"""

    def add(self, repo: str, files: dict[str, bytes], private: bool = False) -> Repo:
        """A repository that somebody else made."""
        made = self.repos[repo] = Repo(private)
        made.commit(files)
        return made


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "", body: bytes = b"{}") -> None:
        self.status, self.code, self.message, self.body = status, code, message, body


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments) -> None:
            pass

        def do_GET(self) -> None:
            self._answer()

        do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

        def _answer(self) -> None:
            body = self._body()
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(f"{self.command} {path}")
            try:
                self._send(200, *self._route(path, body))
            except _Refused as refused:
                headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
                self._send(refused.status, refused.body, {key: value for key, value in headers.items() if value})

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        @property
        def _token(self) -> str | None:
            return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

        def _may_write(self) -> None:
            if self._token not in (TOKEN, READ_ONLY):
                raise _Refused(401, message="Invalid credentials in Authorization header")
            if self._token == READ_ONLY:
                raise _Refused(403, message="you have read access only")

        def _repo(self, name: str) -> Repo:
            repo = hub.repos.get(name)
            if repo is None or (repo.private and self._token is None):
                raise _Refused(401, "RepoNotFound")
            return repo

        def _files(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
            repo = self._repo(name)
            sha = repo.head if revision == "main" else revision
            if sha not in repo.commits:
                raise _Refused(404, "RevisionNotFound")
            return sha, repo.commits[sha]

        def _route(self, path: str, body: bytes) -> tuple[bytes, dict[str, str]]:
            if path == "/api/repos/create":
                return self._create(json.loads(body))
            if path == "/api/validate-yaml":
                front = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
                assert front is not None and isinstance(yaml.safe_load(front[1]), dict)
                return _json({"errors": [], "warnings": []})
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|tree)/(.+)", path):
                return getattr(self, f"_{found[2]}")(found[1], found[3], body)
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
                sha, files = self._files(found[1], found[2] or "main")
                siblings = [{"rfilename": name, "size": hub.sizes.get(name, len(data))} for name, data in files.items()]
                private = hub.repos[found[1]].private
                return _json({"id": found[1], "sha": sha, "private": private, "siblings": siblings})
            if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
                self._may_write()
                here = f"http://{self.headers['Host']}/lfs"
                objects = [{"oid": each["oid"], "size": each["size"],
                            "actions": {"upload": {"href": f"{here}/{each['oid']}"}}}
                           for each in json.loads(body)["objects"]]  # fmt: skip
                return _json({"transfer": "basic", "objects": objects})
            if path.startswith("/lfs/"):
                assert hashlib.sha256(body).hexdigest() == path.removeprefix("/lfs/")
                hub.blobs[path.removeprefix("/lfs/")] = body
                return b"", {}
            if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                sha, files = self._files(found[1], found[2])
                if found[3] not in files:
                    raise _Refused(404, "EntryNotFound")
                data = files[found[3]]
                return data, {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
            raise AssertionError(f"the stand-in knows no {self.command} {path}")

        def _create(self, asked: dict) -> tuple[bytes, dict[str, str]]:
            self._may_write()
            if asked["organization"] != "me":
                raise _Refused(403, message="you may not create models there")
            name = f"me/{asked['name']}"
            answer = _json({"url": f"http://{self.headers['Host']}/{name}"})
            if name in hub.repos:
                raise _Refused(409, body=answer[0])
            hub.add(name, {".gitattributes": b""}, bool(asked.get("private")))
            return answer

        def _tree(self, name: str, revision: str, body: bytes) -> tuple[bytes, dict[str, str]]:
            _, files = self._files(name, revision)
            return _json([{"type": "file", "path": path, "size": len(data), "oid": "0"}
                          for path, data in files.items()])  # fmt: skip

        def _preupload(self, name: str, revision: str, body: bytes) -> tuple[bytes, dict[str, str]]:
            self._may_write()
            self._repo(name)
            return _json({"files": [
                {"path": each["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if each["path"].endswith(LARGE) else "regular"}
                for each in json.loads(body)["files"]
            ]})  # fmt: skip

        def _commit(self, name: str, revision: str, body: bytes) -> tuple[bytes, dict[str, str]]:
            self._may_write()
            repo = self._repo(name)
            files, message = dict(repo.files), ""
            for line in body.splitlines():
                of = json.loads(line)
                value = of["value"]
                if of["key"] == "header":
                    message = value["summary"]
                    if value.get("parentCommit") not in (None, repo.head):
                        raise _Refused(412, message="the branch has moved")
                elif of["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif of["key"] == "lfsFile":
                    files[value["path"]] = hub.blobs[value["oid"]]
                elif of["key"] == "deletedFile":
                    del files[value["path"]]
                else:
                    raise AssertionError(of["key"])
            sha = repo.commit(files, message)
            url = f"http://{self.headers['Host']}/{name}/commit/{sha}"
            return _json({"success": True, "commitOid": sha, "commitUrl": url})

    return Handler


def _json(value: object) -> tuple[bytes, dict[str, str]]:
    return json.dumps(value).encode(), {"Content-Type": "application/json"}


@contextmanager
def serve_hub(monkeypatch: pytest.MonkeyPatch, cache: str) -> Iterator[Hub]:
    """A hub without repositories, to which huggingface_hub in this process talks with a token that writes."""
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import reset_sessions

    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", f"{cache}/no-token")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    reset_sessions()  # each keeps whether it is offline
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        reset_sessions()
