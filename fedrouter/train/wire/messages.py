"""Every message between server and clients, and the way between a dataclass and the wire's fields and arrays.

``REQUESTS`` is all that a server may ask, ``REPLIES`` all that a client may answer.
"""

import math
import types as python_types
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from fedrouter.errors import WireError
from fedrouter.train.wire.format import Packet, pack, unpack
from fedrouter.train.wire.masks import Bytes
from fedrouter.types import (
    Array,
    Assignment,
    Comparison,
    LocalClusters,
    Member,
    Membership,
    Reread,
    RoutingSpace,
    TrainFailure,
    TrainReply,
    TrainRequest,
    ValidationReply,
    ValidationRequest,
)

ARRAY = "$array"  # the key of a map that stands for an array


@dataclass(frozen=True, slots=True)
class Hello:
    """The server says what it wants to do, before it asks for anything."""

    settings: str  # the run's configuration as JSON, without data and paths of the server
    base: str  # fingerprint of the base's config and tokenizer
    probe: Array  # (3, d), fixed texts as the server's embedder sees them
    half: bool = False  # adapters travel as float16, both ways
    secure: bool = False  # updates are summed so that the server sees no single one


@dataclass(frozen=True, slots=True)
class Summarise:
    """Cluster the rows; None: find how many."""

    num: int | None
    beyond: bool = False  # only the rows beyond every radius of the last ``Compare``


@dataclass(frozen=True, slots=True)
class Regroup:
    """Give rows to the nearest centroid, or where it is told."""

    space: RoutingSpace
    told: Membership | None


@dataclass(frozen=True, slots=True)
class Assign:
    """Take the task clusters on."""

    space: RoutingSpace
    told: Membership | None


@dataclass(frozen=True, slots=True)
class Compare:
    """Compare rows with task clusters that already exist."""

    space: RoutingSpace
    radii: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ReadAgain:
    """Read the rows again."""


@dataclass(frozen=True, slots=True)
class Goodbye:
    """The run is over."""

    reason: str


@dataclass(frozen=True, slots=True)
class Failed:
    """A client could not do what was asked."""

    reason: str  # one line, in no word of the rows
    settings: bool = False  # the settings are to blame, not the client


@dataclass(frozen=True, slots=True)
class Refused:
    """A client will not do what was asked: its policy forbids it, or the message is a replay."""

    reason: str


@dataclass(frozen=True, slots=True)
class Behind:
    """A client that was restarted asks for what it has missed: the plan, and the task clusters."""


@dataclass(frozen=True, slots=True)
class Done:
    """A client did what needs no answer."""


@dataclass(frozen=True, slots=True)
class SumKeys:
    """Secure sum, 1: make keys for one round of one task cluster."""

    cluster: int
    round: int
    peers: tuple[str, ...]  # who is to be summed, in an order that all keep


@dataclass(frozen=True, slots=True)
class SumKey:
    """A client's public keys for one sum, signed with its own."""

    client: str
    cluster: int
    round: int
    mask: Bytes  # X25519: masks that cancel
    box: Bytes  # X25519: shares under way
    signature: Bytes


@dataclass(frozen=True, slots=True)
class Peer:
    """What a client learns of another one with which it is summed."""

    key: str  # the site's public key, one line
    keys: SumKey


@dataclass(frozen=True, slots=True)
class SumShares:
    """Secure sum, 2: hand out shares of the secrets behind the masks."""

    cluster: int
    round: int
    threshold: int  # shares that open a secret
    peers: tuple[Peer, ...]


@dataclass(frozen=True, slots=True)
class SumSealed:
    """A client's shares, one encrypted for each other client."""

    client: str
    cluster: int
    round: int
    shares: Mapping[str, Bytes]


@dataclass(frozen=True, slots=True)
class SumTrain:
    """Secure sum, 3: train, and send the update behind masks."""

    request: TrainRequest
    shares: Mapping[str, Bytes]  # for this client, by who has sent them: who is in the sum


@dataclass(frozen=True, slots=True)
class Masked:
    """An update times its weight, the weight and the loss, behind masks: fixed point modulo 2⁶⁴."""

    client: str
    cluster: int
    round: int
    values: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SumOpen:
    """Secure sum, 4: open the own masks of those whose sum has arrived, and the pair masks of the others."""

    cluster: int
    round: int
    survivors: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SumOpened:
    """A client's shares of others' secrets: of each other client one, never both."""

    client: str
    cluster: int
    round: int
    shares: Mapping[str, Bytes]


REQUESTS = (
    Hello,
    SumKeys,
    SumShares,
    SumTrain,
    SumOpen,
    Summarise,
    Regroup,
    Assign,
    Compare,
    ReadAgain,
    TrainRequest,
    ValidationRequest,
    Goodbye,
)
REPLIES = (
    SumKey,
    SumSealed,
    Masked,
    SumOpened,
    Member,
    LocalClusters,
    Assignment,
    Comparison,
    Reread,
    TrainReply,
    TrainFailure,
    ValidationReply,
    Failed,
    Refused,
    Behind,
    Done,
)


@dataclass(frozen=True, slots=True)
class Envelope:
    """What one side sends in one exchange."""

    run: str
    client: str
    exchange: int  # rises from message to message; a client answers each number once
    messages: tuple[Any, ...]
    asked: str = ""  # of a reply: the SHA-256 of what it answers


def seal(envelope: Envelope, half: bool = False) -> bytes:
    """Return an envelope's bytes.

    Parameters
    ----------
    half : send adapters as float16: half the bytes, and every weight is rounded to 11 bits.
    """
    arrays: dict[str, NDArray[Any]] = {}
    body = {
        "run": envelope.run,
        "client": envelope.client,
        "exchange": envelope.exchange,
        "asked": envelope.asked,
        "messages": [
            {"kind": type(message).__name__, **_outer(message, arrays, half)} for message in envelope.messages
        ],
    }
    return pack(Packet("envelope", body, arrays))


def unseal(body: bytes, kinds: tuple[type, ...], limit: int) -> Envelope:
    """Return the envelope that bytes are, if it holds messages of ``kinds`` alone.

    Raises
    ------
    WireError
        If a field is missing, of another type than it is declared, or not declared at all.
    """
    packet = unpack(body, limit)
    known = {kind.__name__: kind for kind in kinds}
    try:
        head = {name: packet.fields[name] for name in ("run", "client", "exchange", "asked", "messages")}
        messages = []
        for one in head["messages"]:
            values = dict(one)
            kind = known[values.pop("kind")]
            messages.append(_made(kind, values, packet.arrays))
        run, client, exchange, asked = (head[name] for name in ("run", "client", "exchange", "asked"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WireError(f"an envelope that cannot be read: {type(error).__name__}") from error
    if not (isinstance(run, str) and isinstance(client, str) and isinstance(asked, str)):
        raise WireError("an envelope without a run and a client")
    if type(exchange) is not int:
        raise WireError("an envelope without a number")
    return Envelope(run, client, exchange, tuple(messages), asked)


def rounding(message: TrainRequest | TrainReply) -> float:
    """Return what float16 loses of an adapter: the L2 norm of the error over that of the adapter."""
    error = total = 0.0
    for array in message.adapter.values():
        exact = array.astype(np.float64)
        error += float(((_halved(array).astype(np.float64) - exact) ** 2).sum())
        total += float((exact**2).sum())
    return math.sqrt(error / total) if total else 0.0


def _halved(array: NDArray[Any]) -> NDArray[Any]:
    limit = np.finfo(np.float16).max
    return np.clip(array, -limit, limit).astype(np.float16)


def _outer(value: Any, arrays: dict[str, NDArray[Any]], half: bool) -> Any:
    """Return a value as fields; put its arrays into ``arrays``."""
    if is_dataclass(value) and not isinstance(value, type):
        adapters = half and isinstance(value, TrainRequest | TrainReply | ValidationRequest)
        return {f.name: _outer(getattr(value, f.name), arrays, adapters) for f in fields(value)}
    if isinstance(value, np.ndarray):
        name = str(len(arrays))
        arrays[name] = _halved(value) if half else value
        return {ARRAY: name}
    if isinstance(value, Mapping):
        return {str(key): _outer(inner, arrays, half) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_outer(inner, arrays, half) for inner in value]
    if isinstance(value, np.generic):
        return value.item()
    return value


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _made(kind: Any, value: Any, arrays: Mapping[str, NDArray[Any]]) -> Any:
    """Return ``value`` as what ``kind`` declares.

    Raises
    ------
    TypeError, KeyError, ValueError
        If it is not of that kind.
    """
    if is_dataclass(kind) and isinstance(kind, type):
        hints = _hints(kind)
        if not isinstance(value, dict) or not value.keys() <= hints.keys():
            raise TypeError(f"{kind.__name__} with other fields")
        return kind(**{name: _made(hints[name], inner, arrays) for name, inner in value.items()})
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is np.ndarray:
        return _array(np.dtype(get_args(arguments[1])[0]), value, arrays)
    if origin in (Union, python_types.UnionType):
        options = [option for option in arguments if option is not type(None)]
        return None if value is None else _made(options[0], value, arrays)
    if origin is tuple:
        return tuple(_made(arguments[0], inner, arrays) for inner in _of(list, value))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        key = arguments[0]
        return {key(k): _made(arguments[1], inner, arrays) for k, inner in _of(dict, value).items()}
    if kind is float:
        return float(_of((int, float), value))
    return _of(kind, value)


def _of(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"a field of another type than {kind}")
    return value


def _array(dtype: np.dtype[Any], value: Any, arrays: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    array = arrays[_of(dict, value)[ARRAY]]
    if array.dtype == np.float16 and dtype == np.float32:
        return array.astype(np.float32)
    if array.dtype != dtype:
        raise TypeError(f"an array of {array.dtype} where {dtype} belongs")
    return array if array.flags.writeable else array.copy()
