"""Tensors on the wire: the Open Inference Protocol's JSON form and its binary extension, both directions.

Client and frontend use this one codec, so they cannot disagree. A described tensor is the protocol's JSON object
(`name`, `datatype`, `shape`, then `data` or `parameters.binary_data_size`); binary data follow the JSON document
in the order of the descriptions, little endian, row-major. Knows nothing of HTTP and of JSON text.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.contract.errors import InvalidRequest

Array = NDArray[Any]
Buffer = bytes | memoryview
Admit = Callable[[str, str, tuple[int, ...]], None]  # name, datatype, shape; raises what is wrong with them

HEADER_LENGTH = "Inference-Header-Content-Length"  # HTTP header: bytes of JSON before the binary data
MAX_AXES = 8
MAX_BESIDE_NOTHING = 2**31  # product of the axes of an empty tensor that are not 0: no data bound them

DATATYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "FP16": np.dtype("<f2"),  # binary only, as the protocol says
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(object),  # each element a length (uint32) and that many bytes
}
_NAMES = {dtype: name for name, dtype in DATATYPES.items()}
_JSON_TYPES: dict[str, set[type]] = {
    "b": {bool},
    "i": {int},
    "u": {int},
    "f": {int, float},
    "O": {str},
}  # by kind of the dtype
_JSON_NAMES = {type(None): "null", str: "text", dict: "objects", list: "lists"}  # what JSON calls them
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Tensor:
    """A named array with its wire datatype. BYTES arrays have dtype object and hold `bytes`."""

    name: str
    datatype: str
    array: Array


def datatype_of(array: Array) -> str:
    """The wire datatype of an array: `FP32` for float32, `BYTES` for objects and strings.

    Raises:
        InvalidRequest: the protocol has no name for this dtype.
    """
    if array.dtype.kind in "OSU":
        return "BYTES"
    name = _NAMES.get(array.dtype.newbyteorder("<"))
    if name is None:
        raise InvalidRequest(f"arrays of {array.dtype} cannot be sent", hint=f"Use one of {', '.join(DATATYPES)}.")
    return name


def read_tensors(described: Iterable[Any], binary: Buffer = b"", *, admit: Admit | None = None) -> list[Tensor]:
    """The tensors of one request or response. Binary tensors may be read-only views of `binary`.

    `admit` sees each description before an array is built from its data.

    Raises:
        InvalidRequest: a description is malformed, or data and shape do not fit; and whatever `admit` raises.
    """
    view = memoryview(binary)
    tensors, offset = [], 0
    for item in described:
        name, datatype, shape = _description(item)
        if admit is not None:
            admit(name, datatype, shape)
        size = _binary_size(item, name)
        if size is None:
            array = decode_json(name, datatype, shape, item.get("data"))
        else:
            if offset + size > len(view):
                raise InvalidRequest(
                    f"'{name}' announces {size} bytes of binary data, {len(view) - offset} are left in the body"
                )
            array = decode_binary(name, datatype, shape, view[offset : offset + size])
            offset += size
        tensors.append(Tensor(name, datatype, array))
    if offset != len(view):
        raise InvalidRequest(f"{len(view) - offset} bytes of binary data belong to no tensor")
    return tensors


def write_tensors(tensors: Iterable[Tensor], binary: Collection[str]) -> tuple[list[dict[str, Any]], list[Buffer]]:
    """Descriptions and binary parts of tensors; those named in `binary` travel as binary data.

    Raises:
        InvalidRequest: FP16 or undecodable BYTES were to be written as JSON.
    """
    described: list[dict[str, Any]] = []
    parts: list[Buffer] = []
    for tensor in tensors:
        item: dict[str, Any] = {
            "name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.array.shape)
        }  # fmt: skip
        if tensor.name in binary:
            part = encode_binary(tensor)
            item["parameters"] = {"binary_data_size": len(part)}
            parts.append(part)
        else:
            item["data"] = encode_json(tensor)
        described.append(item)
    return described, parts


def encode_binary(tensor: Tensor) -> bytes:
    """Row-major little-endian bytes of a tensor."""
    if tensor.datatype == "BYTES":
        elements = [_as_bytes(element) for element in tensor.array.ravel()]
        return b"".join(_LENGTH.pack(len(element)) + element for element in elements)
    return tensor.array.astype(DATATYPES[tensor.datatype], copy=False).tobytes()


def decode_binary(name: str, datatype: str, shape: tuple[int, ...], data: Buffer) -> Array:
    """Array from binary data: a read-only view where the memory's alignment and the datatype allow it.

    Raises:
        InvalidRequest: the size does not fit datatype and shape.
    """
    count = math.prod(shape)
    if datatype == "BYTES":
        return _split_bytes(name, count, memoryview(data)).reshape(shape)
    dtype = DATATYPES[datatype]
    if len(data) != count * dtype.itemsize:
        raise InvalidRequest(
            f"'{name}' of {datatype} {list(shape)} needs {count * dtype.itemsize} bytes, {len(data)} were sent"
        )
    if datatype == "BOOL":
        return np.frombuffer(data, np.uint8).reshape(shape).astype(np.bool_)
    array = np.frombuffer(data, dtype).reshape(shape)
    # numpy works on unaligned memory at a third of its speed: one copy is cheaper than the first operation
    return array if array.flags.aligned else array.copy()


def encode_json(tensor: Tensor) -> list[Any]:
    """The flat `data` list of a tensor.

    Raises:
        InvalidRequest: FP16, which has no JSON form, or BYTES that are not UTF-8.
    """
    if tensor.datatype == "FP16":
        raise InvalidRequest(f"'{tensor.name}' is FP16, which has no JSON form", hint="Ask for binary data.")
    if tensor.datatype == "BYTES":
        return [_as_text(tensor.name, element) for element in tensor.array.ravel()]
    flat: list[Any] = tensor.array.ravel().tolist()
    return flat


def decode_json(name: str, datatype: str, shape: tuple[int, ...], data: Any) -> Array:
    """Array from a `data` list, flat or nested row-major.

    Raises:
        InvalidRequest: no list, an element of the wrong type or out of range, or a count that does not fit `shape`.
    """
    if not isinstance(data, list):
        raise InvalidRequest(f"'{name}' has neither a data list nor binary data")
    if datatype == "FP16":
        raise InvalidRequest(f"'{name}' is FP16, which has no JSON form", hint="Send it as binary data.")
    flat = _flatten(name, data)
    if len(flat) != math.prod(shape):
        raise InvalidRequest(f"'{name}' {list(shape)} needs {math.prod(shape)} values, {len(flat)} were sent")
    _check_types(name, datatype, flat)
    if datatype == "BYTES":
        array = np.empty(len(flat), object)
        array[:] = [element.encode() for element in flat]
        return array.reshape(shape)
    try:
        with np.errstate(over="ignore"):
            array = np.array(flat, DATATYPES[datatype]).reshape(shape)
    except OverflowError:
        raise InvalidRequest(f"'{name}' holds a number that does not fit {datatype}") from None
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InvalidRequest(f"'{name}' holds a number that does not fit {datatype}")
    return array


def check_shape(name: str, expected: Sequence[int], given: Sequence[int]) -> None:
    """Compare a shape with a declared one, where -1 is a free axis.

    Raises:
        InvalidRequest: naming the tensor, what is expected and what was given.
    """
    if len(expected) == len(given) and all(e in (-1, g) for e, g in zip(expected, given, strict=True)):
        return
    raise InvalidRequest(
        f"input '{name}' must have shape {list(expected)}, {list(given)} was given",
        hint="-1 stands for any length." if -1 in expected else "",
    )


def _description(item: Any) -> tuple[str, str, tuple[int, ...]]:
    if not isinstance(item, Mapping):
        raise InvalidRequest("a tensor must be described by a JSON object")
    name, datatype, shape = item.get("name"), item.get("datatype"), item.get("shape")
    if not isinstance(name, str) or not name:
        raise InvalidRequest("a tensor has no name")
    if datatype not in DATATYPES:
        raise InvalidRequest(
            f"'{name}' has the unknown datatype {str(datatype)[:20]!r}", hint=f"Use one of {', '.join(DATATYPES)}."
        )
    if not isinstance(shape, list) or len(shape) > MAX_AXES or not all(type(n) is int and n >= 0 for n in shape):
        raise InvalidRequest(f"'{name}' needs a shape: a list of at most {MAX_AXES} whole numbers, none negative")
    if 0 in shape and math.prod(length or 1 for length in shape) > MAX_BESIDE_NOTHING:
        raise InvalidRequest(f"'{name}' is empty, and its other axes are too long")
    return name, datatype, tuple(shape)


def _binary_size(item: Mapping[str, Any], name: str) -> int | None:
    parameters = item.get("parameters")
    if not isinstance(parameters, Mapping) or "binary_data_size" not in parameters:
        return None
    size = parameters["binary_data_size"]
    if type(size) is not int or size < 0:
        raise InvalidRequest(f"'{name}' has a binary_data_size that is no size")
    if "data" in item:
        raise InvalidRequest(f"'{name}' has both JSON and binary data")
    return size


def _flatten(name: str, data: list[Any]) -> list[Any]:
    for _ in range(MAX_AXES):
        if not data or not isinstance(data[0], list):
            return data
        if not all(isinstance(part, list) for part in data):
            raise InvalidRequest(f"'{name}' mixes lists and values")
        data = [value for part in data for value in part]
    raise InvalidRequest(f"'{name}' is nested deeper than {MAX_AXES} lists")


def _check_types(name: str, datatype: str, flat: list[Any]) -> None:
    kind = DATATYPES[datatype].kind
    foreign = {type(value) for value in flat}.difference(_JSON_TYPES[kind])
    if foreign:
        names = ", ".join(sorted(_JSON_NAMES.get(foreigner, foreigner.__name__) for foreigner in foreign))
        raise InvalidRequest(f"'{name}' is {datatype} and cannot hold {names}")


def _split_bytes(name: str, count: int, data: memoryview) -> Array:
    elements: list[bytes] = []
    offset = 0
    while offset < len(data):
        if len(elements) == count or offset + _LENGTH.size > len(data):
            raise InvalidRequest(f"'{name}' holds more data than its {count} elements of BYTES")
        (length,) = _LENGTH.unpack_from(data, offset)
        offset += _LENGTH.size
        if offset + length > len(data):
            raise InvalidRequest(f"element {len(elements)} of '{name}' ends outside its data")
        elements.append(bytes(data[offset : offset + length]))
        offset += length
    if len(elements) != count:
        raise InvalidRequest(f"'{name}' needs {count} elements of BYTES, {len(elements)} were sent")
    array = np.empty(count, object)
    array[:] = elements
    return array


def _as_bytes(element: Any) -> bytes:
    return element if isinstance(element, bytes) else str(element).encode()


def _as_text(name: str, element: Any) -> str:
    try:
        return element.decode() if isinstance(element, bytes) else str(element)
    except UnicodeDecodeError:
        raise InvalidRequest(f"'{name}' holds bytes that are not UTF-8", hint="Ask for binary data.") from None
