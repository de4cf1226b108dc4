"""Our own answers with the CORS headers that vLLM would give them: it adds its own behind the hook."""

from typing import Any

from fedrouter.serve.asgi import Answer, App, Receive, Scope, Send, send_answer


class Replies:
    """Sends answers of the hook's own.

    Parameters
    ----------
    options : of Starlette's ``CORSMiddleware``; None where no page elsewhere may read answers.
    """

    def __init__(self, options: dict[str, Any] | None = None):
        self._options = options

    async def __call__(self, scope: Scope, send: Send, answer: Answer) -> None:
        """Send a whole answer to a request."""

        async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
            await send_answer(send, answer)

        await self._wrap(app)(scope, _nothing_more, send)

    def _wrap(self, app: App) -> App:
        if self._options is None:
            return app
        from starlette.middleware.cors import CORSMiddleware  # vLLM brings it; a proxy has no such options

        return CORSMiddleware(app, **self._options)


async def _nothing_more() -> dict[str, Any]:
    raise AssertionError("an answer of our own reads nothing")
