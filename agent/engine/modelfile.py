"""What a model file refers to: a walk over its protobuf fields, without a protobuf library."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Collection, Iterator
from pathlib import Path

from agent.contract.errors import Corrupt, Incompatible, Unavailable

MAX_DEPTH = 32  # nested subgraphs
DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})  # what the stock runtime implements
CONTROL_FLOW = frozenset({"If", "Loop", "Scan", "SequenceMap"})  # run graphs inside them, as often as they like

# (field number of a message -> what it holds), https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
_HOLDS = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_TENSOR_EXTERNAL, _TENSOR_LOCATION, _NODE_OPERATOR, _NODE_DOMAIN = 13, 14, 4, 7
_ATTRIBUTE_GRAPHS = frozenset({6, 11})


def check_file(path: Path, sha256: str, name: str, control_flow: Collection[str] | None = None) -> None:
    """Refuse what the runtime must not be shown.

    `sha256`: the only bytes accepted, empty = any. `control_flow`: operators with graphs inside that may be used;
    None = all.

    Raises:
        Unavailable, Corrupt: it cannot be read, has another digest, or is no ONNX model.
        Incompatible: weights outside the file, operators of a library, or control flow nobody allowed.
    """
    try:
        with path.open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if sha256 and hashlib.sha256(memory).hexdigest() != sha256:
            raise Corrupt(f"engine '{name}': {path} does not have the promised digest {sha256[:12]}")
        _Walk(name, control_flow).check(memoryview(memory), "model", 0)
    except OSError as error:
        raise Unavailable(f"engine '{name}': cannot read {path}: {error.strerror}") from None
    except (ValueError, IndexError):
        raise Corrupt(f"engine '{name}': {path} is no ONNX model") from None


def control_flow_of(model: bytes) -> list[str]:
    """Operators with graphs inside that a model uses, sorted: what its manifest has to name.

    Raises:
        Corrupt: it is no ONNX model.
        Incompatible: as `check_file`.
    """
    walk = _Walk("model", None)
    try:
        walk.check(memoryview(model), "model", 0)
    except (ValueError, IndexError):
        raise Corrupt("these bytes are no ONNX model") from None
    return sorted(walk.control_flow)


class _Walk:
    """Through one model, message by message. `control_flow`: what was met."""

    def __init__(self, name: str, control_flow: Collection[str] | None) -> None:
        self._name = name
        self._allowed = control_flow
        self.control_flow: set[str] = set()

    def check(self, message: memoryview, kind: str, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise Incompatible(f"engine '{self._name}' nests graphs deeper than {MAX_DEPTH // 3} levels")
        if kind == "node":
            self._check_node(message)
        for field, value in _fields(message):
            held = _HOLDS.get(kind, {}).get(field)
            if kind == "tensor" and (field == _TENSOR_EXTERNAL or (field == _TENSOR_LOCATION and value == 1)):
                raise Incompatible(
                    f"engine '{self._name}' keeps weights outside its file",
                    hint="Export the model with its weights inside.",
                )
            if held is not None and isinstance(value, memoryview):
                self.check(value, held, depth + 1)

    def _check_node(self, message: memoryview) -> None:
        operator, graphs = "", False
        for field, value in _fields(message):
            if field == _NODE_DOMAIN:
                self._check_domain(_text(value))
            elif field == _NODE_OPERATOR:
                operator = _text(value)
            elif isinstance(value, memoryview) and field in _HOLDS["node"]:
                graphs = graphs or any(one in _ATTRIBUTE_GRAPHS for one, _ in _fields(value))
        if not (graphs or operator in CONTROL_FLOW):
            return
        self.control_flow.add(operator)
        if self._allowed is not None and operator not in self._allowed:
            raise Incompatible(
                f"engine '{self._name}' uses the control-flow operator '{operator[:60]}', which it is not allowed",
                hint="If its runs are known to end, name it in the manifest's runtime.control_flow or in the "
                "service's control_flow.",
            )

    def _check_domain(self, domain: str) -> None:
        if domain not in DOMAINS:
            raise Incompatible(
                f"engine '{self._name}' needs operators of '{domain[:60]}', which the runtime does not have",
                hint="Export the model with standard operators.",
            )


def _text(value: memoryview | int) -> str:
    return bytes(value).decode(errors="replace") if isinstance(value, memoryview) else ""


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Field numbers and values; a length-delimited value is a view, fixed-width ones are skipped."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        match key & 7:
            case 0:
                value, at = _varint(message, at)
                yield key >> 3, value
            case 1:
                at += 8
            case 2:
                size, at = _varint(message, at)
                if at + size > len(message):
                    raise ValueError("a field ends outside its message")
                yield key >> 3, message[at : at + size]
                at += size
            case 5:
                at += 4
            case _:
                raise ValueError("unknown wire type")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number is too long")
