"""Streams over HTTP, in this process and without sockets: what is taken, what is told, in which order."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent import clock
from agent.contract.errors import ContractError, DeadlineExceeded, EngineFailed, Overloaded, ServingError
from agent.contract.plan import GapPolicy, WindowPlan
from agent.contract.tensors import HEADER_LENGTH, read_tensors
from agent.frontend import streams as frontend_streams
from agent.frontend.openinference import OpenInference
from agent.frontend.server import HttpRequest, HttpResponse
from agent.frontend.streams import KEPT_LAST, MAX_WAITING, RUNS_PER_TURN
from agent.lineup import load_lineup
from agent.observation import RingReader, RingWriter, create_ring
from agent.serving import Answer, Done, Request, Service, Serving
from tests.models import CHANNELS, LENGTH, engine_plan, expected_probability, floor_plan, service_plan

HOP = 4
WINDOW = WindowPlan("window", LENGTH, HOP, 10.0, GapPolicy.HOLD, max_gap_s=2.0, max_streams=4)
Array = np.ndarray[Any, np.dtype[Any]]
SAMPLES: Array = np.random.default_rng(3).normal(size=(8000, CHANNELS)).astype(np.float32)


class Stage:
    """A handler with its serving and its ring."""

    def __init__(self, folder: Path, *, inline_us: float = 1e9, **changes: Any) -> None:
        changes = {"window": WINDOW} | changes
        plans = [
            service_plan(engine_plan(folder, "wrist", version=3, trouble="raise"), floor_plan(), **changes),
            service_plan(engine_plan(folder, "plain"), service="plain"),
        ]
        self.ring_fd = create_ring()
        self.reader, writer = RingReader(self.ring_fd), RingWriter(self.ring_fd)
        services = [Service(index, plan, load_lineup(plan)[0]) for index, plan in enumerate(plans)]
        self.serving = Serving(services, writer, stuck_after_s=5, on_unstoppable=lambda: None, inline_us=inline_us)
        self.handler = OpenInference(self.serving)

    def close(self) -> None:
        self.serving.close()
        self.reader.close()
        os.close(self.ring_fd)

    def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> list[HttpResponse]:
        told: list[HttpResponse] = []
        given = {name.replace("_", "-").lower(): value for name, value in headers.items()}
        self.handler.handle(HttpRequest(method, path, given, body, clock.monotonic_ns()), told.append)
        return told

    def post(self, samples: Array, name: str = "s", model: str = "wrist", **parameters: Any) -> list[HttpResponse]:
        item = {
            "name": "window", "datatype": "FP32", "shape": list(samples.shape),
            "parameters": {"binary_data_size": samples.nbytes},
        }  # fmt: skip
        head = json.dumps({"inputs": [item], "parameters": {"binary_data_output": True} | parameters}).encode()
        body = head + samples.tobytes()
        headers = {HEADER_LENGTH.replace("-", "_"): str(len(head))}
        return self.ask("POST", f"/v2/models/{model}/streams/{name}", body, **headers)

    def send(self, samples: Array, name: str = "s", **parameters: Any) -> tuple[dict[str, Any], Array]:
        """Parameters and probabilities of a request that must be answered at once."""
        [response] = self.post(samples, name, **parameters)
        return told(response), probability(response)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    opened = Stage(tmp_path)
    yield opened
    opened.close()


def document(response: HttpResponse) -> dict[str, Any]:
    raw = b"".join(response.parts)
    parsed: dict[str, Any] = json.loads(raw[: response.json_bytes or len(raw)])
    return parsed


def told(response: HttpResponse) -> dict[str, Any]:
    assert response.status == 200, document(response)
    parameters: dict[str, Any] = document(response)["parameters"]
    return parameters


def probability(response: HttpResponse) -> Array:
    [tensor] = read_tensors(document(response)["outputs"], b"".join(response.parts)[response.json_bytes :])
    return tensor.array


def windows(samples: Array) -> Array:
    return np.array([samples[at : at + LENGTH] for at in range(0, len(samples) - LENGTH + 1, HOP)])


def refusing(monkeypatch: pytest.MonkeyPatch, stage: Stage, error: ServingError) -> None:
    """Let serving answer with an error, until the test undoes it."""
    monkeypatch.setattr(stage.serving, "submit", lambda _request, done: done(error))


# --- answers -------------------------------------------------------------------------------------------------
def test_samples_become_the_outputs_of_their_windows(stage: Stage) -> None:
    parameters, rows = stage.send(SAMPLES[:10], ew_sequence=0)
    assert rows.shape == (0, 4)
    assert parameters == {"ew_windows": 0, "ew_sequence": 10, "ew_stream_reset": "started"}
    parameters, rows = stage.send(SAMPLES[10:30], ew_sequence=10)
    np.testing.assert_allclose(rows, expected_probability(windows(SAMPLES[:30])), atol=1e-6)
    assert {name: parameters[name] for name in ("ew_windows", "ew_first_window", "ew_sequence", "ew_served_by")} == {
        "ew_windows": 4, "ew_first_window": 0, "ew_sequence": 30, "ew_served_by": "wrist",
    }  # fmt: skip
    assert (parameters["ew_reason"], "ew_stream_reset" in parameters, "ew_gap" in parameters) == (
        "active",
        False,
        False,
    )
    parameters, rows = stage.send(SAMPLES[30:33], ew_sequence=30)
    assert (len(rows), parameters["ew_first_window"]) == (1, 4)


def test_json_is_spoken_too(stage: Stage) -> None:
    item = {"name": "window", "datatype": "FP32", "shape": [17, 3], "data": SAMPLES[:17].ravel().tolist()}
    body = json.dumps({"inputs": [item], "id": "seven"}).encode()
    [response] = stage.ask("POST", "/v2/models/wrist/versions/3/streams/s", body)
    answer = document(response)
    assert (answer["id"], answer["model_version"], answer["outputs"][0]["shape"]) == ("seven", "3", [1, 4])
    np.testing.assert_allclose(
        answer["outputs"][0]["data"], expected_probability(windows(SAMPLES[:17]))[0], atol=1e-6
    )


def test_each_window_leaves_an_observation_with_the_time_of_its_last_sample(stage: Stage) -> None:
    stage.send(SAMPLES[:16], ew_time_s=100.0)
    for first in (16, 20, 24):
        stage.send(SAMPLES[first : first + 4])
    records = stage.reader.read()
    assert records["data_time_s"].tolist() == pytest.approx([101.5, 101.9, 102.3, 102.7])
    assert len(stage.send(SAMPLES[28:44])[1]) == 4
    assert stage.reader.read()["data_time_s"].tolist() == pytest.approx([103.1, 103.5, 103.9, 104.3])


def test_many_windows_give_the_event_loop_its_turn(stage: Stage) -> None:
    count = 3 * RUNS_PER_TURN
    samples = SAMPLES[: (count - 1) * HOP + LENGTH]

    async def send() -> HttpResponse:
        replies = stage.post(samples)
        assert not replies  # its rest waits for a turn of its own
        [other] = stage.post(SAMPLES[:16], "other")
        assert len(probability(other)) == 1
        for _ in range(10):
            await asyncio.sleep(0)
        [response] = replies
        return response

    response = asyncio.run(send())
    np.testing.assert_allclose(probability(response), expected_probability(windows(samples)), atol=1e-6)


def test_windows_of_a_slow_model_run_on_its_thread_one_after_the_other(tmp_path: Path) -> None:
    async def send() -> list[list[HttpResponse]]:
        stage = Stage(tmp_path, inline_us=0.0)
        try:
            replies = [stage.post(SAMPLES[at : at + 30], ew_sequence=at) for at in range(0, 120, 30)]
            last = HttpRequest("DELETE", "/v2/models/wrist/streams/s", {}, b"", clock.monotonic_ns())
            done = asyncio.Event()
            stage.handler.handle(last, lambda _: done.set())  # in the same line: behind all the others
            await asyncio.wait_for(done.wait(), 60)
            return replies
        finally:
            stage.close()

    rows = np.concatenate([probability(reply[0]) for reply in asyncio.run(send())])
    np.testing.assert_allclose(rows, expected_probability(windows(SAMPLES[:120])), atol=1e-6)


def test_gaps_and_double_samples_are_told(stage: Stage) -> None:
    stage.send(SAMPLES[:10], ew_sequence=0)
    parameters, rows = stage.send(SAMPLES[14:20], ew_sequence=14)
    assert (parameters["ew_gap"], len(rows)) == ("hold:4", 2)
    parameters, rows = stage.send(SAMPLES[18:24], ew_sequence=18)
    assert (parameters["ew_dropped"], parameters["ew_sequence"]) == (2, 24)
    parameters, _ = stage.send(SAMPLES[100:110], ew_sequence=100)
    assert parameters["ew_stream_reset"] == "gap"


def test_a_stream_is_described_ended_and_then_unknown(stage: Stage) -> None:
    path = "/v2/models/wrist/streams/s"
    assert stage.ask("GET", path)[0].status == 404
    assert stage.ask("DELETE", path)[0].status == 404
    stage.send(SAMPLES[:19], ew_sequence=0)
    expected = {
        "model_name": "wrist", "stream": "s", "sequence": 19, "samples": 19, "windows": 1, "buffered": 15,
        "gaps": 0, "made_up": 0, "dropped": 0, "resets": 0,
    }  # fmt: skip
    assert document(stage.ask("GET", path)[0]) == expected
    assert document(stage.ask("DELETE", path)[0]) == expected
    assert stage.ask("GET", path)[0].status == 404
    stage.send(SAMPLES[:19], ew_end=True)
    assert stage.ask("GET", path)[0].status == 404
    assert stage.send(SAMPLES[:1])[0]["ew_stream_reset"] == "started"


def test_more_streams_than_allowed_make_the_oldest_give_way(stage: Stage) -> None:
    for number in range(1000):
        stage.send(SAMPLES[:3], f"s{number}", ew_sequence=0)
        assert stage.handler.streams.statistics()["streams"] <= WINDOW.max_streams
    assert stage.send(SAMPLES[3:6], "s995", ew_sequence=3)[0]["ew_stream_reset"] == "evicted"


# --- what cannot be answered ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "other"}, "a stream takes the one input 'window', given was 'other'"),
        ({"datatype": "FP64"}, "must be FP32 [samples, 3], FP64 [1, 3] was given"),
        ({"shape": [1, 1, 3]}, "FP32 [1, 1, 3] was given"),
        ({"shape": []}, "FP32 [] was given"),
        ({"shape": [3]}, "FP32 [3] was given"),
        ({"data": [1.0]}, "needs 3 values, 1 were sent"),
    ],
)
def test_samples_that_do_not_fit_are_refused(stage: Stage, change: dict[str, Any], words: str) -> None:
    item = {"name": "window", "datatype": "FP32", "shape": [1, 3], "data": [0.0] * 3} | change
    [response] = stage.ask("POST", "/v2/models/wrist/streams/s", json.dumps({"inputs": [item]}).encode())
    assert (response.status, words in document(response)["error"]) == (400, True)
    assert stage.ask("GET", "/v2/models/wrist/streams/s")[0].status == 404


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"ew_sequence": -1}, "ew_sequence must be a whole number"),
        ({"ew_sequence": 1.0}, "ew_sequence must be a whole number"),
        ({"ew_sequence": True}, "ew_sequence must be a whole number"),
        ({"ew_sequence": 2**60}, "ew_sequence must be a whole number"),
        ({"ew_time_s": "now"}, "ew_time_s must be a number"),
        ({"ew_end": 1}, "ew_end must be true or false"),
        ({"ew_deadline_ms": -5}, "ew_deadline_ms must be above 0"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(stage: Stage, parameters: dict[str, Any], words: str) -> None:
    [response] = stage.post(SAMPLES[:16], **parameters)
    assert (response.status, words in document(response)["error"]) == (400, True)
    assert stage.send(SAMPLES[:16])[0]["ew_stream_reset"] == "started"  # nothing was taken


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("POST", "/v2/models/plain/streams/s", 400, "'plain' takes no streams"),
        ("GET", "/v2/models/plain/streams/s", 400, "'plain' takes no streams"),
        ("POST", "/v2/models/none/streams/s", 404, "there is no model 'none'"),
        ("POST", "/v2/models/wrist/versions/9/streams/s", 404, "has no version 9"),
        ("POST", "/v2/models/wrist/streams/a%20b", 400, "cannot be a stream's name"),
        ("POST", f"/v2/models/wrist/streams/{'a' * 65}", 400, "cannot be a stream's name"),
        ("PUT", "/v2/models/wrist/streams/s", 405, "use POST, GET or DELETE"),
        ("POST", "/v2/models/wrist/streams", 404, "a model has no 'streams'"),
        ("POST", "/v2/models/wrist/streams/s", 400, "the request's JSON cannot be read"),
    ],
)
def test_paths_that_lead_nowhere_say_so(stage: Stage, method: str, path: str, status: int, words: str) -> None:
    [response] = stage.ask(method, path, b"no JSON")
    assert (response.status, words in document(response)["error"]) == (status, True)


def test_no_sample_and_several_tensors_are_refused_and_an_empty_one_is_not(stage: Stage) -> None:
    item = {"name": "window", "datatype": "FP32", "shape": [0, 3], "data": []}
    for inputs, status in (([], 400), ([item, item], 400), ([item], 200)):
        [response] = stage.ask("POST", "/v2/models/wrist/streams/s", json.dumps({"inputs": inputs}).encode())
        assert response.status == status


def test_a_request_without_samples_may_be_counted_too_and_end_its_stream(stage: Stage) -> None:
    stage.send(SAMPLES[:16], ew_sequence=0)
    parameters, rows = stage.send(SAMPLES[:0], ew_sequence=16, ew_end=True)
    assert (parameters["ew_windows"], len(rows)) == (0, 0)
    assert stage.ask("GET", "/v2/models/wrist/streams/s")[0].status == 404


def test_a_request_beyond_the_limit_is_413_before_its_data_are_looked_at(stage: Stage) -> None:
    item = {"name": "window", "datatype": "FP32", "shape": [1024 * HOP + 1, 3], "data": ["no number"]}
    [response] = stage.ask("POST", "/v2/models/wrist/streams/s", json.dumps({"inputs": [item]}).encode())
    assert (response.status, "at most 4096 samples" in document(response)["error"]) == (413, True)


# --- errors and repetition -----------------------------------------------------------------------------------
def test_samples_refused_for_lack_of_room_can_be_sent_again(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.send(SAMPLES[:16], ew_sequence=0)
    with monkeypatch.context() as patch:
        refusing(patch, stage, Overloaded("full", retry_after_s=7))
        [response] = stage.post(SAMPLES[16:24], ew_sequence=16)
        assert (response.status, response.headers["Retry-After"]) == (503, "7")
    parameters, rows = stage.send(SAMPLES[16:24], ew_sequence=16)
    assert (parameters["ew_first_window"], "ew_dropped" in parameters) == (1, False)
    np.testing.assert_allclose(rows, expected_probability(windows(SAMPLES[:24]))[1:], atol=1e-6)


@pytest.mark.parametrize("error", [EngineFailed("broken"), DeadlineExceeded("late")])
def test_windows_without_an_answer_do_not_stop_the_stream(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, error: ServingError
) -> None:
    stage.send(SAMPLES[:16], ew_sequence=0)
    with monkeypatch.context() as patch:
        refusing(patch, stage, error)
        assert stage.post(SAMPLES[16:20], ew_sequence=16)[0].status in (500, 504)
    parameters, rows = stage.send(SAMPLES[20:24], ew_sequence=20)
    assert parameters["ew_first_window"] == 2
    np.testing.assert_allclose(rows, expected_probability(windows(SAMPLES[:24]))[2:], atol=1e-6)


def test_the_guard_judges_windows_and_the_stream_recovers(stage: Stage) -> None:
    bad = SAMPLES[:16].copy()
    bad[15] = np.nan
    [response] = stage.post(bad, ew_sequence=0)
    assert (response.status, "NaN or infinity" in document(response)["error"]) == (400, True)
    statuses = [stage.post(SAMPLES[at : at + 4], ew_sequence=at)[0].status for at in range(16, 36, 4)]
    assert statuses == [400, 400, 400, 200, 200]  # until the sample has left the window


def test_the_next_engine_answers_a_window_and_the_others_are_not_touched(stage: Stage) -> None:
    told_of = SAMPLES[:24].copy()
    told_of[4] = 200.0  # first in the second window: the graph raises
    for at, engine in ((0, "wrist"), (16, "wrist-floor"), (20, "wrist")):
        count = 16 if at == 0 else 4
        parameters, _ = stage.send(told_of[at : at + count], ew_sequence=at)
        assert parameters["ew_served_by"] == engine


def test_a_request_sent_again_gets_the_answer_its_sender_missed(stage: Stage) -> None:
    first = stage.post(SAMPLES[:20], ew_sequence=0)
    again = stage.post(SAMPLES[:20], ew_sequence=0)
    assert again == first
    assert stage.serving.service("wrist").counters.requests == 2  # the windows of one of them
    [other] = stage.post(SAMPLES[1:21], ew_sequence=0)  # other samples: a sender that began anew
    assert told(other)["ew_stream_reset"] == "restarted"
    parameters, rows = stage.send(SAMPLES[4:20], ew_sequence=4)
    assert (parameters["ew_dropped"], len(rows)) == (16, 0)


def test_an_end_behind_the_same_samples_is_no_request_sent_again(stage: Stage) -> None:
    stage.post(SAMPLES[:20], ew_sequence=0)
    nothing = stage.post(SAMPLES[:0], ew_sequence=20)
    ended = stage.post(SAMPLES[:0], ew_sequence=20, ew_end=True)
    assert told(ended[0])["ew_windows"] == told(nothing[0])["ew_windows"] == 0
    assert stage.ask("GET", "/v2/models/wrist/streams/s")[0].status == 404


def test_no_answer_holds_the_id_of_another_request(stage: Stage) -> None:
    item = {"name": "window", "datatype": "FP32", "shape": [20, 3], "data": SAMPLES[:20].ravel().tolist()}
    answers = [
        stage.ask(
            "POST", "/v2/models/wrist/streams/s",
            json.dumps({"id": name, "inputs": [item], "parameters": {"ew_sequence": 0}}).encode(),
        )
        for name in ("one", "one", "two")
    ]  # fmt: skip
    assert [document(response)["id"] for [response] in answers] == ["one", "one", "two"]
    assert answers[0] == answers[1]


def test_the_last_request_of_a_stream_sent_again_gets_its_answer_too(stage: Stage) -> None:
    stage.send(SAMPLES[:10], ew_sequence=0)
    last = stage.post(SAMPLES[10:20], ew_sequence=10, ew_end=True)
    assert len(probability(last[0])) == 2
    assert stage.post(SAMPLES[10:20], ew_sequence=10, ew_end=True) == last
    assert stage.ask("GET", "/v2/models/wrist/streams/s")[0].status == 404
    assert stage.send(SAMPLES[:10], ew_sequence=0)[0]["ew_stream_reset"] == "started"
    assert stage.send(SAMPLES[10:20], ew_sequence=10)[0]["ew_windows"] == 2
    for number in range(KEPT_LAST + 5):
        stage.send(SAMPLES[:1], f"s{number}", ew_sequence=1, ew_end=True)
    assert len(stage.handler.streams._last) == KEPT_LAST


def test_an_answer_too_large_to_be_remembered_is_not(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.post(SAMPLES[:4], ew_sequence=0)
    monkeypatch.setattr(frontend_streams, "MAX_NOTE_BYTES", 300)
    stage.post(SAMPLES[4:40], ew_sequence=4)
    assert stage.send(SAMPLES[4:40], ew_sequence=4)[0]["ew_dropped"] == 36


# --- order ---------------------------------------------------------------------------------------------------
class Later:
    """Serving that answers when told to."""

    def __init__(self, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
        self.real = stage.serving.submit
        self.waiting: list[tuple[Any, Any]] = []
        monkeypatch.setattr(stage.serving, "submit", lambda request, done: self.waiting.append((request, done)))

    def answer(self) -> None:
        self.real(*self.waiting.pop(0))


def test_requests_of_one_stream_are_answered_in_their_order(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    later = Later(stage, monkeypatch)
    first, second = stage.post(SAMPLES[:16], ew_sequence=0), stage.post(SAMPLES[16:20], ew_sequence=16)
    other = stage.post(SAMPLES[:16], "other", ew_sequence=0)
    assert len(later.waiting) == 2  # one of each stream
    later.answer()
    assert (len(first), len(second), len(other), len(later.waiting)) == (1, 0, 0, 2)
    later.answer()
    later.answer()
    assert told(second[0])["ew_first_window"] == 1
    np.testing.assert_allclose(probability(second[0]), expected_probability(windows(SAMPLES[:20]))[1:], atol=1e-6)
    assert len(other) == 1


def test_the_line_of_a_stream_is_bounded(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    later = Later(stage, monkeypatch)
    replies = [stage.post(SAMPLES[:16], ew_sequence=0)]
    replies += [stage.post(SAMPLES[at : at + 4], ew_sequence=at) for at in range(16, 16 + 4 * MAX_WAITING, 4)]
    [refused] = stage.post(SAMPLES[:4], ew_sequence=99)
    assert (refused.status, "Retry-After" in refused.headers) == (503, True)
    [deleted] = [stage.ask("DELETE", "/v2/models/wrist/streams/s")]
    assert deleted[0].status == 503
    for _ in range(MAX_WAITING + 1):
        later.answer()
    assert [told(reply[0])["ew_first_window"] for reply in replies] == list(range(MAX_WAITING + 1))
    assert not later.waiting


def test_a_stream_with_a_request_under_way_never_gives_way_and_cannot_be_moved(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = Later(stage, monkeypatch)
    busy = [stage.post(SAMPLES[:16], f"s{number}", ew_sequence=0) for number in range(WINDOW.max_streams)]
    [refused] = stage.post(SAMPLES[:3], "more", ew_sequence=0)
    assert (refused.status, "streams are busy" in document(refused)["error"]) == (503, True)
    assert list(stage.handler.streams.movable()) == []
    with pytest.raises(KeyError):
        stage.handler.streams.surrender("wrist", "s0")
    assert not stage.handler.streams.adopt("wrist", "s0", b"")
    for _ in busy:
        later.answer()
    assert [told(reply[0])["ew_windows"] for reply in busy] == [1] * WINDOW.max_streams


def test_a_bug_does_not_keep_a_stream_busy(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(_request: object, _done: object) -> None:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(stage.serving, "submit", bug)
        with pytest.raises(RuntimeError, match="a bug"):
            stage.post(SAMPLES[:16], ew_sequence=0)
    assert stage.send(SAMPLES[:16], ew_sequence=0)[0]["ew_windows"] == 1


# --- moving --------------------------------------------------------------------------------------------------
def test_streams_move_to_another_worker(stage: Stage, tmp_path: Path) -> None:
    stage.send(SAMPLES[:19], "a", ew_sequence=0)
    stage.send(SAMPLES[:5], "b", ew_sequence=0)
    stage.send(SAMPLES[:5], "c", ew_sequence=0)
    old, other = stage.handler.streams, Stage(tmp_path / "other")
    try:
        new = other.handler.streams
        assert list(old.movable()) == [("wrist", "a"), ("wrist", "b"), ("wrist", "c")]
        assert new.adopt("wrist", "a", old.surrender("wrist", "a"))
        with pytest.raises(ContractError):
            new.adopt("wrist", "b", old.surrender("wrist", "b")[:-1])
        old.surrender("wrist", "c")
        new.lose("wrist", "c")
        assert not new.adopt("plain", "a", b"")
        assert not new.adopt("nosuch", "a", b"")
        assert list(old.movable()) == []
        parameters, rows = other.send(SAMPLES[19:24], "a", ew_sequence=19)
        np.testing.assert_allclose(rows, expected_probability(windows(SAMPLES[:24]))[1:], atol=1e-6)
        assert (parameters["ew_first_window"], "ew_stream_reset" in parameters) == (1, False)
        for name in ("b", "c"):
            assert other.send(SAMPLES[5:9], name)[0]["ew_stream_reset"] == "moved"
    finally:
        other.close()


def test_an_engine_may_use_the_memory_of_its_outputs_again(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = np.zeros((1, 4), np.float32)
    submit = stage.serving.submit

    def one_memory(request: Request, done: Done) -> None:
        def copied(result: Answer | ServingError) -> None:
            assert isinstance(result, Answer)
            memory[:] = result.outputs[0].array
            done(replace(result, outputs=(replace(result.outputs[0], array=memory),)))

        submit(request, copied)

    monkeypatch.setattr(stage.serving, "submit", one_memory)
    _, rows = stage.send(SAMPLES[:28])
    np.testing.assert_allclose(rows, expected_probability(windows(SAMPLES[:28])), atol=1e-6)


def test_outputs_without_an_axis_of_rows_get_one(stage: Stage) -> None:
    service = stage.serving.service("wrist")
    [plan] = service.signature.outputs
    service.signature = replace(service.signature, outputs=(replace(plan, shape=(4,)),))
    assert stage.send(SAMPLES[:4])[1].shape == (0, 4)
    assert stage.send(SAMPLES[4:24])[1].shape == (3, 1, 4)  # this graph has rows all the same
