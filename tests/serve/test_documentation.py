"""Every flag, header, endpoint and metric is documented."""

from pathlib import Path

import pytest
import typer
from prometheus_client import REGISTRY

from fedrouter.cli import app
from fedrouter.decide import NO_TEXT
from fedrouter.serve import metrics
from fedrouter.serve.launch import RESERVED
from fedrouter.serve.paths import AS_BASE, OPEN, OWN_METHODS, ROUTED, UNROUTED
from fedrouter.serve.request import routing_headers

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "serving.md").read_text() + (DOCS / "operations.md").read_text()
assert metrics  # the import registers the metrics


def test_every_flag_of_serve_and_reload() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    flags = {
        option
        for name in ("serve", "reload")
        for parameter in commands[name].params
        for option in parameter.opts
        if option.startswith("--") and option != "--help"
    }
    assert len(flags) > 10
    assert not {flag for flag in flags if f"`{flag}" not in TEXT and f" {flag} " not in TEXT}
    assert "--api-key" in RESERVED


@pytest.mark.parametrize("path", [*ROUTED, *AS_BASE, *UNROUTED, *OPEN, *OWN_METHODS])
def test_every_endpoint(path: str) -> None:
    short = {f"{one}/{end}": f"`…/{end}`" for one in ROUTED for end in ("render", "derender")}
    assert short.get(path, path) in TEXT


def test_every_metric() -> None:
    names = {
        sample + ("_total" if family.type == "counter" else "")
        for family in REGISTRY.collect()
        for sample in [family.name]
        if sample.startswith("fedrouter_")
    }
    assert len(names) == 10
    assert not {name for name in names if f"| `{name}` |" not in TEXT}


def test_every_header() -> None:
    for name, _ in routing_headers([NO_TEXT], 0.0):
        short = name.decode().removeprefix("x-fedrouter")
        assert f"`{name.decode()}`" in TEXT or f"`{short}`" in TEXT
