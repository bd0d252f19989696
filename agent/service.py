"""One served name: its plan, its engines in their order, its guard, and what a request to it must look like."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from agent import clock
from agent.admission import Admission
from agent.blame import Doubt
from agent.contract.errors import ConfigError, InvalidRequest, UnknownModel
from agent.contract.plan import Placement, ServicePlan
from agent.contract.tensors import Array, Tensor, check_shape
from agent.engine import leading_rows
from agent.guard import Guard
from agent.lineup import Lineup
from agent.observation import RingWriter
from agent.tally import ANSWERED, COUNTED, MORE_ROWS, TOTAL_NS, Tally

MAX_BATCH_ROWS = 4096
MAX_DEADLINE_MS = 3_600_000.0


@dataclass(frozen=True, slots=True)
class Request:
    """One decoded request. `outputs`: names asked for, empty = all. `data_time_s`: NaN = not given.

    `client`: who asks, for fair shares of the queue; empty = nobody knows. `source`: see `observation.source_of`.
    """

    service: str
    inputs: Mapping[str, Array]
    arrival_ns: int
    outputs: Sequence[str] = ()
    version: str = ""
    deadline_ms: float | None = None
    data_time_s: float = math.nan
    client: str = ""
    source: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """Public outputs and how they came about. Hidden view outputs are never in here."""

    outputs: tuple[Tensor, ...]
    engine: str
    digest: str
    version: str
    reason: str
    guard: str


@dataclass(frozen=True, slots=True)
class Counters:
    """Totals of one service since the worker started. `queue_us` is of the requests that had to wait."""

    requests: int = 0
    rows: int = 0  # of answered requests
    answered: int = 0
    failed: int = 0
    by_outcome: tuple[int, ...] = (0,) * len(COUNTED)
    queue_us: float = 0.0
    latency_us: float = 0.0  # of answered requests
    last_wall_s: float = 0.0


PLACED_US = {Placement.INLINE: 0.0, Placement.THREAD: math.inf}  # per row, where the configuration has decided


class Service:
    """One served name: its plan, its lineup (replaced by assignment), its guard and its counters."""

    def __init__(self, index: int, plan: ServicePlan, lineup: Lineup) -> None:
        """Raises: ConfigError: the guard does not fit the service's inputs."""
        _check_guard(plan)
        self.index = index
        self.plan = plan
        self.lineup = lineup
        self.guard = None if plan.guard is None else Guard(plan.guard)
        self.signature = plan.engines[0]
        self._inputs = {tensor.name: tensor for tensor in self.signature.inputs}
        self.datatypes = {tensor.name: tensor.datatype for tensor in self.signature.outputs}
        # what decides between the loop's thread and one of its own; a lineup is reordered, but keeps its engines
        self.slowest_us = PLACED_US.get(plan.placement, lineup.slowest_us)
        self.version = str(next(e.version for e in plan.engines if e.engine == plan.active))
        self._ring: RingWriter | None = None
        self.queue_us = 0.0  # of all requests together
        self.last_ns = 0  # when the newest request came, monotonic
        self.doubt: Doubt | None = None  # the newest failure that nothing but itself speaks for
        self.admission = Admission(plan.queue_limit, lineup.slowest_us)  # of requests for the service's thread

    def count_in(self, ring: RingWriter) -> None:
        """Its requests are counted in this ring from now on."""
        self._ring = ring

    @property
    def counters(self) -> Counters:
        """Totals until now; takes 0.1 ms."""
        if self._ring is None:
            return Counters()
        numbers = self._ring.totals()[self.index]
        tally = Tally(numbers, range(len(numbers)))
        by_outcome = tally.by_outcome()
        answers = numbers[:, ANSWERED, :]
        answered = sum(by_outcome[outcome] for outcome in ANSWERED)
        age_s = (clock.monotonic_ns() - self.last_ns) / 1e9
        return Counters(
            requests=sum(by_outcome),
            rows=answered + int(answers[:, :, MORE_ROWS].sum()),
            answered=answered,
            failed=sum(by_outcome) - answered,
            by_outcome=tuple(by_outcome),
            queue_us=self.queue_us,
            latency_us=int(answers[:, :, TOTAL_NS].sum()) / 1e3,
            last_wall_s=clock.wall_s() - age_s if self.last_ns else 0.0,
        )

    @property
    def ready(self) -> bool:
        """Whether anything but silence can answer."""
        return bool(self.lineup.seats)

    def check_version(self, version: str) -> None:
        """Raises: UnknownModel: another version than the served one is asked for."""
        if version and version != self.version:
            raise UnknownModel(f"'{self.plan.service}' has no version {version[:20]}, it serves {self.version}")

    def check_input(self, name: str, datatype: str, shape: tuple[int, ...]) -> None:
        """Compare one described input with the plan, before anybody looks at its data.

        Raises:
            InvalidRequest: naming the input, what was expected and what was given.
        """
        expected = self._inputs.get(name)
        if expected is None:
            raise InvalidRequest(f"'{self.plan.service}' takes {self._wanted()}, given was '{name[:60]}'")
        if datatype != expected.datatype:
            raise InvalidRequest(f"input '{name}' must be {expected.datatype}, {datatype} was given")
        if shape[1:] != expected.shape[1:] or shape[:1] != expected.shape[:1]:  # else there is nothing to compare
            check_shape(name, expected.shape, shape)
        if expected.shape[:1] == (-1,) and not 0 < shape[0] <= MAX_BATCH_ROWS:
            raise InvalidRequest(f"a request has 1 to {MAX_BATCH_ROWS} rows, not {shape[0]}")

    def check(self, request: Request) -> int:
        """Compare a request, whose inputs passed `check_input`, with the plan; returns its rows.

        Raises:
            InvalidRequest, UnknownModel: naming what is wrong, what was expected and what was given.
        """
        self.check_version(request.version)
        if request.inputs.keys() != self._inputs.keys():
            given = ", ".join(request.inputs) or "none"
            raise InvalidRequest(f"'{self.plan.service}' takes {self._wanted()}, given were {given}")
        for name in request.outputs:
            if name not in self.datatypes:
                only = ", ".join(self.datatypes)
                raise InvalidRequest(f"'{self.plan.service}' has no output '{name[:60]}', only {only}")
        if request.deadline_ms is not None and not 0 < request.deadline_ms <= MAX_DEADLINE_MS:
            raise InvalidRequest(f"ew_deadline_ms must be above 0 and at most {MAX_DEADLINE_MS:.0f}")
        return leading_rows(self.signature.inputs, request.inputs)

    def deadline_ns(self, request: Request) -> int:
        """When the answer is due, monotonic."""
        return request.arrival_ns + int((request.deadline_ms or self.plan.deadline_ms) * 1e6)

    def _wanted(self) -> str:
        return f"the inputs {', '.join(self._inputs)}"


def _check_guard(plan: ServicePlan) -> None:
    """A guard that does not fit would fail at every request."""
    if plan.guard is None:
        return
    shapes = {tensor.name: tensor.shape for tensor in plan.engines[0].inputs}
    shape, channels = shapes.get(plan.guard.input), len(plan.guard.channels)
    if shape is None or (channels and shape[-1] != channels):
        raise ConfigError(
            f"the guard of '{plan.service}' names {channels} channels of input '{plan.guard.input}', "
            f"the inputs are {shapes}"
        )
