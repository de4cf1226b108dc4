"""Minutes of mixed traffic, with garbage in every twentieth request: the server's statuses and memory."""

import asyncio
import json
import random
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

CLIENTS, HANG_S = 16, 60.0
JSON = {"content-type": "application/json"}
GARBAGE: list[tuple[str, bytes, dict[str, str]]] = [
    ("/v1/chat/completions", b'{"model": "fedrouter", "messages": [', {}),
    ("/v1/completions", b'{"model": "fedrouter", "prompt": "\xff\xfe"}', {}),
    ("/v1/completions", b'{"model": "fedrouter", "prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", {}),
    ("/v1/chat/completions", b'{"model": "fedrouter", "model": "nobody", "messages": []}', {}),
    ("/v1/completions", b'{"model": "fedrouter", "prompt": {"a": 1}}', {}),
    ("/v1/completions", b'{"model": "fedrouter", "prompt": [1, 99999999999999999999]}', {}),
    ("/v1/completions", b'{"model": "fedrouter", "prompt_embeds": "AAAA"}', {}),
    ("/v1/chat/completions", b'{"model": "fedrouter", "messages": [{"role": 7, "content": null}]}', {}),
    ("/v1/responses", b'{"model": "fedrouter", "input": 7}', {}),
    ("/v1/messages", b'{"model": "fedrouter", "max_tokens": -1, "messages": "hello"}', {}),
    ("/v1/completions", b'{"model": "fedrouter", "prompt": "a headline"}', {"x-fedrouter-client": "nobody"}),
    ("/v1/fedrouter/route", b"[]", {}),
    ("/v1/fedrouter/reload", b'{"bundle": "../../etc"}', {}),
    ("/v1/load_lora_adapter", b'{"lora_name": "evil", "lora_path": "/etc"}', {}),
    ("/v1/completions", b"\x00" * 1000, {"content-type": "text/plain"}),
]


def wanted(random_: random.Random, prompts: list[str], adapters: list[str]) -> tuple[str, dict[str, Any]]:
    """Return a path and body that a client might send."""
    first, second, third = random_.sample(prompts, 3)
    model = random_.choice(["fedrouter"] * 6 + ["base", *adapters[:1]])
    short = {"model": model, "max_tokens": random_.randint(1, 12)}
    turn = [{"role": "user", "content": first}]
    turns = [*turn, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "shorter"}]
    stream = {"stream": random_.random() < 0.5}
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {**short, **stream, "messages": turn}),
        ("/v1/chat/completions", {**short, **stream, "messages": turns}),
        ("/v1/completions", {**short, **stream, "prompt": first}),
        ("/v1/completions", {**short, "prompt": [first, second, third]}),
        ("/v1/messages", {**short, **stream, "messages": turn}),
        ("/v1/responses", {"model": model, **stream, "input": first, "max_output_tokens": 12}),
        ("/tokenize", {"model": model, "prompt": first}),
        ("/v1/fedrouter/route", {"messages": turns}),
    ]
    return random_.choice(kinds)


async def mix(url: str, pid: int, minutes: float, prompts: list[str], adapters: list[str]) -> dict[str, Any]:
    """Send requests from ``CLIENTS`` concurrent clients; return statuses, failures and memory over time.

    "memory_mib" is of all processes, "hook_mib" of the process with the middleware, without vLLM's engine.
    Some clients disconnect before the response. All runs send the same requests, at different times.
    """
    statuses: dict[str, Counter[str]] = {"wanted": Counter(), "garbage": Counter()}
    failures: list[str] = []
    began, memory, hook = time.monotonic(), list[float](), list[float]()
    end = began + 60 * minutes
    async with httpx.AsyncClient(base_url=url, timeout=HANG_S) as client:

        async def ask(number: int) -> None:
            random_, count = random.Random(number), number
            while time.monotonic() < end:
                count += 1
                if count % 20 == 0:
                    kind, (path, body, headers) = "garbage", random_.choice(GARBAGE)
                else:
                    kind, headers = "wanted", {}
                    path, payload = wanted(random_, prompts, adapters)
                    body = json.dumps(payload).encode()
                disconnects = kind == "wanted" and random_.random() < 0.03
                try:
                    posted = client.post(path, content=body, headers=JSON | headers)
                    response = await asyncio.wait_for(posted, 0.05 if disconnects else HANG_S)
                    status = str(response.status_code)
                    if status == "200" and re.search(r'"error": ?\{', response.text):
                        status = "200 with an error"
                except TimeoutError:
                    status = "left" if disconnects else "hung"
                except httpx.HTTPError as error:
                    status = type(error).__name__
                statuses[kind][status] += 1
                expected = ("200", "left") if kind == "wanted" else ("400", "404", "415", "422")
                if status not in expected and len(failures) < 20:
                    failures.append(f"{kind} {path} {body[:80]!r}: {status}")

        async def watch() -> None:
            while time.monotonic() < end:
                memory.append(resident_mib(pid))
                hook.append(resident_mib(pid, alone=True))
                await asyncio.sleep(5)

        await asyncio.gather(watch(), *(ask(number) for number in range(CLIENTS)))
        healthy = (await client.get("/v1/fedrouter/ready")).status_code == 200
    return {
        "minutes": minutes,
        "statuses": {kind: dict(sorted(found.items())) for kind, found in statuses.items()},
        "failures": failures,
        "healthy": healthy,
        "memory_mib": memory,
        "hook_mib": hook,
    }


def resident_mib(leader: int, alone: bool = False) -> float:
    """Return the MiB of resident memory, shared pages included, of a process group or only its leader."""
    total = 0
    for status in Path("/proc").glob(f"{leader if alone else '[0-9]*'}/stat"):
        try:
            fields = status.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == leader:
            total += int(fields[21])
    return round(total * 4096 / 2**20, 1)
