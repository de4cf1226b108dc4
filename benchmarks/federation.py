"""Cost of a federation on many machines, with real processes on one: superlink, SuperNodes, sites, TLS.

    python benchmarks/federation.py exchange 4 16 64    # only sends bytes to the sites and back python
    benchmarks/federation.py rounds 4 16 64      # trains builtin:tiny: seconds per round, server memory
    python benchmarks/federation.py killed 30           # 30 rounds; kills a random site in every second one

``exchange`` measures the fixed cost of an exchange, which is a function call in one process. All sites
share this machine's cores: a SuperNode takes some 6 % of a core while it waits, and each message starts a
process that imports Flower. Needs Flower's environment: ``fedrouter federation setup``.
"""

import json
import multiprocessing
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
from common import report
from rich.console import Console
from safetensors.numpy import load_file

from fedrouter.builtin.tasks import TASKS, generate
from fedrouter.bundle import WEIGHTS, Bundle, find_base, find_embedder
from fedrouter.config import Config, LoraSettings, TrainSettings
from fedrouter.embed import routing_text
from fedrouter.models import load_base, load_tokenizer
from fedrouter.route import Router
from fedrouter.train.client.sft import AdapterTrainer
from fedrouter.train.flower.environment import start, stop
from fedrouter.train.flower.federation import Directory, load_directory, make_directory, nodes
from fedrouter.train.flower.transport import connected
from fedrouter.types import Record

BODY = 400_000  # bytes; about one adapter of builtin:tiny
QUIET = Console(quiet=True)


class Echo:
    """A resident client that answers immediately with the body it received."""

    def answer(self, body: bytes) -> bytes:
        return body


def write_rows(file: Path, i: int) -> None:
    """Write the rows of site ``i``: two tasks, 60 rows each."""
    records = [r for t in (TASKS[i % 4], TASKS[(i + 1) % 4]) for r in generate(t, "train", 60, i)]
    rows = [{"prompt": r.turns[-1].content, "completion": r.completion, "task": r.task} for r in records]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def live(directory: Path, name: str, hollow: bool) -> None:
    """Run one site until interrupted; with ``hollow`` it only echoes."""
    from fedrouter.train.client.resident import Resident
    from fedrouter.train.client.site import load_site
    from fedrouter.train.federate import opened_client
    from fedrouter.train.flower.site import run_site

    os.setpgrp()
    site = load_site(directory / name)
    resident: Any = Echo() if hollow else Resident(
        site, lambda config, secret: opened_client(site, config, secret, QUIET), QUIET
    )  # fmt: skip
    try:
        run_site(site, resident, QUIET)
    except KeyboardInterrupt:
        return


class Sites:
    """Sites as processes, forked after their imports, so that 64 of them fit into memory."""

    def __init__(self, directory: Path, names: Sequence[str], hollow: bool):
        self.directory, self.names, self.hollow = directory, names, hollow
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["fedrouter.train.federate", "fedrouter.train.flower.site"])
        self.processes: dict[str, BaseProcess] = {}
        for name in names:
            self.start(name)

    def start(self, name: str) -> None:
        process = self._context.Process(target=live, args=(self.directory, name, self.hollow))
        process.start()
        self.processes[name] = process

    def kill(self, name: str) -> None:
        """Kill a site and all its processes, like a power failure."""
        process = self.processes.pop(name)
        assert process.pid is not None
        for pid in [process.pid, *children(process.pid)]:
            os.kill(pid, signal.SIGKILL)
        process.join()

    def end(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            process.join(30)
            if process.is_alive():
                process.kill()


def children(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def memory_mib(pids: Sequence[int]) -> float:
    """Return the proportional set size of processes, MiB."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


@contextmanager
def federation(num: int, hollow: bool) -> Iterator[tuple[Directory, Sites, int]]:
    """Create and serve a federation of ``num`` sites; yield it, the sites and the superlink's pid."""
    from fedrouter.serve.checks import free_port
    from fedrouter.train.client.site_files import make_site

    with tempfile.TemporaryDirectory(prefix="fr-") as scratch:
        root = Path(scratch)
        fleet, control = free_port(), free_port()
        make_directory(root / "fed", "127.0.0.1", fleet, control)
        names = [f"site-{i:02d}" for i in range(num)]
        with (root / "fed" / "federation.toml").open("a") as roster:
            for i, name in enumerate(names):
                write_rows(root / f"{name}.jsonl", i)
                _, public = make_site(root / name, name, f"../{name}.jsonl", f"127.0.0.1:{fleet}")
                roster.write(f'{name} = "{public}"\n')
                (root / name / "ca.crt").write_bytes((root / "fed" / "ca.crt").read_bytes())
        directory = load_directory(root / "fed")
        with (root / "superlink.log").open("w") as log:
            superlink = start(directory.superlink(), directory.home, log)
            try:
                while "Uvicorn running" not in (root / "superlink.log").read_text():
                    time.sleep(0.5)
                nodes(directory, change=True)
                sites = Sites(root, names, hollow)
                try:
                    while sum(node["status"] == "online" for node in nodes(directory).values()) < num:
                        time.sleep(2)
                    yield directory, sites, superlink.pid
                finally:
                    sites.end()
            finally:
                stop(superlink)


def exchanges(num: int) -> dict[str, Any]:
    """Measure exchanges in which the server sends bytes to all sites and waits for all answers."""
    with federation(num, hollow=True) as (directory, _, superlink), connected(directory) as transport:
        began = time.monotonic()
        while len(transport.nodes()) < num:
            assert time.monotonic() - began < 900, f"{len(transport.nodes())} of {num} sites connected"
            time.sleep(0.5)
        start_s = time.monotonic() - began
        seconds = []
        for _ in range(max(3, 48 // num)):
            began = time.monotonic()
            for node in transport.nodes():
                transport.send(node, os.urandom(BODY))
            for _ in range(num):
                arrived = transport.receive(120)
                assert arrived is not None
                assert not arrived.error, arrived.error
            seconds.append(time.monotonic() - began)
        memory = memory_mib([superlink, *children(superlink)])
    return {
        "sites": num,
        "seconds": round(statistics.median(seconds), 2),
        "longest": round(max(seconds), 2),
        "superlink_mib": round(memory),
        "start_s": round(start_s, 1),
    }


def trained(num: int, rounds: int, disturb: Callable[[Path, Sites], None] | None = None) -> dict[str, Any]:
    """Train with Flower; return seconds per round, peak memory, and the loss on test rows."""
    from fedrouter.train.flower.run import train_over_flower

    with federation(num, hollow=False) as (directory, sites, superlink):
        root = directory.path.parent
        toml = directory.path / "federation.toml"
        toml.write_text(toml.read_text().replace("round_s = 3600.0", "round_s = 60.0"))
        plan = root / "plan.toml"
        plan.write_text(
            f"[train]\nrounds = {rounds}\nsteps = 2\nbatch_size = 4\nvalidation = 0.1\n[lora]\nrank = 4\n"
            "[cluster]\nglobal = 4\n"
        )
        console = Console(file=(root / "train.log").open("w"), width=200)
        peaks, done = [], threading.Event()

        def watch() -> None:
            while not done.wait(1.0):
                peaks.append(memory_mib([superlink, *children(superlink)]))

        threads = [threading.Thread(target=watch)]
        if disturb is not None:
            threads.append(threading.Thread(target=disturb, args=(root / "train.log", sites), daemon=True))
        for thread in threads:
            thread.start()
        try:
            bundle = train_over_flower(plan, [], root / "out", directory.path, console)
        finally:
            done.set()
            threads[0].join()
        console.file.flush()
        lines = (root / "train.log").read_text().splitlines()
        seconds = [float(line.split(" up, ")[1].split(" s")[0]) for line in lines if " MiB down" in line]
        loss = test_loss(bundle)
        metrics = [json.loads(line) for line in (root / "out" / "metrics.jsonl").read_text().splitlines()]
    return {
        "sites": num,
        "round_s": round(statistics.median(seconds), 2),
        "superlink_mib": round(max(peaks, default=0)),
        "refused": sum(len(line.get("refused") or {}) for line in metrics),
        "loss": round(loss, 4),
    }


def test_loss(bundle: Bundle) -> float:
    """Return the mean loss of the built-in tasks' test rows, with the adapters that the router picks."""
    base = find_base(bundle)
    lora = LoraSettings(rank=bundle.rank, alpha=2 * bundle.rank)
    trainer = AdapterTrainer(
        load_base(base, "float32", "cpu"), load_tokenizer(base), lora, TrainSettings(), 0
    )
    embedder, router = find_embedder(bundle, base), Router(bundle, "nearest")
    rows: dict[str, list[Record]] = defaultdict(list)
    for task in TASKS:
        records = generate(task, "test", 60, 0)
        vectors = embedder.embed([routing_text(record.turns) for record in records])
        for record, decision in zip(records, router.route(vectors), strict=True):
            rows[decision.model].append(record)
    losses = []
    for name, records in rows.items():
        adapter = load_file(bundle.adapter_paths[name] / WEIGHTS)
        losses += [trainer.loss(adapter, trainer.tokenise([record]))[0] for record in records]
    return statistics.mean(losses)


def in_process(num: int, rounds: int) -> float:
    """Return the seconds per round of the same federation in one process."""
    from fedrouter.train.run import train

    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        clients = {}
        for i in range(num):
            file = root / f"site-{i:02d}.jsonl"
            write_rows(file, i)
            clients[file.stem] = str(file)
        config = Config.model_validate(
            {
                "train": {"rounds": rounds, "steps": 2, "batch_size": 4, "validation": 0.1},
                "lora": {"rank": 4},
                "cluster": {"global": 4},
                "data": {"clients": clients},
            }
        )
        train(config, root / "out", QUIET)
        lines = [json.loads(line) for line in (root / "out" / "metrics.jsonl").read_text().splitlines()]
    times = sorted({line["round"]: line["time"] for line in lines}.items())
    return float(times[-1][1] - times[0][1]) / max(len(times) - 1, 1)


def kill_every_second_round(log: Path, sites: Sites) -> None:
    """Kill and restart a random site in every second round."""
    draw, done = random.Random(0), 0
    while True:
        num = log.read_text().count(" MiB down") if log.exists() else 0
        if num > done and num % 2:
            name = draw.choice(sorted(sites.processes))
            sites.kill(name)
            sites.start(name)
        done = max(done, num)
        time.sleep(0.3)


def num_rounds(num: int) -> int:
    """Return few rounds for many sites, which share this machine's cores."""
    return 4 if num <= 16 else 2


def main() -> None:
    """Measure and report."""
    mode, numbers = sys.argv[1], [int(number) for number in sys.argv[2:]]
    if mode == "exchange":
        found = [exchanges(num) for num in numbers]
    elif mode == "rounds":
        found = [
            {**trained(num, num_rounds(num)), "in_process_s": round(in_process(num, num_rounds(num)), 2)}
            for num in numbers
        ]
    else:
        found = [
            {"what": "undisturbed", **trained(4, numbers[0])},
            {"what": "a site killed every second round", **trained(4, numbers[0], kill_every_second_round)},
        ]
    report(f"federation_{mode}", {"results": found}, rows(mode, found))


def rows(mode: str, found: Sequence[dict[str, Any]]) -> list[tuple[str, str, str, bool | None]]:
    """Return the table of measured and wanted values."""
    table: list[tuple[str, str, str, bool | None]] = []
    for row in found:
        sites, memory = f"{row['sites']} sites", f"{row['superlink_mib']} MiB"
        if mode == "exchange":
            seconds, fits = row["seconds"], row["seconds"] <= 5
            table += [
                (f"{sites}: seconds per exchange", f"{seconds}", "≤ 5", fits),
                (f"{sites}: longest", f"{row['longest']}", "", None),
            ]
        elif mode == "rounds":
            extra = row["round_s"] - row["in_process_s"]
            table += [
                (f"{sites}: seconds per round", f"{row['round_s']}", "", None),
                (f"{sites}: in one process", f"{row['in_process_s']}", "", None),
                (f"{sites}: more, as a share of 30 s", f"{extra / 30:.3f}", "≤ 0.1", extra <= 3),
            ]
        else:
            table += [
                (f"{row['what']}: seconds per round", f"{row['round_s']}", "", None),
                (f"{row['what']}: updates missing", f"{row['refused']}", "", None),
                (f"{row['what']}: loss on test rows", f"{row['loss']}", "", None),
            ]
        table.append((f"{row.get('what', sites)}: the superlink's memory", memory, "", None))
    if mode == "killed":
        ratio = found[1]["loss"] / found[0]["loss"]
        table.append(("loss, killed ÷ undisturbed", f"{ratio:.4f}", ".98 to 1.02", 0.98 <= ratio <= 1.02))
    return table


if __name__ == "__main__":
    main()
