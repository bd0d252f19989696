"""The short way of a quick request: bytes in, bytes out, in memory that one engine is bound to.

For requests of one row of fixed size that run on the event loop's thread, when everything about them but their
numbers is known beforehand. Whatever is not the plain case (a finding of the guard, a number that is not finite, an
engine that fails, another order of engines) is left to `attempt`, which answers the same request the long way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Final, Protocol

import numpy as np

from agent import clock
from agent.attempt import Ended, Result, first_engine, observe, run_limit
from agent.contract.plan import EngineKind
from agent.contract.tensors import Array, Tensor
from agent.engine import Lane, OnnxEngine, leading_rows
from agent.lineup import Lineup, Seat
from agent.observation import LABEL_WIDTH, VIEW_WIDTH, Observe, Outcome, RingWriter
from agent.service import Answer, Request, Service
from agent.watchdog import Watch

SMALL_BYTES = 4096  # two copies of so little cost less than one view of it
MAX_LOOKED_AT = 16_384  # numbers that one dot product looks at in 3 us; above it inputs are left to the guard
_EXACT: Final = ("FP32", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64")


def expect_any_number() -> None:
    """Let numpy say nothing of NaN, infinity and overflow, in this context and those copied from it.

    For the beginning of a process: the look at all numbers of a run would else warn when it finds what it is for, and
    asking for silence each time costs as much as the look itself.
    """
    np.seterr(invalid="ignore", over="ignore")


class Left(Enum):
    """Why a request was not answered here; nothing has happened to it yet."""

    STALE = "stale"  # the engines are in another order: prepare it anew
    ODD = "odd"  # this one has to go the long way


Write = Callable[[bytes], object]
Serve = Callable[[bytes, int, Write], Left | Ended | None]
"""Answer one request: (the whole message, arrival_ns, where the response goes); None = it is answered."""


@dataclass(frozen=True, slots=True)
class Aside:
    """What follows an answer while anything is in `wanted`: (arrival_ns, inputs as they lie in memory)."""

    wanted: Sized = ()
    call: Callable[[int, Mapping[str, Array]], None] = lambda _arrival_ns, _inputs: None


class Wire(Protocol):
    """What messages of one kind look like, and their responses."""

    def reader(self, lane: Lane) -> Callable[[bytes], object] | None:
        """What writes a message's numbers into the lane; it returns something true when the message is another one.

        None: they do not fit it.
        """
        ...

    def writer(self, lane: Lane) -> Callable[[], bytes] | None:
        """What makes the response of the lane's outputs; None: they have no such form."""
        ...


@dataclass(frozen=True, slots=True)
class BinaryWire:
    """Numbers as they lie in memory.

    `inputs`: in the order of their bytes, which begin at `start` and end with the message; `outputs`: in the order of
    the response, which begins with `head`.
    """

    start: int
    inputs: Sequence[str]
    outputs: Sequence[str]
    head: bytes

    def reader(self, lane: Lane) -> Callable[[bytes], object] | None:
        """See `Wire`."""
        return _copier(lane, self)

    def writer(self, lane: Lane) -> Callable[[], bytes] | None:
        """See `Wire`."""
        piece, head = lane.piece(self.outputs), self.head
        if piece is None:
            return None
        given = piece.tobytes
        return lambda: head + given()


class Express:
    """One service with its engines in one order, and the memory its first engine is bound to."""

    def __init__(self, service: Service, seat: Seat, lane: Lane, lineup: Lineup) -> None:
        """Use `prepare`."""
        self._service = service
        self._seat = seat
        self._lane = lane
        self._lineup = lineup

    @classmethod
    def prepare(cls, service: Service) -> Express | None:
        """None: its first engine has no lane, or its requests are no single rows of exact numbers."""
        lineup = service.lineup
        if not lineup.seats:
            return None
        seat = lineup.seats[0]
        tensors = (*seat.plan.inputs, *seat.plan.outputs)
        if seat.plan.kind is not EngineKind.ONNX or any(tensor.datatype not in _EXACT for tensor in tensors):
            return None
        engine = seat.engine
        label, views = service.plan.label_output, [view.output for view in seat.plan.views]
        public = [output.name for output in seat.plan.outputs]
        order = [*(name for name in public if name != label), *(name for name in public if name == label), *views]
        lane = engine.lane(order) if isinstance(engine, OnnxEngine) else None
        if lane is None or leading_rows(seat.plan.inputs, lane.inputs) != 1:
            return None
        return cls(service, seat, lane, lineup)

    @property
    def stale(self) -> bool:
        """Whether another engine is first by now, or for another reason."""
        return self._service.lineup is not self._lineup

    def answer(self, outputs: Sequence[str]) -> Answer:
        """What every answer looks like; its numbers are whatever the memory holds."""
        plan, datatypes = self._seat.plan, self._service.datatypes
        tensors = tuple(Tensor(name, datatypes[name], self._lane.outputs[name]) for name in outputs or datatypes)
        return Answer(tensors, plan.engine, plan.digest, str(plan.version), self._lineup.reason, "")

    def serve(
        self, request: Request, wire: Wire, watch: Watch, ring: RingWriter, stuck_ns: int, aside: Aside | None = None
    ) -> Serve | None:
        """What answers such requests; None when their numbers do not fit the memory.

        `request`: any of them. In a row: copy in, guard, run, look for NaN, copy out, observe. 5.1 us for the MLP
        32-64-10 with its parsing, 0.82 of a bare session.run (`scripts/bench request`).
        """
        lane, service, lineup = self._lane, self._service, self._lineup
        if not lane.fits(request.inputs):
            return None  # more rows, or another length of an axis that is free
        read, respond = wire.reader(lane), wire.writer(lane)
        if read is None or respond is None:
            return None
        native, bound, failures, options = lane.native, lane.bound, lane.failures, watch.options
        looked_at, zeros = self._looked_at()
        dot = looked_at.dot
        clean = self._guard(looked_at)
        behind = lineup.seats[1] if len(lineup.seats) > 1 else None
        deadline_ns = service.deadline_ns(request) - request.arrival_ns
        allowed_ns, late = run_limit(behind, deadline_ns, rows=1, stuck_ns=stuck_ns)
        record = self._recorder(request, ring)
        now_ns = clock.monotonic_ns
        aside = aside or Aside()
        wanted, after, inputs = aside.wanted, aside.call, lane.inputs

        def serve(data: bytes, arrival_ns: int, write: Write) -> Left | Ended | None:
            if service.lineup is not lineup:
                return Left.STALE
            if read(data):
                return Left.ODD
            if clean is not None and not clean():
                return Left.ODD
            watch.begin(arrival_ns, arrival_ns + allowed_ns)
            try:
                native(bound, options)
            except failures as error:
                ended_ns = now_ns()
                watch.clear()
                # an order that came a moment too late met this run instead of the one before
                in_time = ended_ns <= arrival_ns + allowed_ns
                return Left.ODD if in_time else Ended(str(error), arrival_ns, arrival_ns + allowed_ns, late)
            watch.started_ns = 0
            if dot(zeros) != 0.0:
                return Left.ODD
            write(respond())
            record(arrival_ns)
            service.last_ns = arrival_ns
            if wanted:
                after(arrival_ns, inputs)
            return None

        return serve

    def _looked_at(self) -> tuple[Array, Array]:
        """What one dot product finds NaN and infinity in: all outputs, and inputs unless they are large."""
        floats, zeros = self._lane.floats, self._lane.zeros
        if len(floats) <= MAX_LOOKED_AT:
            return floats, zeros
        outputs = sum(array.size for array in self._lane.outputs.values() if array.dtype == np.float32)
        return floats[len(floats) - outputs :], zeros[:outputs]

    def _guard(self, looked_at: Array) -> Callable[[], bool] | None:
        """What tells whether the guard would find nothing; None where nothing is left to find."""
        guard = self._service.guard
        if guard is None:
            return None
        x = self._lane.inputs[guard.plan.input]
        if not guard.plan.channels and (x.dtype.kind != "f" or looked_at.size == self._lane.floats.size):
            return None  # NaN and infinity in the inputs are found behind the run
        return guard.watch(x)

    def _recorder(self, request: Request, ring: RingWriter) -> Observe:
        service, seat, lane = self._service, self._seat, self._lane
        label = lane.outputs.get(service.plan.label_output)
        views = [view.output for view in seat.plan.views]
        observed = lane.piece([service.plan.label_output, *views] if label is not None else views)
        label_width = 0 if label is None or not label.ndim else label.size
        view_width = min(sum(lane.outputs[name].size for name in views), VIEW_WIDTH)
        raw = label is None or (label.dtype == np.float32 and 0 < label_width <= LABEL_WIDTH and len(label) == 1)
        if observed is None or not raw:
            return self._long_recorder(request, ring)
        return ring.observer(
            service=service.index, engine=seat.index, first=seat.index, outcome=Outcome.OK,
            label_width=label_width, view_width=view_width, read=observed[: 4 * (label_width + view_width)].tobytes,
            data_time_s=request.data_time_s, now_ns=clock.monotonic_ns,
        )  # fmt: skip

    def _long_recorder(self, request: Request, ring: RingWriter) -> Observe:
        service, answer = self._service, self.answer(request.outputs)
        result = Result(Outcome.OK, answer, first_engine(self._lineup), seat=self._seat, raw=self._lane.outputs)

        def record(arrival_ns: int) -> None:
            elapsed_ns = clock.monotonic_ns() - arrival_ns
            observe(ring, service, replace(request, arrival_ns=arrival_ns), result, 1, elapsed_ns)

        return record


def _copier(lane: Lane, wire: BinaryWire) -> Callable[[bytes], None] | None:
    """What copies a message's numbers into the lane; None when their sizes are others."""
    start, whole = wire.start, lane.piece(wire.inputs, of_inputs=True)
    if whole is not None:

        def copy_small(data: bytes) -> None:
            whole[:] = data[start:]

        def copy_large(data: bytes) -> None:
            whole[:] = memoryview(data)[start:]

        return copy_small if whole.nbytes <= SMALL_BYTES else copy_large
    pieces: list[tuple[Any, int, int]] = []
    at = start
    for name in wire.inputs:
        piece = lane.piece([name], of_inputs=True)
        if piece is None:
            return None
        pieces.append((piece, at, at + piece.nbytes))
        at += piece.nbytes

    def copy_each(data: bytes) -> None:
        view = memoryview(data)
        for piece, begin, end in pieces:
            piece[:] = view[begin:end]

    return copy_each
