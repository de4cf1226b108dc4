"""A list of prompts for several adapters: concurrent sub-requests, merged into one response."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from fedrouter.serve.asgi import Answer, App, Receive, Scope, collect, disconnected, json_answer, whole

REQUEST_ID = b"x-request-id"


async def complete(
    app: App, scope: Scope, receive: Receive, payload: Mapping[str, Any], models: Sequence[str]
) -> Answer | None:
    """Send each model's prompts to the application and merge the responses; None if the client leaves.

    If a sub-request fails, its response is returned and the others are cancelled.

    Parameters
    ----------
    scope : the scope before any application has changed it.
    receive : the client's ``receive``, after its body was read.
    payload : JSON of ``POST /v1/completions``; ``prompt`` is a list.
    models : one model per prompt.
    """
    rows: dict[str, list[int]] = {}
    for row, model in enumerate(models):
        rows.setdefault(model, []).append(row)
    over, failed = asyncio.Event(), list[Answer]()

    async def ask(number: int, model: str) -> Answer:
        prompts = [payload["prompt"][row] for row in rows[model]]
        body = {**payload, "model": model, "prompt": prompts}
        try:
            # ``over`` tells the application that the client has left, so that it stops.
            sub_receive = whole(json.dumps(body).encode(), left=over)
            answer = await collect(app, _own_id(scope, body, number), sub_receive)
        except Exception:
            over.set()
            raise
        if answer.status != 200 and not over.is_set():
            failed.append(answer)
            over.set()
        return answer

    leaving = asyncio.create_task(disconnected(receive))
    leaving.add_done_callback(lambda _: over.set())
    try:
        asking = [ask(number, model) for number, model in enumerate(rows)]
        results = await asyncio.gather(*asking, return_exceptions=True)
        if failed or leaving.done():
            return failed[0] if failed else None
    finally:
        over.set()  # stop the sub-requests that still run
        leaving.cancel()
        with suppress(asyncio.CancelledError):
            await leaving
    answers = []
    for result in results:
        if isinstance(result, BaseException):
            raise result
        answers.append(json.loads(result.body))
    return json_answer(200, merge(answers, list(rows.values())))


def merge(answers: Sequence[Mapping[str, Any]], rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Merge responses: choices in the order of the prompts, usage summed, model names joined by commas.

    Parameters
    ----------
    rows : for each response, the positions of its prompts in the whole list.
    """
    choices = []
    for answer, numbers in zip(answers, rows, strict=True):
        per_prompt = len(answer["choices"]) // len(numbers)  # the request's ``n``
        for position, choice in enumerate(answer["choices"]):
            index = numbers[position // per_prompt] * per_prompt + position % per_prompt
            choices.append({**choice, "index": index})
    return {
        **answers[0],
        "model": ",".join(answer["model"] for answer in answers),
        "choices": sorted(choices, key=lambda choice: int(choice["index"])),
        "usage": _sum([answer.get("usage") for answer in answers]),
    }


def _own_id(scope: Scope, body: dict[str, Any], number: int) -> Scope:
    """Give each sub-request its own request id; the first keeps the client's, which the response shows."""
    if not number:
        return {**scope}
    if isinstance(body.get("request_id"), str):
        body["request_id"] += f"-{number}"
    headers = [
        (name, value + f"-{number}".encode() if name.lower() == REQUEST_ID else value)
        for name, value in scope["headers"]
    ]
    return {**scope, "headers": headers}


def _sum(values: Sequence[Any]) -> Any:
    """Sum numbers, or objects of numbers key by key; nulls are ignored."""
    present = [value for value in values if value is not None]
    if present and all(isinstance(value, Mapping) for value in present):
        keys = dict.fromkeys(key for value in present for key in value)
        return {key: _sum([value.get(key) for value in present]) for key in keys}
    return sum(present) if present else None
