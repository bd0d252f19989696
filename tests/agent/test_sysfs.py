"""One value from one file, or None."""

from __future__ import annotations

from pathlib import Path

from agent.sysfs import MAX_BYTES, folders, read_number, read_text


def test_numbers_and_lines_are_read_without_their_space(tmp_path: Path) -> None:
    (tmp_path / "a").write_text(" 42\n")
    assert (read_text(tmp_path / "a"), read_number(tmp_path / "a")) == ("42", 42)


def test_what_cannot_be_read_is_none(tmp_path: Path) -> None:
    (tmp_path / "word").write_text("N/A")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    assert read_number(tmp_path / "word") is None
    assert read_number(tmp_path / "bytes") is None
    assert read_text(tmp_path / "absent") is None
    assert read_text(tmp_path) is None


def test_no_more_than_a_bounded_part_is_read(tmp_path: Path) -> None:
    (tmp_path / "long").write_text("x" * (2 * MAX_BYTES))
    assert len(read_text(tmp_path / "long") or "") == MAX_BYTES


def test_folders_come_in_a_stable_order_and_an_absent_parent_is_empty(tmp_path: Path) -> None:
    for name in ("b1", "a1", "c"):
        (tmp_path / name).mkdir()
    assert [path.name for path in folders(tmp_path, "*1")] == ["a1", "b1"]
    assert folders(tmp_path / "absent", "*") == []
