"""Every command refuses an invalid bundle with the same line and exit code 1."""

import io
import json
import os
import signal
import sys
from importlib import util
from pathlib import Path

import numpy as np
import pytest
import tamper
from fakes import space, write
from rich.console import Console

from fedrouter import cli
from fedrouter.bundle import load_bundle
from fedrouter.config import Config
from fedrouter.errors import BundleError, ConfigError, DataError
from fedrouter.serve import checks
from fedrouter.train.join import join


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The files of a finished run that ``join`` reads before the bundle."""
    (tmp_path / "run").mkdir()
    write(tmp_path / "run" / "bundle", space(np.eye(8)[:2]), [0.5, 0.5])
    (tmp_path / "run" / "config.json").write_text(Config().model_dump_json(by_alias=True))
    return tmp_path / "run"


def fifo(bundle: Path) -> None:
    (bundle / "router.safetensors").unlink()
    os.mkfifo(bundle / "router.safetensors")


def before(bundle: Path) -> None:
    (bundle / "manifest.json").write_text('{"schema_version": 1}')


KINDS = {
    "radius": lambda bundle: tamper.edit(bundle, "clusters", 0, "radius", to="12"),
    "name": lambda bundle: tamper.edit(bundle, "clusters", 0, "name", to=7),
    "deep": lambda bundle: (bundle / "manifest.json").write_text("[" * 100_000),
    "FIFO": fifo,
    "of before": before,
}
COMMANDS = [
    "inspect RUN",
    "inspect RUN/bundle",
    "route RUN hello",
    "eval-routing RUN --data builtin:four-tasks --limit 1",
    "serve RUN/bundle --port PORT",
    "serve RUN/bundle --port PORT --upstream http://127.0.0.1:1",
    "push RUN team/tasks",
    "push RUN team/tasks --sign key.pem",
    "sign RUN key.pem",
    "join RUN --client late=late.jsonl",
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_in_the_same_line(
    run: Path,
    command: str,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    KINDS[kind](run / "bundle")
    with pytest.raises(BundleError) as wanted:
        load_bundle(run / "bundle")
    if command.startswith("serve"):  # pretend that vLLM is installed
        monkeypatch.setattr(util, "find_spec", lambda name: object())
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    argv = command.replace("RUN", str(run)).replace("PORT", str(checks.free_port())).split()
    monkeypatch.setattr(sys, "argv", ["fedrouter", *argv])
    with pytest.raises(SystemExit) as left:
        cli.main()
    said = capsys.readouterr()
    assert left.value.code == 1
    assert said.err == f"error: {wanted.value}\n"
    assert not said.out or command.startswith("inspect RUN"), "a run is shown before its bundle"


def test_a_join_needs_a_place_that_can_be_written(run: Path) -> None:
    out = run / "config.json"
    with pytest.raises(ConfigError, match=f"^--out {out}: cannot be written: Not a directory"):
        join(run, {"late": "late.jsonl"}, {}, out, Console(quiet=True))


def main(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["fedrouter", *argv])
    cli.main()


def test_a_prompt_that_is_not_text_is_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = os.fsdecode(b"caf\xe9 au lait")
    with pytest.raises(SystemExit):
        main(["route", str(run), "tea", prompt], monkeypatch)
    assert capsys.readouterr().err == "error: prompt 2: not UTF-8 (character 4); give it as UTF-8\n"


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_line_that_is_not_text_is_refused(monkeypatch: pytest.MonkeyPatch, errors: str) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b"tea\n\ncaf\xe9\n"), encoding="utf-8", errors=errors)
    monkeypatch.setattr(sys, "stdin", stdin)
    lines = cli._stdin_lines()
    assert next(lines) == "tea"
    with pytest.raises(DataError, match="standard input, line 3: not UTF-8"):
        next(lines)


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_file_name_that_is_not_text_is_escaped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, errors: str, options: list[str]
) -> None:
    rows = "".join(json.dumps({"prompt": f"Order {i}", "completion": "lamp"}) + "\n" for i in range(20))
    (tmp_path / "rows").mkdir()
    file = tmp_path / "rows" / os.fsdecode(b"caf\xe9.jsonl")
    file.write_text(rows)
    (tmp_path / "c.toml").write_text("")
    stdout = io.TextIOWrapper(raw := io.BytesIO(), encoding="utf-8", errors=errors)
    monkeypatch.setattr(sys, "stdout", stdout)
    data = f"data={{source='{file.parent}', partition='iid', num_clients=2}}"
    with pytest.raises(SystemExit) as left:
        main(["check", str(tmp_path / "c.toml"), "--set", data, *options], monkeypatch)
    assert not left.value.code
    assert "caf\\udce9.jsonl" in raw.getvalue().decode()
    if options:
        assert json.loads(raw.getvalue())["files"][0]["source"] == str(file)
