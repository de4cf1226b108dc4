"""Site keys and signatures, which prove who sent a message.

Each site has one elliptic-curve key (P-384). The transport authenticates its connection with it, and every
reply is signed with it, so that a client's name is tied to its key with any transport.
"""

from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedrouter.errors import ConfigError, WireError, first_line
from fedrouter.files import write_atomically

MAGIC = b"FRS1"
DOMAIN = b"fedrouter reply\0"  # a signature made by the transport is never valid for a reply
SUM_DOMAIN = b"fedrouter sum\0"
MAX_NAME = 800  # bytes of a client's name

PrivateKey = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey


def new_key(path: Path) -> PrivateKey:
    """Create a key pair; write the private key, readable by its owner only, and the public key next to it.

    Raises
    ------
    ConfigError
        If there is a key already: the server and the other sites would not accept a new one.
    """
    if path.exists():
        raise ConfigError(f"{path} exists already; a site must keep its key")
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
        If the file is missing or holds no such key.
    """
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot read a private key; fedrouter client init creates one") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path}: not an elliptic-curve key; fedrouter client init creates one")
    return key


def load_public(text: str) -> PublicKey:
    """Read a public key from a line in OpenSSH's format.

    Raises
    ------
    ConfigError
        If it is not an elliptic-curve key in this format.
    """
    try:
        key = serialization.load_ssh_public_key(text.encode())
    except (ValueError, UnicodeEncodeError) as error:
        raise ConfigError("no public key: expected the line of a .pub file") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(
            "not an elliptic-curve public key; use the .pub file that fedrouter client init creates"
        )
    return key


def read_public(path: Path) -> PublicKey:
    """Read a site's ``site.pub``.

    Raises
    ------
    ConfigError
        If the file cannot be read, or holds no such key.
    """
    try:
        return load_public(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {first_line(error)}; restore it from a copy") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def public_text(key: PublicKey) -> str:
    """Return a public key as one line."""
    form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    return key.public_bytes(*form).decode()


def sign(key: PrivateKey, name: str, body: bytes) -> bytes:
    """Return a reply with its sender's name and signature in front."""
    encoded = name.encode()
    signature = key.sign(DOMAIN + encoded + b"\0" + body, ec.ECDSA(hashes.SHA256()))
    sizes = len(encoded).to_bytes(2, "big") + len(signature).to_bytes(2, "big")
    return MAGIC + sizes + encoded + signature + body


def sign_keys(key: PrivateKey, keys: bytes) -> bytes:
    """Sign the keys of one sum."""
    return key.sign(SUM_DOMAIN + keys, ec.ECDSA(hashes.SHA256()))


def verify_keys(key: PublicKey, keys: bytes, signature: bytes) -> None:
    """Check that the owner of ``key`` signed the keys of one sum.

    Raises
    ------
    WireError
        If the signature is invalid.
    """
    try:
        key.verify(signature, SUM_DOMAIN + keys, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature as error:
        raise WireError("keys for a sum that are not signed by their owner") from error


def claimed(signed: bytes) -> tuple[str, bytes, bytes]:
    """Return the name that a signed reply claims, its signature and its body, without verifying them.

    Raises
    ------
    WireError
        If it is not a signed reply.
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
    """Check that the owner of ``key`` signed ``body`` as ``name``.

    Raises
    ------
    WireError
        If the signature is invalid.
    """
    try:
        key.verify(signature, DOMAIN + name.encode() + b"\0" + body, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature as error:
        raise WireError(f"a reply as client {name!r} that is not signed with its key") from error
