"""The plan cache: requests whose every byte but the numbers was seen and accepted before skip the parser.

A plan's key is the exact bytes of a message up to its binary data: request line, headers and JSON. It is made only
after the strict path has accepted and answered that very message, so whatever it accepts the parser accepts too, and
the response is the same byte for byte (`tests/fuzz/test_plans.py`). A value that changes with every request, such as
a time, makes another key: such requests keep going the strict way, because a key must be seen twice in a row on one
connection before a plan is made of it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from agent.attempt import Ended
from agent.contract.tensors import HEADER_LENGTH
from agent.express import Left, Serve
from agent.frontend.server import HttpRequest, Reply

MAX_PLANS = 256
MAX_PLANS_OF_A_SIZE = 8  # looked through one after the other
MAX_PREFIX_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Asked:
    """One request without the parser: (binary data, arrival_ns, client, what `serve` left, where the answer goes)."""


Submit = Callable[[memoryview, int, str, Ended | None, Reply], None]
