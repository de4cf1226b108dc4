"""The console before a real vLLM: what a person types is decided, answered and kept in the log."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser import Page, chromium, needs_chromium
from processes import end, first_lines, group_of_children

from fedrouter.builtin.tasks import TASKS, generate
from fedrouter.bundle import Bundle
from fedrouter.serve.checks import free_port

pytestmark = needs_chromium
PROMPTS = [generate(task, "test", 1, seed=5)[0].turns[-1].content.replace("\n", " ") for task in TASKS]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("console") / "decisions.jsonl"


@pytest.fixture(scope="module")
def url(small_bundle: Bundle, log: Path) -> Iterator[str]:
    """A server with a decision log and, as shadow, the very bundle that it serves."""
    port = free_port()
    command = [sys.executable, "-m", "fedrouter", "serve", str(small_bundle.path), "--port", str(port)]
    command += [
        "--decision-log",
        str(log),
        "--log-prompts",
        "--shadow",
        str(small_bundle.path),
        "--canary",
        "50",
    ]
    with (log.parent / "server.log").open("w") as errors:
        process = subprocess.Popen(
            command,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    group: set[int] = set()
    try:
        ready = first_lines(process, 2)
        assert len(ready) == 2, (log.parent / "server.log").read_text()[-3000:]
        group = group_of_children(process.pid)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)
        end(process, group)


def test_a_person_types_asks_compares_and_judges(url: str, log: Path, small_bundle: Bundle) -> None:
    with chromium() as driver:
        page = Page(driver, url).open()
        page.shows("#where", "Nothing is typed yet")
        page.find("#tokens").clear()
        page.find("#tokens").send_keys("12")
        page.choose("#beside", "base")
        decided = []
        for number, prompt in enumerate(PROMPTS):
            page.type(prompt)
            page.until(lambda: page.text("#where .name") and "Nothing" not in page.text("#where"))
            asked = httpx.post(f"{url}/v1/fedrouter/route", json={"prompt": prompt}, timeout=60).json()
            page.shows("#where .name", asked["model"])
            page.type("", send=True)
            page.until(lambda: page.find("#send").is_enabled() and len(page.texts(".answer .why")) == 2)
            assert page.texts(".answer .name") == [asked["model"], "base"]
            assert all(page.texts(".answer .text")), "both have said something"
            assert page.driver.find_elements("css selector", ".failed") == []
            decided.append(asked["model"])
            if number == 0:
                page.find(".judge button").click()
                page.until(lambda: page.find(".judge button").get_attribute("aria-pressed") == "true")
            page.click("#anew")
        page.tab("traffic")
        page.shows("#adapters", decided[0])
        page.shows("#decisions", "good")
        page.tab("map")
        page.until(lambda: len(page.driver.find_elements("css selector", "#picture .past")) == len(PROMPTS))
        page.tab("bundles")
        page.shows("#bundle", "answers 50 %")
        assert page.complaints() == []
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    kept = [line for line in lines if "feedback" not in line]
    assert [line["adapter"] for line in kept] == decided
    assert [line["texts"] for line in kept] == [[prompt] for prompt in PROMPTS]
    assert {line["other"]["difference"] for line in kept} == {"same"}
    assert [line["outcome"] for line in lines if "feedback" in line] == ["good"]


def test_the_log_is_decided_anew_the_same(url: str, log: Path, small_bundle: Bundle) -> None:
    command: list[Any] = [sys.executable, "-m", "fedrouter", "replay", log, small_bundle.path, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["decided"], found["same"]) == (len(PROMPTS), len(PROMPTS))
