import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest
from fake_server import FakeServer

from fedrouter.errors import ConfigError, ServingError
from fedrouter.evaluate.endpoint import Answer, Endpoint
from fedrouter.types import Turn

T = TypeVar("T")


def on(
    url: str,
    action: Callable[[Endpoint], Awaitable[T]],
    *,
    api_key: str | None = None,
    timeout_s: float = 5.0,
    retries: int = 2,
) -> T:
    async def run() -> T:
        async with Endpoint(url, api_key=api_key, timeout_s=timeout_s, retries=retries) as endpoint:
            return await action(endpoint)

    return asyncio.run(run())


def ask(url: str, prompt: str, model: str = "fedrouter", **options: Any) -> Answer:
    turns = (Turn("system", "Be brief."), Turn("user", prompt))
    return on(url, lambda endpoint: endpoint.ask(model, turns, max_tokens=7, temperature=0.5), **options)


def check(url: str, *models: str, **options: Any) -> None:
    on(url, lambda endpoint: endpoint.check(models), **options)


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_an_answer_carries_text_adapter_and_routing_facts(server: FakeServer, suffix: str) -> None:
    answer = ask(server.url + suffix, "Is it?")
    assert (answer.text, answer.adapter, answer.cluster) == ("Yes", "yes-no-1111", "yes-no")
    assert (answer.distance, answer.fallback, answer.routed) == (0.25, False, True)
    assert answer.num_tokens == 5
    assert answer.latency_s is not None
    assert answer.latency_s > 0
    assert answer.error is None
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is it?"}]
    assert server.chats == [{"model": "fedrouter", "messages": messages, "max_tokens": 7, "temperature": 0.5}]


def test_a_named_adapter_is_not_routed(server: FakeServer) -> None:
    answer = ask(server.url, "hello", "shout-2222")
    assert (answer.text, answer.adapter, answer.routed) == ("HELLO", "shout-2222", False)


def test_fallback_is_read_from_the_headers(server: FakeServer) -> None:
    answer = ask(server.url, "far away")
    assert (answer.adapter, answer.fallback, answer.distance) == ("base", True, 9.5)


@pytest.mark.parametrize("status", [429, 500, 503, 0])
def test_passing_trouble_is_retried(server: FakeServer, status: int) -> None:
    server.failing = {"hello": [status]}
    assert ask(server.url, "hello").text == "HELLO"
    assert server.asked()["hello"] == 2


def test_lasting_trouble_becomes_an_error_in_the_answer(server: FakeServer) -> None:
    server.failing = {"hello": [500] * 9}
    answer = ask(server.url, "hello")
    assert answer.error == f"{server.url} answered 500: told to say 500"
    assert (answer.text, answer.adapter) == ("", None)
    assert server.asked()["hello"] == 3
    assert server.asked()["hello"] == 3


def test_a_bad_request_is_not_retried(server: FakeServer) -> None:
    server.failing = {"hello": [400]}
    assert "answered 400" in (ask(server.url, "hello").error or "")
    assert server.asked()["hello"] == 1


def test_latency_leaves_out_the_failed_attempts(server: FakeServer) -> None:
    server.failing = {"hello": [503]}
    server.delay_s = 0.2
    began_s = time.perf_counter()
    latency_s = ask(server.url, "hello").latency_s
    assert latency_s is not None
    assert 0.2 <= latency_s <= time.perf_counter() - began_s - 0.2


def test_a_slow_answer_is_an_error(server: FakeServer) -> None:
    server.delay_s = 0.5
    answer = ask(server.url, "hello", timeout_s=0.1, retries=0)
    assert "did not answer in time" in (answer.error or "")


def test_check_passes_with_the_right_key(server: FakeServer) -> None:
    server.key = "secret"
    check(server.url, "fedrouter", "base", api_key="secret")


@pytest.mark.parametrize("key", ["wrong", None])
def test_check_refuses_a_wrong_key(
    server: FakeServer, key: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")  # meant for another server
    server.key = "secret"
    with pytest.raises(ServingError, match=r"refused the key \(401\)") as error:
        check(server.url, "fedrouter", api_key=key)
    assert "secret" not in str(error.value)


def test_check_names_the_models_that_are_missing(server: FakeServer) -> None:
    with pytest.raises(ServingError, match="serves no model 'gone'; it serves base, fedrouter"):
        check(server.url, "base", "gone")


def test_check_finds_a_model_that_cannot_chat(server: FakeServer) -> None:
    server.failing = {"Hello": [400]}
    with pytest.raises(ServingError, match="answered 400"):
        check(server.url, "base")


def test_check_says_where_nothing_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(ServingError, match=f"cannot reach {url} .*is the server running there"):
            check(url.replace("http://", "http://me:password@"), "base")


def test_check_refuses_what_is_no_openai_api(server: FakeServer) -> None:
    with pytest.raises(ServingError, match="answered 404"):
        check(server.url + "/other", "base")


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "http://host:port", "8000", ""])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(ConfigError, match="http://HOST:PORT"):
        Endpoint(url, api_key=None, timeout_s=1, retries=0)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://me:password@host/v1/", "https://host"),
        ("http://[::1]:8000/v1", "http://[::1]:8000"),
        ("http://host:80/behind/a/proxy?x=1", "http://host:80/behind/a/proxy"),
    ],
)
def test_credentials_are_never_shown(url: str, shown: str) -> None:
    assert Endpoint(url, api_key=None, timeout_s=1, retries=0).url == shown


def test_a_task_belongs_to_the_adapter_with_most_of_its_rows(server: FakeServer) -> None:
    adapters = on(server.url, Endpoint.task_adapters)
    assert adapters == {"yes-no": "yes-no-1111", "shout": "shout-2222"}


def test_an_endpoint_of_others_knows_no_task_adapters(server: FakeServer) -> None:
    server.clusters = None
    assert on(server.url, Endpoint.task_adapters) is None


@pytest.mark.parametrize("payload", [{}, [], {"clusters": [{"adapter": "a"}]}, {"clusters": [3]}])
def test_malformed_clusters_are_an_error(server: FakeServer, payload: Any) -> None:
    server.clusters = payload
    with pytest.raises(ServingError, match="not a list of task clusters"):
        on(server.url, Endpoint.task_adapters)
