"""An embeddings endpoint as embedder: text to vectors over OpenAI's ``/v1/embeddings``.

A bundle records the model's name and what it computes, never where it is or how to get in: the address
belongs to the deployment, and a bundle from elsewhere cannot send prompts or keys to a host of its choice.
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
BATCH_TEXTS = 64  # in one request
CHARACTERS = 8  # a token, at most: what is beyond is not even sent, or tokenised
TIMEOUT_S, CONNECT_S, RETRIES = 60.0, 5.0, 4  # while training; retries pause 0.5 s and longer
CUT = "truncate_prompt_tokens"  # vLLM's field; who does not know it gets texts uncut and cuts them itself
UNKNOWN = re.compile("unrecognized|unknown|unexpected|unsupported|not permitted", re.IGNORECASE)


class EndpointEmbedder:
    """The embeddings of a server elsewhere: a vLLM pooling server, say.

    Parameters
    ----------
    url : ``http://HOST:PORT``, with or without a trailing ``/v1``.

    Raises
    ------
    ConfigError
        If ``url`` is none, or holds a password.
    """

    def __init__(self, spec: EmbedderSpec, url: str):
        import openai

        self.spec = spec
        self._url = checked_url(url)
        self._client = openai.OpenAI(
            base_url=f"{self._url}/v1",
            api_key=os.environ.get(EMBEDDER_KEY) or "none",  # never the one in OPENAI_API_KEY
            timeout=openai.Timeout(TIMEOUT_S, connect=CONNECT_S),
            max_retries=RETRIES,
        )
        self._options: dict[str, Any] = {CUT: spec.max_tokens}

    def hurry(self, timeout_s: float) -> None:
        """Wait at most so long for an answer, and try only once: somebody waits for it."""
        import openai

        timeout = openai.Timeout(timeout_s, connect=min(timeout_s, CONNECT_S))
        self._client = self._client.with_options(timeout=timeout, max_retries=0)

    def embed(self, texts: Sequence[str]) -> Array:
        """Return one vector a text: (n, d) float32; a blank text gets zeros.

        Raises
        ------
        EndpointError
            If the endpoint cannot be reached, refuses, or answers with something else than such vectors.
        """
        vectors = np.zeros((len(texts), self.spec.dim), dtype=np.float32)
        rows = iter([row for row, text in enumerate(texts) if text.strip()])
        while batch := list(islice(rows, BATCH_TEXTS)):
            found = self.ask([texts[row] for row in batch])
            if found.shape[1] != self.spec.dim:
                raise EndpointError(f"{self._name}: {found.shape[1]} dimensions, not {self.spec.dim}")
            vectors[batch] = found
        return vectors

    def ask(self, texts: Sequence[str]) -> Array:
        """Return one vector a text, of whatever dimension, in one request."""
        import openai

        cut = [beginning(text, self.spec.max_tokens) for text in texts]
        try:
            answer = self._client.embeddings.create(
                model=self.spec.model, input=cut, extra_body=self._options
            )
            vectors = np.array([one.embedding for one in sorted(answer.data, key=lambda one: one.index)])
        except openai.BadRequestError as error:
            if CUT in self._options and CUT in str(error) and UNKNOWN.search(str(error)):
                self._options = {}
                return self.ask(texts)
            raise EndpointError(f"{self._name}: {_reason(error)}") from error
        except (openai.OpenAIError, TypeError, ValueError, AttributeError) as error:
            raise EndpointError(f"{self._name}: {_reason(error)}") from error
        if vectors.ndim != 2 or len(vectors) != len(texts) or not np.isfinite(vectors).all():
            raise EndpointError(f"{self._name}: it does not answer with one vector a text")
        return vectors.astype(np.float32)

    @property
    def _name(self) -> str:
        return f"embedder {self.spec.model} at {self._url}"


def beginning(text: str, max_tokens: int) -> str:
    """Cut a text by characters, so that one huge prompt costs no more than one of ``max_tokens``."""
    return text[: CHARACTERS * max_tokens]


def endpoint_spec(model: str, max_tokens: int, url: str) -> EmbedderSpec:
    """Describe an endpoint's embedder as a bundle records it; asks it for the dimension.

    The fingerprint covers what the model is called: what it computes is told apart by the probe vectors.

    Raises
    ------
    ConfigError, EndpointError
        If ``url`` is none, or the endpoint does not answer.
    """
    spec = EmbedderSpec(KIND, model, layer=0, max_tokens=max_tokens, dtype="float32", dim=0, fingerprint="")
    dim = EndpointEmbedder(spec, url).ask(["dimension"]).shape[1]
    digest = hashlib.sha256(f"{model}\0{dim}\0{max_tokens}".encode()).hexdigest()[:32]
    return EmbedderSpec(KIND, model, 0, max_tokens, "float32", int(dim), digest)


def _reason(error: Exception) -> str:
    """One line, without a key: what the endpoint said, or why it said nothing."""
    cause = error.__cause__ or error
    line = first_line(cause)
    key = os.environ.get(EMBEDDER_KEY)
    return (line.replace(key, "…") if key else line)[:300]
