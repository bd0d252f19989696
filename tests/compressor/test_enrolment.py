from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compressor.enrolment import Halves, hops, join, read_enrolment
from compressor.errors import DataError
from compressor.examples.wrist.task import TASK
from compressor.task import Role, TaskData

LENGTH = TASK.window.length


@pytest.fixture(scope="module")
def data() -> TaskData:
    return TASK.load({})


def signal(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((samples, 6)).astype(np.float32)


def windows_of(samples: np.ndarray, hop: int = 64) -> np.ndarray:
    return np.stack([samples[at : at + LENGTH] for at in range(0, len(samples) - LENGTH + 1, hop)])


def write(folder: Path, name: str, signals: list[np.ndarray], *, hop: int = 64, **changes: Any) -> Path:
    """An upload as a device writes it; `changes` replace whole arrays."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [windows_of(samples, hop) for samples in signals]
    arrays = {
        "windows": np.concatenate(parts),
        "labels": np.concatenate([np.full(len(part), n % 7, np.int8) for n, part in enumerate(parts)]),
        "recordings": np.concatenate([np.full(len(part), n, np.int8) for n, part in enumerate(parts)]),
    }
    path = folder / f"{name}.npz"
    np.savez(path, **{**arrays, **changes})
    return path


def read(folder: Path, data: TaskData) -> Halves:
    return read_enrolment(folder, TASK, data)


@pytest.mark.parametrize("hop", [1, 32, 63, 64, 127])
def test_the_hop_of_overlapping_windows_is_found(hop: int) -> None:
    assert set(hops(windows_of(signal(600), hop)).tolist()) == {hop}


def test_windows_that_share_nothing_are_a_whole_window_apart() -> None:
    assert hops(np.stack([signal(LENGTH, seed) for seed in range(3)])).tolist() == [LENGTH, LENGTH]
    assert hops(signal(LENGTH)[None]).tolist() == []


def test_a_still_signal_is_taken_as_overlapping_never_as_apart() -> None:
    assert hops(np.zeros((3, LENGTH, 6), np.float32)).tolist() == [0, 0]


@pytest.mark.parametrize("hop", [16, 64])
def test_halves_share_no_sample_and_no_sample_is_lost_but_a_windows_rest(
    tmp_path: Path, data: TaskData, hop: int
) -> None:
    samples = signal(700)
    write(tmp_path, "watch-1", [samples], hop=hop)
    halves = read(tmp_path, data)
    end = len(windows_of(samples, hop)) * hop - hop + LENGTH
    for enrolment, first, second in (
        (halves.straight, "train", "reference"), (halves.swapped, "reference", "train"),
    ):  # fmt: skip
        early, late = getattr(enrolment, first), getattr(enrolment, second)
        assert early.starts.max() + LENGTH <= end // 2 <= late.starts.min()
        for rows in (early, late):
            for window, start in zip(rows.windows, rows.starts, strict=True):
                assert np.array_equal(window, samples[start : start + LENGTH])
    assert set(np.diff(halves.straight.train.starts).tolist()) == {TASK.window.hop // 2}
    assert set(np.diff(halves.straight.reference.starts).tolist()) == {TASK.window.hop}


def test_windows_that_do_not_overlap_are_used_as_they_are(tmp_path: Path, data: TaskData) -> None:
    windows = np.stack([signal(LENGTH, seed) for seed in range(5)])
    few = {"labels": np.zeros(5, np.int8), "recordings": np.zeros(5, np.int8)}
    write(tmp_path, "w", [signal(300)], windows=windows, **few)
    halves = read(tmp_path, data)
    assert np.array_equal(halves.straight.train.windows, windows[:2])
    assert np.array_equal(halves.straight.reference.windows, windows[3:])  # the third straddles the border


def test_a_label_that_changes_within_a_recording_shares_no_sample_with_the_other_half(
    tmp_path: Path, data: TaskData
) -> None:
    samples = signal(64 * 9 + LENGTH)
    labels = np.array([0] * 4 + [1] * 6, np.int8)
    write(tmp_path, "w", [samples], labels=labels)
    halves = read(tmp_path, data)
    assert set(halves.straight.train.labels.tolist()) == {0}
    assert halves.straight.train.starts.max() + LENGTH <= halves.straight.reference.starts.min()


def test_newcomers_keep_their_own_ids_and_old_rows_stay(tmp_path: Path, data: TaskData) -> None:
    for name in ("a", "b"):
        write(tmp_path, name, [signal(600, 1), signal(600, 2)])
    joined = join(data, read(tmp_path, data).straight)
    train, old = joined.role(Role.TRAIN), data.role(Role.TRAIN)
    assert np.array_equal(train.windows[: len(old)], old.windows)
    new = train.where(np.arange(len(train)) >= len(old))
    assert len(set(new.recordings.tolist())) == 4
    assert len(set(new.sources.tolist())) == 2
    for rows in data.rows.values():
        assert not set(new.recordings.tolist()) & set(rows.recordings.tolist())
    assert len(joined.role(Role.CALIBRATE)) == len(data.role(Role.CALIBRATE)) + len(joined.role(Role.ENROL_REFERENCE))
    assert joined.sha256 != data.sha256


def test_rows_of_the_last_test_are_out_of_reach(tmp_path: Path, data: TaskData) -> None:
    write(tmp_path, "a", [signal(600)])
    assert Role.NEW_TEST not in join(data, read(tmp_path, data).straight).rows


def test_the_digest_names_the_files_not_their_place(tmp_path: Path, data: TaskData) -> None:
    for folder in ("one", "two"):
        write(tmp_path / folder, "a", [signal(600)])
    write(tmp_path / "three", "a", [signal(600, 9)])
    one, two, three = (read(tmp_path / name, data).straight for name in ("one", "two", "three"))
    assert one.sha256 == two.sha256 != three.sha256
    assert (one.sources[0].device, one.sources[0].rows) == ("a", len(windows_of(signal(600))))


def test_a_file_too_short_is_left_out_and_told(tmp_path: Path, data: TaskData) -> None:
    write(tmp_path, "long", [signal(600)])
    write(tmp_path, "short", [signal(LENGTH)])
    enrolment = read(tmp_path, data).straight
    assert [source.device for source in enrolment.sources] == ["long"]
    assert "short.npz: 1 windows are too few" in enrolment.left_out[0]


def test_nothing_but_short_files_is_an_error(tmp_path: Path, data: TaskData) -> None:
    write(tmp_path, "short", [signal(LENGTH)])
    with pytest.raises(DataError, match=r"no recording is long enough: short\.npz"):
        read(tmp_path, data)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"windows": np.full((7, 128, 6), np.nan, np.float32)}, "not finite"),
        ({"windows": np.full((7, 128, 6), 1e5, np.float32)}, "outside the sensors' ranges"),
        ({"windows": np.zeros((7, 64, 6), np.float32)}, "64 long"),
        ({"windows": np.zeros((7, 128, 3), np.float32)}, "3 channels wide"),
        ({"labels": np.full(7, 7, np.int8)}, "labels must be 0 to 6"),
        ({"labels": np.full(7, -1, np.int8)}, "labels must be 0 to 6"),
        ({"recordings": np.zeros(6, np.int8)}, "7 whole numbers"),
        ({"labels": np.array([None] * 7, object)}, "not numbers"),
    ],
)
def test_a_poisoned_file_is_refused_by_name(
    tmp_path: Path, data: TaskData, changes: dict[str, Any], words: str
) -> None:
    write(tmp_path, "good", [signal(600)])
    write(tmp_path, "bad", [signal(64 * 6 + LENGTH)], **changes)
    with pytest.raises(DataError, match=words) as caught:
        read(tmp_path, data)
    assert "bad.npz" in str(caught.value)


def test_what_is_no_npz_is_refused_by_name(tmp_path: Path, data: TaskData) -> None:
    (tmp_path / "noise.npz").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(DataError, match=r"noise\.npz is refused"):
        read(tmp_path, data)


def test_a_folder_without_recordings_is_told(tmp_path: Path, data: TaskData) -> None:
    with pytest.raises(DataError, match="holds 0 recordings"):
        read(tmp_path, data)
    with pytest.raises(DataError, match="cannot read the recordings"):
        read(tmp_path / "nowhere", data)


def test_thousands_of_recordings_of_one_device_keep_apart_from_the_next_devices(
    tmp_path: Path, data: TaskData
) -> None:
    many = 1500
    windows = np.random.default_rng(1).standard_normal((2 * many, LENGTH, 6)).astype(np.float32)
    arrays = {"windows": windows, "labels": np.zeros(2 * many, np.int8)}
    write(tmp_path, "a", [signal(300)], **arrays, recordings=np.repeat(np.arange(many, dtype=np.int16), 2))
    write(tmp_path, "b", [signal(600)])
    train = read(tmp_path, data).straight.train
    first, second = (set(train.recordings[train.sources == source].tolist()) for source in sorted(set(train.sources)))
    assert len(first) == many
    assert not first & second


def test_recordings_whose_windows_are_interleaved_are_told_apart(tmp_path: Path, data: TaskData) -> None:
    one, two = (windows_of(signal(600, seed)) for seed in (1, 2))
    windows = np.stack([one, two], axis=1).reshape(-1, LENGTH, 6)
    arrays = {
        "labels": np.tile(np.array([3, 5], np.int8), len(one)),
        "recordings": np.tile(np.array([9, 4]), len(one)),
    }
    write(tmp_path, "a", [signal(600)], windows=windows, **arrays)
    train = read(tmp_path, data).straight.train
    assert set(train.labels[train.recordings == train.recordings.min()].tolist()) == {3}
    assert len(set(train.recordings.tolist())) == 2
