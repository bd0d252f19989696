"""Results of stages, kept by the content they came from. A damaged entry is the same as none.

An entry is a folder named by its key: plain files and an index with their digests, moved into place whole.
Removing any of it is always safe.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from agent.contract.artifact import canonical, sha256
from compressor.files import storage_error

INDEX = "index.json"
_PACKAGE = Path(__file__).parent
_LIBRARIES = ("numpy", "onnx", "onnxruntime", "onnxscript", "torch")


class Cache:
    """Results below one folder. Several processes may share it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str) -> dict[str, bytes] | None:
        """The files kept under `key`, every byte verified, or None."""
        place = self._place(key)
        try:
            index: dict[str, str] = json.loads((place / INDEX).read_bytes())
            files = {name: (place / name).read_bytes() for name in index}
        except (OSError, ValueError):
            return None
        return files if all(sha256(files[name]) == digest for name, digest in index.items()) else None

    def put(self, key: str, files: Mapping[str, bytes]) -> None:
        """Keep `files` under `key`.

        Raises:
            DiskFull, StorageError
        """
        place = self._place(key)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=place.parent))
            for name, data in files.items():
                (temporary / name).write_bytes(data)
            (temporary / INDEX).write_bytes(canonical({name: sha256(data) for name, data in files.items()}))
            shutil.rmtree(place, ignore_errors=True)
            os.replace(temporary, place)  # noqa: PTH105
        except OSError as error:
            raise storage_error(error, place) from error

    def _place(self, key: str) -> Path:
        return self.folder / key[:2] / key


def stage_key(stage: str, inputs: Mapping[str, object], *, sources: tuple[str, ...]) -> str:
    """Name of a stage's result: what went in, the code that ran (files below compressor/), the libraries."""
    document = {
        "stage": stage,
        "inputs": dict(inputs),
        "code": {name: hashlib.sha256((_PACKAGE / name).read_bytes()).hexdigest() for name in sorted(sources)},
        "libraries": {name: version(name) for name in _LIBRARIES},
    }
    return sha256(canonical(document))
