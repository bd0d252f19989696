"""Answers to a person's files, row by row and as files themselves: .npz, .csv or .jsonl, never half of one."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agent.contract.errors import DiskFull, InvalidRequest
from agent.contract.tensors import Array

FORMATS = ("npz", "csv", "jsonl")


@dataclass(frozen=True, slots=True)
class Piece:
    """Outputs of some rows of one file, and who gave them. `rows`: None = the model knows no rows."""

    rows: int | None
    outputs: dict[str, Array]
    served_by: str
    reason: str
    guard: str


def answers(file: Path, pieces: Sequence[Piece], labels: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One dictionary per row: file, row, who answered and why, label ("" without labels) and output values."""
    number, by_row = 0, _by_row(pieces)
    for piece in pieces:
        for row in range(1 if piece.rows is None else piece.rows):
            values = {
                name: (_of_row(array, row) if name in by_row else array).tolist()
                for name, array in piece.outputs.items()
            }
            told = {"served_by": piece.served_by, "reason": piece.reason, "guard": piece.guard}
            named = {"label": _label(values, labels), "outputs": _as_text(values)}
            yield {"file": str(file), "row": number, **told, **named}
            number += 1


def as_json(answer: Any) -> str:
    """One line. JSON knows no NaN and no infinity: they are null."""
    return json.dumps(_with_nulls(answer), allow_nan=False)


def plan_outputs(files: Sequence[Path], folder: Path, form: str) -> dict[Path, Path]:
    """Where the answers of each file go: its name with another ending, in `folder`.

    Raises:
        InvalidRequest: two files would share one, or one would overwrite what is read.
    """
    planned = {file: folder / f"{file.stem}.{form}" for file in files}
    taken: dict[Path, Path] = {}
    read = {file.resolve() for file in files}
    for file, target in planned.items():
        if target in taken:
            hint = "Rename one, or answer them one after the other."
            raise InvalidRequest(f"{taken[target]} and {file} would both be answered in {target}", hint=hint)
        if target.resolve() in read:
            raise InvalidRequest(f"{target} is an input itself", hint="Choose another folder with --out.")
        taken[target] = file
    return planned


def write_outputs(target: Path, file: Path, pieces: Sequence[Piece], labels: Sequence[str]) -> None:
    """Write the answers of `file` in the format of `target`'s ending; an interruption leaves the old file or none.

    Raises:
        DiskFull: it could not be written.
        InvalidRequest: its format cannot hold these answers.
    """
    content = {".npz": _npz, ".csv": _csv, ".jsonl": _jsonl}[target.suffix](file, pieces, labels)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(target)
    except OSError as error:
        raise DiskFull(f"cannot write {target}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _npz(file: Path, pieces: Sequence[Piece], labels: Sequence[str]) -> bytes:
    """The outputs by name, rows joined, and `ew_served_by`, `ew_guard`, `ew_label` of each row."""
    told = list(answers(file, pieces, labels))
    whole = pieces[0].outputs if pieces[0].rows is None else _joined(file, pieces)
    for key in ("served_by", "guard", "label"):
        whole[f"ew_{key}"] = np.array([answer[key] for answer in told], np.str_)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:  # not np.savez, which takes no array named "file"
        for name, array in whole.items():
            plain = np.array(_as_text(array.tolist()), np.str_) if array.dtype.kind == "O" else array
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, plain, allow_pickle=False)
    return buffer.getvalue()


def _csv(file: Path, pieces: Sequence[Piece], labels: Sequence[str]) -> bytes:
    """A heading, then a line per row; an output of several numbers has several columns, name[0], name[1]..."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    for answer in answers(file, pieces, labels):
        values = {name: list(_flat(value)) for name, value in answer["outputs"].items()}
        if not answer["row"]:
            columns = [
                f"{name}[{place}]" if isinstance(answer["outputs"][name], list) else name
                for name, flat in values.items()
                for place in range(len(flat))
            ]
            writer.writerow(["row", "label", "served_by", "guard", *columns])
        told = [answer["row"], answer["label"], answer["served_by"], answer["guard"]]
        writer.writerow([*told, *(one for flat in values.values() for one in flat)])
    return text.getvalue().encode()


def _jsonl(file: Path, pieces: Sequence[Piece], labels: Sequence[str]) -> bytes:
    return "".join(as_json(answer) + "\n" for answer in answers(file, pieces, labels)).encode()


def _joined(file: Path, pieces: Sequence[Piece]) -> dict[str, Array]:
    """Raises: InvalidRequest: an output has another shape in each piece."""
    by_row = _by_row(pieces)
    try:
        return {
            name: np.concatenate([piece.outputs[name] if name in by_row else piece.outputs[name][None]
                                  for piece in pieces])
            for name in pieces[0].outputs
        }  # fmt: skip
    except ValueError as error:
        raise InvalidRequest(f"the answers to {file} do not join: {error}", hint="Use --format jsonl.") from None


def _by_row(pieces: Sequence[Piece]) -> set[str]:
    """Outputs with a row for each row asked, in every piece; any other belongs to each of them as it is."""
    names = set(pieces[0].outputs) if pieces else set()
    for piece in pieces:
        names = {name for name in names if (array := piece.outputs[name]).ndim and len(array) == piece.rows}
    return names


def _of_row(array: Array, row: int) -> Array:
    return array[row : row + 1].reshape(array.shape[1:])


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for one in value:
            yield from _flat(one)
    else:
        yield value


def _as_text(value: Any) -> Any:
    """BYTES as text, which JSON and CSV can hold."""
    if isinstance(value, dict):
        return {name: _as_text(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_as_text(one) for one in value]
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _with_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_nulls(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_with_nulls(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _label(values: dict[str, Any], labels: Sequence[str]) -> str:
    fitting = [value for value in values.values() if isinstance(value, list) and len(value) == len(labels) > 0]
    return labels[max(range(len(labels)), key=fitting[0].__getitem__)] if fitting else ""
