"""The plan cache against the parser: whatever bytes come, the same answers byte by byte and the same observations."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.models import window
from tests.wires import Side, agree, message

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def odd(x: np.ndarray, value: float) -> np.ndarray:
    changed = x.copy()
    changed[0, 3, 1] = value
    return changed


WINDOWS = [
    window(), window(seed=2), window(rows=2), window(200.0), np.zeros_like(window()), odd(window(), np.nan),
    odd(window(), np.inf), odd(window(), 1e30), odd(window(), 1e-42),
]  # fmt: skip
SOUND = [
    *(message(x) for x in WINDOWS),
    message(window(), headers="X-Odd: 1\r\n"),
    message(window(), headers="Connection: close\r\n"),
    message(window(), headers="Expect: 100-continue\r\n"),
    message(window(), path="/v2/models/wrist/versions/1/infer"),
    message(window(), path="/v2/models/wrist/versions/9/infer"),
    message(window(), path="/v2/models/wri%73t/infer?x=1"),
    message(window(), id="seven"),
    message(window(), parameters={"binary_data_output": True, "ew_time_s": 5.5, "ew_deadline_ms": 60_000}),
    message(window(), outputs=[{"name": "probability", "parameters": {"binary_data": True}}]),
    message(window(), outputs=[{"name": "probability", "parameters": {"binary_data": False}}]),
    message(window(), outputs=[{"name": "ew_view_channels"}]),
    message(window(), parameters={}),
    b"GET /v2/models/wrist/ready HTTP/1.1\r\nHost: x\r\n\r\n",
]


def test_every_kind_of_request_again_and_again(sides: tuple[Side, Side]) -> None:
    for one in SOUND:
        agree(sides, [one] * 4)
    agree(sides, [one for one in SOUND if b"close" not in one and b"/9/" not in one] * 3)
    (answer, _), _ = sides[0].exchange([SOUND[0]] * 3), sides[0].records()
    assert answer.count(b"HTTP/1.1 200 OK") == 3


@QUICK
@given(
    first=st.sampled_from(SOUND), second=st.sampled_from(SOUND), data=st.data(), seed=st.integers(0, 2**32),
    changes=st.integers(0, 3),
)  # fmt: skip
def test_changed_requests_behind_a_plan(
    sides: tuple[Side, Side], first: bytes, second: bytes, data: st.DataObject, seed: int, changes: int
) -> None:
    rng = random.Random(seed)  # noqa: S311
    changed = bytearray(rng.choice((first, second)))
    for _ in range(changes):
        at = rng.randrange(min(len(changed), data.draw(st.sampled_from([120, 400, 10**6]))))
        match rng.randrange(5):
            case 0:
                changed[at] = rng.randrange(256)
            case 1:
                changed[at] ^= 1 << rng.randrange(8)
            case 2:
                del changed[at : at + rng.randrange(1, 5)]
            case 3:
                changed[at:at] = rng.choice([b"\r\n", b" ", b"0", b"Content-Length: 5\r\n", bytes(rng.randrange(9))])
            case 4:
                del changed[at:]
        if not changed:
            return
    agree(sides, [first, first, first, bytes(changed), second])


@QUICK
@given(st.lists(st.sampled_from(SOUND), min_size=1, max_size=6), st.lists(st.integers(0, 4000), max_size=6))
def test_requests_cut_anywhere_and_joined(sides: tuple[Side, Side], requests: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(requests)
    at = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    pieces = [stream[begin:end] for begin, end in pairwise(at)]
    agree(sides, [requests[0]] * 3 + pieces)


@QUICK
@given(numbers=st.lists(st.floats(width=32), min_size=48, max_size=48))
def test_any_numbers(sides: tuple[Side, Side], numbers: list[float]) -> None:
    agree(sides, [message(window())] * 3 + [message(np.array(numbers, np.float32).reshape(1, 16, 3))] * 2)
