"""Every message between server and clients, and the conversion between dataclasses and the wire format.

A server may send only the kinds in ``REQUESTS``, and a client only those in ``REPLIES``.
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

ARRAY = "$array"  # a map with this key refers to an array


@dataclass(frozen=True, slots=True)
class Hello:
    """The plan of the run, sent before any other request."""

    settings: str  # the run's configuration as JSON, without data and paths of the server
    base: str  # fingerprint of the base's config and tokenizer
    probe: Array  # (3, d), the server's embeddings of fixed texts
    half: bool = False  # adapters are sent as float16, both ways
    secure: bool = False  # updates are summed so that the server sees no single one


@dataclass(frozen=True, slots=True)
class Summarise:
    """Cluster the rows."""

    num: int | None  # of local clusters; None: chosen by the client
    beyond: bool = False  # only the rows beyond every radius of the last ``Compare``


@dataclass(frozen=True, slots=True)
class Regroup:
    """Group rows by nearest centroid, or by ``told``."""

    space: RoutingSpace
    told: Membership | None


@dataclass(frozen=True, slots=True)
class Assign:
    """Assign rows to the nearest task clusters, or by ``told``, for all later requests."""

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

    reason: str  # one line that quotes no row
    settings: bool = False  # the settings are at fault, not the client


@dataclass(frozen=True, slots=True)
class Refused:
    """A client will not do what was asked: its policy forbids it, or the message is a replay."""

    reason: str


@dataclass(frozen=True, slots=True)
class Behind:
    """A restarted client asks for the plan and the task clusters again."""


@dataclass(frozen=True, slots=True)
class Done:
    """Acknowledges a request without a result."""


@dataclass(frozen=True, slots=True)
class SumKeys:
    """Secure sum, step 1: create keys for one round of one task cluster."""

    cluster: int
    round: int
    peers: tuple[str, ...]  # the clients to sum, in the same order for all


@dataclass(frozen=True, slots=True)
class SumKey:
    """A client's public keys for one sum, signed with its site key."""

    client: str
    cluster: int
    round: int
    mask: Bytes  # X25519, for pair masks
    box: Bytes  # X25519, for encrypting shares
    signature: Bytes


@dataclass(frozen=True, slots=True)
class Peer:
    """The keys of another client in the same sum."""

    key: str  # the site's public key, one line
    keys: SumKey


@dataclass(frozen=True, slots=True)
class SumShares:
    """Secure sum, step 2: distribute shares of the secrets behind the masks."""

    cluster: int
    round: int
    threshold: int  # number of shares that restore a secret
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
    """Secure sum, step 3: train, and send the masked update."""

    request: TrainRequest
    shares: Mapping[str, Bytes]  # sender → its share for this client; the senders form the sum


@dataclass(frozen=True, slots=True)
class Masked:
    """Update × weight, weight and loss × weight, masked; fixed point modulo 2⁶⁴."""

    client: str
    cluster: int
    round: int
    values: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SumOpen:
    """Secure sum, step 4: open the survivors' self masks and the pair masks of the dropped clients."""

    cluster: int
    round: int
    survivors: tuple[str, ...]  # clients whose masked updates have arrived


@dataclass(frozen=True, slots=True)
class SumOpened:
    """A client's shares of the secrets: for each client one of its two secrets, never both."""

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
    """The messages that one side sends in one exchange."""

    run: str
    client: str
    exchange: int  # increases with every request; a client answers each number once
    messages: tuple[Any, ...]
    asked: str = ""  # in a reply: SHA-256 of the request


def seal(envelope: Envelope, half: bool = False) -> bytes:
    """Encode an envelope.

    Parameters
    ----------
    half : send adapters as float16, which halves their size and rounds every weight to 11 bits.
    """
    arrays: dict[str, NDArray[Any]] = {}
    body = {
        "run": envelope.run,
        "client": envelope.client,
        "exchange": envelope.exchange,
        "asked": envelope.asked,
        "messages": [
            {"kind": type(message).__name__, **_encode(message, arrays, half)}
            for message in envelope.messages
        ],
    }
    return pack(Packet("envelope", body, arrays))


def unseal(body: bytes, kinds: tuple[type, ...], limit: int) -> Envelope:
    """Decode an envelope that may hold only messages of ``kinds``.

    Raises
    ------
    WireError
        If a message is of another kind, or a field is missing, undeclared or of the wrong type.
    """
    packet = unpack(body, limit)
    known = {kind.__name__: kind for kind in kinds}
    try:
        head = {name: packet.fields[name] for name in ("run", "client", "exchange", "asked", "messages")}
        messages = []
        for message in head["messages"]:
            values = dict(message)
            kind = known[values.pop("kind")]
            messages.append(_decode(kind, values, packet.arrays))
        run, client, exchange, asked = (head[name] for name in ("run", "client", "exchange", "asked"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WireError(f"an envelope that cannot be read: {type(error).__name__}") from error
    if not (isinstance(run, str) and isinstance(client, str) and isinstance(asked, str)):
        raise WireError("an envelope whose run, client or asked is not a string")
    if type(exchange) is not int:
        raise WireError("an envelope whose exchange is not an integer")
    return Envelope(run, client, exchange, tuple(messages), asked)


def rounding(message: TrainRequest | TrainReply) -> float:
    """Return the relative L2 error of an adapter that is sent as float16."""
    error = total = 0.0
    for array in message.adapter.values():
        exact = array.astype(np.float64)
        error += float(((_halved(array).astype(np.float64) - exact) ** 2).sum())
        total += float((exact**2).sum())
    return math.sqrt(error / total) if total else 0.0


def _halved(array: NDArray[Any]) -> NDArray[Any]:
    limit = np.finfo(np.float16).max
    return np.clip(array, -limit, limit).astype(np.float16)


def _encode(value: Any, arrays: dict[str, NDArray[Any]], half: bool) -> Any:
    """Convert a value to JSON-compatible fields; move its arrays to ``arrays``."""
    if is_dataclass(value) and not isinstance(value, type):
        adapters = half and isinstance(value, TrainRequest | TrainReply | ValidationRequest)
        return {f.name: _encode(getattr(value, f.name), arrays, adapters) for f in fields(value)}
    if isinstance(value, np.ndarray):
        name = str(len(arrays))
        arrays[name] = _halved(value) if half else value
        return {ARRAY: name}
    if isinstance(value, Mapping):
        return {str(key): _encode(inner, arrays, half) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_encode(inner, arrays, half) for inner in value]
    if isinstance(value, np.generic):
        return value.item()
    return value


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _decode(kind: Any, value: Any, arrays: Mapping[str, NDArray[Any]]) -> Any:
    """Convert fields back to a value of type ``kind``.

    Raises
    ------
    TypeError, KeyError, ValueError
        If they do not match the type.
    """
    if is_dataclass(kind) and isinstance(kind, type):
        hints = _hints(kind)
        if not isinstance(value, dict) or not value.keys() <= hints.keys():
            raise TypeError(f"{kind.__name__} with undeclared fields")
        return kind(**{name: _decode(hints[name], inner, arrays) for name, inner in value.items()})
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is np.ndarray:
        return _array(np.dtype(get_args(arguments[1])[0]), value, arrays)
    if origin in (Union, python_types.UnionType):
        options = [option for option in arguments if option is not type(None)]
        return None if value is None else _decode(options[0], value, arrays)
    if origin is tuple:
        return tuple(_decode(arguments[0], inner, arrays) for inner in _require_type(list, value))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        key = arguments[0]
        return {
            key(k): _decode(arguments[1], inner, arrays) for k, inner in _require_type(dict, value).items()
        }
    if kind is float:
        return float(_require_type((int, float), value))
    return _require_type(kind, value)


def _require_type(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"a field that is not of type {kind}")
    return value


def _array(dtype: np.dtype[Any], value: Any, arrays: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    array = arrays[_require_type(dict, value)[ARRAY]]
    if array.dtype == np.float16 and dtype == np.float32:
        return array.astype(np.float32)
    if array.dtype != dtype:
        raise TypeError(f"an array of {array.dtype} instead of {dtype}")
    return array if array.flags.writeable else array.copy()
