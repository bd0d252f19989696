"""A recording a director asked for: the newest one of a folder, read and checked, then uploaded with its token.

    windows (rows, length, channels) float32 · labels (rows,) integers · recordings (rows,) integers

Promises: nothing is unpickled; a file that is too large, unpacks to too much or holds anything that is not a finite
number of the right shape never leaves the device; time and bytes are bounded. Whether recordings may leave at all
is the configuration's to say.
"""

from __future__ import annotations

import json
import ssl
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.clock import monotonic_s, sleep
from agent.contract.errors import Corrupt, TooLarge, Unavailable, Untrusted
from agent.ota import wire

MEMBERS = ("windows", "labels", "recordings")
MAX_FILES = 10_000  # looked at in the folder
UNPACKED = 8  # a file may unpack to so many times its size
UPLOAD_S = 300.0
PATIENCE_S = 180.0  # a host that is out of reach may be starting anew
FIRST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 60.0  # six tries within that time


@dataclass(frozen=True, slots=True)
class Recording:
    path: Path
    size_bytes: int
    rows: int


def find_recording(folder: Path, *, max_bytes: int, shape: tuple[int, ...] | None = None) -> Recording:
    """The newest *.npz, checked. `shape`: of one row of windows, -1 = any length; None = not known.

    Raises:
        Unavailable: there is none. TooLarge: it has more than `max_bytes`. Corrupt: it is not a sound recording.
    """
    path, size = _newest(folder)
    if size > max_bytes:
        raise TooLarge(f"the newest recording {path.name} has {size} bytes, {max_bytes} are allowed")
    return Recording(path, size, _check(path, size, shape))


def deliver(
    recording: Recording, url: str, token: str, *, tls: ssl.SSLContext | None = None, patience_s: float = PATIENCE_S
) -> dict[str, Any]:
    """`upload`, tried again while the host cannot be reached or is busy, so that its restart costs no recording.

    Raises: as `upload`.
    """
    until_s, pause_s = monotonic_s() + patience_s, FIRST_PAUSE_S
    while True:
        try:
            return upload(recording, url, token, tls=tls)
        except Unavailable:
            if monotonic_s() + pause_s > until_s:
                raise
        sleep(pause_s)
        pause_s = min(3 * pause_s, LONGEST_PAUSE_S)


def upload(recording: Recording, url: str, token: str, *, tls: ssl.SSLContext | None = None) -> dict[str, Any]:
    """PUT it to where the director said; returns the host's answer.

    Raises:
        Unavailable: the host cannot be reached or is busy. Untrusted: it does not want it.
    """
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/octet-stream"}
    try:
        with recording.path.open("rb") as file:
            status, answer = wire.send(
                "PUT", url, file, recording.size_bytes, headers=headers, until_s=monotonic_s() + UPLOAD_S, tls=tls
            )
    except OSError as error:
        raise Unavailable(f"cannot read {recording.path}: {error.strerror}") from None
    try:
        document = json.loads(answer)
    except (ValueError, RecursionError):
        document = {}
    fields = document if isinstance(document, dict) else {}
    if status in {200, 201}:
        return fields
    kind = Unavailable if status >= 500 or status in {408, 429} else Untrusted
    raise kind(f"the host answered {status} to the recording: {str(fields.get('error', ''))[:200]}")


def _newest(folder: Path) -> tuple[Path, int]:
    """The file and its size in bytes. Raises: Unavailable."""
    try:
        found = [path for path in folder.glob("*.npz") if path.is_file() and not path.is_symlink()][:MAX_FILES]
        newest = max(found, key=lambda path: (path.stat().st_mtime_ns, path.name))
        return newest, newest.stat().st_size
    except OSError as error:
        raise Unavailable(f"cannot look for recordings in {folder}: {error.strerror}") from None
    except ValueError:
        raise Unavailable(f"there is no recording in {folder}") from None


def _check(path: Path, size: int, shape: tuple[int, ...] | None) -> int:
    """Rows of a sound recording. Raises: Corrupt."""
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(info.file_size for info in archive.infolist()) > UNPACKED * size + 65536:
                raise Corrupt(f"{path.name} unpacks to more than a recording can")
        with np.load(path, allow_pickle=False) as arrays:
            windows, labels, recordings = (arrays[name] for name in MEMBERS)
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        raise Corrupt(f"{path.name} is no recording: {' '.join(str(error).split())[:200]}") from None
    if windows.ndim != 3 or windows.dtype.kind != "f" or not len(windows):
        raise Corrupt(f"{path.name}: windows are {windows.dtype} {windows.shape}, not rows of finite numbers")
    if shape is not None and any(want not in {-1, is_} for want, is_ in zip(shape, windows.shape[1:], strict=True)):
        raise Corrupt(f"{path.name}: windows are {windows.shape[1:]}, the model takes {shape}")
    for name, values in (("labels", labels), ("recordings", recordings)):
        if not _are_integers(values, len(windows)):
            raise Corrupt(f"{path.name}: '{name}' must be {len(windows)} whole numbers")
    if not np.isfinite(windows).all():
        raise Corrupt(f"{path.name} holds values that are not finite")
    return len(windows)


def _are_integers(values: NDArray[Any], rows: int) -> bool:
    return values.shape == (rows,) and values.dtype.kind in "iu"
