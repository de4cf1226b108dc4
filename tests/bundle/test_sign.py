"""Signatures are made, checked, and checked again on a reload."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import tamper
from fakes import space, write

from fedrouter.bundle import Bundle, load_bundle, sign_bundle
from fedrouter.errors import BundleError, ConfigError


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write(tmp_path / "bundle", space(np.eye(8)[:2]), [0.5, 0.5])


def make_keys(path: Path, kind: str = "ed25519") -> tuple[Path, Path]:
    """Make a key pair as documented."""
    private, public = path / f"{kind}.pem", path / f"{kind}.pub"
    subprocess.run(["openssl", "genpkey", "-algorithm", kind, "-out", str(private)], check=True)
    subprocess.run(["openssl", "pkey", "-in", str(private), "-pubout", "-out", str(public)], check=True)
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_keys(tmp_path_factory.mktemp("keys"))


def test_a_signed_bundle_is_its_owners(bundle: Bundle, keys: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = keys
    load_bundle(bundle.path)
    with pytest.raises(BundleError, match="not signed"):
        load_bundle(bundle.path, public)
    signature = sign_bundle(bundle.path, private)
    assert load_bundle(bundle.path, public).clusters == bundle.clusters
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(public), "-rawin"]
    command += ["-in", str(bundle.path / "manifest.json"), "-sigfile", str(signature)]
    assert subprocess.run(command, capture_output=True).returncode == 0, (
        "nothing of ours is needed to check it"
    )
    other = make_keys(tmp_path)[0]
    sign_bundle(bundle.path, other)
    with pytest.raises(BundleError, match="signature is not by"):
        load_bundle(bundle.path, public)


def test_whoever_changes_it_needs_the_key(bundle: Bundle, keys: tuple[Path, Path]) -> None:
    private, public = keys
    sign_bundle(bundle.path, private)
    tamper.edit(bundle.path, "clusters", 0, "radius", to=1e9)
    load_bundle(bundle.path)
    with pytest.raises(BundleError, match="signature is not by"):
        load_bundle(bundle.path, public)


@pytest.mark.parametrize("content", [b"", bytes(64), bytes(65), b"x"])
def test_what_is_no_signature(bundle: Bundle, keys: tuple[Path, Path], content: bytes) -> None:
    (bundle.path / "manifest.sig").write_bytes(content)
    with pytest.raises(BundleError) as caught:
        load_bundle(bundle.path, keys[1])
    assert str(caught.value).isprintable()


def test_a_planted_link_is_not_written_through(bundle: Bundle, keys: tuple[Path, Path]) -> None:
    victim = bundle.path / "README.md"
    text = victim.read_text()
    (bundle.path / ".manifest.sig.partial").symlink_to("README.md")
    sign_bundle(bundle.path, keys[0])
    assert victim.read_text() == text
    load_bundle(bundle.path, keys[1])


def test_what_is_no_key(bundle: Bundle, keys: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = keys
    for key in (public, tmp_path / "none", tmp_path, *make_keys(tmp_path, "x25519")):
        with pytest.raises(ConfigError, match="not a readable private Ed25519 key"):
            sign_bundle(bundle.path, key)
    sign_bundle(bundle.path, private)
    for key in (private, tmp_path / "none", tmp_path, *make_keys(tmp_path, "x25519")):
        with pytest.raises(ConfigError, match="not a readable public Ed25519 key"):
            load_bundle(bundle.path, key)
