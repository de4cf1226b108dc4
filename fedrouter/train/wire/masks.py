"""Building blocks of the secure sum: fixed-point numbers, masks that cancel, and shared secrets.

The protocol is that of Bonawitz et al. 2017 ("Practical Secure Aggregation for Privacy-Preserving Machine
Learning"). X25519 agrees on a secret for each pair of clients; HKDF and ChaCha20 expand it into a mask that
one of them adds and the other subtracts. Each client also adds a self mask, which the other clients open
after its masked update has arrived.
"""

import secrets
from collections.abc import Mapping, Sequence

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from fedrouter.errors import WireError
from fedrouter.types import Float64s

SCALE = 2.0**28  # fixed-point steps per unit; rounding costs at most half a step per client
LIMIT = 2.0**62  # maximum of a sum, in steps
PRIME = 2**521 - 1  # of the field for Shamir's shares; larger than any 32-byte secret
LENGTH = 32  # bytes of a key or secret

Ring = NDArray[np.uint64]
Bytes = NDArray[np.uint8]


def as_array(content: bytes) -> Bytes:
    """Return bytes as an array for a message."""
    return np.frombuffer(content, dtype=np.uint8).copy()


def fixed(values: Float64s, num_clients: int) -> Ring:
    """Convert numbers to fixed point modulo 2⁶⁴.

    Raises
    ------
    WireError
        If the sum over ``num_clients`` such numbers could overflow.
    """
    steps = np.rint(values * SCALE)
    if not np.isfinite(steps).all() or np.abs(steps).max(initial=0) * num_clients >= LIMIT:
        raise WireError("an update too large to be summed; lower train.learning_rate")
    return steps.astype(np.int64).view(np.uint64)


def loose(total: Ring) -> Float64s:
    """Convert a sum of fixed-point numbers to floating point."""
    return np.asarray(total.view(np.int64).astype(np.float64) / SCALE)


def agreed(own: X25519PrivateKey, other: bytes, *purpose: object) -> bytes:
    """Return the 32-byte secret that two clients share for one purpose."""
    shared = own.exchange(X25519PublicKey.from_public_bytes(other))
    info = "/".join(map(str, purpose)).encode()
    return HKDF(hashes.SHA256(), LENGTH, salt=b"fedrouter", info=info).derive(shared)


def stream(seed: bytes, size: int) -> Ring:
    """Return ``size`` pseudorandom 64-bit numbers, by ChaCha20 with ``seed`` as its key."""
    encryptor = Cipher(algorithms.ChaCha20(seed, bytes(16)), mode=None).encryptor()
    return np.frombuffer(encryptor.update(bytes(8 * size)), dtype=np.uint64)


def pair_mask(
    own: X25519PrivateKey, me: str, other: str, other_key: bytes, size: int, *purpose: object
) -> Ring:
    """Return the mask that ``me`` adds for ``other``: minus the one that ``other`` adds for ``me``."""
    mask = stream(agreed(own, other_key, "mask", *purpose), size)
    return mask if me < other else np.uint64(0) - mask


def shut(key: bytes, content: bytes) -> bytes:
    """Encrypt with a key that is used only once."""
    return ChaCha20Poly1305(key).encrypt(bytes(12), content, None)


def unshut(key: bytes, content: bytes) -> bytes:
    """Decrypt the output of ``shut``.

    Raises
    ------
    WireError
        If it was changed or encrypted with another key.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), content, None)
    except InvalidTag as error:
        raise WireError("a share that cannot be decrypted: changed, or meant for another client") from error


def threshold(num: int) -> int:
    """Return how many clients it takes to open a secret: more than half, so no two disjoint groups can."""
    return num // 2 + 1


def shared(secret: bytes, names: Sequence[str], threshold: int) -> dict[str, bytes]:
    """Split a 32-byte secret into shares, of which ``threshold`` restore it (Shamir 1979).

    Fewer shares reveal nothing. The polynomial is evaluated at each name's position in ``names``, so all
    sides must use the same order.
    """
    numbers = [int.from_bytes(secret), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    shares = {}
    for x, name in enumerate(names, start=1):
        value = 0
        for number in reversed(numbers):
            value = (value * x + number) % PRIME
        shares[name] = value.to_bytes(66)
    return shares


def restored(shares: Mapping[str, bytes], names: Sequence[str], threshold: int) -> bytes:
    """Restore a secret from its shares.

    Raises
    ------
    WireError
        If there are too few shares, or they do not belong to one secret.
    """
    places = {name: x for x, name in enumerate(names, start=1)}
    known = sorted(name for name in shares if name in places)[:threshold]
    points = [(places[name], int.from_bytes(shares[name])) for name in known]
    if len(points) < threshold:
        raise WireError(f"{len(points)} shares of a secret, but {threshold} are needed")
    secret = 0
    for x, value in points:
        top = bottom = 1
        for other, _ in points:
            if other != x:
                top, bottom = top * other % PRIME, bottom * (other - x) % PRIME
        secret = (secret + value * top * pow(bottom, -1, PRIME)) % PRIME
    if secret >= 2 ** (8 * LENGTH):
        raise WireError("shares that do not belong to one secret")
    return secret.to_bytes(LENGTH)
