"""ASGI's types, and the application behind the hook asked from inside."""

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

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
        request: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        status, pieces = 0, []

        async def receive() -> Message:
            if not request:  # we never leave before the answer
                await asyncio.Event().wait()
            return request.pop()

        async def send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            pieces.append(message.get("body", b""))

        await self._app(scope, receive, send)
        text = b"".join(pieces).decode(errors="replace")
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text


def reason(answer: Any) -> str:
    """Return what an error's body says, in OpenAI's shape or not."""
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    return str(error.get("message", error) if isinstance(error, dict) else error)
