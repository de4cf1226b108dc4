"""Request bodies: parsed as by vLLM, limited in bytes, values and time, large ones off the event loop."""

import asyncio
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_prompts import anything

from fedrouter.serve import bodies
from fedrouter.serve.asgi import Refusal
from fedrouter.serve.bodies import IN_WORK, MAX_CONTAINERS, MAX_VALUES, SMALL, Bodies, parse
from fedrouter.serve.limits import Limits

MIB = 2**20


@given(
    st.dictionaries(st.text(max_size=6), anything, max_size=4),
    st.booleans(),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"]),
)
def test_an_object_is_parsed_as_by_vllm(payload: dict[str, Any], ascii_only: bool, encoding: str) -> None:
    body = json.dumps(payload, ensure_ascii=ascii_only).encode(encoding, "surrogatepass")
    assert parse(body) == json.loads(body) == payload


@given(st.binary(max_size=60) | anything.map(lambda value: json.dumps(value).encode()))
def test_all_else_is_a_400(body: bytes) -> None:
    try:
        expected = json.loads(body)
    except ValueError:
        expected = None
    if isinstance(expected, dict):
        assert parse(body) == expected
    else:
        with pytest.raises(Refusal) as refused:
            parse(body)
        assert refused.value.status == 400


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"[" * 10_000, 400),  # nested too deep
        (b"[" * 100_000, 400),
        (b'{"a": [' + b"{}," * MAX_CONTAINERS + b"{}]}", 400),
        (b'{"a": [' + b"1," * (MAX_VALUES + 1) + b"1]}", 400),
        (json.dumps({"a": [{}] * MAX_CONTAINERS}).encode("utf-16"), 400),
        (b'{"model": "x", "model": ', 400),
        (b"1" * 5000, 400),  # more digits than Python parses
        (b"", 400),
    ],
)
def test_what_would_cost_too_much_is_refused(body: bytes, status: int) -> None:
    with pytest.raises(Refusal) as refused:
        parse(body)
    assert refused.value.status == status


def test_text_is_not_structure() -> None:
    text = '{[,"\\' * MAX_VALUES
    assert parse(json.dumps({"prompt": text}).encode()) == {"prompt": text}


@pytest.mark.parametrize("body", [b'"' + b'\\"' * 4 * MIB, b"{" + b'"' * 8 * MIB, b'{"a":' + b"\\" * 8 * MIB])
def test_no_body_takes_long_to_check(body: bytes) -> None:
    started = time.process_time()
    with pytest.raises(Refusal):
        parse(b"{" * (MAX_CONTAINERS + 1) + body)
    assert time.process_time() - started < 3


def receiving(*chunks: bytes, then: Callable[[], Any] | None = None) -> Callable[[], Any]:
    left = list(chunks)

    async def receive() -> Any:
        if left:
            return {"type": "http.request", "body": left.pop(0), "more_body": bool(left) or then is not None}
        return await then() if then else {"type": "http.disconnect"}

    return receive


def status_of(coroutine: Any) -> int:
    with pytest.raises(Refusal) as refused:
        asyncio.run(coroutine)
    return refused.value.status


async def read(limits: Limits, *chunks: bytes, **more: Any) -> bytes | None:
    with Bodies(limits).work() as work:
        return await work.read(receiving(*chunks, **more))


def test_reads_pieces_until_the_end_or_until_the_client_leaves() -> None:
    assert asyncio.run(read(Limits(), b"a", b"", b"b")) == b"ab"

    async def leave() -> Any:
        return {"type": "http.disconnect"}

    assert asyncio.run(read(Limits(), b"a", then=leave)) is None
    assert status_of(read(Limits(max_body_mib=1), b"a" * MIB, b"a")) == 413


def test_a_stalled_body_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "IDLE_S", 0.05)
    assert status_of(read(Limits(), b"a", then=asyncio.Event().wait)) == 408


def test_large_bodies_in_work_are_limited_and_small_ones_are_not() -> None:
    shared, large = Bodies(Limits(max_body_mib=1)), b"x" * MIB

    async def hold(whose: str | None, body: bytes, release: asyncio.Event) -> None:
        with shared.work(whose) as work:
            await work.read(receiving(body))
            await release.wait()

    async def scenario() -> None:
        release = asyncio.Event()
        held = [asyncio.create_task(hold("ann", large, release)) for _ in range(IN_WORK // 2)]
        await asyncio.sleep(0)
        with pytest.raises(Refusal) as refused:  # a tenant may use half of it
            await hold("ann", large, release)
        assert refused.value.status == 503
        assert dict(refused.value.headers)[b"retry-after"]
        held += [asyncio.create_task(hold(None, large, release)) for _ in range(IN_WORK // 2)]
        await asyncio.sleep(0)
        for whose in ("bob", None):
            with pytest.raises(Refusal):
                await hold(whose, large, release)
        held += [asyncio.create_task(hold(whose, b"x" * SMALL, release)) for whose in ("ann", None) * 50]
        await asyncio.sleep(0)
        release.set()
        await asyncio.gather(*held)
        held = [asyncio.create_task(hold("ann", large, release)) for _ in range(IN_WORK // 2)]
        await asyncio.gather(*held)
        assert not shared._in_work, "owners without bodies in work are forgotten"

    asyncio.run(scenario())


def test_large_bodies_are_parsed_one_at_a_time_and_off_the_loop() -> None:
    shared, threads, running, most = Bodies(Limits()), set[int](), 0, 0

    def look() -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.02)
        running -= 1
        threads.add(threading.get_ident())
        return 7

    async def scenario() -> list[int]:
        return await asyncio.gather(*(shared.off_loop(SMALL + 1, look) for _ in range(5)))

    assert asyncio.run(scenario()) == [7] * 5
    assert most == 1
    assert threading.get_ident() not in threads
    asyncio.run(shared.off_loop(SMALL, look))
    assert threading.get_ident() in threads
