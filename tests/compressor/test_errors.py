from __future__ import annotations

import pickle
import tomllib
from pathlib import Path

from compressor.errors import EXTRA, DataError, GateFailed, MissingExtra, RecipeError, StageFailed


def test_a_recipe_error_points_at_file_and_line() -> None:
    error = RecipeError("unknown key 'x'", path=Path("r.toml"), line=7, hint="Did you mean 'y'?")
    assert error.sentence() == "r.toml:7: unknown key 'x'. Did you mean 'y'?"


def test_errors_survive_the_way_out_of_a_training_process() -> None:
    for error in (
        StageFailed("train", "m", "no memory", hint="h"),
        RecipeError("text", line=3),
        DataError("d", hint="i"),
    ):
        back = pickle.loads(pickle.dumps(error))  # noqa: S301
        assert (type(back), str(back), back.hint) == (type(error), str(error), error.hint)


def test_exit_codes_differ() -> None:
    assert len({RecipeError.exit_code, DataError.exit_code, StageFailed.exit_code, GateFailed.exit_code}) == 4


def test_only_a_library_of_the_extra_is_called_missing() -> None:
    told = MissingExtra.of(ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn"))
    assert told is not None
    assert "torch" in str(told)
    assert MissingExtra.of(ModuleNotFoundError("No module named 'mine'", name="mine")) is None
    assert MissingExtra.of(ImportError("cannot import name 'x' from 'torch'", name="torch")) is None


def test_the_extra_is_what_the_distribution_says() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    lines = project["optional-dependencies"]["compressor"]
    assert sorted(EXTRA) == sorted(line.partition(">")[0] for line in lines)
