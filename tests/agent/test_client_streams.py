"""The client's side of streams: against a real worker, over a connection that drops when told to."""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pytest

from agent.client import Answer, Client
from agent.client.aio import AsyncClient
from agent.client.sender import Sender
from agent.client.wire import Address, Wire
from agent.contract.errors import Disconnected, InvalidRequest, Overloaded, UnknownModel
from agent.contract.plan import WindowPlan, WorkerPlan
from tests.models import CHANNELS, LENGTH, engine_plan, expected_probability, service_plan, worker_plan
from tests.processes import WAIT_S, RunningWorker, Sockets

HOP = 4
SAMPLES = np.random.default_rng(5).normal(size=(400, CHANNELS)).astype(np.float32)


def plan_of(folder: Path) -> WorkerPlan:
    return worker_plan(service_plan(engine_plan(folder, "wrist"), window=WindowPlan("window", LENGTH, HOP, 10.0)))


def expected(count: int) -> Any:
    ends = range(0, count - LENGTH + 1, HOP)
    return expected_probability(np.array([SAMPLES[at : at + LENGTH] for at in ends]))


class Proxy:
    """Passes bytes on to `target`; swallows what comes back, and hangs up, so many times."""

    def __init__(self, path: Path, target: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(8)
        self._target = target
        self._stop, self._stopped = socket.socketpair()
        self.address = f"unix:{path}"
        self.swallow = 0
        self.refuse = False
        self._thread = threading.Thread(target=self._run, name="proxy")
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.close()
        self._thread.join(WAIT_S)
        self._stopped.close()
        self._listener.close()

    def _run(self) -> None:
        while self._stopped not in (ready := select.select([self._listener, self._stopped], [], [])[0]):
            assert ready
            near, _ = self._listener.accept()
            if self.refuse:
                near.close()
                continue
            with near, socket.socket(socket.AF_UNIX) as far, contextlib.suppress(ConnectionError):
                far.connect(str(self._target))
                self._pass(near, far)

    def _pass(self, near: socket.socket, far: socket.socket) -> None:
        while True:
            for source in select.select([near, far, self._stopped], [], [])[0]:
                data = b"" if source is self._stopped else source.recv(1 << 20)
                if source is far and self.swallow:
                    self.swallow -= 1
                    return
                if not data:
                    return
                (far if source is near else near).sendall(data)


class Sending:
    """A stream of either client, called the same way."""

    def __init__(self, kind: str, address: str, name: str, **options: Any) -> None:
        self._runner = asyncio.Runner() if kind == "asyncio" else None
        self._address = address
        self._client: Any = Client(address) if self._runner is None else self._runner.run(self._open())
        self.stream = self._client.stream("wrist", name, **options)

    async def _open(self) -> AsyncClient:
        return AsyncClient(self._address)

    def call(self, name: str, *given: Any, **options: Any) -> Any:
        made = getattr(self.stream, name)(*given, **options)
        return made if self._runner is None else self._runner.run(made)

    def send(self, samples: Any, **options: Any) -> Answer:
        answer: Answer = self.call("send", samples, **options)
        return answer

    def close(self) -> None:
        if self._runner is None:
            self._client.close()
        else:
            self._runner.run(self._client.close())
            self._runner.close()


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    folder = tmp_path_factory.mktemp("streams")
    with (
        Sockets(folder) as sockets,
        RunningWorker(sockets, plan_of(folder)).serve(),
        Proxy(folder / "proxy.sock", sockets.path) as proxy,
    ):
        yield proxy


@pytest.fixture(params=["blocking", "asyncio"])
def sending(request: pytest.FixtureRequest, stage: Proxy) -> Iterator[Sending]:
    opened = Sending(request.param, stage.address, request.node.name.translate(str.maketrans("[]", "--"))[:64])
    yield opened
    stage.swallow, stage.refuse = 0, False
    opened.close()


@pytest.mark.system
def test_a_stream_gives_the_outputs_of_its_windows(sending: Sending) -> None:
    rows = [sending.send(SAMPLES[at : at + 10], time_s=at / 10).outputs["probability"] for at in range(0, 100, 10)]
    np.testing.assert_allclose(np.concatenate(rows), expected(100), atol=1e-6)
    assert (sending.stream.sequence, sending.stream.pending, sending.stream.lost) == (100, 0, 0)
    told = sending.call("describe")
    assert (told["samples"], told["windows"], told["made_up"], told["dropped"]) == (100, 22, 0, 0)


@pytest.mark.system
def test_an_answer_that_was_missed_is_told_again(sending: Sending, stage: Proxy) -> None:
    rows = []
    for at in range(0, 96, 8):
        stage.swallow = at % 3 == 0  # the server has taken the samples; its answer gets lost
        rows.append(sending.send(SAMPLES[at : at + 8]).outputs["probability"])
    np.testing.assert_allclose(np.concatenate(rows), expected(96), atol=1e-6)
    told = sending.call("describe")
    assert (told["samples"], told["dropped"], told["resets"]) == (96, 0, 0)


@pytest.mark.system
def test_what_could_not_be_delivered_comes_with_the_next_samples(sending: Sending, stage: Proxy) -> None:
    first = sending.send(SAMPLES[:24])
    stage.refuse, stage.swallow = True, 1
    for at in (24, 32):
        with pytest.raises(Disconnected):
            sending.send(SAMPLES[at : at + 8])
    assert sending.stream.pending == 16
    stage.refuse = False
    answer = sending.send(SAMPLES[40:48])
    rows = np.concatenate([first.outputs["probability"], answer.outputs["probability"]])
    np.testing.assert_allclose(rows, expected(48), atol=1e-6)
    assert (answer.parameters["ew_windows"], answer.parameters["ew_first_window"]) == (6, 3)
    assert (answer.parameters["ew_sequence"], answer.served_by, sending.stream.pending) == (48, "wrist", 0)


@pytest.mark.system
def test_samples_the_guard_refuses_are_not_sent_again(sending: Sending) -> None:
    with pytest.raises(InvalidRequest, match="NaN or infinity"):
        sending.send(np.full((16, CHANNELS), np.nan, np.float32))
    assert sending.stream.pending == 0
    for _ in range(3):
        with pytest.raises(InvalidRequest):
            sending.send(SAMPLES[:4])
    assert sending.send(SAMPLES[:4]).parameters["ew_first_window"] == 4


@pytest.mark.system
def test_an_ended_stream_begins_anew(sending: Sending) -> None:
    sending.send(SAMPLES[:20], end=True)
    with pytest.raises(UnknownModel):
        sending.call("describe")
    assert sending.send(SAMPLES[:20]).parameters["ew_stream_reset"] == "started"
    sending.call("end")
    sending.call("end")
    assert sending.stream.sequence == 0


@pytest.mark.system
def test_a_new_client_of_a_stream_begins_it_anew(sending: Sending, stage: Proxy) -> None:
    sending.send(SAMPLES[:20])
    sending._client.close() if sending._runner is None else sending._runner.run(sending._client.close())
    with Client(stage.address) as client:
        stream = client.stream("wrist", sending.stream._sender._path.rpartition("/")[2])
        assert stream.send(SAMPLES[:19]).parameters["ew_stream_reset"] == "restarted"


@pytest.mark.system
def test_a_stream_goes_on_after_its_worker_was_killed(tmp_path: Path) -> None:
    with Sockets(tmp_path) as sockets, Client(sockets.unix_address) as client:
        stream = client.stream("wrist", "s")
        with RunningWorker(sockets, plan_of(tmp_path)).serve() as worker:
            stream.send(SAMPLES[:24])
            worker.kill()
        with RunningWorker(sockets, plan_of(tmp_path)).serve():
            answer = stream.send(SAMPLES[24:48])
            assert (answer.parameters["ew_stream_reset"], answer.parameters["ew_sequence"]) == ("moved", 48)
            assert len(answer.outputs["probability"]) == 3
            assert "ew_stream_reset" not in stream.send(SAMPLES[48:52]).parameters


# --- what is remembered, without a server --------------------------------------------------------------------
def sender(**options: Any) -> Sender:
    return Sender(Wire(Address.parse("/socket")), "wrist", "s", input="window", **options)


def answer(windows: int, first: int, **parameters: Any) -> Answer:
    told = {"ew_windows": windows, "ew_sequence": 7 * first, **parameters}
    told |= {"ew_first_window": first, "ew_served_by": f"e{first}"} if windows else {}
    return Answer("wrist", "1", "", {"p": np.arange(first, first + windows)[:, None]}, told)


def test_too_many_undelivered_samples_lose_the_oldest() -> None:
    remembers = sender(keep_samples=20)
    for _ in range(5):
        remembers.add(SAMPLES[:8], None, end=False)
    assert (remembers.pending, remembers.lost, remembers.sequence) == (16, 24, 40)
    call = remembers.next()
    assert call is not None
    assert b'"ew_sequence":24' in bytes(call.parts[0])


def test_the_callers_array_may_be_used_again() -> None:
    remembers, mine = sender(), SAMPLES[:8].copy()
    remembers.add(mine, 1.5, end=True)
    mine[:] = 0.0
    call = remembers.next()
    assert call is not None
    assert SAMPLES[:8].tobytes() in b"".join(map(bytes, call.parts))
    assert b'"ew_time_s":1.5,"ew_end":true' in bytes(call.parts[0])


def test_samples_behind_an_undelivered_end_belong_to_the_next_stream() -> None:
    remembers = sender()
    remembers.add(SAMPLES[:8], None, end=True)
    remembers.add(SAMPLES[:4], None, end=False)
    heads = []
    for _ in range(2):
        call = remembers.next()
        assert call is not None
        heads.append(bytes(call.parts[0]))
        remembers.delivered(answer(0, 0))
    assert b'"ew_sequence":0,"ew_end":true' in heads[0]
    assert b'"ew_sequence":0}' in heads[1]
    assert remembers.sequence == 4


def test_answers_to_several_pieces_become_one() -> None:
    remembers = sender()
    pieces = [answer(0, 3, ew_stream_reset="moved"), answer(2, 3, ew_gap="hold:2"), answer(0, 5, ew_dropped=4)]
    for one in pieces:
        remembers.add(SAMPLES[:8], None, end=False)
        remembers.delivered(one)
    joined = remembers.collect()
    assert joined.outputs["p"].tolist() == [[3], [4]]
    assert joined.parameters == {
        "ew_windows": 2, "ew_first_window": 3, "ew_sequence": 35, "ew_served_by": "e3",
        "ew_stream_reset": "moved", "ew_gap": "hold:2", "ew_dropped": 4,
    }  # fmt: skip


def test_a_refusal_for_lack_of_room_keeps_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = [Overloaded("full"), answer(0, 0), answer(1, 0)]

    def do(_call: Any) -> Any:
        if isinstance(one := told.pop(0), Exception):
            raise one
        return one

    with Client("/socket") as client:
        monkeypatch.setattr(client, "_do", do)
        stream = client.stream("wrist", "s", input="window")
        with pytest.raises(Overloaded):
            stream.send(SAMPLES[:8])
        assert stream.pending == 8
        assert stream.send(SAMPLES[8:16]).outputs["p"].tolist() == [[0]]


@pytest.mark.parametrize("name", ["", "a b", "a/b", "ä", "a" * 65])
def test_a_name_that_cannot_be_a_streams_is_refused(name: str) -> None:
    with Client("/socket") as client, pytest.raises(InvalidRequest, match="cannot be a stream's name"):
        client.stream("wrist", name)
