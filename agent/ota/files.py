"""Durable files of the update state: whole or not at all, and two checked copies of what must not be lost.

A document is kept twice. A power cut between the two writes leaves the older copy older, which is never read while
the newer is sound; a damaged copy is noticed by its digest and the other one is used.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from pathlib import Path
from typing import Any

from agent.contract.artifact import canonical, sha256
from agent.contract.errors import DiskFull, StateUnreadable, StorageError

MAX_DOCUMENT_BYTES = 1024 * 1024


def write_file(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Temporary file, fsync, rename, fsync of the folder. `mode`: at most these rights, from the first moment on.

    Raises: DiskFull, StorageError.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise storage_error(error, path) from None


def sync_folder(folder: Path) -> None:
    """Make the folder's entries durable. Raises: OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Raises: DiskFull, StorageError."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise storage_error(error, folder) from None


def storage_error(error: OSError, path: Path) -> StorageError:
    """Ours for a failed read or write."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return DiskFull(f"no room to write {path}", hint="Free disk space; serving goes on.")
    return StorageError(f"cannot use {path}: {error.strerror}", hint="Check the disk and the folder's rights.")


def write_document(path: Path, document: Any) -> None:
    """Keep a JSON-able document in two copies. Raises: DiskFull, StorageError."""
    body = canonical(document)
    data = canonical({"sha256": sha256(body), "document": document})
    write_file(path, data)
    write_file(_copy(path), data)


def read_document(path: Path) -> Any:
    """The newest sound copy; None when there never was one.

    Raises:
        StateUnreadable: there was one and no copy is sound.
    """
    present = [place for place in (path, _copy(path)) if place.exists()]
    for place in present:
        document = _sound(place)
        if document is not None:
            return document
    if present:
        raise StateUnreadable(
            f"{path} and its copy are damaged",
            hint="Nothing is installed until a person has looked; serving goes on.",
        )
    return None


def _copy(path: Path) -> Path:
    return path.with_name(f"{path.stem}.copy{path.suffix}")


def _sound(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            outer = json.loads(file.read(MAX_DOCUMENT_BYTES))
        document = outer["document"]
        return document if sha256(canonical(document)) == outer["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
