"""A recipe file: TOML read once into frozen, typed values. Unknown keys are refused with the nearest name.

Every error carries file and line, or the override (`--set`) that is to blame: overrides are applied before
validation, so they are checked alike. All problems are told at once, unknown keys first.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError, model_validator

from agent.configuring import Identifier, Section
from agent.contract.artifact import canonical, sha256
from compressor.calibrators import Calibrator
from compressor.errors import RecipeError
from compressor.task import Task, load_task

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Location = tuple[int | str, ...]
FORMAT = 1
MAX_RECIPE_BYTES = 256 * 1024
MAX_PROBLEMS = 5


class TaskTable(Section):
    module: str  # a file relative to the recipe, or a dotted name


class TrainTable(Section):
    batch: int = Field(default=64, ge=1, le=4096)
    learning_rate: float = Field(default=4e-3, gt=0)
    weight_decay: float = Field(default=1e-2, ge=0)
    label_smoothing: float = Field(default=0.05, ge=0, lt=1)
    processes: int = Field(default=2, ge=1, le=64)


class ModelTable(Section):
    """One network. `channels`: the ones it reads, empty = all; a fallback should not read what may break."""

    name: Identifier
    role: Literal["teacher", "student", "fallback"]
    family: str
    width: int = Field(ge=1, le=4096)
    epochs: int = Field(ge=1, le=10_000)
    channels: tuple[str, ...] = ()


class QuantiseTable(Section):
    precisions: tuple[Literal["float32", "int8"], ...] = ("float32", "int8")
    calibrator: Calibrator = Calibrator.PERCENTILE


class MeasureTable(Section):
    rounds: int = Field(default=25, ge=3, le=1000)
    runs: int = Field(default=40, ge=1, le=10_000)


class GatesTable(Section):
    """Limits every candidate must keep, whatever the device class; latency and size limits are the class's own.

    accuracy_drop: below the teacher on the select role, 0..1; fallback_drop: the same for a fallback.
    parity_agreement: least share of rows on which torch, the ONNX graph and the device's engine name the same
    class; parity_error: largest difference of a probability.
    golden_error: largest difference of a golden output, alone against in a batch.
    """

    accuracy_drop: float = Field(default=0.03, ge=0, le=1)
    fallback_drop: float = Field(default=0.12, ge=0, le=1)
    parity_agreement: float = Field(default=0.999, ge=0, le=1)
    parity_error: float = Field(default=0.03, ge=0, le=1)
    golden_error: float = Field(default=1e-3, ge=0, le=1)


class SelectTable(Section):
    """tie: accuracies closer than this count as equal. min_speedup: 8 bit is kept only if at least this much
    faster than its float parent.
    """

    tie: float = Field(default=0.005, ge=0, le=1)
    min_speedup: float = Field(default=1.05, ge=1)


class DeviceClassTable(Section):
    """A kind of device and its budget. latency_us: CPU time of one row in the engine, one thread;
    latency_p95_us: what the artifact promises per request on the device, queueing included.
    """

    name: Identifier
    latency_us: float = Field(gt=0)
    size_bytes: int = Field(gt=0)
    latency_p95_us: float = Field(gt=0)
    prefer: Literal["accuracy", "size"] = "accuracy"


class FaultsTable(Section):
    """harmful_drop: a fault that costs the chosen model at least this much accuracy is called harmful.
    detection_runs: how often each fault is injected into a clean stream to see when the monitor finds it.
    """

    harmful_drop: float = Field(default=0.10, gt=0, le=1)
    detection_runs: int = Field(default=20, ge=1, le=1000)


class RegenerateTable(Section):
    """How a second run with newcomers' recordings differs from the first.

    forgetting: accuracy that may be lost on known rows, 0..1. epochs_share, learning_rate_share: of the first
    training's, because it goes on from there. repeat: how often an epoch shows a newcomer's row, against once.
    """

    forgetting: float = Field(default=0.02, ge=0, le=1)
    epochs_share: float = Field(default=0.35, gt=0, le=1)
    learning_rate_share: float = Field(default=1.0, gt=0, le=1)
    repeat: int = Field(default=2, ge=1, le=100)


class PackageTable(Section):
    version: int = Field(default=1, ge=1)
    owner: str
    licence: str
    golden_rows: int = Field(default=8, ge=1, le=256)


class Recipe(Section):
    format: Literal[1]
    name: str
    seed: int = Field(default=1, ge=0)
    task: TaskTable
    data: dict[str, Any] = Field(default={})
    train: TrainTable = TrainTable()
    model: tuple[ModelTable, ...]
    quantise: QuantiseTable = QuantiseTable()
    measure: MeasureTable = MeasureTable()
    gates: GatesTable = GatesTable()
    select: SelectTable = SelectTable()
    device_class: tuple[DeviceClassTable, ...]
    faults: FaultsTable = FaultsTable()
    regenerate: RegenerateTable = RegenerateTable()
    package: PackageTable

    @model_validator(mode="after")
    def _complete(self) -> Recipe:
        roles = [model.role for model in self.model]
        if roles.count("teacher") != 1:
            raise ValueError(f"exactly one [[model]] must have role = 'teacher', found {roles.count('teacher')}")
        for noun, names in (
            ("model", [model.name for model in self.model]),
            ("device_class", [device.name for device in self.device_class]),
        ):
            if len(set(names)) != len(names) or not names:
                raise ValueError(f"every [[{noun}]] needs a name of its own, found {names}")
        return self

    @property
    def teacher(self) -> ModelTable:
        return next(model for model in self.model if model.role == "teacher")

    @property
    def sha256(self) -> str:
        """Digest of what the recipe says, overrides included; comments, order and how many trainings run at once
        do not count.
        """
        return sha256(canonical(self.model_dump(mode="json", exclude={"train": {"processes"}})))


def read_recipe(path: Path, *, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from its file, with `key=value` overrides applied.

    Raises:
        RecipeError: missing, malformed, unknown key, wrong value.
    """
    text = _read(path)
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        place = re.search(r" \(at line (\d+), column (\d+)\)$", str(error))
        line = int(place.group(1)) if place else 0
        message = str(error)[: place.start()] if place else str(error)
        raise RecipeError(f"not TOML: {message}", path=path, line=line, hint="Correct the syntax there.") from None
    source = _Source(path, text, document, tuple(overrides))
    try:
        return Recipe.model_validate(source.overridden())
    except ValidationError as error:
        raise _translate(error, source) from None


def open_task(recipe: Recipe, path: Path) -> tuple[Task, str]:
    """The recipe's task and its source digest, with what the recipe asks of it checked.

    Raises:
        RecipeError
    """
    task, digest = load_task(recipe.task.module, path.parent)
    for key in recipe.data:
        if key not in task.settings:
            raise RecipeError(
                f"task '{task.name}' has no setting '{key}', which [data] or --set names",
                path=path,
                hint=_nearest(key, task.settings),
            )
    for model in recipe.model:
        if model.family not in task.families:
            raise RecipeError(
                f"task '{task.name}' has no family '{model.family}' (model '{model.name}')",
                path=path,
                hint=_nearest(model.family, task.families),
            )
        task.indices(model.channels)
    return task, digest


def _read(path: Path) -> str:
    try:
        raw = path.read_bytes()[: MAX_RECIPE_BYTES + 1]
        if len(raw) > MAX_RECIPE_BYTES:
            raise RecipeError(f"larger than {MAX_RECIPE_BYTES} bytes", path=path)
        return raw.decode()
    except UnicodeDecodeError:
        raise RecipeError("not UTF-8 text", path=path) from None
    except OSError as error:
        raise RecipeError(
            f"cannot read the recipe: {error.strerror}",
            path=path,
            hint="Name a recipe such as compressor/examples/wrist/recipe.toml.",
        ) from None


@dataclass(frozen=True, slots=True)
class _Source:
    """What a recipe is made of, to say where a wrong value came from."""

    path: Path
    text: str
    document: dict[str, Any]
    overrides: tuple[str, ...]

    def overridden(self) -> dict[str, Any]:
        document = deepcopy(self.document)
        for override in self.overrides:
            _apply(document, override)
        return document

    def override_of(self, location: Location) -> str:
        """The override that wrote what stands at `location`; "" when it was the file."""
        for override in reversed(self.overrides):
            parts = _key_of(override)
            wrote = location[: len(parts)] == parts
            made = parts[: len(location)] == location and not self._has(location)
            if wrote or made:
                return override
        return ""

    def _has(self, location: Location) -> bool:
        place: Any = self.document
        for part in location:
            if not isinstance(place, dict) or part not in place:
                return False
            place = place[part]
        return True


def _key_of(override: str) -> tuple[str, ...]:
    """Where `a.b=value` lands; a key without a dot is a setting of the task, so it lands in [data]."""
    key, separator, _ = override.partition("=")
    parts = tuple(part.strip() for part in key.split("."))
    if not separator or not all(parts):
        raise RecipeError(f"cannot apply --set {override!r}", hint="Write it as key=value.")
    return parts if len(parts) > 1 else ("data", *parts)


def _apply(document: dict[str, Any], override: str) -> None:
    *tables, name = _key_of(override)
    table = document
    for part in tables:
        inner = table.setdefault(part, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"cannot apply --set {override!r}: '{part}' is not a table")
        table = inner
    table[name] = _value(override.partition("=")[2].strip())


def _value(text: str) -> Any:
    for form in (f"v = {text}", f"v = [{text}]"):
        try:
            return tomllib.loads(form)["v"]
        except tomllib.TOMLDecodeError:
            continue
    return text


def _translate(error: ValidationError, source: _Source) -> RecipeError:
    """All problems in one error, which stands where the first of them is; alone, it keeps its hint."""
    details = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
    first, *rest = [_problem(detail, source) for detail in details[:MAX_PROBLEMS]]
    told = [first.message + (f" ({first.hint})" if rest and first.hint else ""), *map(str, rest)]
    if len(details) > MAX_PROBLEMS:
        told.append(f"and {len(details) - MAX_PROBLEMS} more")
    path = None if first.override else source.path
    message = f"--set {first.override}: {told[0]}" if first.override else told[0]
    return RecipeError("; ".join([message, *told[1:]]), path=path, line=first.line, hint="" if rest else first.hint)


@dataclass(frozen=True, slots=True)
class _Problem:
    """`override`: the one to blame; "" = the file, at `line` (0 = no single one)."""

    message: str
    hint: str
    file: str
    line: int
    override: str

    def __str__(self) -> str:
        place = f"--set {self.override}" if self.override else f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: {self.message}" + (f" ({self.hint})" if self.hint else "")


def _problem(detail: ErrorDetails, source: _Source) -> _Problem:
    location = tuple(detail["loc"])
    name = ".".join(str(part) for part in location)
    if detail["type"] == "extra_forbidden":
        message, hint = f"unknown key '{name}'", _nearest(str(location[-1]), _known(location))
    elif detail["type"] == "missing":
        message, hint = f"'{name}' is missing", "Add it; see the example recipes."
    else:
        message, hint = f"{name + ': ' if name else ''}{detail['msg'].removeprefix('Value error, ')}", ""
    override = source.override_of(location)
    line = 0 if override else _line_of(source.text, location)
    return _Problem(message, hint, source.path.name, line, override)


def _known(location: Location) -> list[str]:
    """Names allowed where the unknown key stood."""
    tables: Mapping[str, type[Section]] = {
        "task": TaskTable, "train": TrainTable, "model": ModelTable, "quantise": QuantiseTable,
        "measure": MeasureTable, "gates": GatesTable, "select": SelectTable, "device_class": DeviceClassTable,
        "faults": FaultsTable, "regenerate": RegenerateTable, "package": PackageTable,
    }  # fmt: skip
    table = tables.get(str(location[0]), Recipe) if len(location) > 1 else Recipe
    return list(table.model_fields)


def _nearest(name: str, known: Sequence[str] | Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(known)}."


_HEADER = re.compile(r"^\s*\[{1,2}\s*([A-Za-z0-9_.-]+)\s*\]{1,2}\s*(#.*)?$")
_KEY = re.compile(r"^\s*([A-Za-z0-9_-]+)\s*=")


def _line_of(text: str, location: Location) -> int:
    """Line of a key, else of its table, else 0. Reads headers and keys only: enough to point, not to parse."""
    header, index, best = "", -1, 0
    counts: dict[str, int] = {}
    wanted_header = str(location[0]) if location else ""
    wanted_index = location[1] if len(location) > 1 and isinstance(location[1], int) else None
    keys = [str(part) for part in location if isinstance(part, str)]
    for number, line in enumerate(text.splitlines(), start=1):
        if match := _HEADER.match(line):
            header = match.group(1)
            index = counts.get(header, -1) + 1
            counts[header] = index
            if header == wanted_header and wanted_index in {None, index}:
                best = number
        elif match := _KEY.match(line):
            inside = header == wanted_header and wanted_index in {None, index} and len(keys) > 1
            if (inside and match.group(1) == keys[1]) or (not header and keys and match.group(1) == keys[0]):
                return number
    return best
