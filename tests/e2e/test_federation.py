"""Many machines, as their operators run them: real processes over Flower, with TLS and keys."""

import json
import os
import subprocess
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from processes import START_S
from rich.console import Console
from sites import PLAN, Sites, federation, fedrouter, wait_for

from fedrouter.bundle import Bundle, load_bundle, read_weights
from fedrouter.config import Config
from fedrouter.train.flower.environment import setup
from fedrouter.train.run import train

NAMES = ("bern", "graz", "ulm")
ROUND_S = 40.0  # more than any of these rounds takes, less than Flower needs to see a lost machine

MORE = pytest.mark.skipif(not os.environ.get("FEDERATION"), reason="ten minutes more: make federation-test")


@pytest.fixture(scope="module", autouse=True)
def flower() -> None:
    """Flower's environment, made where it is missing."""
    setup()


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sites]:
    """Three sites and their superlink, for all tests here."""
    with federation(tmp_path_factory.mktemp("federation"), NAMES) as found:
        found.patience(round_s=ROUND_S, exchange_s=120.0, start_s=START_S, absent_s=20.0)
        found.serve()
        for name in NAMES:
            found.start(name)
        yield found


def finished(sites: Sites, run: subprocess.Popen[bytes], out: str) -> Bundle:
    assert run.wait(START_S) == 0, sites.log(out).read_text()[-3000:]
    return load_bundle(sites.directory / out / "bundle")


def metrics(sites: Sites, out: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (sites.directory / out / "metrics.jsonl").read_text().splitlines()]


def in_one_process(sites: Sites, out: Path, rounds: int) -> Bundle:
    settings = tomllib.loads(PLAN)
    settings["train"]["rounds"] = rounds
    settings["data"] = {"clients": {name: str(sites.directory / f"{name}.jsonl") for name in NAMES}}
    config = Config.model_validate(settings)
    return train(config, out, Console(quiet=True))


def assert_alike(one: Bundle, other: Bundle) -> None:
    assert [(c.name, c.clients, c.num_examples) for c in one.clusters] == [
        (c.name, c.clients, c.num_examples) for c in other.clusters
    ]
    for mine, theirs in zip(one.clusters, other.clusters, strict=True):
        a, b = read_weights(one.adapter_path(mine)), read_weights(other.adapter_path(theirs))
        assert all(np.abs(a[name] - b[name]).max() <= 1e-5 for name in b)
        assert abs(mine.radius - theirs.radius) <= 1e-5 * theirs.radius


def test_a_site_is_killed_in_training_and_the_run_goes_on(sites: Sites) -> None:
    run = sites.train("killed")
    wait_for("round 1: trains", sites.log("ulm"), START_S)
    sites.kill("ulm")
    bundle = finished(sites, run, "killed")
    refused = {
        client
        for line in metrics(sites, "killed")
        for client in dict(line.get("refused") or {})  # type: ignore[call-overload]
    }
    assert refused == {"ulm"}
    assert {client for c in bundle.clusters for client in c.clients} == set(NAMES)
    assert f"client ulm: it did not answer within {ROUND_S:.0f} s" in sites.log("killed").read_text()


@MORE
def test_it_comes_back_and_the_server_is_killed_and_the_bundle_is_that_of_one_process(
    sites: Sites, tmp_path: Path
) -> None:
    sites.patience(round_s=150.0)
    sites.start("ulm")
    sites.train("resumed", "--set", "train.rounds=3")
    wait_for("round 1/3", sites.log("resumed"), START_S)
    sites.kill("resumed")
    again = sites.train("resumed", "--set", "train.rounds=3")
    bundle = finished(sites, again, "resumed")
    assert "going on after round" in sites.log("resumed").read_text()
    assert not [line for line in metrics(sites, "resumed") if line.get("refused")]
    assert_alike(bundle, in_one_process(sites, tmp_path / "local", 3))
    status = json.loads(fedrouter("federation", "status", "fed", "--json", cwd=sites.directory))
    assert [(one["client"], one["status"], one["rows"]) for one in status] == [
        (name, "online", 120) for name in NAMES
    ]


@MORE
def test_a_site_that_restarts_within_a_run_and_one_that_is_not_in_the_roster(sites: Sites) -> None:
    """It has another address after the restart; its name is its key's. A revoked key is out."""
    sites.patience(absent_s=120.0)  # a restarted site loads its base again
    file = sites.directory / "fed" / "federation.toml"
    text = file.read_text()
    file.write_text("\n".join(line for line in text.splitlines() if not line.startswith("graz =")) + "\n")
    run = sites.train("restarted", "--set", "train.rounds=3")
    wait_for("round 1: trains", sites.log("bern"), START_S)
    wait_for("round 1/3", sites.log("restarted"), START_S)
    ended = sites.kill("bern", alone=True)
    until = time.monotonic() + 30
    while (left := {pid for pid in ended if Path(f"/proc/{pid}").exists()}) and time.monotonic() < until:
        time.sleep(0.2)
    assert not left, "what a killed client had started goes with it"
    sites.start("bern")
    bundle = finished(sites, run, "restarted")
    lines = metrics(sites, "restarted")
    assert {line["round"] for line in lines} == {0, 1, 2}
    assert not [line for line in lines if line["round"] == 2 and line.get("refused")], "it was back"
    assert {client for c in bundle.clusters for client in c.clients} == {"bern", "ulm"}
    file.write_text(text)
