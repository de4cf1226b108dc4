"""`fedrouter push` against a local hub that speaks the few requests of a commit."""

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from fedrouter.bundle import Bundle, load_bundle
from fedrouter.errors import ConfigError
from fedrouter.push import push as push_bundle


class Hub(ThreadingHTTPServer):
    """Keeps what is committed to it; refuses every token but one."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.made: list[dict[str, Any]] = []


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("authorization") == "Bearer right":
            self.answer(200, self.reply(body))
        else:
            self.answer(401, {"error": "Invalid username or password."})

    def reply(self, body: bytes) -> dict[str, Any]:
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            self.server.made.append(asked)
            return {
                "url": f"http://{self.headers['host']}/{asked.get('organization', 'team')}/{asked['name']}"
            }
        if self.path == "/api/validate-yaml":
            return {"warnings": [], "errors": []}
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]}
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        url = f"http://{self.headers['host']}/team/tasks/commit/abc"
        return {"commitUrl": url, "commitOid": "abc"}

    def answer(self, status: int, payload: dict[str, Any]) -> None:
        body = json.dumps(payload).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def push(hub: Hub, bundle: Path, *arguments: str, token: str = "right") -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_TOKEN": token}
    command = [sys.executable, "-m", "fedrouter", "push", str(bundle), *arguments]
    return subprocess.run(command, env={**env, "HF_HUB_OFFLINE": "0"}, capture_output=True, text=True)


def test_a_bundle_arrives_whole_with_a_card_for_each_adapter(hub: Hub, small_bundle: Bundle) -> None:
    done = push(hub, small_bundle.path, "team/tasks", "--private")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"http://127.0.0.1:{hub.server_port}/team/tasks/commit/abc"
    assert hub.made[0]["visibility"] == "private"
    sent = {str(p.relative_to(small_bundle.path)): p.read_bytes() for p in small_bundle.path.rglob("*.*")}
    cards = {f"adapters/{c.adapter}/README.md" for c in small_bundle.clusters}
    assert hub.files.keys() == {name for name in sent if (small_bundle.path / name).is_file()} | cards
    assert all(hub.files[name] == sent[name] for name in hub.files.keys() - cards)
    first = small_bundle.clusters[0]
    card = hub.files[f"adapters/{first.adapter}/README.md"].decode()
    assert f'"team/tasks", subfolder="adapters/{first.adapter}"' in card
    assert str(first.num_examples) in card
    assert "base_model:" not in card  # builtin:tiny is not on the hub


def test_a_bundle_is_signed_before_it_goes(hub: Hub, small_bundle: Bundle, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small_bundle.path, tmp_path / "bundle"))
    (copy / "notes.txt").write_text("not for the hub")
    key, public = tmp_path / "key.pem", tmp_path / "key.pub"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(key)], check=True)
    subprocess.run(["openssl", "pkey", "-in", str(key), "-pubout", "-out", str(public)], check=True)
    done = push(hub, copy, "team/tasks", "--sign", str(key))
    assert done.returncode == 0, done.stderr
    assert hub.files["manifest.sig"] == (copy / "manifest.sig").read_bytes()
    assert "notes.txt" not in hub.files
    for name, content in hub.files.items():  # as somebody else gets it
        (tmp_path / "got" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "got" / name).write_bytes(content)
    assert load_bundle(tmp_path / "got", public).clusters == small_bundle.clusters


def test_a_refusal_is_one_line(hub: Hub, small_bundle: Bundle) -> None:
    done = push(hub, small_bundle.path, "team/tasks", token="wrong")
    assert done.returncode == 1
    assert done.stderr.startswith("error: hub repository team/tasks: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert not hub.files


def test_an_unreachable_hub_is_one_line(hub: Hub, small_bundle: Bundle) -> None:
    hub.shutdown()
    hub.server_close()
    done = push(hub, small_bundle.path, "team/tasks")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert "check HF_TOKEN, the network" in done.stderr


def test_what_is_no_repository_is_refused(small_bundle: Bundle) -> None:
    with pytest.raises(ConfigError, match="no/such/name: expected OWNER/NAME"):
        push_bundle(small_bundle, "no/such/name")
