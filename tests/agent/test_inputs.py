import contextlib
import io
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.contract.errors import InvalidRequest
from agent.inputs import Wanted, find_files, read_inputs, rows

WINDOW = Wanted("window", "FP32", (-1, 4, 2))


def test_arrays_get_their_row_axis_and_datatype(tmp_path: Path) -> None:
    np.save(tmp_path / "many.npy", np.ones((3, 4, 2)))
    np.save(tmp_path / "one.npy", np.ones((4, 2)))
    np.savez(tmp_path / "named.npz", window=np.ones((2, 4, 2)), other=np.zeros(1))
    for name, count in (("many.npy", 3), ("one.npy", 1), ("named.npz", 2)):
        array = read_inputs(tmp_path / name, [WINDOW])["window"]
        assert (array.shape, array.dtype) == ((count, 4, 2), np.float32)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("a,b\n1,2\n3,4\n5,6\n7,8\n", 1),
        ("1,2\n3,4\n5,6\n7,8\n\n1,2\n3,4\n5,6\n7,8\n", 2),
        ("1,2,3,4,5,6,7,8\n", 1),
    ],
)
def test_lines_of_samples_or_flattened_rows_are_cut_into_windows(tmp_path: Path, text: str, count: int) -> None:
    (tmp_path / "x.csv").write_text(text)
    array = read_inputs(tmp_path / "x.csv", [WINDOW])["window"]
    assert array.shape == (count, 4, 2)
    assert array[0].ravel().tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_byte_order_mark_is_no_heading(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"\xef\xbb\xbf1,2\n3,4\n")
    assert read_inputs(tmp_path / "x.csv", [Wanted("x", "FP32", (-1, 2))])["x"].tolist() == [[1, 2], [3, 4]]


def test_a_first_line_with_a_number_missing_is_no_heading(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"1,\n3,4\n")
    with pytest.raises(InvalidRequest, match="could not convert"):
        read_inputs(tmp_path / "x.csv", [Wanted("x", "FP32", (-1, 2))])


@pytest.mark.parametrize(
    ("datatype", "values", "fits"),
    [
        ("UINT8", [[255.0, 0.0]], True),
        ("UINT8", [[256.0, 0.0]], False),
        ("UINT8", [[-1.0, 0.0]], False),
        ("INT64", [[1.5, 0.0]], False),
        ("INT64", [[np.nan, 0.0]], False),
        ("INT64", [[2.0**63, 0.0]], False),
        ("INT8", [[1.0, -128.0]], True),
        ("BOOL", [[1.0, 0.0]], True),
        ("BOOL", [[0.5, 0.0]], False),
    ],
)
def test_whole_numbers_are_never_bent_to_fit(
    tmp_path: Path, datatype: str, values: list[list[float]], *, fits: bool
) -> None:
    np.save(tmp_path / "x.npy", np.array(values))
    wanted = [Wanted("x", datatype, (-1, 2))]
    if fits:
        assert read_inputs(tmp_path / "x.npy", wanted)["x"].tolist() == values
    else:
        with pytest.raises(InvalidRequest, match=f"numbers that are no {datatype}"):
            read_inputs(tmp_path / "x.npy", wanted)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.csv", b"1,2\n3,4\n", "takes \\[-1, 4, 2\\]. Lines of samples are cut into rows of 4: give a multiple"),
        ("x.csv", b"t,x,y\n0,1,2\n", "takes \\[-1, 4, 2\\]. -1 stands for any number of rows"),
        ("x.csv", b"1;2\n3;4\n", "separated by semicolons; commas are wanted"),
        ("x.csv", b"1,2\n3\n", "different numbers of columns"),
        ("x.csv", b"1,2\nx,y\n", "could not convert"),
        ("x.csv", b"", "different numbers of columns"),
        ("x.npy", b"not an array", "cannot read"),
        ("x.npz", b"PK not an archive", "cannot read"),
        ("x.npy", b"", "cannot read"),
    ],
)
def test_what_does_not_fit_is_named_with_the_shapes(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidRequest) as caught:
        read_inputs(tmp_path / name, [WINDOW])
    assert re.search(says, caught.value.sentence())


def archive(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def array(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


WHOLE = archive(window=np.arange(24.0).reshape(3, 4, 2))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        *(("x.npz", WHOLE[:count], "cannot read") for count in (len(WHOLE) - 30, len(WHOLE) // 2)),
        ("x.npz", WHOLE[:60] + bytes(8) + WHOLE[68:], "cannot read"),
        ("x.npy", array(np.array([["a", "b"]] * 4)), "holds <U1, input 'window' takes FP32"),
        ("x.npy", array(np.ones((4, 2), complex)), "holds complex128"),
        ("x.npy", b"\x93NUMPY\x01\x00\x46\x00{'descr': '<f8', 'fortran_order': False, 'shape': (9, 9", "cannot read"),
        ("x.npy", array(np.ones((4, 2))).replace(b"(4, 2)", b"(4, 2("), "cannot read"),
        ("x.csv", b"1,2\n\0,3\n", "cannot read"),
        ("x.csv", b"1," + b"2" * 200_000, "cannot read"),
        ("x.csv", b"\xff\xfe1,2\n", "cannot read"),
    ],
)
def test_damaged_or_foreign_files_are_said_so(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidRequest, match=says):
        read_inputs(tmp_path / name, [WINDOW])


def test_the_content_tells_an_array_from_an_archive_not_the_name(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(array(np.ones((4, 2))))
    (tmp_path / "x.npy").write_bytes(WHOLE)
    for name, count in (("x.npz", 1), ("x.npy", 3)):
        assert len(read_inputs(tmp_path / name, [WINDOW])["window"]) == count


@given(cuts=st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=4))
def test_no_damage_of_an_archive_ends_in_a_foreign_error(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[tuple[int, int]]
) -> None:
    raw = bytearray(WHOLE)
    for at, value in cuts:
        raw[at] = value
    path = tmp_path_factory.mktemp("inputs") / "x.npz"
    path.write_bytes(raw)
    with contextlib.suppress(InvalidRequest):
        read_inputs(path, [WINDOW])


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InvalidRequest, match="pickle"):
        read_inputs(tmp_path / "x.npy", [WINDOW])


def test_a_missing_input_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", windw=np.ones((4, 2)))
    with pytest.raises(InvalidRequest, match="holds windw, the model takes window"):
        read_inputs(tmp_path / "x.npz", [WINDOW])
    np.save(tmp_path / "x.npy", np.ones((4, 2)))
    with pytest.raises(InvalidRequest, match="takes 2 inputs"):
        read_inputs(tmp_path / "x.npy", [WINDOW, WINDOW])


def test_folders_give_their_files_in_order(tmp_path: Path) -> None:
    for name in ("b.npy", "a.csv", "note.txt"):
        (tmp_path / name).write_text("")
    assert [file.name for file in find_files([tmp_path])] == ["a.csv", "b.npy"]
    with pytest.raises(InvalidRequest, match="no file or folder"):
        find_files([tmp_path / "none"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidRequest, match="no input in"):
        find_files([tmp_path / "empty"])


def test_long_inputs_are_sent_in_pieces() -> None:
    pieces = list(rows({"x": np.arange(5), "y": np.arange(5)}, 2))
    assert [len(piece["x"]) for piece in pieces] == [2, 2, 1]
    assert pieces[2]["y"].tolist() == [4]


def test_a_model_without_rows_takes_scalars_and_states_as_they_are(tmp_path: Path) -> None:
    wanted = [Wanted("state", "FP32", (2, -1, 3)), Wanted("rate", "INT64", ())]
    np.savez(tmp_path / "x.npz", state=np.zeros((2, 1, 3)), rate=np.array(16000))
    given_arrays = read_inputs(tmp_path / "x.npz", wanted)
    assert {name: array.shape for name, array in given_arrays.items()} == {"state": (2, 1, 3), "rate": ()}
    np.savez(tmp_path / "x.npz", state=np.zeros((2, 1, 3)), rate=np.array([16000]))
    with pytest.raises(InvalidRequest, match=r"shape \[1\], input 'rate' takes \[\]"):
        read_inputs(tmp_path / "x.npz", wanted)


def test_inputs_of_different_length_are_refused_and_not_cut(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", window=np.zeros((3, 4, 2)), extra=np.zeros((2, 1)))
    with pytest.raises(InvalidRequest, match="3 of window, 2 of extra"):
        read_inputs(tmp_path / "x.npz", [WINDOW, Wanted("extra", "FP32", (-1, 1))])


def test_texts_fit_an_input_of_bytes(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([["a", "ü"]]))
    array = read_inputs(tmp_path / "x.npy", [Wanted("words", "BYTES", (-1, 2))])["words"]
    assert array.tolist() == [["a", "ü"]]
    np.save(tmp_path / "y.npy", np.zeros((1, 2)))
    with pytest.raises(InvalidRequest, match="takes BYTES"):
        read_inputs(tmp_path / "y.npy", [Wanted("words", "BYTES", (-1, 2))])
