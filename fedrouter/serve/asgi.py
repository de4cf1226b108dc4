"""What the hook needs of ASGI: its types, answers sent, and the application behind it asked."""

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
KEPT = ("app", "asgi", "root_path", "state")  # of the scope that a question from inside is made of


class Refusal(Exception):  # noqa: N818 - an answer, not a failure
    """A request that is answered here with an error.

    Parameters
    ----------
    code : the status by default.
    retry_s : seconds after which the client may try again, where that makes sense.
    headers : more headers of the answer.
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
        """Return the answer's body; on Anthropic's paths its clients can read it too."""
        return {**({"type": "error"} if path.startswith(MESSAGES) else {}), "error": self._error}


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    status: int
    body: bytes
    headers: Headers = ()

    @property
    def payload(self) -> Any:
        """The body: parsed where it is JSON, text where it is not."""
        text = self.body.decode(errors="replace")
        try:
            return json.loads(text)
        except ValueError:
            return text


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

    async def ask(self, method: str, path: str, payload: Any = None) -> Answer:
        """Ask with a body in JSON, or without one."""
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
        return await collect(self._app, scope, whole(body))


async def collect(app: App, scope: Scope, receive: Receive) -> Answer:
    """Hand a request to an application and return its whole answer."""
    messages: list[Message] = []

    async def send(message: Message) -> None:
        messages.append(message)

    await app(scope, receive, send)
    start = next((message for message in messages if message["type"] == "http.response.start"), None)
    if start is None:
        raise RuntimeError("the application ended without an answer")
    return Answer(
        start["status"], b"".join(message.get("body", b"") for message in messages), start.get("headers", ())
    )


def whole(body: bytes, left: asyncio.Event | None = None) -> Receive:
    """Return a ``receive`` for a body that is there at once, of a client that stays until ``left`` is set."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    gone = left or asyncio.Event()

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    return receive


async def disconnected(receive: Receive) -> None:
    """Return when the client, whose body has been read, has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def json_answer(status: int, payload: Any, headers: Headers = ()) -> Answer:
    """Return an answer in JSON; infinite numbers become null."""
    body = json.dumps(_finite(payload), allow_nan=False).encode()
    return Answer(status, body, [(b"content-type", b"application/json"), *headers])


def refused(refusal: Refusal, path: str) -> Answer:
    """Return the answer to a request for a path that is refused."""
    return json_answer(refusal.status, refusal.payload(path), refusal.headers)


async def send_answer(send: Send, answer: Answer) -> None:
    """Send a whole answer."""
    length = (b"content-length", str(len(answer.body)).encode())
    headers = [*((name, value) for name, value in answer.headers if name.lower() != length[0]), length]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})


def reason(payload: Any) -> str:
    """Return what an error's body says, in OpenAI's shape or not."""
    error = payload.get("error", payload) if isinstance(payload, dict) else payload
    return str(error.get("message", error) if isinstance(error, dict) else error)


def header_values(scope: Scope, name: str) -> list[str]:
    """Return the values of a request header, in their order; ``name`` in lower case."""
    return [value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name.encode()]


def path_of(scope: Scope) -> str:
    """Return the path below the root path, as vLLM's own authentication sees it."""
    return str(scope.get("path", "")).removeprefix(scope.get("root_path", ""))


def upgrades(scope: Scope) -> bool:
    """Return whether a request asks for another protocol, which nobody here speaks."""
    asked = ",".join(header_values(scope, "connection")).lower().split(",")
    return "upgrade" in (word.strip() for word in asked) and bool(header_values(scope, "upgrade"))


def _finite(value: Any) -> Any:
    """JSON has no infinity (the margin of the only cluster, the distance of no text): null."""
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
