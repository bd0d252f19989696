"""What a director may order outside `desired`, and the answer each order gets on res/<op>.

    ping      is this device there?                        rebirth   say again what you are and carry
    sample    upload a recording, if this device allows    rollback  back to the previous selection
    pin       {"service", "engine"}                        unpin     {"service"}

An answer is {"id", "seq", "ok", "code", "text", ...} and carries the order's correlation data. Orders come here only
after `agent.orders` has believed them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent import VERSION
from agent.chores import Chores
from agent.config import AgentConfig
from agent.contract.errors import EdgewardenError, InvalidRequest, UnknownModel, Untrusted
from agent.decisions.events import Event, Pinned, Publish, Unpinned
from agent.orders import Order, Refusal
from agent.ota import wire
from agent.reporter import Reporter
from agent.samples import Recording, deliver, find_recording


@dataclass(frozen=True, slots=True)
class Crew:
    """Who does what is ordered, on the event loop.

    `shape`: of one row of a service's input, None = no such service. `engines`: of a service, () = no such service.
    """

    roll_back: Callable[[str], bool]
    decide: Callable[[Event], None]
    tell_birth: Callable[[], None]
    report: Callable[[], None]
    publish: Callable[[Publish], None]
    refused: Callable[[Refusal], None]
    shape: Callable[[str], tuple[int, ...] | None]
    engines: Callable[[str], tuple[str, ...]]


class Commands:
    """Owned by the event loop; uploads run in the thread of `chores`."""

    def __init__(self, config: AgentConfig, chores: Chores, crew: Crew, reporter: Reporter) -> None:
        self._config = config
        self._chores = chores
        self._crew = crew
        self._reporter = reporter

    def obey(self, order: Order) -> None:
        """Do it, and answer: now, or when it is done."""
        body = order.command.body
        try:
            match order.command.op:
                case "ping":
                    self._answer(order, "here", agent=VERSION)
                case "rebirth":
                    self._crew.tell_birth()
                    self._crew.report()
                    self._answer(order, "said again")
                case "sample":
                    self._sample(order)
                case "rollback":
                    self._roll_back(order)
                case "pin":
                    service, engine = _text(body, "service"), _text(body, "engine")
                    self._check_engine(service, engine)
                    self._crew.decide(Pinned(service, engine))
                    self._answer(order, f"{service} is pinned to {engine}")
                case "unpin":
                    service = _text(body, "service")
                    self._check_engine(service, "")
                    self._crew.decide(Unpinned(service))
                    self._answer(order, f"{service} is not pinned")
                case _:
                    raise InvalidRequest(f"this agent does not know the command '{order.command.op}'")
        except EdgewardenError as error:
            self._fail(order, error)

    def refused(self, refusal: Refusal) -> None:
        """One that was not believed: told, and answered so that an honest director knows."""
        self._crew.refused(refusal)
        if refusal.what != "desired":
            fields = {"id": "", "seq": refusal.claimed, "ok": False, "code": refusal.code, "text": refusal.text}
            self._reporter.answer(refusal.what, fields, refusal.correlation)

    # --- orders ---------------------------------------------------------------------------------------------
    def _roll_back(self, order: Order) -> None:
        if not self._crew.roll_back(f"ordered by command {order.command.seq}"):
            raise InvalidRequest("there is no previous selection to go back to")
        self._answer(order, "going back to the previous selection")

    def _check_engine(self, service: str, engine: str) -> None:
        engines = self._crew.engines(service)
        if not engines:
            raise UnknownModel(f"there is no service '{service}'")
        if engine and engine not in engines:
            raise UnknownModel(f"'{service}' has no engine '{engine}'", hint=f"It has: {', '.join(engines)}.")

    def _sample(self, order: Order) -> None:
        """Allowed by this device's own policy alone, whoever asks."""
        samples, body = self._config.samples, order.command.body
        if not samples.allow:
            raise Untrusted("this device does not allow recordings to be uploaded (samples.allow = false)")
        service = _text(body, "service")
        shape = self._crew.shape(service)
        if shape is None:
            raise UnknownModel(f"there is no service '{service}'")
        url, token = _text(body, "upload"), _text(body, "token")
        asked = body.get("max_bytes", samples.max_bytes)
        most = min(samples.max_bytes, asked) if isinstance(asked, int) and asked > 0 else samples.max_bytes
        tls_ca = self._config.update.tls_ca

        def work() -> Recording:
            recording = find_recording(Path(samples.folder), max_bytes=most, shape=shape)
            deliver(recording, url, token, tls=wire.make_tls(tls_ca) if tls_ca else None)
            return recording

        self._chores.start(work, lambda outcome: self._sampled(order, service, outcome))

    def _sampled(self, order: Order, service: str, outcome: Recording | EdgewardenError) -> None:
        if isinstance(outcome, EdgewardenError):
            self._fail(order, outcome)
            return
        text = f"{outcome.rows} windows of {outcome.path.name} were uploaded, as a director asked"
        numbers = {"rows": float(outcome.rows), "bytes": float(outcome.size_bytes)}
        self._crew.publish(Publish("notice", "sample", text, service, numbers=numbers, details={"sent": True}))
        self._answer(order, text, rows=outcome.rows, bytes=outcome.size_bytes)

    # --- answers --------------------------------------------------------------------------------------------
    def _answer(self, order: Order, text: str, **more: Any) -> None:
        self._reply(order, {"ok": True, "code": "", "text": text, **more})

    def _fail(self, order: Order, error: EdgewardenError) -> None:
        self._reply(order, {"ok": False, "code": error.code, "text": error.sentence()})
        op = order.command.op
        text = f"the command '{op}' was not obeyed: {error.sentence()}"
        kind = "sample" if op == "sample" else "update"
        details = {"sent": False, "op": op, "code": error.code}
        self._crew.publish(Publish("warning", kind, text, details=details))

    def _reply(self, order: Order, fields: Mapping[str, Any]) -> None:
        command = order.command
        name = str(command.body.get("id", ""))[:64]
        self._reporter.answer(command.op, {"id": name, "seq": command.seq, **fields}, order.correlation)


def _text(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= 1024:
        raise InvalidRequest(f"the command's body needs a text '{name}'")
    return value
