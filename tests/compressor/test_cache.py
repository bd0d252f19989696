from __future__ import annotations

from pathlib import Path

from compressor.cache import Cache, stage_key


def test_what_was_put_comes_back(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert cache.get("ab12") is None
    cache.put("ab12", {"a": b"1", "b": b"2"})
    assert Cache(tmp_path).get("ab12") == {"a": b"1", "b": b"2"}
    cache.put("ab12", {"a": b"3"})
    assert cache.get("ab12") == {"a": b"3"}


def test_a_damaged_entry_is_the_same_as_none(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.put("ab12", {"a": b"1"})
    (tmp_path / "ab" / "ab12" / "a").write_bytes(b"x")
    assert cache.get("ab12") is None
    (tmp_path / "ab" / "ab12" / "index.json").write_text("{")
    assert cache.get("ab12") is None


def test_a_key_follows_inputs_stage_and_code() -> None:
    key = stage_key("train", {"seed": 1}, sources=("families.py",))
    assert key == stage_key("train", {"seed": 1}, sources=("families.py",))
    assert key != stage_key("train", {"seed": 2}, sources=("families.py",))
    assert key != stage_key("export", {"seed": 1}, sources=("families.py",))
    assert key != stage_key("train", {"seed": 1}, sources=("families.py", "views.py"))
