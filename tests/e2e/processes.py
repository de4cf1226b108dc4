"""Processes as the system sees them, and what one of them prints."""

import os
import queue
import signal
import subprocess
import threading
from collections.abc import Iterable
from pathlib import Path

START_S = 450.0  # half a minute on two idle cores


def put_all(output: Iterable[str], lines: queue.Queue[str]) -> None:
    for line in output:
        lines.put(line)


def first_lines(process: subprocess.Popen[str], num_lines: int) -> list[str]:
    """Read lines of a process's output until it ends or START_S have passed."""
    assert process.stdout is not None
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=put_all, args=(process.stdout, lines), daemon=True).start()
    found: list[str] = []
    while len(found) < num_lines and (process.poll() is None or not lines.empty()):
        try:
            found.append(lines.get(timeout=START_S if process.poll() is None else 1))
        except queue.Empty:
            break
    return found


def stat(pid: int) -> list[str] | None:
    """State, parent, process group … of a process (man proc_pid_stat), None when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def running() -> set[int]:
    pids = {int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()}
    return {pid for pid in pids if (found := stat(pid)) and found[0] != "Z"}


def in_group(leader: int) -> set[int]:
    """Return the processes that still run in a group; one that ended and waits for its parent does not."""
    return {pid for pid in running() if (found := stat(pid)) and int(found[2]) == leader}


def end(process: subprocess.Popen[str], group: set[int]) -> None:
    """Kill a process that is still there, and what is left of its children's groups."""
    if process.poll() is None:
        process.kill()
    for pid in group & running():
        os.kill(pid, signal.SIGKILL)


def group_of_children(parent: int) -> set[int]:
    """Return the processes in the groups that a process's children lead."""
    stats = {pid: found for pid in running() if (found := stat(pid))}
    leaders = {pid for pid, stat in stats.items() if int(stat[1]) == parent}
    return {pid for pid, stat in stats.items() if int(stat[2]) in leaders}
