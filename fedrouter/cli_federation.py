"""Commands for a federation on many machines: ``federation`` for its server, ``client`` for its sites."""

import json
import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedrouter.layout import print_line

console = Console(markup=False)
stderr = Console(stderr=True, markup=False)

federation = typer.Typer(
    name="federation",
    help="Federation on many machines, server side: create, serve and monitor it.",
    no_args_is_help=True,
)
client = typer.Typer(
    name="client",
    help="Federation on many machines, site side: take part with data that stays on this machine.",
    no_args_is_help=True,
)

FederationDir = Annotated[Path, typer.Argument(help="The federation's directory.")]
SiteDir = Annotated[Path, typer.Argument(help="The site's directory, made by client init.")]


@federation.command()
def setup() -> None:
    """Install Flower into a separate environment; needed once on the server and on every site."""
    from fedrouter.train.flower.environment import VERSION
    from fedrouter.train.flower.environment import setup as make

    print_line(console, f"Flower {VERSION} is in {make()}")


@federation.command("init")
def init_federation(
    directory: FederationDir,
    host: Annotated[
        str, typer.Option(help="The name or address at which sites reach this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port for the sites.")] = 9092,
    control_port: Annotated[
        int, typer.Option(min=1, max=65535, help="Port for processes on this machine.")
    ] = 9093,
) -> None:
    """Create a federation's directory: settings, and certificates from a trial CA."""
    import shlex

    from fedrouter.train.flower.certificates import DAYS
    from fedrouter.train.flower.federation import make_directory

    made = make_directory(directory, host, port, control_port)
    print_line(
        console,
        f"{directory / 'federation.toml'}: add each site's public key under [clients]\n"
        f"{directory / 'ca.crt'}: a TRIAL CA, valid for {DAYS} days; give it to every site. "
        "In production replace ca.crt, server.crt and server.key with your own\n"
        f"serve it: fedrouter federation serve {shlex.quote(str(directory))}\n"
        f"which runs: {shlex.join(made.superlink())}",
    )


@federation.command("serve")
def serve_federation(directory: FederationDir) -> None:
    """Run Flower's superlink, to which sites connect, until interrupted."""
    import os

    from fedrouter.train.flower.environment import variables
    from fedrouter.train.flower.federation import load_directory

    made = load_directory(directory)
    command = made.superlink()
    console.file.flush()
    os.execve(command[0], command, variables(made.home))  # noqa: S606 - this process becomes the superlink


@federation.command()
def status(
    directory: FederationDir,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show which clients are connected, since when, with how many rows, and their last answers."""
    from rich.table import Table

    from fedrouter.layout import Whole, show
    from fedrouter.train.flower.status import status as look

    clients = look(directory)
    if as_json:
        print(json.dumps(clients))  # noqa: T201 - for programs
        return
    table = Table("client", "status", "since", "rows", "last answer", "to the request")
    for row in clients:
        table.add_row(
            *(str(row[key]) for key in ("client", "status", "since", "rows", "last_answer", "request"))
        )
    show(console, Whole(table))


@client.command("init")
def init_client(
    name: Annotated[str, typer.Argument(help="The site's name in the federation.")],
    data: Annotated[str, typer.Option(help="File or directory with the site's rows.")] = "rows.jsonl",
    server: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="The federation's server.")
    ] = "127.0.0.1:9092",
    directory: Annotated[
        Path | None, typer.Option("--dir", help="The site's directory; default: NAME.")
    ] = None,
) -> None:
    """Create a site's directory: a key pair that stays on this machine, settings, and a policy."""
    from fedrouter.train.client.site_files import make_site

    made, public = make_site(directory or Path(name), name, data, server)
    key = (
        name if re.fullmatch("[A-Za-z0-9_-]+", name) else json.dumps(name, ensure_ascii=False)
    )  # as TOML wants
    print_line(
        console,
        f"{made.directory / 'site.toml'}: paths of the data and the base, and the site's policy\n"
        f"put the federation's ca.crt beside it, and give the federation's operator this line:\n"
        f'{key} = "{public}"',
    )


@client.command()
def check(directory: SiteDir) -> None:
    """List what this site would reveal, with sizes, and why it could not take part; reveals nothing."""
    from fedrouter.train.client.site import load_site
    from fedrouter.train.client.site_files import preview

    found = preview(load_site(directory))
    for line in found.lines:
        print_line(console, line)
    for problem in found.problems:
        print_line(stderr, f"error: {problem}")
    if found.problems:
        raise typer.Exit(1)


@client.command()
def run(directory: SiteDir) -> None:
    """Take part until interrupted; the base stays loaded between requests."""
    from fedrouter.train.client.resident import Resident
    from fedrouter.train.client.site import load_site
    from fedrouter.train.federate import opened_client
    from fedrouter.train.flower.site import run_site

    site = load_site(directory)
    resident = Resident(site, lambda config, secret: opened_client(site, config, secret, console), console)
    try:
        run_site(site, resident, console)
    except KeyboardInterrupt:
        print_line(console, f"client {site.settings.name}: has left")
