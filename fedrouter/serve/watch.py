"""A link that is watched: when it points to another bundle, the server serves that, without being asked."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from fedrouter.serve.asgi import Refusal

POLL_S = 2.0
logger = logging.getLogger("vllm.fedrouter.watch")


class Watch:
    """Follows one link, looking every ``POLL_S`` seconds.

    What it points to is reloaded once, on the way that ``fedrouter reload`` goes; if that is refused, the log
    says why, once, and nothing changes until the link points elsewhere again.

    Parameters
    ----------
    link : the path of a symbolic link to a bundle.
    """

    def __init__(self, link: Path):
        self._link = link
        self._task: asyncio.Task[None] | None = None

    def start(
        self, served: Path, may_reload: Callable[[], bool], reload: Callable[[str], Awaitable[object]]
    ) -> None:
        """Begin to look.

        Parameters
        ----------
        served : the bundle's real directory, which the link may have left already.
        may_reload : whether a reload can begin now; the link is not looked at while it cannot.
        reload : serves the bundle of a name beside the served one; raises ``Refusal``.
        """
        self._task = asyncio.create_task(self._follow(served, may_reload, reload))

    def close(self) -> None:
        """Stop looking."""
        if self._task is not None:
            self._task.cancel()

    async def _follow(
        self, seen: Path | None, may_reload: Callable[[], bool], reload: Callable[[str], Awaitable[object]]
    ) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            target = self._target()
            if target in (None, seen) or not may_reload():
                continue
            seen = target
            try:
                await reload(self._link.name)
            except Refusal as refusal:
                logger.error("%s points to %s: %s", self._link, target, refusal)
            except Exception:
                logger.exception("%s points to %s, and reloading failed", self._link, target)

    def _target(self) -> Path | None:
        """Return where the link points; None while it is away, for a moment when it is replaced."""
        try:
            return self._link.resolve() if self._link.is_symlink() else None
        except (OSError, RuntimeError):  # a loop
            return None
