"""A federation's directory on the server's machine: settings, roster, certificates and superlink."""

import ipaddress
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from fedrouter.config_file import fitted, read_toml
from fedrouter.errors import ConfigError
from fedrouter.files import check_directory, write_atomically
from fedrouter.train.flower.certificates import make_trial
from fedrouter.train.flower.environment import SIDECAR, program, run
from fedrouter.train.server.remote import Waiting
from fedrouter.train.wire.keys import PublicKey, load_public, public_text
from fedrouter.types import A_NAME, is_label

CONNECTION = "fedrouter"  # name of the superlink in Flower's configuration

TEMPLATE = """\
# A federation: its clients, and how long the server waits for them.
host = {host}  # name or address at which sites reach this machine
listen = {listen}  # address that the superlink binds to; 0.0.0.0: all of this machine's
fleet_port = {fleet_port}  # sites connect to this port
control_port = {control_port}  # used on this machine only
float16 = false  # true: send adapters as float16, with half the bytes and weights rounded to 11 bits
secure_sum = false  # true: the server sees only sums of updates, never one site's (docs/federation.md)

[waiting]
start_s = 600.0  # for all clients below to connect
least_clients = 2  # minimum number of clients to start without the others
exchange_s = 600.0  # for replies before the rounds
round_s = 3600.0  # for the updates of a round; a later client is left out of the round
absent_s = 30.0  # for a disconnected client to come back
least_replies = 1  # minimum number of clients that send updates in a round, or the run stops

[clients]  # name = the line in the site's site.pub; remove a line to revoke a key
"""


def _host(text: str) -> str:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        if not re.fullmatch(r"(?=.{1,253}$)[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63})*\.?", text):
            raise ValueError(
                f"{text!r}: expected a host name or an address, without https:// and port; "
                "write a name with other letters as xn--…"
            ) from None
    return text


Host = Annotated[str, AfterValidator(_host)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WaitingSettings(_Section):
    """The server's timeouts and minimum numbers of clients; ``TEMPLATE`` describes each."""

    start_s: float = Field(600.0, gt=0)
    least_clients: int = Field(2, ge=1)
    exchange_s: float = Field(600.0, gt=0)
    round_s: float = Field(3600.0, gt=0)
    absent_s: float = Field(30.0, ge=0)
    least_replies: int = Field(1, ge=1)


class FederationSettings(_Section):
    """``federation.toml``."""

    host: Host = "127.0.0.1"
    listen: Host = "127.0.0.1"
    fleet_port: int = Field(9092, ge=1, le=65535)
    control_port: int = Field(9093, ge=1, le=65535)
    float16: bool = False
    secure_sum: bool = False
    waiting: WaitingSettings = Field(default_factory=WaitingSettings)
    clients: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _ports_differ(self) -> "FederationSettings":
        if self.fleet_port == self.control_port:
            raise ValueError(f"fleet_port and control_port are both {self.fleet_port}; choose two ports")
        return self


@dataclass(frozen=True, slots=True)
class Directory:
    """A federation's directory."""

    path: Path
    settings: FederationSettings

    @property
    def home(self) -> Path:
        """The directory of Flower's own files."""
        return self.path / "flower"

    @property
    def waiting(self) -> Waiting:
        """The server's timeouts and minimum numbers of clients."""
        return Waiting(**self.settings.waiting.model_dump())

    def roster(self) -> dict[str, PublicKey]:
        """Return each client's public key.

        Raises
        ------
        ConfigError
            If there are no clients, or a name or key is invalid.
        """
        if not self.settings.clients:
            raise ConfigError(f"{self.path / 'federation.toml'}: no clients; add each site's public key")
        found = {}
        for name, text in self.settings.clients.items():
            if not is_label(name):
                raise ConfigError(f"client {name!r}: {A_NAME}")
            try:
                found[name] = load_public(text)
            except ConfigError as error:
                raise ConfigError(f"{self.path / 'federation.toml'}: client {name}: {error}") from error
        owner: dict[str, str] = {}
        for name, key in found.items():
            if (other := owner.setdefault(public_text(key), name)) != name:
                raise ConfigError(
                    f"{self.path / 'federation.toml'}: clients {other} and {name} have the same key; "
                    "each site has its own: remove one of them"
                )
        return found

    def superlink(self) -> list[str]:
        """Return the command that starts the superlink."""
        directory, settings = self.path.resolve(), self.settings
        return [
            program("flower-superlink"),
            "--ssl-ca-certfile",
            str(directory / "ca.crt"),
            "--ssl-certfile",
            str(directory / "server.crt"),
            "--ssl-keyfile",
            str(directory / "server.key"),
            "--enable-supernode-auth",
            "--database",
            str(directory / "flower" / "superlink.db"),
            "--fleet-api-address",
            f"[{settings.listen}]:{settings.fleet_port}"
            if ":" in settings.listen
            else f"{settings.listen}:{settings.fleet_port}",
            "--host",
            "127.0.0.1",
            "--port",
            str(settings.control_port),
            "--disable-runtime-dependency-installation",
        ]


def make_directory(path: Path, host: str, fleet_port: int, control_port: int) -> Directory:
    """Create a federation's directory, with a trial CA.

    Raises
    ------
    ConfigError
        If it exists already, or an argument is invalid.
    """
    if (path / "federation.toml").exists():
        raise ConfigError(f"{path} holds a federation already")
    given = {"host": host, "fleet_port": fleet_port, "control_port": control_port}
    fitted(given, FederationSettings, "a new federation")
    check_directory(path, "the federation's directory")
    (path / "flower").mkdir(parents=True, exist_ok=True)
    make_trial(path, list(dict.fromkeys([host, "127.0.0.1", "localhost"])))
    # A public name need not be an address of this machine: it may be a router's.
    listen = host if _is_loopback(host) else "0.0.0.0"  # noqa: S104 - sites are elsewhere; TLS and keys
    text = TEMPLATE.format(
        host=json.dumps(host),
        listen=json.dumps(listen),
        fleet_port=fleet_port,
        control_port=control_port,
    )
    write_atomically(path / "federation.toml", text)
    return load_directory(path)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.rstrip(".").lower() == "localhost"


def load_directory(path: Path) -> Directory:
    """Read a federation's directory.

    Raises
    ------
    ConfigError
        If it is not a federation's directory, or its settings are invalid.
    """
    file = path / "federation.toml"
    command = shlex.join(["fedrouter", "federation", "init", str(path)])
    missing = f"{path} is not a federation's directory: run {command}"
    settings = fitted(read_toml(file, missing=missing), FederationSettings, str(file))
    for name in ("ca.crt", "server.crt", "server.key"):
        if not (path / name).is_file():
            raise ConfigError(f"{path / name} is missing; restore it, or create another federation")
    directory = Directory(path, settings)
    connection = (
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        f'address = "127.0.0.1:{settings.control_port}"\n'
        f"root-certificates = {json.dumps(str((path / 'ca.crt').resolve()))}\n"
    )
    directory.home.mkdir(parents=True, exist_ok=True)
    write_atomically(directory.home / "config.toml", connection)
    return directory


def nodes(directory: Directory, *, change: bool = False) -> dict[str, dict[str, str]]:
    """Return the superlink's record of each node by public key: id, status, times.

    Parameters
    ----------
    change : first register the keys of the roster with the superlink, and unregister all others.

    Raises
    ------
    ConfigError
        If the superlink does not answer.
    """
    wanted = {public_text(key): name for name, key in directory.roster().items()}
    command = [program("python"), str(SIDECAR / "roster.py"), CONNECTION]
    printed = run(command, directory.home, json.dumps(wanted if change else None))
    found = json.loads(printed.splitlines()[-1])
    return {node["key"]: node for node in found}
