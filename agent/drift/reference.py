"""What the monitors compare a stream with: made once by the compressor, carried as `reference.npz`.

The file is an npz of `about` (JSON) and arrays (archive.py). Members of a model have its name before theirs:
`regimes.covariance`, `stationary.centre`, `witness0.regime_means`. It is written byte for byte the same for the same
content; reading checks every size, type, shape and number before anything is used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from agent.contract.errors import Corrupt, TooLarge
from agent.drift.archive import HINT, dump_arrays, load_arrays
from agent.drift.explanation import BINS
from agent.drift.models import RegimeModel, StationaryModel, Witness, channels_of
from agent.drift.windows import FixedPoint

FORMAT: Final = 2
MAX_REFERENCE_BYTES: Final = 512 * 1024
MAX_FEATURES: Final = 128
MAX_REGIMES: Final = 512
MAX_WITNESSES: Final = 4

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
    """What is common to every monitor of one view, and the models they watch with.

    features, channels, labels: names in order. groups: channel -> sensor group. channel_of: (features,) int16,
    -1 = belongs to no single channel. centre, scale: (features,) float32 of all reference rows. class_share:
    (labels,) float32. rows: reference rows.

    At most one of `regimes` and `stationary` is set; with neither the view is followed and shown but never raises.
    `watched`: features that are followed and shown but never raise.

    bins: (columns of the model, 16) uint16, how the reference rows fall into the bins of an explanation, as relative
    counts; (0, 16) where nothing is known of it.
    """

    features: tuple[str, ...]
    channels: tuple[str, ...]
    groups: dict[str, str]
    labels: tuple[str, ...]
    channel_of: Array
    centre: Array
    scale: Array
    class_share: Array
    rows: int
    guard: GuardStatistics
    claim: Claim
    regimes: RegimeModel | None = None
    stationary: StationaryModel | None = None
    watched: tuple[str, ...] = ()
    witnesses: tuple[Witness, ...] = ()
    detectability: tuple[Detectability, ...] = ()
    bins: Array = field(default_factory=lambda: np.zeros((0, BINS), np.uint16))
    settings: dict[str, float] = field(default_factory=dict)

    def fixed_point(self) -> FixedPoint:
        """How rows of this view become integers in drift windows."""
        return FixedPoint(tuple(map(float, self.centre)), tuple(map(float, self.scale)))

    def digest(self) -> str:
        """sha256 of the file this reference is written as."""
        return hashlib.sha256(dump_reference(self)).hexdigest()


# name -> (stored type, shape). d: features of the view; k: labels; for a model: w columns, c channels they belong to,
# r regimes
_COMMON: Final = {
    "channel_of": ("<i2", "d"),
    "centre": ("<f4", "d"),
    "scale": ("<f4", "d"),
    "class_share": ("<f4", "k"),
}
_BINS: Final = {"bins": ("<u2", "x6")}  # x columns of the stream's own model or none, 6 = BINS
_REGIMES: Final = {
    "columns": ("<i2", "w"),
    "regime_means": ("<f4", "rw"),
    "covariance": ("<f4", "ww"),
    "class_means": ("<f4", "kw"),
    "class_covariance": ("<f4", "ww"),
    "naming_scale": ("<f4", "c"),
    "allowance": ("<f4", "1+c"),
}
_REGIME_NUMBERS: Final = ("threshold", "score_cap")
# s season terms or none, o lags, b values; p pairs, m categoricals
_STATIONARY: Final = {
    "columns": ("<i2", "w"),
    "season": ("<f4", "sw"),
    "season_scale": ("<f4", "sw"),
    "lags": ("<f4", "ow"),
    "centre": ("<f4", "w"),
    "scale": ("<f4", "w"),
    "offset": ("<f4", "w"),
    "mean_charge": ("<f4", "Mw"),
    "variance_centre": ("<f4", "w"),
    "variance_scale": ("<f4", "w"),
    "variance_charge": ("<f4", "Vw"),
    "dense_charge": ("<f4", "V"),
    "whitening": ("<f4", "ww"),
    "pair_mean": ("<f4", "p"),
    "pair_square": ("<f4", "p"),
    "low": ("<f4", "w"),
    "high": ("<f4", "w"),
    "rates": ("<f4", "3w"),
    "bin_column": ("<i2", "m"),
    "bin_values": ("<f4", "mb"),
    "bin_share": ("<f4", "mB"),
    "bin_bound": ("<f4", "mB"),
    "tolerance_sd": ("<f4", "w"),
}
_STATIONARY_NUMBERS: Final = (
    "gap_s", "dense_centre", "dense_scale", "pair_band", "radius", "inflation", "claim_rows",
)  # fmt: skip
MEAN_BETS: Final = 8
VARIANCE_BETS: Final = 5
SEASON_TERMS: Final = 9
MAX_ORDER: Final = 5
MAX_VALUES: Final = 64

Members = dict[str, Array]
Spec = Mapping[str, tuple[str, str]]


def dump_reference(reference: Reference) -> bytes:
    """The bytes of `reference.npz`; the same reference is always the same bytes."""
    about = {
        "format": FORMAT,
        "features": reference.features,
        "channels": reference.channels,
        "groups": reference.groups,
        "labels": reference.labels,
        "rows": reference.rows,
        "guard": asdict(reference.guard),
        "claim": asdict(reference.claim),
        "watched": reference.watched,
        "detectability": [asdict(line) for line in reference.detectability],
        "settings": {name: float(value) for name, value in reference.settings.items()},
        "regimes": _numbers(reference.regimes, _REGIME_NUMBERS) if reference.regimes else None,
        "stationary": _numbers(reference.stationary, _STATIONARY_NUMBERS) if reference.stationary else None,
        "witnesses": [
            {"engine": one.engine, **_numbers(one.regimes, _REGIME_NUMBERS)} for one in reference.witnesses
        ],
    }
    text = json.dumps(about, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    members = {"about": np.frombuffer(text, dtype=np.uint8), **_stored(reference, _COMMON | _BINS)}
    if reference.regimes:
        members |= _stored(reference.regimes, _REGIMES, "regimes.")
    if reference.stationary:
        members |= _stored(reference.stationary, _STATIONARY, "stationary.")
    for number, witness in enumerate(reference.witnesses):
        members |= _stored(witness.regimes, _REGIMES, f"witness{number}.")
        members |= _stored(witness, {"disagreement": ("<f4", "k")}, f"witness{number}.")
    return dump_arrays(members)


def load_reference(source: Path | bytes) -> Reference:
    """Read a reference from its file or its bytes.

    Raises:
        TooLarge: over MAX_REFERENCE_BYTES.
        Corrupt: unreadable, or anything in it is not what a reference holds.
    """
    raw = source if isinstance(source, bytes) else _read(source)
    if len(raw) > MAX_REFERENCE_BYTES:
        raise TooLarge(f"reference of {len(raw)} bytes is over {MAX_REFERENCE_BYTES}", hint=HINT)
    members = load_arrays(raw, needed=("about", *_COMMON), what="reference.npz")
    members.setdefault("bins", np.zeros((0, BINS), np.uint16))
    try:
        reference = _assemble(members)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise Corrupt(f"reference.npz: {type(error).__name__}: {error}", hint=HINT) from None
    _check(reference)
    return reference


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_REFERENCE_BYTES + 1)
    except OSError as error:
        raise Corrupt(f"cannot read {path}: {error.strerror}", hint="The artifact is incomplete.") from None


def _numbers(model: Any, names: Iterable[str]) -> dict[str, float]:
    return {name: float(getattr(model, name)) for name in names}


def _stored(part: Any, spec: Spec, prefix: str = "") -> Members:
    return {
        prefix + name: np.ascontiguousarray(getattr(part, name), dtype=np.dtype(kind))
        for name, (kind, _) in spec.items()
    }


def _taken(members: Members, spec: Spec, prefix: str = "") -> Members:
    """A part's arrays by their own names. Raises: KeyError, ValueError."""
    for name, (kind, _) in spec.items():
        if members[prefix + name].dtype != np.dtype(kind):
            raise ValueError(f"{prefix}{name} is {members[prefix + name].dtype}")
    return {name: members[prefix + name] for name in spec}


def _assemble(members: Members) -> Reference:
    if members["about"].dtype != np.uint8:
        raise ValueError("about is not text")
    about = json.loads(members["about"].tobytes())
    if about["format"] != FORMAT:
        raise ValueError(f"format {about['format']}, this agent reads {FORMAT}")
    if len(about["witnesses"]) > MAX_WITNESSES:
        raise ValueError(f"{len(about['witnesses'])} witnesses")
    return Reference(
        features=_names(about["features"]),
        channels=_names(about["channels"]),
        groups={str(channel): str(group) for channel, group in about["groups"].items()},
        labels=_names(about["labels"]),
        rows=int(about["rows"]),
        guard=_guard(about["guard"]),
        claim=_claim(about["claim"]),
        regimes=None if about["regimes"] is None else _regimes(about["regimes"], members, "regimes."),
        stationary=None if about["stationary"] is None else _stationary(about["stationary"], members),
        watched=_names(about["watched"]),
        witnesses=tuple(
            Witness(
                str(one["engine"]),
                _regimes(one, members, f"witness{number}."),
                **_taken(members, {"disagreement": ("<f4", "k")}, f"witness{number}."),
            )
            for number, one in enumerate(about["witnesses"])
        ),
        detectability=tuple(_detectability(line) for line in about["detectability"]),
        settings={str(name): float(value) for name, value in about["settings"].items()},
        **_taken(members, _COMMON | _BINS),
    )


def _regimes(numbers: Mapping[str, Any], members: Members, prefix: str) -> RegimeModel:
    fields: dict[str, Any] = {name: float(numbers[name]) for name in _REGIME_NUMBERS}
    return RegimeModel(**(fields | _taken(members, _REGIMES, prefix)))


def _stationary(numbers: Mapping[str, Any], members: Members) -> StationaryModel:
    fields: dict[str, Any] = {name: float(numbers[name]) for name in _STATIONARY_NUMBERS}
    return StationaryModel(**(fields | _taken(members, _STATIONARY, "stationary.")))


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
    if not 0 < d <= MAX_FEATURES or not k:
        raise Corrupt("reference.npz: no features or labels, or too many", hint=HINT)
    _check_arrays(reference, _COMMON, {"d": d, "k": k})
    known = set(reference.channel_of.tolist()) - {-1}
    if known != set(range(c)) or set(reference.groups) != set(reference.channels):
        raise Corrupt("reference.npz: features and channels do not fit together", hint=HINT)
    if not set(reference.watched) <= set(reference.features):
        raise Corrupt("reference.npz watches features it does not have", hint=HINT)
    _check_positive(reference.scale)
    for model in _regime_models(reference):
        _check_regimes(model, reference.channel_of, d, k)
    if reference.stationary:
        _check_stationary(reference.stationary, d)
    if reference.stationary and reference.regimes:
        raise Corrupt("reference.npz holds two models of one stream", hint=HINT)
    own = reference.stationary or reference.regimes
    given = len(reference.bins) if reference.bins.ndim else 0
    x = (len(own.columns) if own else min(given, d)) if given else 0
    _check_arrays(reference, _BINS, {"x": x, "6": BINS})
    for witness in reference.witnesses:
        _check_arrays(witness, {"disagreement": ("<f4", "k")}, {"k": k})


def _regime_models(reference: Reference) -> Iterator[RegimeModel]:
    if reference.regimes:
        yield reference.regimes
    yield from (witness.regimes for witness in reference.witnesses)


def _check_regimes(model: RegimeModel, channel_of: Array, d: int, k: int) -> None:
    w = _check_columns(model.columns, d)
    r = len(model.regime_means) if model.regime_means.ndim else 0
    if not 0 < r <= MAX_REGIMES:
        raise Corrupt(f"reference.npz: {r} regimes", hint=HINT)
    present, _ = channels_of(model.columns, channel_of)
    _check_arrays(model, _REGIMES, {"w": w, "c": len(present), "k": k, "r": r})
    _check_positive(model.naming_scale)
    _check_positive(np.array([model.threshold, model.score_cap]))
    for name in ("covariance", "class_covariance"):
        try:
            np.linalg.cholesky(getattr(model, name).astype(np.float64))
        except np.linalg.LinAlgError:
            raise Corrupt(f"reference.npz: {name} is not a covariance", hint=HINT) from None


def _check_stationary(model: StationaryModel, d: int) -> None:
    w = _check_columns(model.columns, d)
    m = len(model.bin_column) if model.bin_column.ndim else 0
    s, o = (len(array) if array.ndim else 0 for array in (model.season, model.lags))
    b = model.bin_values.shape[-1] if model.bin_values.ndim == 2 else 0
    if s not in {0, SEASON_TERMS} or o > MAX_ORDER or m > w + 1 or b > MAX_VALUES:
        raise Corrupt("reference.npz: a transform or categorical is out of bounds", hint=HINT)
    sizes = {"w": w, "s": s, "o": o, "m": m, "b": b, "B": b + 1, "p": w * (w - 1) // 2, "3": 3}
    sizes |= {"M": MEAN_BETS, "V": VARIANCE_BETS}
    _check_arrays(model, _STATIONARY, sizes, may_be_nan=("bin_values",))
    for name in ("scale", "variance_scale", "variance_centre", "rates", "pair_square", "bin_bound"):
        _check_positive(getattr(model, name).ravel())
    positive = (model.dense_scale, model.inflation, model.claim_rows)
    _check_positive(np.array(positive))
    finite = np.array(_numbers_of(model))
    within = -1 <= int(model.bin_column.min(initial=-1)) <= int(model.bin_column.max(initial=-1)) < w
    known = np.isfinite(model.bin_values).any(axis=1).all()
    within = within and float(model.tolerance_sd.min()) >= 0 <= float(model.bin_share.min(initial=0.0))
    if not np.isfinite(finite).all() or not within or not known or not float(model.rates.max()) < 1:
        raise Corrupt("reference.npz: a constant of the stationary model is out of bounds", hint=HINT)


def _numbers_of(model: StationaryModel) -> list[float]:
    return [getattr(model, name) for name in _STATIONARY_NUMBERS]


def _check_columns(columns: Array, d: int) -> int:
    listed = columns.tolist() if columns.ndim == 1 else []
    if not listed or len(set(listed)) != len(listed) or not 0 <= min(listed) <= max(listed) < d:
        raise Corrupt("reference.npz: a model's columns are not features of the view", hint=HINT)
    return len(listed)


def _check_arrays(part: Any, spec: Spec, sizes: Mapping[str, int], *, may_be_nan: tuple[str, ...] = ()) -> None:
    for name, (_, axes) in spec.items():
        array = getattr(part, name)
        shape = (1 + sizes["c"],) if axes == "1+c" else tuple(sizes[axis] for axis in axes)
        if array.shape != shape:
            raise Corrupt(f"reference.npz: {name} is {array.shape} and should be {shape}", hint=HINT)
        if name not in may_be_nan and not np.isfinite(array).all():
            raise Corrupt(f"reference.npz: {name} holds numbers that are not finite", hint=HINT)


def _check_positive(values: Array) -> None:
    if not all(np.isfinite(value) and value > 0 for value in values.tolist()):
        raise Corrupt("reference.npz: a scale or threshold is not positive", hint=HINT)
