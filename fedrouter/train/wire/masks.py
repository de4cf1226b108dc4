"""Numbers that hide in a sum: fixed point, masks that cancel, and secrets that a group holds in shares.

The protocol is that of Bonawitz et al. 2017 ("Practical Secure Aggregation for Privacy-Preserving Machine
Learning"): X25519 agrees on a secret for each pair, HKDF and ChaCha20 stretch it into a mask that one adds
and the other subtracts. Each also adds a mask of its own; the others open it once its sum has arrived.
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

SCALE = 2.0**28  # steps of a fixed-point number: sums are exact to half of it a client
LIMIT = 2.0**62  # of a whole sum, in such steps
PRIME = 2**521 - 1  # Shamir's field: holds any 32 bytes
LENGTH = 32

Ring = NDArray[np.uint64]
Bytes = NDArray[np.uint8]


def as_array(content: bytes) -> Bytes:
    """Return bytes as the wire carries them."""
    return np.frombuffer(content, dtype=np.uint8).copy()


def fixed(values: Float64s, num_clients: int) -> Ring:
    """Return numbers as fixed point modulo 2⁶⁴.

    Raises
    ------
    WireError
        If so many clients' sum of them could overflow.
    """
    steps = np.rint(values * SCALE)
    if not np.isfinite(steps).all() or np.abs(steps).max(initial=0) * num_clients >= LIMIT:
        raise WireError("an update too large to be summed; lower train.learning_rate")
    return steps.astype(np.int64).view(np.uint64)


def loose(total: Ring) -> Float64s:
    """Return the numbers that a sum of fixed-point ones stands for."""
    return np.asarray(total.view(np.int64).astype(np.float64) / SCALE)


def agreed(own: X25519PrivateKey, other: bytes, *what: object) -> bytes:
    """Return 32 bytes that two sides alone have, for one purpose."""
    shared = own.exchange(X25519PublicKey.from_public_bytes(other))
    info = "/".join(map(str, what)).encode()
    return HKDF(hashes.SHA256(), LENGTH, salt=b"fedrouter", info=info).derive(shared)


def stream(seed: bytes, size: int) -> Ring:
    """Return ``size`` numbers that only who knows the seed can tell from random ones."""
    encryptor = Cipher(algorithms.ChaCha20(seed, bytes(16)), mode=None).encryptor()
    return np.frombuffer(encryptor.update(bytes(8 * size)), dtype=np.uint64)


def pair_mask(own: X25519PrivateKey, me: str, other: str, other_key: bytes, size: int, *what: object) -> Ring:
    """Return what ``me`` adds for ``other``: what that one adds for ``me``, with the other sign."""
    mask = stream(agreed(own, other_key, "mask", *what), size)
    return mask if me < other else np.uint64(0) - mask


def shut(key: bytes, content: bytes) -> bytes:
    """Encrypt under a key that is used once."""
    return ChaCha20Poly1305(key).encrypt(bytes(12), content, None)


def unshut(key: bytes, content: bytes) -> bytes:
    """Decrypt what ``shut`` has encrypted.

    Raises
    ------
    WireError
        If it was changed, or is another's.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), content, None)
    except InvalidTag as error:
        raise WireError("a share that was changed on its way") from error


def threshold(num: int) -> int:
    """Return how many of a sum's clients open a secret: more than half, so that no two groups of them can."""
    return num // 2 + 1


def shared(secret: bytes, names: Sequence[str], threshold: int) -> dict[str, bytes]:
    """Cut 32 secret bytes into shares; ``threshold`` of them give it back, fewer say nothing (Shamir 1979).

    A name's place in ``names`` is where the polynomial is evaluated: all sides keep the order.
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
    """Return the secret that shares give.

    Raises
    ------
    WireError
        If they are too few, or not of one secret.
    """
    places = {name: x for x, name in enumerate(names, start=1)}
    points = [(places[name], int.from_bytes(share)) for name, share in sorted(shares.items())][:threshold]
    if len(points) < threshold:
        raise WireError(f"{len(points)} shares of a secret, and it takes {threshold}")
    secret = 0
    for x, value in points:
        top = bottom = 1
        for other, _ in points:
            if other != x:
                top, bottom = top * other % PRIME, bottom * (other - x) % PRIME
        secret = (secret + value * top * pow(bottom, -1, PRIME)) % PRIME
    if secret >= 2 ** (8 * LENGTH):
        raise WireError("shares that are not of one secret")
    return secret.to_bytes(LENGTH)
