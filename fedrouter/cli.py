"""The commands, thin: options in, one call, domain errors as one red line. Heavy imports happen inside."""

import errno
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedrouter import __version__
from fedrouter.cli_federation import client as client_app
from fedrouter.cli_federation import federation as federation_app
from fedrouter.errors import ConfigError, FedRouterError

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
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
console = Console()
stderr = Console(stderr=True)

Out = Annotated[Path | None, typer.Option(help="Where the run goes; resumes a run that is there.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a setting.")
]
Processes = Annotated[
    int,
    typer.Option(min=1, help="Train so many adapters at a time: each on a GPU, or a share of the threads."),
]
BundleDir = Annotated[Path, typer.Argument(help="A bundle, or a run directory that holds one.")]
BaseOption = Annotated[
    str | None, typer.Option(help="Where the base model is, if not where the bundle says.")
]
EmbedderUrl = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Where the bundle's embedder is, if it is an embeddings endpoint."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
KeyOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="Environment variable that holds the API key.")
]
FieldOption = Annotated[
    list[str] | None,
    typer.Option(metavar="FIELD=NAME", help="What the files call a field, as in [data.fields]."),
]


def version(show: bool) -> None:
    """Print the version and leave."""
    if show:
        console.print(f"fedrouter {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def root(
    *,
    debug: Annotated[bool, typer.Option(help="Show the whole trace of an error.")] = False,
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
        typer.Option(metavar="DIR", help="Train with the clients of this federation, on their machines."),
    ] = None,
) -> None:
    """Train one adapter per task cluster and write a bundle."""
    from fedrouter.config_file import load_config

    directory = out or Path("runs") / (config.stem if config else "four-tasks")
    try:
        if federation is not None:
            from fedrouter.train.flower.run import train_over_flower

            bundle = train_over_flower(config, set_ or [], directory, federation, console)
        else:
            from fedrouter.train.run import train as run

            bundle = run(load_config(config, set_ or []), directory, console, processes)
    except KeyboardInterrupt:
        stderr.print(f"interrupted; the same command goes on from the last finished round in {directory}")
        raise typer.Exit(130) from None
    console.print(
        f"bundle: {bundle.path}\nserve it: fedrouter serve {bundle.path}", highlight=False, soft_wrap=True
    )


@app.command()
def check(
    config: Annotated[
        Path | None, typer.Argument(help="TOML; without it the built-in four tasks, dual.")
    ] = None,
    set_: Set = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
) -> None:
    """Show what training would do with your data; trains nothing. Fails where train would refuse."""
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
    run: Annotated[Path, typer.Argument(help="A finished run; it stays as it is.")],
    client: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FILE", help="A client to add, and its data.")
    ] = None,
    moved: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="A client that is there, and the data it has now."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where to; otherwise RUN and the names, beside it.")
    ] = None,
    processes: Processes = 1,
) -> None:
    """Add clients to a finished run, or let them move; train only what is new."""
    sources, changed = _sources(client, "--client"), _sources(moved, "--moved")
    if not sources and not changed:
        raise ConfigError("nobody to join: give --client NAME=FILE or --moved NAME=FILE")
    from fedrouter.train.join import join as add

    try:
        bundle = add(run, sources, changed, out, console, processes)
    except KeyboardInterrupt:
        stderr.print("interrupted; the same command goes on from the last finished round")
        raise typer.Exit(130) from None
    console.print(
        f"bundle: {bundle.path}\non a running server: fedrouter reload URL {bundle.path}",
        highlight=False,
        soft_wrap=True,
    )


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
        bool, typer.Option("--watch", help="BUNDLE is a link: when it points elsewhere, serve that.")
    ] = False,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DIR", help="Serve one more PEFT adapter by name; not routed to."),
    ] = None,
    fallback: Annotated[
        str | None,
        typer.Option(metavar="POLICY", help="Beyond the radius: base, generalist, nearest or reject."),
    ] = None,
    require_signature: Annotated[
        Path | None,
        typer.Option(metavar="KEY", help="Serve bundles alone that the owner of this public key has signed."),
    ] = None,
    keys_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Clients' API keys: JSON, SHA-256 of a key to client name."),
    ] = None,
    metrics_key_env: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Environment variable with the key of /metrics, open without."),
    ] = None,
    upstream: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="Start no vLLM: route to this server, which holds the adapters."),
    ] = None,
    overload: Annotated[
        str, typer.Option(metavar="base|reject", help="Too many wait to be routed: base answers, or 503.")
    ] = "base",
    max_queue: Annotated[int, typer.Option(min=1, help="Texts that may wait to be routed.")] = 256,
    routing_timeout_s: Annotated[float, typer.Option(help="The longest wait to be routed.")] = 5.0,
    max_body_mib: Annotated[float, typer.Option(help="The largest body that is read.")] = 8.0,
    decision_log: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep every decision, as JSON Lines.")
    ] = None,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Keep texts of prompts in the decision log as well.")
    ] = False,
    log_vectors: Annotated[
        bool, typer.Option("--log-vectors", help="Keep vectors of prompts in the decision log as well.")
    ] = False,
    decision_log_mib: Annotated[
        float, typer.Option(help="The size of a decision log at which the next one is begun.")
    ] = 64.0,
    shadow: Annotated[
        Path | None,
        typer.Option(metavar="BUNDLE", help="Let this bundle decide as well, and count where it differs."),
    ] = None,
    canary: Annotated[
        float, typer.Option(min=0, max=100, help="Percent of requests that --shadow's bundle answers.")
    ] = 0.0,
    no_console: Annotated[bool, typer.Option("--no-console", help="No web page at /fedrouter/.")] = False,
) -> None:
    """Serve a bundle with vLLM: model "fedrouter" routes. Flags after -- go to vLLM."""
    try:
        from fedrouter.serve.decision_log import LogOptions
        from fedrouter.serve.launch import Options
        from fedrouter.serve.launch import serve as run
        from fedrouter.serve.limits import Limits
        from fedrouter.serve.upstream import serve_upstream

        if (log_prompts or log_vectors) and decision_log is None:
            raise ConfigError("--log-prompts and --log-vectors belong to --decision-log FILE")
        if canary and shadow is None:
            raise ConfigError("--canary PERCENT belongs to --shadow BUNDLE, which answers that share")
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
    except KeyboardInterrupt:  # while it was starting: told to stop, it has stopped
        code = 0
    raise typer.Exit(code)


@app.command()
def reload(
    url: Annotated[str, typer.Argument(help="The server, http://HOST:PORT.")],
    bundle: Annotated[
        str, typer.Argument(help="A bundle where the server runs, beside the one that it serves.")
    ],
    api_key_env: KeyOption = None,
    timeout_s: Annotated[float, typer.Option(min=1, help="Old requests are waited for.")] = 900.0,
) -> None:
    """Let a running server serve another bundle, without a restart."""
    from fedrouter.serve.client import request_reload

    changes = request_reload(url, bundle, _api_key(api_key_env), timeout_s)
    for what in ("loaded", "kept", "unloaded"):
        if changes[what]:
            console.print(f"{what}: {', '.join(changes[what])}", highlight=False, soft_wrap=True)
    console.print(f"{url} serves {changes['bundle']}", highlight=False, soft_wrap=True)


@app.command("eval")
def evaluate(
    url: Annotated[str, typer.Argument(help="The endpoint, http://HOST:PORT.")],
    data: Annotated[
        list[str], typer.Option(metavar="FILE", help="Test records: files, data sets, or builtin:four-tasks.")
    ],
    model: Annotated[
        list[str] | None,
        typer.Option(help="A model to ask; several are compared. oracle: each task's own adapter."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the report here as JSON.")] = None,
    records: Annotated[Path | None, typer.Option(help="Write every answer here as JSONL.")] = None,
    api_key_env: KeyOption = None,
    concurrency: Annotated[int, typer.Option(min=1)] = 16,
    max_tokens: Annotated[int, typer.Option(min=1)] = 64,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many records a task.")] = None,
    timeout_s: Annotated[float, typer.Option(min=1, help="For one request.")] = 120.0,
    retries: Annotated[int, typer.Option(min=0)] = 3,
    field: FieldOption = None,
    as_json: Json = False,
) -> None:
    """Score an endpoint on test records, per task, client and adapter."""
    from fedrouter.evaluate import evaluate as run
    from fedrouter.evaluate import load

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
    out: Annotated[Path | None, typer.Option(help="Where cells go; goes on with what is there.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Cells at a time, each a process.")] = 1,
    only: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Cells to run: WORLD/SCENARIO/METHOD/SEED.")
    ] = None,
    results: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Their results; without: in --out.")
    ] = None,
) -> None:
    """Run an evaluation like the paper's: methods × scenarios × seeds, cell by cell."""
    from fedrouter.experiment.run import run_experiment
    from fedrouter.experiment.settings import load_experiment

    settings = load_experiment(config)
    directory = out or Path("runs") / config.stem
    try:
        run_experiment(settings, directory, console, jobs=jobs, only=only or (), results=results)
    except KeyboardInterrupt:
        stderr.print(f"interrupted; the same command goes on with the cells in {directory}")
        raise typer.Exit(130) from None


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
    limit: Annotated[int, typer.Option(min=1, help="Records a task of built-in data.")] = 100,
    field: FieldOption = None,
    as_json: Json = False,
) -> None:
    """Say how a bundle routes labelled prompts; no server needed."""
    from fedrouter.evaluate import load, offline

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
        list[str] | None, typer.Argument(help="Prompts; without one they are read line by line.")
    ] = None,
    base: BaseOption = None,
    embedder_url: EmbedderUrl = None,
    as_json: Json = False,
) -> None:
    """Say which adapter would answer a prompt, and why; no server needed."""
    from fedrouter.decide import decide
    from fedrouter.route import Router

    loaded, embedder = _load(bundle, base, embedder_url)
    router = Router(loaded)
    for text in prompt or _typed():
        [decision] = decide(router, embedder, [text])
        if as_json:
            _print_json(_decision_json(text, decision), indent=None)
        else:
            _show_decision(text, decision, loaded)


@app.command()
def inspect(path: Annotated[Path, typer.Argument(help="A run or a bundle.")], as_json: Json = False) -> None:
    """Show what is in a run or a bundle."""
    from fedrouter.inspect import look, show

    if as_json:
        _print_json(look(path))
    else:
        show(path, console)


@app.command()
def replay(
    log: Annotated[Path, typer.Argument(help="A decision log; its older files FILE.1 … are read too.")],
    bundle: BundleDir,
    base: BaseOption = None,
    embedder_url: EmbedderUrl = None,
    as_json: Json = False,
) -> None:
    """Say what another bundle would have decided."""
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
        Path | None, typer.Argument(help="Probes, JSON Lines; without it those that the bundle carries.")
    ] = None,
    base: BaseOption = None,
    embedder_url: EmbedderUrl = None,
    as_json: Json = False,
) -> None:
    """Ask whether each probe goes to its task cluster; exit code 1 if one does not."""
    import asyncio

    from fedrouter.bundle import parse_probes, read_probes
    from fedrouter.decide import decide
    from fedrouter.probes import ask
    from fedrouter.route import Router

    probes = parse_probes(read_probes(file), file) if file else ()
    loaded, embedder = _load(bundle, base, embedder_url)
    probes = probes or loaded.probes
    if not probes:
        raise ConfigError(f"{loaded.path} carries no probes; give a file of them")
    router = Router(loaded)

    async def route(texts: Sequence[str]) -> "list[Decision]":
        return decide(router, embedder, texts)

    asked = asyncio.run(ask(probes, route))
    broken = [one for one in asked if not one.holds]
    if as_json:
        found = [
            {
                "where": one.probe.where,
                "turns": one.probe.turns,
                "expected": one.probe.cluster,
                "holds": one.holds,
            }
            | {"cluster": one.decision.cluster, "fallback": one.decision.fallback}
            for one in asked
        ]
        _print_json({"probes": found, "num_broken": len(broken)})
    else:
        for one in broken:
            console.print(str(one), highlight=False, soft_wrap=True, markup=False)
        console.print(f"{len(asked) - len(broken)} of {len(asked)} probes hold", highlight=False)
    if broken:
        raise typer.Exit(1)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run directory, or an experiment's.")],
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Test records with a task; built-in runs take theirs."),
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open it in a browser.")] = False,
    base: BaseOption = None,
    embedder_url: EmbedderUrl = None,
) -> None:
    """Write one HTML file about a run: losses, task clusters, routing on test data, costs."""
    if (run / "experiment.json").is_file():
        from fedrouter.experiment.report import show_report

        page = show_report(run)
    else:
        from fedrouter.report import write_report

        page = write_report(run, data, base=base, embedder_url=embedder_url)
    console.print(f"report: {page}", highlight=False, soft_wrap=True)
    if show:
        import webbrowser

        webbrowser.open(page.resolve().as_uri())


@app.command()
def sign(
    bundle: BundleDir,
    key: Annotated[Path, typer.Argument(help="A private Ed25519 key, PEM.")],
) -> None:
    """Sign a bundle, for servers with --require-signature."""
    from fedrouter.bundle import load_bundle, sign_bundle

    loaded = load_bundle(bundle_directory(bundle))
    console.print(f"signed: {sign_bundle(loaded.path, key)}", highlight=False, soft_wrap=True, markup=False)


@app.command()
def push(
    bundle: BundleDir,
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the Hugging Face hub.")],
    private: Annotated[bool, typer.Option("--private", help="If the repository has to be made.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to.")] = None,
    sign: Annotated[
        Path | None, typer.Option(metavar="KEY", help="Sign it before: a private Ed25519 key, PEM.")
    ] = None,
) -> None:
    """Upload a bundle to the Hugging Face hub, with a model card for each adapter."""
    from fedrouter.bundle import load_bundle, sign_bundle
    from fedrouter.push import push as run

    loaded = load_bundle(bundle_directory(bundle))
    if sign is not None:
        sign_bundle(loaded.path, sign)
    url = run(loaded, repo, private=private, revision=revision)
    console.print(url, highlight=False, soft_wrap=True)


@app.command()
def demo(
    config_file: Annotated[
        Path | None, typer.Option("--config", help="Another federation than the built-in one.")
    ] = None,
    data: Annotated[list[str] | None, typer.Option(help="Its test records; may be repeated.")] = None,
    out: Annotated[Path, typer.Option(help="Where the run goes.")] = Path("runs/demo"),
    num_per_task: Annotated[int, typer.Option(min=1, help="Test prompts a task.")] = 100,
) -> None:
    """Go the whole way on a small federation: train, serve, ask, score, stop."""
    from fedrouter.config_file import load_config
    from fedrouter.evaluate import evaluate as run_eval
    from fedrouter.evaluate import first_of_each_task, load
    from fedrouter.report import write_report
    from fedrouter.serve.launch import running_server
    from fedrouter.train.machine import side_by_side
    from fedrouter.train.run import train as run_train

    if (config_file is None) != (data is None):
        raise ConfigError("demo: --config and --data belong together")
    config = load_config(config_file)
    console.rule("1 · train: clients that share no data, one adapter per task")
    bundle = run_train(config, out, console, side_by_side(config.base))
    console.rule("2 · serve: vLLM with one adapter per task")
    with running_server(bundle.path, log=out / "server.log") as url:
        console.print(f"ready at {url}, its log is {out / 'server.log'}", highlight=False)
        console.rule('3 · ask: every test prompt goes to model "fedrouter"')
        records = first_of_each_task(
            load(data or ["builtin:four-tasks"], num_per_task=num_per_task), num_per_task
        )
        report = run_eval(url, records, ["fedrouter", "base"], console=console)
    _show(report, out / "eval.json", None)
    page = write_report(out, data or ["builtin:four-tasks"])
    console.print(
        f"\nThe server is stopped. All of this as one page: {page}\nNext:\n"
        f"  fedrouter serve {bundle.path}            # then ask it anything at http://127.0.0.1:8000/fedrouter/\n"
        f'  fedrouter route {bundle.path} "Ana: lunch at noon? Ben: yes, at the harbour"\n'
        f"  fedrouter inspect {out}\n"
        f"  fedrouter train --help                      # your own data: see README.md",
        highlight=False,
        soft_wrap=True,
    )


def bundle_directory(path: Path) -> Path:
    """Accept a run directory where a bundle is asked for."""
    return path / "bundle" if not (path / "manifest.json").exists() and (path / "bundle").is_dir() else path


def _load(directory: Path, base: str | None, embedder_url: str | None) -> "tuple[Bundle, Embedder]":
    from fedrouter.bundle import find_base, find_embedder, load_bundle

    bundle = load_bundle(bundle_directory(directory))
    return bundle, find_embedder(bundle, find_base(bundle, base), embedder_url)


def _typed() -> Iterator[str]:
    """Yield what is typed or piped in, line by line; blank lines mean nothing."""
    if sys.stdin.isatty():
        stderr.print("one prompt a line; Ctrl-D ends", highlight=False)
    while True:
        if sys.stdin.isatty():
            stderr.print("> ", end="", highlight=False)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
            sys.stdout.flush()


def _decision_json(text: str, decision: "Decision") -> dict[str, object]:
    from dataclasses import asdict
    from math import isfinite

    from fedrouter.decide import verdict

    found = {"prompt": text, **asdict(decision), "verdict": verdict(decision)}
    found |= {name: None for name in ("distance", "margin") if not isfinite(found[name])}
    del found["turn"]  # one prompt has one
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
    then = f", {'rejected' if rejected else f'falls back ({bundle.fallback})'}" if decision.fallback else ""
    console.print(Text(f"→ {answer}: {where}{then}"), soft_wrap=True, highlight=False)


def _print_json(value: object, indent: int | None = 2) -> None:
    import json

    print(json.dumps(value, ensure_ascii=False, indent=indent), flush=True)  # noqa: T201 - for programs


def _print_whole(what: "RenderableType") -> None:
    from fedrouter.layout import show

    show(console, what)


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


def _named(text: str, option: str, form: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise ConfigError(f"{option} {text}: expected {form}")
    return name, path


def _sources(given: list[str] | None, option: str) -> dict[str, str]:
    sources = dict(_named(text, option, "NAME=FILE") for text in given or [])
    if len(sources) < len(given or []):
        raise ConfigError(f"{option}: a name is given twice")
    return sources


def _fields(given: Sequence[str] | None) -> dict[str, str]:
    pairs = [text.partition("=") for text in given or ()]
    if bad := next((field for field, _, name in pairs if not name), None):
        raise ConfigError(f"--field {bad}: expected FIELD=NAME, as in prompt=question")
    return {field: name for field, _, name in pairs}


def _api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise ConfigError(f"--api-key-env {variable}: that environment variable is not set")
    return os.environ[variable]


def main() -> None:
    """Run the command line; a domain error, or an output that takes no more, is one line and exit code 1."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background job inherits it ignored
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # here, and not at the interpreter's end, where nobody can say it in one line
    except FedRouterError as error:
        _fail(error, str(error))
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        _fail(error, f"cannot write {error.filename or 'the output'}: {error.strerror}; make room")


def _fail(error: Exception, message: str) -> None:
    if os.environ.get("FEDROUTER_DEBUG"):
        raise error
    stderr.print(f"[red]error:[/red] {_escape(message)}", soft_wrap=True, highlight=False)
    try:
        sys.stdout.flush()
    except OSError:  # what is left in its buffer would fail once more at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)


def _interrupt(number: int, _frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # it is stopping: a second one must not break that off
    raise KeyboardInterrupt


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
