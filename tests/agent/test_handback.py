"""Results from threads reach the event loop in order, each once, and not after the end."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from agent.handback import Handback


def run(story: Any) -> None:
    asyncio.run(asyncio.wait_for(story(), 60))


def test_results_are_called_on_the_loops_thread_in_the_order_given() -> None:
    async def story() -> None:
        handback, all_there = Handback(), asyncio.Event()
        seen: list[tuple[int, int]] = []

        def take(number: int) -> None:
            seen.append((number, threading.get_ident()))
            if len(seen) == 1000:
                all_there.set()

        thread = threading.Thread(target=lambda: [handback.give(take, number) for number in range(1000)])
        thread.start()
        await all_there.wait()
        thread.join()
        assert seen == [(number, threading.get_ident()) for number in range(1000)]
        handback.close()

    run(story)


def test_one_that_fails_is_told_and_keeps_nobody_waiting() -> None:
    async def story() -> None:
        handback, done = Handback(), asyncio.Event()
        told: list[str] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(repr(context["exception"])))
        for call in (lambda _: 1 / 0, lambda _: done.set()):
            handback.give(call, None)
        await done.wait()
        assert told == ["ZeroDivisionError('division by zero')"]
        handback.close()

    run(story)


def test_what_comes_after_the_end_is_dropped() -> None:
    async def story() -> None:
        handback = Handback()
        seen: list[int] = []
        handback.give(seen.append, 1)
        handback.close()
        handback.give(seen.append, 2)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert seen == []

    run(story)


def test_it_can_be_closed_when_the_loop_is_closed_already() -> None:
    async def story() -> Handback:
        return Handback()

    asyncio.run(story()).close()
