from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from agent.contract.errors import Corrupt, StorageError
from compressor.files import dump_arrays, load_arrays, try_folder, write_file


def test_arrays_become_the_same_bytes_whatever_their_order() -> None:
    one, two = np.arange(6, dtype=np.float32).reshape(2, 3), np.array(0.5)
    assert dump_arrays({"a": one, "b": two}) == dump_arrays({"b": two, "a": one})


def test_arrays_come_back_with_type_and_shape() -> None:
    given = {"a": np.arange(6, dtype=np.int16).reshape(2, 3), "scalar": np.array(0.5), "turned": np.ones((2, 3)).T}
    back = load_arrays(dump_arrays(given), where="here")
    for name, array in given.items():
        assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape)
        assert np.array_equal(back[name], array)


def test_a_pickle_is_not_opened() -> None:
    import io

    buffer = io.BytesIO()
    np.savez(buffer, a=np.array([{"evil": 1}], dtype=object))
    with pytest.raises(Corrupt):
        load_arrays(buffer.getvalue(), where="a file")
    with pytest.raises(Corrupt):
        load_arrays(b"no zip", where="a file")


def test_a_file_is_written_whole_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    write_file(tmp_path / "deep" / "file", b"one")
    write_file(tmp_path / "deep" / "file", b"two")
    assert [(path.name, path.read_bytes()) for path in (tmp_path / "deep").iterdir()] == [("file", b"two")]


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        write_file(tmp_path / "file" / "below", b"")


def test_trying_a_folder_leaves_everything_as_it_was(tmp_path: Path) -> None:
    try_folder(tmp_path / "deep" / "deeper")
    assert not list(tmp_path.iterdir())
    (tmp_path / "kept").write_text("")
    try_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_folder_that_cannot_be_made_is_told_and_its_parents_are_not_left(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "new" / ("x" * 300)):
        with pytest.raises(StorageError, match="cannot write"):
            try_folder(place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
