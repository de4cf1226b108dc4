"""A federation of real processes: superlink, sites and server, each in its directory, TLS on, on loopback."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
from processes import running

from fedrouter.builtin.tasks import TASKS, generate
from fedrouter.serve.checks import free_port

PLAN = """\
[train]
rounds = 2
steps = 2
batch_size = 4
[lora]
rank = 4
[cluster]
global = 4
"""
FEDROUTER = [sys.executable, "-m", "fedrouter"]
VARIABLES = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def rows(path: Path, tasks: Sequence[str], num: int, seed: int) -> Path:
    """Write a client's file."""
    records = [r for task in tasks for r in generate(task, "train", num, seed)]
    lines = [{"prompt": r.turns[-1].content, "completion": r.completion, "task": r.task} for r in records]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def fedrouter(*arguments: object, cwd: Path) -> str:
    """Run a command to its end."""
    done = subprocess.run(
        [*FEDROUTER, *map(str, arguments)], cwd=cwd, env=VARIABLES, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def processes_of(directory: Path) -> set[int]:
    """Return every process whose command or environment names the directory."""
    found = set()
    for pid in running() - {os.getpid()}:
        try:
            text = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue
        if str(directory).encode() in text:
            found.add(pid)
    return found


def wait_for(what: str, file: Path, timeout_s: float) -> None:
    """Wait until a line is in a file."""
    until = time.monotonic() + timeout_s
    while what not in (file.read_text() if file.exists() else ""):
        assert time.monotonic() < until, f"{what!r} is not in {file}: {file.read_text()[-2000:]}"
        time.sleep(0.05)


class Sites:
    """A federation in a directory: ``fed/`` is the server's, each site has one of its own."""

    def __init__(self, directory: Path, names: Sequence[str]):
        self.directory, self.names = directory, names
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        fleet, control = free_port(), free_port()
        fedrouter("federation", "init", "fed", "--port", fleet, "--control-port", control, cwd=directory)
        self.server = f"127.0.0.1:{fleet}"
        for i, name in enumerate(names):
            rows(directory / f"{name}.jsonl", (TASKS[i % 4], TASKS[(i + 1) % 4]), 60, i)
            self.admit(name)

    def admit(self, name: str) -> None:
        """Make a site, and put it into the roster."""
        data = f"../{name}.jsonl"
        made = fedrouter("client", "init", name, "--data", data, "--server", self.server, cwd=self.directory)
        with (self.directory / "fed" / "federation.toml").open("a") as roster:
            roster.write(made.splitlines()[-1] + "\n")
        (self.directory / name / "ca.crt").write_bytes((self.directory / "fed" / "ca.crt").read_bytes())

    def patience(self, **waiting: float) -> None:
        """Change how long the server waits."""
        file = self.directory / "fed" / "federation.toml"
        lines = file.read_text().splitlines()
        for key, value in waiting.items():
            lines = [f"{key} = {value}" if line.startswith(f"{key} =") else line for line in lines]
        file.write_text("\n".join(lines) + "\n")

    def serve(self) -> None:
        """Start the superlink."""
        self._start("superlink", "federation", "serve", "fed")
        wait_for("Uvicorn running", self.log("superlink"), 60)

    def start(self, name: str) -> None:
        """Start a site."""
        self._start(name, "client", "run", name)

    def train(self, out: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start the server of a run."""
        (self.directory / "plan.toml").write_text(PLAN)
        return self._start(out, "train", "plan.toml", "--federation", "fed", "--out", out, *arguments)

    def log(self, name: str) -> Path:
        """Return where a process writes."""
        return self.directory / f"{name}.log"

    def kill(self, name: str, alone: bool = False) -> set[int]:
        """End a process and all that it has started, as a machine that loses power; return those.

        Parameters
        ----------
        alone : end the process alone: what it has started must end by itself.
        """
        process = self.running.pop(name)
        started = {child.pid for child in psutil.Process(process.pid).children(recursive=True)}
        for pid in {process.pid} if alone else {process.pid, *started}:
            os.kill(pid, signal.SIGKILL)
        process.wait()
        return started

    def end(self) -> None:
        """End what still runs, sites first."""
        for name in sorted(self.running, key=lambda name: name == "superlink"):
            process = self.running[name]
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        self.running.clear()

    def _start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        log = self.log(name).open("ab")
        process = subprocess.Popen(
            [*FEDROUTER, *arguments], cwd=self.directory, env=VARIABLES, stdout=log, stderr=log
        )
        self.running[name] = process
        return process


@contextmanager
def federation(directory: Path, names: Sequence[str]) -> Iterator[Sites]:
    """Run a federation; whatever happens, none of its processes is left."""
    sites = Sites(directory, names)
    try:
        yield sites
    finally:
        sites.end()
        until = time.monotonic() + 20
        while (left := processes_of(directory)) and time.monotonic() < until:
            time.sleep(0.2)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert not left, "processes were left behind"
