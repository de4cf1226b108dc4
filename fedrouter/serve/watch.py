"""Watch a symbolic link: when it points to another bundle, reload that bundle."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from fedrouter.serve.asgi import Refusal

POLL_S = 2.0
logger = logging.getLogger("vllm.fedrouter.watch")


class Watch:
    """Follows one symbolic link to a bundle, polled every ``POLL_S`` seconds.

    Each new target is reloaded once, as by ``fedrouter reload``. A refusal is logged, and nothing changes
    until the link points elsewhere again.
    """

    def __init__(self, link: Path):
        self._link = link
        self._task: asyncio.Task[None] | None = None

    def start(
        self, served: Path, may_reload: Callable[[], bool], reload: Callable[[str], Awaitable[object]]
    ) -> None:
        """Begin to poll.

        Parameters
        ----------
        served : real directory of the served bundle; the link may already point elsewhere.
        may_reload : returns whether a reload can begin now; a change of the link waits until it can.
        reload : serves the bundle of this name; raises ``Refusal``.
        """
        self._task = asyncio.create_task(self._follow(served, may_reload, reload))

    def close(self) -> None:
        """Stop polling."""
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
                logger.exception("%s points to %s: the reload failed", self._link, target)

    def _target(self) -> Path | None:
        """Return the link's target; None while the link is missing, as it may be while it is replaced."""
        try:
            return self._link.resolve() if self._link.is_symlink() else None
        except (OSError, RuntimeError):  # links in a loop
            return None
