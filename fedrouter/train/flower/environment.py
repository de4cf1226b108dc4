"""Flower's Python environment: pinned, and separate because its packages conflict with FastAPI and vLLM."""

import ctypes
import os
import signal
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from fedrouter.errors import ConfigError

VERSION = "1.38.0"
HERE = "FEDROUTER_FLOWER"  # environment variable with the environment's directory
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
SIDECAR = Path(__file__).with_name("sidecar")
PR_SET_PDEATHSIG = 1


def place() -> Path:
    """Return the directory of the environment, which may not exist yet."""
    if os.environ.get(HERE):
        return Path(os.environ[HERE])
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "fedrouter" / f"flower-{VERSION}"


def setup() -> Path:
    """Create the environment unless it is complete; return its directory.

    Raises
    ------
    ConfigError
        If a package cannot be installed.
    """
    directory = place()
    done = directory / f".flwr-{VERSION}"
    if done.exists():
        return directory
    venv.create(directory, with_pip=True, clear=True)
    install = [str(directory / "bin" / "python"), "-m", "pip", "install", "-q", "-r", str(REQUIREMENTS)]
    finished = subprocess.run(install, capture_output=True, text=True)
    if finished.returncode:
        lines = [line for line in finished.stderr.splitlines() if line.startswith("ERROR")]
        raise ConfigError(f"Flower {VERSION} cannot be installed into {directory}: {' '.join(lines)[:300]}")
    done.touch()
    return directory


def program(name: str) -> str:
    """Return the path of a program in the environment.

    Raises
    ------
    ConfigError
        If the environment is not set up.
    """
    directory = place()
    if not (directory / f".flwr-{VERSION}").exists():
        raise ConfigError(f"Flower is not set up in {directory}: run fedrouter federation setup")
    return str(directory / "bin" / name)


def variables(home: Path) -> dict[str, str]:
    """Return the environment variables for Flower's processes."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return {
        **kept,
        "PATH": f"{place() / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}",
        "FLWR_HOME": str(home.resolve()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
        "PYTHONUNBUFFERED": "1",
    }


def start(command: Sequence[str], home: Path, log: IO[str]) -> subprocess.Popen[str]:
    """Start a process in the environment; it ends when this process ends, for whatever reason."""
    return subprocess.Popen(
        command,
        env=variables(home),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        text=True,
        start_new_session=True,
        preexec_fn=_die_with_parent,
    )


def stop(process: subprocess.Popen[str], grace_s: float = 10.0) -> None:
    """End a process and all its child processes."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(grace_s)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def run(command: Sequence[str], home: Path, text: str = "") -> str:
    """Run a program of the environment with ``text`` as its input; return its output.

    Raises
    ------
    ConfigError
        If it fails.
    """
    finished = subprocess.run(command, env=variables(home), input=text, capture_output=True, text=True)
    if finished.returncode:
        lines = [line for line in finished.stderr.splitlines() if line.strip()]
        raise ConfigError(
            f"the superlink does not answer: {lines[-1][:300] if lines else 'no error message'}"
        )
    return finished.stdout


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
