"""Micro-batching: what queues while one batch runs becomes the next batch."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Generic, TypeVar

from fedrouter.serve import metrics

Item = TypeVar("Item")
Result = TypeVar("Result")


class Overloaded(Exception):  # noqa: N818 - a state, not a failure
    """The queue is full, or the wait was too long."""


class Batcher(Generic[Item, Result]):
    """Run ``work`` on batches of items, one batch at a time, in one thread beside the event loop.

    A lone item waits for nobody; a burst of n items costs about n / ``max_batch`` calls, not n.

    Parameters
    ----------
    work : called with 1 to ``max_batch`` items, returns as many results in the same order.
    start : called once in the worker thread before the first batch.
    max_queue : how many items may wait when more are submitted; those in the running batch do not count.
    timeout_s : the longest wait for results, seconds; for ever without.
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
        self._queue: dict[asyncio.Future[Result], Item] = {}  # in the order of arrival
        self._runner: asyncio.Task[None] | None = None

    async def submit(self, item: Item) -> Result:
        """Return the result for one item; see ``submit_all``."""
        [result] = await self.submit_all([item])
        return result

    async def submit_all(self, items: Sequence[Item]) -> list[Result]:
        """Return the results for items that are taken together or not at all.

        Raises
        ------
        Overloaded
            At once if the queue is full; or after ``timeout_s``, and nothing is worked for them any more.
        Exception
            What ``work`` raised for a batch with one of them in it.
        """
        if not items:
            return []
        if len(self._queue) >= self._max_queue:
            raise Overloaded
        loop = asyncio.get_running_loop()
        results: list[asyncio.Future[Result]] = [loop.create_future() for _ in items]
        self._queue.update(zip(results, items, strict=True))
        metrics.QUEUE.inc(len(items))
        if self._runner is None:
            self._runner = asyncio.create_task(self._run())
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.gather(*results)
        except TimeoutError:
            raise Overloaded from None
        finally:
            for result in results:  # who has left waits for nothing
                self._take(result)
                result.cancel()

    def close(self) -> None:
        """Let the worker thread end after the batch it is in."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _take(self, waiting: asyncio.Future[Result]) -> None:
        if waiting in self._queue:
            del self._queue[waiting]
            metrics.QUEUE.dec()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._queue:
                batch = list(islice(self._queue.items(), self._max_batch))
                for waiting, _ in batch:
                    self._take(waiting)
                metrics.BATCH.observe(len(batch))
                try:
                    results = await loop.run_in_executor(self._pool, self._work, [item for _, item in batch])
                except Exception as error:  # belongs to those who wait, not to this loop
                    for waiting, _ in batch:
                        if not waiting.done():
                            waiting.set_exception(error)
                    continue
                for (waiting, _), value in zip(batch, results, strict=True):
                    if not waiting.done():
                        waiting.set_result(value)
        finally:
            self._runner = None
