"""Request bodies: read within limits, parsed once, large ones off the event loop.

``json`` holds the GIL while it parses, in any thread. So the cost of a body is bounded by its number of
values, counted before parsing, and by the total bytes of all large bodies in work.
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

SMALL = 64 * 2**10  # bytes; bodies up to this size are parsed on the event loop and always accepted
IN_WORK = 4  # limit for all large bodies in work together, in bodies of the largest size
MAX_VALUES = 500_000  # values in one body: token ids of a hundred long prompts
MAX_CONTAINERS = 10_000  # lists and objects in one body; in memory they take 50 times their text
IDLE_S = 30.0  # longest pause within a body
# JSON strings, the last maybe unterminated; possessive, so that matching takes linear time.
STRINGS = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
Result = TypeVar("Result")


class Bodies:
    """Reads request bodies; limits the bytes that one server process has in work."""

    def __init__(self, limits: Limits):
        self._max_mib = limits.max_body_mib
        self._in_work: Counter[Hashable] = Counter()  # bytes of large bodies, by owner
        self._turn = asyncio.Semaphore()

    @contextmanager
    def work(self, owner: Hashable = None) -> Iterator["Work"]:
        """Count one request's body as in work while the block runs.

        Parameters
        ----------
        owner : may have at most half of all bytes in work; None: unknown, no such limit.
        """
        work = Work(self._in_work, owner, self._max_mib)
        try:
            yield work
        finally:
            self._in_work[owner] -= work.counted
            self._in_work += Counter()  # drops owners with nothing in work

    async def off_loop(self, size: int, do: Callable[[], Result]) -> Result:
        """Return ``do()``; above ``SMALL`` bytes run it in a thread, one call at a time."""
        if size <= SMALL:
            return do()
        async with self._turn:
            return await asyncio.to_thread(do)


class Work:
    """One request's body while it is read and parsed."""

    def __init__(self, in_work: Counter[Hashable], owner: Hashable, max_mib: float):
        self._in_work, self._owner, self._max_mib = in_work, owner, max_mib
        self.counted = 0

    async def read(self, receive: Callable[[], Awaitable[Any]]) -> bytes | None:
        """Return the whole body; None if the client has left.

        Raises
        ------
        Refusal
            413 as soon as the body exceeds the limit; 503 if there are too many large bodies in work; 408
            after a pause of ``IDLE_S``.
        """
        body = bytearray()
        while True:
            try:
                async with asyncio.timeout(IDLE_S):
                    message = await receive()
            except TimeoutError:
                closing = ((b"connection", b"close"),)
                raise Refusal(
                    408, f"no more of the body arrived within {IDLE_S:g} s", headers=closing
                ) from None
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
        limit = self._max_mib * 2**20 * IN_WORK
        used = self._in_work.total() + more
        used_by_owner = self._in_work[self._owner] + more
        if more > 0 and (used > limit or (self._owner is not None and used_by_owner > limit / 2)):
            raise Refusal(503, "too many large requests at once: try again later", retry_s=1)
        self._in_work[self._owner] += more
        self.counted += more


def parse(body: bytes) -> dict[str, Any]:
    """Return the body's JSON object, parsed as vLLM parses it: of duplicate keys the last one counts.

    UTF-8, UTF-16 and UTF-32 are detected as by ``json.loads``.

    Raises
    ------
    Refusal
        If the body is no JSON object, is nested too deep or has too many values.
    """
    try:
        text = body.decode(json.detect_encoding(body), "surrogatepass")
        _check_structure(text)
        payload = json.loads(text)
    except RecursionError:
        raise Refusal(400, "the body is nested too deep") from None
    except ValueError as error:
        raise Refusal(400, f"the body is not valid JSON: {error}") from None
    if not isinstance(payload, dict):
        raise Refusal(400, "the body must be a JSON object")
    return payload


def _check_structure(text: str) -> None:
    """Refuse text that would need too much memory once parsed."""
    if not _too_many(text):  # fast path: few braces and commas, even with those in strings
        return
    if _too_many(STRINGS.sub("", text)):
        limit = f"more than {MAX_CONTAINERS} lists and objects, or more than {MAX_VALUES} values"
        raise Refusal(400, f"the body is nested too deep, or holds {limit}")


def _too_many(text: str) -> bool:
    return text.count("{") + text.count("[") > MAX_CONTAINERS or text.count(",") > MAX_VALUES
