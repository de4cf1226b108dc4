"""Micro-batching: what queues while one batch runs becomes the next batch, with something for everybody."""

import asyncio
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from fedrouter.serve import metrics

SHARE = 4  # of the queue, nobody gets more than one such part
Item = TypeVar("Item")
Result = TypeVar("Result")


class Overloaded(Exception):  # noqa: N818 - a state, not a failure
    """The queue, or one's share of it, is full, or the wait was too long."""


class Batcher(Generic[Item, Result]):
    """Run ``work`` on batches of items, one batch at a time, in one thread beside the event loop.

    A lone item waits for nobody; a burst of n items costs about n / ``max_batch`` calls, not n. A batch takes
    one item of each who waits, in turn: many items of one hold nobody else up for long.

    Parameters
    ----------
    work : called with 1 to ``max_batch`` items, returns as many results in the same order.
    start : called once in the worker thread before the first batch.
    max_queue : how many items may wait, those of one submission with the others; a quarter of it for one of
        ``whose``, and half of it for submissions of several. Those in the running batch do not count. More
        items of one submission than that go into the queue piece by piece.
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
        self._share = max(1.0, max_queue / SHARE)
        self._queue: dict[Hashable, dict[asyncio.Future[Result], Item]] = {}  # by whose turn it is
        self._num_waiting = 0
        self._runner: asyncio.Task[None] | None = None

    async def submit(self, item: Item) -> Result:
        """Return the result for one item; see ``submit_all``."""
        [result] = await self.submit_all([item])
        return result

    async def submit_all(self, items: Sequence[Item], whose: Hashable = None) -> list[Result]:
        """Return the results for items that are taken together or not at all.

        Parameters
        ----------
        whose : they share a place in turn and a quarter of the queue; None: this submission alone.

        Raises
        ------
        Overloaded
            At once if they do not fit into the queue; or after ``timeout_s``, and nothing is worked for them
            any more.
        Exception
            What ``work`` raised for a batch with one of them in it.
        """
        whose = object() if whose is None else whose
        piece = int(min(self._share, len(items)))
        try:
            async with asyncio.timeout(self._timeout_s):
                return [
                    result
                    for start in range(0, len(items), piece or 1)
                    for result in await self._submit(items[start : start + piece], whose)
                ]
        except TimeoutError:
            raise Overloaded from None

    async def _submit(self, items: Sequence[Item], whose: Hashable) -> list[Result]:
        own = len(self._queue.get(whose, ()))
        most = self._max_queue if len(items) == 1 else self._max_queue / 2  # lists leave room for who has one
        if self._num_waiting + len(items) > most or own + len(items) > self._share:
            raise Overloaded
        loop = asyncio.get_running_loop()
        results: list[asyncio.Future[Result]] = [loop.create_future() for _ in items]
        self._queue.setdefault(whose, {}).update(zip(results, items, strict=True))
        self._num_waiting += len(items)
        metrics.QUEUE.inc(len(items))
        if self._runner is None:
            self._runner = asyncio.create_task(self._run())
        try:
            return await asyncio.gather(*results)
        finally:
            for result in results:  # who has left waits for nothing
                self._take(whose, result)
                result.cancel()

    async def at_once(self, items: Sequence[Item]) -> Sequence[Result]:
        """Return the results for a few items that wait for the running batch only, however long it takes."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._work, list(items))

    def close(self) -> None:
        """Let the worker thread end after the batch it is in."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _take(self, whose: Hashable, waiting: asyncio.Future[Result]) -> None:
        own = self._queue.get(whose, {})
        if waiting in own:
            del own[waiting]
            self._num_waiting -= 1
            metrics.QUEUE.dec()
        if not own:
            self._queue.pop(whose, None)

    def _next_batch(self) -> dict[asyncio.Future[Result], Item]:
        """Take one item of each who waits, and go round again until the batch is full."""
        batch: dict[asyncio.Future[Result], Item] = {}
        while self._queue and len(batch) < self._max_batch:
            whose, own = next(iter(self._queue.items()))
            waiting, batch[waiting] = next(iter(own.items()))
            self._take(whose, waiting)
            if own:
                self._queue[whose] = self._queue.pop(whose)  # behind all others
        return batch

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._queue:
                batch = self._next_batch()
                metrics.BATCH.observe(len(batch))
                try:
                    results = await loop.run_in_executor(self._pool, self._work, list(batch.values()))
                except Exception as error:  # belongs to those who wait, not to this loop
                    for waiting in batch:
                        if not waiting.done():
                            waiting.set_exception(error)
                    continue
                for waiting, value in zip(batch, results, strict=True):
                    if not waiting.done():
                        waiting.set_result(value)
        finally:
            self._runner = None
