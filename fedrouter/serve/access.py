"""Admission by API key: which client a request belongs to, and which paths its key opens. Reads no body."""

import hashlib
import hmac
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from fedrouter.errors import ServingError
from fedrouter.serve.asgi import Refusal, Scope, header_values, path_of
from fedrouter.serve.paths import FOR_TENANTS, METRICS, OPEN
from fedrouter.serve.settings import Settings

CLIENT_HEADER = "x-fedrouter-client"
METRICS_KEY = "FEDROUTER_METRICS_KEY"  # environment variable with the API key of /metrics


@dataclass(frozen=True, slots=True)
class Caller:
    """The client that sends a request; None may use all clients' task clusters."""

    client: str | None = None
    tenant: bool = False  # identified by its API key, and restricted to its own adapters

    @property
    def tenant_name(self) -> str | None:
        """The tenant whose share of the server a request uses; None if the key identifies nobody."""
        return self.client if self.tenant else None


class Access:
    """Admits or refuses requests.

    Parameters
    ----------
    key : the server's own API key, which vLLM checks too; without one, all paths are open.
    tenants : SHA-256 of a client's API key, in hex → client name. Needs ``key``, which vLLM gets instead.
    metrics_key : API key of ``/metrics``, which ``key`` opens too; without one, that path is open.

    Raises
    ------
    ServingError
        If there are tenants but no ``key``: vLLM would be open to everybody.
    """

    def __init__(
        self,
        key: str | None = None,
        tenants: Mapping[str, str] | None = None,
        metrics_key: str | None = None,
    ):
        if tenants and not key:
            raise ServingError("a keys file needs VLLM_API_KEY too; `fedrouter serve --keys-file` sets it")
        self._key, self._tenants, self._metrics_key = key, dict(tenants or {}), metrics_key

    def admit(self, scope: Scope) -> tuple[Caller, Scope]:
        """Return the caller, and the scope to pass on to vLLM.

        Raises
        ------
        Refusal
            400 for contradictory client headers; 401 without a known key; 403 for a tenant that names another
            client or a path that is closed to tenants.
        """
        named = [unquote(value) for value in header_values(scope, CLIENT_HEADER)]
        if len(set(named)) > 1:
            raise Refusal(400, f"{CLIENT_HEADER} is given more than once, with different values")
        client = named[0] if named else None
        path = path_of(scope)
        digest = hashlib.sha256(_bearer(scope)).hexdigest()
        if self._metrics_key is not None and (path == METRICS or path.startswith(f"{METRICS}/")):
            matches = [_is(key, digest) for key in (self._metrics_key, self._key) if key is not None]
            if not any(matches):
                raise Refusal(401, f"{METRICS} needs its API key: send Authorization: Bearer KEY")
            return Caller(client), scope
        if self._key is None or scope["method"] == "OPTIONS" or (path.rstrip("/") or path) in OPEN:
            return Caller(client), scope
        tenant = None
        for known_digest, name in self._tenants.items():  # all: timing must not reveal a match
            if hmac.compare_digest(known_digest, digest):
                tenant = name
        if _is(self._key, digest):
            return Caller(client), scope
        if tenant is None:
            raise Refusal(401, "this path needs a valid API key: send Authorization: Bearer KEY")
        if client not in (None, tenant):
            raise Refusal(403, f"this API key does not belong to client {client}: leave {CLIENT_HEADER} out")
        if path not in FOR_TENANTS:
            raise Refusal(403, f"{path} is closed to clients' API keys: use the server's own")
        headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"authorization"]
        headers.append((b"authorization", f"Bearer {self._key}".encode()))
        return Caller(tenant, tenant=True), {**scope, "headers": headers}


def load_access(settings: Settings) -> Access:
    """Read the keys file and the environment variables VLLM_API_KEY and FEDROUTER_METRICS_KEY."""
    return Access(
        os.environ.get("VLLM_API_KEY") or None,
        load_keys(settings.keys_file) if settings.keys_file else None,
        os.environ.get(METRICS_KEY) or None,
    )


def load_keys(path: Path) -> dict[str, str]:
    """Read a keys file, a JSON object: SHA-256 of an API key in hex → client name.

    Raises
    ------
    ServingError
        If the file is missing or has another form.
    """
    try:
        keys = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ServingError(f"keys file {path} is not readable as JSON: {error}") from error
    if not isinstance(keys, dict) or not keys:
        raise ServingError(f'keys file {path} must hold {{"SHA-256 of the key": "client", …}}')
    for digest, client in keys.items():
        if not re.fullmatch(r"[0-9a-f]{64}", digest) or not isinstance(client, str) or not client:
            # The message does not show the entry: it may be a key in plain text.
            raise ServingError(
                f"keys file {path}: each entry must be 64 lower-case hex digits and a client's name; "
                "printf %s KEY | sha256sum prints the digits"
            )
    return keys


def _is(key: str, digest: str) -> bool:
    return hmac.compare_digest(hashlib.sha256(key.encode()).hexdigest(), digest)


def _bearer(scope: Scope) -> bytes:
    """Return the first Authorization header's bearer token, as vLLM reads it; empty if there is none."""
    scheme, _, token = next(iter(header_values(scope, "authorization")), "").partition(" ")
    return token.encode("latin-1") if scheme.lower() == "bearer" else b""
