"""The wrist task: seven shoulder exercises from six channels of a smart watch, 140 recordings of ten wearers.

Keeps the data roles disjoint: rows are cut inside a role's share of each recording, so no sample is in two
roles. New wearers are in no role of the first model. The data comes with the package seglearn (BSD-3).
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from agent.contract.artifact import Channel, Window
from compressor import corruptions as broken
from compressor.errors import DataError, RecipeError
from compressor.task import Fault, Role, Rows, Settings, Task, TaskData

if TYPE_CHECKING:
    import torch

LABELS = ("PEN", "ABD", "FEL", "IR", "ER", "TRAP", "ROW")
SHA256 = "eb122f23cdf06ef6bd6c6c5312958ec5cf9d038e2e6d457b8081662c75a42537"
INSTALL = "pip install --no-deps seglearn==1.2.5"
WINDOW = Window(length=128, hop=64, rate_hz=50.0)
TRAIN_HOP = 32
NEW_WEARERS = (1, 2, 3)
ACCEL, GYRO = (0, 1, 2), (3, 4, 5)
ALL = ACCEL + GYRO
XY = ((0, 1), (3, 4))  # the same two axes of both sensors: a watch turns as a whole

CHANNELS = (
    *(Channel(name=n, unit="g", group="accel", minimum=-16.0, maximum=16.0) for n in ("ax", "ay", "az")),
    *(Channel(name=n, unit="rad/s", group="gyro", minimum=-35.0, maximum=35.0) for n in ("gx", "gy", "gz")),
)
NAMES = tuple(channel.name for channel in CHANNELS)

# Share of each recording, hop in samples. Enrolled wearers: past to train on, future to be judged on.
ENROLLED = {
    Role.TRAIN: (0.0, 0.35, TRAIN_HOP),
    Role.SELECT: (0.35, 0.5, WINDOW.hop),
    Role.CALIBRATE: (0.5, 0.65, WINDOW.hop),
    Role.STREAM: (0.65, 1.0, WINDOW.hop),
}
NEW = {
    Role.ENROL_TRAIN: (0.0, 0.15, TRAIN_HOP),
    Role.ENROL_REFERENCE: (0.15, 0.3, WINDOW.hop),
    Role.NEW_TEST: (0.4, 1.0, WINDOW.hop),
}


def dataset_path() -> Path:
    """Where pip put the recordings.

    Raises:
        DataError: seglearn is not installed.
    """
    spec = importlib.util.find_spec("seglearn")
    if spec is None or spec.origin is None:
        raise DataError("the wrist recordings are missing: package seglearn is not installed", hint=f"Run: {INSTALL}")
    return Path(spec.origin).parent / "data" / "watch_dataset.npy"


def read_recordings(path: Path) -> dict[str, list[NDArray[np.float64]] | NDArray[np.int64]]:
    """The raw recordings. The file is a pickle, so its digest is checked before a byte of it is interpreted.

    Raises:
        DataError: missing, or not the file this task was written for.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", hint=f"Run: {INSTALL}") from None
    found = hashlib.sha256(raw).hexdigest()
    if found != SHA256:
        raise DataError(
            f"{path} is not the expected data set: sha256 {found[:16]}..., expected {SHA256[:16]}...",
            hint=f"It was not opened. Run: {INSTALL}",
        )
    document: dict[str, list[NDArray[np.float64]] | NDArray[np.int64]] = np.load(path, allow_pickle=True).item()
    return document


@cache
def _recordings() -> tuple[tuple[NDArray[np.float32], int, int], ...]:
    """(samples (length, 6), label, wearer) of each recording, in the file's order."""
    document = read_recordings(dataset_path())
    return tuple(
        (np.asarray(samples, np.float32), int(label), int(wearer))
        for samples, label, wearer in zip(document["X"], document["y"], document["subject"], strict=True)
    )


def load(settings: Settings) -> TaskData:
    """All roles for one choice of new wearers (`new_wearers`: distinct numbers from 1 to 10, at most 7).

    Raises:
        DataError, RecipeError
    """
    new = _new_wearers(settings)
    recordings = _recordings()
    enrolled = [i for i, (_, _, wearer) in enumerate(recordings) if wearer not in new]
    joining = [i for i, (_, _, wearer) in enumerate(recordings) if wearer in new]
    rows = {role: _cut(enrolled, *span) for role, span in ENROLLED.items()}
    rows |= {role: _cut(joining, *span) for role, span in NEW.items()}
    return TaskData(SHA256, rows)


def _new_wearers(settings: Settings) -> frozenset[int]:
    value = settings.get("new_wearers", NEW_WEARERS)
    numbers = tuple(value) if isinstance(value, list | tuple) else ()
    if not 1 <= len(set(numbers)) <= 7 or len(set(numbers)) != len(numbers) or not set(numbers) <= set(range(1, 11)):
        raise RecipeError(
            f"new_wearers = {value!r} is not a list of one to seven distinct wearers",
            hint="Wearers are numbered 1 to 10; give one to seven of them, such as [4, 5, 6].",
        )
    return frozenset(numbers)


def _cut(indices: list[int], begin: float, end: float, hop: int) -> Rows:
    """Windows that lie wholly between two shares of each recording, wearer by wearer."""
    recordings = _recordings()
    windows, labels, ids, wearers, starts = [], [], [], [], []
    for index in sorted(indices, key=lambda i: (recordings[i][2], i)):
        samples, label, wearer = recordings[index]
        first, last = int(begin * len(samples)), int(end * len(samples))
        for start in range(first, last - WINDOW.length + 1, hop):
            windows.append(samples[start : start + WINDOW.length])
            labels.append(label)
            ids.append(index)
            wearers.append(wearer)
            starts.append(start)
    return Rows(np.stack(windows), np.array(labels), np.array(ids), np.array(wearers), np.array(starts))


def stream(new_wearers: tuple[int, ...] = NEW_WEARERS) -> Rows:
    """The held-out windows of enrolled wearers, recording by recording in time order."""
    return load({"new_wearers": new_wearers}).role(Role.STREAM)


def apply_fault(name: str, windows: NDArray[np.float32], seed: int = 0) -> NDArray[np.float32]:
    """Windows (rows, 128, 6) as a broken sensor would deliver them; names as in `TASK.all_faults()`."""
    return TASK.fault(name).apply(windows, seed)


def build(family: str, width: int, channels: int) -> torch.nn.Module:
    from compressor import families

    makers: Mapping[str, type[torch.nn.Module]] = {
        "plain": families.PlainConv1d,
        "residual": families.ResidualConv1d,
    }
    return makers[family](channels, width, len(LABELS))


def augment(windows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Gain per sensor, offset and noise per channel, and a slightly different pace; no rotation.

    A model that has learnt to ignore how the watch sits could not be told that it sits wrongly.
    """
    import torch

    rows, length, _ = windows.shape

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator) * 2 - 1

    pace = 1 + 0.1 * uniform(rows, 1)
    place = (torch.arange(length)[None, :] * pace).clamp(0, length - 1)
    left = place.floor().long()
    right = (left + 1).clamp(max=length - 1)
    share = (place - left)[:, :, None]
    row = torch.arange(rows)[:, None]
    warped = windows[row, left] * (1 - share) + windows[row, right] * share
    gain = (1 + 0.15 * uniform(rows, 1, 2)).repeat_interleave(3, dim=2)
    offset = uniform(rows, 1, 6) * torch.tensor([0.05] * 3 + [0.15] * 3)
    spread = torch.tensor([0.02] * 3 + [0.1] * 3)
    return warped * gain + offset + spread * torch.randn(warped.shape, generator=generator)


def _faults() -> tuple[Fault, ...]:
    accel, gyro = NAMES[:3], NAMES[3:]
    turned = ("ax", "ay", "gx", "gy")

    def harmful(name: str, kind: str, channels: tuple[str, ...], what: broken.Corruption, draws: int = 1) -> Fault:
        return Fault(name, kind, channels, "harmful", what, draws)

    def harmless(name: str, channels: tuple[str, ...], what: broken.Corruption) -> Fault:
        return Fault(name, "unknown", channels, "harmless", what)

    return (
        harmful("stuck_ax", "stuck", ("ax",), broken.stuck([0]), draws=4),
        harmful("gyro_dead_x", "dead", ("gx",), broken.dead([3])),
        harmful("gyro_off", "dead", gyro, broken.dead(GYRO)),
        harmful("swap_xy", "unknown", turned, broken.swap(XY)),
        harmful("worn_180", "unknown", turned, broken.rotate(XY, 180)),
        harmful("rotated_15", "unknown", turned, broken.rotate(XY, 15)),
        harmful("rotated_30", "unknown", turned, broken.rotate(XY, 30)),
        harmful("rotated_45", "unknown", turned, broken.rotate(XY, 45)),
        harmful("accel_in_ms2", "scale", accel, broken.scale(ACCEL, UNIT_FACTORS["accel"])),
        harmful("gyro_in_degrees", "scale", gyro, broken.scale(GYRO, UNIT_FACTORS["gyro"])),
        harmful("spikes", "unknown", NAMES, broken.spikes(ALL, 0.01, 8.0)),
        harmful("noise", "unknown", NAMES, broken.noise(ALL, 0.5)),
        harmful("accel_saturated", "unknown", accel, broken.saturate(ACCEL, 1.0)),
        harmful("gain_0.7", "unknown", NAMES, broken.scale(ALL, 0.7)),
        harmless("accel_gain_1.1", accel, broken.scale(ACCEL, 1.1)),
        harmless("accel_gain_1.25", accel, broken.scale(ACCEL, 1.25)),
        harmless("accel_gain_1.5", accel, broken.scale(ACCEL, 1.5)),
        harmless("gyro_bias_0.1", gyro, broken.bias(GYRO, 0.1)),
        harmless("gyro_bias_0.3", gyro, broken.bias(GYRO, 0.3)),
        harmless("hold_25hz", NAMES, broken.hold(2)),
        harmless("clock_25_percent", NAMES, broken.stretch(1.25)),
        harmless("loss_half_second", NAMES, broken.lose(25)),
    )


UNIT_FACTORS = {"accel": 9.80665, "gyro": 57.29578}  # g read as m/s2, rad/s read as degrees/s

TASK = Task(
    name="wrist-exercise",
    service="wrist",
    labels=LABELS,
    channels=CHANNELS,
    window=WINDOW,
    input_name="window",
    input_meaning="2.56 s of acceleration and rotation rate of a watch, raw units",
    families=("plain", "residual"),
    settings={"new_wearers": list(NEW_WEARERS)},
    load=load,
    build=build,
    augment=augment,
    faults=_faults(),
    unit_factors=UNIT_FACTORS,
    norms=("accel", "gyro"),
    products=(("accel", "gyro"),),
)
