"""What is kept about models: whole, verified, bounded, and never a reason to fail."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from agent.modelcache import MAX_ENTRIES, Entry, Key, ModelCache

MODEL, OTHER = "a" * 64, "b" * 64
KEY = Key(MODEL, "1.32", "avx512", (), 0, spin=False)


def keep(cache: ModelCache, key: Key = KEY, data: bytes = b"graph" * 100) -> Entry:
    place = cache.place(key)
    assert place is not None
    place.write_bytes(data)
    entry = cache.keep(key, Entry(2, 10.0, 20.0, place))
    assert entry is not None
    assert not place.exists()
    return entry


def test_what_is_kept_is_found_again_and_by_its_whole_key_only(tmp_path: Path) -> None:
    cache = ModelCache(tmp_path / "models")
    assert cache.find(KEY) is None
    kept = keep(cache)
    assert cache.find(KEY) == kept == Entry(2, 10.0, 20.0, tmp_path / "models" / f"{KEY.name}.onnx")
    for other in (
        replace(KEY, model_sha256=OTHER), replace(KEY, runtime="1.33"), replace(KEY, cpu="sse2"),
        replace(KEY, providers=("CUDAExecutionProvider",)), replace(KEY, threads=1), replace(KEY, spin=True),
    ):  # fmt: skip
        assert cache.find(other) is None


def test_measurements_are_kept_without_a_graph_too(tmp_path: Path) -> None:
    cache = ModelCache(tmp_path)
    assert cache.keep(KEY, Entry(1, 1.0, 2.0)) == Entry(1, 1.0, 2.0) == cache.find(KEY)


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def _edit(path: Path, name: str, value: object) -> None:
    document = json.loads(path.read_text())
    document[name] = value
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("file", "harm"),
    [
        (".onnx", _flip),
        (".onnx", Path.unlink),
        (".onnx", lambda graph: graph.write_bytes(b"")),
        (".onnx", lambda graph: graph.write_bytes(graph.read_bytes() + b"x")),
        (".json", _flip),
        (".json", lambda record: record.write_bytes(record.read_bytes()[:-20])),
        (".json", lambda record: record.write_bytes(b"\xff" * 50)),
        (".json", lambda record: record.write_text("[1]")),
        (".json", lambda record: record.write_text("[" * 30_000)),
        (".json", lambda record: _edit(record, "threads", 64)),
        (".json", lambda record: _edit(record, "sha256", "")),
    ],
)
def test_a_damaged_entry_is_not_there_and_can_be_made_again(
    tmp_path: Path, file: str, harm: Callable[[Path], object]
) -> None:
    cache = ModelCache(tmp_path)
    keep(cache)
    harm(tmp_path / f"{KEY.name}{file}")
    assert cache.find(KEY) is None
    assert list(tmp_path.iterdir()) == []
    assert cache.find(KEY) is None
    assert keep(cache) == cache.find(KEY)


def test_an_entry_of_another_key_under_this_name_is_foreign(tmp_path: Path) -> None:
    cache, other = ModelCache(tmp_path), replace(KEY, cpu="another CPU")
    keep(cache, other)
    for ending in (".json", ".onnx"):
        (tmp_path / f"{other.name}{ending}").rename(tmp_path / f"{KEY.name}{ending}")
    assert cache.find(KEY) is None


def test_a_graph_whose_record_was_never_written_is_nobodys(tmp_path: Path) -> None:
    (tmp_path / f"{KEY.name}.onnx").write_bytes(b"graph")
    assert ModelCache(tmp_path).find(KEY) is None


def test_entries_go_with_the_models_they_belong_to(tmp_path: Path) -> None:
    cache = ModelCache(tmp_path)
    keep(cache)
    keep(cache, replace(KEY, runtime="1.33"))
    keep(cache, replace(KEY, model_sha256=OTHER))
    (tmp_path / f".{OTHER}-0123.77.onnx").write_bytes(b"left by a process that was killed")
    (tmp_path / "README").write_text("not ours")
    assert cache.statistics()["entries"] == 3
    assert cache.prune({MODEL}) > 500
    assert {path.name.partition("-")[0] for path in tmp_path.iterdir()} == {MODEL, "README"}
    assert cache.statistics()["entries"] == 2
    assert cache.prune(()) > 0
    assert cache.prune(()) == 0
    assert ModelCache(tmp_path / "nowhere").prune(()) == 0


def test_the_oldest_entries_give_way_when_there_is_too_much(tmp_path: Path) -> None:
    cache = ModelCache(tmp_path, max_bytes=3000)
    keys = [replace(KEY, runtime=f"1.{n}") for n in range(5)]
    for age, key in enumerate(keys):
        keep(cache, key, b"x" * 1000)
        for ending in (".json", ".onnx"):
            os.utime(tmp_path / f"{key.name}{ending}", (age, age))
    kept = [cache.find(key) is not None for key in keys]
    assert kept[-1]
    assert 1 <= sum(kept) <= 3
    assert kept == sorted(kept)
    assert cache.statistics()["bytes"] <= 3000 + 1500  # the newest is kept whatever it takes


def test_the_number_of_entries_is_bounded(tmp_path: Path) -> None:
    cache = ModelCache(tmp_path)
    for n in range(MAX_ENTRIES + 3):
        assert cache.keep(replace(KEY, runtime=str(n)), Entry(1, 1.0, 1.0)) is not None
    assert cache.statistics()["entries"] <= MAX_ENTRIES


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = ModelCache(tmp_path / "file")
    assert cache.place(KEY) is None
    assert cache.keep(KEY, Entry(1, 1.0, 1.0)) is None
    assert cache.find(KEY) is None
    assert cache.statistics() == {"entries": 0, "bytes": 0}
