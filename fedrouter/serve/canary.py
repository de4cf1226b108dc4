"""Does every adapter answer, and not as the base does? A few words tell, or how likely one token is."""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fedrouter.embed import PROBE_TEXTS
from fedrouter.errors import BundleError, FedRouterError, ServingError
from fedrouter.route import BASE_NAME
from fedrouter.serve.asgi import Answer, Inner, json_answer, reason
from fedrouter.serve.bodies import COMPLETIONS

RETRY_S = 1.0
WORDS = {"max_tokens": 8}
LIKELIHOOD = {"max_tokens": 1, "logprobs": 1}  # the first such question has vLLM compile for two seconds
logger = logging.getLogger("vllm.fedrouter.canary")


async def check_adapters(inner: Inner, adapters: Sequence[str]) -> None:
    """Ask the base and every adapter to go on with a fixed text, all at once.

    Adapters that use the same words as the base are asked how likely their first token is, up to six times:
    one that has an effect differs in the last digits.

    Raises
    ------
    ServingError
        If one does not answer.
    BundleError
        If one always answers as the base does: it is loaded and has no effect.
    """
    questions = [(PROBE_TEXTS[0], WORDS), *((text, LIKELIHOOD) for text in PROBE_TEXTS * 2)]
    suspects = list(adapters)
    for attempt, (text, how) in enumerate(questions):
        if attempt > len(PROBE_TEXTS):  # seen on vLLM's CPU backend while adapters load beside requests
            await asyncio.sleep(RETRY_S)
        base, *answers = await asyncio.gather(
            *(_ask(inner, name, text, how) for name in (BASE_NAME, *suspects))
        )
        suspects = [name for name, answer in zip(suspects, answers, strict=True) if answer == base]
        if not suspects:
            return
        logger.warning("%s answered a canary prompt as the base did: %s", ", ".join(suspects), base)
    raise BundleError(f"adapter {suspects[0]} answers as the base does: it has no effect; train it again")


async def _ask(inner: Inner, model: str, text: str, how: Mapping[str, int]) -> tuple[str, Any]:
    """Return the likeliest words after a text, and their log-likelihoods if asked for."""
    question = {"model": model, "prompt": text, "temperature": 0, **how}
    answer = await inner.ask("POST", COMPLETIONS, question)
    try:
        choice = answer.payload["choices"][0]
        return choice["text"], "logprobs" in how and choice["logprobs"]["token_logprobs"]
    except (KeyError, IndexError, TypeError) as error:
        raise ServingError(
            f"{model} does not answer a canary prompt: {answer.status} {reason(answer.payload)}"
        ) from error


class Readiness:
    """Whether this process's server has proved that it can answer: "starting", "ready" or "failed"."""

    def __init__(self) -> None:
        self.state = "starting"
        self._task: asyncio.Task[None] | None = None

    def prove(self, inner: Inner, adapters: Sequence[str]) -> None:
        """Begin to ask canary prompts, until every adapter has answered or one turns out to be none."""
        self._task = asyncio.create_task(self._prove(inner, adapters))

    def close(self) -> None:
        """Stop asking."""
        if self._task is not None:
            self._task.cancel()

    def answer(self) -> Answer:
        """Return what those are told who ask; open to everyone, so it names no adapter."""
        return json_answer(200 if self.state == "ready" else 503, {"state": self.state})

    async def _prove(self, inner: Inner, adapters: Sequence[str]) -> None:
        last = None
        while self.state == "starting":
            try:
                await check_adapters(inner, adapters)
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
