"""Witnesses of answered requests: what they leave behind, and that nobody waits for them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.contract.errors import UnknownModel
from agent.lineup import load_lineup
from agent.observation import NO_CLASS, Outcome
from agent.service import Service
from agent.shadow import Shadow
from tests.agent.test_serving import THREAD, Stage, engine_plan, play, ring_fd, service_plan, three, window

__all__ = ["ring_fd"]  # the fixture


async def records(stage: Stage, count: int) -> np.ndarray:
    """The first `count` records, waited for."""
    found: list[np.ndarray] = []
    while sum(map(len, found)) < count:
        await asyncio.sleep(0.005)
        found.append(stage.ring.read())
    return np.concatenate(found)


@pytest.mark.parametrize("options", [{}, {"inline_us": THREAD}], ids=["inline", "thread"])
def test_a_witness_is_asked_after_the_answer_and_its_record_names_the_request(
    tmp_path: Path, ring_fd: int, options: dict[str, Any]
) -> None:
    async def story(stage: Stage) -> None:
        stage.serving.consult("wrist", ("wrist-accel",))
        x = window(rows=2)
        assert (await stage.ask(x)).engine == "wrist"
        told = await records(stage, 4)
        assert told["outcome"].tolist() == [Outcome.OK] * 2 + [Outcome.SHADOW] * 2
        assert told["engine"].tolist() == [0, 0, 1, 1]
        assert told["first_engine"].tolist() == [0, 0, 0, 0]
        assert len(set(told["arrival_ns"].tolist())) == 1
        assert told["row"].tolist() == [0, 1, 0, 1]
        assert (told["predicted"] != NO_CLASS).all()
        assert told["view_width"].tolist()[2:] == [0, 0]

    play(three(tmp_path), ring_fd, story, **options)


def test_what_witnesses_say_is_counted_nowhere(tmp_path: Path, ring_fd: int) -> None:
    async def story(stage: Stage) -> None:
        stage.serving.consult("wrist", ("wrist-accel", "wrist-floor"))
        await stage.ask(window())
        assert len(await records(stage, 3)) == 3
        assert stage.service.counters.requests == 1
        assert stage.serving.statistics()["requests"] == 1

    play(three(tmp_path), ring_fd, story)


def test_nobody_is_asked_any_more_once_told_so(tmp_path: Path, ring_fd: int) -> None:
    async def story(stage: Stage) -> None:
        stage.serving.consult("wrist", ("wrist-accel",))
        stage.serving.consult("wrist", ())
        await stage.ask(window())
        await asyncio.sleep(0.05)
        assert stage.ring.read()["outcome"].tolist() == [Outcome.OK]

    play(three(tmp_path), ring_fd, story)


def test_a_witness_that_fails_says_nothing_and_costs_nobody_an_answer(tmp_path: Path, ring_fd: int) -> None:
    async def story(stage: Stage) -> None:
        stage.serving.consult("wrist", ("wrist-bad", "wrist-accel"))
        x = window()
        x += 200.0  # where the troubled engine does its worst
        assert (await stage.ask(x)).engine == "wrist"
        told = await records(stage, 2)
        assert told["engine"].tolist() == [0, 2]
        assert stage.serving.statistics()["unwitnessed"] == 1
        assert stage.serving.take_troubles() == []

    engines = [
        engine_plan(tmp_path, "wrist"),
        engine_plan(tmp_path, "wrist-bad", trouble="nan"),
        engine_plan(tmp_path, "wrist-accel", scale=2.0),
    ]
    play(service_plan(*engines), ring_fd, story)


def test_unknown_engines_are_left_out_and_an_unknown_service_is_told(tmp_path: Path, ring_fd: int) -> None:
    async def story(stage: Stage) -> None:
        stage.serving.consult("wrist", ("nobody",))
        with pytest.raises(UnknownModel):
            stage.serving.consult("ankle", ("wrist-accel",))
        await stage.ask(window())
        assert stage.ring.read()["outcome"].tolist() == [Outcome.OK]

    play(three(tmp_path), ring_fd, story)


def test_no_more_is_asked_than_can_be_afforded(tmp_path: Path) -> None:
    plan = three(tmp_path)
    lineup, _ = load_lineup(plan)
    shadow = Shadow(Service(0, plan, lineup))
    assert not shadow.admit(0, 1)  # there is nobody to ask
    shadow.seats = lineup.seats[1:]
    assert not shadow.admit(0, 65)  # more rows than leave a record
    assert shadow.admit(0, 10)
    assert not shadow.admit(60_000_000, 1)  # one set at a time
    shadow.record(_question(), [], _Nothing())  # type: ignore[arg-type]
    assert not shadow.admit(49_000_000, 1)  # ten rows are 50 ms of what 200 rows a second allow
    assert shadow.admit(51_000_000, 1)


def _question() -> Any:
    from agent.shadow import Question

    return Question(0, 0.0, {}, 1, 0)


class _Nothing:
    """A ring nobody writes to."""
