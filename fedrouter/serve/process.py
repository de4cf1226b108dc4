"""A server process in a process group of its own: started, awaited, and gone with all its children."""

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

START = "FEDROUTER_START"  # the environment variable with the mark of this start, which its answers bear
GRACE_S = 20.0  # for a clean stop; vLLM needs about two seconds
ERROR_LINE = re.compile(r"\b\w*(?:Error|Exception|error|ERROR):\s+\S")
# Whoever started the server may be killed and clean nothing up: then this shell's standard input ends.
WATCHDOG = """
read -r _; kill -TERM "$1"
for _ in $(seq 20); do kill -0 "$1" || break; sleep 1; done
kill -KILL "-$1"
"""
NOT_THE_CAUSE = (
    "Engine core initialization failed",
    "WorkerProc initialization failed",
    "Application startup failed",  # uvicorn, after the line that says why
)


@dataclass(frozen=True, slots=True)
class Command:
    """What to start, and where it will answer."""

    argv: Sequence[str]
    env: Mapping[str, str]  # overrides this process's environment
    defaults: Mapping[str, str]  # overridden by it
    host: str
    port: int
    tls: bool = False
    ready_path: str = HEALTH  # answers 200 when it is ready; {"state": "failed"} when it never will be;
    # both with the mark of this start

    @property
    def url(self) -> str:
        """The server's address as clients on this machine write it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self.host, self.host)  # noqa: S104
        return f"http{'s' if self.tls else ''}://{f'[{host}]' if ':' in host else host}:{self.port}"


@contextmanager
def running(
    command: Command, log: Path | None = None, timeout_s: float | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a server, yield it once it is ready, stop it and every process of its group at the end.

    SIGTERM becomes KeyboardInterrupt meanwhile, so that stopping this process stops the server; so does its
    end, however it comes.

    Parameters
    ----------
    log : where the server's output goes; passed through to stderr without.
    timeout_s : seconds to wait for it to be ready; for ever without.

    Raises
    ------
    ServingError
        If it ends during start-up, says that it has failed, is not ready in time, or another one answers in
        its place.
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
            if early:  # came between two lines that belong together
                raise KeyboardInterrupt
            pump.start()
            deadline = time.monotonic() + timeout_s if timeout_s is not None else float("inf")
            while (state := _state(command, start)) != "ready":
                if state == "another":
                    raise ServingError(
                        f"another server answers at {command.url}, and not this one; choose another --port"
                    )
                where = f"{log} says more" if log else "its output above says more"
                if state == "failed":
                    time.sleep(0.2)  # for the line that says why
                    raise ServingError(f"{command.url} cannot be served: {_cause(tail)}; {where}")
                if process.poll() is not None:
                    pump.join(GRACE_S)
                    raise ServingError(
                        f"vLLM ended with exit code {process.returncode} before it was ready: "
                        f"{_cause(tail)}; {where}"
                    )
                if time.monotonic() > deadline:
                    raise ServingError(
                        f"{command.url}: vLLM was not ready after {timeout_s:.0f} s; raise the limit"
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
    """End the leader gracefully, then whatever is left of its group by force."""
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
    """Ask whether the server is "ready", has "failed", is still "starting", or is "another" one."""
    address = command.url.split("://")[1].rsplit(":", 1)[0].strip("[]")
    connection: http.client.HTTPConnection
    if command.tls:  # only asks whether it is up: whose certificate it is does not matter
        context = ssl._create_unverified_context()  # noqa: S323
        connection = http.client.HTTPSConnection(address, command.port, timeout=2, context=context)
    else:
        connection = http.client.HTTPConnection(address, command.port, timeout=2)
    try:
        connection.request("GET", command.ready_path)
        answer = connection.getresponse()
        told = answer.read(1000)
        if answer.status == 404:  # nothing of ours yet
            return "starting"
        if start.encode() not in told:
            return "another"
        return "ready" if answer.status == 200 else "failed" if b'"failed"' in told else "starting"
    except (OSError, http.client.HTTPException):
        return "starting"
    finally:
        connection.close()


def _pump(source: IO[bytes], log: Path | None, tail: deque[str]) -> None:
    """Copy the server's output until it ends; it must never block on us, whatever becomes of the copy."""
    copy: IO[bytes] | None = log.open("wb") if log else sys.stderr.buffer
    with source:
        for line in source:
            tail.append(line.decode(errors="replace").strip())
            try:
                if copy:
                    copy.write(line)
                    copy.flush()
            except OSError:  # nobody reads it any more
                copy = None
    if log and copy:
        copy.close()


def _cause(tail: Sequence[str]) -> str:
    """Return the line of a server's output that most likely says why it ended."""
    errors = [
        line for line in tail if ERROR_LINE.search(line) and not any(text in line for text in NOT_THE_CAUSE)
    ]
    return next(iter(errors[-1:] or [line for line in tail if line][-1:]), "it printed nothing")


def _interrupt(signum: int, _frame: FrameType | None) -> None:
    signal.signal(signum, signal.SIG_IGN)  # it is stopping: a second one must not break that off
    raise KeyboardInterrupt


@contextmanager
def _on_signals(handler: "signal._HANDLER", *signals: signal.Signals) -> Iterator[None]:
    """Handle signals differently for a while; only the main thread can, others leave them alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = [signal.signal(one, handler) for one in signals]
    try:
        yield
    finally:
        for one, previous in zip(signals, before, strict=True):
            signal.signal(one, previous)
