"""Streams over HTTP: raw samples in, the outputs of every window they completed out.

    POST   /v2/models/M/streams/S    an infer document whose one tensor holds samples, without the axis of rows
    GET    /v2/models/M/streams/S    how far the stream has come
    DELETE /v2/models/M/streams/S    forget it

Each window runs through `Serving.submit` on its own, like a request of one row: its guard, its observation and its
numbers do not depend on how samples were cut into requests (a batch may differ in the last bits, though it would
take half the time per window where many come at once). Requests of one stream are answered one after the other.
An error other than 503 and 429 means that the samples were taken, but some of their windows have no answer; those
two and errors of the request itself leave the stream as it was.
"""

from __future__ import annotations

import asyncio
import math
import re
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np

from agent.contract.errors import InvalidRequest, Overloaded, ServingError, UnknownModel
from agent.contract.plan import TensorPlan
from agent.contract.tensors import DATATYPES, Array, Tensor, datatype_of, read_tensors
from agent.frontend.documents import (
    InferDocument,
    binary_names,
    check_forms,
    deadline_ms,
    document_response,
    failure,
    number,
    read_document,
    tensors_response,
)
from agent.frontend.server import HttpRequest, HttpResponse, Reply, error_response
from agent.observation import PATCHED, source_of
from agent.serving import Answer, Request, Service, Serving
from agent.streams import Reset, Stream, Streams, compile_form

NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
MAX_WAITING = 8  # requests of one stream behind the one being answered
MAX_SEQUENCE = 2**52
RUNS_PER_TURN = 8  # on the event loop before others get their turn
MAX_NOTE_BYTES = 16 * 1024  # a larger answer is not remembered for a client that missed it
KEPT_LAST = 64  # answers to last requests of streams that ended, for whoever missed one
TOO_LARGE = 413

_Mark = tuple[int, int, int]
_Note = tuple[_Mark, HttpResponse]  # which request, and its answer


class StreamRoute:
    """The streams of all services of a worker. Owned by the event loop's thread."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._streams: dict[str, Streams] = {}
        self._lines: dict[str, dict[str, deque[_Job]]] = {}  # service, stream: who waits; present = busy
        self._last: OrderedDict[tuple[str, str], _Note] = OrderedDict()
        for name, service in serving.services.items():
            if service.plan.window is not None:
                tensor = next(one for one in service.signature.inputs if one.name == service.plan.window.input)
                self._streams[name] = Streams(compile_form(service.plan.window, tensor))
                self._lines[name] = {}

    def handle(self, http: HttpRequest, reply: Reply, service: Service, name: str) -> None:
        """Answer a request for the stream `name` of a service, at once or in its turn.

        Raises:
            InvalidRequest, UnknownModel, Overloaded: it cannot be answered; `reply` is not called.
        """
        streams = self._of(service)
        if not NAME.fullmatch(name):
            raise InvalidRequest(f"{name[:70]!r} cannot be a stream's name", hint="Use 1 to 64 of A-Z a-z 0-9 _ . -")
        busy = self._lines[service.plan.service].keys()
        match http.method:
            case "POST":
                self._queue(
                    service, name, _Feed(self._serving, service, streams, name, busy, self._last, http, reply)
                )
            case "DELETE":
                self._queue(service, name, _End(service, streams, name, reply))
            case "GET" | "HEAD":
                reply(document_response(_describe(service, name, streams.find(name))))
            case method:
                text = f"{method} is not possible here, use POST, GET or DELETE"
                reply(error_response(405, text, {"Allow": "POST, GET, HEAD, DELETE"}))

    # --- moving to another worker ---------------------------------------------------------------------------
    def movable(self) -> Iterator[tuple[str, str]]:
        """Service and name of each stream that has samples and no request under way."""
        for service, streams in self._streams.items():
            yield from ((service, name) for name in streams.names() if name not in self._lines[service])

    def surrender(self, service: str, name: str) -> bytes:
        """Give up a stream; its state, for `adopt` in another worker. Raises: KeyError: it is not `movable`."""
        if name in self._lines[service]:
            raise KeyError(name)
        state = self._streams[service].export(name)
        self._streams[service].end(name)
        return state

    def adopt(self, service: str, name: str, state: bytes) -> bool:
        """Go on with another worker's stream; False when it lives here already, or its service has no streams.

        Raises:
            ContractError: it cannot be read or has other windows; its next answer says "moved".
        """
        streams = self._streams.get(service)
        if streams is None or not NAME.fullmatch(name) or name in self._lines[service]:
            return False
        present = streams.find(name)
        if present is None:
            streams.lose(name)  # until it is adopted
        return streams.adopt(name, state, self._lines[service].keys())

    def lose(self, service: str, name: str) -> None:
        """A stream's state did not come along: its next answer says "moved"."""
        streams = self._streams.get(service)
        if streams is not None and streams.find(name) is None:
            streams.lose(name)

    def statistics(self) -> dict[str, float]:
        """Streams kept and totals, over all services."""
        every = [streams.statistics() for streams in self._streams.values()]
        return {name: float(sum(one[name] for one in every)) for name in every[0]} if every else {}

    # --- one at a time ---------------------------------------------------------------------------------------
    def _of(self, service: Service) -> Streams:
        streams = self._streams.get(service.plan.service)
        if streams is None:
            raise InvalidRequest(
                f"'{service.plan.service}' takes no streams: its artifact names no window that fits its input",
                hint="Send whole inputs to infer.",
            )
        return streams

    def _queue(self, service: Service, name: str, job: _Job) -> None:
        lines = self._lines[service.plan.service]
        job.leave = lambda: self._next(lines, name)
        line = lines.get(name)
        if line is None:
            lines[name] = deque()
            job.attempt(job.run)
        elif len(line) < MAX_WAITING:
            line.append(job)
        else:
            text = f"stream '{name}' has {len(line)} requests waiting"
            raise Overloaded(text, hint="Send the next one after an answer.")

    def _next(self, lines: dict[str, deque[_Job]], name: str) -> None:
        if lines[name]:
            job = lines[name].popleft()
            job.attempt(job.run)
        else:
            del lines[name]


class _Job:
    """One request in the line of its stream. `leave` is called once, when the next may begin."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._over = False
        self.leave: Callable[[], None] = lambda: None

    def run(self) -> None:
        """Begin. Raises: ServingError: it is answered with that."""
        raise NotImplementedError

    def attempt(self, step: Callable[[], None]) -> None:
        """Do a part of it; what fails is answered, and a bug does not keep the stream busy for ever."""
        try:
            step()
        except ServingError as error:
            self.close(failure(error))
        except BaseException:
            self._end()
            raise

    def close(self, response: HttpResponse) -> None:
        """Answer, and let the next one begin."""
        try:
            self._reply(response)
        finally:
            self._end()

    def _end(self) -> None:
        if not self._over:
            self._over = True
            self.leave()


class _End(_Job):
    """DELETE."""

    def __init__(self, service: Service, streams: Streams, name: str, reply: Reply) -> None:
        super().__init__(reply)
        self._service, self._streams, self._name = service, streams, name

    def run(self) -> None:
        document = _describe(self._service, self._name, self._streams.find(self._name))
        self._streams.end(self._name)
        self.close(document_response(document))


class _Feed(_Job):
    """POST: join samples to the stream, run the windows they completed, tell their outputs."""

    def __init__(
        self,
        serving: Serving,
        service: Service,
        streams: Streams,
        name: str,
        busy: Collection[str],
        last: OrderedDict[tuple[str, str], _Note],
        http: HttpRequest,
        reply: Reply,
    ) -> None:
        """Raises: InvalidRequest: the document is malformed or holds no samples of this stream."""
        super().__init__(reply)
        self._serving, self._service, self._streams, self._name, self._busy = serving, service, streams, name, busy
        self._last, self._key = last, (service.plan.service, name)
        length, document = read_document(http)
        self._document, self._arrival_ns, self._client = document, http.arrival_ns, http.client
        self._body = http.body
        self._binary = binary_names(document)
        check_forms(service.datatypes, [output.name for output in document.outputs], self._binary)
        self._samples = _read_samples(streams, document, memoryview(http.body)[length:])
        self._sequence = _sequence(document.parameters)
        self._time_s = number(document.parameters, "ew_time_s")
        self._deadline_ms = deadline_ms(document.parameters)
        self._ends = _flag(document.parameters, "ew_end")
        for output in document.outputs:
            if output.name not in service.datatypes:
                raise InvalidRequest(f"'{service.plan.service}' has no output '{output.name[:60]}'")
        self._results: list[Answer | ServingError] = []
        self._waits = False
        self._answers: list[Answer] = []
        self._at = 0  # windows that were run

    def run(self) -> None:
        self._mark = self._fingerprint()
        live = self._streams.find(self._name)
        note: _Note | None = self._last.get(self._key) if live is None else live.note
        if note is not None and note[0] == self._mark:
            self.close(note[1])  # sent again, because its answer was missed
            return
        self._stream = self._streams.open(self._name, self._busy)
        self._last.pop(self._key, None)
        time_s = math.nan if self._time_s is None else self._time_s
        self._taken = self._stream.take(self._samples, sequence=self._sequence, time_s=time_s)
        self._go_on()

    def _go_on(self) -> None:
        """Run windows until none is left, one has no answer, or its answer comes later."""
        runs = 0
        while self._at < len(self._taken.windows):
            if runs == RUNS_PER_TURN:
                asyncio.get_running_loop().call_soon(self.attempt, self._go_on)
                return
            runs += 1
            self._waits = False
            self._serving.submit(self._request(), self._done)
            if not self._results:
                self._waits = True
                return
            if not self._accept(self._results.pop()):
                return
        self._finish()

    def _done(self, result: Answer | ServingError) -> None:
        if not self._waits:
            self._results.append(result)  # at once: the loop that submitted goes on
        else:
            self.attempt(lambda: self._resume(result))

    def _resume(self, result: Answer | ServingError) -> None:
        if self._accept(result):
            self._go_on()

    def _request(self) -> Request:
        return Request(
            service=self._service.plan.service,
            inputs={self._streams.form.plan.input: self._taken.windows[self._at][None]},
            arrival_ns=self._arrival_ns,
            outputs=tuple(output.name for output in self._document.outputs),
            deadline_ms=self._deadline_ms,
            data_time_s=self._taken.time_s(self._at),
            client=self._client,
            source=self._source(),
        )

    def _source(self) -> int:
        """Which stream, and whether its time did not fit; samples missing by their count are another matter."""
        taken = self._taken
        counted = self._sequence is not None and self._sequence != self._stream.place.sequence
        odd = taken.made_up or taken.dropped or taken.reset in (Reset.GAP, Reset.CLOCK)
        return source_of(self._name) | (PATCHED if odd and not counted else 0)

    def _accept(self, result: Answer | ServingError) -> bool:
        """Put an answer to the others; False, and all is told, when it is none."""
        self._at += 1
        if isinstance(result, Answer):
            more = self._at < len(self._taken.windows)
            self._answers.append(_copied(result) if more else result)  # an engine may use its memory again
            return True
        if not isinstance(result, Overloaded):
            self._keep()
        self._tell(failure(result), remember=not isinstance(result, Overloaded))
        return False

    def _finish(self) -> None:
        outputs, parameters = self._outputs(), self._parameters()
        version = self._answers[-1].version if self._answers else self._service.version
        try:
            response = tensors_response(
                self._service.plan.service, version, self._document.id, parameters, outputs, self._binary
            )
        except InvalidRequest as error:  # an output that has no JSON form
            response = failure(error)
        self._keep()
        self._tell(response, remember=True)

    def _keep(self) -> None:
        self._streams.keep(self._stream, self._taken)
        if self._ends:
            self._streams.end(self._name)

    def _tell(self, response: HttpResponse, *, remember: bool) -> None:
        small = sum(map(len, response.parts)) <= MAX_NOTE_BYTES
        note = (self._mark, response) if remember and small and self._mark is not None else None
        self._stream.note = note
        if note is not None and self._ends and self._sequence:  # from 0 on it can be done again
            self._last[self._key] = note
            if len(self._last) > KEPT_LAST:
                self._last.popitem(last=False)
        self.close(response)

    def _fingerprint(self) -> _Mark | None:
        """What tells a request that is sent again from a new one; None when its sender does not count.

        Of all that it says: the answer also holds an id and the outputs asked for, and an end must not be missed.
        """
        if self._sequence is None:
            return None
        return self._sequence, len(self._body), zlib.crc32(self._body)

    def _outputs(self) -> list[Tensor]:
        plans = {tensor.name: tensor for tensor in self._service.signature.outputs}
        if not self._answers:
            names = tuple(output.name for output in self._document.outputs) or tuple(plans)
            return [Tensor(name, plans[name].datatype, _no_rows(plans[name])) for name in names]
        columns = zip(*(answer.outputs for answer in self._answers), strict=True)
        return [
            Tensor(column[0].name, column[0].datatype, _stacked(plans[column[0].name], [one.array for one in column]))
            for column in columns
        ]

    def _parameters(self) -> dict[str, Any]:
        taken, answers = self._taken, self._answers
        parameters: dict[str, Any] = {"ew_windows": len(taken.windows), "ew_sequence": taken.place.sequence}
        if len(taken.windows):
            parameters["ew_first_window"] = taken.first_window
        if answers:
            parameters["ew_served_by"] = _each(answer.engine for answer in answers)
            parameters["ew_artifact"] = _each(answer.digest for answer in answers)
            parameters["ew_reason"] = _each(answer.reason for answer in answers)
        if guard := _each((answer.guard for answer in answers if answer.guard), ";"):
            parameters["ew_guard"] = guard
        if taken.made_up:
            parameters["ew_gap"] = f"{self._streams.form.plan.gap_policy}:{taken.made_up}"
        if taken.dropped:
            parameters["ew_dropped"] = taken.dropped
        if taken.reset is not None:
            parameters["ew_stream_reset"] = str(taken.reset)
        return parameters


# --- reading -------------------------------------------------------------------------------------------------
def _read_samples(streams: Streams, document: InferDocument, binary: memoryview) -> Array:
    """The one tensor of a request, (samples, ...). Raises: InvalidRequest."""
    form = streams.form
    seen: list[str] = []

    def admit(name: str, datatype: str, shape: tuple[int, ...]) -> None:
        wanted = DATATYPES[datatype]
        if seen or name != form.plan.input:
            raise InvalidRequest(f"a stream takes the one input '{form.plan.input}', given was '{name[:60]}'")
        if wanted != form.dtype or shape[1:] != form.shape or not shape:
            wants = datatype_of(np.empty(0, form.dtype))
            expected = f"{wants} [{', '.join(map(str, ('samples', *form.shape)))}]"
            raise InvalidRequest(f"samples of '{name}' must be {expected}, {datatype} {list(shape)} was given")
        if shape[0] > form.max_samples:
            text = f"a request has at most {form.max_samples} samples, {shape[0]} were given"
            raise InvalidRequest(text, hint="Send them in several requests.", status=TOO_LARGE)
        seen.append(name)

    tensors = read_tensors(document.inputs, binary, admit=admit)
    if not tensors:
        raise InvalidRequest(f"a stream takes the one input '{form.plan.input}', none was given")
    return tensors[0].array


def _sequence(parameters: dict[str, Any]) -> int | None:
    value = parameters.get("ew_sequence")
    if value is None:
        return None
    if type(value) is not int or not 0 <= value <= MAX_SEQUENCE:
        raise InvalidRequest(f"parameter ew_sequence must be a whole number from 0 to {MAX_SEQUENCE}")
    return value


def _flag(parameters: dict[str, Any], name: str) -> bool:
    value = parameters.get(name, False)
    if type(value) is not bool:
        raise InvalidRequest(f"parameter {name} must be true or false")
    return value


# --- telling -------------------------------------------------------------------------------------------------
def _describe(service: Service, name: str, stream: Stream | None) -> dict[str, Any]:
    """Raises: UnknownModel: there is no such stream."""
    if stream is None or not stream.begun:
        raise UnknownModel(f"'{service.plan.service}' has no stream '{name}'")
    place = stream.place
    return {
        "model_name": service.plan.service,
        "stream": name,
        "sequence": place.sequence,
        "samples": place.samples,
        "windows": place.windows,
        "buffered": place.filled,
        "gaps": place.gaps,
        "made_up": place.made_up,
        "dropped": place.dropped,
        "resets": place.resets,
    }


def _copied(answer: Answer) -> Answer:
    outputs = tuple(Tensor(one.name, one.datatype, one.array.copy()) for one in answer.outputs)
    return Answer(outputs, answer.engine, answer.digest, answer.version, answer.reason, answer.guard)


def _stacked(plan: TensorPlan, arrays: list[Array]) -> Array:
    """Outputs of several runs, one row per window."""
    if plan.shape[:1] in ((-1,), (1,)):
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    return np.stack(arrays)


def _no_rows(plan: TensorPlan) -> Array:
    """An output of no window."""
    rest = plan.shape[1:] if plan.shape[:1] in ((-1,), (1,)) else plan.shape
    return np.empty((0, *(max(axis, 0) for axis in rest)), DATATYPES[plan.datatype])


def _each(texts: Iterator[str], between: str = ",") -> str:
    """Different ones, in their order: windows of one request may be answered by different engines."""
    return between.join(dict.fromkeys(texts))
