"""A recipe's second run: the same models taught what newcomers uploaded, and held against the first on old and new.

A model goes on from its first weights, with old and new rows together. What it learnt is judged on the half of each
newcomer's recording it was not trained on, and by a second training with the halves exchanged, so that every
uploaded row judges once. Rows kept for the very last test are never read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from compressor.assess import Bench
from compressor.candidate import Candidate, Gate, Variant
from compressor.enrolment import Enrolment, Halves, join
from compressor.evaluate import ask
from compressor.files import load_arrays
from compressor.jobs import Job, Report, build_variants, run_job, trained_weights, translated, work
from compressor.recipe import ModelTable, Recipe, RegenerateTable, open_task
from compressor.select import Lineup
from compressor.task import Role, Rows, Task

KEPT = "-kept"
SWAPPED = "enrol_swapped"  # accuracy of the exchanged training, on the halves the shipped one was trained on


@dataclass(frozen=True, slots=True)
class Taught:
    """One model before and after; `second` is empty for the teacher, which stays as the measure of the others."""

    first: tuple[Variant, ...]
    second: tuple[Variant, ...] = ()
    swapped: float = 0.0


@dataclass(frozen=True, slots=True)
class Regeneration:
    """What a report tells of a second run besides its candidates. `before`: what the first run chose, by class."""

    halves: Halves
    before: Mapping[str, Lineup]

    @property
    def enrolment(self) -> Enrolment:
        return self.halves.straight


# --- training ------------------------------------------------------------------------------------------------
def second_work(recipe: Recipe) -> float:
    """Effort of the trainings of a second run, in the unit of `jobs.work`."""
    return sum(2 * work(_shorter(model, recipe)) for model in recipe.model if model.role != "teacher")


def teach(job: Job, report: Report) -> Taught:
    """A model's first variants (from the cache, where its first run left them) and its second ones."""
    first = run_job(job, report)
    if job.newcomers is None or job.model.role == "teacher":
        return Taught(first)
    task, task_sha256 = open_task(job.recipe, job.recipe_path)
    with translated("load data", task.name):
        data = task.load(job.recipe.data)
    start = trained_weights(job, task, task_sha256, data, lambda *_: None)
    short = _second_job(job)
    repeat = job.recipe.regenerate.repeat
    straight = join(data, job.newcomers.straight, repeat=repeat)
    weights = trained_weights(short, task, task_sha256, straight, report, start=start)
    second = build_variants(job, task, task_sha256, straight, weights, report)
    swapped = join(data, job.newcomers.swapped, repeat=repeat)
    exchanged = trained_weights(short, task, task_sha256, swapped, report, start=start)
    return Taught(first, second, _accuracy(job, task, exchanged, job.newcomers.swapped.reference))


def _second_job(job: Job) -> Job:
    """The same training, shorter and gentler."""
    rules, train = job.recipe.regenerate, job.recipe.train
    slower = train.model_copy(update={"learning_rate": train.learning_rate * rules.learning_rate_share})
    recipe = job.recipe.model_copy(update={"train": slower})
    return replace(job, recipe=recipe, model=_shorter(job.model, recipe))


def _shorter(model: ModelTable, recipe: Recipe) -> ModelTable:
    return model.model_copy(update={"epochs": max(2, math.ceil(model.epochs * recipe.regenerate.epochs_share))})


def _accuracy(job: Job, task: Task, weights: bytes, rows: Rows) -> float:
    """Of the float network, in torch: what is asked is whether training generalises, not how it is shipped."""
    import torch

    from compressor.stages import train

    arrays = load_arrays(weights, where=f"weights of {job.model.name}")
    network = train.restore(task, job.model, arrays)
    reads = task.positions(job.model.channels)
    mean, sd = (torch.from_numpy(np.asarray(arrays[name], np.float32)) for name in ("mean", "sd"))
    with torch.no_grad():
        x = train.normalise(torch.from_numpy(rows.windows), task.combinations, reads, mean, sd)
        predicted = network(x).argmax(1).numpy()
    return float((predicted == rows.labels).mean())


# --- judging ---------------------------------------------------------------------------------------------------
def second_bench(bench: Bench, halves: Halves) -> Bench:
    """The first run's bench with old and new rows together."""
    data = join(bench.data, halves.straight, repeat=bench.recipe.regenerate.repeat)
    return replace(bench, data=data, newcomers=True)


def on_newcomers(bench: Bench, candidate: Candidate, halves: Halves) -> Candidate:
    """A candidate of the first run with its accuracy on both halves of the newcomers' recordings: it saw neither."""
    engine, name = bench.engine(candidate.variant), bench.task.input_name
    found = {
        key: ask(engine, name, rows.windows).accuracy(rows.labels)
        for key, rows in (
            (Role.ENROL_REFERENCE.value, halves.straight.reference),
            (SWAPPED, halves.swapped.reference),
        )
    }
    return replace(candidate, accuracy={**candidate.accuracy, **found})


def before(bench: Bench, lineup: Lineup, halves: Halves) -> Lineup:
    """What the first run chose, with its accuracy on newcomers."""
    return replace(
        lineup,
        active=on_newcomers(bench, lineup.active, halves),
        fallbacks={name: on_newcomers(bench, one, halves) for name, one in lineup.fallbacks.items()},
    )


def with_swapped(candidates: Sequence[Candidate], taught: Mapping[str, Taught]) -> tuple[Candidate, ...]:
    return tuple(
        replace(one, accuracy={**one.accuracy, SWAPPED: taught[one.variant.model.name].swapped}) for one in candidates
    )


def new_accuracy(candidate: Candidate, halves: Halves) -> float:
    """On all uploaded rows, each judged by a training that had not seen it."""
    counts = (len(halves.straight.reference), len(halves.swapped.reference))
    return float(
        np.average([candidate.accuracy[key] for key in (Role.ENROL_REFERENCE.value, SWAPPED)], weights=counts)
    )


def on_reference(told: Regeneration, device: str, engines: Mapping[str, Candidate]) -> dict[str, Any]:
    """For the card: what ships, on the halves it was not trained on, and what shipped before it."""
    former = told.before[device]
    firsts = {name: former.fallbacks.get(name, former.active) for name in engines}

    def figures(ones: Mapping[str, Candidate]) -> dict[str, float]:
        return {name: round(one.accuracy[Role.ENROL_REFERENCE], 4) for name, one in ones.items()}

    rows = len(told.enrolment.reference)
    return {"role": Role.ENROL_REFERENCE.value, "rows": rows, **figures(engines), "before": figures(firsts)}


def second_gates(limits: RegenerateTable, first: Candidate, second: Candidate, halves: Halves) -> tuple[Gate, ...]:
    """Not worse than the first on newcomers; on known rows worse by no more than the recipe allows."""
    gain = new_accuracy(second, halves) - new_accuracy(first, halves)
    lost = first.accuracy[Role.SELECT] - second.accuracy[Role.SELECT]
    return (
        Gate("new", round(gain, 6), 0.0, "gain on newcomers' rows", at_least=True),
        Gate("forgetting", round(lost, 6), limits.forgetting, "drop on known rows"),
    )


def gated(
    candidates: Sequence[Candidate], lineup: Lineup, limits: RegenerateTable, halves: Halves
) -> tuple[Candidate, ...]:
    """Candidates that must also hold against what the first run shipped in their place."""
    firsts = {one.variant.model.name: one for one in lineup.fallbacks.values()}
    return tuple(
        replace(one, gates=one.gates + second_gates(limits, _first(one, lineup, firsts), one, halves))
        for one in candidates
    )


def _first(candidate: Candidate, lineup: Lineup, firsts: Mapping[str, Candidate]) -> Candidate:
    return firsts[candidate.variant.model.name] if candidate.variant.model.role == "fallback" else lineup.active


def kept(lineup: Lineup) -> tuple[Candidate, ...]:
    """The first run's fallbacks under names of their own: they go on where no successor passes its gates."""
    return tuple(
        replace(one, variant=replace(one.variant, name=f"{one.name}{KEPT}")) for one in lineup.fallbacks.values()
    )
