"""What the monitor compares a stream with: made once by the compressor, carried as `reference.npz`.

The file is an ordinary npz (a zip of npy members, none compressed) that any numpy can open. It is written
byte for byte the same for the same content, and read without numpy's own loader: sizes, types and shapes are
checked before a single array is made, and nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from agent.contract.errors import Corrupt, TooLarge
from agent.drift.windows import FixedPoint

FORMAT: Final = 1
MAX_REFERENCE_BYTES: Final = 512 * 1024
MAX_FEATURES: Final = 128
MAX_REGIMES: Final = 512
_EPOCH: Final = (1980, 1, 1, 0, 0, 0)
_HINT: Final = "The artifact must be built again."

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Claim:
    """How often the monitor cries wolf, in words that are true: measured, not derived.

    `alarms` in `replayed_rows` rows (`distinct_rows` different windows, held out from the reference, in
    `orders` orders of their recordings). `rows_per_alarm`: with `confidence`, one false alarm per at least
    that many rows; 0 = nothing is claimed.
    """

    rows_per_alarm: int
    replayed_rows: int
    distinct_rows: int
    orders: int
    alarms: int
    confidence: float
    text: str

    def declared_budget(self, rows: int) -> int | None:
        """Alarms the claim allows for `rows` rows of an unchanged stream; None when nothing is claimed."""
        return -(-rows // self.rows_per_alarm) if self.rows_per_alarm else None


@dataclass(frozen=True, slots=True)
class Detectability:
    """One line of the detectability card. `median_delay_rows` is None when most runs never found it.

    `found_share`: found within 60 rows; `named_share`: of the found, the first named channel was touched.
    """

    fault: str
    runs: int
    median_delay_rows: float | None
    found_share: float
    named_share: float | None


@dataclass(frozen=True, slots=True)
class GuardStatistics:
    """What clean windows look like to the guard; per channel name, per group name."""

    group_rms: dict[str, tuple[float, float]]
    channel_mean: dict[str, float]
    channel_range: dict[str, tuple[float, float]]


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """features, channels, labels: names in order. groups: channel -> sensor group.

    Arrays, float32 unless said: centre, scale (features,) of all reference rows; regime_means (regimes,
    features); covariance (features, features) pooled within recordings; class_means (labels, features) and
    class_covariance of the predicted classes; naming_scale (channels,); allowance (1 + channels,); class_share
    (labels,); channel_of (features,) int16. `threshold` and `score_cap` are in units of the score.
    """

    features: tuple[str, ...]
    channels: tuple[str, ...]
    groups: dict[str, str]
    labels: tuple[str, ...]
    channel_of: Array
    centre: Array
    scale: Array
    regime_means: Array
    covariance: Array
    class_means: Array
    class_covariance: Array
    class_share: Array
    naming_scale: Array
    allowance: Array
    threshold: float
    score_cap: float
    rows: int
    guard: GuardStatistics
    claim: Claim
    detectability: tuple[Detectability, ...] = ()
    settings: dict[str, float] = field(default_factory=dict)

    def fixed_point(self) -> FixedPoint:
        """How rows of this view become integers in drift windows."""
        return FixedPoint(tuple(map(float, self.centre)), tuple(map(float, self.scale)))

    def digest(self) -> str:
        """sha256 of the file this reference is written as."""
        return hashlib.sha256(dump_reference(self)).hexdigest()


_ARRAYS: Final = tuple(one.name for one in fields(Reference) if one.type == "Array")
_NUMBERS: Final = ("threshold", "score_cap", "rows")


def dump_reference(reference: Reference) -> bytes:
    """The bytes of `reference.npz`; the same reference is always the same bytes."""
    about = {
        "format": FORMAT,
        "features": reference.features,
        "channels": reference.channels,
        "groups": reference.groups,
        "labels": reference.labels,
        "guard": asdict(reference.guard),
        "claim": asdict(reference.claim),
        "detectability": [asdict(line) for line in reference.detectability],
        "settings": {name: float(value) for name, value in reference.settings.items()},
        **{name: getattr(reference, name) for name in _NUMBERS},
    }
    text = json.dumps(about, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    members = {"about": np.frombuffer(text, dtype=np.uint8)}
    members |= {name: _stored(name, getattr(reference, name)) for name in _ARRAYS}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(members):
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", _EPOCH), _npy_bytes(members[name]))
    return buffer.getvalue()


def load_reference(source: Path | bytes) -> Reference:
    """Read a reference from its file or its bytes.

    Raises:
        TooLarge: over MAX_REFERENCE_BYTES.
        Corrupt: unreadable, or anything in it is not what a reference holds.
    """
    raw = source if isinstance(source, bytes) else _read(source)
    if len(raw) > MAX_REFERENCE_BYTES:
        raise TooLarge(f"reference of {len(raw)} bytes is over {MAX_REFERENCE_BYTES}", hint=_HINT)
    members = _members(raw)
    try:
        reference = _assemble(members)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise Corrupt(f"reference.npz: {type(error).__name__}: {error}", hint=_HINT) from None
    _check(reference)
    return reference


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_REFERENCE_BYTES + 1)
    except OSError as error:
        raise Corrupt(f"cannot read {path}: {error.strerror}", hint="The artifact is incomplete.") from None


def _stored(name: str, array: Array) -> Array:
    kind = np.int16 if name == "channel_of" else np.float32
    return np.ascontiguousarray(array, dtype=np.dtype(kind).newbyteorder("<"))


def _npy_bytes(array: Array) -> bytes:
    buffer = io.BytesIO()
    npy.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _members(raw: bytes) -> dict[str, Array]:
    """The arrays of an npz, each within the bytes that are really there."""
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            names = [entry.filename for entry in archive.infolist()]
            expected = {f"{name}.npy" for name in ("about", *_ARRAYS)}
            if len(names) != len(set(names)) or not expected <= set(names):
                raise Corrupt("reference.npz does not hold the arrays of a reference", hint=_HINT)
            return {name.removesuffix(".npy"): _member(archive, name) for name in sorted(expected)}
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, NotImplementedError, RuntimeError, OSError) as error:
        raise Corrupt(f"reference.npz is not a readable npz: {error}", hint=_HINT) from None


def _member(archive: zipfile.ZipFile, name: str) -> Array:
    entry = archive.getinfo(name)
    # stored only: a compressed member could unpack to any size
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > MAX_REFERENCE_BYTES:
        raise Corrupt(f"reference.npz: {name} is compressed or too large", hint=_HINT)
    try:
        return _parse_npy(archive.read(name))
    except (ValueError, SyntaxError, TypeError, OverflowError) as error:
        raise Corrupt(f"reference.npz: {name}: {error}", hint=_HINT) from None


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


def _assemble(members: Mapping[str, Array]) -> Reference:
    if members["about"].dtype != np.uint8:
        raise ValueError("about is not text")
    about = json.loads(members["about"].tobytes())
    if about["format"] != FORMAT:
        raise ValueError(f"format {about['format']}, this agent reads {FORMAT}")
    for name in _ARRAYS:
        if members[name].dtype != _stored(name, np.zeros(0)).dtype:
            raise ValueError(f"{name} is {members[name].dtype}")
    return Reference(
        features=_names(about["features"]),
        channels=_names(about["channels"]),
        groups={str(channel): str(group) for channel, group in about["groups"].items()},
        labels=_names(about["labels"]),
        threshold=float(about["threshold"]),
        score_cap=float(about["score_cap"]),
        rows=int(about["rows"]),
        guard=_guard(about["guard"]),
        claim=_claim(about["claim"]),
        detectability=tuple(_detectability(line) for line in about["detectability"]),
        settings={str(name): float(value) for name, value in about["settings"].items()},
        **{name: members[name] for name in _ARRAYS},
    )


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError("a list of names was expected")
    return tuple(value)


def _claim(value: Mapping[str, Any]) -> Claim:
    counts = {
        name: int(value[name]) for name in ("rows_per_alarm", "replayed_rows", "distinct_rows", "orders", "alarms")
    }
    return Claim(**counts, confidence=float(value["confidence"]), text=str(value["text"]))


def _detectability(value: Mapping[str, Any]) -> Detectability:
    def maybe(number: Any) -> float | None:
        return None if number is None else float(number)

    return Detectability(
        fault=str(value["fault"]),
        runs=int(value["runs"]),
        median_delay_rows=maybe(value["median_delay_rows"]),
        found_share=float(value["found_share"]),
        named_share=maybe(value["named_share"]),
    )


def _guard(value: Mapping[str, Any]) -> GuardStatistics:
    def pairs(of: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
        return {name: (float(low), float(high)) for name, (low, high) in of.items()}

    return GuardStatistics(
        group_rms=pairs(value["group_rms"]),
        channel_mean={name: float(mean) for name, mean in value["channel_mean"].items()},
        channel_range=pairs(value["channel_range"]),
    )


def _check(reference: Reference) -> None:
    """Shapes fit the names, everything is finite, and what is divided by or factored can be."""
    d, c, k = len(reference.features), len(reference.channels), len(reference.labels)
    regimes = len(reference.regime_means) if reference.regime_means.ndim else 0
    shapes = {
        "channel_of": (d,), "centre": (d,), "scale": (d,), "regime_means": (regimes, d), "covariance": (d, d),
        "class_means": (k, d), "class_covariance": (d, d), "class_share": (k,), "naming_scale": (c,),
        "allowance": (1 + c,),
    }  # fmt: skip
    wrong = [name for name, shape in shapes.items() if getattr(reference, name).shape != shape]
    if wrong or not 0 < d <= MAX_FEATURES or not 0 < regimes <= MAX_REGIMES or not c or not k:
        raise Corrupt(f"reference.npz: shapes do not fit: {', '.join(wrong) or 'empty or too many'}", hint=_HINT)
    if not all(np.isfinite(getattr(reference, name)).all() for name in shapes):
        raise Corrupt("reference.npz holds numbers that are not finite", hint=_HINT)
    if sorted(set(reference.channel_of.tolist())) != list(range(c)) or set(reference.groups) != set(
        reference.channels
    ):
        raise Corrupt("reference.npz: features and channels do not fit together", hint=_HINT)
    positive = (reference.scale.min(), reference.naming_scale.min(), reference.threshold, reference.score_cap)
    if not all(np.isfinite(value) and value > 0 for value in positive):
        raise Corrupt("reference.npz: a scale or threshold is not positive", hint=_HINT)
    for name in ("covariance", "class_covariance"):
        try:
            np.linalg.cholesky(getattr(reference, name).astype(np.float64))
        except np.linalg.LinAlgError:
            raise Corrupt(f"reference.npz: {name} is not a covariance", hint=_HINT) from None
