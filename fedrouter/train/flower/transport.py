"""Bytes to and from nodes, through Flower's server part in its own environment."""

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

CONNECT_S = 90.0  # for the superlink to start the server part


class FlowerTransport:
    """A ``Transport`` over the socket that Flower's server part is connected to."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._arrived: queue.SimpleQueue[Arrived] = queue.SimpleQueue()
        self._nodes: tuple[str, ...] = ()
        self._gone = False
        threading.Thread(target=self._read, daemon=True).start()

    def nodes(self) -> Collection[str]:
        """Return the nodes that can be reached now.

        Raises
        ------
        TrainingError
            If Flower's server part is gone.
        """
        if self._gone:
            raise TrainingError(
                "the superlink is gone; start it again, and the same command goes on from the last round"
            )
        return self._nodes

    def send(self, node: str, body: bytes) -> None:
        """Send a message; it does not wait."""
        try:
            link.send(self._connection, {"node": node}, body)
        except OSError:
            self._gone = True

    def receive(self, timeout_s: float) -> Arrived | None:
        """Return the next reply, or None where none came in time."""
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
            self._gone = True


@contextmanager
def connected(directory: Directory) -> Iterator[FlowerTransport]:
    """Have the superlink start Flower's server part; yield the transport, and end it afterwards.

    Raises
    ------
    ConfigError, TrainingError
        If the superlink does not answer or does not start it.
    """
    with tempfile.TemporaryDirectory(prefix="fedrouter-") as scratch, socket.socket(socket.AF_UNIX) as door:
        path = Path(scratch) / "server.sock"
        door.bind(str(path))
        path.chmod(0o600)
        door.listen(1)
        door.settimeout(CONNECT_S)
        log = directory.path / "run.log"
        command = [program("flwr"), "run", str(SIDECAR), CONNECTION, "--run-config", f'socket="{path}"']
        with log.open("a", encoding="utf-8") as file:
            submitted = start(command, directory.home, file)
            try:
                connection, _ = door.accept()
            except TimeoutError as error:
                raise TrainingError(
                    f"the superlink did not start the server part within {CONNECT_S:.0f} s; {log} says more"
                ) from error
            finally:
                try:
                    submitted.wait(20)
                except subprocess.TimeoutExpired:
                    stop(submitted)
            with connection:
                connection.settimeout(None)
                yield FlowerTransport(connection)
