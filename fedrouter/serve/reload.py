"""Replace the served bundle without a restart: validate, load, check, switch, drain, unload.

Adapter names end in a hash of their content, so two bundles can be loaded side by side and adapters in both
are not loaded again. Nothing that is served changes before the switch: a refused bundle leaves no trace.
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
DRAIN_S = 600.0  # then old adapters are unloaded anyway; requests that vLLM has begun keep theirs


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
        switch: Callable[[Routing], None],
        pinned: Collection[str] = (),
    ) -> dict[str, Any]:
        """Serve another bundle; return the adapters that were loaded, kept and unloaded.

        Parameters
        ----------
        name : path of the bundle, within the bundle root.
        switch : puts a routing into use.
        pinned : adapters that must not be unloaded.

        Raises
        ------
        Refusal
            If the bundle must not be served, or no reload is possible; the old bundle stays in use.
        """
        if self._busy:
            raise Refusal(409, "another reload is under way: wait for its end")
        self._busy = True
        try:
            changes = await self._reload(inner, old, name, switch, pinned)
        except (FedRouterError, Refusal) as error:
            metrics.RELOADS.labels("refused").inc()
            if isinstance(error, Refusal):
                raise
            raise Refusal(400, f"{error}; the bundle served so far stays in use", "bundle") from error
        finally:
            self._busy = False
        metrics.RELOADS.labels("loaded").inc()
        return changes

    async def check(
        self, inner: Inner, old: Routing, name: Any, pinned: Collection[str] = ()
    ) -> dict[str, Any]:
        """Return the adapters that a reload would load, keep and unload; change nothing.

        Raises
        ------
        Refusal
            If the bundle must not be served, or no reload is possible.
        """
        try:
            path, new, fresh = await self._validated(inner, old, name)
            new.close()
        except FedRouterError as error:
            raise Refusal(400, str(error), "bundle") from error
        wanted = new.bundle.adapter_paths
        return {
            "bundle": path.name,
            "sha256": new.digest,
            "loaded": fresh,
            "kept": [adapter for adapter in wanted if adapter not in fresh],
            "unloaded": [name for name in old.bundle.adapter_paths if name not in {*wanted, *pinned}],
            "probes": len(new.bundle.probes),
        }

    def bundle_names(self) -> list[str]:
        """Return the names of directories that a reload could take, valid bundles or not."""
        return sorted(path.parent.name for path in self._root.glob("*/manifest.json")) if self._root else []

    async def _reload(
        self,
        inner: Inner,
        old: Routing,
        name: Any,
        switch: Callable[[Routing], None],
        pinned: Collection[str],
    ) -> dict[str, Any]:
        path, new, fresh = await self._validated(inner, old, name)
        wanted = new.bundle.adapter_paths
        loaded: list[str] = []
        try:
            for adapter in fresh:
                adapter_path = str(wanted[adapter].resolve())
                await _change(inner, LOAD, {"lora_name": adapter, "lora_path": adapter_path})
                loaded.append(adapter)
            await check_adapters(inner, loaded)
        except BaseException:
            new.close()
            try:
                await _unload(inner, loaded)
            except FedRouterError as error:  # why the reload failed matters more
                logger.warning("%s", error)
            raise
        switch(new)
        await old.drained(DRAIN_S)
        old.close()
        retired = [adapter for adapter in old.bundle.adapter_paths if adapter not in {*wanted, *pinned}]
        try:
            await _unload(inner, retired)
        except FedRouterError as error:  # adapters that stay loaded cost memory only
            logger.warning("%s", error)
        kept = [adapter for adapter in wanted if adapter not in loaded]
        return {"bundle": path.name, "loaded": loaded, "kept": kept, "unloaded": retired}

    async def _validated(self, inner: Inner, old: Routing, name: Any) -> tuple[Path, Routing, list[str]]:
        """Return the path and routing of a bundle that may replace the old one, and its adapters to load."""
        path = find_bundle(self._reload_root(inner), name)
        new = await asyncio.to_thread(old.load_beside, path)
        try:
            await check_routing(new)
            for broken in await broken_probes(new, old):
                raise BundleError(f"{path.name}: probe {broken}")
            loaded = await _loaded_adapters(inner)
            fresh = [adapter for adapter in new.bundle.adapter_paths if adapter not in loaded]
            _check_room(inner, new.bundle, len(loaded) + len(fresh))
        except BaseException:
            new.close()
            raise
        return path, new, fresh

    def _reload_root(self, inner: Inner) -> Path:
        """Return the bundle root; raise ``Refusal`` if this server cannot reload."""
        if engine.num_api_processes(inner.scope) > 1:
            raise Refusal(
                409,
                "a server with several API processes cannot reload, as a request reaches only one of them; "
                "restart it, or scale out with several servers behind `fedrouter serve --upstream`",
            )
        if self._root is None or os.environ.get(engine.RELOADS) != "1":
            raise Refusal(409, "this server was started without reloading: restart it")
        return self._root


def find_bundle(root: Path, name: Any) -> Path:
    """Return the real directory of a bundle within ``root``; ``load_bundle`` checks links inside the bundle.

    ``name`` may be a symbolic link within ``root``, such as ``current``.

    Raises
    ------
    BundleError
        If ``name`` is no path, leads out of ``root``, or is no directory.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise BundleError('send {"bundle": PATH}')
    root = root.resolve()
    path = (root / name).resolve()
    inside = ".." not in Path(name).parts and path.is_relative_to(root) and path != root
    if not inside:
        raise BundleError(f"bundle {name} is not in {root}, the only directory that bundles are loaded from")
    if not path.is_dir():
        raise BundleError(f"bundle {name}: no such directory in {root}")
    return path


async def _loaded_adapters(inner: Inner) -> set[str]:
    """Return the names of the adapters that the server has loaded."""
    answer = await inner.ask("GET", MODELS)
    if answer.status != 200:
        raise Refusal(answer.status, reason(answer.payload))
    return {card["id"] for card in answer.payload["data"] if card.get("parent")}


def _check_room(inner: Inner, bundle: Bundle, number: int) -> None:
    limits = engine.lora_limits(inner.scope)
    if limits is None:  # unknown: vLLM refuses what does not fit
        return
    if bundle.rank > limits[0]:
        raise BundleError(
            f"{bundle.path.name} has rank {bundle.rank}, but the server runs with --max-lora-rank {limits[0]}"
        )
    if number > limits[1]:
        raise BundleError(
            f"{bundle.path.name}: {number} adapters, old and new, but the server holds at most {limits[1]}; "
            f"restart it, or start it with -- --max-cpu-loras {number + 1} --max-loras {number + 1}"
        )


async def _change(inner: Inner, path: str, payload: dict[str, str]) -> None:
    answer = await inner.ask("POST", path, payload)
    if answer.status != 200:
        raise BundleError(f"vLLM refused adapter {payload['lora_name']}: {reason(answer.payload)}")


async def _unload(inner: Inner, adapters: Sequence[str]) -> None:
    ids = engine.adapter_ids(inner.scope, adapters)
    for adapter in adapters:
        await _change(inner, UNLOAD, {"lora_name": adapter})
    await engine.remove_adapters(inner.scope, ids)
