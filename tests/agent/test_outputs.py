"""Answers as rows and as files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from agent.contract.errors import DiskFull, InvalidRequest
from agent.outputs import Piece, answers, as_json, plan_outputs, write_outputs

FILE = Path("in/x.npy")
PIECES = [
    Piece(2, {"p": np.array([[0.1, 0.9], [0.8, 0.2]], np.float64), "n": np.array([1, 2])}, "a", "active", ""),
    Piece(1, {"p": np.array([[np.nan, 0.5]], np.float64), "n": np.array([3])}, "b", "failover", "dead:gx"),
]


def test_a_row_is_told_with_its_label_and_who_answered_it() -> None:
    told = list(answers(FILE, PIECES, ["no", "yes"]))
    assert [(one["row"], one["label"], one["served_by"], one["guard"]) for one in told] == [
        (0, "yes", "a", ""), (1, "no", "a", ""), (2, "no", "b", "dead:gx"),
    ]  # fmt: skip
    assert told[1]["outputs"] == {"p": [0.8, 0.2], "n": 2}
    assert json.loads(as_json(told[2]))["outputs"] == {"p": [None, 0.5], "n": 3}


def test_what_has_no_rows_is_one_answer_and_what_belongs_to_all_rows_stands_with_each() -> None:
    whole = Piece(None, {"state": np.zeros((2, 1, 3)), "word": np.array("ü".encode(), object)}, "a", "active", "")
    [told] = answers(FILE, [whole], [])
    assert told["outputs"] == {"state": [[[0.0] * 3]] * 2, "word": "ü"}
    shared = Piece(2, {"y": np.array([1, 2]), "total": np.array(3)}, "a", "active", "")
    assert [one["outputs"]["total"] for one in answers(FILE, [shared], [])] == [3, 3]


def test_the_archive_holds_outputs_joined_and_who_gave_each_row(tmp_path: Path) -> None:
    write_outputs(tmp_path / "new/x.npz", FILE, PIECES, ["no", "yes"])
    with np.load(tmp_path / "new/x.npz", allow_pickle=False) as archive:
        assert archive["p"].shape == (3, 2)
        assert archive["p"].dtype == np.float64
        assert archive["n"].tolist() == [1, 2, 3]
        assert archive["ew_served_by"].tolist() == ["a", "a", "b"]
        assert archive["ew_label"].tolist() == ["yes", "no", "no"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.npz"]


def test_texts_and_any_name_fit_into_an_archive(tmp_path: Path) -> None:
    words = np.array([["ü".encode(), b""]], object)
    write_outputs(tmp_path / "x.npz", FILE, [Piece(1, {"file": words}, "a", "active", "")], [])
    with np.load(tmp_path / "x.npz", allow_pickle=False) as archive:
        assert archive["file"].tolist() == [["ü", ""]]


def test_a_table_has_a_column_for_every_number(tmp_path: Path) -> None:
    write_outputs(tmp_path / "x.csv", FILE, PIECES, ["no", "yes"])
    with (tmp_path / "x.csv").open(newline="") as file:
        lines = list(csv.reader(file))
    assert lines[0] == ["row", "label", "served_by", "guard", "p[0]", "p[1]", "n"]
    assert lines[1] == ["0", "yes", "a", "", "0.1", "0.9", "1"]
    assert len(lines) == 4


def test_lines_of_json_are_those_a_program_would_read(tmp_path: Path) -> None:
    write_outputs(tmp_path / "x.jsonl", FILE, PIECES, [])
    lines = (tmp_path / "x.jsonl").read_text().splitlines()
    assert lines == [as_json(answer) for answer in answers(FILE, PIECES, [])]


def test_two_files_never_share_one_answer_and_no_input_is_overwritten(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"a/x\.npy and b/x\.csv would both"):
        plan_outputs([Path("a/x.npy"), Path("b/x.csv")], tmp_path, "npz")
    (tmp_path / "x.npz").touch()
    with pytest.raises(InvalidRequest, match="is an input itself"):
        plan_outputs([tmp_path / "x.npz"], tmp_path, "npz")
    assert plan_outputs([tmp_path / "x.npz"], tmp_path, "csv") == {tmp_path / "x.npz": tmp_path / "x.csv"}


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(DiskFull, match=r"cannot write .*taken/x\.csv"):
        write_outputs(tmp_path / "taken/x.csv", FILE, PIECES, [])


@pytest.mark.parametrize("form", ["npz", "csv"])
def test_an_output_without_rows_that_is_as_long_as_the_last_piece_is_still_none(tmp_path: Path, form: str) -> None:
    pieces = [Piece(rows, {"y": np.ones((rows, 2)), "c": np.arange(5.0)}, "e", "r", "") for rows in (64, 5)]
    target = tmp_path / f"x.{form}"
    write_outputs(target, Path("x"), pieces, [])
    if form == "npz":
        with np.load(target) as archive:
            assert (archive["y"].shape, archive["c"].shape) == ((69, 2), (2, 5))
    else:
        lines = target.read_text().splitlines()
        assert {line.count(",") for line in lines} == {10}
        assert lines[-1].endswith(",0.0,1.0,2.0,3.0,4.0")


def test_answers_that_do_not_join_are_said_so(tmp_path: Path) -> None:
    pieces = [Piece(2, {"y": np.ones((2, width))}, "e", "r", "") for width in (3, 4)]
    with pytest.raises(InvalidRequest, match="do not join"):
        write_outputs(tmp_path / "x.npz", Path("x"), pieces, [])
    assert not list(tmp_path.iterdir())
