from __future__ import annotations

from pathlib import Path

import pytest

from compressor.errors import RecipeError
from compressor.recipe import open_task, read_recipe

WRIST = Path("compressor/examples/wrist")


def changed(tmp_path: Path, tiny: Path, old: str, new: str) -> Path:
    text = tiny.read_text()
    assert old in text
    path = tmp_path / "recipe.toml"
    path.write_text(text.replace(old, new, 1))
    return path


def line_of(path: Path, text: str) -> int:
    return next(number for number, line in enumerate(path.read_text().splitlines(), 1) if text in line)


def test_the_shipped_recipes_are_valid_and_differ_only_in_effort() -> None:
    root = Path(__file__).parents[2]
    full, quick = (read_recipe(root / WRIST / name) for name in ("recipe.toml", "recipe.quick.toml"))
    efforts = {"model", "measure", "faults"}
    assert full.model_dump(exclude=efforts) == quick.model_dump(exclude=efforts)
    models = ["teacher", "c48", "c12", "accel", "gyro", "norm"]
    assert [m.name for m in full.model] == [m.name for m in quick.model] == models


def test_an_unknown_key_is_refused_with_the_nearest_name_and_its_line(tmp_path: Path, tiny_recipe: Path) -> None:
    path = changed(tmp_path, tiny_recipe, "learning_rate", "learning_rat")
    with pytest.raises(RecipeError, match=r"unknown key 'train\.learning_rat'") as caught:
        read_recipe(path)
    assert caught.value.line == line_of(path, "learning_rat")
    assert "learning_rate" in caught.value.hint


def test_an_unknown_key_of_the_second_model_is_found_there(tmp_path: Path, tiny_recipe: Path) -> None:
    text = tiny_recipe.read_text()
    first, _, rest = text.partition('name = "small"')
    path = tmp_path / "recipe.toml"
    path.write_text(first + 'name = "small"\nwidht = 3' + rest)
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    assert caught.value.line == line_of(path, "widht")
    assert "'width'" in caught.value.hint


def test_an_unknown_table_is_refused(tmp_path: Path, tiny_recipe: Path) -> None:
    path = changed(tmp_path, tiny_recipe, "[gates]", "[gate]")
    with pytest.raises(RecipeError, match="unknown key 'gate'") as caught:
        read_recipe(path)
    assert caught.value.line == line_of(path, "[gate]")


def test_broken_toml_is_told_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('name = "x"\nformat = = 1\n')
    with pytest.raises(RecipeError, match="not TOML") as caught:
        read_recipe(path)
    assert caught.value.line == 2


def test_a_missing_file_is_told_without_a_traceback(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        read_recipe(tmp_path / "none.toml")


def test_a_value_of_the_wrong_kind_names_key_and_line(tmp_path: Path, tiny_recipe: Path) -> None:
    path = changed(tmp_path, tiny_recipe, "batch = 32", 'batch = "many"')
    with pytest.raises(RecipeError, match=r"train\.batch") as caught:
        read_recipe(path)
    assert caught.value.line == line_of(path, "batch")


def test_two_teachers_are_refused(tmp_path: Path, tiny_recipe: Path) -> None:
    with pytest.raises(RecipeError, match="exactly one"):
        read_recipe(changed(tmp_path, tiny_recipe, 'role = "student"', 'role = "teacher"'))


def test_overrides_reach_task_settings_and_any_table(tiny_recipe: Path) -> None:
    recipe = read_recipe(tiny_recipe, overrides=["new_wearers=4,5,6", "train.batch=16", "select.tie=0.5"])
    assert recipe.data == {"new_wearers": [4, 5, 6]}
    assert (recipe.train.batch, recipe.select.tie) == (16, 0.5)


def test_overrides_are_checked_like_the_file(tiny_recipe: Path) -> None:
    with pytest.raises(RecipeError, match=r"train\.batc"):
        read_recipe(tiny_recipe, overrides=["train.batc=16"])
    with pytest.raises(RecipeError, match="nonsense"):
        read_recipe(tiny_recipe, overrides=["nonsense"])


@pytest.mark.parametrize("override", ["train.bach=5", "train.batch=many", "trian.batch=5", "seed.x=1"])
def test_an_override_is_blamed_for_what_it_wrote_and_the_file_is_not(tiny_recipe: Path, override: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_recipe(tiny_recipe, overrides=["new_wearers=4", override])
    assert f"--set {override}" in str(caught.value).replace("'", "")
    assert "recipe.toml" not in str(caught.value)
    assert (caught.value.path, caught.value.line) == (None, 0)


def test_the_file_is_blamed_for_what_it_wrote_beside_an_override(tmp_path: Path, tiny_recipe: Path) -> None:
    path = changed(tmp_path, tiny_recipe, "learning_rate", "learning_rat")
    with pytest.raises(RecipeError) as caught:
        read_recipe(path, overrides=["train.batch=16"])
    assert (caught.value.path, caught.value.line) == (path, line_of(path, "learning_rat"))
    assert "--set" not in str(caught.value)


def test_all_problems_are_told_unknown_keys_first(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('format = 1\nname = "x"\nsed = 1\n[trian]\nbatch = 3\n[task]\nmodule = "task.py"\n')
    with pytest.raises(RecipeError) as caught:
        read_recipe(path, overrides=["train.bach=5"])
    problems = str(caught.value).split("; ")
    assert problems[:3] == [
        "--set train.bach=5: unknown key 'train.bach' (Did you mean 'batch'?)",
        "recipe.toml:3: unknown key 'sed' (Did you mean 'seed'?)",
        "recipe.toml:4: unknown key 'trian' (Did you mean 'train'?)",
    ]
    assert problems[3].startswith("recipe.toml: 'model' is missing")
    assert problems[-1] == "and 1 more"


def test_the_digest_follows_what_is_said_not_how(tmp_path: Path, tiny_recipe: Path) -> None:
    same = changed(tmp_path, tiny_recipe, "seed = 3", "# a remark\nseed   =   3")
    assert read_recipe(same).sha256 == read_recipe(tiny_recipe).sha256
    assert read_recipe(tiny_recipe, overrides=["train.processes=2"]).sha256 == read_recipe(tiny_recipe).sha256
    assert read_recipe(tiny_recipe, overrides=["package.version=2"]).sha256 != read_recipe(tiny_recipe).sha256


@pytest.mark.torch
def test_what_the_task_does_not_have_is_refused(tmp_path: Path, tiny_recipe: Path) -> None:
    for overrides, text in ((["noise_sed=1"], "noise_seed"),):
        with pytest.raises(RecipeError) as caught:
            open_task(read_recipe(tiny_recipe, overrides=overrides), tiny_recipe)
        assert text in caught.value.hint
    path = changed(tmp_path, tiny_recipe, 'channels = ["left", "right"]', 'channels = ["lefft"]')
    (tmp_path / "task.py").write_text((tiny_recipe.parent / "task.py").read_text())
    with pytest.raises(RecipeError, match="lefft"):
        open_task(read_recipe(path), path)
    path = changed(tmp_path, tiny_recipe, 'family = "plain"', 'family = "plane"')
    with pytest.raises(RecipeError, match="plane") as caught:
        open_task(read_recipe(path), path)
    assert "plain" in caught.value.hint
