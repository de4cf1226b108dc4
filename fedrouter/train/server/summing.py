"""The server's half of the secure sum: it asks four times, and learns of each task cluster the sum alone."""

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

LEAST = 3  # clients of a sum; of two, each knows the other's part

Ask = Callable[[Mapping[str, Sequence[Any]]], Mapping[str, Sequence[Any]]]
"""Sends each client messages; returns a reply to each, of those who answered."""

Kind = TypeVar("Kind")


@dataclass(slots=True)
class _Sum:
    """One task cluster in one round."""

    requests: dict[str, TrainRequest]
    keys: dict[str, SumKey] = field(default_factory=dict)
    names: tuple[str, ...] = ()  # whose keys all have: the order of the shares
    sealed: dict[str, SumSealed] = field(default_factory=dict)
    masked: dict[str, Ring] = field(default_factory=dict)
    opened: dict[str, SumOpened] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def drop(self, stage: str, there: Mapping[str, object]) -> None:
        """Note who got no further than this stage."""
        for name in self.requests.keys() - there.keys() - self.failed.keys():
            self.failed[name] = f"it dropped out of the sum ({stage})"


def secure_sums(
    run: str, requests: Sequence[TrainRequest], roster: Mapping[str, str], ask: Ask, least: int = LEAST
) -> Iterator[TrainReply | TrainFailure]:
    """Have clients train; yield of each task cluster the mean, as if every client had sent it.

    The protocol is that of Bonawitz et al. 2017; the client's half says what protects what.

    Parameters
    ----------
    roster : public key by client, one line each.
    least : clients; a smaller sum is not made.
    """
    sums: dict[int, _Sum] = {}
    for request in requests:
        sums.setdefault(request.cluster, _Sum({})).requests[request.client] = request
    number = requests[0].round if requests else 0

    def stage(kind: type[Kind], messages: Callable[[int, _Sum, str], Any | None]) -> None:
        """Ask all clients about all sums that are still possible; keep the answers of ``kind``."""
        asked: dict[str, list[Any]] = {}
        for k, one in sums.items():
            for name in one.requests:
                if name not in one.failed and (message := messages(k, one, name)) is not None:
                    asked.setdefault(name, []).append((k, message))
        answers = ask({name: [message for _, message in own] for name, own in asked.items()})
        for name, own in asked.items():
            for (k, _), reply in zip(own, answers.get(name, ()), strict=False):
                if isinstance(reply, kind) and _same(reply, name, k, number):
                    _keep(sums[k], name, reply)
                else:
                    sums[k].failed[name] = getattr(
                        reply, "reason", "it sent something else than was asked for"
                    )

    for one in sums.values():
        _enough(one, len(one.requests), least)
    stage(SumKey, lambda k, one, _: SumKeys(k, number, tuple(sorted(one.requests))))
    for one in sums.values():
        one.drop("keys", one.keys)
        one.names = tuple(sorted(one.keys.keys() - one.failed.keys()))
        _enough(one, len(one.names), least)
    stage(SumSealed, lambda k, one, _: _shares(k, number, one, roster))
    for one in sums.values():
        one.drop("shares", one.sealed)
        _enough(one, len(one.sealed), least)
    stage(Masked, lambda _, one, name: _train(one, name))
    for one in sums.values():
        one.drop("update", one.masked)
        _enough(one, len(one.masked), max(least, threshold(len(one.names)) if one.names else 0))
    stage(SumOpened, lambda k, one, _: SumOpen(k, number, tuple(sorted(one.masked))))
    for k, one in sums.items():
        yield from _result(run, k, number, one)


def _keep(one: _Sum, name: str, reply: Any) -> None:
    match reply:
        case SumKey():
            one.keys[name] = reply
        case SumSealed():
            one.sealed[name] = reply
        case Masked():
            one.masked[name] = reply.values.view(np.uint64)
        case SumOpened():
            one.opened[name] = reply


def _same(reply: Any, name: str, cluster: int, number: int) -> bool:
    keys = [reply.mask, reply.box] if isinstance(reply, SumKey) else []
    right = all(key.shape == (LENGTH,) for key in keys)
    return right and (reply.client, reply.cluster, reply.round) == (name, cluster, number)


def _enough(one: _Sum, num: int, least: int) -> None:
    """Give a sum up that too few clients are left of."""
    if num < least:
        for name in one.requests:
            one.failed.setdefault(name, f"{num} clients are too few for a secure sum; it takes {least}")


def _shares(cluster: int, number: int, one: _Sum, roster: Mapping[str, str]) -> SumShares:
    peers = tuple(Peer(roster[name], one.keys[name]) for name in one.names)
    return SumShares(cluster, number, threshold(len(one.names)), peers)


def _train(one: _Sum, name: str) -> SumTrain:
    shares = {other: s.shares[name] for other, s in one.sealed.items() if other != name and name in s.shares}
    return SumTrain(one.requests[name], shares)


def _result(run: str, cluster: int, number: int, one: _Sum) -> Iterator[TrainReply | TrainFailure]:
    """Yield what a task cluster's clients come to."""
    survivors = sorted(one.masked)
    try:
        if len(survivors) and not one.failed.keys() >= one.requests.keys():
            values = unmasked(run, cluster, number, one.masked, one.keys, one.sealed, one.opened, one.names)
        else:
            values = None
    except WireError as error:
        values = None
        for name in survivors:
            one.failed[name] = f"the sum could not be opened: {error}"
    steps = sum(one.requests[name].steps for name in survivors)
    for name, request in one.requests.items():
        if values is None or name not in one.masked:
            yield TrainFailure(name, cluster, one.failed.get(name, "it dropped out of the sum"))
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
    """Return the sum of the survivors' numbers.

    Raises
    ------
    WireError
        If too few shares came.
    """
    shapes = {values.shape for values in masked.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1:
        raise WireError("parts of different lengths")
    ((size,),), least = shapes, threshold(len(names))
    total: Ring = np.zeros(size, dtype=np.uint64)
    for values in masked.values():
        total = total + values

    def secret(of: str) -> bytes:
        shares = {name: one.shares[of].tobytes() for name, one in opened.items() if of in one.shares}
        return restored(shares, names, least)

    for name in sealed:
        if name in masked:
            total = total - stream(secret(name), size)
            continue
        gone = X25519PrivateKey.from_private_bytes(secret(name))  # its update never came, and never may now
        for other in masked:
            what = run, cluster, number
            total = total - pair_mask(gone, other, name, keys[other].mask.tobytes(), size, *what)
    return loose(total)
