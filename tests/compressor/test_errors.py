from __future__ import annotations

import pickle
from pathlib import Path

from compressor.errors import DataError, GateFailed, RecipeError, StageFailed


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
