"""Reloads: what changes, what is refused, and the effect on requests."""

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import pytest
from bundles import write_word_bundle
from echo import KEY, PATIENT, TASKS, Answer, Server, WordEmbedder
from holder import HolderApp

from fedrouter.bundle import Bundle, load_bundle
from fedrouter.errors import BundleError
from fedrouter.serve import canary, engine, reload, routing
from fedrouter.serve.access import Access
from fedrouter.serve.limits import Limits
from fedrouter.serve.paths import ROUTED, is_admin
from fedrouter.serve.reload import find_bundle
from fedrouter.serve.routing import Routing
from fedrouter.types import BaseSpec

RELOAD, COMPLETIONS = "/v1/fedrouter/reload", "/v1/completions"


@dataclass
class Setup:
    """A directory of bundles and a server of the first bundle."""

    root: Path
    first: Bundle
    server: Server
    app: HolderApp

    def adapters(self, name: str) -> list[str]:
        """Adapters of the three tasks, then the generalist."""
        return list(load_bundle(self.root / name).adapter_paths)

    async def reload(self, name: Any, **options: Any) -> Answer:
        return await self.server.ask(RELOAD, {"bundle": name}, **options)

    async def ask(self, prompt: Any) -> Answer:
        return await self.server.ask(COMPLETIONS, {"model": "fedrouter", "prompt": prompt})


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    root = tmp_path / "bundles"
    root.mkdir()
    first = write_word_bundle(root / "one")
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    monkeypatch.setattr(canary, "RETRY_S", 0.01)
    return setup_of(root, first)


def setup_of(root: Path, first: Bundle, access: Access | None = None, fallback: str | None = None) -> Setup:
    app, limits = HolderApp(list(first.adapter_paths)), Limits(**PATIENT)
    load = lambda: Routing(first, WordEmbedder(), str, fallback, limits)  # noqa: E731
    server = Server(load, app, access, bundle_root=root)
    return Setup(root, first, server, app)


def within(setup: Setup, scenario: Callable[[], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        async with setup.server:
            return await scenario()

    return asyncio.run(main())


def test_loads_what_is_new_keeps_what_is_the_same_and_unloads_the_rest(setup: Setup) -> None:
    write_word_bundle(setup.root / "two", seeds=(0, 11, 12))
    old, new = setup.adapters("one"), setup.adapters("two")

    async def scenario() -> tuple[Answer, Answer, Answer]:
        before = await setup.ask(TASKS["summary"])
        return before, await setup.reload("two"), await setup.ask(TASKS["summary"])

    before, answer, after = within(setup, scenario)
    assert (before.json["model"], after.json["model"]) == (old[1], new[1])
    assert old[1] != new[1]
    assert old[0] == new[0]
    assert answer.json == {"bundle": "two", "loaded": new[1:], "kept": [old[0]], "unloaded": old[1:]}
    assert set(setup.app.adapters) == set(new)
    assert setup.app.adapters[new[1]] == str(setup.root / "two" / "adapters" / new[1])
    assert ("load", old[0]) not in setup.app.changes


def test_a_bundle_that_cannot_route_is_refused_before_the_switch(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_word_bundle(setup.root / "two", seeds=(10, 11, 12))
    load = load_bundle

    def damaged(path: Path, *signed_by: Path | None) -> Bundle:
        bundle = load(path, *signed_by)
        return replace(
            bundle,
            clusters=tuple(
                replace(one, radius="12")  # type: ignore[arg-type]
                for one in bundle.clusters
            ),
        )

    monkeypatch.setattr(routing, "load_bundle", damaged)

    async def scenario() -> tuple[Answer, Answer]:
        return await setup.reload("two"), await setup.ask(TASKS["summary"])

    refused, after = within(setup, scenario)
    assert refused.status == 400
    assert "routing a prompt fails (TypeError" in refused.json["error"]["message"]
    assert after.json["model"] == setup.adapters("one")[1]
    assert not setup.app.changes, "no adapter may be loaded"


def test_there_and_back_again(setup: Setup) -> None:
    write_word_bundle(setup.root / "two", seeds=(10, 11, 12))

    async def scenario() -> list[Answer]:
        return [await setup.reload(name) for name in ("two", "two", "one", "two")]

    assert [answer.status for answer in within(setup, scenario)] == [200] * 4
    assert set(setup.app.adapters) == set(setup.adapters("two"))


def test_requests_in_flight_keep_their_adapter_until_they_are_answered(setup: Setup) -> None:
    write_word_bundle(setup.root / "two", seeds=(10, 11, 12))
    old, new = setup.adapters("one"), setup.adapters("two")

    async def scenario() -> tuple[Answer, Answer, Answer]:
        slow = asyncio.create_task(setup.ask(TASKS["summary"] + " slow"))
        await asyncio.sleep(0.1)
        reloading = asyncio.create_task(setup.reload("two"))
        await asyncio.sleep(0.3)
        assert not reloading.done()
        assert set(setup.app.adapters) == {*old, *new}
        fast = await setup.ask(TASKS["summary"])  # the new bundle answers already
        assert (await setup.reload("one")).status == 409
        setup.app.gate.set()
        return await slow, fast, await reloading

    slow, fast, answer = within(setup, scenario)
    assert (slow.status, slow.json["model"]) == (200, old[1])
    assert fast.json["model"] == new[1]
    assert answer.json["unloaded"] == old
    assert set(setup.app.adapters) == set(new)


def test_no_request_fails_however_often_bundles_change(setup: Setup) -> None:
    for number in (1, 2):
        write_word_bundle(setup.root / f"b{number}", seeds=tuple(range(number * 10, number * 10 + 3)))
    stop = asyncio.Event()
    answers: list[Answer] = []

    async def client(prompt: str) -> None:
        while not stop.is_set():
            answers.append(await setup.ask(prompt))

    async def scenario() -> list[Answer]:
        clients = [asyncio.create_task(client(prompt)) for prompt in TASKS.values() for _ in range(4)]
        reloads = [await setup.reload(f"b{1 + number % 2}") for number in range(10)]
        stop.set()
        await asyncio.gather(*clients)
        return reloads

    assert {one.status for one in within(setup, scenario)} == {200}
    assert len(answers) > 100
    assert {answer.status for answer in answers} == {200}
    assert all(unquote(answer.routing["adapter"]) == answer.json["model"] for answer in answers)
    assert len({answer.json["model"] for answer in answers}) > len(TASKS)


def broken(setup: Setup, name: str) -> str:
    """Write a bundle that must not be served; return a part of the error message."""
    path = setup.root / name
    embedder = WordEmbedder().spec
    if name == "other-base":
        write_word_bundle(path, base=BaseSpec("words", None, "words-2"))
        return "not the one served"
    if name == "other-embedder":
        write_word_bundle(path, embedder=replace(embedder, layer=2))
        return "not the one in use"
    if name == "other-vectors":
        write_word_bundle(path, probe_vectors=write_word_bundle(setup.root / "x").probe + 1)
        return "differ by"
    if name == "other-template":
        write_word_bundle(path, chat_template="{{ messages }}")
        return "chat template"
    bundle = write_word_bundle(path, seeds=(20, 21, 22))
    if name == "damaged":
        file = bundle.adapter_path(bundle.clusters[1]) / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-4])
        return "content differs"
    if name == "leaky":
        (path / "README.md").unlink()
        (path / "README.md").symlink_to(setup.first.path / "README.md")
        return "leads out of"
    if name in ("radius", "name"):
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["clusters"][0][name] = {"radius": "12", "name": 7}[name]
        (path / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(BundleError) as caught:  # as `serve` reports it
            load_bundle(path)
        return f"{caught.value}; the bundle served"
    if name == "refused-by-vllm":
        setup.app.broken.add(bundle.clusters[2].adapter)
        return "no room for"
    setup.app.idle.add(bundle.clusters[2].adapter)
    return "answers as the base does"


@pytest.mark.parametrize(
    "name",
    [
        "other-base",
        "other-embedder",
        "other-vectors",
        "other-template",
        "damaged",
        "leaky",
        "radius",
        "name",
        "refused-by-vllm",
        "without-effect",
    ],
)
def test_a_bad_bundle_is_refused_and_the_old_one_goes_on(setup: Setup, name: str) -> None:
    says = broken(setup, name)

    async def scenario() -> tuple[Answer, Answer]:
        return await setup.reload(name), await setup.ask(TASKS["summary"])

    refused, after = within(setup, scenario)
    assert refused.status == 400
    assert says in refused.json["error"]["message"]
    assert "so far stays" in refused.json["error"]["message"]
    assert after.json["model"] == setup.adapters("one")[1]
    assert set(setup.app.adapters) == set(setup.adapters("one"))


@pytest.mark.parametrize(("rank", "limits", "says"), [(16, (8, 9), "rank 16"), (8, (8, 7), "8 adapters")])
def test_a_bundle_that_does_not_fit_is_refused(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, rank: int, limits: tuple[int, int], says: str
) -> None:
    write_word_bundle(setup.root / "two", seeds=(20, 21, 22), rank=rank)
    monkeypatch.setattr(engine, "lora_limits", lambda scope: limits)
    refused = within(setup, lambda: setup.reload("two"))
    assert refused.status == 400
    assert says in refused.json["error"]["message"]
    assert not setup.app.changes


@pytest.mark.parametrize(
    ("device", "max_loras", "capacity"), [("cpu", 9, 8), ("cpu", 6, 5), ("cpu", 20, 9), ("cuda", 6, 9)]
)
def test_the_empty_slot_on_cpu_does_not_count_as_room(device: str, max_loras: int, capacity: int) -> None:
    lora = SimpleNamespace(max_lora_rank=8, max_cpu_loras=9, max_loras=max_loras)
    config = SimpleNamespace(lora_config=lora, device_config=SimpleNamespace(device_type=device))
    app = SimpleNamespace(state=SimpleNamespace(vllm_config=config))
    assert engine.lora_limits({"app": app}) == (8, capacity)


def test_another_adapter_does_not_pass_for_one_that_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The eight hex digits in a name can collide; the full hash in the manifest cannot."""
    for module in ("manifest", "write"):
        monkeypatch.setattr(f"fedrouter.bundle.{module}.adapter_name", lambda head, *_: f"{head}-00000000")
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    setup = setup_of(tmp_path, write_word_bundle(tmp_path / "one"))
    write_word_bundle(tmp_path / "two", seeds=(20, 21, 22))
    refused = within(setup, lambda: setup.reload("two"))
    assert refused.status == 400
    assert "differs from the file of that name that is served" in refused.json["error"]["message"]


def test_a_moved_link_is_followed(setup: Setup) -> None:
    write_word_bundle(setup.root / "two", seeds=(20, 21, 22))
    current = setup.root / "current"
    current.symlink_to("one")

    async def scenario() -> list[Answer]:
        first = await setup.reload("current")
        current.unlink()
        current.symlink_to("two")
        return [first, await setup.reload(str(current))]

    first, second = within(setup, scenario)
    assert (first.json["loaded"], second.json["loaded"]) == ([], setup.adapters("two"))


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "one/../../outside",
        "one/../one",
        "/etc",
        "link",
        "link/inner",
        "missing",
        ".",
        "",
        "one\0",
        None,
        3,
        ["one"],
        "manifest",
    ],
)
def test_bundles_are_loaded_from_one_directory_only(setup: Setup, name: Any) -> None:
    outside = write_word_bundle(setup.root.parent / "outside").path
    (outside / "inner").mkdir()
    (setup.root / "link").symlink_to(outside)
    (setup.root / "manifest").write_text("no directory")
    with pytest.raises(BundleError):
        find_bundle(setup.root, name)
    assert within(setup, lambda: setup.reload(name)).status == 400
    assert not setup.app.changes


def test_paths_within_the_directory_are_fine(setup: Setup) -> None:
    for name in ("one", "./one", str(setup.root / "one")):
        assert find_bundle(setup.root, name) == setup.root.resolve() / "one"


def test_reload_asks_for_the_key_and_for_json(setup: Setup) -> None:
    write_word_bundle(setup.root / "two", seeds=(20, 21, 22))

    async def scenario() -> list[Answer]:
        return [
            await setup.reload("two", key=None),
            await setup.reload("two", key="wrong"),
            await setup.reload("two", headers={"content-type": "text/plain"}),
            await setup.server.ask(RELOAD, b"{"),
        ]

    assert [answer.status for answer in within(setup, scenario)] == [401, 401, 415, 400]
    assert not setup.app.changes


@pytest.mark.parametrize(
    "path",
    [
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/v1/load_lora_adapter/",
        "/llm/v1/load_lora_adapter",
        "/adapters",
        "/adapters/x",
    ],
)
@pytest.mark.parametrize("method", ["POST", "DELETE"])
@pytest.mark.parametrize("root", ["", "/llm"])
def test_vllms_own_adapter_endpoints_are_closed(setup: Setup, path: str, method: str, root: str) -> None:
    body = {"lora_name": "evil", "lora_path": "/tmp"}
    answer = within(setup, lambda: setup.server.ask(path, body, method=method, root=root))
    assert answer.status == 404
    assert "evil" not in setup.app.adapters


def test_other_paths_are_open() -> None:
    assert not any(map(is_admin, ["/v1/models", "/v1/chat/completions", "/metrics", "/v1/adapters-of-mine"]))


def test_several_api_processes_cannot_reload(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/tmp")
    answer = within(setup, lambda: setup.reload("one"))
    assert answer.status == 409
    assert "several API processes" in answer.json["error"]["message"]


def test_a_server_without_the_flag_cannot_reload(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING")
    assert within(setup, lambda: setup.reload("one")).status == 409


def test_requests_that_never_end_do_not_hold_a_bundle_for_ever(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reload, "DRAIN_S", 0.2)
    write_word_bundle(setup.root / "two", seeds=(10, 11, 12))

    async def scenario() -> Answer:
        slow = asyncio.create_task(setup.ask(TASKS["summary"] + " slow"))
        await asyncio.sleep(0.1)
        answer = await setup.reload("two")
        setup.app.gate.set()
        await slow
        return answer

    assert within(setup, scenario).json["unloaded"] == setup.adapters("one")


def test_the_generalist_changes_with_its_bundle(setup: Setup) -> None:
    second = write_word_bundle(setup.root / "two", seeds=(20, 21, 22))
    setup.app.idle.add(str(second.generalist))
    refused = within(setup, lambda: setup.reload("two"))
    assert (refused.status, "answers as the base does" in refused.json["error"]["message"]) == (400, True)
    setup.app.idle.clear()
    served = setup_of(setup.root, setup.first, fallback="generalist")

    async def scenario() -> list[Answer]:
        far = "zebra " * 50
        return [await served.ask(far), await served.reload("two"), await served.ask(far)]

    before, answer, after = within(served, scenario)
    assert before.json["model"] == setup.first.generalist
    assert after.json["model"] == second.generalist, "the server's fallback option must survive the reload"
    assert second.generalist in answer.json["loaded"]
    assert setup.first.generalist in answer.json["unloaded"]


def test_a_bundle_that_cannot_have_the_servers_fallback_is_refused(setup: Setup) -> None:
    write_word_bundle(setup.root / "two", seeds=(20, 21, 22), generalist=None)
    served = setup_of(setup.root, setup.first, fallback="generalist")
    refused = within(served, lambda: served.reload("two"))
    assert refused.status == 400
    assert "contains no generalist" in refused.json["error"]["message"]
    assert not served.app.changes
    assert within(setup, lambda: setup.reload("two")).status == 200


def test_a_tenant_cannot_reload(setup: Setup) -> None:
    write_word_bundle(setup.root / "two", seeds=(20, 21, 22))
    tenants = {hashlib.sha256(b"ann").hexdigest(): "a"}
    served = setup_of(setup.root, setup.first, access=Access(KEY, tenants))

    async def scenario() -> list[Answer]:
        refused = [await served.reload("two", key=key) for key in ("ann", "wrong", None)]
        assert not served.app.changes
        return [*refused, await served.reload("two")]

    assert [answer.status for answer in within(served, scenario)] == [403, 401, 401, 200]


def test_clients_change_with_the_bundle(setup: Setup) -> None:
    write_word_bundle(setup.root / "two", seeds=(20, 21, 22), clients=dict.fromkeys(TASKS, ("b", "c")))
    body = {"model": "fedrouter", "prompt": TASKS["summary"]}

    async def scenario() -> list[Answer]:
        async def ask(client: str) -> Answer:
            return await setup.server.ask(COMPLETIONS, body, headers={"x-fedrouter-client": client})

        before = [await ask(client) for client in "abc"]
        await setup.reload("two")
        return [*before, *[await ask(client) for client in "abc"]]

    answers = within(setup, scenario)
    assert [answer.status for answer in answers] == [200, 200, 404, 404, 200, 200]
    assert answers[4].json["model"] == setup.adapters("two")[1]


async def during_a_reload(setup: Setup, asking: Coroutine[Any, Any, Answer], waiting: int) -> Answer:
    """Return the response to a request that began before a reload and ended after the switch."""
    slow = asyncio.create_task(asking)
    while setup.app.waiting < waiting:
        await asyncio.sleep(0.01)
    reloading = asyncio.create_task(setup.reload("two"))
    while setup.server.hook.routing.bundle.path.name != "two":
        await asyncio.sleep(0.01)
    setup.app.gate.set()
    await reloading
    return await slow


@pytest.mark.parametrize("path", ROUTED)
def test_requests_on_every_path_keep_the_bundle_that_they_began_with(setup: Setup, path: str) -> None:
    write_word_bundle(setup.root / "two", seeds=(10, 11, 12))
    text = TASKS["summary"] + " slow"
    body = {"model": "fedrouter", "prompt": text, "input": text, "max_tokens": 8}
    body["messages"] = [{"role": "user", "content": text}]

    answer = within(setup, lambda: during_a_reload(setup, setup.server.ask(path, body), waiting=1))
    assert (answer.status, answer.json["model"]) == (200, setup.adapters("one")[1])


def test_a_split_list_keeps_the_bundle_that_it_began_with(setup: Setup) -> None:
    write_word_bundle(setup.root / "two", seeds=(10, 11, 12))
    prompts = [TASKS["summary"] + " slow", TASKS["headline"] + " slow"]

    headline, summary = setup.adapters("one")[:2]
    answer = within(setup, lambda: during_a_reload(setup, setup.ask(prompts), waiting=2))
    assert (answer.status, answer.json["model"]) == (200, f"{summary},{headline}")
