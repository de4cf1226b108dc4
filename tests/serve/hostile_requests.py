"""Random hostile requests from a seed: strange models, prompts, fields, encodings, headers and methods.

``scripts/hostile.py`` sends 10,000 of them to a real vLLM, ``test_hostile.py`` 1,000 to a stand-in.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedrouter.serve.paths import (
    ADAPTER_HEADER,
    AS_BASE,
    CHAT,
    COMPLETIONS,
    INVOCATIONS,
    MESSAGES,
    OWN_METHODS,
    RESPONSES,
    ROUTED,
    UNROUTED,
)

TEXT = "write a headline for this news story"
STRANGE: Sequence[Any] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1.5,
        1e400,
        10**30,
        "",
        " ",
        "x",
        "fedrouter",
        "base",
        "\ud800",
        "\0",
        "é" * 99,
    ),
    *(
        [],
        [[]],
        [None],
        [True],
        [[True]],
        [1.0],
        [[1.0]],
        ["1", 2],
        [-1],
        [[1], []],
        [{}],
        [{"type": "text"}],
    ),
    *({}, {"a": 1}, {"type": "text", "text": 5}, {"type": "json_schema"}, {"json": -1}, {"include_usage": 1}),
    *([["a"]], [[["a"]]], [2**31], [2**63], ["a", None], [0, "0"], ["fedrouter"], [{"role": "user"}]),
)
MODELS: Sequence[Any] = (
    *("fedrouter", "fedrouter", "fedrouter", "base", None, "", 0, False, [], {}, ["fedrouter"], "fedrouter "),
    *(
        "FEDROUTER",
        "fedrouter\0",
        "no-such-model",
        "../base",
        "ｆedrouter",
        {"id": "base"},
        1e400,
        "base,base",
    ),
)
FIELDS = (
    *(
        "structured_outputs",
        "response_format",
        "stream_options",
        "tools",
        "tool_choice",
        "stop",
        "logit_bias",
    ),
    *(
        "n",
        "best_of",
        "echo",
        "logprobs",
        "top_logprobs",
        "prompt_logprobs",
        "seed",
        "user",
        "suffix",
        "stream",
    ),
    *("prompt_embeds", "cache_salt", "kv_transfer_params", "previous_response_id", "instructions", "system"),
    *("truncate_prompt_tokens", "chat_template", "chat_template_kwargs", "add_generation_prompt", "priority"),
    *("request_id", "store", "background", "metadata", "documents", "guided_json", "lora_name", "max_tokens"),
)
ENCODINGS = ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-8-sig", "latin-1", "utf-7")
TYPES = ("text/plain", "application/json; charset=utf-16", "application/x-www-form-urlencoded", "", "json")
HEADERS = (
    ("Upgrade", "h2c"),
    ("Upgrade", "websocket"),
    ("X-FedRouter-Client", "zoe"),
    ("X-FedRouter-Client", "%00"),
    ("X-FedRouter-Adapter", "base"),
    ("Expect", "100-continue"),
    ("Origin", "https://evil.example"),
    (ADAPTER_HEADER, "fedrouter"),
    (ADAPTER_HEADER, ""),
    (ADAPTER_HEADER, "base"),
    ("Accept-Encoding", "gzip;q=x"),
)


@dataclass
class Hostile:
    """One request, and whether the base may answer it without routing."""

    method: str
    path: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def names_base(self) -> bool:
        """Whether vLLM reads the base's name from the body."""
        if self.path == INVOCATIONS and self.headers.get(ADAPTER_HEADER):
            return self.headers[ADAPTER_HEADER] == "base"
        try:
            payload = json.loads(self.body)
        except (ValueError, RecursionError):
            return False
        return isinstance(payload, dict) and payload.get("model") == "base"


def requests(seed: int, number: int) -> Iterator[Hostile]:
    """Yield hostile requests, the same for the same seed."""
    draw = random.Random(seed)
    for _ in range(number):
        yield _one(draw)


def _one(draw: random.Random) -> Hostile:
    path = draw.choice(
        [*ROUTED * 6, *UNROUTED, *AS_BASE, *OWN_METHODS, "/v1/fedrouter", "/v1/fedrouter/nothing"]
    )
    payload = _payload(path)
    payload["model"] = draw.choice(MODELS)
    for _ in range(draw.choice((0, 0, 1, 1, 2))):
        payload[draw.choice((*payload, *FIELDS))] = draw.choice(STRANGE)
    if draw.random() < 0.2:
        payload.pop("model", None)
    if draw.random() < 0.15:
        payload[draw.choice(("messages", "prompt", "input"))] = _message(draw)
    body = _encoded(draw, payload)
    request = Hostile(draw.choice(("POST",) * 12 + ("GET", "PUT", "DELETE", "HEAD")), path, body)
    request.headers["Content-Type"] = "application/json" if draw.random() < 0.9 else draw.choice(TYPES)
    if draw.random() < 0.25:
        name, value = draw.choice(HEADERS)
        request.headers[name] = value
    return request


def _payload(path: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": TEXT}]
    short = {"max_tokens": 1, "temperature": 0}
    if path.startswith((CHAT, MESSAGES)):
        return {"messages": messages, **short}
    if path.startswith(RESPONSES):
        return {"input": TEXT, "max_output_tokens": 1}
    if path.startswith(COMPLETIONS) or path in OWN_METHODS:
        return {"prompt": TEXT, **short}
    return {"prompt": TEXT, "messages": messages, "input": TEXT, "query": TEXT, "items": [TEXT], **short}


def _message(draw: random.Random) -> Any:
    parts = [{"type": draw.choice(("text", "image_url", "prompt_embeds", "refusal", 5, None)), "text": TEXT}]
    content = draw.choice((*STRANGE, parts, parts * 50))
    return draw.choice(
        (
            [{"role": draw.choice(("user", "system", "tool", 5, None)), "content": content}],
            [{"role": "user", "content": TEXT}, draw.choice(STRANGE)],
            [TEXT] * draw.choice((2, 300, 20_000)),
            [draw.choice(STRANGE)] * draw.choice((2, 500)),
            draw.choice(STRANGE),
        )
    )


def _encoded(draw: random.Random, payload: dict[str, Any]) -> bytes:
    text = json.dumps(payload, ensure_ascii=draw.random() < 0.7)
    kind = draw.random()
    if kind < 0.70:
        return text.encode("utf-8", "surrogatepass")
    if kind < 0.80:
        return text.encode(draw.choice(ENCODINGS), "replace")
    if kind < 0.84:  # a duplicate key: the last one counts
        return (
            text[:-1].encode("utf-8", "replace")
            + b', "model": '
            + json.dumps(draw.choice(MODELS)).encode()
            + b"}"
        )
    if kind < 0.88:
        return text[: draw.randrange(len(text))].encode("utf-8", "replace")
    if kind < 0.91:
        depth = draw.choice((100, 2_000, 50_000))
        return b'{"model": "fedrouter", "prompt": ' + b"[" * depth + b"]" * depth + b"}"
    if kind < 0.93:
        return b'{"model": "fedrouter", "x": [' + b"{}," * draw.choice((100, 50_000)) + b"0]}"
    if kind < 0.95:
        return text.replace("fedrouter", "fed\\u0072outer").encode("utf-8", "replace")
    if kind < 0.97:
        return json.dumps(draw.choice(STRANGE)).encode()
    raw = bytearray(text.encode("utf-8", "replace"))
    for _ in range(draw.randrange(1, 6)):
        raw[draw.randrange(len(raw))] = draw.randrange(256)
    return bytes(raw)
