"""JSON requests the short way against the strict path: whatever bytes come, the same answers and observations."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.frontend.texts import TextWire
from tests.models import LENGTH, window
from tests.wires import Side, agree

QUICK = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))


def text(data: Any, *, shape: list[Any] | None = None, headers: str = "", name: str = "window", **more: Any) -> bytes:
    """A JSON request; `more`: further members of its document."""
    tensor = {"name": name, "datatype": "FP32", "shape": shape or [1, LENGTH, 3], "data": data}
    return post(json.dumps({"inputs": [tensor], **more}).encode(), headers)


def post(body: bytes, headers: str = "") -> bytes:
    head = f"POST /v2/models/wrist/infer HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def numbers(seed: int = 0) -> list[float]:
    return [round(float(value), 4) for value in window(seed=seed).ravel()]


def changed(at: int, value: Any) -> list[Any]:
    data: list[Any] = numbers()
    data[at] = value
    return data


def replaced(old: bytes, new: bytes) -> bytes:
    body = text(numbers()).partition(b"\r\n\r\n")[2]
    assert old in body
    return post(body.replace(old, new))


SOUND = [
    text(numbers()), text(numbers(2)), text([int(value) for value in numbers()]),
    text(window().tolist()),  # nested
    text(numbers() * 2, shape=[2, LENGTH, 3]),
    text([0] * (3 * LENGTH)),
    text(numbers(), id="seven"), text(numbers(), parameters={"ew_time_s": 4.5}),
    text(numbers(), parameters={"binary_data_output": True}),
    text(numbers(), outputs=[{"name": "probability"}]),
    text(numbers(), outputs=[{"name": "probability", "parameters": {"binary_data": True}}]),
    text(numbers(), headers="Content-Type: application/json\r\n"), text(numbers(), headers="Connection: close\r\n"),
]  # fmt: skip
ODD = [
    replaced(b'{"inputs"', b'{"parameters": {"data": [1, 2]}, "inputs"'), text(numbers(), id='"data": [1, 2]'),
    replaced(b'{"inputs"', b'{"parameters": {"data": %b}, "inputs"' % json.dumps(numbers()).encode()),
    replaced(b'"data"', b'"data": %b, "data"' % json.dumps(numbers(3)).encode()),
    replaced(b'"data"', b'"d\\u0061ta"'), replaced(b'"data": [', b'"data" :\n[ '),
    text(numbers()[:-1]), text([*numbers(), 1.0]), text([]), text(None), text("text"), text(numbers(), name="other"),
    text(changed(5, True)), text(changed(5, None)), text(changed(5, "1")), text(changed(5, [1.0])),
    text(changed(5, 1e39)), text(changed(5, 3.4028235677973366e38)), text(changed(5, -1e-46)),
    text(changed(5, 16777217)), text(changed(5, 123456789012345678901234567890)), text(changed(5, 10**400)),
    text(changed(5, float("nan"))), text(changed(5, float("inf"))),
    text(numbers(), shape=[1, LENGTH, 3.0]), text(numbers(), shape=[True, LENGTH, 3]), text(numbers(), shape=[-1]),
    text(numbers(), shape=["1", LENGTH, 3]), text(numbers(), unknown=1), text(numbers(), inputs=[]),
    text(numbers(), id=7), text(numbers(), parameters=[]), text(numbers(), parameters={"ew_time_s": "x"}),
    replaced(b'"FP32"', b'"FP64"'), replaced(b'"data"', b'"data": 1, "data"'), replaced(b'"shape"', b'"size"'),
    replaced(b'"name"', b'"name": "other", "name"'), replaced(b'"inputs"', b'"inputs": [], "inputs"'),
    replaced(b"}]}", b'}], "id": "a"}'), replaced(b"}]}", b'}], "outputs": []}'), replaced(b"}]}", b"}]} "),
    replaced(b"}]}", b"}]}x"), replaced(b"}]}", b', "parameters": {}}]}'), replaced(b"window", b"w\\u0069ndow"),
    replaced(b"window", b"\xff\xfe"), replaced(b"}]}", b"}]"),
]  # fmt: skip


@pytest.mark.parametrize("one", [*SOUND, *ODD])
def test_every_kind_of_document_behind_every_plan(sides: tuple[Side, Side], one: bytes) -> None:
    agree(sides, [one] * 4)
    for known in SOUND[:2]:
        agree(sides, [known] * 3 + [one, known])


def test_the_text_around_the_numbers_is_learned(sides: tuple[Side, Side]) -> None:
    def frame(one: bytes) -> tuple[bytes, bytes] | None:
        (answer, _), _ = sides[1].exchange([one]), sides[1].records()
        names = [output["name"] for output in json.loads(answer.partition(b"\r\n\r\n")[2])["outputs"]]
        wire = TextWire.learn(one, one.index(b"\r\n\r\n") + 4, names, answer)
        return wire and wire.frame

    plain = text(numbers())
    before, behind = frame(plain) or (b"", b"")
    assert json.loads(before + json.dumps(numbers(2)).encode() + behind)["inputs"][0]["data"] == numbers(2)
    assert frame(replaced(b'{"inputs"', b'{"parameters": {"data": [1, 2]}, "inputs"')) is None  # other numbers first


def test_documents_of_one_length_share_a_plan_and_differ_in_their_answers(sides: tuple[Side, Side]) -> None:
    first, second = text(changed(0, 1.25)), text(changed(0, 2.75))
    assert len(first) == len(second)
    agree(sides, [first] * 3 + [second, first])
    (answers, _), _ = sides[0].exchange([first] * 3 + [second]), sides[0].records()
    assert answers.count(b"HTTP/1.1 200 OK") == 4


@QUICK
@given(
    first=st.sampled_from(SOUND[:2]), other=st.sampled_from([*SOUND, *ODD]), seed=st.integers(0, 2**32),
    changes=st.integers(1, 3),
)  # fmt: skip
def test_changed_documents_of_a_known_length(
    sides: tuple[Side, Side], first: bytes, other: bytes, seed: int, changes: int
) -> None:
    """The head stays, so that the plan is found; bytes of the document change."""
    rng = random.Random(seed)  # noqa: S311
    message, begin = bytearray(first), first.index(b"\r\n\r\n") + 4
    for _ in range(changes):
        at = rng.randrange(begin, len(message))
        message[at] = rng.choice(b'0123456789.eE+-",:[]{}ntf \\x\xff') if rng.randrange(2) else rng.randrange(256)
    agree(sides, [first, first, first, bytes(message), other])


@QUICK
@given(values=st.lists(st.floats(allow_nan=False, allow_infinity=False) | st.integers(), min_size=48, max_size=48))
def test_any_numbers(sides: tuple[Side, Side], values: list[float]) -> None:
    one = text(values)
    assert len(values) == 3 * LENGTH
    with np.errstate(over="ignore"):
        agree(sides, [one] * 4)
