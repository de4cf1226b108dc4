"""The ``Transport`` over Flower, whose server app runs in its own environment."""

import queue
import socket
import subprocess
import tempfile
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from fedrouter.errors import TrainingError
from fedrouter.train.flower.environment import SIDECAR, program, start, stop
from fedrouter.train.flower.federation import CONNECTION, Directory
from fedrouter.train.flower.sidecar import link
from fedrouter.train.server.remote import Arrived

CONNECT_S = 90.0  # for the superlink to start the server app


class FlowerTransport:
    """A ``Transport`` over the socket that Flower's server app connects to."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._arrived: queue.SimpleQueue[Arrived] = queue.SimpleQueue()
        self._nodes: tuple[str, ...] = ()
        self._lost = False
        threading.Thread(target=self._read, daemon=True).start()

    def nodes(self) -> Collection[str]:
        """Return the nodes that are connected now.

        Raises
        ------
        TrainingError
            If the connection to Flower's server app is lost.
        """
        if self._lost:
            raise TrainingError(
                "the connection to the superlink was lost; start it again, then run the same command to "
                "resume after the last finished round"
            )
        return self._nodes

    def send(self, node: str, body: bytes) -> None:
        """Send a message without waiting for a reply."""
        try:
            link.send(self._connection, {"node": node}, body)
        except OSError:
            self._lost = True

    def receive(self, timeout_s: float) -> Arrived | None:
        """Return the next reply, or None after the timeout."""
        try:
            return self._arrived.get(timeout=max(timeout_s, 0.0))
        except queue.Empty:
            return None

    def _read(self) -> None:
        try:
            while True:
                head, body = link.receive(self._connection)
                if head["what"] == "nodes":
                    self._nodes = tuple(head["nodes"])
                else:
                    self._arrived.put(Arrived(head["node"], body, head["error"]))
        except (EOFError, OSError):
            self._lost = True


@contextmanager
def connected(directory: Directory) -> Iterator[FlowerTransport]:
    """Have the superlink start Flower's server app; yield a transport, and close its connection at the end.

    Raises
    ------
    ConfigError, TrainingError
        If Flower is not set up, or the superlink does not start the server app.
    """
    with (
        tempfile.TemporaryDirectory(prefix="fedrouter-") as scratch,
        socket.socket(socket.AF_UNIX) as listener,
    ):
        path = Path(scratch) / "server.sock"
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(1)
        listener.settimeout(CONNECT_S)
        log = directory.path / "run.log"
        command = [program("flwr"), "run", str(SIDECAR), CONNECTION, "--run-config", f'socket="{path}"']
        with log.open("a", encoding="utf-8") as file:
            submitted = start(command, directory.home, file)
            try:
                connection, _ = listener.accept()
            except TimeoutError as error:
                raise TrainingError(
                    f"the superlink did not start the server app within {CONNECT_S:.0f} s; see {log}"
                ) from error
            finally:
                try:
                    submitted.wait(20)
                except subprocess.TimeoutExpired:
                    stop(submitted)
            with connection:
                connection.settimeout(None)
                yield FlowerTransport(connection)
