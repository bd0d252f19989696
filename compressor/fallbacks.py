"""Rebuilds the shipped fallback models from committed float weights: no training, the same bytes every time.

    <folder>/<name>.weights.npz   float weights of a fallback of the recipe (`keep_weights` writes it)
    <folder>/<name>/              the artifact made of them
    <folder>/<service>-floor/     the constant answer
    <folder>/built-on.json        the machine: equal bytes are promised for machines of its kind

A device that has nothing else yet can serve these. Export, golden answers, reference and card are made anew
from weights and data, and compared by `--check`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from agent.contract.artifact import Budget, Choice, canonical
from agent.contract.errors import EdgewardenError
from agent.engine import OnnxEngine
from compressor import assess, evidence, package
from compressor.cache import Cache
from compressor.candidate import Variant
from compressor.errors import RecipeError, StageFailed
from compressor.evaluate import FaultLine, ask
from compressor.files import write_file
from compressor.jobs import Job, build_variants, trained_weights, translated
from compressor.measure import machine
from compressor.recipe import ModelTable, Recipe, open_task, read_recipe
from compressor.shipping import floor_name
from compressor.task import Role

RECIPE = Path(__file__).parent / "examples" / "wrist" / "recipe.toml"
FOLDER = Path(__file__).parent.parent / "fallback_models"
DEVICE_CLASS = "any"
BUILT_ON = "built-on.json"


def machine_class() -> dict[str, str | int]:
    """What equal bytes are promised for: the processor's last bits and the libraries' versions."""
    return {name: value for name, value in machine().items() if name not in {"cores", "python", "system"}}


def weights_path(folder: Path, service: str, model: ModelTable) -> Path:
    return folder / f"{service}-{model.name}.weights.npz"


def keep_weights(recipe_path: Path, folder: Path, cache: Path) -> list[Path]:
    """Train the recipe's fallbacks (or take them from the cache) and write their float weights.

    Raises:
        RecipeError, DataError, StageFailed, StorageError
    """
    recipe = read_recipe(recipe_path)
    task, task_sha256 = open_task(recipe, recipe_path)
    data = task.load(recipe.data)
    written = []
    for model in _fallbacks(recipe):
        job = Job(recipe, recipe_path, model, cache)
        path = weights_path(folder, task.service, model)
        write_file(path, trained_weights(job, task, task_sha256, data, lambda *_: None))
        written.append(path)
    return written


def rebuild(recipe_path: Path, folder: Path, out: Path) -> dict[str, Path]:
    """Write the artifacts below `out` from the weights in `folder`; artifact name -> its folder.

    Raises:
        RecipeError, DataError, StageFailed, Corrupt, StorageError
    """
    recipe = read_recipe(recipe_path)
    task, task_sha256 = open_task(recipe, recipe_path)
    with translated("load data", task.name):
        data = task.load(recipe.data)
    origin = package.Origin(recipe.sha256, task_sha256, data.sha256, recipe.data, recipe.seed)
    with tempfile.TemporaryDirectory(prefix="edgewarden-") as scratch:
        # a cache of its own: a rebuild must not lean on what an earlier run left behind
        bench = assess.Bench(recipe, task, task_sha256, data, Cache(Path(scratch) / "cache"), Path(scratch))
        variants = {
            f"{task.service}-{model.name}": _variant(bench, recipe_path, folder, model)
            for model in _fallbacks(recipe)
        }
        contents = _contents(bench, origin, variants)
        for content in contents:
            package.write_artifact(out / content.name, package.build_artifact(content))
    return {content.name: out / content.name for content in contents}


def _fallbacks(recipe: Recipe) -> list[ModelTable]:
    found = [model for model in recipe.model if model.role == "fallback"]
    if not found:
        raise RecipeError(f"recipe '{recipe.name}' has no model with role = 'fallback'")
    return found


def _variant(bench: assess.Bench, recipe_path: Path, folder: Path, model: ModelTable) -> Variant:
    """The float form: nobody measures anything here, and float runs well everywhere."""
    path = weights_path(folder, bench.task.service, model)
    try:
        weights = path.read_bytes()
    except OSError as error:
        raise StageFailed("read weights", str(path), error.strerror or "unreadable") from None
    quantise = bench.recipe.quantise.model_copy(update={"precisions": ("float32",)})
    job = Job(bench.recipe.model_copy(update={"quantise": quantise}), recipe_path, model, bench.cache.folder)
    return build_variants(job, bench.task, bench.task_sha256, bench.data, weights, lambda *_: None)[0]


def _contents(bench: assess.Bench, origin: package.Origin, variants: dict[str, Variant]) -> list[package.Content]:
    floor = floor_name(bench.task)
    prior = evidence.class_prior(bench.task, bench.data)
    stream = bench.data.role(Role.STREAM)
    columns = {name: evidence.fault_column(bench, variant) for name, variant in variants.items()}
    columns[floor] = evidence.floor_column(bench, prior)
    accuracy = {name: _accuracy(bench, variant) for name, variant in variants.items()}
    accuracy[floor] = columns[floor][0]
    best = next(iter(variants))
    faults = evidence.table(bench, columns, active=best, clean=accuracy[best])
    contents = [
        _content(bench, origin, name, accuracy, faults, len(stream), variant=variant, fallbacks=(floor,))
        for name, variant in variants.items()
    ]
    return [*contents, _content(bench, origin, floor, accuracy, faults, len(stream), prior=prior)]


def _accuracy(bench: assess.Bench, variant: Variant) -> float:
    rows = bench.data.role(Role.STREAM)
    engine: OnnxEngine = bench.engine(variant)
    return ask(engine, bench.task.input_name, rows.windows).accuracy(rows.labels)


def _content(
    bench: assess.Bench, origin: package.Origin, name: str, accuracy: dict[str, float],
    faults: tuple[FaultLine, ...], rows: int, *, variant: Variant | None = None,
    fallbacks: tuple[str, ...] = (), prior: Sequence[float] = (),
) -> package.Content:  # fmt: skip
    watch = None if variant is None else evidence.watch(bench, variant, detection_runs=0)
    card = package.make_card(
        accuracy=accuracy, role=Role.STREAM, rows=rows, faults=faults, origin=origin, package=bench.recipe.package,
        device_class=DEVICE_CLASS, claim=watch.claim if watch else None, monitor=watch.monitor if watch else None,
    )  # fmt: skip
    return package.Content(
        name=name,
        task=bench.task,
        package=bench.recipe.package,
        origin=origin,
        budget=Budget(device_class=DEVICE_CLASS),
        fallbacks=fallbacks,
        card=card,
        choice=Choice(
            variant=variant.name if variant else "class-prior", device_class=DEVICE_CLASS,
            reason="shipped with the agent, for when nothing better is installed",
        ),
        precision=variant.precision if variant else "constant",
        reads=bench.task.channels_behind(variant.model.channels) if variant else (),
        model=variant.onnx if variant else None,
        reference=watch.reference if watch else None,
        golden=evidence.golden(bench, variant) if variant else None,
        prior=prior,
    )  # fmt: skip


def differences(left: Path, right: Path) -> list[str]:
    """Files below two folders that are missing in one or differ; the weights themselves are not looked at."""

    def below(folder: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.glob("*/*"))
            if path.is_file() and not path.parent.name.startswith(".")
        }

    one, two = below(left), below(right)
    return sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of scripts/make-fallback-models; returns an exit code."""
    parser = argparse.ArgumentParser(prog="make-fallback-models", description="Rebuild the shipped fallback models.")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="weights and artifacts (default %(default)s)")
    parser.add_argument("--check", action="store_true", help="build elsewhere and compare; change nothing")
    parser.add_argument("--retrain", action="store_true", help="train first and replace the weights")
    parser.add_argument("--cache", type=Path, default=Path("build/cache"), help="used by --retrain only")
    options = parser.parse_args(arguments)
    say = sys.stderr.write
    try:
        if options.retrain:
            for path in keep_weights(options.recipe, options.folder, options.cache):
                say(f"trained {path}\n")
        if options.check:
            with tempfile.TemporaryDirectory(prefix="edgewarden-") as scratch:
                rebuild(options.recipe, options.folder, Path(scratch))
                different = differences(options.folder, Path(scratch))
            say(f"differs: {', '.join(different)}\n" if different else "byte for byte the same\n")
            return 1 if different else 0
        for name, folder in rebuild(options.recipe, options.folder, options.folder).items():
            say(f"{name}: {folder}\n")
        write_file(options.folder / BUILT_ON, canonical(machine_class()))
    except EdgewardenError as error:
        say(f"make-fallback-models: {error.sentence()}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
