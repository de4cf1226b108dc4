"""The commands of a federation on many machines: of who runs the server, and of who runs a site."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

console = Console()

federation = typer.Typer(
    name="federation",
    help="Many machines, the server's side: make, serve and watch a federation.",
    no_args_is_help=True,
)
client = typer.Typer(
    name="client",
    help="Many machines, a site's side: take part with data that stays here.",
    no_args_is_help=True,
)

FederationDir = Annotated[Path, typer.Argument(help="The federation's directory.")]
SiteDir = Annotated[Path, typer.Argument(help="The site's directory, as client init made it.")]


def _say(line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True, markup=False)


@federation.command()
def setup() -> None:
    """Install Flower into an environment of its own, once, on the server and on every site."""
    from fedrouter.train.flower.environment import VERSION
    from fedrouter.train.flower.environment import setup as make

    _say(f"Flower {VERSION} is in {make()}")


@federation.command("init")
def init_federation(
    directory: FederationDir,
    host: Annotated[
        str, typer.Option(help="The name or address that sites reach this machine by.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="For the sites.")] = 9092,
    control_port: Annotated[int, typer.Option(min=1, max=65535, help="For this machine alone.")] = 9093,
) -> None:
    """Make a federation's directory: settings, and certificates of a trial CA."""
    import shlex

    from fedrouter.train.flower.certificates import DAYS
    from fedrouter.train.flower.federation import make_directory

    made = make_directory(directory, host, port, control_port)
    _say(
        f"{directory / 'federation.toml'}: add each site's public key under [clients]\n"
        f"{directory / 'ca.crt'}: a TRIAL CA, for {DAYS} days; give it to every site. "
        "For real use put your own ca.crt, server.crt and server.key in their places\n"
        f"serve it: fedrouter federation serve {directory}\nwhich runs: {shlex.join(made.superlink())}"
    )


@federation.command("serve")
def serve_federation(directory: FederationDir) -> None:
    """Run Flower's superlink until interrupted; sites connect to it."""
    import os

    from fedrouter.train.flower.environment import variables
    from fedrouter.train.flower.federation import load_directory

    made = load_directory(directory)
    command = made.superlink()
    console.file.flush()
    os.execve(command[0], command, variables(made.home))  # noqa: S606 - this process is the superlink from now on


@federation.command()
def status(
    directory: FederationDir,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show who is there, since when, with how many rows, and when each answered last."""
    from rich.table import Table

    from fedrouter.layout import Whole, show
    from fedrouter.train.flower.status import status as look

    found = look(directory)
    if as_json:
        print(json.dumps(found))  # noqa: T201 - for programs
        return
    table = Table("client", "there", "since", "rows", "last answer", "to")
    for one in found:
        table.add_row(*(str(one[key]) for key in ("client", "there", "since", "rows", "last_answer", "to")))
    show(console, Whole(table))


@client.command("init")
def init_client(
    name: Annotated[str, typer.Argument(help="The site's name in the federation.")],
    data: Annotated[str, typer.Option(help="File or directory with the rows.")] = "rows.jsonl",
    server: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="The federation's server.")
    ] = "127.0.0.1:9092",
    directory: Annotated[Path | None, typer.Option("--dir", help="Where to; otherwise NAME.")] = None,
) -> None:
    """Make a site's directory: a key pair that never leaves it, settings, and a policy."""
    from fedrouter.train.client.site_files import make_site

    made, public = make_site(directory or Path(name), name, data, server)
    _say(
        f"{made.directory / 'site.toml'}: where the data and the base are, and the site's policy\n"
        f'put the federation\'s ca.crt beside it, and give its operator this line:\n{name} = "{public}"'
    )


@client.command()
def check(directory: SiteDir) -> None:
    """Show what this site would reveal, kinds and bytes, before anything is."""
    from fedrouter.train.client.site import load_site
    from fedrouter.train.client.site_files import revealed

    for line in revealed(load_site(directory)):
        _say(line)


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
        _say(f"client {site.settings.name}: has left")
