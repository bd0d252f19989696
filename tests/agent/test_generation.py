"""The agent's side of real worker processes."""

import asyncio
import contextlib
import os
import resource
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agent.client import Client
from agent.contract.plan import FromWorker, Ready, ServicePlan, WindowPlan
from agent.generation import Patience, Phase
from agent.generations import Generations
from agent.intake import Intake
from tests.models import CHANNELS, LENGTH, engine_plan, expected_probability, floor_plan, service_plan, window

pytestmark = pytest.mark.system
HOP = 4
MANY = 1000  # streams
PATIENCE = Patience(ping_s=0.05, missed_pings=1000, drain_s=60.0)  # a busy machine is no hung worker


class Stage:
    """A listening socket, an intake and the generations on them; notes what is heard."""

    def __init__(self, folder: Path, patience: Patience | None = None) -> None:
        self.path = folder / "serve.sock"
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.path))
        self.listener.listen(64)
        self.listener.settimeout(0.0)
        self.service: ServicePlan = service_plan(
            engine_plan(folder / "models", "wrist"),
            floor_plan(),
            window=WindowPlan("window", LENGTH, HOP, 10.0, max_streams=MANY),
        )
        self.intake = Intake([("wrist", "wrist-floor")])
        self.frames: list[tuple[int, FromWorker]] = []
        self.lost: list[tuple[int, str]] = []
        self.refused: list[int] = []
        self.admitted = True
        self.fits = True
        self.generations = Generations(
            [self.listener], self.intake, patience or PATIENCE, os.environ, first_number=1,
            on_frame=lambda number, frame: self.frames.append((number, frame)),
            on_lost=lambda number, reason: self.lost.append((number, reason)), admits=self._admits,
            fits_beside=lambda _bytes: self.fits,
        )  # fmt: skip

    def _admits(self, number: int, _ready: Ready) -> bool:
        if not self.admitted:
            self.refused.append(number)
        return self.admitted

    def start(self) -> int:
        return self.generations.start((self.service,), max_body_bytes=1 << 20, stuck_after_s=5.0)

    async def until(self, true: Callable[[], object]) -> None:
        async with asyncio.timeout(60):
            while not true():
                self.generations.tend()
                await asyncio.sleep(0.05)

    async def serving(self, number: int) -> None:
        current = self.generations
        await self.until(lambda: current.current and current.current.number == number)

    async def replaced_by(self, number: int) -> None:
        """That generation serves, and no other lives."""
        await self.serving(number)
        await self.until(lambda: len(self.generations._tasks) == 1)

    async def ask(self) -> str:
        def infer() -> str:
            with Client(f"unix:{self.path}", retry_once=True) as client:
                return client.infer("wrist", {"window": window()}).served_by

        return await asyncio.to_thread(infer)


def play(story: Callable[[Stage], Awaitable[None]], patience: Patience | None = None) -> None:
    async def run(folder: Path) -> None:
        stage = Stage(folder, patience)
        try:
            await story(stage)
        finally:
            await stage.generations.stop()
            stage.intake.close_all()
            stage.listener.close()

    with tempfile.TemporaryDirectory(prefix="ew-") as folder:
        asyncio.run(run(Path(folder)))


def test_a_new_generation_takes_over_and_the_old_one_drains() -> None:
    async def story(stage: Stage) -> None:
        stage.start()
        await stage.serving(1)
        assert await stage.ask() == "wrist"
        stage.generations.prefer("wrist", "wrist-floor", "a test")
        await stage.until(lambda: len(stage.frames) == 2)
        assert await stage.ask() == "wrist-floor"
        stage.start()
        await stage.serving(2)
        await stage.until(lambda: len(stage.generations._tasks) == 1)
        assert await stage.ask() == "wrist"
        assert stage.lost == []
        assert [type(frame) for _, frame in stage.frames if isinstance(frame, Ready)] == [Ready, Ready]
        await stage.until(lambda: stage.intake.statistics()["behind"] == 3)  # an answer is sent before it is noted
        assert len(stage.intake.read()[0]) == 3

    play(story)


def test_one_that_is_not_admitted_ends_and_the_present_one_stays() -> None:
    async def story(stage: Stage) -> None:
        stage.start()
        await stage.serving(1)
        stage.admitted = False
        stage.start()
        await stage.until(lambda: stage.refused == [2] and len(stage.generations._tasks) == 1)
        assert stage.generations.current is not None
        assert stage.generations.current.number == 1
        assert await stage.ask() == "wrist"
        assert stage.lost == []

    play(story)


def test_a_killed_worker_is_told_once_with_its_signal() -> None:
    async def story(stage: Stage) -> None:
        stage.start()
        await stage.serving(1)
        assert stage.generations.current is not None
        os.kill(stage.generations.current.pid, 9)
        await stage.until(lambda: stage.lost)
        assert stage.lost == [(1, "killed by signal 9 (SIGKILL)")]
        assert stage.generations.current is None

    play(story)


def test_one_that_does_not_start_in_time_is_killed() -> None:
    async def story(stage: Stage) -> None:
        stage.start()
        await stage.until(lambda: stage.lost)
        assert stage.lost == [(1, "did not start within 0 s")]

    play(story, replace(PATIENCE, start_s=0.0))


def test_a_plan_too_large_to_be_told_is_an_end_like_any_other() -> None:
    async def story(stage: Stage) -> None:
        huge = replace(floor_plan(), floor_outputs={"probability": [0.1] * 200_000})
        stage.generations.start((service_plan(huge),), max_body_bytes=1, stuck_after_s=5.0)
        await stage.until(lambda: stage.lost)
        assert "could not be started" in stage.lost[0][1]
        assert not stage.generations.is_starting
        stage.start()
        await stage.serving(2)

    play(story)


def test_without_a_free_descriptor_the_start_is_told_as_lost_and_the_next_one_works() -> None:
    async def story(stage: Stage) -> None:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (1, limits[1]))
        try:
            assert stage.start() == 1
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert stage.lost == []  # told later: not from inside the call that asked
        await stage.until(lambda: stage.lost)
        assert stage.lost == [(1, "could not be started: Too many open files")]
        assert not stage.generations.is_starting
        stage.start()
        await stage.serving(2)
        counted = stage.generations.statistics()
        assert (counted["started"], counted["lost"]) == (2, 1)

    play(story)


@pytest.mark.parametrize("pause_s", [0.0, 0.02])  # before and after the first is spawned
def test_a_later_start_replaces_one_that_is_still_coming(pause_s: float) -> None:
    async def story(stage: Stage) -> None:
        stage.start()
        await asyncio.sleep(pause_s)
        stage.start()
        await stage.serving(2)
        await stage.until(lambda: len(stage.generations._tasks) == 1)
        assert stage.lost == []
        assert stage.generations.current is not None
        assert stage.generations.current.phase is Phase.SERVING

    play(story)


# --- hand-over -----------------------------------------------------------------------------------------------
REQUEST = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"


@contextlib.asynccontextmanager
async def keep_alive(stage: Stage) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """One connection of a client that has been answered once."""
    reader, writer = await asyncio.open_unix_connection(str(stage.path))
    try:
        await exchange(reader, writer)
        yield reader, writer
    finally:
        writer.close()


async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, raw: bytes = REQUEST) -> None:
    writer.write(raw)
    await answer(reader)


async def answer(reader: asyncio.StreamReader) -> None:
    async with asyncio.timeout(60):
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        assert b"Connection: close" not in head
        await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))


def own_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("fits", [True, False])
def test_a_connection_lives_through_generations_and_no_descriptor_is_left_behind(*, fits: bool) -> None:
    async def story(stage: Stage) -> None:
        stage.fits = fits
        stage.start()
        await stage.serving(1)
        async with keep_alive(stage) as idle, keep_alive(stage) as half:
            half[1].write(REQUEST[:10])
            await half[1].drain()
            before = 0
            for number in (2, 3, 4, 5):
                stage.start()
                await stage.replaced_by(number)
                await stage.until(lambda: len(stage.generations._takings) == 1)
                stage.intake.read()
                stage.intake.read()  # the ring of the one that ended
                before = before or own_descriptors()
                assert own_descriptors() == before
                await exchange(*idle)
                await exchange(*half, REQUEST[10:] + REQUEST[:10])
            assert stage.lost == []
            counted = stage.generations.statistics()
            assert counted["connections_moved"] == 8
            assert counted["lean"] == (0 if fits else 4)

    play(story)


def test_what_was_left_waits_for_a_successor_when_the_first_one_dies() -> None:
    async def story(stage: Stage) -> None:
        stage.fits = False
        stage.start()
        await stage.serving(1)
        async with keep_alive(stage) as idle:
            stage.start()
            await stage.until(lambda: stage.generations.current is None)
            idle[1].write(REQUEST)  # to nobody
            incoming = stage.generations._incoming
            assert incoming is not None
            await stage.until(lambda: incoming.pid)
            os.kill(incoming.pid, 9)
            await stage.until(lambda: stage.lost)
            assert stage.lost == [(2, "killed by signal 9 (SIGKILL)")]
            stage.start()
            await stage.serving(3)
            await answer(idle[0])
            await exchange(*idle)

    play(story)


def test_without_memory_for_two_the_old_one_is_gone_before_the_next_begins() -> None:
    async def story(stage: Stage) -> None:
        stage.start()
        await stage.serving(1)
        stage.fits = False
        first = stage.generations.current
        assert first is not None
        stage.start()
        incoming = stage.generations._incoming
        assert incoming is not None
        asking = asyncio.ensure_future(stage.ask())  # answered by one of the two, whoever accepts it
        await stage.until(lambda: first.phase is Phase.ENDED or incoming.pid)
        assert first.phase is Phase.ENDED
        await stage.serving(2)
        assert await asking == "wrist"
        assert stage.lost == []

    play(story)


def test_one_that_gives_way_and_does_not_finish_is_no_loss() -> None:
    async def story(stage: Stage) -> None:
        stage.start()
        await stage.serving(1)
        stage.fits = False
        assert stage.generations.current is not None
        os.kill(stage.generations.current.pid, 19)  # hangs
        stage.start()
        await stage.serving(2)
        assert stage.lost == []

    play(story, replace(PATIENCE, drain_s=0.3))


def test_a_start_while_the_old_one_gives_way_waits_for_it_too() -> None:
    async def story(stage: Stage) -> None:
        stage.start()
        await stage.serving(1)
        stage.fits = False
        stage.start()
        stage.start()
        await stage.replaced_by(3)
        assert stage.lost == []
        assert stage.generations.statistics()["lean"] == 1

    play(story)


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("stays_connected", [True, False])
def test_a_stream_goes_on_in_the_next_generation_as_if_nothing_had_happened(
    *, fits: bool, stays_connected: bool
) -> None:
    async def story(stage: Stage) -> None:
        stage.fits = fits
        stage.start()
        await stage.serving(1)
        samples = np.random.default_rng(3).normal(size=(120, CHANNELS)).astype(np.float32)
        client = Client(f"unix:{stage.path}")
        stream = client.stream("wrist", "left")
        rows, resets = [], []
        for number, start in enumerate(range(0, 120, 30), 1):
            if number > 1:
                if not stays_connected:
                    client.close()
                stage.start()
                await stage.replaced_by(number)
            answer = await asyncio.to_thread(stream.send, samples[start : start + 30])
            rows.append(answer.outputs["probability"])
            resets.append(answer.parameters.get("ew_stream_reset", ""))
        client.close()
        assert resets == ["started", "", "", ""]
        windows = np.stack([samples[at : at + LENGTH] for at in range(0, 120 - LENGTH + 1, HOP)])
        np.testing.assert_allclose(np.concatenate(rows), expected_probability(windows), atol=1e-5)
        assert stage.generations.statistics()["streams_moved"] == 3

    play(story)


def test_many_streams_and_their_connection_move_though_nobody_takes_yet() -> None:
    async def story(stage: Stage) -> None:
        stage.fits = False
        stage.start()
        await stage.serving(1)
        samples = np.zeros((5, CHANNELS), np.float32)
        with Client(f"unix:{stage.path}") as client:
            streams = [client.stream("wrist", f"s{number}") for number in range(MANY)]

            def send() -> set[object]:
                return {one.send(samples).parameters.get("ew_stream_reset") for one in streams}

            assert await asyncio.to_thread(send) == {"started"}
            opened = client._socket
            stage.start()
            await stage.replaced_by(2)
            assert await asyncio.to_thread(send) == {None}
            assert client._socket is opened
        await stage.until(lambda: stage.generations.statistics()["streams_moved"] == MANY)
        assert stage.generations.statistics()["connections_moved"] == 1

    play(story)


def test_a_stream_whose_state_died_with_its_worker_says_so() -> None:
    async def story(stage: Stage) -> None:
        stage.start()
        await stage.serving(1)
        samples = np.zeros((20, CHANNELS), np.float32) + np.arange(20, dtype=np.float32)[:, None]
        with Client(f"unix:{stage.path}", retry_once=True) as client:
            stream = client.stream("wrist", "left")
            await asyncio.to_thread(stream.send, samples)
            assert stage.generations.current is not None
            os.kill(stage.generations.current.pid, 9)
            await stage.until(lambda: stage.lost)
            stage.start()
            await stage.serving(2)
            answer = await asyncio.to_thread(stream.send, samples)
            assert answer.parameters["ew_stream_reset"] == "moved"

    play(story)
