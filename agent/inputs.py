"""Files of a person's data as model inputs: .npy, .npz and .csv, checked against what the model takes."""

from __future__ import annotations

import csv
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from agent.contract.errors import InvalidRequest
from agent.contract.tensors import DATATYPES, Array

UNREADABLE = (
    OSError, ValueError, EOFError, TypeError, KeyError, RuntimeError, NotImplementedError, MemoryError, OverflowError,
    SyntaxError, tokenize.TokenError, csv.Error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""What numpy, zipfile and csv raise on bytes that are not what their name says."""
KINDS = (".npy", ".npz", ".csv")
MAX_FILE_BYTES = 1024 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Wanted:
    """One input of a model; `shape` holds -1 for a free axis; a free first axis is the rows."""

    name: str
    datatype: str
    shape: tuple[int, ...]


def find_files(paths: Sequence[Path]) -> list[Path]:
    """The files named, and those of the kinds above in the folders named, in order of name.

    Raises:
        InvalidRequest: one does not exist, or nothing fits.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(file for file in path.iterdir() if _is_input(file))
        elif path.is_file():
            found.append(path)
        else:
            raise InvalidRequest(f"there is no file or folder {path}")
    if not found:
        raise InvalidRequest(f"no input in {', '.join(map(str, paths))}", hint=f"Inputs end in {', '.join(KINDS)}.")
    return found


def read_inputs(path: Path, wanted: Sequence[Wanted]) -> dict[str, Array]:
    """The arrays of one file by input name, with a row axis and the model's datatypes.

    Raises:
        InvalidRequest: unreadable, of another shape, or an input is missing; names file and shapes.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InvalidRequest(f"{path} is larger than {MAX_FILE_BYTES} bytes")
        arrays = _load(path, wanted)
    except UNREADABLE as error:
        raise InvalidRequest(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    missing = [one.name for one in wanted if one.name not in arrays]
    if missing:
        raise InvalidRequest(f"{path} holds {', '.join(arrays) or 'nothing'}, the model takes {', '.join(missing)}")
    batched = are_rows(wanted)
    fitted = {one.name: _fit(arrays[one.name], one, path, batched=batched) for one in wanted}
    counts = {name: len(array) for name, array in fitted.items()} if batched else {}
    if len(set(counts.values())) > 1:
        text = ", ".join(f"{count} of {name}" for name, count in counts.items())
        raise InvalidRequest(f"{path} holds different numbers of rows: {text}")
    return fitted


def are_rows(wanted: Sequence[Wanted]) -> bool:
    """Whether requests are made of rows; else (a scalar, a state) a file is one request, as it is."""
    return bool(wanted) and all(one.shape[:1] in ((-1,), (1,)) for one in wanted)


def rows(inputs: dict[str, Array], at_once: int) -> Iterator[dict[str, Array]]:
    """The same inputs, all of as many rows, in pieces of at most `at_once`."""
    count = len(next(iter(inputs.values())))
    for first in range(0, count, at_once):
        yield {name: array[first : first + at_once] for name, array in inputs.items()}


def _load(path: Path, wanted: Sequence[Wanted]) -> dict[str, Array]:
    loaded = _read_csv(path) if path.suffix.lower() == ".csv" else _read_numpy(path)
    if isinstance(loaded, dict):
        return loaded
    if len(wanted) != 1:
        raise ValueError(f"the model takes {len(wanted)} inputs: give an .npz with an array for each")
    return {wanted[0].name: loaded}


def _read_numpy(path: Path) -> Array | dict[str, Array]:
    """One array, or those of an archive by name: the content tells, whatever the file is called."""
    with path.open("rb") as file:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as members:  # a few packed bytes may promise any number of unpacked ones
                unpacked = sum(member.file_size for member in members.infolist())
            if unpacked > MAX_FILE_BYTES:
                raise ValueError(f"it unpacks to more than {MAX_FILE_BYTES} bytes")
        file.seek(0)
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded as archive:
            arrays = {name: archive[name] for name in archive.files}
    return {name: array for name, array in arrays.items() if isinstance(array, np.ndarray)}


def _is_input(path: Path) -> bool:
    return path.suffix.lower() in KINDS and path.is_file()


def _read_csv(path: Path) -> Array:
    """Numbers of a comma-separated file (lines, columns); a first line of words is a heading."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines = [line for line in csv.reader(file) if any(cell.strip() for cell in line)]
    if lines and any(cell.strip() and not _is_number(cell) for cell in lines[0]):
        lines = lines[1:]
    if lines and all(len(line) == 1 and ";" in line[0] for line in lines):
        raise ValueError("its columns are separated by semicolons; commas are wanted")
    if len({len(line) for line in lines}) != 1:
        raise ValueError("its lines have different numbers of columns, or there are none")
    return np.array([[float(cell) for cell in line] for line in lines])


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _fit(array: Array, wanted: Wanted, path: Path, *, batched: bool) -> Array:
    """`array` with rows first: as it is, one row without its axis, or lines of samples cut into rows."""
    texts = wanted.datatype == "BYTES"
    if array.dtype.kind not in ("SU" if texts else "biuf"):
        raise InvalidRequest(
            f"{path} holds {array.dtype}, input '{wanted.name}' takes {wanted.datatype}",
            hint="Give texts." if texts else "Give numbers.",
        )
    shaped = _in_rows(array, wanted.shape[1:]) if batched else array if _matches(array.shape, wanted.shape) else None
    if shaped is None or not (shaped.size or not batched):
        raise InvalidRequest(
            f"{path} has the shape {list(array.shape)}, input '{wanted.name}' takes {list(wanted.shape)}",
            hint=_shape_hint(array, wanted) if batched else "",
        )
    if texts:
        return shaped.astype(np.str_).astype(object)
    with np.errstate(over="ignore", invalid="ignore"):  # what the model's datatype cannot hold becomes infinite
        fitted = np.asarray(shaped, DATATYPES[wanted.datatype], order="C")
    if not _is_same(fitted, shaped):
        raise InvalidRequest(f"{path} holds numbers that are no {wanted.datatype}, which '{wanted.name}' takes")
    return fitted


def _is_same(fitted: Array, given: Array) -> bool:
    """Whether whole numbers (and truths) are those that were given; floats may be rounded."""
    kind = fitted.dtype.kind
    if kind == "f" or fitted.dtype == given.dtype:
        return True
    beyond = 2.0 if kind == "b" else float(np.iinfo(fitted.dtype).max) + 1  # some CPUs stop at the largest instead
    return bool((fitted == given).all() and (given.dtype.kind != "f" or (given < beyond).all()))


def _in_rows(array: Array, inner: tuple[int, ...]) -> Array | None:
    if array.ndim and _matches(array.shape[1:], inner):
        return array
    if _matches(array.shape, inner):
        return array[None]
    return array.reshape(-1, *inner) if _is_lines_of(array, inner) else None


def _shape_hint(array: Array, wanted: Wanted) -> str:
    """What to do about an array that is no rows: lines of samples may only be too few or too many."""
    if len(wanted.shape) == 3 and array.ndim == 2 and array.shape[1] == wanted.shape[2] > 0 and wanted.shape[1] > 0:
        return f"Lines of samples are cut into rows of {wanted.shape[1]}: give a multiple of that."
    return "-1 stands for any number of rows."


def _is_lines_of(array: Array, inner: tuple[int, ...]) -> bool:
    """Whether (lines, columns) are samples, or whole flattened rows, that fill rows of `inner` exactly."""
    if array.ndim != 2 or not inner or min(inner) <= 0:
        return False
    whole = int(np.prod(inner))
    return array.size % whole == 0 and array.shape[1] in (inner[-1], whole)


def _matches(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return len(shape) == len(wanted) and all(want in (-1, have) for have, want in zip(shape, wanted, strict=True))
