"""``fedrouter serve BUNDLE --upstream URL``: the hook in front of vLLM servers that run already."""

import asyncio
import os
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from fedrouter.errors import ServingError
from fedrouter.route import BASE_NAME
from fedrouter.serve.access import Access, load_keys
from fedrouter.serve.checks import check_port
from fedrouter.serve.launch import Options, make_settings, metrics_key, ready_lines, server_key
from fedrouter.serve.process import Command

NEEDED = ("httpx", "prometheus_client", "uvicorn")


def serve_upstream(bundle_path: Path, urls: Sequence[str], options: Options) -> int:
    """Route to running vLLM servers until SIGINT or SIGTERM; return the exit code.

    Parameters
    ----------
    urls : addresses of the servers; each must serve all adapters by their names, and the base as "base".

    Raises
    ------
    FedRouterError
        If the bundle must not be served, or the proxy cannot start.
    """
    if options.adapters or options.vllm_args:
        raise ServingError("--adapter and vLLM's flags belong to the upstream servers: leave them out here")
    if options.watch:
        raise ServingError("--watch: a proxy cannot reload; use it on the upstream servers")
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ServingError(f'{", ".join(missing)} not installed: pip install "fedrouter[proxy]"')
    for url in urls:
        if not url.startswith(("http://", "https://")):
            raise ServingError(f"--upstream {url}: expected http://HOST:PORT")
    check_port(options.host, options.port)
    key = server_key(options)
    if key is not None:
        os.environ["VLLM_API_KEY"] = key  # the hook reads it there
    with suppress(KeyboardInterrupt):
        asyncio.run(_serve(bundle_path, urls, options, key))
    return 0


async def _serve(bundle_path: Path, urls: Sequence[str], options: Options, key: str | None) -> None:
    import uvicorn

    from fedrouter.serve.middleware import FedRouterMiddleware
    from fedrouter.serve.proxy import Proxy
    from fedrouter.serve.routing import load_routing
    from fedrouter.serve.second import load_second

    keys = load_keys(options.keys_file) if options.keys_file else None
    access = Access(key, keys, metrics_key(options))
    settings = make_settings(options, bundle_path, options.base)
    routing = await asyncio.to_thread(load_routing, settings)
    second = await asyncio.to_thread(load_second, settings, routing)
    models = [BASE_NAME, *routing.bundle.adapter_paths, *(second.adapters if second else ())]
    proxy = Proxy(urls, models, key, options.limits)
    hook = FedRouterMiddleware(
        proxy, lambda: settings, lambda _: routing, lambda _: access, lambda *_: second
    )
    config = uvicorn.Config(
        hook,
        options.host,
        options.port,
        log_level="warning",
        access_log=False,
        lifespan="on",
        http="h11",  # uvicorn's other parser drops the body of a request that offers an upgrade
        ws="none",
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while hook.state == "starting" and not serving.done():
        await asyncio.sleep(0.05)
    if hook.state == "ready" and server.started:
        url = Command((), {}, {}, options.host, options.port).url
        print(ready_lines(routing.bundle, url, options), flush=True)  # noqa: T201 - for the user
    elif hook.state == "failed":
        server.should_exit = True
    await serving
    if hook.state == "failed":
        raise ServingError("readiness checks failed upstream; the output above says why")
    if not server.started:
        raise ServingError("the proxy could not start; the output above says why")
