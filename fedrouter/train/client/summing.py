"""A site's half of the secure sum: what it sends of an update says nothing without everybody else's."""

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedrouter.errors import WireError
from fedrouter.files import write_atomically
from fedrouter.train.lora import update_of
from fedrouter.train.wire.keys import PrivateKey, load_public, sign_keys, verify_keys
from fedrouter.train.wire.masks import (
    Bytes,
    agreed,
    as_array,
    fixed,
    pair_mask,
    shared,
    shut,
    stream,
    threshold,
    unshut,
)
from fedrouter.train.wire.messages import (
    Masked,
    Peer,
    SumKey,
    SumKeys,
    SumOpen,
    SumOpened,
    SumSealed,
    SumShares,
)
from fedrouter.types import Float64s, TrainReply, TrainRequest


@dataclass(slots=True)
class _Sum:
    """One round of one task cluster."""

    peers: tuple[str, ...]
    mask: X25519PrivateKey
    box: X25519PrivateKey
    own: bytes  # the seed of the mask of its own
    keys: Mapping[str, SumKey] = field(default_factory=dict)
    summed: tuple[str, ...] = ()  # who is in the sum: whose shares have come
    shares: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)  # of (pair mask key, own seed)
    opened: bool = False


class Summing:
    """The sums that a site takes part in; only the latest round's are kept.

    Parameters
    ----------
    pins : file with the other sites' public keys as they were first seen: a server that names another key
        for a site later is refused.
    least : clients; smaller sums are refused.
    """

    def __init__(self, run: str, name: str, key: PrivateKey, pins: Path, least: int):
        self._run, self._name, self._key, self._pins, self._least = run, name, key, pins, least
        self._sums: dict[int, tuple[int, _Sum]] = {}
        self._opened: set[tuple[int, int]] = set()  # task cluster, round

    def keys(self, asked: SumKeys) -> SumKey:
        """Make keys for one sum.

        Raises
        ------
        WireError
            If it is of too few clients, or not of this one.
        """
        if self._name not in asked.peers:
            raise WireError("a sum that this site is not in")
        if (asked.cluster, asked.round) in self._opened:  # two sums that differ by one client tell of it
            raise WireError("this round was summed already")
        self._refuse_small(len(set(asked.peers)))
        pairs = X25519PrivateKey.generate(), X25519PrivateKey.generate()
        begun = _Sum(asked.peers, *pairs, own=secrets.token_bytes(32))
        self._sums[asked.cluster] = asked.round, begun
        mask, box = (key.public_key().public_bytes_raw() for key in (begun.mask, begun.box))
        arrays = as_array(mask), as_array(box)
        made = SumKey(self._name, asked.cluster, asked.round, *arrays, signature=as_array(b""))
        return replace(made, signature=as_array(sign_keys(self._key, signed_part(self._run, made))))

    def shares(self, asked: SumShares) -> SumSealed:
        """Check the others' keys; cut this site's secrets into shares, one encrypted for each other client.

        Raises
        ------
        WireError
            If a key is not its owner's, too few are left, or too few shares would open a secret.
        """
        found = self._sum(asked.cluster, asked.round)
        names = tuple(peer.keys.client for peer in asked.peers)
        if found.keys:
            raise WireError("shares of this sum were handed out already")
        if len(set(names)) != len(names) or not set(names) <= set(found.peers) or self._name not in names:
            raise WireError("a sum of other clients than were told first")
        if len(names) < self._least or not threshold(len(names)) <= asked.threshold <= len(names):
            raise WireError(f"a sum of {len(names)} clients whose secrets {asked.threshold} open")
        for peer in asked.peers:
            self._check(peer, asked)
        found.keys = {peer.keys.client: peer.keys for peer in asked.peers}
        found.peers = names
        cut = [
            shared(secret, names, asked.threshold) for secret in (found.mask.private_bytes_raw(), found.own)
        ]
        found.shares[self._name] = cut[0][self._name], cut[1][self._name]
        sealed = {
            name: as_array(
                shut(self._box(found, asked, name, sender=self._name), cut[0][name] + cut[1][name])
            )
            for name in names
            if name != self._name
        }
        return SumSealed(self._name, asked.cluster, asked.round, sealed)

    def take(self, request: TrainRequest, sealed: Mapping[str, Bytes]) -> None:
        """Keep the others' shares; who has sent some is in the sum.

        Raises
        ------
        WireError
            If there are too few, or one was changed.
        """
        found = self._sum(request.cluster, request.round)
        if found.summed:
            raise WireError("this sum has begun already")
        if not sealed.keys() <= set(found.keys) - {self._name}:
            raise WireError("a sum of other clients than were told first")
        self._refuse_small(len(sealed) + 1)
        for name, content in sealed.items():
            key = self._box(found, request, name, sender=name)
            both = unshut(key, content.tobytes())
            found.shares[name] = both[: len(both) // 2], both[len(both) // 2 :]
        found.summed = tuple(name for name in found.peers if name in found.shares)

    def masked(self, request: TrainRequest, reply: TrainReply) -> Masked:
        """Return an update behind masks."""
        found = self._sum(request.cluster, request.round)
        values = weighted(request, reply)
        total = fixed(values, len(found.summed)) + stream(found.own, len(values))
        for name in found.summed:
            if name != self._name:
                other = found.keys[name].mask.tobytes()
                total = total + pair_mask(
                    found.mask, self._name, name, other, len(values), *self._what(request)
                )
        return Masked(self._name, request.cluster, request.round, total.view(np.int64))

    def opened(self, asked: SumOpen) -> SumOpened:
        """Return shares that open the own masks of the survivors, and the pair masks of all others.

        Raises
        ------
        WireError
            If too few survive, or it was asked before: both of one client's secrets would open its update.
        """
        found = self._sum(asked.cluster, asked.round)
        survivors = set(asked.survivors)
        if found.opened:
            raise WireError("this sum was opened already")
        if not survivors <= set(found.summed) or len(survivors) < max(
            self._least, threshold(len(found.peers))
        ):
            raise WireError(f"a sum of {len(survivors)} clients is not opened")
        found.opened = True
        self._opened.add((asked.cluster, asked.round))
        return SumOpened(
            self._name,
            asked.cluster,
            asked.round,
            {name: as_array(pair[name in survivors]) for name, pair in found.shares.items()},
        )

    def _refuse_small(self, num: int) -> None:
        if num < self._least:
            raise WireError(f"a sum of {num} clients; this site takes part in {self._least} or more")

    def _sum(self, cluster: int, number: int) -> _Sum:
        round_, found = self._sums.get(cluster, (-1, None))
        if found is None or round_ != number:
            raise WireError("a sum that this site knows nothing of")
        return found

    def _what(self, of: SumShares | TrainRequest) -> tuple[object, ...]:
        return self._run, of.cluster, of.round

    def _box(self, found: _Sum, of: SumShares | TrainRequest, other: str, sender: str) -> bytes:
        return agreed(found.box, found.keys[other].box.tobytes(), "box", sender, *self._what(of))

    def _check(self, peer: Peer, asked: SumShares) -> None:
        name = peer.keys.client
        pins = json.loads(self._pins.read_text(encoding="utf-8")) if self._pins.exists() else {}
        key, pinned = peer.key.strip(), pins.get(name)
        if pinned not in (None, key):
            raise WireError(
                f"client {name} has another key than the first time; if that is right, "
                f"take it out of {self._pins.name}"
            )
        if (peer.keys.cluster, peer.keys.round) != (asked.cluster, asked.round):
            raise WireError(f"client {name}: keys of another sum")
        verify_keys(load_public(key), signed_part(self._run, peer.keys), peer.keys.signature.tobytes())
        if pinned is None:
            write_atomically(self._pins, json.dumps({**pins, name: key}, indent=2) + "\n")


def signed_part(run: str, keys: SumKey) -> bytes:
    """Return what of a client's keys it signs."""
    head = "/".join(map(str, (run, keys.client, keys.cluster, keys.round))).encode()
    return head + b"\0" + keys.mask.tobytes() + keys.box.tobytes()


def weighted(request: TrainRequest, reply: TrainReply) -> Float64s:
    """Return the numbers that are summed: update times weight, the weight, loss times weight."""
    weight = float(reply.num_examples)
    update = update_of(request.adapter, reply.adapter, sorted(request.adapter))
    return np.concatenate([update * weight, [weight, weight * (reply.loss or 0.0)]])
