"""Clients that fail before the rounds: the others continue as if these had never taken part."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import adapter
from rich.console import Console
from watched import CONFIG, DIM, Trainer, clients

from fedrouter import inspect
from fedrouter.config import Config, TrainSettings
from fedrouter.errors import ClientError, TrainingError
from fedrouter.train.client.client import Client
from fedrouter.train.disk.metrics import Metrics
from fedrouter.train.local import LocalFederation, each
from fedrouter.train.server.left_out import LeftOut
from fedrouter.train.server.methods import Grouping, group
from fedrouter.types import Record

NAMES = ["ulm", "bern", "graz"]


def federation(members: list[Client] | None = None) -> LocalFederation:
    return LocalFederation(members or clients(), Trainer())  # type: ignore[arg-type]


def left_out(run: Path, once: bool = False) -> LeftOut:
    return LeftOut(run, NAMES, Console(quiet=True), once)


def fail(*_: object) -> None:
    raise OSError("no such row: colours secret1x7")


def break_in(client: Any, exchange: str) -> None:
    setattr(client, exchange, fail)


def assert_same(found: Grouping, want: Grouping) -> None:
    for array in ("mean", "transform", "centroids"):
        np.testing.assert_array_equal(getattr(found.space, array), getattr(want.space, array))
    assert found.space.cluster_of == want.space.cluster_of
    assert repr(found.assignments) == repr(want.assignments)


@pytest.mark.parametrize("exchange", ["summarise", "assign"])
def test_the_others_find_the_same_clusters_whichever_exchange_fails(exchange: str, tmp_path: Path) -> None:
    others = federation([c for c in clients() if c.name != "bern"])
    want = group(others, CONFIG, adapter(0), DIM)
    members = clients()
    break_in(members[1], exchange)
    among, console = federation(members), Console(record=True, width=200)
    out = LeftOut(tmp_path, NAMES, console, once=False)
    assert_same(out.without(among, lambda: group(among, CONFIG, adapter(0), DIM)), want)
    assert out.others == ["ulm", "graz"]
    text = console.export_text()
    assert text.startswith("client bern is left out: OSError at test_left_out.py:")
    assert "secret" not in text, "only the client's own log may quote rows"

    again = LeftOut(tmp_path, NAMES, console, once=False)
    assert again.others == ["ulm", "graz"], "it stays left out even if it would work now"
    assert console.export_text().startswith("client bern stays left out: OSError")


@pytest.mark.parametrize("method", ["fedavg", "clustered", "oracle"])
def test_clients_are_left_out_in_the_baselines_and_the_warm_up_too(method: str, tmp_path: Path) -> None:
    settings = Config(method=method, train=TrainSettings(rounds=2, steps=4))
    others = federation([c for c in clients() if c.name != "bern"])
    want = group(others, settings, adapter(0), DIM)
    members = clients()
    if method == "clustered":
        members[1]._records = [Record(r.turns, "poison", r.task) for r in members[1]._records]
    else:
        break_in(members[1], "regroup")
    among = federation(members)
    found = left_out(tmp_path).without(among, lambda: group(among, settings, adapter(0), DIM))
    assert_same(found, want)
    assert found.names == want.names


def test_the_run_ends_with_reasons_if_no_client_is_left(tmp_path: Path) -> None:
    members = clients()
    for member in members:
        break_in(member, "summarise")
    among = federation(members)
    with pytest.raises(TrainingError, match=r"no client is left: client ulm: OSError at .*client graz: OSE"):
        left_out(tmp_path).without(among, lambda: group(among, CONFIG, adapter(0), DIM))


def test_a_resumed_run_does_not_discard_checkpoints_when_a_client_fails(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "round-00003").mkdir(parents=True)
    members = clients()
    break_in(members[0], "assign")
    among = federation(members)
    with pytest.raises(TrainingError, match=r"client ulm: OSError .* run the command again once it works"):
        left_out(tmp_path).without(among, lambda: group(among, CONFIG, adapter(0), DIM))
    assert not (tmp_path / "left_out.json").exists()


def test_with_noise_no_client_is_asked_again(tmp_path: Path) -> None:
    members, asked = clients(), []
    break_in(members[0], "assign")
    among = federation(members)

    def find() -> Grouping:
        asked.append(1)
        return group(among, CONFIG, adapter(0), DIM)

    with pytest.raises(TrainingError, match=r"client ulm: .*centroid_noise covers only one reply"):
        left_out(tmp_path, once=True).without(among, find)
    assert asked == [1]


@pytest.mark.parametrize("error", [TrainingError("lower cluster.local"), MemoryError()])
def test_settings_and_memory_errors_are_not_client_failures(error: Exception) -> None:
    def what(name: str) -> str:
        if name == "bern":
            raise error
        return name

    with pytest.raises(type(error)):
        list(each(NAMES, what))


def test_all_clients_are_asked_before_failures_are_raised() -> None:
    results: list[str] = []
    work: Callable[[str], str] = lambda name: name if name != "bern" else str(1 / 0)  # noqa: E731
    with pytest.raises(ClientError) as caught:
        results.extend(each(NAMES, work))
    assert results == ["ulm", "graz"]
    assert list(caught.value.reasons) == ["bern"]


def test_metrics_and_inspect_list_left_out_clients_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = left_out(tmp_path)
    out.add(ClientError({"bern": "OSError at embed.py:3"}))
    for start in (0, 0, 2):  # started, restarted, resumed
        Metrics(tmp_path / "metrics.jsonl", start)
    out.add(ClientError({"ulm": "KeyError at cluster.py:9"}))
    Metrics(tmp_path / "metrics.jsonl", 5)  # after clients were clustered again
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["round"], line["left_out"]) for line in lines] == [
        (0, {"bern": "OSError at embed.py:3"}),
        (5, {"ulm": "KeyError at cluster.py:9"}),
    ]
    (tmp_path / "config.json").write_text('{"train": {"rounds": 8}, "base": {"model": "m"}}')
    inspect.show(tmp_path, Console(width=100))
    shown = capsys.readouterr().out
    assert "left out bern: OSError at embed.py:3\nleft out ulm: KeyError at cluster.py:9\n" in shown
    assert "0 of 8 rounds" in shown
