"""A small embeddings endpoint: checks key and model, counts words by hash, truncates like vLLM."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

DIM, MODEL = 32, "words"


class EmbeddingsServer(ThreadingHTTPServer):
    """A server whose failures can be set: ``broken`` changes its answers, ``statuses`` replace them."""

    daemon_threads = True

    def __init__(self, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.key: str | None = None
        self.models = {MODEL: 0}  # name → seed
        self.knows_cut = True
        self.max_tokens = 512
        self.statuses: list[int] = []  # sent first, one per request
        self.broken: Any = lambda answer: answer
        self.gate = threading.Event()  # answers wait until it is set
        self.gate.set()
        self.num_waiting = 0  # at the gate
        self.inputs: list[list[str]] = []


class Handler(BaseHTTPRequestHandler):
    server: EmbeddingsServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.num_waiting += not self.server.gate.is_set()
        self.server.gate.wait(30)
        status, answer = self._answer(body)
        raw = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(raw)))
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(raw)

    def _answer(self, body: Any) -> tuple[int, Any]:
        if self.path != "/v1/embeddings":
            return 404, {"error": {"message": "Not Found"}}
        if self.server.key and self.headers["authorization"] != f"Bearer {self.server.key}":
            return 401, {"error": {"message": f"wrong key: {self.headers['authorization']}"}}
        if self.server.statuses:
            return self.server.statuses.pop(0), {"error": {"message": "not now"}}
        if body["model"] not in self.server.models:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        cut = body.get("truncate_prompt_tokens")
        if cut and not self.server.knows_cut:
            return 400, {"error": {"message": "Unrecognized request argument: truncate_prompt_tokens"}}
        if cut and cut > self.server.max_tokens:
            return 400, {
                "error": {"message": f"truncate_prompt_tokens ({cut}) is greater than max_model_len"}
            }
        self.server.inputs.append(body["input"])
        vectors = [self._vector(text.split()[:cut], body["model"]) for text in body["input"]]
        data = [{"object": "embedding", "index": i, "embedding": v} for i, v in enumerate(vectors)]
        usage = {"prompt_tokens": 1, "total_tokens": 1}
        answer = {"object": "list", "model": body["model"], "data": data[::-1], "usage": usage}
        return 200, self.server.broken(answer)

    def _vector(self, words: list[str], model: str) -> list[float]:
        vector = [0.0] * DIM
        for word in words:
            vector[(hashlib.md5(word.encode()).digest()[0] + self.server.models[model]) % DIM] += 1
        return vector

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def running(port: int = 0) -> Iterator[EmbeddingsServer]:
    server = EmbeddingsServer(port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
