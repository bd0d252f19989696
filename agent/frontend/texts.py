"""Requests and answers all in JSON, the short way: numbers from text into a lane's memory and back into text.

The parser is msgspec's, told what to expect: one document of exactly the known form, whose numbers alone differ from
those of a request that the strict path has answered. Where a document has one list of numbers and the text around it
is the known one to the byte, the list alone is read. Anything else (another field, a nested list, a boolean among the
numbers, a number that float32 cannot hold) is left to the strict path. The answer is put together from the pieces of
the strict path's answer, and a wire that cannot make that very answer from its numbers is not used at all.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import msgspec

from agent.engine import Lane

_encode = msgspec.json.Encoder().encode
_HEAD_END = b"\r\n\r\n"
_NOTHING = msgspec.Raw(b"")


class _Input(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    datatype: str
    shape: list[int]
    data: list[float]


class _Document(msgspec.Struct, forbid_unknown_fields=True):
    inputs: list[_Input]
    id: str = ""
    parameters: msgspec.Raw = _NOTHING
    outputs: msgspec.Raw = _NOTHING

    @property
    def constants(self) -> tuple[str, bytes, bytes]:
        return self.id, bytes(self.parameters), bytes(self.outputs)


_decode = msgspec.json.Decoder(_Document).decode
_decode_numbers = msgspec.json.Decoder(list[float]).decode
_UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, struct.error, OverflowError)


@dataclass(frozen=True, slots=True)
class TextWire:
    """One kind of JSON request, learned from one that was answered.

    `start`: where the document begins; `shapes`: of the inputs, by name in their order; `pieces`: the answer's
    document before, between and after the numbers of `outputs`; `head`: of its HTTP, but for its length; `frame`: the
    text of a request before and after its only list of numbers, which has the length of the one learned from.
    """

    start: int
    shapes: Sequence[tuple[str, str, list[int]]]
    constants: tuple[str, bytes, bytes]
    outputs: Sequence[str]
    pieces: Sequence[bytes]
    head: tuple[bytes, bytes]
    frame: tuple[bytes, bytes] | None = None

    @classmethod
    def learn(cls, message: bytes, start: int, outputs: Sequence[str], response: bytes) -> TextWire | None:
        """From a whole message, whose document begins at `start`, and its whole response; None: there is no such way.

        `outputs`: names in the order of the response.
        """
        try:
            document = _decode(memoryview(message)[start:])
        except msgspec.MsgspecError:
            return None
        if any(each.datatype != "FP32" for each in document.inputs):
            return None
        split = _split(response, len(outputs))
        if split is None:
            return None
        shapes = [(each.name, each.datatype, each.shape) for each in document.inputs]
        frame = _frame(message[start:], document)
        return cls(start, shapes, document.constants, tuple(outputs), *split, frame)

    def reader(self, lane: Lane) -> Callable[[bytes], object] | None:
        """See `agent.express.Wire`."""
        if len(self.shapes) != len(lane.inputs):
            return None
        expected: list[tuple[str, str, list[int], memoryview, Callable[..., None]]] = []
        for name, datatype, shape in self.shapes:
            place, size = lane.piece([name], of_inputs=True), math.prod(shape)
            if place is None or list(lane.inputs[name].shape) != shape:
                return None
            expected.append((name, datatype, shape, place, struct.Struct(f"<{size}f").pack_into))
        start, constants = self.start, self.constants

        def read(data: bytes) -> bool:
            try:
                document = _decode(data[start:])
                if document.constants != constants or len(document.inputs) != len(expected):
                    return True
                for each, (name, datatype, shape, place, pack) in zip(document.inputs, expected, strict=True):
                    if each.name != name or each.datatype != datatype or each.shape != shape:
                        return True
                    pack(place, 0, *each.data)
            except _UNREADABLE:
                return True
            return False

        if self.frame is None:
            return read
        return _framed(self.frame, start, expected[0][3:], read)

    def writer(self, lane: Lane) -> Callable[[], bytes] | None:
        """See `agent.express.Wire`."""
        if any(name not in lane.outputs for name in self.outputs):
            return None
        flat = [lane.outputs[name].ravel() for name in self.outputs]
        first, *others = self.pieces
        before, behind = self.head
        if len(flat) == 1:
            numbers, opening, closing = flat[0].tolist, behind + first, others[0]
            size = len(first) + len(closing)

            def respond_one() -> bytes:
                text = _encode(numbers())
                return b"%b%d%b%b%b" % (before, size + len(text), opening, text, closing)

            return respond_one

        def respond() -> bytes:
            parts = [first]
            for array, piece in zip(flat, others, strict=True):
                parts += (_encode(array.tolist()), piece)
            body = b"".join(parts)
            return b"%b%d%b%b" % (before, len(body), behind, body)

        return respond


def _framed(
    frame: tuple[bytes, bytes],
    start: int,
    target: tuple[memoryview, Callable[..., None]],
    otherwise: Callable[[bytes], bool],
) -> Callable[[bytes], bool]:
    """A reader for documents with this text around their numbers.

    With the writer for one output it takes a request of 32 numbers from 10.2 to 8.0 us (`scripts/bench request`).
    """
    (before, behind), (place, pack) = frame, target
    first, last = start + len(before), len(behind)

    def read(data: bytes) -> bool:
        if not (data.startswith(before, start) and data.endswith(behind)):
            return otherwise(data)
        try:
            pack(place, 0, *_decode_numbers(data[first:-last]))
        except _UNREADABLE:
            return True
        return False

    return read


def _frame(body: bytes, document: _Document) -> tuple[bytes, bytes] | None:
    """What stands before and after the only list of numbers in a document; None: it has several, or it is not found.

    Found is what can be replaced by other numbers so that the document says the same but for these.
    """
    if len(document.inputs) != 1 or not document.inputs[0].data:
        return None
    numbers = document.inputs[0].data
    others = [0.5 if each != 0.5 else 0.25 for each in numbers]
    begin = body.find(b"[", body.find(b'"data"'))
    end = body.find(b"]", begin) + 1
    if begin < 0 or end <= 0:
        return None
    before, behind = body[:begin], body[end:]
    try:
        probe = _decode(before + _encode(others) + behind)
    except msgspec.MsgspecError:
        return None
    same = probe.constants == document.constants and len(probe.inputs) == 1
    one, known = probe.inputs[0], document.inputs[0]
    if not same or (one.name, one.datatype, one.shape, one.data) != (known.name, known.datatype, known.shape, others):
        return None
    return before, behind


def _split(response: bytes, outputs: int) -> tuple[list[bytes], tuple[bytes, bytes]] | None:
    """A response without its length and its numbers: (pieces of the document, HTTP head around the length)."""
    head, _, body = response.partition(_HEAD_END)
    mark = b"Content-Length: "
    at = head.find(mark)
    if at < 0:
        return None
    at += len(mark)
    end = at + len(str(len(body)))
    if head[at:end] != str(len(body)).encode():
        return None
    # the encoder writes no spaces, and quotes inside strings are escaped: nothing else looks like this
    begins = _all(body, b'"data":[')
    if len(begins) != outputs:
        return None
    spans = [(begin + len(b'"data":'), body.index(b"]", begin) + 1) for begin in begins]
    edges = [0, *(edge for span in spans for edge in span), len(body)]
    pieces = [body[begin:end_] for number, (begin, end_) in enumerate(pairwise(edges)) if number % 2 == 0]
    return pieces, (head[:at], head[end:] + _HEAD_END)


def _all(text: bytes, wanted: bytes) -> list[int]:
    found, at = [], text.find(wanted)
    while at >= 0:
        found.append(at)
        at = text.find(wanted, at + 1)
    return found
