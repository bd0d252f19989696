"""Real streams besides the wrist: employment, shuttle, digits. What may be claimed of each is what replay shows.

The data comes with packages that are installed without what they need and of which only the files are read.
"""

from __future__ import annotations

import csv
import gzip
import io
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.contract.errors import EdgewardenError
from agent.decisions.choice import read_card
from agent.decisions.events import Activate, AgentStarted, AlarmKind, AlarmRaised, Level, WorkerReady
from agent.decisions.service import ServicePolicy
from agent.decisions.supervisor import Supervisor
from scripts.drift_bench.bounds import run_length
from scripts.drift_bench.ours import CLAIM_ROWS, stationary_reference, watching
from scripts.drift_bench.streams import Rows
from scripts.drift_bench.workers import DATA, HERE
from scripts.lib.environments import Failed, prepare

MOST_ALARMS = 400  # a stream that is always away from its reference is not followed to its end
REPORTED_ROWS = 2_000  # an alarm is left standing that long before the monitor is looked at anew

Say = Callable[[str], None]
Floats = NDArray[np.float64]


def packages_folder(build: Path) -> Path:
    """Site-packages of the environment that holds the data. Raises: Failed."""
    environment = build / "environments" / DATA.name
    prepare(environment, HERE / "data.txt", DATA.packages, dependencies=False)
    (found,) = environment.glob("lib/python3*/site-packages")
    return found


# --- employment -------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, eq=False)
class Employment:
    """Features: age, coded answers, the frozen model's probability, in the order of the file."""

    names: tuple[str, ...]
    reference: Floats
    later: Floats
    accuracy: tuple[float, float]  # of the frozen model, before and after


def employment(build: Path, say: Say, *, rows: int | None = None) -> dict[str, Any]:
    """The section `employment`: a real shift that harms nobody must be told and must not switch."""
    data = _employment(build, packages_folder(build))
    later = data.later if rows is None else data.later[:rows]
    replay, cut = data.reference, int(0.7 * len(data.reference))
    say("employment: replay of the reference's own later part")
    quiet = _alarms(replay[:cut], replay[cut:])
    say(f"employment: {len(later):,} later rows")
    told = _alarms(data.reference, later)
    switches = switches_after(told["alarms"] or 0)
    return {
        "employment": {"switches": switches},
        "details": {
            "features": data.names, "accuracy_before_after": data.accuracy, "replay": quiet, "later": told,
            "claim": _claim(quiet), "switches_told": "alarms of level drift given to the shipped decisions",
        },
    }  # fmt: skip


def switches_after(alarms: int) -> int:
    """Alarms of level drift, one after another, given to the shipped decisions: how often they leave the model."""
    document = {"accuracy": {"role": "held-out stream", "employment": 0.83, "employment-floor": 0.6}, "faults": []}
    engines = ("employment", "employment-floor")
    card = read_card(document, engines=engines, reads={}, floors=engines[1:], groups={})
    supervisor = Supervisor([ServicePolicy("employment", card)])
    commands = [*supervisor.handle(AgentStarted(), 0.0)]
    commands += supervisor.handle(WorkerReady(1, {"employment": engines}), 1.0)
    for number in range(max(1, alarms)):
        event = AlarmRaised("employment", AlarmKind.DRIFT, Level.DRIFT, ("age",), text="drift")
        commands += supervisor.handle(event, 10.0 + number)
    return sum(isinstance(one, Activate) and one.engine != "employment" for one in commands)


def _employment(build: Path, packages: Path) -> Employment:
    """Read by pyarrow in the data's own environment, kept as an npz."""
    kept = build / "employment.npz"
    if not kept.exists():
        python = build / "environments" / DATA.name / "bin/python"
        done = subprocess.run(
            [str(python), str(HERE / "employment_data.py"), str(packages), str(kept)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise Failed(f"employment data: {done.stderr.strip()[-300:]}")
    with np.load(kept) as file:
        accuracy = tuple(round(float(value), 4) for value in file["accuracy"])
        return Employment(tuple(file["names"].tolist()), file["reference"], file["later"], (accuracy[0], accuracy[1]))


# --- shuttle and digits -----------------------------------------------------------------------------------------
def shuttle(build: Path, say: Say) -> dict[str, Any]:
    """Nine sensors; the reference is made of normal rows, which come in an order that is no time."""
    say("shuttle")
    path = packages_folder(build) / "river/datasets/shuttle.csv.gz"
    table = np.array([[float(value) for value in row] for row in _csv(path)])
    normal, odd = table[table[:, 9] == 0, :9], table[table[:, 9] == 1, :9]
    half = len(normal) // 2
    quiet = _alarms(normal[:half], normal[half:])
    found = _alarms(normal[:half], odd)
    return {"details": {"rows": len(table), "replay": quiet, "anomalies": found, "claim": _claim(quiet)}}


def digits(build: Path, say: Say) -> dict[str, Any]:
    """8 x 8 pictures, pixels that never vary left out; 1,000 as the reference, the rest as they come."""
    say("digits")
    path = packages_folder(build) / "sklearn/datasets/data/digits.csv.gz"
    pixels = np.array([[float(value) for value in row] for row in _csv(path, header=False)])[:, :64]
    varies = pixels[:1_000].std(axis=0) > 0.5
    reference, rest = pixels[:1_000, varies], pixels[1_000:, varies]
    quiet = _alarms(reference, rest)
    generator = np.random.default_rng(0)
    changes = {
        "noise of 1 in 16": rest + generator.normal(0.0, 1.0, rest.shape),
        "darker by a tenth": 0.9 * rest,
        "one pixel dead": np.where(np.arange(rest.shape[1]) == rest.shape[1] // 2, 0.0, rest),
    }
    found = {name: _alarms(reference, changed, first=True) for name, changed in changes.items()}
    return {"details": {"features": int(varies.sum()), "replay": quiet, "changes": found, "claim": _claim(quiet)}}


def _csv(path: Path, *, header: bool = True) -> list[list[str]]:
    with gzip.open(path, "rb") as file:
        rows = list(csv.reader(io.TextIOWrapper(file)))
    return rows[1:] if header else rows


# --- both -------------------------------------------------------------------------------------------------------
def _alarms(reference: Floats, stream: Floats, *, first: bool = False) -> dict[str, Any]:
    """Alarms of the stationary monitor; one that stands is left standing for REPORTED_ROWS rows."""
    try:
        ours = watching(stationary_reference(_rows(reference)))
    except (EdgewardenError, ValueError) as error:
        return {"alarms": None, "refused": str(error)}
    rows, start, at, blamed = _rows(stream), 0, [], {}
    while start < len(rows) and len(at) < MOST_ALARMS:
        found = ours.first_finding(
            rows.features[start:], np.full(len(rows) - start, -1), rows.times_s[start:]
        )  # fmt: skip
        if found is None:
            break
        at.append(start + found[0])
        for name in found[1].channels[:1]:
            blamed[name] = blamed.get(name, 0) + 1
        if first:
            break
        start = at[-1] + REPORTED_ROWS
        ours.reset()
    seen = len(rows) if len(at) < MOST_ALARMS else at[-1]
    length, bound = run_length(len(at), seen)
    return {
        "rows": seen, "alarms": len(at), "first_alarm_row": at[0] if at else None,
        "run_length": round(length), "bound": bound, "named_first": blamed,
    }  # fmt: skip


def _claim(replay: dict[str, Any]) -> str:
    if replay["alarms"] is None:
        return f"nothing: {replay['refused']}"
    if replay["alarms"] == 0:
        return f"no alarm in {replay['rows']:,} held-out rows (95 %: at most one per {replay['run_length']:,})"
    least = f"{replay['alarms']} alarms in {replay['rows']:,} held-out rows"
    kept = replay["run_length"] >= CLAIM_ROWS
    return f"{least}: {'within the claim' if kept else 'the claim of one per 10,000 does not hold; watched only'}"


def _rows(features: Floats) -> Rows:
    return Rows(np.asarray(features, np.float64), np.full(len(features), np.nan))
