"""Many files: order, neighbours of a bad one, patience with a full server, and an end when nobody is there."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from agent.batch import MAX_ASKED, Batch, FileResult
from agent.contract.errors import Disconnected, EngineFailed, Overloaded
from agent.contract.tensors import Array
from agent.inputs import Wanted
from agent.outputs import Piece

ROW = [Wanted("x", "FP32", (-1, 2))]


class Doubling:
    """An asker that doubles x; `before` may object."""

    def __init__(self, before: Callable[[Array], None] = lambda _: None) -> None:
        self.before = before
        self.closed = False

    def ask(self, inputs: dict[str, Array]) -> Piece:
        assert not self.closed
        self.before(inputs["x"])
        return Piece(None, {"y": inputs["x"] * 2}, "double", "active", "")

    def close(self) -> None:
        self.closed = True


def files_of(folder: Path, count: int, rows: int = 1) -> list[Path]:
    paths = []
    for number in range(count):
        paths.append(folder / f"{number:03}.npy")
        np.save(paths[-1], np.full((rows, 2), number, np.float32))
    return paths


@pytest.mark.parametrize("concurrency", [1, 4])
def test_results_come_in_the_order_of_the_files_and_all_is_closed(tmp_path: Path, concurrency: int) -> None:
    made: list[Doubling] = []
    shares: list[float] = []

    def make() -> Doubling:
        made.append(Doubling())
        return made[-1]

    files = files_of(tmp_path, 30, rows=150)
    results = list(Batch(ROW, make, advance=shares.append).run(files, concurrency=concurrency))
    assert [result.file for result in results] == files
    for number, result in enumerate(results):
        assert [piece.rows for piece in result.pieces] == [64, 64, 22]
        assert all((piece.outputs["y"] == 2 * number).all() for piece in result.pieces)
    assert 1 <= len(made) <= concurrency
    assert all(asker.closed for asker in made)
    assert sum(shares) == pytest.approx(30)


@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_file_that_cannot_be_answered_does_not_stop_the_others(tmp_path: Path, concurrency: int) -> None:
    def refuse(x: Array) -> None:
        if x[0, 0] == 2:
            raise EngineFailed("not this one")

    files = files_of(tmp_path, 6)
    files[4].write_bytes(b"rubbish")
    results = list(Batch(ROW, lambda: Doubling(refuse), advance=lambda _: None).run(files, concurrency=concurrency))
    assert [result.error is None for result in results] == [True, True, False, True, False, True]
    assert "not this one" in str(results[2].error)
    assert str(files[4]) in str(results[4].error)


@pytest.mark.parametrize("concurrency", [1, 3])
def test_when_nobody_is_there_any_more_it_ends(tmp_path: Path, concurrency: int) -> None:
    asked = 0

    def lose(x: Array) -> None:
        nonlocal asked
        asked += 1
        if x[0, 0] >= 3:
            raise Disconnected("gone")

    got: list[FileResult] = []
    batch = Batch(ROW, lambda: Doubling(lose), advance=lambda _: None)
    with pytest.raises(Disconnected, match="gone"):
        got.extend(batch.run(files_of(tmp_path, 100), concurrency=concurrency))
    assert [result.file.name for result in got] == ["000.npy", "001.npy", "002.npy"][: len(got)]
    assert asked <= 3 + 2 * concurrency


def test_a_full_server_is_asked_again_when_it_said_a_few_times(tmp_path: Path) -> None:
    refusals = [Overloaded("full", retry_after_s=0.0)] * (MAX_ASKED - 1)

    def full(x: Array) -> None:
        if refusals:
            raise refusals.pop()

    [result] = Batch(ROW, lambda: Doubling(full), advance=lambda _: None).run(files_of(tmp_path, 1))
    assert result.error is None
    refusals = [Overloaded("full", retry_after_s=0.0)] * MAX_ASKED
    [result] = Batch(ROW, lambda: Doubling(full), advance=lambda _: None).run(files_of(tmp_path, 1))
    assert isinstance(result.error, Overloaded)


def test_whoever_stops_taking_results_stops_the_work(tmp_path: Path) -> None:
    asked = threading.Semaphore(0)
    batch = Batch(ROW, lambda: Doubling(lambda _: asked.release()), advance=lambda _: None)
    results = batch.run(files_of(tmp_path, 200), concurrency=2)
    next(results)
    results.close()
    count = 0
    while asked.acquire(blocking=False):
        count += 1
    assert count <= 4


def test_a_model_without_rows_gets_each_file_as_one_request(tmp_path: Path) -> None:
    wanted = [Wanted("x", "FP32", (2, 2)), Wanted("rate", "INT64", ())]
    np.savez(tmp_path / "a.npz", x=np.ones((2, 2)), rate=np.array(16000))
    [result] = Batch(wanted, Doubling, advance=lambda _: None).run([tmp_path / "a.npz"])
    assert [piece.rows for piece in result.pieces] == [None]
    assert result.pieces[0].outputs["y"].shape == (2, 2)
