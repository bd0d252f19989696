"""Recordings of newcomers, as devices uploaded them: read without trust, cut into the roles of a regeneration.

A device uploads windows in time order, and consecutive windows overlap. They are joined to the signal they were cut
from, so that a recording's first half can train and its second half can judge, with no sample in both.
Leaves to others: whether a label is true. That is what gates on old and new rows are for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agent.contract.artifact import canonical, sha256, sha256_file
from agent.contract.errors import Corrupt, TooLarge
from compressor.corruptions import Windows
from compressor.errors import DataError
from compressor.fleet.samples import Shape, load_recordings
from compressor.task import Role, Rows, Task, TaskData

MAX_FILES = 256
MAX_FILE_BYTES = 256 * 1024 * 1024
MAX_ROWS = 50_000  # of all files together


@dataclass(frozen=True, slots=True)
class Source:
    """One device's file. `rows`: windows in it; `train`, `reference`: windows cut from its two halves."""

    device: str
    sha256: str
    rows: int
    train: int
    reference: int


@dataclass(frozen=True, slots=True)
class Enrolment:
    """Newcomers' rows: `train` of the first half of each recording, `reference` of the second.

    `swapped` is the same recordings with the halves exchanged; `left_out`: sentences about files too short to use.
    """

    sources: tuple[Source, ...]
    train: Rows
    reference: Rows
    left_out: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """Digest of the files that were read, whatever their order."""
        return sha256(canonical(sorted([source.device, source.sha256] for source in self.sources)))


@dataclass(frozen=True, slots=True)
class Halves:
    """Both ways of using the halves: as they ship, and exchanged."""

    straight: Enrolment
    swapped: Enrolment


def read_enrolment(folder: Path, task: Task, data: TaskData) -> Halves:
    """Every `<device>.npz` of a folder, cut into roles. Ids of recordings and sources differ from all in `data`.

    Raises:
        DataError: no file, too many, or one that is not a recording for this task; it is named.
    """
    shape = Shape(
        length=task.window.length, channels=len(task.channels), labels=len(task.labels),
        ranges=tuple((channel.minimum, channel.maximum) for channel in task.channels),
    )  # fmt: skip
    uploads = [_read(path, shape) for path in _files(folder)]
    total = sum(len(upload.labels) for upload in uploads)
    if total > MAX_ROWS:
        raise DataError(f"the recordings in {folder} hold {total} windows, at most {MAX_ROWS} are read")
    recording = 1 + max(int(rows.recordings.max(initial=0)) for rows in data.rows.values())
    first_source = 1 + max(int(rows.sources.max(initial=0)) for rows in data.rows.values())
    pieces: list[tuple[_Upload, _Recordings]] = []
    for source, upload in enumerate(uploads, first_source):
        own = _recordings(upload, first=recording, source=source)
        pieces.append((upload, own))
        recording += len(own)
    return Halves(_cut(pieces, task, swapped=False), _cut(pieces, task, swapped=True))


def join(data: TaskData, enrolment: Enrolment, *, repeat: int = 1) -> TaskData:
    """The rows a regeneration works with; rows kept for the very last test are not among them.

    repeat: how often each newcomer's training row is among the training rows.
    """
    rows: dict[Role, Rows] = {role: part for role, part in data.rows.items() if role != Role.NEW_TEST}
    rows[Role.TRAIN] = concatenate([data.role(Role.TRAIN), *[enrolment.train] * repeat])
    rows[Role.CALIBRATE] = concatenate([data.role(Role.CALIBRATE), enrolment.reference])
    rows[Role.ENROL_TRAIN], rows[Role.ENROL_REFERENCE] = enrolment.train, enrolment.reference
    cut = {role.value: _digest(rows[role]) for role in (Role.TRAIN, Role.CALIBRATE)}
    digest = {"data": data.sha256, "enrolment": enrolment.sha256, **cut}
    return TaskData(sha256(canonical(digest)), rows)


def concatenate(parts: Sequence[Rows]) -> Rows:
    return Rows(
        np.concatenate([part.windows for part in parts]),
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.recordings for part in parts]),
        np.concatenate([part.sources for part in parts]),
        np.concatenate([part.starts for part in parts]),
    )


def _digest(rows: Rows) -> str:
    return sha256(np.ascontiguousarray(rows.windows).tobytes() + rows.labels.tobytes())


# --- files -------------------------------------------------------------------------------------------------
def _files(folder: Path) -> list[Path]:
    try:
        found = sorted(path for path in folder.iterdir() if path.suffix == ".npz")
    except OSError as error:
        raise DataError(
            f"cannot read the recordings in {folder}: {error.strerror}", hint="Name a folder of <device>.npz files."
        ) from None
    if not 0 < len(found) <= MAX_FILES:
        raise DataError(
            f"{folder} holds {len(found)} recordings, 1 to {MAX_FILES} are read",
            hint="Each device's recording is a file <device>.npz.",
        )
    return found


@dataclass(frozen=True, slots=True)
class _Upload:
    """One file's arrays, as `samples.load_recordings` checked them."""

    name: str
    sha256: str
    windows: Windows
    labels: NDArray[np.int64]
    recordings: NDArray[np.int64]


def _read(path: Path, shape: Shape) -> _Upload:
    try:
        digest = sha256_file(path)
        windows, labels, recordings = load_recordings(path, shape, max_bytes=MAX_FILE_BYTES)
    except (Corrupt, TooLarge, OSError) as error:
        raise DataError(
            f"{path.name} is refused: {error}", hint="Remove the file, or ask the device for another recording."
        ) from None
    return _Upload(
        path.stem, digest, np.ascontiguousarray(windows, np.float32), labels.astype(np.int64),
        recordings.astype(np.int64),
    )  # fmt: skip


# --- windows -> signal -> windows ----------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class _Piece:
    """Consecutive samples of one recording and label. signal: (samples, channels); `begin`: the first one's place."""

    signal: Windows
    label: int
    recording: int
    source: int
    begin: int


def hops(windows: Windows) -> NDArray[np.int64]:
    """How many samples each window lies behind the one before it; (rows - 1,). A whole window where they share none.

    The smallest hop that fits is taken: where a still signal fits several, more overlap is assumed, never less.
    """
    length = windows.shape[1]
    found = np.full(max(len(windows) - 1, 0), length, np.int64)
    # a hop fits only where the next window's first sample is met again; few places do, and those are compared whole
    meets = (windows[:-1] == windows[1:, :1]).all(axis=2)
    for row, hop in np.argwhere(meets):
        if hop < found[row] and np.array_equal(windows[row, hop:], windows[row + 1, : length - hop]):
            found[row] = hop
    return found


_Recordings = list[list[_Piece]]


def _recordings(upload: _Upload, *, first: int, source: int) -> _Recordings:
    """The signals a file's windows were cut from, recording by recording, each one's samples numbered from 0."""
    _, place, group = np.unique(upload.recordings, return_index=True, return_inverse=True)
    rows = np.argsort(group, kind="stable")
    parts = np.split(rows, np.cumsum(np.bincount(group))[:-1])
    found: _Recordings = []
    for number, part in enumerate(parts[index] for index in np.argsort(place)):
        signals = _signals(upload.windows[part], upload.labels[part])
        found.append([_Piece(signal, label, first + number, source, begin) for signal, label, begin in signals])
    return found


def _signals(windows: Windows, labels: NDArray[np.int64]) -> Iterator[tuple[Windows, int, int]]:
    """Windows joined as far as they overlap and bear one label: (samples, label, place of the first sample)."""
    length = windows.shape[1]
    steps = hops(windows)
    places = np.concatenate([[0], np.cumsum(steps)])
    ends = [*np.flatnonzero((steps == length) | (np.diff(labels) != 0)).tolist(), len(windows) - 1]
    begin = 0
    for end in ends:
        new = [windows[row, length - steps[row - 1] :] for row in range(begin + 1, end + 1)]
        yield np.concatenate([windows[begin], *new]), int(labels[begin]), int(places[begin])
        begin = end + 1


def _cut(uploads: Sequence[tuple[_Upload, _Recordings]], task: Task, *, swapped: bool) -> Enrolment:
    sources, train, reference, left_out = [], [], [], []
    for upload, recordings in uploads:
        trains = _half(recordings, task.window.length, max(1, task.window.hop // 2), second=swapped)
        judges = _half(recordings, task.window.length, task.window.hop, second=not swapped)
        rows = len(upload.labels)
        if not trains or not judges:
            left_out.append(
                f"{upload.name}.npz: {rows} windows are too few to train on one half and judge by the other"
            )
            continue
        sources.append(Source(upload.name, upload.sha256, rows, len(trains), len(judges)))
        train += trains
        reference += judges
    if not sources:
        raise DataError("no recording is long enough: " + "; ".join(left_out), hint="Ask for longer recordings.")
    return Enrolment(tuple(sources), _rows(train), _rows(reference), tuple(left_out))


_Cut = tuple[Windows, _Piece, int]


def _half(recordings: _Recordings, length: int, hop: int, *, second: bool) -> list[_Cut]:
    """Windows that lie wholly in one half of their recording's samples."""
    found = []
    for pieces in recordings:
        end = pieces[-1].begin + len(pieces[-1].signal)
        low, high = (end // 2, end) if second else (0, end // 2)
        for piece in pieces:
            first, last = max(low - piece.begin, 0), min(high - piece.begin, len(piece.signal)) - length
            found += [(piece.signal[at : at + length], piece, piece.begin + at) for at in range(first, last + 1, hop)]
    return found


def _rows(cuts: Sequence[_Cut]) -> Rows:
    return Rows(
        np.stack([window for window, _, _ in cuts]),
        np.array([piece.label for _, piece, _ in cuts], np.int64),
        np.array([piece.recording for _, piece, _ in cuts], np.int64),
        np.array([piece.source for _, piece, _ in cuts], np.int64),
        np.array([start for _, _, start in cuts], np.int64),
    )
