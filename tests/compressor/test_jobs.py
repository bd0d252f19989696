from __future__ import annotations

from pathlib import Path

import pytest

from compressor.errors import RecipeError, StageFailed
from compressor.jobs import Job, run_job, run_jobs, translated, work
from compressor.recipe import read_recipe
from tests.compressor.conftest import Run

pytestmark = pytest.mark.torch


def test_foreign_errors_become_a_failed_stage_and_ours_pass_through() -> None:
    with pytest.raises(StageFailed, match="stage 'export' failed on 'm': KeyError: 'x'"), translated("export", "m"):
        raise KeyError("x")
    with pytest.raises(RecipeError), translated("export", "m"):
        raise RecipeError("ours")


def test_work_grows_with_epochs_and_width() -> None:
    teacher, small, _ = read_recipe(Path(__file__).parent / "tiny" / "recipe.toml").model
    assert work(teacher.model_copy(update={"epochs": 100})) > work(teacher)
    assert work(small.model_copy(update={"width": 400})) > work(small)


def test_reported_work_adds_up_to_what_was_announced(tiny_run: Run, tmp_path: Path) -> None:
    recipe = read_recipe(tiny_run.recipe, overrides=['quantise.precisions=["float32"]'])
    job = Job(recipe, tiny_run.recipe, recipe.model[2].model_copy(update={"epochs": 3}), tmp_path)
    done: list[float] = []
    run_job(job, lambda *told: done.append(told[2]))
    assert sum(done) == pytest.approx(work(job.model))


def test_kept_results_are_the_ones_first_computed(tiny_run: Run) -> None:
    recipe = read_recipe(tiny_run.recipe)
    jobs = [Job(recipe, tiny_run.recipe, model, tiny_run.cache) for model in recipe.model]
    steps: list[str] = []
    variants = run_jobs(jobs, lambda *told: steps.append(told[1]), run=run_job)
    assert not [step for step in steps if step.startswith("epoch")]
    digests = {v.name: v.sha256 for made in variants.values() for v in made}
    assert digests == {c["name"]: c["sha256"] for c in tiny_run.report["candidates"]}


def test_an_int8_variant_says_its_scales_and_is_smaller(tiny_run: Run) -> None:
    recipe = read_recipe(tiny_run.recipe)
    exact, rounded = run_job(Job(recipe, tiny_run.recipe, recipe.model[0], tiny_run.cache), lambda *_: None)
    assert (exact.precision, rounded.precision) == ("float32", "int8")
    assert not exact.scales
    assert all(scale > 0 and 0 <= zero <= 255 for scale, zero in rounded.scales.values())
    assert rounded.name == "teacher-int8"
