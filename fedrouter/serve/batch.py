"""Micro-batching: items that queue while one batch runs form the next batch, fairly over their owners."""

import asyncio
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from fedrouter.serve import metrics

SHARES = 4  # one owner may fill at most one of so many equal parts of the queue
Item = TypeVar("Item")
Result = TypeVar("Result")


class Overloaded(Exception):  # noqa: N818 - a state, not a failure
    """The queue, or the owner's share of it, is full, or the wait was too long."""


class Batcher(Generic[Item, Result]):
    """Run ``work`` on batches of items, one batch at a time, in one thread beside the event loop.

    A lone item does not wait; a burst of n items costs about n / ``max_batch`` calls. Batches are filled
    round-robin over owners, so that many items of one owner delay the others little.

    Parameters
    ----------
    work : called with 1 to ``max_batch`` items; returns as many results in the same order.
    start : called once in the worker thread before the first batch.
    max_queue : how many items may wait, without those of the running batch. One owner may fill a quarter of
        it; a submission of several items is accepted only into its first half. Larger submissions are queued
        piece by piece.
    timeout_s : longest wait for results, seconds; None: no limit.
    """

    def __init__(
        self,
        work: Callable[[list[Item]], Sequence[Result]],
        max_batch: int,
        start: Callable[[], None] | None = None,
        max_queue: float = float("inf"),
        timeout_s: float | None = None,
    ):
        self._work = work
        self._max_batch, self._max_queue, self._timeout_s = max_batch, max_queue, timeout_s
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="fedrouter-embed", initializer=start)
        self._share = max(1.0, max_queue / SHARES)
        self._queue: dict[Hashable, dict[asyncio.Future[Result], Item]] = {}  # by owner, in order of turns
        self._num_waiting = 0
        self._runner: asyncio.Task[None] | None = None

    async def submit(self, item: Item) -> Result:
        """Return the result for one item; see ``submit_all``."""
        [result] = await self.submit_all([item])
        return result

    async def submit_all(self, items: Sequence[Item], owner: Hashable = None) -> list[Result]:
        """Return the results for items that are accepted together or not at all.

        Parameters
        ----------
        owner : submissions of the same owner share its turn and its quarter of the queue; None: an owner of
            this submission alone.

        Raises
        ------
        Overloaded
            At once if the items do not fit into the queue; else after ``timeout_s``, when they leave it.
        Exception
            Whatever ``work`` raised for a batch with one of the items.
        """
        owner = object() if owner is None else owner
        piece = int(min(self._share, len(items)))
        try:
            async with asyncio.timeout(self._timeout_s):
                return [
                    result
                    for start in range(0, len(items), piece or 1)
                    for result in await self._submit(items[start : start + piece], owner)
                ]
        except TimeoutError:
            raise Overloaded from None

    async def _submit(self, items: Sequence[Item], owner: Hashable) -> list[Result]:
        num_own = len(self._queue.get(owner, ()))
        # Lists leave half of the queue to single items.
        limit = self._max_queue if len(items) == 1 else self._max_queue / 2
        if self._num_waiting + len(items) > limit or num_own + len(items) > self._share:
            raise Overloaded
        loop = asyncio.get_running_loop()
        results: list[asyncio.Future[Result]] = [loop.create_future() for _ in items]
        self._queue.setdefault(owner, {}).update(zip(results, items, strict=True))
        self._num_waiting += len(items)
        metrics.QUEUE.inc(len(items))
        if self._runner is None:
            self._runner = asyncio.create_task(self._run())
        try:
            return await asyncio.gather(*results)
        finally:
            for result in results:  # a caller that was cancelled needs no results
                self._take(owner, result)
                result.cancel()

    async def run_now(self, items: Sequence[Item]) -> Sequence[Result]:
        """Return the results for items that skip the queue: they wait for the running batch only."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._work, list(items))

    def close(self) -> None:
        """End the worker thread after the running batch."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _take(self, owner: Hashable, result: asyncio.Future[Result]) -> None:
        queued = self._queue.get(owner, {})
        if result in queued:
            del queued[result]
            self._num_waiting -= 1
            metrics.QUEUE.dec()
        if not queued:
            self._queue.pop(owner, None)

    def _next_batch(self) -> dict[asyncio.Future[Result], Item]:
        """Take one item of each owner, round after round, until the batch is full."""
        batch: dict[asyncio.Future[Result], Item] = {}
        while self._queue and len(batch) < self._max_batch:
            owner, queued = next(iter(self._queue.items()))
            result, batch[result] = next(iter(queued.items()))
            self._take(owner, result)
            if queued:
                self._queue[owner] = self._queue.pop(owner)  # behind all others
        return batch

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._queue:
                batch = self._next_batch()
                metrics.BATCH.observe(len(batch))
                try:
                    values = await loop.run_in_executor(self._pool, self._work, list(batch.values()))
                except Exception as error:  # raised in the submitters; this loop goes on
                    for result in batch:
                        if not result.done():
                            result.set_exception(error)
                    continue
                for result, value in zip(batch, values, strict=True):
                    if not result.done():
                        result.set_result(value)
        finally:
            self._runner = None
