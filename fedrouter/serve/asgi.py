"""ASGI primitives: types, responses, refusals, and the hook's own requests to the application behind it."""

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedrouter.serve.paths import MESSAGES

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = Sequence[tuple[bytes, bytes]]

ERROR_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    409: "ConflictError",
    413: "RequestEntityTooLargeError",
    415: "UnsupportedMediaTypeError",
    422: "UnprocessableEntityError",
    429: "RateLimitError",
    503: "ServiceUnavailableError",
}
COPIED = ("app", "asgi", "root_path", "state")  # parts of the scope that an inner request inherits


class Refusal(Exception):  # noqa: N818 - a response, not a failure
    """A request that the hook itself answers with an error, in OpenAI's shape.

    Parameters
    ----------
    code : OpenAI's error code; ``status`` by default.
    retry_s : sets Retry-After, in seconds.
    headers : more headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_s: int | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ):
        super().__init__(message)
        self.status = status
        self.headers = [*headers, *([] if retry_s is None else [(b"retry-after", str(retry_s).encode())])]
        kind = ERROR_TYPES.get(status, "BadRequestError" if status < 500 else "InternalServerError")
        self._error = {"message": message, "type": kind, "param": param, "code": code or status}

    def payload(self, path: str = "") -> dict[str, object]:
        """Return the response's JSON; on Anthropic's paths in a form that its clients can read too."""
        return {**({"type": "error"} if path.startswith(MESSAGES) else {}), "error": self._error}


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete response."""

    status: int
    body: bytes
    headers: Headers = ()

    @property
    def payload(self) -> Any:
        """The body, parsed if it is JSON, else as text."""
        text = self.body.decode(errors="replace")
        try:
            return json.loads(text)
        except ValueError:
            return text


class Inner:
    """The application behind the hook, for the hook's own requests to it.

    Parameters
    ----------
    scope : scope of the client's request, or of the lifespan.
    authorization : value of the Authorization header to send, if any.
    """

    def __init__(self, app: App, scope: Scope, authorization: bytes | None):
        self.scope = scope
        self._app = app
        self._copied = {name: scope[name] for name in COPIED if name in scope}
        self._headers = [(b"content-type", b"application/json")]
        if authorization is not None:
            self._headers.append((b"authorization", authorization))

    async def ask(self, method: str, path: str, payload: Any = None) -> Answer:
        """Send a request, with a JSON body if ``payload`` is given; return the response."""
        full = self._copied.get("root_path", "") + path
        body = b"" if payload is None else json.dumps(payload).encode()
        scope = {
            **self._copied,
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
        return await collect(self._app, scope, whole(body))


async def collect(app: App, scope: Scope, receive: Receive) -> Answer:
    """Pass a request to an application and return its complete response."""
    messages: list[Message] = []

    async def send(message: Message) -> None:
        messages.append(message)

    await app(scope, receive, send)
    start = next((message for message in messages if message["type"] == "http.response.start"), None)
    if start is None:
        raise RuntimeError("the application sent no response")
    return Answer(
        start["status"], b"".join(message.get("body", b"") for message in messages), start.get("headers", ())
    )


def whole(body: bytes, left: asyncio.Event | None = None) -> Receive:
    """Return a ``receive`` that yields the whole body, then a disconnect once ``left`` is set."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    gone = left or asyncio.Event()

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    return receive


async def disconnected(receive: Receive) -> None:
    """Wait until the client disconnects; its body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


def json_answer(status: int, payload: Any, headers: Headers = ()) -> Answer:
    """Return a JSON response; numbers that are not finite become null."""
    body = json.dumps(_finite(payload), allow_nan=False).encode()
    return Answer(status, body, [(b"content-type", b"application/json"), *headers])


def refused(refusal: Refusal, path: str) -> Answer:
    """Return the response that a refusal makes on a path."""
    return json_answer(refusal.status, refusal.payload(path), refusal.headers)


async def send_answer(send: Send, answer: Answer) -> None:
    """Send a complete response."""
    length = (b"content-length", str(len(answer.body)).encode())
    headers = [*((name, value) for name, value in answer.headers if name.lower() != length[0]), length]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})


def reason(payload: Any) -> str:
    """Return the message of an error response's payload, whatever its shape."""
    error = payload.get("error", payload) if isinstance(payload, dict) else payload
    return str(error.get("message", error) if isinstance(error, dict) else error)


def header_values(scope: Scope, name: str) -> list[str]:
    """Return all values of a request header, in order; ``name`` in lower case."""
    return [value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name.encode()]


def path_of(scope: Scope) -> str:
    """Return the path below the root path, as vLLM's own authentication reads it."""
    return str(scope.get("path", "")).removeprefix(scope.get("root_path", ""))


def upgrades(scope: Scope) -> bool:
    """Return whether a request asks to switch to another protocol; none is supported."""
    options = ",".join(header_values(scope, "connection")).lower().split(",")
    return "upgrade" in (option.strip() for option in options) and bool(header_values(scope, "upgrade"))


def _finite(value: Any) -> Any:
    """Replace by null what JSON cannot hold, such as the infinite margin of an only cluster."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
