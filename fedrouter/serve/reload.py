"""A new bundle without a restart: validate, load beside the old one, try, flip, drain, unload.

Adapter names end in a hash of their content, so two bundles can be loaded side by side, and what both hold is
not loaded again. Until the flip nothing that is served changes: a bundle that is refused leaves no trace.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from fedrouter.bundle import Bundle
from fedrouter.errors import BundleError, FedRouterError
from fedrouter.serve import engine, metrics
from fedrouter.serve.asgi import Inner, Refusal, reason
from fedrouter.serve.canary import broken_probes, check_adapters, check_routing
from fedrouter.serve.paths import LOAD, MODELS, UNLOAD
from fedrouter.serve.routing import Routing

logger = logging.getLogger("vllm.fedrouter.reload")
DRAIN_S = 600.0  # then old adapters go all the same; requests that vLLM has begun to answer keep theirs


class Reloader:
    """Replaces the routing of one server process, one bundle at a time."""

    def __init__(self, bundle_root: Path | None = None):
        self._root = bundle_root
        self._busy = False

    @property
    def busy(self) -> bool:
        """Whether a reload is under way."""
        return self._busy

    async def reload(
        self,
        inner: Inner,
        old: Routing,
        name: Any,
        flip: Callable[[Routing], None],
        stay: Collection[str] = (),
    ) -> dict[str, Any]:
        """Serve another bundle; return what was loaded, kept and unloaded.

        Parameters
        ----------
        name : the bundle's path, in the directory that holds the served bundle.
        flip : makes a routing the one in use.
        stay : adapters that are not unloaded, whoever has them.

        Raises
        ------
        Refusal
            If the bundle must not be served here, or nothing can be reloaded now; the old one goes on.
        """
        if self._busy:
            raise Refusal(409, "a reload is under way: wait for it to end")
        self._busy = True
        try:
            changes = await self._reload(inner, old, name, flip, stay)
        except (FedRouterError, Refusal) as error:
            metrics.RELOADS.labels("refused").inc()
            if isinstance(error, Refusal):
                raise
            raise Refusal(400, f"{error}; the bundle served so far stays", "bundle") from error
        finally:
            self._busy = False
        metrics.RELOADS.labels("loaded").inc()
        return changes

    async def check(
        self, inner: Inner, old: Routing, name: Any, stay: Collection[str] = ()
    ) -> dict[str, Any]:
        """Say what a reload would load, keep and unload; change nothing.

        Raises
        ------
        Refusal
            If that bundle must not be served here, or nothing could be reloaded.
        """
        try:
            path, new, fresh = await self._admitted(inner, old, name)
            new.close()
        except FedRouterError as error:
            raise Refusal(400, str(error), "bundle") from error
        wanted = new.bundle.adapter_paths
        return {
            "bundle": path.name,
            "sha256": new.digest,
            "loaded": fresh,
            "kept": [adapter for adapter in wanted if adapter not in fresh],
            "unloaded": [adapter for adapter in old.bundle.adapter_paths if adapter not in {*wanted, *stay}],
            "probes": len(new.bundle.probes),
        }

    def bundle_names(self) -> list[str]:
        """Return the names of directories that a reload could take, valid bundles or not."""
        return sorted(path.parent.name for path in self._root.glob("*/manifest.json")) if self._root else []

    async def _reload(
        self, inner: Inner, old: Routing, name: Any, flip: Callable[[Routing], None], stay: Collection[str]
    ) -> dict[str, Any]:
        path, new, fresh = await self._admitted(inner, old, name)
        wanted = new.bundle.adapter_paths
        loaded: list[str] = []
        try:
            for adapter in fresh:
                where = str(wanted[adapter].resolve())
                await _change(inner, LOAD, {"lora_name": adapter, "lora_path": where})
                loaded.append(adapter)
            await check_adapters(inner, loaded)
        except BaseException:
            new.close()
            await _unload(inner, loaded)
            raise
        flip(new)
        await old.drained(DRAIN_S)
        old.close()
        retired = [adapter for adapter in old.bundle.adapter_paths if adapter not in {*wanted, *stay}]
        try:
            await _unload(inner, retired)
        except FedRouterError as error:  # the new bundle is served: what is left costs memory only
            logger.warning("%s", error)
        kept = [adapter for adapter in wanted if adapter not in loaded]
        return {"bundle": path.name, "loaded": loaded, "kept": kept, "unloaded": retired}

    async def _admitted(self, inner: Inner, old: Routing, name: Any) -> tuple[Path, Routing, list[str]]:
        """Return a bundle that may replace the old one, and its adapters that are not there yet."""
        path = find_bundle(self._reload_root(inner), name)
        new = await asyncio.to_thread(old.load_beside, path)
        try:
            await check_routing(new)
            for broken in await broken_probes(new, old):
                raise BundleError(f"{path.name}: probe {broken}")
            served = await _adapters(inner)
            fresh = [adapter for adapter in new.bundle.adapter_paths if adapter not in served]
            _check_room(inner, new.bundle, len(served) + len(fresh))
        except BaseException:
            new.close()
            raise
        return path, new, fresh

    def _reload_root(self, inner: Inner) -> Path:
        """Return the directory that a reload takes bundles from; refuse where nothing can be reloaded."""
        if engine.num_api_processes(inner.scope) > 1:
            raise Refusal(
                409,
                "a server with several API processes cannot reload: this request reached only one of them; "
                "restart it, or scale out with several servers behind `fedrouter serve --upstream`",
            )
        if self._root is None or os.environ.get(engine.RELOADS) != "1":
            raise Refusal(409, "this server was started without reloading: restart it")
        return self._root


def find_bundle(root: Path, name: Any) -> Path:
    """Return a bundle's real directory, which lies in ``root``; links in it are ``load_bundle``'s to see.

    A link within ``root`` (``current``, say) is followed; one that leads out of it is refused.

    Raises
    ------
    BundleError
        If ``name`` is no path, leads out of ``root``, or nothing is there.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise BundleError('send {"bundle": PATH}')
    root = root.resolve()
    path = (root / name).resolve()
    inside = ".." not in Path(name).parts and path.is_relative_to(root) and path != root
    if not inside:
        raise BundleError(f"bundle {name} is not in {root}, the only place that bundles are loaded from")
    if not path.is_dir():
        raise BundleError(f"bundle {name}: no such directory in {root}")
    return path


async def _adapters(inner: Inner) -> set[str]:
    """Return the names of the adapters that the server has."""
    answer = await inner.ask("GET", MODELS)
    if answer.status != 200:
        raise Refusal(answer.status, reason(answer.payload))
    return {card["id"] for card in answer.payload["data"] if card.get("parent")}


def _check_room(inner: Inner, bundle: Bundle, number: int) -> None:
    limits = engine.lora_limits(inner.scope)
    if limits is None:  # then vLLM says so itself
        return
    if bundle.rank > limits[0]:
        raise BundleError(
            f"{bundle.path.name} has rank {bundle.rank}, and the server runs with --max-lora-rank {limits[0]}"
        )
    if number > limits[1]:
        raise BundleError(
            f"{bundle.path.name}: {number} adapters, old and new, and the server holds {limits[1]} at most; "
            f"restart it, or start it with room: -- --max-cpu-loras {number + 1} --max-loras {number + 1}"
        )


async def _change(inner: Inner, path: str, payload: dict[str, str]) -> None:
    answer = await inner.ask("POST", path, payload)
    if answer.status != 200:
        raise BundleError(f"vLLM refuses adapter {payload['lora_name']}: {reason(answer.payload)}")


async def _unload(inner: Inner, adapters: Sequence[str]) -> None:
    ids = engine.adapter_ids(inner.scope, adapters)
    for adapter in adapters:
        await _change(inner, UNLOAD, {"lora_name": adapter})
    await engine.forget(inner.scope, ids)
