"""What the client of a stream remembers: samples not delivered yet, in the pieces they came in. Knows no socket.

Samples are counted from the stream's beginning. What could not be delivered is kept and sent again, in the same
pieces, so that the server can tell what it has already; it repeats the answer to a piece it has just answered.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import numpy as np

from agent.client.wire import Answer, Call, Wire, model_path
from agent.contract.errors import InvalidRequest, ServingError
from agent.contract.tensors import Array

KEPT_SAMPLES = 65_536
ATTEMPTS = 2  # of each piece, with a new connection: a worker that was replaced costs no error
MAX_NAME = 64
_COUNTED = {"ew_windows", "ew_dropped"}
_LISTED = {"ew_stream_reset", "ew_gap", "ew_guard"}
_NAME_CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-"


class StreamOptions(TypedDict, total=False):
    """What may be said about a stream.

    input: the model's input that is windowed; asked from the server when not given. outputs: names wanted, all when
    empty. deadline_ms: of each request. keep_samples: undelivered samples kept; the oldest are dropped beyond.
    """

    input: str
    version: str
    outputs: Sequence[str]
    deadline_ms: float | None
    keep_samples: int


@dataclass(frozen=True, slots=True)
class _Piece:
    samples: Array
    sequence: int
    time_s: float | None
    end: bool


class Sender:
    """Undelivered pieces of one stream, and answers that were not handed out yet."""

    def __init__(
        self,
        wire: Wire,
        model: str,
        name: str,
        *,
        input: str = "",  # noqa: A002 - the protocol's word
        version: str = "",
        outputs: Sequence[str] = (),
        deadline_ms: float | None = None,
        keep_samples: int = KEPT_SAMPLES,
    ) -> None:
        """Raises: InvalidRequest: a name that cannot be sent."""
        if not 0 < len(name) <= MAX_NAME or not set(name) <= set(_NAME_CHARACTERS):
            raise InvalidRequest(f"{name[:70]!r} cannot be a stream's name", hint="Use 1 to 64 of A-Z a-z 0-9 _ . -")
        self.input = input
        self.sequence = 0
        self.lost = 0
        self.metadata = wire.metadata(model)
        self._wire = wire
        self._path = f"{model_path(model, version)}/streams/{name}"
        self._document = {"outputs": [{"name": output} for output in outputs]} if outputs else {}
        self._parameters = {} if deadline_ms is None else {"ew_deadline_ms": deadline_ms}
        self._keep_samples = keep_samples
        self._pieces: deque[_Piece] = deque()
        self._answers: list[Answer] = []

    @property
    def pending(self) -> int:
        """Samples that were not delivered yet."""
        return sum(len(piece.samples) for piece in self._pieces)

    def add(self, samples: Array, time_s: float | None, *, end: bool) -> None:
        """Count samples and put them behind those not delivered yet; what follows an `end` begins a new stream."""
        self._pieces.append(_Piece(np.array(samples), self.sequence, time_s, end))  # a copy: the caller's is its own
        self.sequence = 0 if end else self.sequence + len(samples)
        while self.pending > self._keep_samples and len(self._pieces) > 1:
            self.lost += len(self._pieces.popleft().samples)

    def next(self) -> Call[Answer] | None:
        """The request for the oldest piece; None when all are delivered."""
        if not self._pieces:
            return None
        piece = self._pieces[0]
        parameters = {**self._parameters, "ew_sequence": piece.sequence}
        if piece.time_s is not None:
            parameters["ew_time_s"] = piece.time_s
        if piece.end:
            parameters["ew_end"] = True
        return self._wire.post_tensors(self._path, {self.input: piece.samples}, parameters, self._document)

    def delivered(self, answer: Answer | None) -> None:
        """The oldest piece needs not be sent again; None: its windows stay without an answer."""
        self._pieces.popleft()
        if answer is not None:
            self._answers.append(answer)

    def collect(self) -> Answer:
        """The answers since the last call as one, their rows in the order of the windows."""
        answers, self._answers = self._answers, []
        return answers[0] if len(answers) == 1 else _joined(answers)

    def describe(self) -> Call[dict[str, Any]]:
        return self._wire.document("GET", self._path)

    def end(self) -> Call[Any]:
        """The request to forget the stream, which begins anew here too."""
        self._pieces.clear()
        self.sequence = 0
        return self._wire.document("DELETE", self._path)


def first_input(metadata: dict[str, Any]) -> str:
    try:
        return str(metadata["inputs"][0]["name"])
    except (LookupError, TypeError):
        raise ServingError("the server does not say which input the model takes") from None


def _joined(answers: Sequence[Answer]) -> Answer:
    """Answers to consecutive pieces as one; what only one of them can say, the last one with windows says."""
    last = answers[-1]
    told = [answer.parameters for answer in answers]
    parameters: dict[str, Any] = {}
    for one in sorted(told, key=lambda one: bool(one.get("ew_windows"))):  # stable: those with windows come last
        parameters |= one
    parameters["ew_sequence"] = last.parameters.get("ew_sequence")
    for name in _COUNTED & parameters.keys():
        parameters[name] = sum(one.get(name, 0) for one in told)
    for name in _LISTED & parameters.keys():
        parameters[name] = ",".join(str(one[name]) for one in told if name in one)
    if "ew_first_window" in parameters:
        parameters["ew_first_window"] = next(one["ew_first_window"] for one in told if "ew_first_window" in one)
    outputs = {name: np.concatenate([answer.outputs[name] for answer in answers]) for name in last.outputs}
    return replace(last, outputs=outputs, parameters=parameters)
