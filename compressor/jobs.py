"""Where trainings run: one job per model of the recipe, each single-threaded, a few side by side.

A job trains, exports and quantises; every step looks into the cache first, so an interrupted run goes on where
it stopped. Results do not depend on how many jobs run at once.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from agent import clock
from agent.contract.artifact import sha256
from compressor.cache import Cache, stage_key
from compressor.candidate import Variant
from compressor.enrolment import Halves
from compressor.errors import StageFailed
from compressor.files import dump_arrays, load_arrays
from compressor.recipe import ModelTable, Recipe, open_task
from compressor.task import Role, Task, TaskData

if TYPE_CHECKING:
    from compressor.calibrators import Scale

PARITY_ROWS = 256
EXPORT_SOURCES = ("stages/export.py", "views.py", "lowering.py", "families.py")

Report = Callable[[str, str, float], None]
"""(model, step, work): so much work of this model is done, by this step."""

Made = TypeVar("Made")
Run = Callable[["Job", Report], Made]

# What a user's task, torch or the exporter may raise; translated once, here.
FOREIGN = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, OSError, MemoryError)


@dataclass(frozen=True, slots=True)
class Job:
    """One model to be made; `newcomers`: the recordings it is to be taught besides, in a regeneration."""

    recipe: Recipe
    recipe_path: Path
    model: ModelTable
    cache: Path
    newcomers: Halves | None = None


def work(model: ModelTable) -> float:
    """Expected effort of a job, in arbitrary units: so that a progress bar moves evenly."""
    return _epoch_work(model) * model.epochs + 8.0


def _epoch_work(model: ModelTable) -> float:
    return model.width / (12 if model.family == "residual" else 48) + 0.4


@contextmanager
def translated(stage: str, subject: str) -> Iterator[None]:
    """Foreign errors of a stage become StageFailed."""
    try:
        yield
    except FOREIGN as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise StageFailed(stage, subject, f"{type(error).__name__}: {reason}") from error


def run_jobs(jobs: Sequence[Job], report: Report, *, run: Run[Made]) -> dict[str, Made]:
    """What `run` makes of every job, by model name; several run at once, each in a process of its own.

    Raises:
        StageFailed, RecipeError, DataError, StorageError
    """
    processes = min(len(jobs), jobs[0].recipe.train.processes) if jobs else 1
    if processes <= 1:
        return {job.model.name: run(job, report) for job in jobs}
    context = multiprocessing.get_context("spawn")  # torch does not survive a fork with threads
    messages: SimpleQueue[tuple[str, str, float]] = context.SimpleQueue()
    with ProcessPoolExecutor(processes, context, initializer=_adopt, initargs=(messages,)) as pool:
        try:
            futures = {pool.submit(_run_in_child, run, job): job for job in jobs}
            return _collect(futures, messages, report)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()
            raise


def _collect(
    futures: dict[Future[Made], Job], messages: SimpleQueue[tuple[str, str, float]], report: Report
) -> dict[str, Made]:
    results: dict[str, Made] = {}
    waiting = set(futures)
    while waiting:
        done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
        while not messages.empty():
            report(*messages.get())
        for future in done:
            name = futures[future].model.name
            try:
                results[name] = future.result()
            except BrokenProcessPool as error:
                raise StageFailed(
                    "train", name, "its process was ended from outside",
                    hint="Often this is too little memory; set train.processes = 1 and run again.",
                ) from error  # fmt: skip
    return results


_messages: SimpleQueue[tuple[str, str, float]] | None = None


def _adopt(messages: SimpleQueue[tuple[str, str, float]]) -> None:
    global _messages  # noqa: PLW0603 - a pool's initializer has no other way to hand something to its calls
    _messages = messages
    threading.Thread(target=_end_with_parent, name="ew-parent", daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed can end nobody: its trainings end themselves."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run_in_child(run: Run[Made], job: Job) -> Made:
    def report(model: str, step: str, done: float) -> None:
        if _messages is not None:
            _messages.put((model, step, done))

    return run(job, report)


def run_job(job: Job, report: Report) -> tuple[Variant, ...]:
    """Train, export and quantise one model of the recipe."""
    task, task_sha256 = open_task(job.recipe, job.recipe_path)
    with translated("load data", task.name):
        data = task.load(job.recipe.data)
    weights = trained_weights(job, task, task_sha256, data, report)
    return build_variants(job, task, task_sha256, data, weights, report)


def trained_weights(
    job: Job, task: Task, task_sha256: str, data: TaskData, report: Report, *, start: bytes = b""
) -> bytes:
    """Float weights of one model as an .npz, trained now or before; `start`: weights to go on from."""
    from compressor.stages import train as stage

    model, cache = job.model, Cache(job.cache)
    inputs = {
        "task": task_sha256, "data": data.sha256, "settings": job.recipe.data, "seed": job.recipe.seed,
        "model": model.model_dump(mode="json"), "train": job.recipe.train.model_dump(exclude={"processes"}),
    }  # fmt: skip
    if start:
        inputs["start"] = sha256(start)
    key = stage_key("train", inputs, sources=stage.SOURCES)
    if kept := cache.get(key):
        report(model.name, "trained before", _epoch_work(model) * model.epochs)
        return kept["weights.npz"]

    def on_epoch(epoch: int, accuracy: float) -> None:
        report(model.name, f"epoch {epoch + 1}/{model.epochs}, select {accuracy:.3f}", _epoch_work(model))

    stage.prepare_torch()
    with translated("train", model.name):
        known = load_arrays(start, where=f"weights of {model.name}") if start else None
        trained = stage.train(
            task, data, model, job.recipe.train, seed=job.recipe.seed, on_epoch=on_epoch, start=known
        )
    weights = dump_arrays(trained.arrays)
    history = json.dumps({"select_accuracy": trained.history, "epoch": trained.epoch}).encode()
    cache.put(key, {"weights.npz": weights, "history.json": history})
    return weights


def build_variants(
    job: Job, task: Task, task_sha256: str, data: TaskData, weights: bytes, report: Report
) -> tuple[Variant, ...]:
    """ONNX files of one trained model in every precision the recipe asks for."""
    variants = []
    for precision in job.recipe.quantise.precisions:
        started = clock.monotonic_s()
        key = _export_key(job, task_sha256, data, weights, precision)
        kept = Cache(job.cache).get(key)
        if kept is None:
            with translated("export", f"{job.model.name} {precision}"):
                kept = _exported(job, task, data, weights, precision)
            Cache(job.cache).put(key, kept)
        report(job.model.name, f"exported {precision}", 8.0 / len(job.recipe.quantise.precisions))
        variants.append(_variant(job.model, precision, kept, clock.monotonic_s() - started))
    return tuple(variants)


def _export_key(job: Job, task_sha256: str, data: TaskData, weights: bytes, precision: str) -> str:
    from compressor.stages import quantize_static

    inputs = {
        "task": task_sha256, "data": data.sha256, "settings": job.recipe.data, "weights": sha256(weights),
        "model": job.model.model_dump(mode="json"), "precision": precision,
        "calibrator": job.recipe.quantise.calibrator,
    }  # fmt: skip
    return stage_key("export", inputs, sources=EXPORT_SOURCES + quantize_static.SOURCES)


def _exported(job: Job, task: Task, data: TaskData, weights: bytes, precision: str) -> dict[str, bytes]:
    """model.onnx, what torch answers (parity.npz) and a few facts (facts.json) of one precision."""
    import torch

    from compressor.families import parameter_count
    from compressor.lowering import fold
    from compressor.stages import export, quantize_static, train

    train.prepare_torch()
    arrays = load_arrays(weights, where=f"weights of {job.model.name}")
    network = train.restore(task, job.model, arrays)
    reads = task.positions(job.model.channels)
    mean, sd = (torch.from_numpy(np.asarray(arrays[name], np.float32)) for name in ("mean", "sd"))
    folded = fold(network)
    served = export.Served(folded, reads=reads, mean=mean, sd=sd, combinations=task.combinations)
    scales: dict[str, Scale] = {}
    calibrate = data.role(Role.CALIBRATE)
    if precision == "int8":
        lowered, scales = quantize_static.quantize_static(
            folded, served, calibrate, calibrator=job.recipe.quantise.calibrator
        )
        served = export.Served(lowered, reads=reads, mean=mean, sd=sd, combinations=task.combinations)
    with torch.no_grad():
        probability = served(torch.from_numpy(calibrate.windows[:PARITY_ROWS]))[0].numpy()
    shape = (task.window.length, len(task.channels))
    facts: dict[str, Any] = {
        "parameters": parameter_count(network),
        "scales": {name: (scale.scale, scale.zero_point) for name, scale in scales.items()},
    }
    return {
        "model.onnx": export.export(served, input_name=task.input_name, shape=shape),
        "parity.npz": dump_arrays({"probability": probability}),
        "facts.json": json.dumps(facts, sort_keys=True).encode(),
    }


def _variant(model: ModelTable, precision: str, files: dict[str, bytes], seconds: float) -> Variant:
    facts = json.loads(files["facts.json"])
    parity = load_arrays(files["parity.npz"], where=f"parity rows of {model.name}")
    return Variant(
        name=model.name if precision == "float32" else f"{model.name}-{precision}",
        model=model,
        precision=precision,
        onnx=files["model.onnx"],
        parameters=facts["parameters"],
        torch_probability=np.asarray(parity["probability"], np.float32),
        scales={name: (float(scale), int(zero)) for name, (scale, zero) in facts["scales"].items()},
        seconds=seconds,
    )
