"""The batcher: no waiting when idle, one batch per turn, own errors, bounded queue."""

import asyncio

import pytest

from policies.errors import Overloaded
from serve_app.batcher import Batcher


def recording(batches: list[list[int]]):
    def handle(items: list[int]) -> list[int | Exception]:
        batches.append(items)
        return [ValueError(f"bad {item}") if item < 0 else 10 * item for item in items]

    return handle


def test_a_lone_item_is_answered_in_the_next_turn_of_the_loop() -> None:
    async def run() -> None:
        future = Batcher(recording([]), max_batch_size=8, max_queue=8).submit(4)
        await asyncio.sleep(0)  # one turn; a batcher with a timer would still be waiting for company
        assert future.done()
        assert future.result() == 40

    asyncio.run(run())


def test_items_of_one_turn_are_one_batch_and_size_is_bounded() -> None:
    async def run() -> list[list[int]]:
        batches: list[list[int]] = []
        batcher = Batcher(recording(batches), max_batch_size=2, max_queue=8)
        results = await asyncio.gather(*[batcher.submit(item) for item in range(5)])
        assert results == [0, 10, 20, 30, 40]
        return batches

    assert asyncio.run(run()) == [[0, 1], [2, 3], [4]]


def test_what_arrives_during_a_batch_is_the_next_batch() -> None:
    async def run() -> list[list[int]]:
        batches: list[list[int]] = []
        late: list[asyncio.Future[int]] = []

        def handle(items: list[int]) -> list[int | Exception]:
            if not batches:
                late.extend([batcher.submit(7), batcher.submit(8)])
            batches.append(items)
            return [*items]

        batcher = Batcher(handle, max_batch_size=8, max_queue=8)
        assert await batcher.submit(1) == 1
        assert await asyncio.gather(*late) == [7, 8]
        return batches

    assert asyncio.run(run()) == [[1], [7, 8]]


def test_a_bad_item_fails_alone() -> None:
    async def run() -> list[object]:
        batcher = Batcher(recording([]), max_batch_size=8, max_queue=8)
        return await asyncio.gather(*[batcher.submit(item) for item in (1, -2, 3)], return_exceptions=True)

    first, second, third = asyncio.run(run())
    assert (first, third) == (10, 30)
    assert isinstance(second, ValueError) and str(second) == "bad -2"


def test_a_handler_that_raises_for_one_would_fail_all() -> None:
    """Negative control: this is what `@serve.batch` does, and why handlers here return exceptions."""

    def raising(items: list[int]) -> list[int | Exception]:
        return [10 * item if item >= 0 else int("x") for item in items]

    async def run() -> list[object]:
        batcher = Batcher(raising, max_batch_size=8, max_queue=8)
        return await asyncio.gather(*[batcher.submit(item) for item in (1, -2, 3)], return_exceptions=True)

    assert [type(result) for result in asyncio.run(run())] == [ValueError] * 3


def test_the_queue_is_bounded_and_opens_again() -> None:
    async def run() -> None:
        batcher = Batcher(recording([]), max_batch_size=8, max_queue=2)
        accepted = [batcher.submit(1), batcher.submit(2)]
        with pytest.raises(Overloaded, match=r"2 requests are waiting, the limit is 2"):
            batcher.submit(3)
        assert await asyncio.gather(*accepted) == [10, 20]
        assert await batcher.submit(3) == 30

    asyncio.run(run())


def test_a_caller_that_went_away_is_left_out_and_the_others_are_answered() -> None:
    async def run() -> list[list[int]]:
        batches: list[list[int]] = []
        batcher = Batcher(recording(batches), max_batch_size=8, max_queue=8)
        gone, stays = batcher.submit(1), batcher.submit(2)
        gone.cancel()
        assert await stays == 20
        return batches

    assert asyncio.run(run()) == [[2]]
