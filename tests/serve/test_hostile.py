"""A thousand hostile requests: the hook never fails, and the base answers only if it was named."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from echo import EchoApp, Server
from hostile_requests import Hostile, requests

from fedrouter.serve.paths import INVOCATIONS, ROUTED, UNROUTED


class Recording(EchoApp):
    """Keeps the last request."""

    last: bytes | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await super().__call__(scope, receive, send)
        if scope["type"] == "http":
            self.last = self.bodies[-1] if self.bodies else None


@pytest.mark.parametrize("fallback", ["base", "reject"])
def test_a_thousand_hostile_requests(make_server: Callable[..., Server], fallback: str) -> None:
    server = make_server(Recording(), fallback=fallback)
    statuses: Counter[int] = Counter()

    async def scenario() -> None:
        async with server:
            for request in requests(seed=21, number=1000):
                server.app.bodies.clear()
                answer = await ask(request)
                statuses[answer.status] += 1
                assert answer.status < 500, request
                if request.method == "POST" and request.path in (*ROUTED, *UNROUTED):
                    unasked(request, answer)

    async def ask(request: Hostile) -> Any:
        async with asyncio.timeout(30):
            return await server.ask(
                request.path, request.body, method=request.method, headers=request.headers, chunk=10**6
            )

    def unasked(request: Hostile, answer: Any) -> None:
        if not server.app.bodies:  # answered by the hook
            assert answer.status >= 400, request
            assert answer.json["error"]["message"], request
            assert answer.json["error"]["type"], request
            return
        payload = json.loads(server.app.bodies[-1])
        if request.path != INVOCATIONS:
            assert isinstance(payload["model"], str), request
            assert payload["model"] not in ("", "fedrouter"), request
        if payload.get("model") == "base" and not request.names_base:
            assert answer.routing["adapter"] == "base", request
            assert fallback == "base", request

    asyncio.run(scenario())
    assert statuses[200] > 100, "some must be answered"
    assert statuses[400] > 200


def test_the_same_seed_draws_the_same_requests() -> None:
    assert [*requests(1, 50)] == [*requests(1, 50)] != [*requests(2, 50)]
