"""A remote run without a network gives the same bundle as a run in one process."""

import json
from pathlib import Path

import pytest
from loopback import Loopback, resident, site
from rich.console import Console

from fedrouter.builtin.tasks import TASKS, generate
from fedrouter.bundle import load_bundle
from fedrouter.config import Config
from fedrouter.errors import ConfigError
from fedrouter.train.federate import check_secure, train_remote
from fedrouter.train.run import train
from fedrouter.train.server.remote import Waiting

NAMES = ("bern", "graz", "ulm")
QUICK = Waiting(start_s=60, least_clients=2, exchange_s=60, round_s=60, absent_s=1)


def config(directory: Path, **changes: object) -> Config:
    clients = {name: str(directory / f"{name}.jsonl") for name in NAMES}
    return Config.model_validate(
        {
            "train": {"rounds": 2, "steps": 2, "batch_size": 4},
            "lora": {"rank": 4},
            "data": {"clients": clients},
            **changes,
        }
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    for i, name in enumerate(NAMES):
        records = [r for t in (TASKS[i], TASKS[i + 1]) for r in generate(t, "train", 60, i)]
        rows = [{"prompt": r.turns[-1].content, "completion": r.completion, "task": r.task} for r in records]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def content(bundle: Path) -> dict[str, bytes]:
    return {str(p.relative_to(bundle)): p.read_bytes() for p in sorted(bundle.rglob("*")) if p.is_file()}


def test_a_remote_run_gives_the_bundle_of_a_local_run(data: Path, tmp_path: Path) -> None:
    sites = {name: site(tmp_path / "sites", name, data / f"{name}.jsonl") for name in NAMES}
    transport = Loopback({f"node-{name}": resident(made).answer for name, (made, _) in sites.items()})
    roster = {name: key for name, (_, key) in sites.items()}
    console = Console(record=True, width=200, quiet=False, file=(tmp_path / "log").open("w"))
    remote = train_remote(config(data), tmp_path / "remote", console, transport, roster, QUICK)
    local = train(config(data), tmp_path / "local", Console(quiet=True))
    assert content(remote.path) == content(local.path)
    assert "MiB down" in console.export_text()
    for made, _ in sites.values():
        lines = [json.loads(line) for line in made.audit.read_text().splitlines()]
        assert [line["kinds"] for line in lines if line["way"] == "in"][:2] == [["Hello"], ["Summarise"]]
        assert sum(line["way"] == "out" for line in lines) == sum(line["way"] == "in" for line in lines)
    assert load_bundle(remote.path).clusters


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"aggregate": {"clip": 1.0}}, "aggregate.clip"),
        ({"method": "local"}, "method local"),
        ({}, 'set train.schedule to "all"'),
    ],
)
def test_a_secure_sum_refuses_settings_that_need_single_updates(
    changes: dict[str, object], reason: str, data: Path
) -> None:
    with pytest.raises(ConfigError, match=reason):
        check_secure(config(data, **changes))
    check_secure(config(data, method="fedavg"))
    check_secure(config(data, train={"schedule": "all"}))
