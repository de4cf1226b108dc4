"""How the command line shows a server's responses, and what it refuses before it starts a proxy."""

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedrouter.cli import app
from fedrouter.errors import ServingError
from fedrouter.serve import upstream
from fedrouter.serve.checks import free_port
from fedrouter.serve.client import request_reload
from fedrouter.serve.launch import Options


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers a reload with a given response."""

    status, payload = 200, b"{}"
    asked: list[Any]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        type(self).asked = [self.path, self.headers["authorization"], body]
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.payload)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_asks_with_the_key_and_returns_what_changed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"bundle": "two", "loaded": ["a-1"], "kept": [], "unloaded": ["a-0"]}
    monkeypatch.setattr(Handler, "status", 200)
    monkeypatch.setattr(Handler, "payload", json.dumps(changes).encode())
    assert request_reload(f"{url}/v1/", "two", "sesame", 10) == changes
    assert Handler.asked == ["/v1/fedrouter/reload", "Bearer sesame", {"bundle": "two"}]
    result = CliRunner().invoke(app, ["reload", url, "two"])
    assert result.exit_code == 0
    assert result.output.splitlines() == ["loaded: a-1", "unloaded: a-0", f"{url} serves two"]


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (
            b'{"error": {"message": "bundle two is damaged"}}',
            "refused the reload .400.: bundle two is damaged",
        ),
        (b'{"error": "Unauthorized"}', "Unauthorized"),
        (b"not JSON", "not JSON"),
    ],
)
def test_says_why_a_server_refuses(
    url: str, payload: bytes, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Handler, "status", 400)
    monkeypatch.setattr(Handler, "payload", payload)
    with pytest.raises(ServingError, match=says):
        request_reload(url, "two", None, 10)


def test_an_unreachable_server_is_reported() -> None:
    with pytest.raises(ServingError, match=r"127\.0\.0\.1"):
        request_reload(f"http://127.0.0.1:{free_port()}", "two", None, 10)


def test_a_proxy_takes_no_options_of_vllm(tmp_path: Path) -> None:
    for more in (["--adapter", f"a={tmp_path}"], ["--", "--max-model-len", "9"]):
        done = CliRunner().invoke(app, ["serve", str(tmp_path), "--upstream", "http://127.0.0.1:1", *more])
        assert isinstance(done.exception, ServingError)
        assert "belong to the upstream servers" in str(done.exception)


def test_a_proxy_names_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ServingError, match="--upstream gpu-1:8000: expected http"):
        upstream.serve_upstream(tmp_path, ["gpu-1:8000"], Options(port=free_port()))
    monkeypatch.setattr(upstream, "find_spec", lambda name: None)
    with pytest.raises(ServingError, match=r"fedrouter\[proxy\]"):
        upstream.serve_upstream(tmp_path, ["http://x"], Options(port=free_port()))
