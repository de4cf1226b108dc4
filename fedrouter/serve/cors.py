"""CORS headers for the hook's own responses: vLLM's CORS middleware runs behind the hook and misses them."""

from typing import Any

from fedrouter.serve.asgi import Answer, App, Receive, Scope, Send, send_answer


class Replies:
    """Sends the hook's own responses.

    Parameters
    ----------
    options : arguments of Starlette's ``CORSMiddleware``; None: no CORS headers.
    """

    def __init__(self, options: dict[str, Any] | None = None):
        self._options = options

    async def __call__(self, scope: Scope, send: Send, answer: Answer) -> None:
        """Send a complete response."""

        async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
            await send_answer(send, answer)

        await self._wrap(app)(scope, _no_body, send)

    def _wrap(self, app: App) -> App:
        if self._options is None:
            return app
        from starlette.middleware.cors import CORSMiddleware  # vLLM installs it; a proxy has no CORS options

        return CORSMiddleware(app, **self._options)


async def _no_body() -> dict[str, Any]:
    raise AssertionError("the hook's own responses read no body")
