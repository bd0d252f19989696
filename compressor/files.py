"""Writes files whole or not at all, and arrays always as the same bytes."""

from __future__ import annotations

import errno
import io
import os
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agent.contract.errors import Corrupt, DiskFull, StorageError

EPOCH = (1980, 1, 1, 0, 0, 0)  # the zip format's first day: no clock in our bytes
MAX_ARRAY_BYTES = 256 * 1024 * 1024


def write_file(path: Path, data: bytes) -> None:
    """Temporary file, fsync, rename, fsync of the folder.

    Raises:
        DiskFull, StorageError
    """
    temporary = path.with_name(path.name + f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise storage_error(error, path) from error


def try_folder(folder: Path) -> None:
    """Make a folder and write a file in it, so that a place which cannot be written is told before the work; what
    was made is removed again.

    Raises:
        DiskFull, StorageError
    """
    made: list[Path] = []
    probe = folder / f".{os.getpid()}.probe"
    try:
        made = [part for part in (folder, *folder.parents) if not part.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"probe")
    except OSError as error:
        raise storage_error(error, folder) from error
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
        for part in made:
            with suppress(OSError):  # not reached, or another one's file is in it by now
                part.rmdir()


def storage_error(error: OSError, path: Path) -> StorageError:
    """The error of ours for a failed write."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return DiskFull(f"cannot write {path}: the disk is full", hint="Free some space and run again.")
    return StorageError(
        f"cannot write {path}: {error.strerror}", hint="Check that the folder is writable and is a folder."
    )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def dump_arrays(arrays: Mapping[str, NDArray[np.generic]]) -> bytes:
    """An uncompressed .npz whose bytes depend on the arrays alone."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(arrays):
            member = io.BytesIO()
            np.lib.format.write_array(member, np.asarray(arrays[name], order="C"), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", EPOCH), member.getvalue())
    return buffer.getvalue()


def load_arrays(data: bytes, *, where: str) -> dict[str, NDArray[np.generic]]:
    """Arrays of an .npz; nothing is unpickled.

    Raises:
        Corrupt
    """
    if len(data) > MAX_ARRAY_BYTES:
        raise Corrupt(f"{where} has {len(data)} bytes, at most {MAX_ARRAY_BYTES} are read")
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, OSError, zipfile.BadZipFile, KeyError, EOFError) as error:
        raise Corrupt(f"{where} is not an array file: {error}") from None
