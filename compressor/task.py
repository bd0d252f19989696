"""What a user's task module provides: data in roles, channels, model families, faults.

A task module is a Python file with one attribute `TASK` of type Task. It knows the data; the pipeline knows
what to do with it. Nothing here imports torch: `Task.build` and `Task.augment` do, when they are called.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from agent.contract.artifact import Channel, Window
from agent.contract.errors import ConfigError
from agent.drift.views import Combination
from compressor.corruptions import Corruption, Windows, dead, scale, stuck
from compressor.errors import MissingExtra, RecipeError

if TYPE_CHECKING:
    import torch

Settings = Mapping[str, object]


class Role(StrEnum):
    """What rows may be used for. Rows of two roles never share a sample."""

    TRAIN = "train"  # weights
    SELECT = "select"  # early stopping, the choice among candidates
    CALIBRATE = "calibrate"  # quantisation ranges, the drift reference
    STREAM = "stream"  # held-out rows of known sources, in time order: what is reported
    ENROL_TRAIN = "enrol_train"  # the beginning of new sources: weights of a successor
    ENROL_REFERENCE = "enrol_reference"
    NEW_TEST = "new_test"  # new sources: read once, at the very end


@dataclass(frozen=True, slots=True)
class Rows:
    """Windows of one role, recordings one after another, each in time order.

    windows: (rows, length, channels) float32 in raw units; labels, recordings, sources: (rows,) int64;
    starts: (rows,) int64, index of a window's first sample in its recording. A source is who or what was
    measured (a wearer, a machine).
    """

    windows: Windows
    labels: NDArray[np.int64]
    recordings: NDArray[np.int64]
    sources: NDArray[np.int64]
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.windows)

    def where(self, keep: NDArray[np.bool_] | NDArray[np.int64]) -> Rows:
        return Rows(
            self.windows[keep], self.labels[keep], self.recordings[keep], self.sources[keep], self.starts[keep]
        )


@dataclass(frozen=True, slots=True)
class TaskData:
    """All rows of a task under one choice of settings. `sha256` names the raw data they were cut from."""

    sha256: str
    rows: Mapping[Role, Rows]

    def role(self, role: Role) -> Rows:
        return self.rows[role]


@dataclass(frozen=True, slots=True)
class Fault:
    """One way the input can break.

    `kind` is the alarm kind a device can diagnose it as (dead, stuck, scale) or "unknown". `channels`: the
    touched ones. `draws`: how often a table repeats it, each time with another random part.
    """

    name: str
    kind: str
    channels: tuple[str, ...]
    expected: str  # harmful | harmless | systematic: what the data's author says; a card says what was measured
    corruption: Corruption
    draws: int = 1

    def apply(self, windows: Windows, seed: int = 0) -> Windows:
        """Broken copies of `windows`; the same seed gives the same break."""
        digest = hashlib.sha256(self.name.encode()).digest()
        return self.corruption(windows, np.random.default_rng([seed, int.from_bytes(digest[:4], "big")]))


@dataclass(frozen=True, slots=True)
class Task:
    """`build(family, width, channels)` makes an untrained network from normalised input (rows, channels, length)
    to logits; `augment(windows, generator)` varies a raw training batch (rows, length, channels).
    `unit_factors`: per channel group, what the usual confusion of units multiplies it by. `norms`, `products`:
    groups of whose channels, taken as a vector, the length or the dot product is viewed too, and may be read by a
    model: what does not change however the sensor is turned.
    """

    name: str
    service: str
    labels: tuple[str, ...]
    channels: tuple[Channel, ...]
    window: Window
    input_name: str
    input_meaning: str
    families: tuple[str, ...]
    settings: Mapping[str, object]  # known settings with their defaults
    load: Callable[[Settings], TaskData]
    build: Callable[[str, int, int], torch.nn.Module]
    augment: Callable[[torch.Tensor, torch.Generator], torch.Tensor]
    faults: tuple[Fault, ...] = ()
    unit_factors: Mapping[str, float] = field(default_factory=dict)
    norms: tuple[str, ...] = ()
    products: tuple[tuple[str, str], ...] = ()

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(channel.group for channel in self.channels))

    @property
    def combinations(self) -> tuple[Combination, ...]:
        """`norm(accel)`, `dot(accel,gyro)`: in the order of `norms`, then `products`.

        Raises:
            RecipeError: a group is not one of this task, or two have not equally many channels.
        """
        norms = [Combination(f"norm({group})", self._members(group)) for group in self.norms]
        pairs = [(one, other, self._members(one), self._members(other)) for one, other in self.products]
        for one, other, left, right in pairs:
            if len(left) != len(right):
                raise RecipeError(f"task '{self.name}': groups '{one}' and '{other}' have not as many channels")
        return (*norms, *(Combination(f"dot({one},{other})", left, right) for one, other, left, right in pairs))

    def _members(self, group: str) -> tuple[int, ...]:
        members = tuple(index for index, channel in enumerate(self.channels) if channel.group == group)
        if not members:
            raise RecipeError(f"task '{self.name}' has no group '{group}'", hint=f"It has {', '.join(self.groups)}.")
        return members

    @property
    def series(self) -> tuple[str, ...]:
        """What a model may read: the channels, then the combinations."""
        return (*(channel.name for channel in self.channels), *(one.name for one in self.combinations))

    def indices(self, names: Sequence[str]) -> tuple[int, ...]:
        """Positions among `series`.

        Raises:
            RecipeError: a name is none of them.
        """
        known = self.series
        for name in names:
            if name not in known:
                raise RecipeError(f"task '{self.name}' has no channel '{name}'", hint=f"It has {', '.join(known)}.")
        return tuple(known.index(name) for name in names)

    def positions(self, names: Sequence[str]) -> tuple[int, ...]:
        """`indices` of what a model reads; without names, of all channels."""
        return self.indices(names) or tuple(range(len(self.channels)))

    def channels_behind(self, names: Sequence[str]) -> tuple[str, ...]:
        """The channels that series are made of; empty = all."""
        combinations = {one.name: (*one.left, *one.right) for one in self.combinations}
        chosen = {index for name in names for index in combinations.get(name, self.indices([name]))}
        everything = len(chosen) in (0, len(self.channels))
        return () if everything else tuple(self.channels[index].name for index in sorted(chosen))

    def fault(self, name: str) -> Fault:
        """A named fault, systematic ones included.

        Raises:
            RecipeError
        """
        for fault in self.all_faults():
            if fault.name == name:
                return fault
        raise RecipeError(f"task '{self.name}' has no fault '{name}'")

    def all_faults(self) -> tuple[Fault, ...]:
        """The task's own faults, then one row for every diagnosis a device can make."""
        return self.faults + systematic_faults(self.channels, self.unit_factors)


def systematic_faults(channels: Sequence[Channel], unit_factors: Mapping[str, float]) -> tuple[Fault, ...]:
    """dead:<channel>, stuck:<channel>, dead:<group>, scale:<group>: so that every diagnosis finds its row."""
    names = [channel.name for channel in channels]
    found = []
    for index, name in enumerate(names):
        found.append(Fault(f"dead:{name}", "dead", (name,), "systematic", dead([index])))
        found.append(Fault(f"stuck:{name}", "stuck", (name,), "systematic", stuck([index]), draws=4))
    for group in dict.fromkeys(channel.group for channel in channels):
        members = [index for index, channel in enumerate(channels) if channel.group == group]
        touched = tuple(names[index] for index in members)
        found.append(Fault(f"dead:{group}", "dead", touched, "systematic", dead(members)))
        if group in unit_factors:
            factor = unit_factors[group]
            found.append(Fault(f"scale:{group}", "scale", touched, "systematic", scale(members, factor)))
    return tuple(found)


def load_task(module: str, base: Path) -> tuple[Task, str]:
    """The task named by a recipe, and the sha256 of its source.

    `module` is a file (ends in .py, relative to `base`) or a dotted name.

    Raises:
        RecipeError: not found, not importable, or without a TASK.
    """
    loaded = _from_file(base / module) if module.endswith(".py") else _from_name(module)
    task = getattr(loaded, "TASK", None)
    if not isinstance(task, Task):
        raise RecipeError(
            f"task module '{module}' has no attribute TASK of type compressor.task.Task",
            hint="See compressor/examples/wrist/task.py.",
        )
    source = Path(str(loaded.__file__)).read_bytes()
    return task, hashlib.sha256(source).hexdigest()


_FOREIGN = (ImportError, SyntaxError, NameError, AttributeError, TypeError, ValueError, LookupError, OSError)


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise RecipeError(
            f"task module {path} does not exist", hint="`task.module` is relative to the recipe's folder."
        )
    name = f"edgewarden_task_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RecipeError(f"task module {path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses of the module look themselves up here
    try:
        spec.loader.exec_module(module)
    except _FOREIGN as error:
        del sys.modules[name]
        raise _not_importable(f"task module {path}", error) from error
    return module


def _from_name(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except _FOREIGN as error:
        hint = "Name a file ending in .py or an importable module."
        raise _not_importable(f"task module '{name}'", error, hint=hint) from error


def _not_importable(what: str, error: Exception, *, hint: str = "") -> ConfigError:
    missing = MissingExtra.of(error) if isinstance(error, ImportError) else None
    return missing or RecipeError(f"{what} cannot be imported: {type(error).__name__}: {error}", hint=hint)
