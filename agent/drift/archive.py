"""Named arrays as one npz that any numpy can open: the same content is the same bytes, and reading is strict.

Members are stored, never compressed, and read without numpy's own loader: sizes, types and shapes are checked
before a single array is made, and nothing is ever unpickled.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from agent.contract.errors import Corrupt

HINT: Final = "The artifact must be built again."
MAX_MEMBERS: Final = 256
_EPOCH: Final = (1980, 1, 1, 0, 0, 0)

Array = NDArray[Any]


def dump_arrays(members: Mapping[str, Array]) -> bytes:
    """The bytes of an npz, members in the order of their names."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(members):
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", _EPOCH), _npy_bytes(members[name]))
    return buffer.getvalue()


def load_arrays(raw: bytes, *, needed: Iterable[str], what: str) -> dict[str, Array]:
    """All arrays of an npz, each within the bytes that are really there. `what`: the file's name in errors.

    Raises:
        Corrupt: unreadable, a member compressed, doubled or not what its header says, or one `needed` missing.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            names = [entry.filename for entry in archive.infolist()]
            expected = {f"{name}.npy" for name in needed}
            if len(names) != len(set(names)) or len(names) > MAX_MEMBERS or not expected <= set(names):
                raise Corrupt(f"{what} does not hold the arrays it should", hint=HINT)
            return {name.removesuffix(".npy"): _member(archive, name, what, len(raw)) for name in sorted(names)}
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, NotImplementedError, RuntimeError, OSError) as error:
        raise Corrupt(f"{what} is not a readable npz: {error}", hint=HINT) from None


def _npy_bytes(array: Array) -> bytes:
    buffer = io.BytesIO()
    npy.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _member(archive: zipfile.ZipFile, name: str, what: str, limit: int) -> Array:
    entry = archive.getinfo(name)
    # stored only: a compressed member could unpack to any size
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > limit:
        raise Corrupt(f"{what}: {name} is compressed or too large", hint=HINT)
    try:
        return _parse_npy(archive.read(name))
    except (ValueError, SyntaxError, TypeError, OverflowError) as error:
        raise Corrupt(f"{what}: {name}: {error}", hint=HINT) from None


def _parse_npy(raw: bytes) -> Array:
    """An array over exactly the bytes its header describes. Raises: ValueError and what numpy's header gives."""
    file = io.BytesIO(raw)
    if npy.read_magic(file) != (1, 0):
        raise ValueError("unknown npy version")
    shape, fortran, kind = npy.read_array_header_1_0(file)
    content = file.read()
    if fortran or kind.hasobject or len(content) != math.prod(shape) * kind.itemsize:
        raise ValueError(f"header says {shape} {kind} for {len(content)} bytes")
    return np.frombuffer(content, dtype=kind).reshape(shape)
