"""An embeddings endpoint as embedder: text → vectors through OpenAI's ``/v1/embeddings``.

A bundle records the model's name and its probe vectors, but neither its address nor its key: these belong to
the deployment, and an untrusted bundle must not choose where prompts and keys are sent.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np

from fedrouter.config import EMBEDDER_KEY, checked_url
from fedrouter.errors import EndpointError, first_line
from fedrouter.types import Array, EmbedderSpec

KIND = "endpoint"
BATCH_TEXTS = 64  # texts per request
CHARACTERS = 8  # per token; longer texts are cut before they are sent or tokenised
TIMEOUT_S, CONNECT_S, RETRIES = 60.0, 5.0, 4  # in training; retries wait 0.5 s and longer
CUT = "truncate_prompt_tokens"  # vLLM's field; not sent again to a server that rejects it
UNKNOWN = re.compile("unrecognized|unknown|unexpected|unsupported|not permitted", re.IGNORECASE)


class EndpointEmbedder:
    """The embeddings of a remote server, for example a vLLM pooling server.

    Parameters
    ----------
    url : ``http://HOST:PORT``, with or without a trailing ``/v1``.

    Raises
    ------
    ConfigError
        If ``url`` is invalid or contains a password.
    """

    def __init__(self, spec: EmbedderSpec, url: str):
        import openai

        self.spec = spec
        self._url = checked_url(url)
        self._client = openai.OpenAI(
            base_url=f"{self._url}/v1",
            api_key=os.environ.get(EMBEDDER_KEY) or "none",  # must not default to OPENAI_API_KEY
            timeout=openai.Timeout(TIMEOUT_S, connect=CONNECT_S),
            max_retries=RETRIES,
        )
        self._options: dict[str, Any] = {CUT: spec.max_tokens}

    def hurry(self, timeout_s: float) -> None:
        """Limit requests to one attempt of ``timeout_s`` seconds, for callers that a user waits for."""
        import openai

        timeout = openai.Timeout(timeout_s, connect=min(timeout_s, CONNECT_S))
        self._client = self._client.with_options(timeout=timeout, max_retries=0)

    def embed(self, texts: Sequence[str]) -> Array:
        """Return one vector per text: (n, d) float32; zeros for a blank text.

        Raises
        ------
        EndpointError
            If the endpoint cannot be reached, refuses the request, or does not return such vectors.
        """
        vectors = np.zeros((len(texts), self.spec.dim), dtype=np.float32)
        rows = iter([row for row, text in enumerate(texts) if text.strip()])
        while batch := list(islice(rows, BATCH_TEXTS)):
            found = self.ask([texts[row] for row in batch])
            if found.shape[1] != self.spec.dim:
                raise EndpointError(
                    f"{self._name}: vectors have {found.shape[1]} dimensions, not {self.spec.dim}; "
                    "serve with the same embedder or train again"
                )
            vectors[batch] = found
        return vectors

    def ask(self, texts: Sequence[str]) -> Array:
        """Return one vector per text, of any dimension, with one request."""
        import openai

        cut = [beginning(text, self.spec.max_tokens) for text in texts]
        try:
            response = self._client.embeddings.create(
                model=self.spec.model, input=cut, extra_body=self._options
            )
            vectors = np.array(
                [item.embedding for item in sorted(response.data, key=lambda item: item.index)]
            )
        except openai.BadRequestError as error:
            if CUT in self._options and CUT in str(error) and UNKNOWN.search(str(error)):
                self._options = {}
                return self.ask(texts)
            raise EndpointError(f"{self._name}: {_reason(error)}") from error
        except (openai.OpenAIError, TypeError, ValueError, AttributeError) as error:
            raise EndpointError(f"{self._name}: {_reason(error)}") from error
        if vectors.ndim != 2 or len(vectors) != len(texts) or not np.isfinite(vectors).all():
            raise EndpointError(f"{self._name}: the response is not one finite vector per text")
        return vectors.astype(np.float32)

    @property
    def _name(self) -> str:
        return f"embedder {self.spec.model} at {self._url}"


def beginning(text: str, max_tokens: int) -> str:
    """Cut a text to the characters that ``max_tokens`` can cover, so that huge prompts cost no more."""
    return text[: CHARACTERS * max_tokens]


def endpoint_spec(model: str, max_tokens: int, url: str) -> EmbedderSpec:
    """Return the spec of an endpoint's embedder; requests one vector to get the dimension.

    The fingerprint covers only names and sizes; other weights are detected by the probe vectors.

    Raises
    ------
    ConfigError
        If ``url`` is invalid.
    EndpointError
        If the endpoint does not respond with a vector.
    """
    spec = EmbedderSpec(KIND, model, layer=0, max_tokens=max_tokens, dtype="float32", dim=0, fingerprint="")
    dim = EndpointEmbedder(spec, url).ask(["dimension"]).shape[1]
    digest = hashlib.sha256(f"{model}\0{dim}\0{max_tokens}".encode()).hexdigest()[:32]
    return EmbedderSpec(KIND, model, 0, max_tokens, "float32", int(dim), digest)


def _reason(error: Exception) -> str:
    """Return the endpoint's error message, or the connection error: one line, without the API key."""
    cause = error.__cause__ or error
    line = first_line(cause)
    key = os.environ.get(EMBEDDER_KEY)
    return (line.replace(key, "…") if key else line)[:300]
