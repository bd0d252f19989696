from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agent.contract.errors import Corrupt
from compressor.files import dump_arrays
from compressor.recipe import open_task, read_recipe
from compressor.stages.train import prepare_torch, restore, train
from compressor.task import Role, TaskData

pytestmark = pytest.mark.torch


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tiny_recipe: Path) -> None:
    prepare_torch()
    recipe = read_recipe(tiny_recipe, overrides=[])
    task, _ = open_task(recipe, tiny_recipe)
    data, model = task.load({}), recipe.model[1].model_copy(update={"epochs": 3})
    one, two, other = (
        train(task, data, model, recipe.train, seed=seed, on_epoch=lambda *_: None) for seed in (1, 1, 2)
    )
    assert dump_arrays(one.arrays) == dump_arrays(two.arrays)
    assert dump_arrays(one.arrays) != dump_arrays(other.arrays)


def test_the_best_epoch_of_the_second_half_is_kept(tiny_recipe: Path) -> None:
    prepare_torch()
    recipe = read_recipe(tiny_recipe)
    task, _ = open_task(recipe, tiny_recipe)
    epochs: list[int] = []
    trained = train(
        task, task.load({}), recipe.model[1], recipe.train, seed=1, on_epoch=lambda epoch, _: epochs.append(epoch)
    )  # fmt: skip
    half = recipe.model[1].epochs // 2
    assert epochs == list(range(recipe.model[1].epochs))
    assert trained.epoch >= half
    assert trained.history[trained.epoch] == max(trained.history[half:])


def test_input_statistics_come_from_the_training_rows_alone(tiny_recipe: Path) -> None:
    recipe = read_recipe(tiny_recipe)
    task, _ = open_task(recipe, tiny_recipe)
    data, model = task.load({}), recipe.model[1].model_copy(update={"epochs": 1})
    trained = train(task, data, model, recipe.train, seed=1, on_epoch=lambda *_: None)
    windows = data.role(Role.TRAIN).windows
    assert np.allclose(trained.arrays["mean"], windows.mean(axis=(0, 1)), atol=1e-5)


def test_weights_of_another_model_are_refused(tiny_recipe: Path) -> None:
    recipe = read_recipe(tiny_recipe)
    task, _ = open_task(recipe, tiny_recipe)
    with pytest.raises(Corrupt, match="are not a 'plain' of width"):
        restore(task, recipe.model[0], {"state.head.weight": np.zeros((1, 1), np.float32)})


def test_a_training_that_goes_on_keeps_the_first_ones_input_statistics(tiny_recipe: Path) -> None:
    prepare_torch()
    recipe = read_recipe(tiny_recipe)
    task, _ = open_task(recipe, tiny_recipe)
    data, model = task.load({}), recipe.model[1].model_copy(update={"epochs": 2})
    first = train(task, data, model, recipe.train, seed=1, on_epoch=lambda *_: None)
    scaled = replace(data.role(Role.TRAIN), windows=3 * data.role(Role.TRAIN).windows)
    other = TaskData("1" * 64, {**data.rows, Role.TRAIN: scaled})
    after = train(task, other, model, recipe.train, seed=1, on_epoch=lambda *_: None, start=first.arrays)
    assert np.array_equal(after.arrays["mean"], first.arrays["mean"])
    assert np.array_equal(after.arrays["sd"], first.arrays["sd"])
    assert dump_arrays(after.arrays) != dump_arrays(first.arrays)


def test_a_training_goes_on_from_where_the_first_one_stopped(tiny_recipe: Path) -> None:
    prepare_torch()
    recipe = read_recipe(tiny_recipe)
    task, _ = open_task(recipe, tiny_recipe)
    data, model = task.load({}), recipe.model[1]
    first = train(task, data, model, recipe.train, seed=1, on_epoch=lambda *_: None)
    gentle = recipe.train.model_copy(update={"learning_rate": 1e-6})
    short = model.model_copy(update={"epochs": 1})
    after = train(task, data, short, gentle, seed=1, on_epoch=lambda *_: None, start=first.arrays)
    cold = train(task, data, short, gentle, seed=1, on_epoch=lambda *_: None)
    assert after.history[0] == pytest.approx(first.history[first.epoch], abs=0.1)
    assert after.history[0] > cold.history[0] + 0.2
