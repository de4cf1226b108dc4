"""Readiness checks: prompts can be routed, every adapter answers, and not as the base does."""

import asyncio
import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any

from fedrouter.embed import PROBE_TEXTS
from fedrouter.errors import BundleError, FedRouterError, ServingError
from fedrouter.probes import Asked, ask
from fedrouter.route import BASE_NAME
from fedrouter.serve.asgi import Answer, Inner, json_answer, reason
from fedrouter.serve.paths import COMPLETIONS
from fedrouter.serve.process import START
from fedrouter.serve.request import routing_headers
from fedrouter.serve.routing import Routing

RETRY_S = 1.0
logger = logging.getLogger("vllm.fedrouter.canary")


async def check_routing(routing: Routing) -> None:
    """Route the probe texts, up to the headers of a response.

    Raises
    ------
    BundleError
        If the bundle makes routing fail: every routed prompt would be a 500.
    EndpointError
        If the embeddings endpoint cannot be reached.
    """
    try:
        routing_headers(await routing.route_now(PROBE_TEXTS), 0.0)
    except FedRouterError:
        raise
    except Exception as error:
        raise BundleError(
            f"{routing.bundle.path}: routing a prompt fails ({type(error).__name__}: {error}); "
            "train the bundle again"
        ) from error


async def broken_probes(new: Routing, old: Routing | None = None) -> list[Asked]:
    """Return the probes that the new bundle does not route where they must go.

    Parameters
    ----------
    old : its probes must hold too, unless they fail in it already or the new bundle redefines them.
    """
    probes, redefined = list(new.bundle.probes), {probe.turns for probe in new.bundle.probes}
    if old is not None:
        results = await ask([p for p in old.bundle.probes if p.turns not in redefined], old.route_now)
        probes += [result.probe for result in results if result.holds]
    return [result for result in await ask(probes, new.route_now) if not result.holds]


async def check_adapters(inner: Inner, adapters: Sequence[str]) -> None:
    """Compare the first token after fixed texts: of the base and of every adapter, concurrently.

    An adapter with exactly the base's token and log-likelihood is asked up to five more times.

    Raises
    ------
    ServingError
        If an adapter does not answer.
    BundleError
        If an adapter answers every text as the base does: it is loaded but has no effect.
    """
    suspects = list(adapters)
    for attempt, text in enumerate(PROBE_TEXTS * 2):
        if attempt >= len(PROBE_TEXTS):  # adapters that load beside requests may lag on vLLM's CPU backend
            await asyncio.sleep(RETRY_S)
        base, *answers = await asyncio.gather(
            *(_first_token(inner, name, text) for name in (BASE_NAME, *suspects))
        )
        suspects = [name for name, answer in zip(suspects, answers, strict=True) if answer == base]
        if not suspects:
            return
        logger.warning("%s answered a canary prompt as the base did: %s", ", ".join(suspects), base)
    raise BundleError(f"adapter {suspects[0]} answers as the base does: it has no effect; train it again")


async def _first_token(inner: Inner, model: str, text: str) -> tuple[Any, Any]:
    """Return the most likely first token and its log-likelihood."""
    request = {"model": model, "prompt": text, "max_tokens": 1, "temperature": 0, "logprobs": 1}
    answer = await inner.ask("POST", COMPLETIONS, request)
    try:
        logprobs = answer.payload["choices"][0]["logprobs"]
        return logprobs["tokens"], logprobs["token_logprobs"]
    except (KeyError, IndexError, TypeError) as error:
        raise ServingError(
            f"{model} does not answer a canary prompt: {answer.status} {reason(answer.payload)}"
        ) from error


class Readiness:
    """Whether this process has passed the readiness checks: "starting", "ready" or "failed"."""

    def __init__(self) -> None:
        self.state = "starting"
        self._task: asyncio.Task[None] | None = None

    def prove(self, inner: Inner, routing: Routing, more: Iterable[str] = ()) -> None:
        """Begin the checks, which are repeated until they pass or the bundle proves to be unusable.

        Parameters
        ----------
        more : adapters to check beside the bundle's own.
        """
        adapters = list(dict.fromkeys([*routing.bundle.adapter_paths, *more]))
        self._task = asyncio.create_task(self._prove(inner, routing, adapters))

    def close(self) -> None:
        """Stop the checks."""
        if self._task is not None:
            self._task.cancel()

    def answer(self) -> Answer:
        """Return the response of the ready path; it is open to everyone and names no adapter.

        ``start`` shows the starting process that this server answers, and no other one on its port.
        """
        payload = {"state": self.state} | ({"start": os.environ[START]} if START in os.environ else {})
        return json_answer(200 if self.state == "ready" else 503, payload)

    async def _prove(self, inner: Inner, routing: Routing, adapters: Sequence[str]) -> None:
        last_problem = None
        while self.state == "starting":
            try:
                await check_adapters(inner, adapters)
                await check_routing(routing)
                for broken in await broken_probes(routing):
                    logger.warning("%s: probe %s", routing.bundle.path, broken)
                self.state = "ready"
                logger.info("FedRouter is ready: all %d adapters answer", len(adapters))
            except BundleError as error:
                self.state = "failed"
                logger.error("BundleError: %s", error)
            except FedRouterError as error:
                if str(error) != last_problem:
                    logger.warning("not ready: %s", error)
                last_problem = str(error)
                await asyncio.sleep(RETRY_S)
            except Exception:
                self.state = "failed"
                logger.exception("the readiness checks failed")
