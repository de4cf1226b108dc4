"""Micro-batching: what queues while one batch runs becomes the next batch."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """Run ``work`` on batches of items, one batch at a time, in one thread beside the event loop.

    A lone item waits for nobody; a burst of n items costs about n / ``max_batch`` calls, not n.

    Parameters
    ----------
    work : called with 1 to ``max_batch`` items, returns as many results in the same order.
    start : called once in the worker thread before the first batch.
    """

    def __init__(
        self,
        work: Callable[[list[Item]], Sequence[Result]],
        max_batch: int = 32,
        start: Callable[[], None] | None = None,
    ):
        self._work = work
        self._max_batch = max_batch
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="fedrouter-embed", initializer=start)
        self._queue: list[tuple[Item, asyncio.Future[Result]]] = []
        self._runner: asyncio.Task[None] | None = None

    async def submit(self, item: Item) -> Result:
        """Return the result for one item; raises what ``work`` raised for its batch."""
        result: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._queue.append((item, result))
        if self._runner is None:
            self._runner = asyncio.create_task(self._run())
        return await result

    def close(self) -> None:
        """Let the worker thread end after the batch it is in."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._queue:
                batch, self._queue = self._queue[: self._max_batch], self._queue[self._max_batch :]
                waiting = [
                    (item, result) for item, result in batch if not result.done()
                ]  # not cancelled since
                if not waiting:
                    continue
                try:
                    results = await loop.run_in_executor(
                        self._pool, self._work, [item for item, _ in waiting]
                    )
                except Exception as error:  # belongs to those who wait, not to this loop
                    for _, result in waiting:
                        if not result.done():
                            result.set_exception(error)
                    continue
                for (_, result), value in zip(waiting, results, strict=True):
                    if not result.done():
                        result.set_result(value)
        finally:
            self._runner = None
