"""From a bundle to a running vLLM: check what can be checked, compute vLLM's arguments, start it.

vLLM runs in another process and is never imported here: its import takes longer than all checks.
"""

import json
import os
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from fedrouter.bundle import Bundle, find_base, find_embedder, load_bundle
from fedrouter.embed import find_model
from fedrouter.errors import ServingError
from fedrouter.route import BASE_NAME, Router
from fedrouter.serve import engine
from fedrouter.serve.access import METRICS_KEY, load_keys
from fedrouter.serve.checks import check_adapter, check_alike, check_port, find_vllm, free_port
from fedrouter.serve.decision_log import LogOptions, check_log
from fedrouter.serve.limits import Limits
from fedrouter.serve.paths import CHAT, CONSOLE, READY, VIRTUAL_NAME
from fedrouter.serve.process import Command, running
from fedrouter.serve.settings import Settings

MIDDLEWARE = "fedrouter.serve.middleware.FedRouterMiddleware"
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values that vLLM accepts for --max-lora-rank
MAX_SLOTS = 16  # adapters in one batch; every slot costs memory; further adapters stay in --max-cpu-loras
SMALL_MACHINE = 4  # cores
RESERVED = (
    *("--model", "--host", "--port", "--uds", "--served-model-name", "--enable-lora", "--lora-modules"),
    "--api-key",  # the hook needs it too, and every user can read a command line
)


@dataclass(frozen=True, slots=True)
class Options:
    """How to serve a bundle."""

    base: str | None = None
    # the base model's directory or hub id, if not the one that the bundle names
    embedder_url: str | None = None
    # address of the embeddings endpoint, if the bundle's embedder is one
    host: str = "127.0.0.1"
    port: int = 8000
    api_key_env: str | None = None
    # environment variable with the server's API key
    keys_file: Path | None = None
    # API keys of clients, see ``access.load_keys``
    metrics_key_env: str | None = None
    # environment variable with the API key of /metrics
    fallback: str | None = None
    # overrides the bundle's fallback
    limits: Limits = field(default_factory=Limits)
    adapters: Mapping[str, Path] = field(default_factory=dict)
    # more PEFT adapters to serve, by name; nothing is routed to them
    signed_by: Path | None = None
    # public key that must have signed every bundle; None: bundles need no signature
    watch: bool = False
    # the bundle's path is a symbolic link: reload whenever it points to another bundle
    log: LogOptions | None = None
    # decision log
    second: Path | None = None
    # a second bundle, which routes every request too
    canary: float = 0.0
    # share of requests that the second bundle answers, 0 to 1
    console: bool = True
    # serve the web page at /fedrouter/
    vllm_args: Sequence[str] = ()
    # appended to the arguments computed here, so they take precedence


def serve(bundle_path: Path, options: Options) -> int:
    """Serve a bundle until SIGINT or SIGTERM; return the exit code.

    Raises
    ------
    FedRouterError
        If the bundle must not be served, the server cannot start, or it ends unasked.
    """
    try:
        bundle, command = prepare(bundle_path, options)
        with running(command) as process:
            print(ready_lines(bundle, command.url, options), flush=True)  # noqa: T201 - for the user
            code = process.wait()
    except KeyboardInterrupt:
        return 0
    how = f"with exit code {code}" if code else "as it does when its engine dies"
    raise ServingError(f"vLLM ended by itself, {how}; its output above says why")


@contextmanager
def running_server(
    bundle_path: Path,
    options: Options | None = None,
    *,
    log: Path | None = None,
    timeout_s: float | None = 900.0,
) -> Iterator[str]:
    """Serve a bundle while the block runs; yield the server's address, ``http://HOST:PORT``.

    Without options it listens on a free port. At the end all of the server's processes are gone.
    """
    _, command = prepare(bundle_path, options or Options(port=free_port()))
    with running(command, log, timeout_s):
        yield command.url


def prepare(bundle_path: Path, options: Options) -> tuple[Bundle, Command]:
    """Check all that can be checked before vLLM starts; return the bundle and the command to start."""
    cpu = find_vllm()
    check_port(options.host, options.port)
    if options.log is not None:
        check_log(options.log)
    key = server_key(options)
    metrics_key(options)  # raises if the variable is not set
    if options.watch and not bundle_path.is_symlink():
        raise ServingError(f"--watch: {bundle_path} is not a symbolic link; leave --watch out")
    bundle = load_bundle(bundle_path, options.signed_by)
    if options.fallback is not None:
        Router(bundle, options.fallback)  # raises if the bundle cannot have it
    base_path = find_base(bundle, options.base)
    second = load_bundle(options.second, options.signed_by) if options.second else None
    if second is not None:
        check_alike(bundle, second)
    ranks = [second.rank] if second is not None else []
    ranks += [check_adapter(name, path, bundle, base_path) for name, path in options.adapters.items()]
    command = build_command(bundle, base_path, options, max([bundle.rank, *ranks]), key, cpu, second=second)
    if options.embedder_url is not None:
        find_embedder(bundle, base_path, options.embedder_url)
    else:  # only its files; vLLM's processes check its vectors: that would import torch here too
        find_model(bundle.embedder, bundle.base, base_path)
    return bundle, command


def server_key(options: Options) -> str | None:
    """Return the server's own API key; None if the server is open.

    The hook replaces clients' keys by the server's. With a keys file and no key given, a random one is made.

    Raises
    ------
    ServingError
        If the environment variable is not set, or the keys file is invalid.
    """
    key = os.environ.get("VLLM_API_KEY") or None
    if options.api_key_env is not None:
        key = _from_env(options.api_key_env)
    if options.keys_file is not None:
        load_keys(options.keys_file)
        key = key or secrets.token_urlsafe(32)
    return key


def metrics_key(options: Options) -> str | None:
    """Return the API key of ``/metrics``; None if that path has none of its own.

    Raises
    ------
    ServingError
        If the environment variable is not set.
    """
    return _from_env(options.metrics_key_env) if options.metrics_key_env is not None else None


def build_command(
    bundle: Bundle,
    base_path: Path,
    options: Options,
    rank: int,
    api_key: str | None = None,
    cpu: bool = False,
    cores: int | None = None,
    second: Bundle | None = None,
) -> Command:
    """Compute vLLM's arguments and environment.

    Parameters
    ----------
    rank : largest rank of all adapters; the declared rank costs speed, whatever ranks are used.
    cpu : whether vLLM is the build for machines without a GPU.
    cores : number of cores that this process may use; None: ask the system.
    second : the loaded bundle of ``options.second``.

    Raises
    ------
    ServingError
        If vLLM does not allow the rank, or ``vllm_args`` sets a flag that is set here.
    """
    several = _check_arguments(options.vllm_args)
    if several and options.watch:
        raise ServingError("--watch: several API processes cannot reload; leave it or --api-server-count out")
    allowed = [limit for limit in LORA_RANKS if limit >= rank]
    if not allowed:
        raise ServingError(f"{bundle.path}: an adapter has rank {rank}; vLLM serves up to {LORA_RANKS[-1]}")
    modules = bundle.adapter_paths | dict(options.adapters)
    if second is not None and options.canary:
        modules |= second.adapter_paths
    argv = [sys.executable, "-m", engine.__name__]
    argv += ["--model", str(base_path), "--served-model-name", BASE_NAME, VIRTUAL_NAME]
    argv += ["--host", options.host, "--port", str(options.port), "--middleware", MIDDLEWARE]
    argv += ["--enable-lora", "--lora-modules"]
    argv += [
        json.dumps({"name": name, "path": str(path.resolve()), "base_model_name": BASE_NAME})
        for name, path in modules.items()
    ]
    # Room for all adapters of two bundles, as during a reload: an evicted one would be read from disk again.
    capacity = len(modules) + len(bundle.adapter_paths)
    # In a mixed batch vLLM's CPU kernels apply the adapter in the last slot to tokens of the base (index -1
    # in lora/ops/torch_ops): that slot must stay empty, even during a reload.
    slots, capacity = (capacity + 1, capacity + 1) if cpu else (min(len(modules), MAX_SLOTS), capacity)
    if cpu and 0 < _number(options.vllm_args, "--max-loras") <= len(modules):
        raise ServingError(
            f"vLLM flag --max-loras must be above {len(modules)}, the number of adapters: vLLM's CPU backend "
            "needs an empty slot"
        )
    argv += ["--max-lora-rank", str(allowed[0]), "--max-loras", str(slots), "--max-cpu-loras", str(capacity)]
    if bundle.chat_template is not None:
        argv += ["--chat-template", str(bundle.chat_template.resolve())]
    link = bundle.path.absolute()
    settings = make_settings(
        options,
        bundle.path.resolve(),
        str(base_path.resolve()),
        bundle_root=link.parent.resolve(),
        watch=link if options.watch else None,
    )
    env = settings.to_env()
    env[engine.RELOADS] = "0" if several else "1"  # vLLM loads adapters into one process only
    if (page_key := metrics_key(options)) is not None:
        env[METRICS_KEY] = page_key
    if api_key is not None:
        env["VLLM_API_KEY"] = api_key  # not in argv: every user can read a command line
    defaults = {"VLLM_NO_USAGE_STATS": "1"}  # sent only if the user asks for it
    if cpu:
        argv += ["--dtype", "float32", "--enforce-eager"]
        defaults["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB
        if "--no-enforce-eager" not in {flag.replace("_", "-") for flag in options.vllm_args}:
            # Even with --enforce-eager vLLM compiles a helper for log-likelihoods: for two seconds all
            # requests wait, the readiness checks included.
            defaults["TORCHDYNAMO_DISABLE"] = "1"
        cores = cores or len(os.sched_getaffinity(0))
        if cores <= SMALL_MACHINE:
            # One process fewer imports everything: ready in 25 s, not 40. That process also binds vLLM's
            # threads and leaves one core to the scheduler; OMP_NUM_THREADS does so here.
            argv += ["--distributed-executor-backend", "uni"]
            defaults |= {"OMP_NUM_THREADS": str(max(1, cores - 1))}
            defaults |= {} if several else {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    tls = any(argument.startswith("--ssl-certfile") for argument in options.vllm_args)
    return Command([*argv, *options.vllm_args], env, defaults, options.host, options.port, tls, READY)


def make_settings(
    options: Options,
    bundle: Path,
    base: str | None,
    bundle_root: Path | None = None,
    watch: Path | None = None,
) -> Settings:
    """Return the hook's settings; only a server that can reload has ``bundle_root``."""
    return Settings(
        bundle=bundle,
        bundle_root=bundle_root,
        base=base,
        watch=watch,
        embedder_url=options.embedder_url,
        fallback=options.fallback,
        signed_by=options.signed_by and options.signed_by.resolve(),
        limits=options.limits,
        keys_file=options.keys_file and options.keys_file.resolve(),
        log=options.log and replace(options.log, path=options.log.path.absolute()),
        second=options.second and options.second.resolve(),
        canary=options.canary,
        console=options.console,
    )


def ready_lines(bundle: Bundle, url: str, options: Options) -> str:
    """Return the lines that are printed when a server is ready: what it serves, and how to try it."""
    key_env = options.api_key_env or ("CLIENT_KEY" if options.keys_file is not None else None)
    if key_env is None and os.environ.get("VLLM_API_KEY"):
        key_env = "VLLM_API_KEY"
    key = f' -H "Authorization: Bearer ${key_env}"' if key_env else ""
    question = json.dumps({"model": VIRTUAL_NAME, "messages": [{"role": "user", "content": "Hello"}]})
    return (
        f"Ready: {url}/v1 serves {bundle.path}; model {VIRTUAL_NAME} routes to "
        f"{', '.join(cluster.adapter for cluster in bundle.clusters)}\n"
        f"Try: curl -i {url}{CHAT} -H 'Content-Type: application/json'{key} "
        f"-d '{question}'" + (f"\nLook: {url}{CONSOLE}" if options.console else "")
    )


def _from_env(variable: str) -> str:
    if not os.environ.get(variable):
        raise ServingError(f"environment variable {variable} is empty or not set; it must hold the API key")
    return os.environ[variable]


def _check_arguments(vllm_args: Sequence[str]) -> bool:
    """Refuse flags that are set here; return whether vLLM is to run several API processes."""
    for argument in vllm_args:
        if argument.split("=")[0].replace("_", "-") in RESERVED:
            raise ServingError(
                f"vLLM flag {argument} is set by fedrouter serve: use its option, or leave the flag out"
            )
    return _number(vllm_args, "--api-server-count") > 1


def _number(arguments: Sequence[str], flag: str) -> int:
    """Return the value of a numeric flag; 0 if it is missing or no number, which vLLM refuses itself."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    values = [value for name, value in pairwise(words) if name.replace("_", "-") == flag]
    return int(values[-1]) if values and values[-1].isdigit() else 0
