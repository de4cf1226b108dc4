"""Requests from the command line to a running server."""

from typing import Any

import httpx

from fedrouter.errors import ServingError
from fedrouter.serve.asgi import reason
from fedrouter.serve.paths import RELOAD


def request_reload(url: str, bundle: str, api_key: str | None, timeout_s: float) -> dict[str, Any]:
    """Ask a server to serve another bundle; return the adapters that it loaded, kept and unloaded.

    Raises
    ------
    ServingError
        If the server cannot be reached or refuses.
    """
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    address = f"{url.rstrip('/').removesuffix('/v1')}{RELOAD}"
    try:
        answer = httpx.post(address, json={"bundle": bundle}, headers=headers, timeout=timeout_s)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServingError(f"{url}: {error or type(error).__name__}") from error
    try:
        payload = answer.json()
    except ValueError:
        payload = answer.text
    if answer.status_code == 200 and isinstance(payload, dict):
        return payload
    raise ServingError(f"{url} refused the reload ({answer.status_code}): {reason(payload)}")
