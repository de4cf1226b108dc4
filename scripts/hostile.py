"""Test a real server with hostile requests: the middleware must not fail, hang, or let the base answer.

``make hostile`` trains a small bundle, serves it and sends ten thousand requests, which depend only on the
seed. Then it measures normal traffic with and without concurrent slow request bodies and aborted streams. The
exit code is 1 if a limit is exceeded.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console

from fedrouter.bundle import Bundle
from fedrouter.config_file import load_config
from fedrouter.serve.checks import free_port
from fedrouter.serve.launch import Options, prepare
from fedrouter.serve.paths import CHAT, ROUTED, UNROUTED
from fedrouter.serve.process import running
from fedrouter.train.run import train

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "serve"))
from hostile_requests import Hostile, requests

SMALL = ("num_clients=4", "num_per_task=60"), ("rounds=2", "steps=4"), ("global=4",)
HANG_S = 60.0
BAD = ("hook's own 5xx", "hangs", "no answer", "base unasked")
SMALL_BODY = 64 * 2**10
SLOW, BROKEN, MOST_RATIO = 30, 100, 1.2
BLOCKS, BLOCK_S = 5, 20.0  # of normal requests, alone and beside in turn
OURS = (b"routing failed", b"too many large requests", b"too many requests wait to be routed")
NORMAL = {"messages": [{"role": "user", "content": "Blackford | population | 5683"}], "max_tokens": 8}


async def main(url: str, pid: int, number: int, seed: int, parallel: int) -> bool:
    address = urlsplit(url)
    host, port = str(address.hostname), int(address.port or 80)
    await attack(host, port, 200, seed + 1, parallel)  # warm-up, so that one-time allocations do not count
    before = memory_mib(pid)
    started = time.perf_counter()
    found = await attack(host, port, number, seed, parallel)
    print(f"{number} hostile requests, seed {seed}: {time.perf_counter() - started:.0f} s")
    print(f"  statuses {dict(sorted(found['statuses'].items()))}")
    for name in (*BAD, "vLLM's 5xx"):
        first = (str(request)[:300] for request in found[name][:5])
        print(f"  {name}: {len(found[name])}", *first, sep="\n    ")
    alone, beside = await traffic(host, port)
    after = memory_mib(pid)
    ratio = p95(beside) / p95(alone)
    print(
        f"normal requests: p95 {1000 * p95(alone):.0f} ms alone ({len(alone)}), {1000 * p95(beside):.0f} ms ",
        end="",
    )
    print(f"beside {SLOW} slow bodies and {BROKEN} broken streams ({len(beside)}): {ratio:.2f} x")
    print(f"memory of all processes: {before:.0f} MiB before, {after:.0f} MiB after")
    bad = [name for name in BAD if found[name]]
    bad += ["p95"] * (ratio > MOST_RATIO) + ["memory"] * (after > 1.1 * before + 64)
    print(json.dumps({"num": number, "seed": seed, "missed": bad, "ratio": round(ratio, 3)}))
    return not bad


async def attack(host: str, port: int, number: int, seed: int, parallel: int) -> dict[str, Any]:
    """Send the requests, ``parallel`` at a time; return counts of statuses and the bad requests by kind."""
    found: dict[str, Any] = {name: [] for name in (*BAD, "vLLM's 5xx")}
    found["statuses"] = Counter()
    left = requests(seed, number)

    async def worker() -> None:
        for request in left:
            try:
                async with asyncio.timeout(HANG_S):
                    status, headers, body = await send(host, port, request)
            except TimeoutError:
                found["hangs"].append(request)
                continue
            found["statuses"][status] += 1
            read = request.method == "POST" and request.path in ROUTED
            if not status and (len(request.body) < SMALL_BODY or read):
                # an unread large body resets the connection, and usually the response is lost with it
                found["no answer"].append((request, body))
            if status >= 500:
                own = any(text in body for text in OURS)
                found["hook's own 5xx" if own else "vLLM's 5xx"].append((request, body))
            elif unasked(request, status, headers, body):
                found["base unasked"].append(request)

    await asyncio.gather(*(worker() for _ in range(parallel)))
    return found


def unasked(request: Hostile, status: int, headers: dict[str, str], body: bytes) -> bool:
    """Return whether the base has answered although it was not named and nothing was routed."""
    if status != 200 or request.method != "POST" or request.names_base:
        return False
    if request.path in UNROUTED:
        return b'"base"' in body
    return request.path in ROUTED and "x-fedrouter-adapter" not in headers and b'"base"' in body


async def send(host: str, port: int, request: Hostile) -> tuple[int, dict[str, str], bytes]:
    """Send one request on a new connection; return the response, read until the server closes it."""
    upgrade = "Upgrade" in request.headers
    lines = [f"{request.method} {request.path} HTTP/1.1", f"Host: {host}"]
    lines += [f"Connection: {'Upgrade' if upgrade else 'close'}", f"Content-Length: {len(request.body)}"]
    lines += [f"{name}: {value}" for name, value in request.headers.items()]
    async with connected(host, port) as (reader, writer):
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + request.body)
        with suppress(ConnectionError):
            await writer.drain()
        answer = b""
        with suppress(ConnectionError):
            answer = await reader.read(-1)
    while answer.startswith(b"HTTP/1.1 100"):
        answer = answer.partition(b"\r\n\r\n")[2]
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *rest = head.decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in rest if ": " in line)
    return int(first.split()[1]) if first else 0, headers, body


@asynccontextmanager
async def connected(host: str, port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def traffic(host: str, port: int) -> tuple[list[float], list[float]]:
    """Time normal requests alone and beside slow bodies and broken streams, alternately, in seconds."""
    alone: list[float] = []
    beside: list[float] = []
    await normal(host, port)
    for _ in range(BLOCKS):
        alone += await normal(host, port)
        slow = [asyncio.create_task(slow_body(host, port)) for _ in range(SLOW)]
        broken = asyncio.create_task(broken_streams(host, port, BROKEN // BLOCKS))
        beside += await normal(host, port)
        await broken
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
    return alone, beside


async def normal(host: str, port: int) -> list[float]:
    took: list[float] = []
    end = time.perf_counter() + BLOCK_S
    body = json.dumps({"model": "fedrouter", **NORMAL}).encode()

    async def client() -> None:
        while time.perf_counter() < end:
            started = time.perf_counter()
            status, _, answer = await send(host, port, Hostile("POST", CHAT, body, dict(JSON)))
            assert status == 200, answer
            took.append(time.perf_counter() - started)
            await asyncio.sleep(0.05)

    await asyncio.gather(*(client() for _ in range(2)))
    return took


JSON = {"Content-Type": "application/json"}


async def slow_body(host: str, port: int) -> None:
    async with connected(host, port) as (_, writer):
        writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode())
        writer.write(b"Content-Length: 1000000\r\n\r\n" + b'{"messages": "')
        while True:
            writer.write(b"x" * 100)
            await asyncio.sleep(1)


async def broken_streams(host: str, port: int, number: int) -> None:
    body = json.dumps({"model": "fedrouter", **NORMAL, "stream": True, "max_tokens": 64}).encode()
    for _ in range(number):
        async with connected(host, port) as (reader, writer):
            writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode())
            writer.write(f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            await reader.read(100)
        await asyncio.sleep(BLOCK_S / number / 2)


def p95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20)[-1]


def memory_mib(group: int) -> float:
    """Return the resident memory of all processes of a group, MiB."""
    total = 0
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):
            if int((path / "stat").read_text().rsplit(")", 1)[1].split()[2]) == group:
                total += int((path / "statm").read_text().split()[1])
    return total * 4096 / 2**20


def small_bundle(directory: Path) -> Bundle:
    settings = [
        f"{section}.{setting}"
        for section, values in zip(("data", "train", "cluster"), SMALL, strict=True)
        for setting in values
    ]
    return train(load_config(None, settings), directory / "run", Console(quiet=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, help="bundle to serve; default: train a small one")
    parser.add_argument("--log", type=Path, help="file for vLLM's output")
    parser.add_argument("--num", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parallel", type=int, default=8)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        bundle = arguments.bundle or small_bundle(Path(directory)).path
        log = arguments.log or Path(directory) / "server.log"
        options = Options(port=free_port(), vllm_args=["--disable-uvicorn-access-log"])
        _, command = prepare(bundle, options)
        with running(command, log, timeout_s=900) as process:
            done = asyncio.run(
                main(command.url, process.pid, arguments.num, arguments.seed, arguments.parallel)
            )
    sys.exit(not done)
