"""ASGI's types, bodies read and answers sent, and the application behind the hook asked from inside."""

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any

from fedrouter.serve.bodies import Refusal
from fedrouter.serve.limits import Limits, TooLarge

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

KEPT = ("app", "asgi", "root_path", "state")  # of the scope that a question from inside is made of


class Inner:
    """The application behind the hook, for requests of our own.

    Parameters
    ----------
    scope : of the request that makes us ask, or of the lifespan.
    authorization : value of the header with which we ask; none where the server has no key.
    """

    def __init__(self, app: App, scope: Scope, authorization: bytes | None):
        self.scope = scope
        self._app = app
        self._kept = {name: scope[name] for name in KEPT if name in scope}
        self._headers = [(b"content-type", b"application/json")]
        if authorization is not None:
            self._headers.append((b"authorization", authorization))

    async def ask(self, method: str, path: str, payload: Any = None) -> tuple[int, Any]:
        """Return the status and the body of an answer: parsed where it is JSON, text where it is not."""
        full = self._kept.get("root_path", "") + path
        body = b"" if payload is None else json.dumps(payload).encode()
        scope = {
            **self._kept,
            "type": "http",
            "http_version": "1.1",
            "scheme": "http",
            "method": method,
            "path": full,
            "raw_path": full.encode(),
            "query_string": b"",
            "headers": [*self._headers, (b"content-length", str(len(body)).encode())],
            "client": None,
            "server": None,
        }
        status, pieces = 0, []

        async def send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            pieces.append(message.get("body", b""))

        await self._app(scope, whole(body), send)
        text = b"".join(pieces).decode(errors="replace")
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text


def whole(body: bytes) -> Receive:
    """Return a ``receive`` for a body that is there at once, of a client that never leaves."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if not messages:
            await asyncio.Event().wait()
        return messages.pop()

    return receive


def reason(answer: Any) -> str:
    """Return what an error's body says, in OpenAI's shape or not."""
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    return str(error.get("message", error) if isinstance(error, dict) else error)


async def read_body(receive: Receive, limits: Limits) -> bytes | None:
    """Return the whole body, or None when the client has gone; refuse one that is too large."""
    chunks, size = [], 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > limits.max_body_mib * 2**20:
            raise TooLarge(limits.max_body_mib)
        if not message.get("more_body", False):
            return b"".join(chunks)


async def send_refusal(send: Send, refusal: Refusal) -> None:
    """Answer with an error in OpenAI's shape."""
    await send_json(send, refusal.status, refusal.payload, refusal.headers)


async def send_json(send: Send, status: int, payload: Any, more: Sequence[tuple[bytes, bytes]] = ()) -> None:
    """Answer with JSON; ``more`` headers beside its own."""
    body = json.dumps(_finite(payload), allow_nan=False).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _finite(value: Any) -> Any:
    """JSON has no infinity (the margin of the only cluster, the distance of no text): null."""
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
