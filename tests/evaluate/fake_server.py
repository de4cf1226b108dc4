"""A small OpenAI-compatible server with rule-based answers, in a thread."""

import json
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ADAPTERS = {"yes-no": "yes-no-1111", "shout": "shout-2222"}


def solve(task: str, prompt: str) -> str:
    """Return the answer of the adapter for ``task``."""
    return "Yes" if task == "yes-no" else prompt.upper()


@dataclass
class FakeServer:
    """Serves ``base``, ``fedrouter`` and one adapter per task; routes questions to ``yes-no``."""

    key: str | None = None
    clusters: Any = field(
        default_factory=lambda: {
            "clusters": [
                {"name": "yes-no", "adapter": ADAPTERS["yes-no"], "task_counts": {"yes-no": 90, "shout": 10}},
                {"name": "shout", "adapter": ADAPTERS["shout"], "task_counts": {"shout": 80, "yes-no": 5}},
            ]
        }
    )
    delay_s: float = 0.0
    failing: dict[str, list[int]] = field(
        default_factory=dict
    )  # prompt → statuses to answer first; 0 hangs up
    dead_after: int | None = None  # number of chat requests after which every connection is dropped
    chats: list[dict[str, Any]] = field(default_factory=list)
    meeting: threading.Barrier | None = None  # answers wait until this many requests have arrived
    under_way: int = 0
    most_at_once: int = 0
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def asked(self) -> Counter[str]:
        """Number of requests by prompt, without the preflight check's."""
        return Counter(chat["messages"][-1]["content"] for chat in self.chats if chat["max_tokens"] > 1)

    def answer(self, chat: dict[str, Any]) -> tuple[str, str, dict[str, str]]:
        """Return the answering model, its text and the response headers."""
        prompt, model = chat["messages"][-1]["content"], chat["model"]
        headers = {}
        if model == "fedrouter":
            task = "yes-no" if prompt.endswith("?") else "shout"
            fallback = "far away" in prompt
            model = "base" if fallback else ADAPTERS[task]
            headers = {
                "x-fedrouter-adapter": model,
                "x-fedrouter-cluster": task.replace("-", "%2D"),
                "x-fedrouter-distance": "9.5" if fallback else "0.25",
                "x-fedrouter-fallback": str(fallback).lower(),
            }
        own = next((task for task, adapter in ADAPTERS.items() if adapter == model), None)
        return model, solve(own, prompt) if own else "I do not know", headers


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections open, as vLLM does
    wbufsize = -1  # headers and body in one packet
    fake: FakeServer
    lock = threading.Lock()

    def do_GET(self) -> None:
        if not self._authorised():
            return
        names = ["base", "fedrouter", *ADAPTERS.values()]
        if self.path == "/v1/models":
            self._send(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in names]})
        elif self.path == "/v1/fedrouter/clusters" and self.fake.clusters is not None:
            self._send(200, self.fake.clusters)
        else:
            self._send(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        chat = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if not self._authorised():
            return
        fake = self.fake
        with self.lock:
            fake.chats.append(chat)
            fake.under_way += 1
            fake.most_at_once = max(fake.most_at_once, fake.under_way)
            statuses = fake.failing.get(chat["messages"][-1]["content"])
            status = statuses.pop(0) if statuses else 200
            dead = fake.dead_after is not None and len(fake.chats) > fake.dead_after
        try:
            time.sleep(fake.delay_s)
            if fake.meeting is not None and chat["max_tokens"] > 1:  # not for the preflight check
                fake.meeting.wait()
        finally:
            with self.lock:
                fake.under_way -= 1
        if dead or status == 0:
            self.close_connection = True
        elif status != 200:
            self._send(status, {"error": {"message": f"told to say\n{status}", "code": status}})
        else:
            model, text, headers = fake.answer(chat)
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
            usage = {"prompt_tokens": 1, "completion_tokens": 5, "total_tokens": 6}
            body = {"id": "1", "object": "chat.completion", "created": 0, "model": model}
            self._send(200, {**body, "choices": [choice], "usage": usage}, headers)

    def _authorised(self) -> bool:
        if self.fake.key is None or self.headers["authorization"] == f"Bearer {self.fake.key}":
            return True
        self._send(401, {"error": "Unauthorized"})
        return False

    def _send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        fixed = {"content-type": "application/json", "content-length": str(len(content))}
        for name, value in {**fixed, "retry-after-ms": "20", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Log nothing, to keep the tests' output clean."""


class HttpServer(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True
