"""The batcher: no waiting when idle, one batch per turn, own errors, bounded queue."""

import asyncio
from typing import Any

import pytest

from policies.errors import Overloaded
from serve_app.batcher import Batcher, Deliver


def recording(batches: list[list[int]]):
    def handle(items: list[int], delivers: list[Deliver]) -> None:
        batches.append(items)
        for item, deliver in zip(items, delivers):
            deliver(ValueError(f"bad {item}") if item < 0 else 10 * item)

    return handle


def run(scenario) -> Any:
    async def within() -> Any:
        async with asyncio.timeout(10):
            return await scenario()

    return asyncio.run(within())


def test_a_lone_item_is_answered_in_the_next_turn_of_the_loop() -> None:
    async def scenario() -> None:
        results: list[int] = []
        Batcher(recording([]), max_batch_size=8, max_queue=8).submit(4, results.append)
        assert results == []
        await asyncio.sleep(0)  # one turn; a batcher with a timer would still be waiting for company
        assert results == [40]

    run(scenario)


def test_items_of_one_turn_are_one_batch_and_size_is_bounded() -> None:
    batches: list[list[int]] = []

    async def scenario() -> list[int]:
        batcher = Batcher(recording(batches), max_batch_size=2, max_queue=8)
        return await asyncio.gather(*[batcher.answer(item) for item in range(5)])

    assert run(scenario) == [0, 10, 20, 30, 40]
    assert batches == [[0, 1], [2, 3], [4]]


def test_an_item_of_many_rows_counts_as_many() -> None:
    batches: list[list[int]] = []

    async def scenario() -> None:
        batcher = Batcher(recording(batches), max_batch_size=8, max_queue=100)
        sizes = {1: 1, 2: 6, 3: 1, 4: 50, 5: 1}
        answers = [batcher.answer(item, num_rows=size) for item, size in sizes.items()]
        assert await asyncio.gather(*answers) == [10, 20, 30, 40, 50]
        assert len(batcher) == 0

    run(scenario)
    assert batches == [[1, 2, 3], [4], [5]], "50 rows are more than a batch, and so one of their own"


def test_what_arrives_during_a_batch_is_the_next_batch() -> None:
    batches: list[list[int]] = []

    async def scenario() -> None:
        late: list[int] = []

        def handle(items: list[int], delivers: list[Deliver]) -> None:
            if not batches:
                batcher.submit(7, late.append)
                batcher.submit(8, late.append)
            batches.append(items)
            for item, deliver in zip(items, delivers):
                deliver(item)

        batcher = Batcher(handle, max_batch_size=8, max_queue=8)
        assert await batcher.answer(1) == 1
        await asyncio.sleep(0)
        assert late == [7, 8]

    run(scenario)
    assert batches == [[1], [7, 8]]


def test_a_bad_item_fails_alone() -> None:
    async def scenario() -> list[object]:
        batcher = Batcher(recording([]), max_batch_size=8, max_queue=8)
        return await asyncio.gather(*[batcher.answer(item) for item in (1, -2, 3)], return_exceptions=True)

    first, second, third = run(scenario)
    assert (first, third) == (10, 30)
    assert isinstance(second, ValueError) and str(second) == "bad -2"


def test_a_handler_that_raises_for_one_would_fail_all() -> None:
    """Negative control: this is what `@serve.batch` does, and why handlers here deliver exceptions."""

    def raising(items: list[int], delivers: list[Deliver]) -> None:
        results = [10 * item if item >= 0 else int("x") for item in items]
        for result, deliver in zip(results, delivers):
            deliver(result)

    async def scenario() -> list[object]:
        batcher = Batcher(raising, max_batch_size=8, max_queue=8)
        return await asyncio.gather(*[batcher.answer(item) for item in (1, -2, 3)], return_exceptions=True)

    assert [type(result) for result in run(scenario)] == [ValueError] * 3


def test_one_that_cannot_be_told_of_a_failure_keeps_nobody_from_being_told() -> None:
    told: list[Exception] = []

    def gone(result: object) -> None:
        raise ConnectionResetError("the connection broke in this moment")

    def raising(items: list[int], delivers: list[Deliver]) -> None:
        raise ValueError("no model")

    async def scenario() -> None:
        batcher = Batcher(raising, max_batch_size=8, max_queue=8)
        for deliver in (told.append, gone, told.append):
            batcher.submit(1, deliver)
        await asyncio.sleep(0)

    run(scenario)
    assert [str(error) for error in told] == ["no model"] * 2


def test_the_queue_is_bounded_and_opens_again() -> None:
    async def scenario() -> None:
        batcher = Batcher(recording([]), max_batch_size=8, max_queue=3)
        results: list[int] = []
        batcher.submit(1, results.append)
        batcher.submit(2, results.append, num_rows=2)
        with pytest.raises(Overloaded, match=r"3 decisions are waiting, the limit is 3"):
            batcher.submit(3, results.append)
        await asyncio.sleep(0)
        assert results == [10, 20]
        assert await batcher.answer(3) == 30

    run(scenario)


def test_a_request_for_more_than_the_queue_holds_is_taken_when_nothing_waits() -> None:
    """Else no client could ever have it answered, however often it tries."""

    async def scenario() -> None:
        batcher = Batcher(recording([]), max_batch_size=8, max_queue=3)
        assert await batcher.answer(5, num_rows=10) == 50

    run(scenario)


def test_a_caller_that_went_away_takes_no_other_with_it() -> None:
    async def scenario() -> None:
        batcher = Batcher(recording([]), max_batch_size=8, max_queue=8)
        gone, stays = asyncio.ensure_future(batcher.answer(1)), asyncio.ensure_future(batcher.answer(2))
        await asyncio.sleep(0)
        gone.cancel()
        assert await stays == 20

    run(scenario)


def is_refused_after(waited_s: float, *, batch_s: float = 0.0, max_batch_size: int = 1) -> bool:
    """Return whether an item is refused when another has waited so long, after a batch that took so long."""
    now_s = [0.0]

    def handle(items: list[int], delivers: list[Deliver]) -> None:
        now_s[0] += batch_s
        recording([])(items, delivers)

    async def scenario() -> bool:
        batcher = Batcher(handle, max_batch_size=max_batch_size, max_queue=1000, now_s=lambda: now_s[0])
        await batcher.answer(1)
        answers: list[int] = []
        batcher.submit(2, answers.append)
        now_s[0] += waited_s
        try:
            batcher.submit(3, answers.append)
        except Overloaded as error:
            assert "the first for" in str(error)
        await asyncio.sleep(0.01)
        assert answers[0] == 20, "who was accepted is answered"
        return answers == [20]

    return run(scenario)


def test_what_would_wait_long_is_refused_at_once() -> None:
    assert is_refused_after(0.031) and not is_refused_after(0.029)


def test_a_policy_whose_batches_take_long_may_have_some_of_them_wait() -> None:
    """0.1 s a batch: up to 0.2 s are no overload."""
    assert not is_refused_after(0.19, batch_s=0.1) and is_refused_after(0.21, batch_s=0.1)


def test_what_the_next_batch_takes_is_never_refused_however_long_the_machine_stood_still() -> None:
    assert not is_refused_after(10.0, max_batch_size=2)
