"""Reloads that break a probe are refused."""

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from bundles import write_word_bundle
from echo import KEY, TASKS
from test_reload import Setup, setup_of
from test_second import FAR, swapped

from fedrouter.bundle import load_bundle
from fedrouter.serve import canary

HEADLINE = {"prompt": TASKS["headline"], "cluster": "headline"}
ZEBRA = {"prompt": FAR, "cluster": None}


def as_lines(*lines: Any) -> bytes:
    return "\n".join(json.dumps(line) for line in lines).encode()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    monkeypatch.setattr(canary, "RETRY_S", 0.01)
    return tmp_path


def reload(setup: Setup, name: str, **more: Any) -> Any:
    async def scenario() -> Any:
        async with setup.server:
            return await setup.server.ask("/v1/fedrouter/reload", {"bundle": name, **more})

    return asyncio.run(scenario())


def test_a_bundle_carries_probes(root: Path) -> None:
    bundle = write_word_bundle(root / "one", probes=as_lines(HEADLINE, ZEBRA))
    assert [probe.cluster for probe in load_bundle(bundle.path).probes] == ["headline", None]
    assert not write_word_bundle(root / "two").probes


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("whose", ["the new bundle's", "the old bundle's"])
def test_a_reload_that_breaks_a_probe_is_refused(root: Path, whose: str, check: bool) -> None:
    old = as_lines(HEADLINE) if whose == "the old bundle's" else None
    new = as_lines(ZEBRA, HEADLINE) if whose == "the new bundle's" else None
    setup = setup_of(root, write_word_bundle(root / "one", probes=old))
    space = swapped()
    write_word_bundle(root / "two", seeds=(10, 11, 12), space=space, probes=new)
    answer = reload(setup, "two", check=check)
    assert answer.status == 400
    assert "probe line 1 (" in answer.json["error"]["message"]
    assert not setup.app.changes


def test_a_probe_that_is_redefined_or_never_held_breaks_nothing(root: Path) -> None:
    never = {"prompt": TASKS["summary"], "cluster": "headline"}
    setup = setup_of(root, write_word_bundle(root / "one", probes=as_lines(HEADLINE, never)))
    anew = {"prompt": TASKS["headline"], "cluster": "summary"}
    write_word_bundle(root / "two", seeds=(10, 11, 12), space=swapped(), probes=as_lines(anew))
    assert reload(setup, "two").status == 200


def test_a_check_reports_changes_and_makes_none(root: Path) -> None:
    setup = setup_of(root, write_word_bundle(root / "one"))
    two = write_word_bundle(root / "two", seeds=(0, 11, 12))
    answer = reload(setup, "two", check=True)
    assert answer.status == 200
    kept = two.clusters[0].adapter
    assert answer.json["kept"] == [kept]
    assert answer.json["loaded"] == [name for name in two.adapter_paths if name != kept]
    assert not setup.app.changes
    assert setup.server.hook.routing.bundle.path.name == "one"


def test_a_probe_that_does_not_hold_at_the_start_is_named(root: Path, caplog: Any) -> None:
    never = {"prompt": TASKS["summary"], "cluster": "headline"}
    setup = setup_of(root, write_word_bundle(root / "one", probes=as_lines(never)))

    async def scenario() -> None:
        async with setup.server:
            while setup.server.hook.state == "starting":
                await asyncio.sleep(0.01)

    with caplog.at_level(logging.WARNING, "vllm.fedrouter"):
        asyncio.run(scenario())
    assert "goes to summary" in caplog.text
    assert setup.server.hook.state == "ready"
