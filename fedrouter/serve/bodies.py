"""Request bodies: read within bounds, parsed once, large ones off the event loop.

``json`` holds Python's lock while it parses, in whatever thread: what a body may cost is bounded by the
number of its values, counted before, and by the bytes of all large bodies in work at once.
"""

import asyncio
import json
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from fedrouter.serve.asgi import Refusal
from fedrouter.serve.limits import Limits

SMALL = 64 * 2**10  # bytes; such bodies are parsed where they are and are always taken on
IN_WORK = 4  # bodies of the largest size, that all large bodies in work may amount to
MAX_VALUES = 500_000  # of one body: token ids of a hundred long prompts
MAX_CONTAINERS = 10_000  # lists and objects of one body: what they cost in memory is 50 times their text
IDLE_S = 30.0  # without a byte of a body that is not whole yet
STRINGS = re.compile(
    r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL
)  # an open one to the end: linear whatever comes
Result = TypeVar("Result")


class Bodies:
    """Reads the bodies of one server process, so many bytes at a time."""

    def __init__(self, limits: Limits):
        self._max_mib = limits.max_body_mib
        self._in_work: Counter[Hashable] = Counter()  # bytes of large bodies, by whose they are
        self._turn = asyncio.Semaphore()

    @contextmanager
    def work(self, whose: Hashable = None) -> Iterator["Work"]:
        """Count the bytes of one request's body as being in work while the block runs.

        Parameters
        ----------
        whose : nobody may have more than half of all; None for who cannot be told apart.
        """
        work = Work(self._in_work, whose, self._max_mib)
        try:
            yield work
        finally:
            self._in_work[whose] -= work.counted
            self._in_work += Counter()  # who has nothing in work is forgotten

    async def off_loop(self, size: int, do: Callable[[], Result]) -> Result:
        """Return what ``do`` returns, which costs what ``size`` bytes cost: one large one at a time."""
        if size <= SMALL:
            return do()
        async with self._turn:
            return await asyncio.to_thread(do)


class Work:
    """One request's body, as long as it is read and looked at."""

    def __init__(self, in_work: Counter[Hashable], whose: Hashable, max_mib: float):
        self._in_work, self._whose, self._max_mib = in_work, whose, max_mib
        self.counted = 0

    async def read(self, receive: Callable[[], Awaitable[Any]]) -> bytes | None:
        """Return the whole body, or None when the client has gone.

        Raises
        ------
        Refusal
            413 for a body larger than the limit, as soon as so much of it is there; 503 if large bodies in
            work are too many already; 408 if nothing more of it comes.
        """
        body = bytearray()
        while True:
            try:
                async with asyncio.timeout(IDLE_S):
                    message = await receive()
            except TimeoutError:
                closing = ((b"connection", b"close"),)
                raise Refusal(408, f"nothing of the body came in {IDLE_S:g} s", headers=closing) from None
            if message["type"] != "http.request":
                return None
            body += message.get("body", b"")
            if len(body) > self._max_mib * 2**20:
                raise Refusal(413, f"the body is larger than {self._max_mib:g} MiB")
            self._count(len(body))
            if not message.get("more_body", False):
                return bytes(body)

    def _count(self, size: int) -> None:
        more = max(0, size - SMALL) - self.counted
        most = self._max_mib * 2**20 * IN_WORK
        used = self._in_work.total() + more
        own = self._in_work[self._whose] + more
        if more > 0 and (used > most or (self._whose is not None and own > most / 2)):
            raise Refusal(503, "too many large requests at once: try again later", retry_s=1)
        self._in_work[self._whose] += more
        self.counted += more


def parse(body: bytes) -> dict[str, Any]:
    """Return the body's JSON object, read as vLLM reads it: of two equal keys the last one counts.

    UTF-8, UTF-16 and UTF-32 are told apart as ``json.loads`` does.

    Raises
    ------
    Refusal
        For what is no JSON object, or nested too deep, or made of too many values to be read.
    """
    try:
        text = body.decode(json.detect_encoding(body), "surrogatepass")
        _check_structure(text)
        payload = json.loads(text)
    except RecursionError:
        raise Refusal(400, "the body is nested too deep") from None
    except ValueError as error:
        raise Refusal(400, f"the body is no JSON: {error}") from None
    if not isinstance(payload, dict):
        raise Refusal(400, "the body must be a JSON object")
    return payload


def _check_structure(text: str) -> None:
    """Refuse what would be large in memory, before it is."""
    if not _too_many(text):  # most texts, braces and commas in their strings counted
        return
    if _too_many(STRINGS.sub("", text)):
        most = f"more than {MAX_CONTAINERS} lists and objects, or {MAX_VALUES} values"
        raise Refusal(400, f"the body is nested too deep, or holds {most}")


def _too_many(text: str) -> bool:
    return text.count("{") + text.count("[") > MAX_CONTAINERS or text.count(",") > MAX_VALUES
