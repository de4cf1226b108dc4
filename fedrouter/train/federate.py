"""A run whose clients are on other machines, reached through any ``Transport``."""

import json
import secrets
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from fedrouter.bundle import Bundle
from fedrouter.config import Config
from fedrouter.errors import ConfigError
from fedrouter.files import check_directory, read_json, write_atomically
from fedrouter.models import resolve_base
from fedrouter.train.check import check_settings, tokenised
from fedrouter.train.client.site import Site
from fedrouter.train.local import LocalFederation, each
from fedrouter.train.machine import check_machine
from fedrouter.train.memory import explained_out_of_memory
from fedrouter.train.run import federation_of, finished, refuse_another_run, run
from fedrouter.train.server.left_out import LeftOut
from fedrouter.train.server.remote import OnAnswer, RemoteFederation, Transport, Waiting
from fedrouter.train.session import Session
from fedrouter.train.wire.keys import PublicKey
from fedrouter.train.wire.messages import Hello
from fedrouter.types import Array, Record

RUN_ID = "federation.json"  # in the run's directory; holds the run's id in messages


@explained_out_of_memory()
def train_remote(
    config: Config,
    out: Path,
    console: Console,
    transport: Transport,
    roster: Mapping[str, PublicKey],
    waiting: Waiting,
    *,
    half: bool = False,
    secure: bool = False,
    on_answer: OnAnswer = lambda _client, _rows, _what: None,
) -> Bundle:
    """Train with the clients that ``transport`` reaches; otherwise like ``fedrouter.train.run.train``.

    Parameters
    ----------
    config : ``data.clients`` names the clients of the roster; their data sources are ignored.
    half : send adapters as float16.
    secure : sum updates so that the server never sees a single client's update.
    on_answer : called with each client that replies, its number of rows and the kind of request.

    Raises
    ------
    TrainingError
        If too few clients connect, or as in ``train``.
    """
    refuse_another_run(config, out)
    if (bundle := finished(out, console)) is not None:
        return bundle
    if secure:
        check_secure(config)
    check_directory(out, "--out")
    check_settings(config)
    session = Session(config, out, console)
    path = resolve_base(config.base.model, config.base.revision)
    session.load(tokenised(config, path, {}, session.say))
    session.load_trainer([])
    hello = Hello(plan(config), session.base.fingerprint, session.embedder.probe, half, secure)
    with session.unclaimed():
        left_out = LeftOut(out, sorted(roster), console, once=bool(config.privacy.centroid_noise))
        federation = RemoteFederation(transport, roster, _run_id(out), hello, waiting, session.say, on_answer)
        federation.leave([name for name in roster if name not in left_out.others])
        bundle = run(session, federation, left_out, b"")
        federation.goodbye("the run is finished")
        return bundle


def check_secure(config: Config) -> None:
    """Raise ConfigError if a setting needs the updates of single clients, which a secure sum hides."""
    aggregate = config.aggregate
    conflicts = {
        f"method {config.method}": config.method not in ("fedrouter", "fedavg", "fedprox", "oracle"),
        f"aggregate.method {aggregate.method}": aggregate.method != "average",
        f"aggregate.robust {aggregate.robust}": aggregate.robust != "none",
        "aggregate.clip (use privacy.clip_updates, which the sites apply)": aggregate.clip is not None,
        "lora.ranks": bool(config.lora.ranks),
    }
    if reasons := [setting for setting, conflicting in conflicts.items() if conflicting]:
        raise ConfigError(
            f"secure_sum hides single updates from the server, but {', '.join(reasons)} needs them; "
            "change the setting or set secure_sum = false"
        )
    if config.takes_turns:
        raise ConfigError(
            "secure_sum sums the sites that train a task cluster in the same round; "
            'set train.schedule to "all", so that all of them do'
        )


def plan(config: Config) -> str:
    """Return the settings to send to clients, as JSON.

    Raises
    ------
    ConfigError
        If a setting refers to a file on this machine.
    """
    template = config.base.chat_template
    if template not in (None, "alpaca"):
        raise ConfigError(
            f"base.chat_template {template}: clients do not have this file; put the template into the base's "
            "tokenizer"
        )
    return json.dumps(config.model_dump(mode="json", by_alias=True, exclude={"data"}))


def opened_client(
    site: Site, config: Config, secret: bytes, console: Console
) -> tuple[LocalFederation, str, Array]:
    """Load a site's base model and rows for the server's plan.

    Returns
    -------
    federation : with the site's client only.
    fingerprint : of the site's base model.
    probe : (3, d), the probe vectors of the site's embedder.

    Raises
    ------
    FedRouterError
        If a setting, a file or a row cannot be used, as in ``train``.
    """
    name = site.settings.name
    site.source()  # its error names site.toml; the reader's would name the working directory
    check_machine(config.base)
    session = Session(config, site.directory, console)
    rows = session.records(name, strip=not site.settings.policy.labels)
    path = resolve_base(config.base.model, config.base.revision)
    session.load(tokenised(config, path, {name: rows}, session.say))

    def read() -> list[Record]:
        return session.read_again(name, strip=not site.settings.policy.labels)

    (client,) = each([name], lambda name: session.client(name, rows, secret, read))
    session.load_trainer(rows)
    federation = federation_of(session, [client])
    return federation, session.base.fingerprint, session.embedder.probe


def _run_id(out: Path) -> str:
    """Return the run's id; create it for a new run."""
    file = out / RUN_ID
    if file.exists():
        return str(read_json(file)["run"])
    out.mkdir(parents=True, exist_ok=True)
    run_id = secrets.token_hex(8)
    write_atomically(file, json.dumps({"run": run_id}) + "\n")
    return run_id
