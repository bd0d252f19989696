import asyncio
import threading
from collections.abc import Callable
from typing import Any

from agent.chores import MAX_WAITING, Chores, failed
from agent.contract.errors import EdgewardenError, Unavailable


def outcomes(*works: Callable[[], Any]) -> tuple[list[Any], list[Exception]]:
    """What is told of these, done by one thread; and the faults."""

    async def story() -> tuple[list[Any], list[Exception]]:
        told: list[Any] = []
        faults: list[Exception] = []
        every = asyncio.Event()

        def note(outcome: Any) -> None:
            told.append(outcome)
            if len(told) == len(works):
                every.set()

        chores = Chores("ew-test", on_fault=faults.append)
        for work in works:
            chores.start(work, note)
        async with asyncio.timeout(60):
            await every.wait()
        return told, faults

    return asyncio.run(story())


def test_work_is_done_in_order_in_one_named_thread() -> None:
    told, faults = outcomes(*[lambda n=n: (n, threading.current_thread().name) for n in range(5)])
    assert told == [(n, "ew-test") for n in range(5)]
    assert faults == []


def test_an_error_of_ours_is_told_and_the_next_work_is_done() -> None:
    def fail() -> None:
        raise Unavailable("nobody there")

    told, faults = outcomes(fail, lambda: 2)
    assert failed(told[0])
    assert told[0].code == "unavailable"
    assert told[1] == 2
    assert faults == []


def test_a_fault_is_told_as_an_error_and_counted_once() -> None:
    told, faults = outcomes(lambda: 1 // 0)
    assert isinstance(told[0], EdgewardenError)
    assert "ZeroDivisionError" in str(told[0])
    assert [type(fault) for fault in faults] == [ZeroDivisionError]


def test_a_queue_that_is_full_says_so() -> None:
    go = threading.Event()
    begun = threading.Event()

    async def story() -> list[Any]:
        told: list[Any] = []
        chores = Chores("ew-test", on_fault=lambda _: None)

        def first() -> int:
            begun.set()
            go.wait(20)
            return 0

        chores.start(first, told.append)
        await asyncio.to_thread(begun.wait, 20)
        for _ in range(MAX_WAITING + 1):
            chores.start(lambda: 1, told.append)
        await asyncio.sleep(0)
        refused = [one.code for one in told if failed(one)]
        go.set()
        async with asyncio.timeout(60):
            while len(told) < MAX_WAITING + 2:  # noqa: ASYNC110 - what is awaited has no event
                await asyncio.sleep(0.01)
        return refused

    assert asyncio.run(story()) == ["overloaded"]
