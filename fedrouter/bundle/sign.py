"""Ed25519 signatures of bundles, over the manifest, which contains the hashes of all other files."""

from pathlib import Path

from fedrouter.bundle.files import read
from fedrouter.bundle.manifest import MANIFEST, MAX_MANIFEST
from fedrouter.errors import BundleError, ConfigError
from fedrouter.files import write_atomically

SIGNATURE = "manifest.sig"  # 64 bytes, as `openssl pkeyutl -verify -rawin` reads it
SIZE = 64


def sign_bundle(bundle: Path, key: Path) -> Path:
    """Write a bundle's signature into it atomically, replacing an existing one; return its path.

    Parameters
    ----------
    bundle : directory of a bundle that ``load_bundle`` has accepted.
    key : a private Ed25519 key, PEM without a passphrase.

    Raises
    ------
    ConfigError
        If ``key`` is not such a key.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        private = load_pem_private_key(key.read_bytes(), password=None)
    except (OSError, TypeError, ValueError) as error:
        raise _unusable(key, "private") from error
    if not isinstance(private, Ed25519PrivateKey):
        raise _unusable(key, "private")
    signature = bundle / SIGNATURE
    write_atomically(signature, private.sign(read(bundle, MANIFEST, MAX_MANIFEST)))
    return signature


def check_signature(bundle: Path, manifest: bytes, key: Path) -> None:
    """Refuse a bundle whose signature does not verify with the public ``key``.

    Raises
    ------
    ConfigError
        If ``key`` is not a public Ed25519 key in PEM.
    BundleError
        If there is no signature, or it was made with another key or of another manifest.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        public = load_pem_public_key(key.read_bytes())
    except (OSError, ValueError) as error:
        raise _unusable(key, "public") from error
    if not isinstance(public, Ed25519PublicKey):
        raise _unusable(key, "public")
    try:
        public.verify(read(bundle, SIGNATURE, SIZE), manifest)
    except BundleError as error:
        raise BundleError(f"{bundle}: not signed, but a signature by {key} is required: {error}") from error
    except InvalidSignature as error:
        raise BundleError(
            f"{bundle}: its signature is not by {key}; get the bundle from its owner again"
        ) from error


def _unusable(key: Path, kind: str) -> ConfigError:
    return ConfigError(f"{key}: not a readable {kind} Ed25519 key; expected PEM without a passphrase")
