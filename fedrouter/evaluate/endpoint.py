"""Asynchronous client of one OpenAI-compatible endpoint, with the ``openai`` package."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import openai
from openai.types.chat import ChatCompletion

from fedrouter.errors import ConfigError, ServingError
from fedrouter.types import Turn

CONNECT_TIMEOUT_S = 10.0
GIVE_UP_AFTER = 20  # prompts in a row without a connection, which mean that the server is gone


@dataclass(frozen=True, slots=True)
class Answer:
    """The endpoint's answer to one prompt; ``error`` is set if there was none."""

    text: str
    adapter: str | None  # the response's ``model``; None after an error
    cluster: str | None = None  # this and the next two fields come from the x-fedrouter-… headers
    distance: float | None = None  # infinite if the prompt had no text
    fallback: bool = False
    num_tokens: int | None = None  # generated tokens, as the endpoint counts them
    latency_s: float | None = None  # of the successful attempt, without the wait between retries
    error: str | None = None

    @property
    def routed(self) -> bool:
        """Whether the endpoint chose the adapter itself."""
        return self.distance is not None


class Endpoint:
    """An endpoint; use as an asynchronous context manager.

    Parameters
    ----------
    url : str
        With or without a trailing ``/v1``. A user name and password in it are used but never shown.
    api_key : str or None
        Sent as a bearer token.
    timeout_s : float
        Timeout of one attempt.
    retries : int
        Further attempts after 408, 409, 429, 5xx and connection errors, with exponential backoff.
    """

    def __init__(self, url: str, *, api_key: str | None, timeout_s: float, retries: int) -> None:
        root, self.url = _split_url(url)
        self.num_lost = 0  # prompts in a row that found no connection
        self._client = openai.AsyncOpenAI(
            base_url=f"{root}/v1",
            api_key=api_key or "none",  # must not default to OPENAI_API_KEY, which is for another server
            timeout=openai.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S)),
            max_retries=retries,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()

    async def check(self, models: Sequence[str]) -> None:
        """Raise ServingError unless the endpoint accepts the key, lists ``models`` and answers the first."""
        client = self._client.with_options(max_retries=1)
        try:
            listed = [model.id async for model in client.models.list()]
            missing = ", ".join(repr(model) for model in models if model not in listed)
            if missing:
                raise ServingError(f"{self.url} serves no model {missing}; it serves {', '.join(listed)}")
            for model in models[:1]:
                await client.chat.completions.create(
                    model=model, messages=[{"role": "user", "content": "Hello"}], max_tokens=1
                )
        except openai.APIError as error:
            raise ServingError(self._explain(error)) from error
        except (AttributeError, TypeError, ValueError) as error:  # 200 OK, but a web page or other JSON
            raise ServingError(f"{self.url} does not speak the OpenAI API; check the address") from error

    async def task_adapters(self) -> dict[str, str] | None:
        """Return the adapter of each task label: the one with the most training rows of that task.

        None if the endpoint is not ``fedrouter serve``. Of two adapters with equally many rows, the first.
        """
        try:
            payload: Any = await self._client.get("/fedrouter/clusters", cast_to=object)
        except openai.NotFoundError:
            return None
        except openai.APIError as error:
            raise ServingError(self._explain(error)) from error
        best: dict[str, tuple[int, str]] = {}
        try:
            for cluster in payload["clusters"]:
                for task, count in cluster["task_counts"].items():
                    if count > best.get(task, (0, ""))[0]:
                        best[task] = (int(count), str(cluster["adapter"]))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ServingError(
                f"{self.url}/v1/fedrouter/clusters is not a list of task clusters; check the server's version"
            ) from error
        return {task: adapter for task, (_, adapter) in best.items()}

    async def ask(self, model: str, turns: Sequence[Turn], *, max_tokens: int, temperature: float) -> Answer:
        """Return the answer to a conversation; an error after all retries is returned in it."""
        messages: Any = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            response = await self._client.chat.completions.with_raw_response.create(
                model=model, messages=messages, max_tokens=max_tokens, temperature=temperature
            )
            completion = response.parse()
            facts = _routing_facts(response.headers)
        except openai.APIConnectionError as error:
            self.num_lost += 1
            return Answer("", None, error=self._explain(error))
        except (openai.APIError, ValueError) as error:
            self.num_lost = 0
            return Answer("", None, error=self._explain(error))
        self.num_lost = 0
        if not isinstance(completion, ChatCompletion) or not completion.choices:
            return Answer("", None, error="the answer is not a chat completion")
        return Answer(
            text=completion.choices[0].message.content or "",
            adapter=completion.model,
            num_tokens=completion.usage.completion_tokens if completion.usage else None,
            latency_s=response.elapsed.total_seconds(),
            **facts,
        )

    def _explain(self, error: Exception) -> str:
        match error:
            case openai.APITimeoutError():
                return f"{self.url} did not answer in time; is the server overloaded? raise the timeout"
            case openai.APIConnectionError():
                return f"cannot reach {self.url} ({error.__cause__ or error}); is the server running there?"
            case openai.AuthenticationError() | openai.PermissionDeniedError():
                return f"{self.url} refused the key ({error.status_code}); pass the server's API key"
            case openai.APIStatusError():
                message = error.message.removeprefix(f"Error code: {error.status_code} - ")
                return f"{self.url} answered {error.status_code}: {_one_line(message)}"
            case _:
                return f"{self.url} sent an unreadable response: {_one_line(str(error))}"


def _routing_facts(headers: Mapping[str, str]) -> dict[str, Any]:
    distance = headers.get("x-fedrouter-distance")
    return {
        "cluster": unquote(headers.get("x-fedrouter-cluster", "")) or None,
        "distance": float(distance) if distance else None,
        "fallback": headers.get("x-fedrouter-fallback") == "true",
    }


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]


def _split_url(url: str) -> tuple[str, str]:
    """Return the address without /v1, with credentials for requests and without them for messages."""
    try:
        parts = urlsplit(url.strip())
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or parts.scheme not in ("http", "https"):
        raise ConfigError(f"{url!r} is not an endpoint; write it as http://HOST:PORT")
    path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    shown = f"[{host}]" if ":" in host else host
    shown += "" if port is None else f":{port}"
    return f"{parts.scheme}://{parts.netloc}{path}", f"{parts.scheme}://{shown}{path}"
