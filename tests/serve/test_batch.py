"""Micro-batching."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedrouter.serve.batch import Batcher, Overloaded


class Doubler:
    """Doubles numbers, fails for batches with a negative number, waits until ``gate`` is set."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.threads: set[int] = set()
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, items: list[int]) -> list[int]:
        assert self.gate.wait(5)
        self.batches.append(items)
        self.threads.add(threading.get_ident())
        if min(items) < 0:
            raise ValueError("negative")
        return [2 * item for item in items]


def run(
    work: Doubler, scenario: Callable[[Batcher[int, int]], Awaitable[Any]], max_batch: int = 4, **options: Any
) -> Any:
    async def main() -> Any:
        batcher = Batcher[int, int](work, max_batch, **options)
        try:
            return await scenario(batcher)
        finally:
            batcher.close()

    return asyncio.run(main())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 1000), max_size=40), st.integers(1, 8))
def test_everyone_gets_their_own_result_in_few_batches(items: list[int], max_batch: int) -> None:
    work = Doubler()
    results = run(work, lambda b: asyncio.gather(*(b.submit(i) for i in items)), max_batch)
    assert results == [2 * item for item in items]
    assert max(map(len, work.batches), default=0) <= max_batch
    assert len(work.batches) <= -(-len(items) // max_batch)
    assert len(work.threads) <= 1
    assert threading.get_ident() not in work.threads


def test_what_queues_during_a_batch_is_the_next_batch() -> None:
    work = Doubler()

    async def scenario(batcher: Batcher[int, int]) -> None:
        work.gate.clear()
        first = asyncio.create_task(batcher.submit(0))
        await asyncio.sleep(0.05)  # until the thread runs it
        rest = [asyncio.create_task(batcher.submit(i)) for i in range(1, 6)]
        await asyncio.sleep(0.05)
        work.gate.set()
        await asyncio.gather(first, *rest)

    run(work, scenario)
    assert work.batches == [[0], [1, 2, 3, 4], [5]]


def test_a_failing_batch_fails_its_own_items_only() -> None:
    async def scenario(batcher: Batcher[int, int]) -> list[Any]:
        failed = await asyncio.gather(batcher.submit(1), batcher.submit(-1), return_exceptions=True)
        return [*failed, await batcher.submit(3)]

    first, second, third = run(Doubler(), scenario)
    assert isinstance(first, ValueError)
    assert isinstance(second, ValueError)
    assert third == 6


def test_cancelled_submissions_are_dropped() -> None:
    work = Doubler()

    async def scenario(batcher: Batcher[int, int]) -> int:
        work.gate.clear()
        first = asyncio.create_task(batcher.submit(0))
        await asyncio.sleep(0.05)
        gone, stays = asyncio.create_task(batcher.submit(1)), asyncio.create_task(batcher.submit(2))
        await asyncio.sleep(0.05)
        gone.cancel()
        await asyncio.sleep(0)
        work.gate.set()
        await first
        with pytest.raises(asyncio.CancelledError):
            await gone
        return await stays

    assert run(work, scenario) == 4
    assert work.batches == [[0], [2]]


def test_a_full_queue_refuses_and_recovers() -> None:
    work = Doubler()

    async def scenario(batcher: Batcher[int, int]) -> list[int]:
        work.gate.clear()
        first = asyncio.create_task(batcher.submit(0))
        await asyncio.sleep(0.05)  # until the thread runs it and the queue is empty
        waiting = [asyncio.create_task(batcher.submit(i)) for i in (1, 2)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await batcher.submit(3)
        work.gate.set()
        return [await first, *await asyncio.gather(*waiting), await batcher.submit(4)]

    assert run(work, scenario, max_queue=2) == [0, 2, 4, 8]
    assert work.batches == [[0], [1, 2], [4]]


def test_many_items_of_one_owner_leave_room_and_turns_to_others() -> None:
    """A submission of twenty items, a tenant with ten, and three single items share a queue of sixteen."""
    work = Doubler()

    async def scenario(batcher: Batcher[int, int]) -> None:
        work.gate.clear()
        first = asyncio.create_task(batcher.submit(0))
        await asyncio.sleep(0.05)
        many = asyncio.create_task(batcher.submit_all([*range(100, 120)]))
        await asyncio.sleep(0)
        tenant = [asyncio.create_task(batcher.submit_all([200 + i], "ann")) for i in range(10)]
        others = [asyncio.create_task(batcher.submit(i)) for i in (1, 2, 3)]
        await asyncio.sleep(0.05)
        work.gate.set()
        assert await asyncio.gather(*others) == [2, 4, 6]
        answers = await asyncio.gather(*tenant, return_exceptions=True)
        assert [type(one) for one in answers] == [list] * 4 + [Overloaded] * 6, "a tenant may fill a quarter"
        assert await many == [*range(200, 240, 2)]
        assert await first == 0

    run(work, scenario, max_batch=5, max_queue=16)
    assert work.batches[1] == [100, 200, 1, 2, 3], "one item of each owner in turn"


def test_large_submissions_leave_half_of_the_queue() -> None:
    work = Doubler()

    async def scenario(batcher: Batcher[int, int]) -> None:
        work.gate.clear()
        first = asyncio.create_task(batcher.submit(0))
        await asyncio.sleep(0.05)
        lists = [asyncio.create_task(batcher.submit_all([1, 2, 3, 4])) for _ in range(4)]
        await asyncio.sleep(0)
        singles = [asyncio.create_task(batcher.submit(i)) for i in range(8)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await batcher.submit(9)
        work.gate.set()
        answers = await asyncio.gather(*lists, return_exceptions=True)
        assert [type(one) for one in answers] == [list, list, Overloaded, Overloaded]
        assert await asyncio.gather(*singles) == [*range(0, 16, 2)]
        await first

    run(work, scenario, max_queue=16)


def test_items_that_belong_together_may_outnumber_the_queue() -> None:
    assert run(Doubler(), lambda b: b.submit_all([*range(9)]), max_queue=2) == [*range(0, 18, 2)]
    assert run(Doubler(), lambda b: b.submit_all([])) == []


def test_submissions_that_wait_too_long_fail_and_are_dropped() -> None:
    work = Doubler()

    async def scenario(batcher: Batcher[int, int]) -> int:
        work.gate.clear()
        found = await asyncio.gather(batcher.submit(0), return_exceptions=True)
        late = await asyncio.gather(batcher.submit(1), batcher.submit_all([2, 3]), return_exceptions=True)
        assert [type(one) for one in [*found, *late]] == [Overloaded] * 3
        work.gate.set()
        return await batcher.submit(5)

    assert run(work, scenario, max_queue=3, timeout_s=0.1) == 10
    assert work.batches == [[0], [5]]
