"""What both sides' configurations share, on a configuration of neither."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field

from agent.configuring import CaSource, FilePath, Identifier, Loaded, OptionalPath, Section, check_pair, load
from agent.contract.errors import ConfigError


class Kitchen(Section):
    name: Identifier = Field(default="main", description="Which one.")
    book: FilePath = Field(default=Path("/recipes"), description="What is cooked.")
    key: OptionalPath = Field(default="", description="Opens it.")
    seal: CaSource = Field(default="", description="Says it is clean.")


class Pot(Section):
    name: Identifier = Field(description="How it is called.")
    litres: list[int] = Field(default=[], description="What was measured.")


class House(Section):
    kitchen: Kitchen = Field(default_factory=Kitchen)
    pot: list[Pot] = Field(default=[])


def loaded(folder: Path, text: str, **environment: str) -> Loaded[House]:
    file = folder / "house.toml"
    file.write_text(text)
    return load(House, file, environment, hint="Ask the cook.")


def test_paths_start_at_the_files_folder_and_words_stay_words(tmp_path: Path) -> None:
    kitchen = loaded(tmp_path, '[kitchen]\nbook = "b"\nkey = "k"\nseal = "system"').config.kitchen
    assert (kitchen.book, kitchen.key, kitchen.seal) == (tmp_path / "b", str(tmp_path / "k"), "system")
    assert loaded(tmp_path, '[kitchen]\nseal = "s"').config.kitchen.seal == str(tmp_path / "s")
    assert loaded(tmp_path, "").config.kitchen.key == ""


def test_every_key_is_explained_also_those_of_repeated_tables(tmp_path: Path) -> None:
    explained = loaded(
        tmp_path, '[[pot]]\nname = "a"\n[[pot]]\nname = "b"', EDGEWARDEN_KITCHEN__NAME="small"
    ).explain()
    told = {one.key: (one.value, one.origin.partition(" ")[0], one.description) for one in explained}
    assert told["kitchen.name"] == ('"small"', "environment", "Which one.")
    assert told["kitchen.key"] == ('""', "default", "Opens it.")
    assert told["pot.1.name"] == ('"b"', str(tmp_path / "house.toml"), "How it is called.")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[kitchn]", r"unknown key 'kitchn' in .*house\.toml \(did you mean 'kitchen'\)"),
        ("[kitchen]\nboook = 1", r"unknown key 'kitchen\.boook' in .* \(did you mean 'book'\)"),
        ("[kitchen]\nzzz = 1", r"\(known: name, book, key, seal\)"),
        ('[[pot]]\nname = "a"\nlitre = 1', r"unknown key 'litre' of \[\[pot\]\] number 1 .*did you mean 'litres'"),
        ('[[pot]]\nname = "a"\nlitres = [1, "x"]', r"'litres' number 2 of \[\[pot\]\] number 1"),
        ("[[pot]]\nlitres = []", r"'name' of \[\[pot\]\] number 1 is missing in"),
        ('[kitchen]\nname = "Big One"', r"'kitchen\.name' in .*must be 1 to 36 .* \(found 'Big One'\)"),
    ],
)
def test_a_problem_is_told_with_key_place_and_what_was_meant(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        loaded(tmp_path, text)
    assert caught.value.hint == "Ask the cook."


def test_of_many_problems_five_are_told_and_the_others_counted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, "".join(f"k{number} = 1\n" for number in range(8)))
    assert str(caught.value).count("unknown key") == 5
    assert str(caught.value).endswith("; and 3 more")


def test_two_that_belong_together_are_asked_for_together(tmp_path: Path) -> None:
    check_pair(loaded(tmp_path, "").config, "kitchen.key", "kitchen.seal")
    check_pair(loaded(tmp_path, '[kitchen]\nkey = "k"\nseal = "s"').config, "kitchen.key", "kitchen.seal")
    with pytest.raises(ConfigError, match=r"kitchen\.key and kitchen\.seal belong together"):
        check_pair(loaded(tmp_path, '[kitchen]\nkey = "k"').config, "kitchen.key", "kitchen.seal")
