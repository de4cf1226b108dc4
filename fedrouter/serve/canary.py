"""Can prompts be routed, and does every adapter answer, and not as the base does? One token each tells."""

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
    """Route the probe texts, all the way to the headers of an answer.

    Raises
    ------
    BundleError
        If that fails, for whatever reason of the bundle's: every routed prompt would be a 500.
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
            "make the bundle anew"
        ) from error


async def broken_probes(new: Routing, old: Routing | None = None) -> list[Asked]:
    """Return the probes that do not go where they must, by the new bundle.

    Parameters
    ----------
    old : its probes are asked too, if they hold there and the new bundle does not say otherwise.
    """
    probes, said = list(new.bundle.probes), {probe.turns for probe in new.bundle.probes}
    if old is not None:
        held = await ask([p for p in old.bundle.probes if p.turns not in said], old.route_now)
        probes += [one.probe for one in held if one.holds]
    return [one for one in await ask(probes, new.route_now) if not one.holds]


async def check_adapters(inner: Inner, adapters: Sequence[str]) -> None:
    """Ask the base and every adapter for the first token after a fixed text, all at once.

    An adapter that answers as the base does, to the last digit of the likelihood, is asked five times more.

    Raises
    ------
    ServingError
        If one does not answer.
    BundleError
        If one answers every text as the base does: it is loaded and has no effect.
    """
    suspects = list(adapters)
    for attempt, text in enumerate(PROBE_TEXTS * 2):
        if attempt >= len(
            PROBE_TEXTS
        ):  # seen on vLLM's CPU backend while adapters load beside running requests
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
    """Return the likeliest first token and its log-likelihood."""
    question = {"model": model, "prompt": text, "max_tokens": 1, "temperature": 0, "logprobs": 1}
    answer = await inner.ask("POST", COMPLETIONS, question)
    try:
        found = answer.payload["choices"][0]["logprobs"]
        return found["tokens"], found["token_logprobs"]
    except (KeyError, IndexError, TypeError) as error:
        raise ServingError(
            f"{model} does not answer a canary prompt: {answer.status} {reason(answer.payload)}"
        ) from error


class Readiness:
    """Whether this process's server has proved that it can answer: "starting", "ready" or "failed"."""

    def __init__(self) -> None:
        self.state = "starting"
        self._task: asyncio.Task[None] | None = None

    def prove(self, inner: Inner, routing: Routing, more: Iterable[str] = ()) -> None:
        """Begin to ask canary prompts, until every adapter has answered or the bundle cannot be served.

        ``more`` are adapters beside the bundle's own.
        """
        adapters = list(dict.fromkeys([*routing.bundle.adapter_paths, *more]))
        self._task = asyncio.create_task(self._prove(inner, routing, adapters))

    def close(self) -> None:
        """Stop asking."""
        if self._task is not None:
            self._task.cancel()

    def answer(self) -> Answer:
        """Return what those are told who ask; open to everyone, so it names no adapter.

        ``start`` proves to who started this server that it answers, and no other on its port.
        """
        told = {"state": self.state} | ({"start": os.environ[START]} if START in os.environ else {})
        return json_answer(200 if self.state == "ready" else 503, told)

    async def _prove(self, inner: Inner, routing: Routing, adapters: Sequence[str]) -> None:
        last = None
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
                if str(error) != last:
                    logger.warning("not ready: %s", error)
                last = str(error)
                await asyncio.sleep(RETRY_S)
            except Exception:
                self.state = "failed"
                logger.exception("asking canary prompts failed")
