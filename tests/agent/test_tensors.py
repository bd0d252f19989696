"""The tensor codec: both forms, both directions, and what it refuses."""

import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from agent.contract.errors import InvalidRequest
from agent.contract.tensors import (
    DATATYPES,
    Tensor,
    check_shape,
    datatype_of,
    decode_binary,
    decode_json,
    encode_binary,
    read_tensors,
    write_tensors,
)

NUMERIC = [name for name in DATATYPES if name != "BYTES"]
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)


def through(tensors: list[Tensor], binary: set[str]) -> list[Tensor]:
    """Write, pass through JSON text and bytes, read again."""
    described, parts = write_tensors(tensors, binary)
    return read_tensors(json.loads(json.dumps(described)), b"".join(parts))


@given(data=st.data(), datatype=st.sampled_from(NUMERIC), shape=SHAPES)
def test_numeric_tensors_survive_the_binary_form_bit_by_bit(
    data: st.DataObject, datatype: str, shape: tuple[int, ...]
) -> None:
    array = data.draw(hnp.arrays(DATATYPES[datatype], shape))
    [back] = through([Tensor("x", datatype, array)], {"x"})
    assert back.datatype == datatype
    assert back.array.shape == shape
    assert back.array.tobytes() == array.tobytes()


@given(data=st.data(), datatype=st.sampled_from([n for n in NUMERIC if n != "FP16"]), shape=SHAPES)
def test_numeric_tensors_survive_the_json_form(data: st.DataObject, datatype: str, shape: tuple[int, ...]) -> None:
    dtype = DATATYPES[datatype]
    elements = (
        st.floats(width=8 * dtype.itemsize, allow_nan=False, allow_infinity=False) if dtype.kind == "f" else None
    )
    array = data.draw(hnp.arrays(dtype, shape, elements=elements))
    [back] = through([Tensor("x", datatype, array)], set())
    assert back.array.dtype == dtype
    np.testing.assert_array_equal(back.array, array)


@given(texts=st.lists(st.text(max_size=20), max_size=5), binary=st.sampled_from([set(), {"s"}]))
def test_bytes_tensors_survive_both_forms(texts: list[str], binary: set[str]) -> None:
    array = np.empty(len(texts), object)
    array[:] = [text.encode() for text in texts]
    [back] = through([Tensor("s", "BYTES", array)], binary)
    assert list(back.array) == list(array)


def test_binary_bytes_have_a_length_before_each_element() -> None:
    array = np.array([b"ab", b""], object)
    assert encode_binary(Tensor("s", "BYTES", array)) == b"\x02\0\0\0ab\0\0\0\0"


def test_several_tensors_share_one_body_in_order_of_their_descriptions() -> None:
    described = [
        {"name": "a", "datatype": "INT16", "shape": [2], "parameters": {"binary_data_size": 4}},
        {"name": "b", "datatype": "FP32", "shape": [1], "data": [0.5]},
        {"name": "c", "datatype": "BOOL", "shape": [3], "parameters": {"binary_data_size": 3}},
    ]
    a, b, c = read_tensors(described, struct.pack("<hh", -1, 2) + b"\x01\x00\x01")
    assert a.array.tolist() == [-1, 2]
    assert b.array.tolist() == [0.5]
    assert c.array.tolist() == [True, False, True]


def test_nested_lists_are_read_row_by_row() -> None:
    array = decode_json("x", "INT32", (2, 3), [[1, 2, 3], [4, 5, 6]])
    assert array.tolist() == [[1, 2, 3], [4, 5, 6]]


def test_big_unsigned_numbers_are_exact() -> None:
    assert decode_json("x", "UINT64", (2,), [2**64 - 1, 1]).tolist() == [2**64 - 1, 1]


@pytest.mark.parametrize(
    ("item", "body", "words"),
    [
        ("text", b"", "JSON object"),
        ({"datatype": "FP32", "shape": [1]}, b"", "no name"),
        ({"name": "x", "datatype": "FP8", "shape": [1]}, b"", "unknown datatype 'FP8'"),
        ({"name": "x", "datatype": "FP32", "shape": [-1]}, b"", "needs a shape"),
        ({"name": "x", "datatype": "FP32", "shape": [True]}, b"", "needs a shape"),
        ({"name": "x", "datatype": "FP32", "shape": [1.5]}, b"", "needs a shape"),
        ({"name": "x", "datatype": "FP32", "shape": [1] * 9}, b"", "needs a shape"),
        ({"name": "x", "datatype": "FP32", "shape": [0, 10**30], "data": []}, b"", "too long"),
        ({"name": "x", "datatype": "BYTES", "shape": [2**62, 0], "data": []}, b"", "too long"),
        (
            {"name": "x", "datatype": "FP64", "shape": [0, *[2**20] * 7], "parameters": {"binary_data_size": 0}},
            b"", "too long",
        ),
        ({"name": "x", "datatype": "FP32", "shape": [2]}, b"", "neither a data list"),
        ({"name": "x", "datatype": "FP32", "shape": [2], "data": [1.0]}, b"", "needs 2 values, 1 were sent"),
        ({"name": "x", "datatype": "FP32", "shape": [1], "data": ["1"]}, b"", "cannot hold text"),
        ({"name": "x", "datatype": "FP32", "shape": [1], "data": [None]}, b"", "cannot hold null"),
        ({"name": "x", "datatype": "FP32", "shape": [1], "data": [1e39]}, b"", "does not fit FP32"),
        ({"name": "x", "datatype": "INT8", "shape": [1], "data": [128]}, b"", "does not fit INT8"),
        ({"name": "x", "datatype": "INT8", "shape": [1], "data": [1.5]}, b"", "cannot hold float"),
        ({"name": "x", "datatype": "INT8", "shape": [1], "data": [True]}, b"", "cannot hold bool"),
        ({"name": "x", "datatype": "FP64", "shape": [1], "data": [10**400]}, b"", "does not fit FP64"),
        ({"name": "x", "datatype": "FP16", "shape": [1], "data": [1.0]}, b"", "no JSON form"),
        ({"name": "x", "datatype": "FP32", "shape": [2], "data": [[1.0], 2.0]}, b"", "mixes lists and values"),
        ({"name": "x", "datatype": "FP32", "shape": [1], "parameters": {"binary_data_size": 8}}, b"1234", "4 are"),
        ({"name": "x", "datatype": "FP32", "shape": [1], "parameters": {"binary_data_size": -4}}, b"", "no size"),
        ({"name": "x", "datatype": "FP32", "shape": [1], "parameters": {"binary_data_size": "4"}}, b"", "no size"),
        ({"name": "x", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": 4}}, b"1234", "needs 8"),
        (
            {"name": "x", "datatype": "FP32", "shape": [1], "data": [1.0], "parameters": {"binary_data_size": 4}},
            b"1234", "both JSON and binary",
        ),
        ({"name": "x", "datatype": "FP32", "shape": [1], "data": [1.0]}, b"12", "belong to no tensor"),
        ({"name": "x", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 3}}, b"\1\0\0", "more"),
        (
            {"name": "x", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 5}},
            b"\x09\0\0\0a", "ends outside",
        ),
        ({"name": "x", "datatype": "BYTES", "shape": [2], "parameters": {"binary_data_size": 4}}, b"\0\0\0\0", "2 e"),
    ],
)  # fmt: skip
def test_malformed_tensors_are_refused_with_a_reason(item: object, body: bytes, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        read_tensors([item], body)


def test_a_description_is_judged_before_its_data_are_looked_at() -> None:
    described = {"name": "x", "datatype": "FP32", "shape": [1], "data": ["no number"]}
    told: list[object] = []
    with pytest.raises(InvalidRequest, match="cannot hold text"):
        read_tensors([described], admit=lambda *what: told.append(what))
    assert told == [("x", "FP32", (1,))]

    def refuse(name: str, datatype: str, shape: tuple[int, ...]) -> None:
        raise InvalidRequest(f"{name} {datatype} {shape} is not wanted")

    with pytest.raises(InvalidRequest, match="is not wanted"):
        read_tensors([described], admit=refuse)


def test_deep_nesting_is_refused() -> None:
    data: list[object] = [1.0]
    for _ in range(12):
        data = [data]
    with pytest.raises(InvalidRequest, match="nested deeper"):
        decode_json("x", "FP32", (1,), data)


def test_a_huge_shape_allocates_nothing() -> None:
    with pytest.raises(InvalidRequest, match="bytes"):
        decode_binary("x", "FP64", (2**31, 2**31, 2**31), b"")


@given(st.binary(max_size=200), st.sampled_from(list(DATATYPES)), st.lists(st.integers(0, 9), max_size=3))
def test_random_binary_data_give_a_tensor_or_a_refusal(data: bytes, datatype: str, shape: list[int]) -> None:
    try:
        array = decode_binary("x", datatype, tuple(shape), data)
    except InvalidRequest:
        return
    assert array.shape == tuple(shape)


def test_a_wrong_shape_is_told_with_name_expected_and_given() -> None:
    check_shape("window", (-1, 128, 6), (4, 128, 6))
    with pytest.raises(InvalidRequest, match=r"'window' must have shape \[-1, 128, 6\], \[128, 6\] was given"):
        check_shape("window", (-1, 128, 6), (128, 6))


def test_arrays_name_their_datatype() -> None:
    assert datatype_of(np.zeros(1, ">f4")) == "FP32"
    assert datatype_of(np.array(["a"])) == "BYTES"
    with pytest.raises(InvalidRequest, match="complex64"):
        datatype_of(np.zeros(1, np.complex64))


def test_big_endian_arrays_are_sent_little_endian() -> None:
    assert encode_binary(Tensor("x", "INT16", np.array([1], ">i2"))) == b"\x01\x00"


def test_bytes_that_are_no_text_have_no_json_form() -> None:
    with pytest.raises(InvalidRequest, match="not UTF-8"):
        write_tensors([Tensor("s", "BYTES", np.array([b"\xff"], object))], set())
