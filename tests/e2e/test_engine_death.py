"""The engine killed in the middle of a stream: an error event, one line, exit code 1, and nobody left."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
from processes import end, first_lines, group_of_children, running

from fedrouter.bundle import Bundle
from fedrouter.serve.checks import free_port


def test_the_engine_killed_in_the_middle_of_a_stream(small_bundle: Bundle, tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "server.log"
    arguments = ["serve", str(small_bundle.path), "--port", str(port), "--", "--disable-uvicorn-access-log"]
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "fedrouter", *arguments],
            # an engine that is a process of its own on small machines too
            env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    group: set[int] = set()
    try:
        assert len(first_lines(process, 2)) == 2, log.read_text()[-3000:]
        group = group_of_children(process.pid)
        [engine] = [pid for pid in group if "EngineCore" in Path(f"/proc/{pid}/cmdline").read_text()]
        body = {"model": "fedrouter", "prompt": "population | 5683", "stream": True, "ignore_eos": True}
        events = []
        with httpx.stream(
            "POST", f"http://127.0.0.1:{port}/v1/completions", json={**body, "max_tokens": 400}, timeout=120
        ) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    events.append(line.removeprefix("data: "))
                if len(events) == 2:
                    os.kill(engine, signal.SIGKILL)
        assert any("error" in json.loads(event) for event in events[2:] if event != "[DONE]"), events[-3:]
        assert process.wait(60) == 1
        last = log.read_text().strip().splitlines()[-1]
        # Another process may have left half a line before ours; nothing comes behind it.
        assert last.endswith(
            "error: vLLM ended by itself, as it does when its engine dies; its output above says why"
        ), last
        assert "exit code 0" not in last
        assert not group & running(), "fedrouter serve left processes behind"
    finally:
        end(process, group)
