"""Recordings a device uploads: read without trusting a byte of them, or refused with a sentence.

An .npz with `windows` (rows, length, channels) float32, `labels` (rows,) int8 and `recordings` (rows,) int8 or
wider. Nothing is unpickled; nothing larger than the upload's bound is ever unpacked; a value that is not finite or
far outside the sensor's range refuses the whole file: a training must not meet it.
Leaves to others: whether a label is true. That is what the pipeline's gates on old data are for.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from agent.contract.errors import Corrupt, TooLarge

MEMBERS = ("windows", "labels", "recordings")
MAX_ROWS = 100_000
MAX_MEMBERS = 8
LARGEST_VALUE = 1e6  # of a sensor whose range nobody declared
OUT_OF_RANGE = 0.01  # share of values outside the declared range that a real sensor may show


@dataclass(frozen=True, slots=True)
class Shape:
    """What a service's recordings must look like; None = not known. `ranges`: (minimum, maximum) per channel."""

    length: int | None = None
    channels: int | None = None
    labels: int | None = None
    ranges: tuple[tuple[float, float], ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Recordings:
    rows: int
    recordings: int
    labels: tuple[int, ...]  # rows per label


def read_recordings(path: Path, shape: Shape, *, max_bytes: int) -> Recordings:
    """Check one upload.

    Raises:
        TooLarge: it would unpack to more than `max_bytes`.
        Corrupt: not an npz, an array is missing, of the wrong type or shape, or a value is impossible.
    """
    _, labels, recordings = load_recordings(path, shape, max_bytes=max_bytes)
    counts = tuple(np.bincount(labels.astype(np.int64)).tolist())
    return Recordings(rows=len(labels), recordings=len(np.unique(recordings)), labels=counts)


def load_recordings(path: Path, shape: Shape, *, max_bytes: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """One upload, checked: windows (rows, length, channels), labels (rows,), recordings (rows,).

    Raises: as `read_recordings`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            windows, labels, recordings = (_member(archive, name, max_bytes) for name in MEMBERS)
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        raise Corrupt(f"the recording is no readable npz: {' '.join(str(error).split())[:200]}") from None
    _check(windows, labels, recordings, shape)
    return windows, labels, recordings


def _member(archive: zipfile.ZipFile, name: str, max_bytes: int) -> NDArray[Any]:
    if len(archive.infolist()) > MAX_MEMBERS:
        raise Corrupt(f"the recording has {len(archive.infolist())} members, at most {MAX_MEMBERS} are read")
    info = archive.getinfo(f"{name}.npy")
    if info.file_size > max_bytes:
        raise TooLarge(f"'{name}' of the recording unpacks to {info.file_size} bytes, at most {max_bytes} are read")
    with archive.open(info) as member:
        # a member may unpack to more than its directory entry says
        data = member.read(info.file_size + 1)
    if len(data) != info.file_size:
        raise Corrupt(f"'{name}' of the recording is not as long as it says")
    return _array(data, name)


def _array(data: bytes, name: str) -> NDArray[Any]:
    """An npy member. Type and shape are looked at before the array is made."""
    stream = io.BytesIO(data)
    version = npy.read_magic(stream)
    reader = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = reader(stream)
    if dtype.hasobject or dtype.kind not in "fiu":
        raise Corrupt(f"'{name}' of the recording holds {dtype}, not numbers")
    count = int(np.prod(shape, dtype=np.int64))
    if len(data) - stream.tell() != count * dtype.itemsize:
        raise Corrupt(f"'{name}' of the recording does not hold the {shape} it says")
    flat = np.frombuffer(data, dtype=dtype, offset=stream.tell())
    return flat.reshape(shape, order="F" if fortran else "C")


def _check(windows: NDArray[Any], labels: NDArray[Any], recordings: NDArray[Any], shape: Shape) -> None:
    if windows.ndim != 3 or windows.dtype.kind != "f":
        raise Corrupt(f"'windows' must be (rows, length, channels) of floats, not {windows.shape} {windows.dtype}")
    rows, length, channels = windows.shape
    if not 0 < rows <= MAX_ROWS:
        raise Corrupt(f"a recording of {rows} rows; 1 to {MAX_ROWS} are read")
    for what, measured, wanted in (("long", length, shape.length), ("channels wide", channels, shape.channels)):
        if wanted is not None and measured != wanted:
            raise Corrupt(f"windows are {measured} {what}, the model takes {wanted}")
    for name, values in (("labels", labels), ("recordings", recordings)):
        if values.shape != (rows,) or values.dtype.kind not in "iu":
            raise Corrupt(f"'{name}' must be {rows} whole numbers, not {values.shape} {values.dtype}")
    _check_values(windows, shape)
    most = shape.labels if shape.labels is not None else 1000
    if labels.min() < 0 or labels.max() >= most:
        raise Corrupt(f"labels must be 0 to {most - 1}, found {labels.min()} to {labels.max()}")


def _check_values(windows: NDArray[Any], shape: Shape) -> None:
    if not np.isfinite(windows).all():
        raise Corrupt("the recording holds values that are not finite")
    if shape.ranges and len(shape.ranges) == windows.shape[2]:
        low, high = np.array(shape.ranges).T
        share = float(((windows < low) | (windows > high)).mean())
        if share > OUT_OF_RANGE:
            raise Corrupt(f"{share:.0%} of the values lie outside the sensors' ranges")
    if float(np.abs(windows).max()) > LARGEST_VALUE:
        raise Corrupt(f"a value of {np.abs(windows).max():.3g} is no sensor's")
