"""The wrist: three folds of real recordings, each with a model of its own, watched by the reference it ships with.

Data roles are the task's: weights from `train`, early stopping and the claim from `select`, the reference from
`calibrate`. Everything counted here is counted on `stream`, the last third of each enrolled wearer's recordings,
which nothing was fitted to or chosen on; it comes later in time than all of them (forward roles). There are about
800 such windows a fold and no more: orders of the recordings can be repeated, windows cannot be had anew, so no
alarm in 20 orders is a statement about these windows, not a run length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.drift import Reference, load_reference
from agent.engine import OnnxEngine
from compressor import assess, evidence
from compressor.cache import Cache
from compressor.evaluate import ask, fault_accuracy
from compressor.jobs import Job, run_job
from compressor.recipe import open_task, read_recipe
from compressor.reference import ViewRows
from compressor.task import Fault, Role, Rows
from scripts.drift_bench.ours import alarms, first_alarm

RECIPE = Path(__file__).resolve().parents[2] / "compressor/examples/wrist/recipe.toml"
FOLDS = ((1, 2, 3), (4, 5, 6), (8, 9, 10))  # who is new
MODEL = "c48"
ORDERS = 20
RUNS = 20  # of each fault on each fold
CLEAN_ROWS = 60  # before a fault begins, up to twice as many
SESSION_ROWS = 370
FOUND_WITHIN_ROWS = 60
HARMFUL_DROP = 0.10
SEED = 20260201

Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Fold:
    """One choice of new wearers with the model trained without them. `bench`: task, data, cache, engines' folder."""

    new_wearers: tuple[int, ...]
    bench: assess.Bench
    engine: OnnxEngine
    reference: Reference

    def rows(self, role: Role) -> Rows:
        return self.bench.data.role(role)

    def view(self, rows: Rows, windows: NDArray[np.float32] | None = None) -> ViewRows:
        """What the serving engine's graph says of `rows`, or of the same rows with other `windows`."""
        answers = ask(self.engine, self.bench.task.input_name, rows.windows if windows is None else windows)
        return ViewRows(answers.view.astype(np.float64), answers.predicted, rows.recordings)

    @cached_property
    def clean(self) -> ViewRows:
        return self.view(self.rows(Role.STREAM))

    @cached_property
    def clean_accuracy(self) -> float:
        rows = self.rows(Role.STREAM)
        return ask(self.engine, self.bench.task.input_name, rows.windows).accuracy(rows.labels)

    def broken(self, fault: Fault, draw: int) -> ViewRows:
        """The stream with the fault in every row; another `draw`, another random part of it."""
        rows = self.rows(Role.STREAM)
        return self.view(rows, fault.apply(rows.windows, draw))

    def cost(self, fault: Fault) -> float:
        """Accuracy this model loses on the stream."""
        rows = self.rows(Role.STREAM)
        return self.clean_accuracy - fault_accuracy(self.engine, self.bench.task.input_name, rows, fault)


@dataclass(frozen=True, slots=True)
class Found:
    """One fault on one fold. `delays`: rows to the alarm, inf where none came; `named`: of those that came,
    whether the first channel is a touched one.
    """

    fault: str
    cost: float
    delays: tuple[float, ...]
    named: tuple[bool, ...]


def open_fold(new_wearers: Sequence[int], cache: Path, scratch: Path, say: Say, *, model: str = MODEL) -> Fold:
    """Train the fold's model, or take it from the cache, and build its reference as a shipped artifact's is.

    Raises: EdgewardenError: the data is missing, or training failed.
    """
    recipe = read_recipe(RECIPE)
    recipe = recipe.model_copy(
        update={
            "data": {**recipe.data, "new_wearers": list(new_wearers)},
            "quantise": recipe.quantise.model_copy(update={"precisions": ("float32",)}),
        }
    )
    (table,) = (one for one in recipe.model if one.name == model)
    task, task_sha256 = open_task(recipe, RECIPE)
    scratch.mkdir(parents=True, exist_ok=True)
    bench = assess.Bench(recipe, task, task_sha256, task.load(recipe.data), Cache(cache), scratch)
    (variant,) = run_job(Job(recipe, RECIPE, table, cache), lambda name, step, _: say(f"{name}: {step}"))
    watch = evidence.watch(bench, variant, detection_runs=0)
    return Fold(tuple(new_wearers), bench, bench.engine(variant), load_reference(watch.reference))


def orders(rows: Rows, count: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Row numbers: each recording in time order, recordings shuffled; every other order wearer by wearer."""
    generator = np.random.default_rng([SEED, seed])
    source_of = {int(name): int(rows.sources[rows.recordings == name][0]) for name in np.unique(rows.recordings)}
    for number in range(count):
        names = generator.permutation(list(source_of))
        if number % 2:
            wearers = generator.permutation(sorted(set(source_of.values())))
            names = [name for wearer in wearers for name in names if source_of[int(name)] == wearer]
        yield np.concatenate([np.flatnonzero(rows.recordings == name) for name in names])


def null_alarms(fold: Fold, count: int = ORDERS, seed: int = 0) -> int:
    """Alarms on the untouched stream in `count` orders, a fresh monitor for each."""
    return sum(
        len(alarms(fold.reference, fold.clean[order])) for order in orders(fold.rows(Role.STREAM), count, seed)
    )


def harmful(fold: Fold) -> list[tuple[Fault, float]]:
    """The task's faults that cost this model HARMFUL_DROP or more on the stream, with what they cost."""
    costs = [(fault, fold.cost(fault)) for fault in fold.bench.task.all_faults()]
    return [(fault, cost) for fault, cost in costs if cost >= HARMFUL_DROP]


def find(fold: Fold, fault: Fault, cost: float, runs: int = RUNS, seed: int = 0) -> Found:
    """Put the fault in after CLEAN_ROWS to twice as many clean rows, `runs` times, and wait for SESSION_ROWS."""
    generator = np.random.default_rng([SEED + 1, seed])
    broken = [fold.broken(fault, draw) for draw in range(min(runs, fault.draws))]
    delays, named = [], []
    for run, order in enumerate(orders(fold.rows(Role.STREAM), runs, seed + 1)):
        start = int(generator.integers(CLEAN_ROWS, 2 * CLEAN_ROWS))
        faulty = broken[run % len(broken)][order[start : start + SESSION_ROWS]]
        found = first_alarm(fold.reference, fold.clean[order[:start]], faulty)
        delays.append(float("inf") if found is None else found[0])
        if found is not None:
            named.append(found[1].channels[0] in fault.channels)
    return Found(fault.name, cost, tuple(delays), tuple(named))


def measure(
    build: Path, scratch: Path, say: Say, *, folds: Sequence[Sequence[int]] = FOLDS, count: int = ORDERS,
    runs: int = RUNS,
) -> dict[str, Any]:  # fmt: skip
    """The section `wrist` of the document, and its details."""
    rows = null = 0
    found: list[Found] = []
    accuracy, tables = {}, {}
    for new in folds:
        name = "-".join(map(str, new))
        say(f"new wearers {name}: model and reference")
        fold = open_fold(new, build / "cache", scratch / name, say)
        rows += len(fold.clean)
        null += null_alarms(fold, count)
        accuracy[name] = round(fold.clean_accuracy, 4)
        say(f"new wearers {name}: faults")
        these = [find(fold, fault, cost, runs) for fault, cost in harmful(fold)]
        found += these
        tables[name] = [_line(one) for one in these]
    return {
        "wrist": {"null_rows": rows, "null_orders": count, "null_alarms": null, **shares(found)},
        "details": {"accuracy": accuracy, "harmful_faults": tables, "worst": _worst(found)},
    }


def shares(found: Sequence[Found]) -> dict[str, float | None]:
    """Of all runs: found within FOUND_WITHIN_ROWS; of the found ones: a touched channel first."""
    delays = [delay for one in found for delay in one.delays]
    named = [hit for one in found for hit in one.named]
    return {
        "harmful_found_share": round(float(np.mean(np.array(delays) <= FOUND_WITHIN_ROWS)), 4) if delays else None,
        "named_share": round(float(np.mean(named)), 4) if named else None,
    }


def _worst(found: Sequence[Found]) -> dict[str, Any]:
    """The fault that is worst found and the one worst named, over all folds."""
    by_fault = {one.fault: shares([other for other in found if other.fault == one.fault]) for one in found}

    def least(key: str) -> list[Any]:
        known = {name: line[key] for name, line in by_fault.items() if line[key] is not None}
        return [min(known, key=known.__getitem__), min(known.values())] if known else []

    return {"found": least("harmful_found_share"), "named": least("named_share"), "by_fault": by_fault}


def _line(one: Found) -> dict[str, Any]:
    median = float(np.median(one.delays))
    return {
        "fault": one.fault, "cost": round(one.cost, 3), "runs": len(one.delays),
        "median_rows": median if np.isfinite(median) else None, **shares([one]),
    }  # fmt: skip
