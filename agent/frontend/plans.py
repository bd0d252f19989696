"""The plan cache: requests whose every byte but the numbers was accepted before skip the parser.

A plan's key is the exact bytes of a message up to its binary data: request line, headers and JSON. It is made only
after the strict path has accepted and answered that very message, so whatever it accepts the parser accepts too, and
the response is the same byte for byte (`tests/fuzz/test_plans.py`). A value that changes with every request, such as
a time, makes another key: such requests go the strict way, because a key must come twice in a row on one connection
before a plan is made of it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agent.attempt import Ended
from agent.express import Serve

MAX_PLANS = 256
MAX_PLANS_OF_A_SIZE = 8  # looked through one after the other
MAX_PREFIX_BYTES = 4096

Submit = Callable[[memoryview, int, str, Ended | None, Any], None]
"""Decode and answer one request: (its binary data, arrival_ns, client, what `serve` left, who takes the answer)."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How one kind of message is answered. `size_bytes`: of the whole message; `body_bytes`: of its body.

    `serve`: answers at once; None = there is no short way, and only the parser is skipped. `stale`: whether it is to
    be made anew.
    """

    prefix: bytes
    size_bytes: int
    body_bytes: int
    serve: Serve | None
    submit: Submit
    stale: Callable[[], bool]


class PlanCache:
    """The plans of all connections, the least recently found ones forgotten. One thread's."""

    def __init__(self) -> None:
        self._plans: OrderedDict[bytes, Plan] = OrderedDict()
        self._by_size: dict[int, list[Plan]] = {}

    def find(self, data: bytes) -> Plan | None:
        """The plan for exactly this message."""
        for plan in self._by_size.get(len(data), ()):
            if data.startswith(plan.prefix):
                self._plans.move_to_end(plan.prefix)
                return plan
        return None

    def find_prefix(self, prefix: bytes) -> Plan | None:
        """The plan with this key."""
        return self._plans.get(prefix)

    def keep(self, plan: Plan) -> None:
        """Remember a plan, in place of one with the same key."""
        self._forget(plan.prefix)
        same_size = self._by_size.get(plan.size_bytes, [])
        if len(same_size) >= MAX_PLANS_OF_A_SIZE:
            self._forget(same_size[0].prefix)
        if len(self._plans) >= MAX_PLANS:
            self._forget(next(iter(self._plans)))
        self._plans[plan.prefix] = plan
        self._by_size.setdefault(plan.size_bytes, []).append(plan)

    def __len__(self) -> int:
        return len(self._plans)

    def _forget(self, prefix: bytes) -> None:
        plan = self._plans.pop(prefix, None)
        if plan is None:
            return
        same_size = self._by_size[plan.size_bytes]
        same_size.remove(plan)
        if not same_size:
            del self._by_size[plan.size_bytes]
