"""Whose message it is: a site signs what it sends with the key that it alone has.

One elliptic-curve key (P-384) a site: the transport authenticates its connection with it, and every reply
carries a signature by it, so that a name stands for a key whatever the transport is.
"""

from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedrouter.errors import ConfigError, WireError
from fedrouter.files import write_atomically

MAGIC = b"FRS1"
DOMAIN = b"fedrouter reply\0"  # so that no signature of the transport's is one of ours
SUM_DOMAIN = b"fedrouter sum\0"
MAX_NAME = 800  # bytes of a client's name

PrivateKey = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey


def new_key(path: Path) -> PrivateKey:
    """Make a key pair; write the private half for the owner alone, the public one beside it.

    Raises
    ------
    ConfigError
        If there is a key already: whoever knows it as this site's would not know the new one.
    """
    if path.exists():
        raise ConfigError(f"{path} exists already; a site keeps its key")
    key = ec.generate_private_key(ec.SECP384R1())
    path.parent.mkdir(parents=True, exist_ok=True)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    write_atomically(path, private, mode=0o600)
    write_atomically(path.with_suffix(".pub"), public_text(key.public_key()) + "\n")
    return key


def load_private(path: Path) -> PrivateKey:
    """Read a site's key.

    Raises
    ------
    ConfigError
        If it is missing or none.
    """
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: no private key that can be read; fedrouter client init makes one"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path}: not an elliptic-curve key; fedrouter client init makes one")
    return key


def load_public(text: str) -> PublicKey:
    """Return the key that a line of OpenSSH's public form holds.

    Raises
    ------
    ConfigError
        If it holds none.
    """
    try:
        key = serialization.load_ssh_public_key(text.encode())
    except (ValueError, UnicodeEncodeError) as error:
        raise ConfigError("no public key: expected the line of a .pub file") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError("a public key of another kind than fedrouter client init makes")
    return key


def public_text(key: PublicKey) -> str:
    """Return a public key as one line."""
    form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    return key.public_bytes(*form).decode()


def sign(key: PrivateKey, name: str, body: bytes) -> bytes:
    """Return a reply with the name and the signature of whoever sends it."""
    encoded = name.encode()
    signature = key.sign(DOMAIN + encoded + b"\0" + body, ec.ECDSA(hashes.SHA256()))
    sizes = len(encoded).to_bytes(2, "big") + len(signature).to_bytes(2, "big")
    return MAGIC + sizes + encoded + signature + body


def sign_keys(key: PrivateKey, keys: bytes) -> bytes:
    """Sign the keys of one sum."""
    return key.sign(SUM_DOMAIN + keys, ec.ECDSA(hashes.SHA256()))


def verify_keys(key: PublicKey, keys: bytes, signature: bytes) -> None:
    """Check that the owner of ``key`` has made the keys of one sum.

    Raises
    ------
    WireError
        If not.
    """
    try:
        key.verify(signature, SUM_DOMAIN + keys, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature as error:
        raise WireError("keys for a sum that are not signed by their owner") from error


def claimed(signed: bytes) -> tuple[str, bytes, bytes]:
    """Return the name that a signed reply claims, its signature and its body; nothing is verified yet.

    Raises
    ------
    WireError
        If it is no signed reply.
    """
    name_end = 8 + int.from_bytes(signed[4:6], "big")
    end = name_end + int.from_bytes(signed[6:8], "big")
    if signed[:4] != MAGIC or name_end > 8 + MAX_NAME or len(signed) < end:
        raise WireError("a reply without a signature")
    try:
        return signed[8:name_end].decode(), signed[name_end:end], signed[end:]
    except UnicodeDecodeError as error:
        raise WireError("a reply without a name") from error


def verify(key: PublicKey, name: str, signature: bytes, body: bytes) -> None:
    """Check that the owner of ``key`` has signed ``body`` under ``name``.

    Raises
    ------
    WireError
        If not.
    """
    try:
        key.verify(signature, DOMAIN + name.encode() + b"\0" + body, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature as error:
        raise WireError(f"a reply as client {name!r} that is not signed with its key") from error
