"""The wire format: messages survive a round trip, and invalid bytes are refused."""

import json
from typing import Any

import numpy as np
import pytest
from fakes import adapter, space
from hypothesis import given
from hypothesis import strategies as st

from fedrouter.errors import WireError
from fedrouter.train.wire import format as wire
from fedrouter.train.wire.messages import (
    REPLIES,
    REQUESTS,
    Assign,
    Compare,
    Envelope,
    Failed,
    Hello,
    Regroup,
    Summarise,
    rounding,
    seal,
    unseal,
)
from fedrouter.types import (
    Assignment,
    Comparison,
    LocalClusters,
    Member,
    Membership,
    Subset,
    TrainReply,
    TrainRequest,
)

SPACE = space(np.arange(6, dtype=np.float32).reshape(2, 3))
ASKED = (
    Hello("{}", "f" * 32, np.ones((3, 4), np.float32)),
    Summarise(None),
    Summarise(4, beyond=True),
    Regroup(SPACE, Membership({"a": (0, 1)}, {"t": 0}, 2)),
    Assign(SPACE, None),
    Compare(SPACE, (1.0, 2.5)),
    TrainRequest("a", 1, 2, adapter(0), 3, 1e-3),
)
REPLIED = (
    Member("a", 3, "0" * 32),
    LocalClusters(np.ones(2), np.zeros((2, 3)), np.eye(3)),
    Assignment("a", (Subset(0, 5, np.linspace(0, 1, 101, dtype=np.float32), {"x": 5}),)),
    Comparison("a", {0: 5, 7: 9}, 12, True),
    TrainReply("a", 1, adapter(1), 8, None, 0.5),
    Failed("no"),
)


def same(one: Any, other: Any) -> bool:
    return repr(one) == repr(other) and seal(Envelope("r", "a", 1, (one,))) == seal(
        Envelope("r", "a", 1, (other,))
    )


@pytest.mark.parametrize(("messages", "kinds"), [(ASKED, REQUESTS), (REPLIED, REPLIES)])
def test_messages_survive_a_round_trip(messages: tuple[Any, ...], kinds: tuple[type, ...]) -> None:
    sent = Envelope("run", "ulm", 7, messages, asked="0" * 64)
    body = seal(sent)
    found = unseal(body, kinds, len(body))
    assert (found.run, found.client, found.exchange, found.asked) == ("run", "ulm", 7, "0" * 64)
    assert all(same(a, b) for a, b in zip(found.messages, messages, strict=True))
    assert seal(found) == body


def test_received_arrays_are_writable() -> None:
    (found,) = unseal(seal(Envelope("r", "a", 1, (ASKED[-1],))), REQUESTS, 1 << 20).messages
    assert all(array.flags.writeable for array in found.adapter.values())


def test_float16_halves_only_adapters_and_reports_its_error() -> None:
    request = TrainRequest("a", 1, 2, adapter(0, rank=8, width=256), 3, 1e-3)
    whole = seal(Envelope("r", "a", 1, (request,)))
    half = seal(Envelope("r", "a", 1, (request,)), half=True)
    assert len(half) < 0.55 * len(whole)
    (found,) = unseal(half, REQUESTS, len(half)).messages
    error = np.sqrt(
        sum(((found.adapter[n] - a) ** 2).sum() for n, a in request.adapter.items())
        / sum((a**2).sum() for a in request.adapter.values())
    )
    assert 0 < error < 2**-11
    assert rounding(request) == pytest.approx(error, rel=1e-3)
    placed = Assign(SPACE, None)
    assert seal(Envelope("r", "a", 1, (placed,)), half=True) == seal(Envelope("r", "a", 1, (placed,)))


def changed(body: bytes, change: Any) -> bytes:
    """Repack an envelope after applying ``change`` to its fields."""
    packet = wire.unpack(body)
    fields = json.loads(json.dumps(packet.fields))
    change(fields)
    return wire.pack(wire.Packet(packet.kind, fields, packet.arrays))


BODY = seal(Envelope("run", "ulm", 7, ASKED))


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f.pop("exchange"),
        lambda f: f.update(exchange="7"),
        lambda f: f.update(exchange=True),
        lambda f: f.update(run=None),
        lambda f: f["messages"][1].update(num="4"),
        lambda f: f["messages"][1].update(num=2.5),
        lambda f: f["messages"][1].update(more=1),
        lambda f: f["messages"][1].update(kind="Exec"),
        lambda f: f["messages"][1].update(kind="TrainReply"),
        lambda f: f["messages"][0].update(probe={"$array": "99"}),
        lambda f: f["messages"][0].update(probe=[1.0]),
        lambda f: f["messages"][4].update(space=None),
        lambda f: f["messages"][5].update(radii=["1"]),
        lambda f: f.update(messages=7),
        lambda f: f.update(messages=[[]]),
    ],
)
def test_invalid_envelopes_are_refused(change: Any) -> None:
    with pytest.raises(WireError):
        unseal(changed(BODY, change), REQUESTS, 1 << 20)


def test_replies_are_not_accepted_as_requests() -> None:
    with pytest.raises(WireError):
        unseal(seal(Envelope("r", "a", 1, REPLIED)), REQUESTS, 1 << 20)


def test_limits_are_enforced() -> None:
    with pytest.raises(WireError, match=f"of {len(BODY)} bytes; at most {len(BODY) - 1}"):
        unseal(BODY, REQUESTS, len(BODY) - 1)
    with pytest.raises(WireError, match="a string of 70000 characters"):
        unseal(seal(Envelope("r", "a", 1, (Hello("x" * 70_000, "", SPACE.mean),))), REQUESTS, 1 << 20)
    deep: Any = 1
    for _ in range(20):
        deep = [deep]
    with pytest.raises(WireError, match="nested deeper"):
        wire.unpack(wire.pack(wire.Packet("envelope", {"x": deep}, {})))
    other = BODY.replace(b'\\"version\\": 1', b'\\"version\\": 9')
    with pytest.raises(WireError, match="wire version 9; this side speaks 1"):
        wire.unpack(other)
    with pytest.raises(WireError, match=r"arrays of types \['I8'\]"):
        wire.unpack(wire.pack(wire.Packet("envelope", {}, {"x": np.zeros(3, np.int8)})))
    for text in ("NaN", "1e999", str(2**70)):
        packed = wire.pack(wire.Packet("envelope", {"x": 8080}, {})).replace(b"8080", text.encode())
        head = packed.index(b"{")
        size = len(packed) - head
        with pytest.raises(WireError):
            wire.unpack(size.to_bytes(8, "little") + packed[head:])


@given(where=st.integers(0, len(BODY) - 1), value=st.integers(0, 255), cut=st.integers(0, len(BODY)))
def test_damaged_bytes_are_refused_or_decode(where: int, value: int, cut: int) -> None:
    for body in (BODY[:where] + bytes([value]) + BODY[where + 1 :], BODY[:cut], BODY[cut:]):
        try:
            found = unseal(body, REQUESTS, 1 << 20)
        except WireError:
            continue
        assert isinstance(found, Envelope)


@given(body=st.binary(max_size=200))
def test_random_bytes_are_refused(body: bytes) -> None:
    with pytest.raises(WireError):
        unseal(body, REQUESTS, 1 << 20)
