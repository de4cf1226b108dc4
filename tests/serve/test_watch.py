"""A watched link: the server follows it."""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from bundles import write_word_bundle
from echo import PATIENT, TASKS, Server, WordEmbedder
from holder import HolderApp

from fedrouter.bundle import load_bundle
from fedrouter.serve import watch
from fedrouter.serve.limits import Limits
from fedrouter.serve.routing import Routing


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Bundles one and two and a link to the first, for ``fedrouter serve --watch``."""
    write_word_bundle(tmp_path / "one")
    write_word_bundle(tmp_path / "two", seeds=(10, 11, 12))
    (tmp_path / "current").symlink_to("one")
    monkeypatch.setenv("VLLM_API_KEY", "sesame")
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    monkeypatch.setattr(watch, "POLL_S", 0.01)
    return tmp_path


def point(root: Path, name: str) -> None:
    """Replace the link atomically, as ``ln -sfn`` does."""
    (root / "new").symlink_to(name)
    (root / "new").replace(root / "current")


def within(
    root: Path, scenario: Callable[[Server], Awaitable[Any]], link: str | None = "current"
) -> tuple[Any, HolderApp]:
    first = load_bundle(root / "one")
    app = HolderApp(list(first.adapter_paths))

    load = lambda: Routing(first, WordEmbedder(), str, None, Limits(**PATIENT))  # noqa: E731
    watch = root / link if link else None

    async def main() -> Any:
        async with Server(load, app, bundle_root=root, watch=watch) as server:
            return await asyncio.wait_for(scenario(server), 30)

    return asyncio.run(main()), app


async def served(server: Server, name: str) -> None:
    """Wait until a bundle is served and its predecessor is unloaded."""
    while server.hook.routing.bundle.path.name != name or server.hook.reloader.busy:
        await asyncio.sleep(0.01)


def test_the_links_target_is_served(root: Path) -> None:
    async def scenario(server: Server) -> list[str]:
        models = []
        for name in ("one", "two", "one"):
            point(root, name)
            await served(server, name)
            asked = {"model": "fedrouter", "prompt": TASKS["summary"]}
            models.append((await server.ask("/v1/completions", asked)).json["model"])
        return models

    models, app = within(root, scenario)
    old, new = (load_bundle(root / name) for name in ("one", "two"))
    summary = [bundle.clusters[1].adapter for bundle in (old, new)]
    assert models == [summary[0], summary[1], summary[0]]
    assert set(app.adapters) == set(old.adapter_paths)


def test_a_link_that_moved_while_the_server_started_is_noticed(root: Path) -> None:
    point(root, "two")
    within(root, lambda server: served(server, "two"))


def test_a_bad_bundle_is_refused_and_logged_once(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "two" / "router.safetensors").write_bytes(b"")

    async def scenario(server: Server) -> list[str]:
        found = []
        for name in ("two", "missing", "current", "/"):  # damaged, missing, a loop, outside
            point(root, name)
            await asyncio.sleep(0.2)
            found.append(server.hook.routing.bundle.path.name)
        (root / "current").unlink()
        await asyncio.sleep(0.1)
        write_word_bundle(root / "three", seeds=(20, 21, 22))
        (root / "current").symlink_to("three")
        await served(server, "three")
        return found

    caplog.set_level(logging.ERROR, "vllm.fedrouter")
    found, app = within(root, scenario)
    assert found == ["one"] * 4
    logged = [record.getMessage() for record in caplog.records]
    assert len(logged) == 3, logged
    assert "router.safetensors: content differs" in logged[0]
    assert "so far stays" in logged[0]
    assert "no such directory" in logged[1]
    assert "only directory that bundles are loaded from" in logged[2]
    assert set(app.adapters) == set(load_bundle(root / "three").adapter_paths)


def test_nothing_is_watched_by_default(root: Path) -> None:
    async def scenario(server: Server) -> str:
        point(root, "two")
        await asyncio.sleep(0.2)
        return server.hook.routing.bundle.path.name

    assert within(root, scenario, link=None)[0] == "one"
    assert os.path.realpath(root / "current").endswith("two")


def test_a_server_that_cannot_reload_says_so_once(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING")

    async def scenario(server: Server) -> None:
        point(root, "two")
        await asyncio.sleep(0.2)

    caplog.set_level(logging.ERROR, "vllm.fedrouter")
    within(root, scenario)
    assert ["without reloading" in record.getMessage() for record in caplog.records] == [True]
