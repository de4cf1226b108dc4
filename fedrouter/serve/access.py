"""Who may ask, and as whom: API keys, tenants, and what nobody reaches without a key. No bundle, no body."""

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
METRICS_KEY = "FEDROUTER_METRICS_KEY"  # the environment variable that carries the key of /metrics


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: the client whose task clusters count, or None for all of them."""

    client: str | None = None
    tenant: bool = False  # the API key says who it is, and names of others' adapters are unknown to it

    @property
    def whose(self) -> str | None:
        """Whose share of the server a request takes; None where nobody can be told apart."""
        return self.client if self.tenant else None


class Access:
    """Admits requests, without reading their bodies.

    Parameters
    ----------
    key : the server's own API key, which vLLM knows as well; without one everybody may ask everything.
    tenants : SHA-256 of an API key, in hex → client name. Needs ``key``, which vLLM gets in its place.
    metrics_key : what ``/metrics`` asks for, or ``key``; without one that page is open to everybody.

    Raises
    ------
    ServingError
        For tenants without ``key``: vLLM would stand open.
    """

    def __init__(
        self,
        key: str | None = None,
        tenants: Mapping[str, str] | None = None,
        metrics_key: str | None = None,
    ):
        if tenants and not key:
            raise ServingError(
                "a keys file needs VLLM_API_KEY as well; `fedrouter serve --keys-file` sets it"
            )
        self._key, self._tenants, self._metrics_key = key, dict(tenants or {}), metrics_key

    def admit(self, scope: Scope) -> tuple[Caller, Scope]:
        """Return who asks, and the scope to hand to vLLM.

        Raises
        ------
        Refusal
            401 without a key that is known; 403 for a tenant that asks as another or for what is not for
            tenants; 400 for two client headers.
        """
        named = [unquote(value) for value in header_values(scope, CLIENT_HEADER)]
        if len(set(named)) > 1:
            raise Refusal(400, f"{CLIENT_HEADER} is given more than once")
        client = named[0] if named else None
        path = path_of(scope)
        digest = hashlib.sha256(_bearer(scope)).hexdigest()
        if self._metrics_key is not None and (path == METRICS or path.startswith(f"{METRICS}/")):
            known = [_is(key, digest) for key in (self._metrics_key, self._key) if key is not None]
            if not any(known):
                raise Refusal(401, f"{METRICS} needs its key: Authorization: Bearer KEY")
            return Caller(client), scope
        if self._key is None or scope["method"] == "OPTIONS" or (path.rstrip("/") or path) in OPEN:
            return Caller(client), scope
        tenant = None
        for known_digest, name in self._tenants.items():  # all of them, so that time says nothing
            if hmac.compare_digest(known_digest, digest):
                tenant = name
        if _is(self._key, digest):
            return Caller(client), scope
        if tenant is None:
            raise Refusal(401, "this needs an API key that the server knows: Authorization: Bearer KEY")
        if client not in (None, tenant):
            raise Refusal(403, f"this API key is not {client}'s: leave {CLIENT_HEADER} out")
        if path not in FOR_TENANTS:
            raise Refusal(403, f"{path} is not for clients' API keys")
        headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"authorization"]
        headers.append((b"authorization", f"Bearer {self._key}".encode()))
        return Caller(tenant, tenant=True), {**scope, "headers": headers}


def load_access(settings: Settings) -> Access:
    """Read the keys file, and the server's own keys from VLLM_API_KEY and FEDROUTER_METRICS_KEY."""
    return Access(
        os.environ.get("VLLM_API_KEY") or None,
        load_keys(settings.keys_file) if settings.keys_file else None,
        os.environ.get(METRICS_KEY) or None,
    )


def load_keys(path: Path) -> dict[str, str]:
    """Read a keys file: a JSON object, SHA-256 of an API key in hex → client name.

    Raises
    ------
    ServingError
        If it is missing, or not of this form.
    """
    try:
        keys = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ServingError(f"keys file {path} is not readable as JSON: {error}") from error
    if not isinstance(keys, dict) or not keys:
        raise ServingError(f'keys file {path} must hold {{"SHA-256 of the key": "client", …}}')
    for digest, client in keys.items():
        if not re.fullmatch(r"[0-9a-f]{64}", digest) or not isinstance(client, str) or not client:
            # The entry is not shown: a key put there by mistake is a secret.
            raise ServingError(
                f"keys file {path}: each entry is 64 lower-case hex digits and a client's name; "
                "printf %s KEY | sha256sum prints the digits"
            )
    return keys


def _is(key: str, digest: str) -> bool:
    return hmac.compare_digest(hashlib.sha256(key.encode()).hexdigest(), digest)


def _bearer(scope: Scope) -> bytes:
    """Return the first bearer token, as vLLM reads it; empty without."""
    scheme, _, token = next(iter(header_values(scope, "authorization")), "").partition(" ")
    return token.encode("latin-1") if scheme.lower() == "bearer" else b""
