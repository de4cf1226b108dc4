"""The command line: each command parses its options, makes one call and prints a FedRouterError as one line.

Heavy modules are imported inside the commands, so that ``--help`` is fast.
"""

import errno
import io
import itertools
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

from fedrouter import __version__
from fedrouter.cli_federation import client as client_app
from fedrouter.cli_federation import federation as federation_app
from fedrouter.errors import ConfigError, DataError, FedRouterError
from fedrouter.layout import print_line

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fedrouter.bundle import Bundle
    from fedrouter.embed import Embedder
    from fedrouter.evaluate import Report
    from fedrouter.types import Decision

app = typer.Typer(
    name="fedrouter",
    help="One LoRA adapter per task, trained across clients, served behind one endpoint.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(federation_app)
app.add_typer(client_app)
ROUNDS = "checkpoints/round-*", "from the last finished round"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
console = Console(markup=False)  # names and paths may contain brackets
stderr = Console(stderr=True, markup=False)

Out = Annotated[Path | None, typer.Option(help="Run directory; a run that is already there is resumed.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a setting.")
]
Processes = Annotated[
    int,
    typer.Option(
        min=1, help="Number of adapters trained in parallel, each on its own GPU or share of the CPU threads."
    ),
]
BundleDir = Annotated[Path, typer.Argument(help="A bundle, or a run directory that contains one.")]
BaseOption = Annotated[
    str | None, typer.Option(help="Path or hub id of the base model; default: the one in the bundle.")
]
EmbedderUrl = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Address of the bundle's embedder, if it is an embeddings endpoint."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
KeyOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="Environment variable that holds the API key.")
]
FieldOption = Annotated[
    list[str] | None,
    typer.Option(metavar="FIELD=NAME", help="The name of a field in the files, as in \\[data.fields]."),
]


def version(show: bool) -> None:
    """Print the version and exit."""
    if show:
        console.print(f"fedrouter {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def root(
    *,
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
    _version: Annotated[bool, typer.Option("--version", callback=version, is_eager=True)] = False,
) -> None:
    """One LoRA adapter per task, trained across clients, served behind one endpoint."""
    if debug:
        os.environ["FEDROUTER_DEBUG"] = "1"


@app.command()
def train(
    config: Annotated[
        Path | None, typer.Argument(help="TOML; without it the built-in four tasks, dual.")
    ] = None,
    out: Out = None,
    set_: Set = None,
    processes: Processes = 1,
    federation: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Train on the machines of this federation's clients."),
    ] = None,
) -> None:
    """Train one adapter per task cluster and write a bundle."""
    from fedrouter.config_file import load_config

    directory = out or Path("runs") / (config.stem if config else "four-tasks")
    try:
        if federation is not None:
            if processes > 1:
                raise ConfigError(
                    "--processes: the sites train, not this machine; leave it or --federation out"
                )
            from fedrouter.train.flower.run import train_over_flower

            bundle = train_over_flower(config, set_ or [], directory, federation, console)
        else:
            from fedrouter.train.run import train as run

            bundle = run(load_config(config, set_ or []), directory, console, processes)
    except KeyboardInterrupt:
        _interrupted(directory, *ROUNDS)
    command = shlex.join(["fedrouter", "serve", str(bundle.path)])
    print_line(console, f"bundle: {bundle.path}\nserve it: {command}")


@app.command()
def check(
    config: Annotated[
        Path | None, typer.Argument(help="TOML; without it the built-in four tasks, dual.")
    ] = None,
    set_: Set = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the full report as JSON.")] = False,
) -> None:
    """Show what training would do with your data, without training. Fails where train would fail."""
    import json

    from fedrouter.config_file import load_config
    from fedrouter.train.check import check as run
    from fedrouter.train.show.check_view import show

    try:
        report = run(load_config(config, set_ or []))
    except FedRouterError as error:
        if as_json:
            print(json.dumps({"ok": False, "error": str(error)}))  # noqa: T201 - for programs
            raise typer.Exit(1) from error
        raise
    if as_json:
        print(json.dumps(report.to_json(), ensure_ascii=False))  # noqa: T201
    else:
        show(report, console)


@app.command()
def join(
    run: Annotated[Path, typer.Argument(help="A finished run; it is not changed.")],
    client: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FILE", help="A new client and its data.")
    ] = None,
    moved: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="A client of the run and its new data."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="New run directory; default: beside RUN, named after RUN and the clients."),
    ] = None,
    processes: Processes = 1,
) -> None:
    """Add clients to a finished run, or change the data of its clients; train only what is new."""
    sources, changed = _sources(client, "--client"), _sources(moved, "--moved")
    if not sources and not changed:
        raise ConfigError("no client to join: give --client NAME=FILE or --moved NAME=FILE")
    from fedrouter.train.join import default_out
    from fedrouter.train.join import join as add

    try:
        bundle = add(run, sources, changed, out, console, processes)
    except KeyboardInterrupt:
        _interrupted(out or default_out(run, sources, changed), *ROUNDS)
    command = shlex.join(["fedrouter", "reload", "URL", str(bundle.path)])
    print_line(console, f"bundle: {bundle.path}\non a running server: {command}")


@app.command(context_settings={"allow_extra_args": True})
def serve(
    context: typer.Context,
    bundle: BundleDir,
    base: BaseOption = None,
    embedder_url: EmbedderUrl = None,
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    api_key_env: KeyOption = None,
    watch: Annotated[
        bool,
        typer.Option("--watch", help="BUNDLE is a link: whenever its target changes, serve the new one."),
    ] = False,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DIR", help="Also serve this PEFT adapter by name; never routed to."),
    ] = None,
    fallback: Annotated[
        str | None,
        typer.Option(
            metavar="POLICY", help="For prompts beyond every radius: base, generalist, nearest or reject."
        ),
    ] = None,
    require_signature: Annotated[
        Path | None,
        typer.Option(
            metavar="KEY", help="Only serve bundles signed with the private key of this public key."
        ),
    ] = None,
    keys_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="API keys of clients: JSON, from the SHA-256 of a key to a client name."
        ),
    ] = None,
    metrics_key_env: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Environment variable that holds the key for /metrics; default: no key needed.",
        ),
    ] = None,
    upstream: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL", help="Do not start vLLM: forward to this server, which serves the adapters."
        ),
    ] = None,
    overload: Annotated[
        str,
        typer.Option(
            metavar="base|reject",
            help="When the routing queue is full: answer with the base model, or with 503.",
        ),
    ] = "base",
    max_queue: Annotated[
        int, typer.Option(min=1, help="Maximum number of texts in the routing queue.")
    ] = 256,
    routing_timeout_s: Annotated[float, typer.Option(help="Maximum time in the routing queue.")] = 5.0,
    max_body_mib: Annotated[float, typer.Option(help="Maximum size of a request body.")] = 8.0,
    decision_log: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Log every routing decision, as JSON Lines.")
    ] = None,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Also log the prompts' texts.")] = False,
    log_vectors: Annotated[
        bool, typer.Option("--log-vectors", help="Also log the prompts' embeddings.")
    ] = False,
    decision_log_mib: Annotated[
        float, typer.Option(help="Size at which the decision log is rotated.")
    ] = 64.0,
    shadow: Annotated[
        Path | None,
        typer.Option(metavar="BUNDLE", help="Also route with this bundle, and count where it differs."),
    ] = None,
    canary: Annotated[
        float, typer.Option(min=0, max=100, help="Percentage of requests answered by the --shadow bundle.")
    ] = 0.0,
    no_console: Annotated[
        bool, typer.Option("--no-console", help="Do not serve the web page at /fedrouter/.")
    ] = False,
) -> None:
    """Serve a bundle with vLLM: the model "fedrouter" routes. Options after -- are passed to vLLM."""
    try:
        from fedrouter.serve.decision_log import LogOptions
        from fedrouter.serve.launch import Options
        from fedrouter.serve.launch import serve as run
        from fedrouter.serve.limits import Limits
        from fedrouter.serve.upstream import serve_upstream

        if (log_prompts or log_vectors) and decision_log is None:
            raise ConfigError("--log-prompts and --log-vectors need --decision-log FILE")
        if canary and shadow is None:
            raise ConfigError("--canary PERCENT needs --shadow BUNDLE, which answers that share of requests")
        directory = bundle_directory(bundle)
        options = Options(
            base=base,
            embedder_url=embedder_url,
            host=host,
            port=port,
            api_key_env=api_key_env,
            keys_file=keys_file,
            metrics_key_env=metrics_key_env,
            watch=watch,
            fallback=fallback,
            signed_by=require_signature,
            limits=Limits(overload, max_queue, routing_timeout_s, max_body_mib),
            adapters={
                name: Path(path)
                for name, path in (_named(text, "--adapter", "NAME=DIR") for text in adapter or [])
            },
            log=LogOptions(decision_log, log_prompts, log_vectors, decision_log_mib)
            if decision_log
            else None,
            second=bundle_directory(shadow) if shadow else None,
            canary=canary / 100,
            console=not no_console,
            vllm_args=context.args,
        )
        code = serve_upstream(directory, upstream, options) if upstream else run(directory, options)
    except KeyboardInterrupt:  # during startup
        code = 0
    raise typer.Exit(code)


@app.command()
def reload(
    url: Annotated[str, typer.Argument(help="The server, http://HOST:PORT.")],
    bundle: Annotated[
        str, typer.Argument(help="A bundle on the server's machine, in the same folder as the one it serves.")
    ],
    api_key_env: KeyOption = None,
    timeout_s: Annotated[
        float, typer.Option(min=1, help="Maximum time for the reload, which waits for running requests.")
    ] = 900.0,
) -> None:
    """Make a running server serve another bundle, without a restart."""
    from fedrouter.serve.client import request_reload

    changes = request_reload(url, bundle, _api_key(api_key_env), timeout_s)
    for change in ("loaded", "kept", "unloaded"):
        if changes[change]:
            print_line(console, f"{change}: {', '.join(changes[change])}")
    print_line(console, f"{url} serves {changes['bundle']}")


@app.command("eval")
def evaluate(
    url: Annotated[str, typer.Argument(help="The endpoint, http://HOST:PORT.")],
    data: Annotated[
        list[str], typer.Option(metavar="FILE", help="Test records: files, data sets, or builtin:four-tasks.")
    ],
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A model to evaluate; several are compared. oracle: the adapter of each record's task."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the report here as JSON.")] = None,
    records: Annotated[Path | None, typer.Option(help="Write every answer here as JSONL.")] = None,
    api_key_env: KeyOption = None,
    concurrency: Annotated[int, typer.Option(min=1)] = 16,
    max_tokens: Annotated[int, typer.Option(min=1)] = 64,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of records per task.")] = None,
    timeout_s: Annotated[float, typer.Option(min=1, help="For one request.")] = 120.0,
    retries: Annotated[int, typer.Option(min=0)] = 3,
    field: FieldOption = None,
    as_json: Json = False,
) -> None:
    """Score an endpoint on test records, per task, client and adapter."""
    from fedrouter.evaluate import evaluate as run
    from fedrouter.evaluate import load

    _check_files(out, records)
    report = run(
        url,
        load(data, num_per_task=limit or 100, fields=_fields(field)),
        model or ["fedrouter"],
        api_key=_api_key(api_key_env),
        concurrency=concurrency,
        max_tokens=max_tokens,
        limit_per_task=limit,
        timeout_s=timeout_s,
        retries=retries,
        console=stderr if as_json else console,
    )
    _show(report, out, records, as_json=as_json)
    if report.num_failed:
        raise typer.Exit(1)


@app.command()
def experiment(
    config: Annotated[Path, typer.Argument(help="TOML: worlds, methods, scenarios, seeds.")],
    out: Annotated[
        Path | None, typer.Option(help="Directory of the cells; cells that are already there are resumed.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Number of cells in parallel, each a process.")] = 1,
    only: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Cells to run: WORLD/SCENARIO/METHOD/SEED.")
    ] = None,
    results: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Results file; default: in the --out directory.")
    ] = None,
) -> None:
    """Run an evaluation like the paper's: every combination of method, scenario and seed is one cell."""
    from fedrouter.experiment.run import run_experiment
    from fedrouter.experiment.settings import load_experiment

    settings = load_experiment(config)
    directory = out or Path("runs") / config.stem
    try:
        run_experiment(settings, directory, console, jobs=jobs, only=only or (), results=results)
    except KeyboardInterrupt:
        _interrupted(directory, "*", "the cells")


@app.command("eval-routing")
def evaluate_routing(
    bundle: BundleDir,
    data: Annotated[
        list[str],
        typer.Option(metavar="FILE", help="Records with a task: files, data sets, or builtin:four-tasks."),
    ],
    base: BaseOption = None,
    embedder_url: EmbedderUrl = None,
    out: Annotated[Path | None, typer.Option(help="Write the report here as JSON.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Records per task of built-in data.")] = 100,
    field: FieldOption = None,
    as_json: Json = False,
) -> None:
    """Measure how a bundle routes labelled prompts; needs no server."""
    from fedrouter.evaluate import load, offline

    _check_files(out)
    records = load(data, num_per_task=limit, fields=_fields(field))
    loaded, embedder = _load(bundle, base, embedder_url)
    report = offline.evaluate_routing(loaded, embedder, records, offline.stated_quantile(loaded.path))
    if as_json:
        print(offline.to_json(report))  # noqa: T201 - for programs
    else:
        _print_whole(offline.render(report))
    if out:
        offline.write_json(report, out)


@app.command()
def route(
    bundle: BundleDir,
    prompt: Annotated[
        list[str] | None, typer.Argument(help="Prompts; default: one per line from standard input.")
    ] = None,
    base: BaseOption = None,
    embedder_url: EmbedderUrl = None,
    as_json: Json = False,
) -> None:
    """Show which adapter would answer a prompt, and why; needs no server."""
    from fedrouter.decide import route_texts
    from fedrouter.route import Router

    for number, text in enumerate(prompt or (), start=1):
        _check_utf8(text, f"prompt {number}")
    loaded, embedder = _load(bundle, base, embedder_url)
    router = Router(loaded)
    for text in prompt or _stdin_lines():
        [decision] = route_texts(router, embedder, [text])
        if as_json:
            _print_json(_decision_json(text, decision), indent=None)
        else:
            _show_decision(text, decision, loaded)


@app.command()
def inspect(path: Annotated[Path, typer.Argument(help="A run or a bundle.")], as_json: Json = False) -> None:
    """Show the contents of a run or a bundle."""
    from fedrouter.inspect import look, show

    if as_json:
        _print_json(look(path))
    else:
        show(path, console)


@app.command()
def replay(
    log: Annotated[Path, typer.Argument(help="A decision log; its rotated files FILE.1 … are read too.")],
    bundle: BundleDir,
    base: BaseOption = None,
    embedder_url: EmbedderUrl = None,
    as_json: Json = False,
) -> None:
    """Route the prompts of a decision log with another bundle, and show what changes."""
    from fedrouter.replay import render
    from fedrouter.replay import replay as run

    found = run(log, *_load(bundle, base, embedder_url))
    if as_json:
        _print_json(found.to_json())
    else:
        _print_whole(render(found))


@app.command()
def probe(
    bundle: BundleDir,
    file: Annotated[
        Path | None, typer.Argument(help="Probes as JSON Lines; default: the bundle's own probes.")
    ] = None,
    base: BaseOption = None,
    embedder_url: EmbedderUrl = None,
    as_json: Json = False,
) -> None:
    """Check that each probe is routed to its expected task cluster; exit code 1 if one is not."""
    import asyncio

    from fedrouter.bundle import PROBES, parse_probes, read_probes
    from fedrouter.decide import route_texts
    from fedrouter.probes import ask, check_clusters
    from fedrouter.route import Router

    probes = parse_probes(read_probes(file), file) if file else ()
    loaded, embedder = _load(bundle, base, embedder_url)
    probes = probes or loaded.probes
    if not probes:
        raise ConfigError(f"{loaded.path} contains no probes; give a file of probes")
    check_clusters(probes, [cluster.name for cluster in loaded.clusters], file or loaded.path / PROBES)
    router = Router(loaded)

    async def route(texts: Sequence[str]) -> "list[Decision]":
        return route_texts(router, embedder, texts)

    results = asyncio.run(ask(probes, route))
    broken = [result for result in results if not result.holds]
    if as_json:
        found = [
            {
                "where": result.probe.where,
                "turns": result.probe.turns,
                "expected": result.probe.cluster,
                "holds": result.holds,
            }
            | {"cluster": result.decision.cluster, "fallback": result.decision.fallback}
            for result in results
        ]
        _print_json({"probes": found, "num_broken": len(broken)})
    else:
        for result in broken:
            print_line(console, str(result))
        console.print(f"{len(results) - len(broken)} of {len(results)} probes hold", highlight=False)
    if broken:
        raise typer.Exit(1)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run directory, or an experiment's.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE", help="Test records with a task; default for built-in runs: built-in ones."
        ),
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open the report in a browser.")] = False,
    base: BaseOption = None,
    embedder_url: EmbedderUrl = None,
) -> None:
    """Write a report of a run as one HTML file: losses, task clusters, routing on test data, costs."""
    if (run / "experiment.json").is_file():
        from fedrouter.experiment.report import show_report

        page = show_report(run)
    else:
        from fedrouter.report import write_report

        page = write_report(run, data, base=base, embedder_url=embedder_url)
    print_line(console, f"report: {page}")
    if show:
        import webbrowser

        webbrowser.open(page.resolve().as_uri())


@app.command()
def sign(
    bundle: BundleDir,
    key: Annotated[Path, typer.Argument(help="A private Ed25519 key in PEM format.")],
) -> None:
    """Sign a bundle, for servers with --require-signature."""
    from fedrouter.bundle import load_bundle, sign_bundle

    loaded = load_bundle(bundle_directory(bundle))
    print_line(console, f"signed: {sign_bundle(loaded.path, key)}")


@app.command()
def push(
    bundle: BundleDir,
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the Hugging Face hub.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private, if it does not exist yet.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to.")] = None,
    sign: Annotated[
        Path | None,
        typer.Option(
            metavar="KEY", help="First sign the bundle with this private Ed25519 key in PEM format."
        ),
    ] = None,
) -> None:
    """Upload a bundle to the Hugging Face hub, with a model card for each adapter."""
    from fedrouter.bundle import load_bundle, sign_bundle
    from fedrouter.push import push as run

    loaded = load_bundle(bundle_directory(bundle))
    if sign is not None:
        sign_bundle(loaded.path, sign)
    url = run(loaded, repo, private=private, revision=revision)
    print_line(console, url)


@app.command()
def demo(
    config_file: Annotated[
        Path | None, typer.Option("--config", help="Use this configuration instead of the built-in one.")
    ] = None,
    data: Annotated[list[str] | None, typer.Option(help="Test records; may be repeated.")] = None,
    out: Annotated[Path, typer.Option(help="Run directory.")] = Path("runs/demo"),
    num_per_task: Annotated[int, typer.Option(min=1, help="Test prompts per task.")] = 100,
) -> None:
    """Train a small federation, serve it, send it test prompts, score the answers and stop."""
    from fedrouter.config_file import load_config
    from fedrouter.evaluate import evaluate as run_eval
    from fedrouter.evaluate import first_of_each_task, load
    from fedrouter.report import write_report
    from fedrouter.serve.launch import running_server
    from fedrouter.train.machine import side_by_side
    from fedrouter.train.run import train as run_train

    if (config_file is None) != (data is None):
        raise ConfigError("demo: give both --config and --data, or neither")
    config = load_config(config_file)
    console.rule("1 · train: clients that share no data, one adapter per task")
    bundle = run_train(config, out, console, side_by_side(config.base))
    console.rule("2 · serve: vLLM with one adapter per task")
    with running_server(bundle.path, log=out / "server.log") as url:
        console.print(f"ready at {url}; server log: {out / 'server.log'}", highlight=False)
        console.rule('3 · ask: every test prompt goes to model "fedrouter"')
        records = first_of_each_task(
            load(data or ["builtin:four-tasks"], num_per_task=num_per_task), num_per_task
        )
        report = run_eval(url, records, ["fedrouter", "base"], console=console)
    _show(report, out / "eval.json", None)
    page = write_report(out, data or ["builtin:four-tasks"])
    copied = shlex.quote(str(bundle.path))
    print_line(
        console,
        f"\nThe server has stopped. Report of this run: {page}\nNext:\n"
        f"  fedrouter serve {copied}            # then ask it anything at http://127.0.0.1:8000/fedrouter/\n"
        f'  fedrouter route {copied} "Ana: lunch at noon? Ben: yes, at the harbour"\n'
        f"  fedrouter inspect {shlex.quote(str(out))}\n"
        f"  fedrouter train --help                      # your own data: see README.md",
    )


def bundle_directory(path: Path) -> Path:
    """Return the bundle's directory, given it or its run directory."""
    return path / "bundle" if not (path / "manifest.json").exists() and (path / "bundle").is_dir() else path


def _load(directory: Path, base: str | None, embedder_url: str | None) -> "tuple[Bundle, Embedder]":
    from fedrouter.bundle import find_base, find_embedder, load_bundle

    bundle = load_bundle(bundle_directory(directory))
    return bundle, find_embedder(bundle, find_base(bundle, base), embedder_url)


def _stdin_lines() -> Iterator[str]:
    """Yield the lines of standard input that are not blank."""
    if sys.stdin.isatty():
        stderr.print("one prompt per line; Ctrl-D ends", highlight=False)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    for number in itertools.count(1):
        if sys.stdin.isatty():
            stderr.print("> ", end="", highlight=False)
        line = sys.stdin.readline()
        if not line:
            return
        _check_utf8(line, f"standard input, line {number}")
        if line.strip():
            yield line.strip()
            sys.stdout.flush()


def _check_utf8(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes that are not text are kept as surrogates
        raise DataError(f"{where}: not UTF-8 (character {error.start + 1}); give it as UTF-8") from error


def _decision_json(text: str, decision: "Decision") -> dict[str, object]:
    from dataclasses import asdict
    from math import isfinite

    from fedrouter.decide import verdict

    found = {"prompt": text, **asdict(decision), "verdict": verdict(decision)}
    found |= {name: None for name in ("distance", "margin") if not isfinite(found[name])}
    del found["turn"]  # always 0 for a single prompt
    return found


def _show_decision(text: str, decision: "Decision", bundle: "Bundle") -> None:
    from rich.table import Table
    from rich.text import Text

    from fedrouter.decide import verdict
    from fedrouter.layout import Whole
    from fedrouter.route import REJECT

    console.print(Text(text if len(text) < 60 else f"{text[:57]}…", style="italic"), soft_wrap=True)
    if decision.distances:
        table = Table("task cluster", "distance", "radius")
        radii = {c.name: c.radius for c in bundle.clusters}
        for name, distance in decision.distances.items():
            table.add_row(Text(name), f"{distance:.3f}", f"{radii[name]:.3f}")
        _print_whole(Whole(table))
    rejected = decision.model == REJECT
    answer = "nobody" if rejected else decision.model
    where = f"{verdict(decision)} of {decision.cluster}" if decision.cluster else verdict(decision)
    policy = "rejected" if rejected else f"falls back ({bundle.fallback})"
    suffix = f", {policy}" if decision.fallback else ""
    console.print(Text(f"→ {answer}: {where}{suffix}"), soft_wrap=True, highlight=False)


def _print_json(value: object, indent: int | None = 2) -> None:
    import json

    print(json.dumps(value, ensure_ascii=False, indent=indent), flush=True)  # noqa: T201 - for programs


def _print_whole(content: "RenderableType") -> None:
    from fedrouter.layout import show

    show(console, content)


def _show(report: "Report", out: Path | None, records: Path | None, *, as_json: bool = False) -> None:
    from fedrouter.evaluate import render, to_json, write_json, write_records

    if as_json:
        print(to_json(report))  # noqa: T201 - for programs
    else:
        _print_whole(render(report))
    if out:
        write_json(report, out)
    if records:
        write_records(report, records)


def _check_files(*files: Path | None) -> None:
    """Check that files can be written, before anything that takes long."""
    from fedrouter.files import check_directory

    for file in filter(None, files):
        check_directory(file.parent, f"{file}: its directory")


def _named(text: str, option: str, form: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise ConfigError(f"{option} {text}: expected {form}")
    return name, path


def _interrupted(directory: Path, kept: str, what: str) -> NoReturn:
    """Say whether the same command resumes: only if there are files ``kept`` in the directory; exit."""
    if any(directory.glob(kept)):
        how = f"run the same command again to resume {what} in {directory}"
    else:
        how = "nothing was finished; the same command starts from the beginning"
    print_line(stderr, f"interrupted; {how}")
    raise typer.Exit(130)


def _sources(given: list[str] | None, option: str) -> dict[str, str]:
    sources = dict(_named(text, option, "NAME=FILE") for text in given or [])
    if len(sources) < len(given or []):
        raise ConfigError(f"{option}: two entries have the same name")
    return sources


def _fields(given: Sequence[str] | None) -> dict[str, str]:
    pairs = [text.partition("=") for text in given or ()]
    if bad := next((field for field, _, name in pairs if not name), None):
        raise ConfigError(f"--field {bad}: expected FIELD=NAME, as in prompt=question")
    fields = {field: name for field, _, name in pairs}
    if len(fields) < len(pairs):
        raise ConfigError("--field: two entries are for the same field")
    return fields


def _api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise ConfigError(f"--api-key-env {variable}: that environment variable is not set")
    return os.environ[variable]


def main() -> None:
    """Run the command line; a FedRouterError or a full disk prints one line and exits with code 1."""
    _open_closed()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a script ignore SIGINT
    signal.signal(signal.SIGTERM, _interrupt)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no text
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # here, because an error at interpreter exit would print a traceback
    except FedRouterError as error:
        _fail(error, str(error))
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        _fail(error, f"cannot write {error.filename or 'the output'}: {error.strerror}; free some disk space")


def _open_closed() -> None:
    """Open /dev/null in place of closed standard streams; other files would get their numbers."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # lowest number first
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115, PTH123 - stays open


def _fail(error: Exception, message: str) -> None:
    if os.environ.get("FEDROUTER_DEBUG"):
        raise error
    from rich.text import Text

    stderr.print(Text.assemble(("error:", "red"), f" {message}"), soft_wrap=True, highlight=False)
    try:
        sys.stdout.flush()
    except OSError:  # the rest of the buffer would fail again at interpreter exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)


def _interrupt(number: int, _frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second signal must not interrupt the shutdown
    raise KeyboardInterrupt
