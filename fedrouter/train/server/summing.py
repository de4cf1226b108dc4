"""The server's side of the secure sum: four exchanges that reveal only the sum for each task cluster."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedrouter.errors import WireError
from fedrouter.train.lora import updated
from fedrouter.train.wire.masks import LENGTH, Ring, loose, pair_mask, restored, stream, threshold
from fedrouter.train.wire.messages import (
    Masked,
    Peer,
    SumKey,
    SumKeys,
    SumOpen,
    SumOpened,
    SumSealed,
    SumShares,
    SumTrain,
)
from fedrouter.types import Float64s, TrainFailure, TrainReply, TrainRequest

LEAST = 3  # minimum number of clients in a sum; with two, each could compute the other's update

Ask = Callable[[Mapping[str, Sequence[Any]]], Mapping[str, Sequence[Any]]]
"""Sends each client its messages; returns the replies of the clients that answered."""

Kind = TypeVar("Kind")


@dataclass(slots=True)
class _Sum:
    """One task cluster in one round."""

    requests: dict[str, TrainRequest]
    keys: dict[str, SumKey] = field(default_factory=dict)
    names: tuple[str, ...] = ()  # clients whose keys were sent to all; their order is that of the shares
    sealed: dict[str, SumSealed] = field(default_factory=dict)
    masked: dict[str, Ring] = field(default_factory=dict)
    opened: dict[str, SumOpened] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def drop(self, stage: str, replied: Mapping[str, object]) -> None:
        """Mark clients that did not reply in this stage as failed."""
        for name in self.requests.keys() - replied.keys() - self.failed.keys():
            self.failed[name] = f"it dropped out of the sum ({stage})"


def secure_sums(
    run: str, requests: Sequence[TrainRequest], roster: Mapping[str, str], ask: Ask, least: int = LEAST
) -> Iterator[TrainReply | TrainFailure]:
    """Have clients train; yield for each client its task cluster's mean in place of its own adapter.

    The protocol is that of Bonawitz et al. 2017; wire/masks.py and client/summing.py describe it.

    Parameters
    ----------
    roster : client name → public key as one line of text.
    least : minimum number of clients in a sum.
    """
    sums: dict[int, _Sum] = {}
    for request in requests:
        sums.setdefault(request.cluster, _Sum({})).requests[request.client] = request
    number = requests[0].round if requests else 0

    def stage(kind: type[Kind], messages: Callable[[int, _Sum, str], Any | None]) -> None:
        """Send each client the messages for its sums that can still succeed; store replies of ``kind``."""
        by_client: dict[str, list[Any]] = {}
        for k, a_sum in sums.items():
            for name in a_sum.requests:
                if name not in a_sum.failed and (message := messages(k, a_sum, name)) is not None:
                    by_client.setdefault(name, []).append((k, message))
        replies = ask({name: [message for _, message in own] for name, own in by_client.items()})
        for name, own in by_client.items():
            for (k, _), reply in zip(own, replies.get(name, ()), strict=False):
                if isinstance(reply, kind) and _matches(reply, name, k, number):
                    _store(sums[k], name, reply)
                else:
                    sums[k].failed[name] = getattr(reply, "reason", "its reply does not match the request")

    for a_sum in sums.values():
        _require(a_sum, len(a_sum.requests), least)
    stage(SumKey, lambda k, a_sum, _: SumKeys(k, number, tuple(sorted(a_sum.requests))))
    for a_sum in sums.values():
        a_sum.drop("keys", a_sum.keys)
        a_sum.names = tuple(sorted(a_sum.keys.keys() - a_sum.failed.keys()))
        _require(a_sum, len(a_sum.names), least)
    stage(SumSealed, lambda k, a_sum, _: _shares(k, number, a_sum, roster))
    for a_sum in sums.values():
        a_sum.drop("shares", a_sum.sealed)
        _require(a_sum, len(a_sum.sealed), least)
    stage(Masked, lambda _, a_sum, name: _train(a_sum, name))
    for a_sum in sums.values():
        a_sum.drop("update", a_sum.masked)
        _require(a_sum, len(a_sum.masked), max(least, threshold(len(a_sum.names)) if a_sum.names else 0))
    stage(SumOpened, lambda k, a_sum, _: SumOpen(k, number, tuple(sorted(a_sum.masked))))
    for k, a_sum in sums.items():
        yield from _result(run, k, number, a_sum)


def _store(a_sum: _Sum, name: str, reply: Any) -> None:
    match reply:
        case SumKey():
            a_sum.keys[name] = reply
        case SumSealed():
            a_sum.sealed[name] = reply
        case Masked():
            a_sum.masked[name] = reply.values.view(np.uint64)
        case SumOpened():
            a_sum.opened[name] = reply


def _matches(reply: Any, name: str, cluster: int, number: int) -> bool:
    keys = [reply.mask, reply.box] if isinstance(reply, SumKey) else []
    valid = all(key.shape == (LENGTH,) for key in keys)
    return valid and (reply.client, reply.cluster, reply.round) == (name, cluster, number)


def _require(a_sum: _Sum, num: int, least: int) -> None:
    """Mark all clients of a sum as failed if fewer than ``least`` are left."""
    if num < least:
        for name in a_sum.requests:
            a_sum.failed.setdefault(name, f"{num} clients are too few for a secure sum; it needs {least}")


def _shares(cluster: int, number: int, a_sum: _Sum, roster: Mapping[str, str]) -> SumShares:
    peers = tuple(Peer(roster[name], a_sum.keys[name]) for name in a_sum.names)
    return SumShares(cluster, number, threshold(len(a_sum.names)), peers)


def _train(a_sum: _Sum, name: str) -> SumTrain:
    shares = {
        other: s.shares[name] for other, s in a_sum.sealed.items() if other != name and name in s.shares
    }
    return SumTrain(a_sum.requests[name], shares)


def _result(run: str, cluster: int, number: int, a_sum: _Sum) -> Iterator[TrainReply | TrainFailure]:
    """Yield the mean for each client in the sum, and the failures of the others."""
    survivors = sorted(a_sum.masked)
    try:
        if len(survivors) and not a_sum.failed.keys() >= a_sum.requests.keys():
            values = unmasked(
                run, cluster, number, a_sum.masked, a_sum.keys, a_sum.sealed, a_sum.opened, a_sum.names
            )
        else:
            values = None
    except WireError as error:
        values = None
        for name in survivors:
            a_sum.failed[name] = f"the sum could not be opened: {error}"
    steps = sum(a_sum.requests[name].steps for name in survivors)
    for name, request in a_sum.requests.items():
        if values is None or name not in a_sum.masked:
            yield TrainFailure(name, cluster, a_sum.failed.get(name, "it dropped out of the sum"))
        else:
            weight, loss = values[-2:]
            share = max(1, int(weight * request.steps / steps))
            names = sorted(request.adapter)
            adapter = updated(request.adapter, values[:-2] / max(weight, 1.0), names)
            yield TrainReply(name, cluster, adapter, share, float(loss / max(weight, 1.0)), 0.0)


def unmasked(
    run: str,
    cluster: int,
    number: int,
    masked: Mapping[str, Ring],
    keys: Mapping[str, SumKey],
    sealed: Mapping[str, SumSealed],
    opened: Mapping[str, SumOpened],
    names: Sequence[str],
) -> Float64s:
    """Return the sum of the survivors' values.

    Raises
    ------
    WireError
        If the values differ in length, or too few shares of a secret arrived.
    """
    shapes = {values.shape for values in masked.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1:
        raise WireError("the clients' updates have different lengths")
    ((size,),), least = shapes, threshold(len(names))
    total: Ring = np.zeros(size, dtype=np.uint64)
    for values in masked.values():
        total = total + values

    def secret(client: str) -> bytes:
        shares = {n: reply.shares[client].tobytes() for n, reply in opened.items() if client in reply.shares}
        return restored(shares, names, least)

    for name in sealed:
        if name in masked:
            total = total - stream(secret(name), size)
            continue
        # This client's update is missing; it must never be accepted later, because its key is now known.
        dropped = X25519PrivateKey.from_private_bytes(secret(name))
        for other in masked:
            purpose = run, cluster, number
            total = total - pair_mask(dropped, other, name, keys[other].mask.tobytes(), size, *purpose)
    return loose(total)
