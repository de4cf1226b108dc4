"""A server's process group, with small Python servers in vLLM's place."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedrouter.bundle import Bundle
from fedrouter.errors import ServingError
from fedrouter.serve import launch, process
from fedrouter.serve.checks import free_port
from fedrouter.serve.launch import running_server, serve
from fedrouter.serve.process import Command, running

SERVER = """
import http.server, os, signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
        self.wfile.write(os.environ["FEDROUTER_START"].encode())
    def log_message(self, *args): pass
signal.signal(signal.SIGTERM, signal.SIG_IGN if "deaf" in sys.argv else lambda *_: sys.exit(0))
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""

FAILED = b'{"state": "failed"}'


def command(script: str, *arguments: str) -> Command:
    port = free_port()
    return Command([sys.executable, "-c", script, str(port), *arguments], {}, {}, "127.0.0.1", port)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie that nobody reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("kind", ["polite", "deaf"])
def test_nothing_is_left_behind(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "GRACE_S", 0.5)
    log = tmp_path / "log"
    with running(command(SERVER, kind), log, timeout_s=20) as server:
        child = int(log.read_text().split()[1])
        assert alive(server.pid)
        assert alive(child)
        assert os.getpgid(child) == server.pid != os.getpgid(0)
    assert not alive(server.pid)
    assert not alive(child)


def test_an_error_inside_stops_the_server_too(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), running(command(SERVER), tmp_path / "log", timeout_s=20) as server:
        raise ZeroDivisionError
    assert not alive(server.pid)


def test_a_server_that_dies_says_why(tmp_path: Path) -> None:
    script = (
        "import sys; print('loading'); print('(EngineCore) ValueError: head size 48 is not known'); "
        "print('RuntimeError: Engine core initialization failed. See root cause above.'); sys.exit(3)"
    )
    with (
        pytest.raises(
            ServingError, match=r"exit code 3.*ValueError: head size 48 is not known.*log says more"
        ),
        running(command(script), tmp_path / "log", timeout_s=20),
    ):
        pass
    assert "loading" in (tmp_path / "log").read_text()


def test_an_application_that_does_not_start_says_why(tmp_path: Path) -> None:
    script = (
        "print('ERROR:    FedRouter: one: embedder base is not the one used in training'); "
        "print('ERROR:    Application startup failed. Exiting.'); raise SystemExit(3)"
    )
    with (
        pytest.raises(ServingError, match="not the one used in training"),
        running(command(script), tmp_path / "log", timeout_s=20),
    ):
        pass


def test_a_server_that_is_never_ready_is_given_up(tmp_path: Path) -> None:
    with (
        pytest.raises(ServingError, match="not ready after 1 s"),
        running(command("import time; time.sleep(600)"), tmp_path / "log", timeout_s=1),
    ):
        pass


def test_a_server_that_has_failed_is_stopped(tmp_path: Path) -> None:
    script = SERVER.replace("200 if", "503 if").replace(
        "self.end_headers()", "self.end_headers(); self.wfile.write(FAILED)"
    )
    script = f"FAILED = {FAILED!r}\nprint('BundleError: adapter x has no effect', flush=True)\n{script}"
    with (
        pytest.raises(ServingError, match=r"adapter x has no effect.*log says more"),
        running(command(script), tmp_path / "log", timeout_s=20),
    ):
        pass


def test_a_server_that_another_one_stands_before_is_not_ready(tmp_path: Path) -> None:
    """Two started together on one port: one of them is asked in the place of both."""
    asked = command(SERVER)
    with running(asked, tmp_path / "first", timeout_s=20) as first:
        with (
            pytest.raises(ServingError, match=f"another server answers at {asked.url}.*another --port"),
            running(
                Command(
                    [sys.executable, "-c", "import time; time.sleep(600)"], {}, {}, asked.host, asked.port
                ),
                tmp_path / "second",
                timeout_s=20,
            ),
        ):
            pass
        assert first.poll() is None, "the first goes on"
        assert urllib.request.urlopen(f"{asked.url}/health").status == 200


SERVE = """
import sys, time
from fedrouter import cli
from fedrouter.serve import launch
from fedrouter.serve.process import Command

def prepare(*_):
    print("preparing", flush=True)
    time.sleep(float(sys.argv.pop()))
    child = "import time; print('starting', flush=True); time.sleep(600)"
    return None, Command([sys.executable, "-c", child], {}, {}, "127.0.0.1", 9)

launch.prepare = prepare
sys.argv = ["fedrouter", "serve", ".", *sys.argv[1:]]
cli.main()
"""


@pytest.mark.parametrize(("seconds", "line"), [(600, "preparing"), (0, "starting")])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("times", [1, 2])
def test_told_to_stop_while_starting_it_stops_and_says_so_by_zero(
    seconds: int, line: str, number: signal.Signals, times: int
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SERVE, str(seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as outer:
        assert outer.stdout is not None
        while line not in outer.stdout.readline():
            assert outer.poll() is None
        for _ in range(times if number is signal.SIGTERM else 1):
            outer.send_signal(number)
        assert outer.wait(40) == 0
        assert "Traceback" not in outer.stdout.read()


def test_sigterm_stops_the_server_with_its_parent(tmp_path: Path) -> None:
    parent = f"""
import sys
from pathlib import Path
from fedrouter.serve.process import Command, running
port = {free_port()}
try:
    command = Command([sys.executable, "-c", {SERVER!r}, str(port)], {{}}, {{}}, "127.0.0.1", port)
    with running(command, timeout_s=20) as server:
        print("ready", server.pid, flush=True)
        server.wait()
except KeyboardInterrupt:
    sys.exit(7)
"""
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as outer:
        assert outer.stdout is not None
        assert outer.stderr is not None
        server = int(outer.stdout.readline().split()[1])
        child = int(outer.stderr.readline().split()[1])  # the server's output is passed through
        started = time.monotonic()
        outer.send_signal(signal.SIGTERM)
        outer.send_signal(signal.SIGTERM)  # the impatient do not leave orphans either
        assert outer.wait(20) == 7
    assert time.monotonic() - started < 10
    assert not alive(server)
    assert not alive(child)


def test_a_parent_that_is_killed_leaves_nothing_behind(tmp_path: Path) -> None:
    parent = f"""
import sys
from fedrouter.serve.process import Command, running
port = {free_port()}
with running(Command([sys.executable, "-c", {SERVER!r}, str(port)], {{}}, {{}}, "127.0.0.1", port)) as server:
    print("ready", server.pid, flush=True)
    server.wait()
"""
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as outer:
        assert outer.stdout is not None
        assert outer.stderr is not None
        server = int(outer.stdout.readline().split()[1])
        child = int(outer.stderr.readline().split()[1])
        outer.kill()
    deadline = time.monotonic() + 15
    while (alive(server) or alive(child)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(server)
    assert not alive(child)


def test_the_environment_overrides_defaults_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDROUTER_TEST_A", "user")
    monkeypatch.setenv("FEDROUTER_TEST_B", "user")
    script = "import os; print({k: v for k, v in os.environ.items() if k.startswith('FEDROUTER_TEST')})"
    asked = command(script)
    asked = Command(
        asked.argv, {"FEDROUTER_TEST_B": "ours"}, {"FEDROUTER_TEST_A": "ours"}, asked.host, asked.port
    )
    with pytest.raises(ServingError, match="exit code 0"), running(asked, tmp_path / "log", timeout_s=20):
        pass
    assert (tmp_path / "log").read_text().strip() == str(
        {"FEDROUTER_TEST_A": "user", "FEDROUTER_TEST_B": "ours"}
    )


@pytest.fixture
def no_vllm(monkeypatch: pytest.MonkeyPatch, small_bundle: Bundle) -> None:
    """Let the checks of a bundle pass and a small server start in vLLM's place."""

    def prepare(_path: Path, options: launch.Options) -> tuple[Bundle, Command]:
        argv = [sys.executable, "-c", SERVER, str(options.port)]
        return small_bundle, Command(argv, {}, {}, options.host, options.port)

    monkeypatch.setattr(launch, "prepare", prepare)


def test_running_server_yields_an_address_that_answers(no_vllm: None, tmp_path: Path) -> None:
    with running_server(tmp_path, log=tmp_path / "log", timeout_s=20) as url:
        assert urllib.request.urlopen(f"{url}/health").status == 200
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{url}/health")


def test_a_server_that_ends_by_itself_is_an_error(
    no_vllm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end_it(command: Command) -> Iterator[subprocess.Popen[bytes]]:
        with running(command, tmp_path / "log", timeout_s=20) as server:
            server.kill()
            yield server

    monkeypatch.setattr(launch, "running", contextmanager(end_it))
    with pytest.raises(ServingError, match="by itself, with exit code -9"):
        serve(tmp_path, launch.Options(port=free_port()))


def test_a_server_whose_engine_has_died_does_not_say_exit_code_0(
    no_vllm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end_it(command: Command) -> Iterator[subprocess.Popen[bytes]]:
        with running(command, tmp_path / "log", timeout_s=20) as server:
            server.terminate()  # ends with 0, as vLLM does then
            yield server

    monkeypatch.setattr(launch, "running", contextmanager(end_it))
    with pytest.raises(ServingError, match="by itself, as it does when its engine dies") as error:
        serve(tmp_path, launch.Options(port=free_port()))
    assert "exit code" not in str(error.value)
