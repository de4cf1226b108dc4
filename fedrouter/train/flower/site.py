"""A site's processes: the resident client here, Flower's SuperNode and its executor beside it."""

import secrets
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from rich.console import Console

from fedrouter.files import write_atomically
from fedrouter.train.client.resident import Resident
from fedrouter.train.client.site import Site
from fedrouter.train.flower.environment import SIDECAR, program, start, stop
from fedrouter.train.flower.sidecar import link

LOOK_S = 0.2
RETRY_S = 3.0  # until Flower's part is started again: the server may not know the key yet


def listen(path: Path, answer: Callable[[bytes], bytes]) -> socket.socket:
    """Answer on a Unix socket, one request a connection; return the socket."""
    door = socket.socket(socket.AF_UNIX)
    door.bind(str(path))
    path.chmod(0o600)
    door.listen(8)

    def serve() -> None:
        while True:
            try:
                connection, _ = door.accept()
            except OSError:
                return
            with connection:
                try:
                    _, body = link.receive(connection)
                    link.send(connection, {}, answer(body))
                except (EOFError, OSError):
                    continue

    threading.Thread(target=serve, daemon=True).start()
    return door


def run_site(site: Site, resident: Resident, console: Console) -> None:
    """Take part in the federation until interrupted; start Flower's part again whenever it ends.

    Raises
    ------
    ConfigError
        If Flower is not set up.
    """
    home = site.directory / "flower"
    home.mkdir(exist_ok=True)
    signal.signal(signal.SIGTERM, _interrupt)

    def say(line: str) -> None:
        text = f"client {site.settings.name}: {line}"
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    say(f"takes part through {site.settings.server}; Flower's log is {home / 'site.log'}")
    with (
        tempfile.TemporaryDirectory(prefix="fedrouter-") as scratch,  # a socket's path must be short
        listen(Path(scratch) / "client.sock", resident.answer) as door,
    ):
        told = False
        while True:
            began = time.monotonic()
            _take_part(site, home, str(door.getsockname()))
            if not told or time.monotonic() - began > 60:
                say("Flower's part ended: the server may not know this site's key yet; it is started again")
                told = True
            time.sleep(RETRY_S)


def _take_part(site: Site, home: Path, resident: str) -> None:
    """Run Flower's part until one of its processes ends."""
    secret = home / "executor.secret"
    write_atomically(secret, secrets.token_hex(32), mode=0o600)
    port = str(_free_port())
    node = [program("python"), str(SIDECAR / "supernode.py")]
    node += ["--root-certificates", site.place(site.settings.ca)]
    node += ["--superlink", site.settings.server, "--auth-supernode-private-key", str(site.key.resolve())]
    node += ["--isolation", "process"]  # node.py in place of an executor: no code of the server's runs here
    node += ["--host", "127.0.0.1", "--port", port, "--superexec-auth-secret-file", str(secret.resolve())]
    executor = [program("python"), str(SIDECAR / "node.py"), f"127.0.0.1:{port}", str(secret.resolve())]
    with (home / "site.log").open("a", encoding="utf-8") as log:
        processes = [start(node, home, log)]
        try:
            processes.append(start([*executor, resident], home, log))
            while all(process.poll() is None for process in processes):
                time.sleep(LOOK_S)
        finally:
            for process in processes:
                stop(process)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
