"""Whose bundle it is: an Ed25519 signature over the manifest, which holds a hash of everything else."""

from pathlib import Path

from fedrouter.bundle.files import read
from fedrouter.bundle.manifest import MANIFEST, MAX_MANIFEST
from fedrouter.errors import BundleError, ConfigError
from fedrouter.files import write_atomically

SIGNATURE = "manifest.sig"  # 64 bytes, as `openssl pkeyutl -verify -rawin` reads it
SIZE = 64


def sign_bundle(bundle: Path, key: Path) -> Path:
    """Write a bundle's signature into it, atomically, in place of another; return its path.

    Parameters
    ----------
    bundle : one that was loaded; what is signed is what lies there now.
    key : a private Ed25519 key, PEM without a passphrase.

    Raises
    ------
    ConfigError
        If ``key`` is none.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        private = load_pem_private_key(key.read_bytes(), password=None)
    except (OSError, TypeError, ValueError) as error:
        raise _no_key(key, "private") from error
    if not isinstance(private, Ed25519PrivateKey):
        raise _no_key(key, "private")
    signature = bundle / SIGNATURE
    write_atomically(signature, private.sign(read(bundle, MANIFEST, MAX_MANIFEST)))
    return signature


def check_signature(bundle: Path, manifest: bytes, key: Path) -> None:
    """Refuse a bundle whose manifest was not signed with the key that belongs to the public ``key``.

    Raises
    ------
    ConfigError
        If ``key`` is no public Ed25519 key in PEM.
    BundleError
        If there is no signature, or it is another's.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        public = load_pem_public_key(key.read_bytes())
    except (OSError, ValueError) as error:
        raise _no_key(key, "public") from error
    if not isinstance(public, Ed25519PublicKey):
        raise _no_key(key, "public")
    try:
        public.verify(read(bundle, SIGNATURE, SIZE), manifest)
    except BundleError as error:
        raise BundleError(f"{bundle}: not signed, and a signature by {key} is required: {error}") from error
    except InvalidSignature as error:
        raise BundleError(f"{bundle}: its signature is not by {key}; get it from its owner again") from error


def _no_key(key: Path, kind: str) -> ConfigError:
    return ConfigError(f"{key}: no {kind} Ed25519 key that can be read; expected PEM without a passphrase")
