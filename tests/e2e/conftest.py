"""One real vLLM for the whole session, started and stopped as a user does it: with ``fedrouter serve``."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import openai
import pytest
from processes import end, first_lines, group_of_children, running
from rich.console import Console

from fedrouter.bundle import Bundle
from fedrouter.config_file import load_config
from fedrouter.embed import load_embedder, routing_text
from fedrouter.models import resolve_base
from fedrouter.route import Router
from fedrouter.serve.checks import free_port
from fedrouter.train.run import train
from fedrouter.types import Decision, Turn

KEY_ENV, KEY = "FEDROUTER_TEST_KEY", "sesame-open"


@dataclass(frozen=True)
class Server:
    url: str
    key: str
    tenants: dict[str, str]  # API keys of the bundle's clients, by name
    bundle: Bundle
    ready: list[str]  # what ``fedrouter serve`` printed
    client: openai.OpenAI


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle really trained, briefly: four clients, four task clusters, the built-in base."""
    settings = [
        "data.num_clients=4",
        "data.num_per_task=60",
        "train.rounds=2",
        "train.steps=4",
        "cluster.global=4",
    ]
    return train(load_config(None, settings), tmp_path_factory.mktemp("small") / "run", Console(quiet=True))


@pytest.fixture(scope="session")
def server(small_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of ``small_bundle`` with one more adapter, "mine", an API key, and one for each client.

    It watches the link ``current`` beside the bundle.
    Stopping it is a test as well: SIGTERM must end everything it started, with exit code 0.
    """
    port, log = free_port(), tmp_path_factory.mktemp("server") / "server.log"
    clients = {client for cluster in small_bundle.clusters for client in cluster.clients}
    tenants = {client: f"key of {client}" for client in sorted(clients)}
    keys = log.with_name("keys.json")
    keys.write_text(json.dumps({hashlib.sha256(k.encode()).hexdigest(): c for c, k in tenants.items()}))
    mine = small_bundle.adapter_path(small_bundle.clusters[0])
    current = small_bundle.path.with_name("current")
    current.symlink_to(small_bundle.path.name)
    arguments = ["serve", str(current), "--watch", "--port", str(port), "--api-key-env", KEY_ENV]
    arguments += ["--keys-file", str(keys)]
    arguments += ["--adapter", f"mine={mine}", "--", "--disable-uvicorn-access-log"]
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "fedrouter", *arguments],
            env={**os.environ, KEY_ENV: KEY, "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    group: set[int] = set()
    try:
        ready = first_lines(process, 2)
        assert len(ready) == 2, f"exit code {process.poll()}; {log.read_text()[-3000:]}"
        group = group_of_children(process.pid)
        url = f"http://127.0.0.1:{port}"
        with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=120) as client:
            yield Server(url, KEY, tenants, small_bundle, ready, client)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert not group & running(), "fedrouter serve left processes behind"
    finally:
        end(process, group)


@pytest.fixture(scope="session")
def offline(small_bundle: Bundle) -> Callable[[str], Decision]:
    """What the router decides without a server."""
    base_path = resolve_base(small_bundle.base.model, small_bundle.base.revision)
    embedder = load_embedder(small_bundle.embedder, small_bundle.base, base_path)
    router = Router(small_bundle)
    return lambda text: router.route(embedder.embed([routing_text([Turn("user", text)])]))[0]
