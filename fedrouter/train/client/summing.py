"""A site's side of the secure sum: its masked update reveals nothing without those of all other sites."""

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedrouter.errors import WireError
from fedrouter.files import read_map, write_atomically
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
    self_seed: bytes  # of the self mask
    keys: Mapping[str, SumKey] = field(default_factory=dict)
    summed: tuple[str, ...] = ()  # the clients in the sum: those whose shares have arrived
    shares: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)  # of (pair mask key, self seed)
    opened: bool = False


class Summing:
    """The sums that a site takes part in, for each task cluster the latest.

    Parameters
    ----------
    pins : file with the other sites' public keys as first seen; a different key for a site is refused later.
    least : minimum number of clients in a sum.
    """

    def __init__(self, run: str, name: str, key: PrivateKey, pins: Path, least: int):
        self._run, self._name, self._key, self._pins, self._least = run, name, key, pins, least
        self._sums: dict[int, tuple[int, _Sum]] = {}
        self._opened: set[tuple[int, int]] = set()  # task cluster, round

    def keys(self, asked: SumKeys) -> SumKey:
        """Create keys for one sum.

        Raises
        ------
        WireError
            If the sum has too few clients, excludes this site, or was opened already.
        """
        if self._name not in asked.peers:
            raise WireError("a sum without this site")
        if (asked.cluster, asked.round) in self._opened:  # two sums may differ by a single client's update
            raise WireError("this round was summed already")
        self._refuse_small(len(set(asked.peers)))
        pairs = X25519PrivateKey.generate(), X25519PrivateKey.generate()
        new = _Sum(asked.peers, *pairs, self_seed=secrets.token_bytes(32))
        self._sums[asked.cluster] = asked.round, new
        mask, box = (key.public_key().public_bytes_raw() for key in (new.mask, new.box))
        arrays = as_array(mask), as_array(box)
        unsigned = SumKey(self._name, asked.cluster, asked.round, *arrays, signature=as_array(b""))
        return replace(unsigned, signature=as_array(sign_keys(self._key, signed_part(self._run, unsigned))))

    def shares(self, asked: SumShares) -> SumSealed:
        """Check the other clients' keys; return shares of this site's secrets, encrypted for each client.

        Raises
        ------
        WireError
            If a key is not its owner's, too few clients are left, or too few shares would open a secret.
        """
        found = self._sum(asked.cluster, asked.round)
        names = tuple(peer.keys.client for peer in asked.peers)
        if found.keys:
            raise WireError("shares of this sum were distributed already")
        if len(set(names)) != len(names) or not set(names) <= set(found.peers) or self._name not in names:
            raise WireError("a sum of other clients than announced")
        if len(names) < self._least or not threshold(len(names)) <= asked.threshold <= len(names):
            raise WireError(
                f"a sum of {len(names)} clients whose secrets {asked.threshold} can open: too few or too many"
            )
        for peer in asked.peers:
            self._check_peer(peer, asked)
        found.keys = {peer.keys.client: peer.keys for peer in asked.peers}
        found.peers = names
        shares = [
            shared(secret, names, asked.threshold)
            for secret in (found.mask.private_bytes_raw(), found.self_seed)
        ]
        found.shares[self._name] = shares[0][self._name], shares[1][self._name]
        sealed = {
            name: as_array(
                shut(
                    self._share_key(found, asked, name, sender=self._name), shares[0][name] + shares[1][name]
                )
            )
            for name in names
            if name != self._name
        }
        return SumSealed(self._name, asked.cluster, asked.round, sealed)

    def take(self, request: TrainRequest, sealed: Mapping[str, Bytes]) -> None:
        """Store the other clients' shares; their senders and this site form the sum.

        Raises
        ------
        WireError
            If there are too few, or one was changed.
        """
        found = self._sum(request.cluster, request.round)
        if found.summed:
            raise WireError("this sum has begun already")
        if not sealed.keys() <= set(found.keys) - {self._name}:
            raise WireError("a sum of other clients than announced")
        self._refuse_small(len(sealed) + 1)
        for name, content in sealed.items():
            key = self._share_key(found, request, name, sender=name)
            both = unshut(key, content.tobytes())
            found.shares[name] = both[: len(both) // 2], both[len(both) // 2 :]
        found.summed = tuple(name for name in found.peers if name in found.shares)

    def masked(self, request: TrainRequest, reply: TrainReply) -> Masked:
        """Return the masked update."""
        found = self._sum(request.cluster, request.round)
        values = weighted(request, reply)
        total = fixed(values, len(found.summed)) + stream(found.self_seed, len(values))
        for name in found.summed:
            if name != self._name:
                other = found.keys[name].mask.tobytes()
                total = total + pair_mask(
                    found.mask, self._name, name, other, len(values), *self._purpose(request)
                )
        return Masked(self._name, request.cluster, request.round, total.view(np.int64))

    def opened(self, asked: SumOpen) -> SumOpened:
        """Return shares that open the survivors' self masks and the dropped clients' pair masks.

        Raises
        ------
        WireError
            If too few clients survive, or this is a second request: both secrets of a client would reveal its
            update.
        """
        found = self._sum(asked.cluster, asked.round)
        survivors = set(asked.survivors)
        if found.opened:
            raise WireError("this sum was opened already")
        if not survivors <= set(found.summed) or len(survivors) < max(
            self._least, threshold(len(found.peers))
        ):
            raise WireError(f"a sum of {len(survivors)} clients must not be opened")
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
            raise WireError("a sum that is unknown to this site")
        return found

    def _purpose(self, of: SumShares | TrainRequest) -> tuple[object, ...]:
        return self._run, of.cluster, of.round

    def _share_key(self, found: _Sum, of: SumShares | TrainRequest, other: str, sender: str) -> bytes:
        return agreed(found.box, found.keys[other].box.tobytes(), "box", sender, *self._purpose(of))

    def _check_peer(self, peer: Peer, asked: SumShares) -> None:
        name = peer.keys.client
        pins = read_map(self._pins, str)
        key, pinned = peer.key.strip(), pins.get(name)
        if pinned not in (None, key):
            raise WireError(
                f"client {name} has another key than the first time; if the change is legitimate, remove the "
                f"client from {self._pins.name}"
            )
        if (peer.keys.cluster, peer.keys.round) != (asked.cluster, asked.round):
            raise WireError(f"client {name}: its keys belong to another sum")
        verify_keys(load_public(key), signed_part(self._run, peer.keys), peer.keys.signature.tobytes())
        if pinned is None:
            write_atomically(self._pins, json.dumps({**pins, name: key}, indent=2) + "\n")


def signed_part(run: str, keys: SumKey) -> bytes:
    """Return the bytes that a client signs with its keys for a sum."""
    head = "/".join(map(str, (run, keys.client, keys.cluster, keys.round))).encode()
    return head + b"\0" + keys.mask.tobytes() + keys.box.tobytes()


def weighted(request: TrainRequest, reply: TrainReply) -> Float64s:
    """Return the values to sum: update × weight, weight, loss × weight."""
    weight = float(reply.num_examples)
    update = update_of(request.adapter, reply.adapter, sorted(request.adapter))
    return np.concatenate([update * weight, [weight, weight * (reply.loss or 0.0)]])
