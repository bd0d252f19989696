"""A stream of raw samples to a model: the server cuts windows, keeps what overlaps, and answers those completed.

stream = client.stream("wrist", "left-arm")
answer = stream.send(samples)  # (samples, channels); one row of each output per completed window
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

from agent.client.sender import ATTEMPTS, Sender, StreamOptions, first_input
from agent.client.wire import Answer, Call, Wire
from agent.contract.errors import Disconnected, Overloaded, ServingError, UnknownModel
from agent.contract.tensors import Array


class Stream:
    """One stream over a `Client`; make it with `Client.stream`. Not for use by two threads at once."""

    def __init__(
        self, do: Callable[[Call[Any]], Any], wire: Wire, model: str, name: str, **options: Unpack[StreamOptions]
    ) -> None:
        """Raises: InvalidRequest: a name that cannot be sent."""
        self._do = do
        self._sender = Sender(wire, model, name, **options)

    @property
    def sequence(self) -> int:
        """Index of the next sample."""
        return self._sender.sequence

    @property
    def pending(self) -> int:
        """Samples that were not delivered yet; the next `send` begins with them."""
        return self._sender.pending

    @property
    def lost(self) -> int:
        """Samples given up because too many were pending; the server sees a gap."""
        return self._sender.lost

    def send(self, samples: Array, time_s: float | None = None, *, end: bool = False) -> Answer:
        """Send samples (samples, ...) and get the outputs of the windows they completed, one row each.

        `time_s`: time of the first sample. `end`: the stream ends after these. After `Disconnected` and `Overloaded`
        the samples are pending: just go on with the next ones. After any other error they are not sent again, and
        windows they completed have no answer.

        Raises:
            InvalidRequest, UnknownModel, Overloaded, DeadlineExceeded, EngineFailed: as the server says.
            Disconnected: the connection broke or could not be opened, twice.
        """
        sender = self._sender
        sender.add(samples, time_s, end=end)
        if not sender.input:
            sender.input = first_input(self._deliver(sender.metadata))
        while (call := sender.next()) is not None:
            try:
                sender.delivered(self._deliver(call))
            except (Disconnected, Overloaded):
                raise
            except ServingError:
                sender.delivered(None)
                raise
        return sender.collect()

    def describe(self) -> dict[str, Any]:
        """How far the server is: samples, windows, buffered, gaps. Raises: UnknownModel: it knows no such stream."""
        document: dict[str, Any] = self._do(self._sender.describe())
        return document

    def end(self) -> None:
        """Let the server forget the stream; pending samples are dropped."""
        try:
            self._do(self._sender.end())
        except UnknownModel:
            return

    def _deliver(self, call: Call[Any]) -> Any:
        for _ in range(ATTEMPTS - 1):
            try:
                return self._do(call)
            except Disconnected:
                continue
        return self._do(call)
