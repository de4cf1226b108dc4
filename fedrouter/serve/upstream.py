"""The hook before vLLM servers that somebody else started: ``fedrouter serve BUNDLE --upstream URL``."""

import asyncio
import os
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from fedrouter.errors import ServingError
from fedrouter.route import BASE_NAME
from fedrouter.serve.checks import check_port
from fedrouter.serve.launch import read_key, ready_lines
from fedrouter.serve.limits import Limits
from fedrouter.serve.process import Command

NEEDED = ("httpx", "prometheus_client", "uvicorn")


def serve_upstream(
    bundle_path: Path,
    base: str | None,
    host: str,
    port: int,
    api_key_env: str | None,
    urls: Sequence[str],
    limits: Limits,
) -> int:
    """Route to vLLM servers that hold a bundle's adapters, until SIGINT or SIGTERM; return the exit code.

    Parameters
    ----------
    urls : of the servers. Each must serve every adapter of the bundle under its name, and the base as "base".

    Raises
    ------
    FedRouterError
        If the bundle must not be served, or the proxy cannot start.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ServingError(f'{", ".join(missing)} not installed: pip install "fedrouter[proxy]"')
    for url in urls:
        if not url.startswith(("http://", "https://")):
            raise ServingError(f"--upstream {url}: expected http://HOST:PORT")
    check_port(host, port)
    key = read_key(api_key_env)
    if key is not None:
        os.environ["VLLM_API_KEY"] = key  # where the hook finds it in vLLM's processes too
    with suppress(KeyboardInterrupt):
        asyncio.run(_serve(bundle_path, base, host, port, key, api_key_env, urls, limits))
    return 0


async def _serve(
    bundle_path: Path,
    base: str | None,
    host: str,
    port: int,
    key: str | None,
    api_key_env: str | None,
    urls: Sequence[str],
    limits: Limits,
) -> None:
    import uvicorn

    from fedrouter.serve.middleware import FedRouterMiddleware
    from fedrouter.serve.proxy import Proxy
    from fedrouter.serve.routing import make_routing

    routing = await asyncio.to_thread(make_routing, bundle_path, base, limits)
    models = [BASE_NAME, *(cluster.adapter for cluster in routing.bundle.clusters)]
    hook = FedRouterMiddleware(Proxy(urls, models, key, limits), lambda: routing)
    server = uvicorn.Server(
        uvicorn.Config(hook, host, port, log_level="warning", access_log=False, lifespan="on")
    )
    serving = asyncio.create_task(server.serve())
    while hook.state == "starting" and not serving.done():
        await asyncio.sleep(0.05)
    if hook.state == "ready":
        url = Command((), {}, {}, host, port).url
        print(ready_lines(routing.bundle, url, api_key_env), flush=True)  # noqa: T201 - for who started it
    elif hook.state == "failed":
        server.should_exit = True
    await serving
    if hook.state == "failed":
        raise ServingError("an adapter answers as the base does upstream; the output above names it")
    if not server.started:
        raise ServingError("the proxy could not start; its output above says why")
