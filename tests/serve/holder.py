"""An application that lists, loads, unloads and uses adapters by name, as vLLM does."""

import asyncio
import json
from typing import Any

from echo import KEY


class HolderApp:
    """Answers in the name of a loaded adapter, and 404 for others, as vLLM does.

    Attributes
    ----------
    broken : adapters that fail to load.
    idle : adapters without effect.
    gate : until it is set, prompts that contain "slow" get no response.
    waiting : number of such prompts so far.
    """

    def __init__(self, adapters: list[str]):
        self.adapters = dict.fromkeys(adapters, "")
        self.broken: set[str] = set()
        self.idle: set[str] = set()
        self.gate = asyncio.Event()
        self.waiting = 0
        self.changes: list[tuple[str, str]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            assert (await receive())["type"] == "lifespan.startup"
            await send({"type": "lifespan.startup.complete"})
            assert (await receive())["type"] == "lifespan.shutdown"
            await send({"type": "lifespan.shutdown.complete"})
            return None
        if dict(scope["headers"]).get(b"authorization") != f"Bearer {KEY}".encode():
            return await self._send(send, 401, {"error": "Unauthorized"})
        body = b""
        while scope["method"] == "POST":
            message = await receive()
            body += message["body"]
            if not message["more_body"]:
                break
        status, answer = await self._answer(scope["path"], json.loads(body or b"{}"))
        return await self._send(send, status, answer)

    async def _answer(self, path: str, payload: Any) -> tuple[int, Any]:
        name = payload.get("lora_name") or payload.get("model")
        if path == "/v1/models":
            cards = [{"id": "base", "parent": None}, {"id": "fedrouter", "parent": None}]
            return 200, {"data": [*cards, *({"id": one, "parent": "base"} for one in self.adapters)]}
        if path == "/v1/load_lora_adapter":
            if name in self.broken or name in self.adapters:
                return 500, {"error": {"message": f"no room for {name}"}}
            await asyncio.sleep(0)
            self.adapters[name] = payload["lora_path"]
            self.changes.append(("load", name))
            return 200, "Success"
        if path == "/v1/unload_lora_adapter":
            if name not in self.adapters:
                return 404, {"error": {"message": f"{name} cannot be found"}}
            del self.adapters[name]
            self.changes.append(("unload", name))
            return 200, "Success"
        if name != "base" and name not in self.adapters:
            return 404, {"error": {"message": f"The model `{name}` does not exist."}}
        if "slow" in json.dumps(payload):
            self.waiting += 1
            await self.gate.wait()
            if name != "base" and name not in self.adapters:
                return 500, {"error": {"message": f"{name} is gone while it answers"}}
        likelihood = -1.0 if name == "base" or name in self.idle else -1.5
        choice = {"text": name, "logprobs": {"tokens": ["a"], "token_logprobs": [likelihood]}}
        prompts = payload.get("prompt")
        return 200, {"model": name, "choices": [choice] * (len(prompts) if isinstance(prompts, list) else 1)}

    async def _send(self, send: Any, status: int, payload: Any) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(payload).encode()})
