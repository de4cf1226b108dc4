"""A site's processes: the resident client in this one, Flower's SuperNode and executor in child processes."""

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

from fedrouter.files import write_atomically, writing
from fedrouter.layout import print_line
from fedrouter.train.client.resident import Resident
from fedrouter.train.client.site import Site
from fedrouter.train.flower.environment import SIDECAR, program, start, stop
from fedrouter.train.flower.sidecar import link

POLL_S = 0.2  # between checks that Flower's processes still run
RETRY_S = 3.0  # before Flower is restarted: the server may not know the site's key yet


def listen(path: Path, answer: Callable[[bytes], bytes]) -> socket.socket:
    """Serve ``answer`` on a Unix socket in a thread, one request per connection; return the socket."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    path.chmod(0o600)
    listener.listen(8)

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                try:
                    _, body = link.receive(connection)
                    link.send(connection, {}, answer(body))
                except (EOFError, OSError):
                    continue

    threading.Thread(target=serve, daemon=True).start()
    return listener


def run_site(site: Site, resident: Resident, console: Console) -> None:
    """Take part in the federation until interrupted; restart Flower's processes when they end.

    Raises
    ------
    ConfigError
        If Flower is not set up, or its directory cannot be made.
    """
    home = site.directory / "flower"
    with writing(home):
        home.mkdir(exist_ok=True)
    signal.signal(signal.SIGTERM, _interrupt)

    def say(line: str) -> None:
        text = f"client {site.settings.name}: {line}"
        print_line(console, text)

    say(f"connecting to {site.settings.server}; Flower's log is {home / 'site.log'}")
    with (
        tempfile.TemporaryDirectory(prefix="fedrouter-") as scratch,  # the path of a socket must be short
        listen(Path(scratch) / "client.sock", resident.answer) as listener,
    ):
        reported = False
        while True:
            began = time.monotonic()
            _run_flower(site, home, str(listener.getsockname()))
            if not reported or time.monotonic() - began > 60:
                say("Flower ended; restarting it (the server may not know this site's key yet)")
                reported = True
            time.sleep(RETRY_S)


def _run_flower(site: Site, home: Path, resident: str) -> None:
    """Run Flower's processes until one of them ends."""
    secret = home / "executor.secret"
    write_atomically(secret, secrets.token_hex(32), mode=0o600)
    port = str(_free_port())
    node = [program("python"), str(SIDECAR / "supernode.py")]
    node += ["--root-certificates", site.place(site.settings.ca)]
    node += ["--superlink", site.settings.server, "--auth-supernode-private-key", str(site.key.resolve())]
    node += ["--isolation", "process"]  # node.py replaces the executor: no code from the server runs here
    node += ["--host", "127.0.0.1", "--port", port, "--superexec-auth-secret-file", str(secret.resolve())]
    executor = [program("python"), str(SIDECAR / "node.py"), f"127.0.0.1:{port}", str(secret.resolve())]
    with (home / "site.log").open("a", encoding="utf-8") as log:
        processes = [start(node, home, log)]
        try:
            processes.append(start([*executor, resident], home, log))
            while all(process.poll() is None for process in processes):
                time.sleep(POLL_S)
        finally:
            for process in processes:
                stop(process)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
