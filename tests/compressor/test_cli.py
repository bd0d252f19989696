from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from compressor.cli import main
from tests.compressor.conftest import Run

pytestmark = pytest.mark.torch


def test_help_lists_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert "exit codes" in capsys.readouterr().out


def test_a_missing_recipe_is_one_sentence_and_exit_code_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", str(tmp_path / "none.toml"), "--out", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err
    assert "none.toml" in error
    assert "Traceback" not in error
    assert not (tmp_path / "o").exists()


def test_a_typo_names_line_and_nearest_key(
    tmp_path: Path, tiny_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.toml"
    path.write_text(tiny_recipe.read_text().replace("golden_rows", "golden_row"))
    assert main(["compress", str(path), "--out", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if "golden_row" in text)
    assert f"r.toml:{line}: unknown key 'package.golden_row'" in error
    assert "golden_rows" in error


def test_a_budget_nothing_meets_is_exit_code_eleven_and_ships_nothing(
    tiny_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tiny_run.recipe.read_text().replace("size_bytes = 1_000_000", "size_bytes = 100")
    (tmp_path / "task.py").write_text((tiny_run.recipe.parent / "task.py").read_text())
    (tmp_path / "r.toml").write_text(text)
    out = tmp_path / "o"
    assert main(["compress", str(tmp_path / "r.toml"), "--out", str(out), "--cache", str(tiny_run.cache)]) == 11
    assert "gate 'size'" in capsys.readouterr().err
    assert not out.exists()


def test_a_task_that_fails_is_exit_code_ten_and_names_the_stage(
    tmp_path: Path, tiny_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = (tiny_recipe.parent / "task.py").read_text()
    (tmp_path / "task.py").write_text(
        source.replace("    assert family", "    raise ValueError('no such net')\n    assert family")
    )
    (tmp_path / "r.toml").write_text(tiny_recipe.read_text())
    assert (
        main(["compress", str(tmp_path / "r.toml"), "--out", str(tmp_path / "o"), "--cache", str(tmp_path / "c")])
        == 10
    )
    error = capsys.readouterr().err
    assert "stage 'train' failed on '" in error
    assert "ValueError: no such net" in error
    assert "Traceback" not in error


def test_an_out_folder_that_cannot_be_written_is_exit_code_six(
    tiny_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for option, other in (("--out", "--cache"), ("--cache", "--out")):
        arguments = ["compress", str(tiny_run.recipe), option, str(tmp_path / "file"), other, str(tmp_path / "new")]
        assert main(arguments) == 6
        told = capsys.readouterr().err.splitlines()
        assert len(told) == 1, "it is told before any work"
        assert "cannot write" in told[0]
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", [["compress", "RECIPE", "--out", "OUT"], ["serve", "--config", "none.toml"]])
def test_without_the_extra_a_command_names_it_in_one_line(
    tmp_path: Path, tiny_recipe: Path, command: list[str]
) -> None:
    program = (
        "import sys\nfrom compressor.errors import EXTRA\nsys.modules.update(dict.fromkeys(EXTRA))\n"
        "from compressor.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    places = {"RECIPE": str(tiny_recipe), "OUT": str(tmp_path / "out")}
    ended = subprocess.run(
        [sys.executable, "-c", program, *(places.get(word, word) for word in command)], capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1
    assert "the extra [compressor]" in ended.stderr
    assert "pip install 'edgewarden[compressor]'" in ended.stderr


def test_json_is_the_whole_of_standard_output(
    tiny_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "compress",
        str(tiny_run.recipe),
        "--out",
        str(tmp_path / "o"),
        "--cache",
        str(tiny_run.cache),
        "--json",
    ]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["recipe"] == "tiny"


def test_explain_tells_every_verdict(tiny_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "compress",
        str(tiny_run.recipe),
        "--out",
        str(tmp_path / "o"),
        "--cache",
        str(tiny_run.cache),
        "--explain",
    ]
    assert main(arguments) == 0
    told = capsys.readouterr()
    assert "What will happen" in told.err
    for name in ("teacher", "teacher-int8", "small", "small-int8", "one", "one-int8"):
        assert f"bench: {name} " in told.out
    assert "Gates of 'bench'" in told.out


@pytest.mark.parametrize("name", ["tiny", "tiny-one", "tiny-floor"])
def test_show_and_verify_accept_what_compress_wrote(
    tiny_run: Run, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["artifact", "show", str(tiny_run.artifact(name))]) == 0
    assert name in capsys.readouterr().out
    assert main(["artifact", "verify", str(tiny_run.artifact(name)), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == name


def test_show_of_nothing_is_exit_code_four(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["artifact", "show", str(tmp_path)]) == 4
    assert "cannot read" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["compress", "artifact", "keys", "publish", "serve", "device", "drift", "rollout"]
)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) > 4


def test_help_loads_nothing_heavy() -> None:
    heavy = "('torch', 'numpy', 'sqlalchemy', 'tuf', 'pydantic', 'starlette')"
    program = (
        "import sys\nfrom compressor.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        f"sys.exit(any(name in sys.modules for name in {heavy}))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0
