"""Costs of the console, the decision log and the report, with the built-in base.

python benchmarks/console.py                            first trains a small bundle; five minutes
python benchmarks/console.py --bundle DIR --run RUN     uses existing ones; the report is of RUN

The page runs in a real Chromium. The log's cost is the CPU time of a line, which other load disturbs less
than request rates. It is compared with the time per routed request that benchmarks/serving.py measured with a
real vLLM, and, as a much stricter bound, with that of the middleware before an application that answers at
once.
"""
# ruff: noqa: E402

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, report
from rich.console import Console

sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "serve")]

from browser import Page, chromium
from stub import StubApp, serving

from fedrouter.builtin.tasks import TASKS, generate
from fedrouter.bundle import Bundle, load_bundle
from fedrouter.config_file import load_config
from fedrouter.decide import NO_TEXT
from fedrouter.report import write_report
from fedrouter.serve.access import Access, Caller
from fedrouter.serve.decision_log import DecisionLog, LogOptions
from fedrouter.serve.journal import Journal, _entry
from fedrouter.serve.limits import Limits
from fedrouter.serve.middleware import FedRouterMiddleware
from fedrouter.serve.paths import CHAT
from fedrouter.serve.routing import Routing, load_routing
from fedrouter.serve.settings import Settings
from fedrouter.train.run import train

SMALL = ["data.num_clients=4", "data.num_per_task=60", "train.rounds=2", "train.steps=4", "cluster.global=4"]
PROMPTS = [record.turns[-1].content for task in TASKS for record in generate(task, "test", 64, seed=5)]
WATCH = """
const [text, done] = [arguments[0], arguments[arguments.length - 1]];
const box = document.getElementById("prompt"), where = document.getElementById("where");
let before = where.textContent;
new MutationObserver((_, observer) => {
  if (!where.querySelector(".verdict") || where.textContent === before) return;
  observer.disconnect();
  requestAnimationFrame(() => setTimeout(() => done(performance.now() - began)));
}).observe(where, { childList: true, subtree: true });
box.value = text;
box.dispatchEvent(new Event("input"));
const began = performance.now();
"""


SHOWN = """
const shown = performance.getEntriesByType("resource").filter((one) => !one.name.endsWith("icon.svg"));
const page = performance.getEntriesByType("navigation")[0];
return Math.max(page.domContentLoadedEventEnd, ...shown.map((one) => one.responseEnd));
"""


def first_views(url: str, number: int) -> tuple[list[float], int]:
    """Return the times until everything visible has loaded, ms from entering the URL, and a view's bytes."""
    took, size = [], 0
    with chromium() as driver:
        page = Page(driver, url)
        for _ in range(number):
            driver.execute_cdp_cmd("Network.clearBrowserCache", {})
            driver.get_log("performance")
            page.driver.get("about:blank")
            page.driver.get(f"{url}/fedrouter/")
            page.shows("#where", "Nothing is typed yet")
            took.append(page.js(SHOWN))
            events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
            size = sum(
                event["params"]["encodedDataLength"]
                for event in events
                if event["method"] == "Network.loadingFinished"
            )
    return took, size


def decisions(url: str, number: int) -> list[float]:
    """Return the times from the last keystroke until a new decision is painted, ms."""
    with chromium() as driver:
        page = Page(driver, url).open()
        page.shows("#where", "Nothing is typed yet")
        driver.set_script_timeout(60)
        return [driver.execute_async_script(WATCH, f"{PROMPTS[i % len(PROMPTS)]} {i}") for i in range(number)]


async def throughput(routing: Routing, log: LogOptions | None, number: int) -> float:
    """Return routed requests per CPU second through the middleware, 16 at a time."""
    app = StubApp(list(routing.bundle.adapter_paths))

    async def quick(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or scope["path"] != CHAT:
            await app(scope, receive, send)
        else:
            await receive()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"{}"})

    settings = Settings(bundle=routing.bundle.path, log=log)
    hook = FedRouterMiddleware(quick, lambda: settings, lambda _: routing, lambda _: Access())
    started, end = asyncio.Event(), asyncio.Event()
    first = iter([{"type": "lifespan.startup"}])

    async def lifespan_receive() -> Any:
        for message in first:
            return message
        await end.wait()
        return {"type": "lifespan.shutdown"}

    async def lifespan_send(_message: Any) -> None:
        started.set()

    lifespan = asyncio.create_task(hook({"type": "lifespan"}, lifespan_receive, lifespan_send))
    await started.wait()
    left = iter(range(number))

    async def client() -> None:
        for i in left:
            messages = [{"role": "user", "content": PROMPTS[i % len(PROMPTS)]}]
            body = json.dumps({"model": "fedrouter", "messages": messages}).encode()
            bodies = iter([{"type": "http.request", "body": body, "more_body": False}])

            async def receive(bodies: Any = bodies) -> Any:
                return next(bodies, {"type": "http.disconnect"})

            async def send(message: Any) -> None:
                assert message.get("status", 200) == 200

            headers = [(b"content-type", b"application/json")]
            scope = {"type": "http", "method": "POST", "path": CHAT, "root_path": "", "headers": headers}
            await hook(scope, receive, send)

    began = time.process_time()
    await asyncio.gather(*(client() for _ in range(16)))
    end.set()
    await lifespan  # flushes the log
    return number / (time.process_time() - began)


def line_us(bundle: Bundle, options: LogOptions, number: int = 2000) -> float:
    """Return the CPU time of one line, from the request to the file, in microseconds."""
    journal = Journal(DecisionLog(options))
    routing = load_routing(Settings(bundle=bundle.path))
    vectors = {PROMPTS[0]: np.random.default_rng(0).normal(size=bundle.embedder.dim).astype(np.float32)}
    decisions, asked = [NO_TEXT], [[PROMPTS[0]]]
    entry = _entry("0" * 32, 0, time.time(), Caller(), routing, asked[0], decisions[0], vectors, 1.0)
    began = time.process_time()
    for i in range(number):
        journal._write([entry], asked, vectors)
        if i % 16 == 0:
            time.sleep(0.064)  # 250 lines per second, about as many requests as a core can route
    while journal._log is not None and journal._log._lines.qsize():
        time.sleep(0.001)
    spent = time.process_time() - began
    journal.close()
    routing.close()
    return spent / number * 1e6


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--run", type=Path)
    parser.add_argument(
        "--rounds", type=int, default=8, help="throughput measurements with and without the log"
    )
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        bundle = options.bundle or (options.run / "bundle" if options.run else None)
        if bundle is None:
            bundle = train(load_config(None, SMALL), out / "run", Console(quiet=True)).path
        run = options.run or bundle.parent

        def make() -> Routing:
            limits = Limits(max_queue=10_000, routing_timeout_s=60)
            return load_routing(Settings(bundle=bundle, limits=limits))

        with serving(make) as url:
            views, size = first_views(url, 15)
            shown = decisions(url, 60)
        kinds: dict[str, Callable[[int], LogOptions | None]] = {
            "without": lambda _: None,
            "log": lambda i: LogOptions(out / f"log-{i}.jsonl"),
            "log, prompts, vectors": lambda i: LogOptions(out / f"all-{i}.jsonl", prompts=True, vectors=True),
        }
        rates: dict[str, list[float]] = {kind: [] for kind in kinds}
        asyncio.run(throughput(make(), None, 256))  # warm
        for i in range(options.rounds):
            for kind, log in list(kinds.items()) if i % 2 else reversed(list(kinds.items())):
                rates[kind].append(asyncio.run(throughput(make(), log(i), 512)))
        lines = {kind: line_us(load_bundle(bundle), own) for kind, log in kinds.items() if (own := log(99))}
        page = write_report(run).stat().st_size if (run / "config.json").exists() else 0
        num_clusters = len(load_bundle(bundle).clusters)
    bare = statistics.median(rates["without"])
    costs = {kind: us / 1e6 * bare for kind, us in lines.items()}
    served = json.loads((ROOT / "benchmarks" / "results" / "serving.json").read_text())
    real = lines["log"] / 1e6 * statistics.median(served["rates"]["routed"])
    view, decision = statistics.median(views), statistics.median(shown)
    decision_p95 = sorted(shown)[int(0.95 * len(shown))]
    rows: list[tuple[str, str, str, bool | None]] = [
        ("console's first view, bytes", f"{size:,}", "≤ 100,000", size <= 100_000),
        ("the same, ms until everything has loaded, median", f"{view:.0f}", "≤ 200", view <= 200),
        ("decision painted after typing stops, ms, median", f"{decision:.0f}", "≤ 150", decision <= 150),
        ("the same, p95", f"{decision_p95:.0f}", "≤ 150", decision_p95 <= 150),
        ("routed requests per CPU second, no log, 16 at a time", f"{bare:.0f}", "", None),
        ("CPU time of a line of the log, µs", f"{lines['log']:.0f}", "", None),
        ("its share of a routed request's time, real vLLM", f"{real:.2%}", "≤ 1 %", real <= 0.01),
        ("its share of the middleware's time", f"{costs['log']:.2%}", "", None),
        ("the same with prompts and vectors", f"{costs['log, prompts, vectors']:.2%}", "", None),
        ("report, bytes", f"{page:,}", "≤ 5,000,000", page <= 5_000_000 if page else None),
    ]
    results = {
        "first_view_ms": [round(ms, 1) for ms in views],
        "first_view_bytes": size,
        "decision_ms": [round(ms, 1) for ms in shown],
        "rates": {kind: [round(rate, 1) for rate in values] for kind, values in rates.items()},
        "line_us": {kind: round(us, 1) for kind, us in lines.items()},
        "report_bytes": page,
        "task_clusters": num_clusters,
        "load_average": [round(load_before, 2), round(os.getloadavg()[0], 2)],
    }
    report("console", results, rows)


if __name__ == "__main__":
    main()
