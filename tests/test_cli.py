"""What the command line prints, whatever its names, its streams and its interruptions."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import typer.main
from rich.text import Text
from typer.testing import CliRunner

from fedrouter import cli
from fedrouter.errors import DataError
from fedrouter.probes import check_clusters
from fedrouter.train import join, run
from fedrouter.types import Probe

RUNNER = CliRunner()


def commands(command: click.Command, *names: str) -> list[tuple[str, click.Command]]:
    found = [(" ".join(names), command)]
    for name, inner in getattr(command, "commands", {}).items():
        found += commands(inner, *names, name)
    return found


ALL = commands(typer.main.get_command(cli.app))


@pytest.mark.parametrize(("names", "command"), ALL, ids=[names or "fedrouter" for names, _ in ALL])
def test_no_word_of_a_help_text_is_taken_for_markup(names: str, command: click.Command) -> None:
    assert len(ALL) > 20
    for text in [command.help, *(getattr(param, "help", None) for param in command.params)]:
        assert Text.from_markup(text or "").plain == (text or "").replace("\\[", "["), text


def test_the_help_shows_brackets() -> None:
    assert (
        "[data.fields]" in RUNNER.invoke(cli.app, ["eval-routing", "--help"], env={"COLUMNS": "200"}).output
    )


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_traceback(closed: str) -> None:
    code = (
        "import os, sys; from fedrouter import cli; cli._open_closed(); list(cli._stdin_lines()); "
        "sys.argv[1:] = ['--version']; "
        "assert os.open(os.devnull, os.O_RDONLY) > 2; cli.main()"
    )
    done = subprocess.run(
        f'{sys.executable} -c "{code}" {closed}', shell=True, stdin=subprocess.DEVNULL, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")


PLACE = Path("rd/fed dpa/bundle")


@pytest.mark.parametrize("command", ["train", "join"])
def test_a_printed_command_can_be_copied(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run if command == "train" else join, command, lambda *_: SimpleNamespace(path=PLACE))
    arguments = {"train": ["train"], "join": ["join", "rd/fed dpa", "--client", "late=late.jsonl"]}[command]
    output = RUNNER.invoke(cli.app, arguments).output
    assert f"bundle: {PLACE}\n" in output
    assert f"'{PLACE}'\n" in output


@pytest.mark.parametrize("command", ["train", "join"])
def test_a_run_without_a_finished_round_is_not_resumed(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run if command == "train" else join, command, interrupted)
    out = tmp_path / "run-late"
    arguments = {
        "train": ["train", "--out", str(out)],
        "join": ["join", str(tmp_path / "run"), "--client", "late=late.jsonl"],
    }[command]
    done = RUNNER.invoke(cli.app, arguments)
    assert done.exit_code == 130
    assert done.output == "interrupted; nothing was finished; the same command starts from the beginning\n"
    (out / "checkpoints" / "round-00000").mkdir(parents=True)
    done = RUNNER.invoke(cli.app, arguments)
    assert done.exit_code == 130
    assert done.output == (
        f"interrupted; run the same command again to resume from the last finished round in {out}\n"
    )


def test_a_probe_of_no_task_cluster_is_refused() -> None:
    probes = [Probe(("a",), "headline", "line 1"), Probe(("b",), None, "line 2")]
    check_clusters(probes, ["headline", "summary"], Path("p.jsonl"))
    probes.append(Probe(("c",), "nosuch", "line 4"))
    wanted = "p.jsonl, line 4: no task cluster 'nosuch' in the bundle; it has headline, summary"
    with pytest.raises(DataError, match=wanted):
        check_clusters(probes, ["headline", "summary"], Path("p.jsonl"))
