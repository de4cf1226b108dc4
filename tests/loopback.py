"""A transport without a network: each node answers immediately."""

from collections.abc import Callable, Collection
from pathlib import Path

from rich.console import Console

from fedrouter.train.client.resident import Resident
from fedrouter.train.client.site import Policy, Site, SiteSettings
from fedrouter.train.federate import opened_client
from fedrouter.train.server.remote import Arrived
from fedrouter.train.wire.keys import PublicKey, new_key

Answer = Callable[[bytes], bytes]


class Loopback:
    """Nodes are functions bytes → bytes; a node that is None receives messages and never answers."""

    def __init__(self, nodes: dict[str, Answer | None]):
        self.here = nodes
        self.arrived: list[Arrived] = []
        self.sent: list[tuple[str, bytes]] = []
        self.now = 0.0

    def nodes(self) -> Collection[str]:
        return list(self.here)

    def send(self, node: str, body: bytes) -> None:
        self.sent.append((node, body))
        if (answer := self.here[node]) is not None:
            self.arrived.append(Arrived(node, answer(body)))

    def receive(self, timeout_s: float) -> Arrived | None:
        if self.arrived:
            return self.arrived.pop(0)
        self.now += timeout_s
        return None

    def clock(self) -> float:
        """Return a time that only passes while the server waits for missing answers."""
        return self.now


def site(directory: Path, name: str, data: Path, **policy: object) -> tuple[Site, PublicKey]:
    """A site's directory with a key pair."""
    made = Site(directory / name, SiteSettings(name=name, data=str(data), policy=Policy(**policy)))
    return made, new_key(made.key).public_key()


def resident(made: Site) -> Resident:
    console = Console(quiet=True)
    return Resident(made, lambda config, secret: opened_client(made, config, secret, console), console)
