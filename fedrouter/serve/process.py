"""Run a server in a process group of its own, and stop it with all its children."""

import http.client
import os
import re
import secrets
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from fedrouter.errors import ServingError
from fedrouter.serve.paths import HEALTH

START = "FEDROUTER_START"  # environment variable with a nonce, which responses of the ready path repeat
GRACE_S = 20.0  # for a clean stop; vLLM takes about two seconds
ERROR_LINE = re.compile(r"\b\w*(?:Error|Exception|error|ERROR):\s+\S")
# This process may be killed before it can stop the server: then this shell's standard input ends.
WATCHDOG = """
read -r _; kill -TERM "$1"
for _ in $(seq 20); do kill -0 "$1" || break; sleep 1; done
kill -KILL "-$1"
"""
NOT_THE_CAUSE = (
    "Engine core initialization failed",
    "WorkerProc initialization failed",
    "Application startup failed",  # uvicorn prints it after the cause
)


@dataclass(frozen=True, slots=True)
class Command:
    """What to start, and its address."""

    argv: Sequence[str]
    env: Mapping[str, str]  # overrides this process's environment
    defaults: Mapping[str, str]  # overridden by this process's environment
    host: str
    port: int
    tls: bool = False
    ready_path: str = HEALTH
    # returns 200 when the server is ready and {"state": "failed"} if it never will be, both with the nonce

    @property
    def url(self) -> str:
        """The server's address for clients on this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self.host, self.host)  # noqa: S104
        return f"http{'s' if self.tls else ''}://{f'[{host}]' if ':' in host else host}:{self.port}"


@contextmanager
def running(
    command: Command, log: Path | None = None, timeout_s: float | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a server, yield it once it is ready, and stop all processes of its group at the end.

    SIGTERM raises KeyboardInterrupt meanwhile, so that it stops the server too. If this process is killed, a
    watchdog stops the server.

    Parameters
    ----------
    log : file for the server's output; None: stderr.
    timeout_s : longest wait until the server is ready, seconds; None: no limit.

    Raises
    ------
    ServingError
        If the server ends during start-up, reports failure or is not ready in time, or if another server
        answers at its address.
    """
    start, early = secrets.token_hex(16), list[int]()
    with _on_signals(_interrupt, signal.SIGTERM):
        with _on_signals(lambda number, _frame: early.append(number), signal.SIGINT, signal.SIGTERM):
            process = subprocess.Popen(
                command.argv,
                env={**command.defaults, **os.environ, **command.env, START: start},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            watchdog = subprocess.Popen(
                ["/bin/sh", "-c", WATCHDOG, "fedrouter-watchdog", str(process.pid)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        tail: deque[str] = deque(maxlen=300)
        pump = threading.Thread(target=_pump, args=(process.stdout, log, tail), daemon=True)
        try:
            if early:  # a signal came before the server could be stopped
                raise KeyboardInterrupt
            pump.start()
            deadline = time.monotonic() + timeout_s if timeout_s is not None else float("inf")
            while (state := _state(command, start)) != "ready":
                if state == "another":
                    raise ServingError(f"another server answers at {command.url}; choose another --port")
                more = f"{log} says more" if log else "its output above says more"
                if state == "failed":
                    time.sleep(0.2)  # until the cause is in the output
                    raise ServingError(f"{command.url} cannot be served: {_cause(tail)}; {more}")
                if process.poll() is not None:
                    pump.join(GRACE_S)
                    raise ServingError(
                        f"vLLM ended with exit code {process.returncode} before it was ready: "
                        f"{_cause(tail)}; {more}"
                    )
                if time.monotonic() > deadline:
                    raise ServingError(
                        f"{command.url}: vLLM was not ready after {timeout_s:.0f} s; raise the timeout"
                    )
                time.sleep(0.2)
            yield process
        finally:
            with _on_signals(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM):
                _stop(process)
                watchdog.kill()
                watchdog.communicate()
                pump.join(GRACE_S)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop the group's leader gracefully, then kill what is left of the group."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    for attempt in range(50):  # its children need a moment to follow
        try:
            os.killpg(process.pid, signal.SIGKILL if attempt >= 10 or process.poll() is None else 0)
        except ProcessLookupError:
            break
        process.poll()
        time.sleep(0.1)


def _state(command: Command, start: str) -> str:
    """Return the server's state: "ready", "failed", "starting", or "another" if its nonce differs."""
    address = command.url.split("://")[1].rsplit(":", 1)[0].strip("[]")
    connection: http.client.HTTPConnection
    if command.tls:  # the nonce identifies the server; no secret is sent
        context = ssl._create_unverified_context()  # noqa: S323
        connection = http.client.HTTPSConnection(address, command.port, timeout=2, context=context)
    else:
        connection = http.client.HTTPConnection(address, command.port, timeout=2)
    try:
        connection.request("GET", command.ready_path)
        answer = connection.getresponse()
        body = answer.read(1000)
        if answer.status == 404:  # the hook is not there yet
            return "starting"
        if start.encode() not in body:
            return "another"
        return "ready" if answer.status == 200 else "failed" if b'"failed"' in body else "starting"
    except (OSError, http.client.HTTPException):
        return "starting"
    finally:
        connection.close()


def _pump(source: IO[bytes], log: Path | None, tail: deque[str]) -> None:
    """Copy the server's output; keep reading when the copy fails, so that the server never blocks."""
    copy: IO[bytes] | None = log.open("wb") if log else sys.stderr.buffer
    with source:
        for line in source:
            tail.append(line.decode(errors="replace").strip())
            try:
                if copy:
                    copy.write(line)
                    copy.flush()
            except OSError:  # closed pipe or full disk
                copy = None
    if log and copy:
        copy.close()


def _cause(tail: Sequence[str]) -> str:
    """Return the output line that most likely names the cause of the server's end."""
    errors = [
        line for line in tail if ERROR_LINE.search(line) and not any(text in line for text in NOT_THE_CAUSE)
    ]
    return next(iter(errors[-1:] or [line for line in tail if line][-1:]), "it printed nothing")


def _interrupt(signum: int, _frame: FrameType | None) -> None:
    signal.signal(signum, signal.SIG_IGN)  # a second signal must not interrupt the stop
    raise KeyboardInterrupt


@contextmanager
def _on_signals(handler: "signal._HANDLER", *signals: signal.Signals) -> Iterator[None]:
    """Replace signal handlers while the block runs; does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = [signal.signal(number, handler) for number in signals]
    try:
        yield
    finally:
        for number, previous in zip(signals, before, strict=True):
            signal.signal(number, previous)
