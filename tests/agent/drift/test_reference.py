import contextlib
import hashlib
import io
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.contract.errors import ArtifactError, Corrupt, TooLarge
from agent.drift import (
    Claim,
    Detectability,
    GuardStatistics,
    Reference,
    Witness,
    drift_monitor,
    dump_reference,
    load_reference,
)
from agent.drift.reference import MAX_REFERENCE_BYTES
from tests.agent.drift.stationary_streams import fit, reference_of


def rewritten(raw: bytes, changes: dict[str, np.ndarray | None], *, compress: bool = False) -> bytes:
    """The same npz with members replaced (None: left out), written by numpy and zipfile as anyone would."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(raw)) as old,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as new,
    ):
        for name in old.namelist():
            content = old.read(name)
            if name in changes:
                array = changes[name]
                if array is None:
                    continue
                part = io.BytesIO()
                np.lib.format.write_array(part, array, allow_pickle=True)
                content = part.getvalue()
            new.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def raw(reference: Reference) -> bytes:
    return dump_reference(reference)


def test_what_was_written_is_read_and_is_the_same_bytes_again(reference: Reference, raw: bytes) -> None:
    again = load_reference(raw)
    assert dump_reference(again) == raw
    assert again.claim == reference.claim
    assert again.guard == reference.guard
    assert np.array_equal(again.regimes.regime_means, reference.regimes.regime_means)


def test_a_file_and_its_bytes_are_the_same_reference(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    path.write_bytes(raw)
    assert load_reference(path).digest() == load_reference(raw).digest()


def test_the_digest_is_that_of_the_file(raw: bytes) -> None:
    assert load_reference(raw).digest() == hashlib.sha256(raw).hexdigest()


def test_numpy_alone_can_open_it(reference: Reference, raw: bytes) -> None:
    with np.load(io.BytesIO(raw), allow_pickle=False) as archive:
        assert np.array_equal(archive["centre"], reference.centre)
        assert archive["about"].dtype == np.uint8


def test_a_card_line_survives(reference: Reference) -> None:
    lines = (Detectability("gyro_off", 20, 7.0, 1.0, 1.0), Detectability("gain", 20, None, 0.0, None))
    assert load_reference(dump_reference(replace(reference, detectability=lines))).detectability == lines


def test_a_wrist_sized_reference_fits_in_24_kb(reference: Reference) -> None:
    d, regimes = 24, 98
    channels = ("ax", "ay", "az", "gx", "gy", "gz")
    big = replace(
        reference,
        features=tuple(f"{channel}.{k}" for channel in channels for k in range(4)),
        channels=channels,
        groups=dict.fromkeys(channels, "imu"),
        labels=tuple("ABCDEFG"),
        channel_of=np.repeat(np.arange(6), 4),
        centre=np.zeros(d),
        scale=np.ones(d),
        class_share=np.full(7, 1 / 7),
        bins=np.full((d, 16), 20),
        regimes=replace(
            reference.regimes,
            columns=np.arange(d),
            regime_means=np.zeros((regimes, d)),
            covariance=np.eye(d),
            class_means=np.zeros((7, d)),
            class_covariance=np.eye(d),
            naming_scale=np.ones(6),
            allowance=np.ones(7),
        ),
        guard=GuardStatistics(
            {"accel": (0.1, 2.0), "gyro": (0.1, 3.0)},
            dict.fromkeys(channels, 1 / 3),
            dict.fromkeys(channels, (-8.0, 8.0)),
        ),
        detectability=tuple(Detectability(f"fault_{n}", 20, 7.0, 0.95, 1 / 3) for n in range(20)),
    )
    written = dump_reference(big)
    assert len(written) <= 24 * 1024
    assert load_reference(written).channels == channels


@pytest.mark.parametrize("length", [0, 1, 100, -1])
def test_a_truncated_file_is_corrupt(raw: bytes, length: int) -> None:
    with pytest.raises(Corrupt):
        load_reference(raw[:length])


@given(st.data())
def test_no_damage_escapes_the_error_tree(raw: bytes, data: st.DataObject) -> None:
    damaged = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ArtifactError):
        load_reference(bytes(damaged))


HUGE = {"descr": "<f4", "fortran_order": False, "shape": (2**40, 2**20)}


@pytest.mark.parametrize(
    ("member", "content"),
    [
        ("centre.npy", None),
        ("centre.npy", np.zeros(3, dtype="<f4")),
        ("centre.npy", np.zeros(12, dtype="<f8")),
        ("centre.npy", np.full(12, np.nan, dtype="<f4")),
        ("centre.npy", np.array([None] * 12)),
        ("scale.npy", np.zeros(12, dtype="<f4")),
        ("regimes.regime_means.npy", np.zeros((0, 12), dtype="<f4")),
        ("regimes.regime_means.npy", np.zeros(12, dtype="<f4")),
        ("regimes.regime_means.npy", np.float32(1.0)),
        ("regimes.covariance.npy", -np.eye(12, dtype="<f4")),
        ("regimes.covariance.npy", None),
        ("regimes.columns.npy", np.zeros(12, dtype="<i2")),
        ("regimes.columns.npy", np.arange(1, 13, dtype="<i2")),
        ("regimes.columns.npy", np.arange(11, dtype="<i2")),
        ("regimes.columns.npy", np.zeros((12, 1), dtype="<i2")),
        ("channel_of.npy", np.full(12, -2, dtype="<i2")),
        ("channel_of.npy", np.zeros(12, dtype="<i2")),
        ("regimes.allowance.npy", np.zeros(3, dtype="<f4")),
        ("about.npy", np.frombuffer(b"{}", dtype=np.uint8)),
        ("about.npy", np.frombuffer(b"[" * 100_000, dtype=np.uint8)),
        ("about.npy", np.frombuffer(b"\xff", dtype=np.uint8)),
        ("about.npy", np.zeros(3)),
    ],
)
def test_anything_odd_inside_is_corrupt(raw: bytes, member: str, content: np.ndarray | None) -> None:
    with pytest.raises(Corrupt):
        load_reference(rewritten(raw, {member: content}))


def test_a_header_that_promises_more_than_the_file_holds_is_corrupt(raw: bytes) -> None:
    part = io.BytesIO()
    np.lib.format.write_array_header_1_0(part, HUGE)
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, part.getvalue() if name == "centre.npy" else old.read(name))
    with pytest.raises(Corrupt, match="centre"):
        load_reference(buffer.getvalue())


def test_a_compressed_member_is_refused_before_it_is_unpacked(raw: bytes) -> None:
    with pytest.raises(Corrupt, match="compressed"):
        load_reference(rewritten(raw, {}, compress=True))


@pytest.mark.parametrize(
    "change",
    [
        {"channels": ("ax", "ay")},
        {"labels": ()},
        {"groups": {"ax": "accel"}},
        {"watched": ("nothing",)},
    ],
)
def test_a_reference_that_cannot_work_is_corrupt(reference: Reference, change: dict) -> None:
    with pytest.raises(Corrupt):
        load_reference(dump_reference(replace(reference, **change)))


@pytest.mark.parametrize("change", [{"threshold": 0.0}, {"threshold": -1.0}, {"score_cap": 0.0}])
def test_regimes_that_cannot_work_are_corrupt(reference: Reference, change: dict) -> None:
    with pytest.raises(Corrupt):
        load_reference(dump_reference(replace(reference, regimes=replace(reference.regimes, **change))))


def test_a_watched_view_has_no_model_and_no_monitor(reference: Reference) -> None:
    watched = load_reference(dump_reference(replace(reference, regimes=None, watched=reference.features[:2])))
    assert (watched.regimes, watched.watched, drift_monitor(watched)) == (None, reference.features[:2], None)


def test_witnesses_are_read_as_they_were_written(reference: Reference) -> None:
    witness = Witness("wrist-gyro", reference.regimes, np.array([0.25, 0.5], dtype=np.float32))
    raw = dump_reference(replace(reference, witnesses=(witness,)))
    again = load_reference(raw)
    assert dump_reference(again) == raw
    assert again.witnesses[0].engine == "wrist-gyro"
    assert again.witnesses[0].disagreement.tolist() == [0.25, 0.5]
    with pytest.raises(Corrupt):
        load_reference(dump_reference(replace(reference, witnesses=(replace(witness, disagreement=np.zeros(3)),))))
    with pytest.raises(Corrupt, match="witnesses"):
        load_reference(dump_reference(replace(reference, witnesses=(witness,) * 5)))


def test_a_newer_format_is_refused(raw: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        about = archive.read("about.npy")
    text = about[about.index(b"\n") + 1 :]
    newer = np.frombuffer(text.replace(b'"format":2', b'"format":3'), dtype=np.uint8)
    with pytest.raises(Corrupt, match="format 3"):
        load_reference(rewritten(raw, {"about.npy": newer}))


def test_a_file_over_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    path.write_bytes(b"\0" * (MAX_REFERENCE_BYTES + 10))
    with pytest.raises(TooLarge):
        load_reference(path)


def test_a_missing_file_is_corrupt_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(Corrupt, match=r"gone\.npz"):
        load_reference(tmp_path / "gone.npz")


@pytest.mark.parametrize(("rows", "budget"), [(0, 0), (1, 1), (5106, 1), (5107, 2), (3960, 1)])
def test_the_budget_is_what_the_claim_allows(rows: int, budget: int) -> None:
    assert Claim(5106, 15300, 255, 60, 0, 0.95, "").declared_budget(rows) == budget


def test_where_nothing_is_claimed_there_is_no_budget() -> None:
    assert Claim(0, 0, 0, 0, 0, 0.95, "").declared_budget(100) is None


def test_the_fixed_point_of_drift_windows_is_the_references(reference: Reference) -> None:
    fixed = reference.fixed_point()
    assert fixed.centre == pytest.approx(reference.centre.tolist())
    assert (fixed.clip, fixed.fraction_bits) == (4.0, 10)


# --- a stationary model ------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def stationary() -> bytes:
    generator = np.random.default_rng(1)
    rows = np.stack([generator.integers(0, size, 600) for size in (3, 4, 5, 6)], axis=1) * 1.0  # also categories
    model = fit(rows, np.arange(600.0), predicted=generator.integers(0, 3, 600), labels=3)
    return dump_reference(reference_of(model))


def test_a_stationary_model_is_read_as_it_was_written(stationary: bytes) -> None:
    again = load_reference(stationary)
    assert dump_reference(again) == stationary
    assert again.stationary.gap_s == 1.5
    assert again.stationary.bin_column.tolist() == [0, 1, 2, 3, -1]


@pytest.mark.parametrize(
    ("member", "content"),
    [
        ("stationary.whitening.npy", None),
        ("stationary.whitening.npy", np.full((4, 4), np.nan, dtype="<f4")),
        ("stationary.mean_charge.npy", np.zeros((7, 4), dtype="<f4")),
        ("stationary.scale.npy", np.zeros(4, dtype="<f4")),
        ("stationary.rates.npy", np.ones((3, 4), dtype="<f4")),
        ("stationary.lags.npy", np.zeros((6, 4), dtype="<f4")),
        ("stationary.season.npy", np.zeros((5, 4), dtype="<f4")),
        ("stationary.pair_mean.npy", np.zeros(5, dtype="<f4")),
        ("stationary.bin_column.npy", np.array([0, 1, 2, 4, -1], dtype="<i2")),
        ("stationary.bin_values.npy", np.float32(1.0)),
        ("stationary.columns.npy", np.array([0, 1, 2, 2], dtype="<i2")),
    ],
)
def test_anything_odd_in_a_stationary_model_is_corrupt(
    stationary: bytes, member: str, content: np.ndarray | None
) -> None:
    with pytest.raises(Corrupt):
        load_reference(rewritten(stationary, {member: content}))


def test_two_models_of_one_stream_are_corrupt(reference: Reference, stationary: bytes) -> None:
    both = replace(load_reference(stationary), regimes=reference.regimes)
    with pytest.raises(Corrupt):
        load_reference(dump_reference(both))
