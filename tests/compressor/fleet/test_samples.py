from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.contract.errors import Corrupt, TooLarge
from compressor.fleet.samples import Shape, read_recordings
from tests.compressor.fleet.doubles import recording

SHAPE = Shape(length=128, channels=6, labels=7, ranges=((-16.0, 16.0),) * 6)
MANY = 1 << 24


def read(tmp_path: Path, data: bytes, shape: Shape = SHAPE, *, max_bytes: int = MANY) -> Any:
    path = tmp_path / "upload.part"
    path.write_bytes(data)
    return read_recordings(path, shape, max_bytes=max_bytes)


def windows(**changes: Any) -> np.ndarray:
    array = np.zeros((12, 128, 6), np.float32)
    for place, value in changes.items():
        array[tuple(int(part) for part in place.lstrip("_").split("_"))] = value
    return array


def test_a_recording_is_counted(tmp_path: Path) -> None:
    found = read(tmp_path, recording(12))
    assert (found.rows, found.recordings, found.labels) == (12, 2, (2, 2, 2, 2, 2, 1, 1))


def test_a_service_nobody_described_takes_any_shape(tmp_path: Path) -> None:
    found = read(tmp_path, recording(windows=np.zeros((12, 5, 2), np.float32)), Shape())
    assert found.rows == 12


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"windows": windows(_0_0_0=np.nan)}, "not finite"),
        ({"windows": windows(_3_5_1=np.inf)}, "not finite"),
        ({"windows": windows() + 100}, "outside the sensors"),
        ({"windows": windows(_0_0_0=1e9)}, "no sensor's"),
        ({"windows": np.zeros((12, 64, 6), np.float32)}, "64 long"),
        ({"windows": np.zeros((12, 128, 3), np.float32)}, "3 channels wide"),
        ({"windows": np.zeros((12, 128), np.float32)}, "must be"),
        ({"windows": np.zeros((12, 128, 6), np.int32)}, "must be"),
        ({"windows": np.zeros((0, 128, 6), np.float32)}, "0 rows"),
        ({"labels": np.zeros(11, np.int8)}, "'labels' must be 12"),
        ({"labels": np.zeros(12, np.float32)}, "'labels' must be 12"),
        ({"labels": np.full(12, 7, np.int8)}, "labels must be 0 to 6"),
        ({"labels": np.full(12, -1, np.int8)}, "labels must be 0 to 6"),
        ({"recordings": np.zeros((12, 2), np.int8)}, "'recordings'"),
        ({"labels": np.array(["a"] * 12)}, "not numbers"),
        ({"labels": np.array([{}] * 12, dtype=object)}, "not numbers"),
    ],
)
def test_poisoned_recordings_are_refused_with_a_sentence(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(Corrupt, match=words):
        read(tmp_path, recording(**changes))


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\x80\x04K*.", pickle.dumps([1]), recording()[:500]])
def test_what_is_no_npz_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(Corrupt):
        read(tmp_path, data)


def test_a_missing_array_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, windows=windows())
    with pytest.raises(Corrupt, match="no readable npz"):
        read(tmp_path, buffer.getvalue())


def test_a_file_that_unpacks_to_more_than_allowed_is_not_unpacked(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, windows=np.zeros((2000, 128, 6), np.float32), labels=np.zeros(2000, np.int8),
                        recordings=np.zeros(2000, np.int8))  # fmt: skip
    assert len(buffer.getvalue()) < 30_000
    with pytest.raises(TooLarge, match="unpacks to"):
        read(tmp_path, buffer.getvalue(), max_bytes=100_000)


def test_a_header_that_promises_more_than_there_is_is_refused(tmp_path: Path) -> None:
    member = io.BytesIO()
    np.lib.format.write_array_header_1_0(member, {"descr": "<f4", "fortran_order": False, "shape": (10**9, 128, 6)})
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("windows.npy", member.getvalue())
        archive.writestr("labels.npy", member.getvalue())
        archive.writestr("recordings.npy", member.getvalue())
    with pytest.raises(Corrupt, match="does not hold"):
        read(tmp_path, buffer.getvalue())


def test_many_members_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Corrupt, match="members"):
        read(tmp_path, recording(**{f"x{i}": np.zeros(1) for i in range(20)}))
