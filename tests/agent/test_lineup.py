"""Lineups: what is left out and why, and the order of what remains."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from agent.contract.errors import UnknownModel
from agent.contract.plan import EngineKind, Placement, RuntimePlan, TensorPlan, ViewPlan
from agent.engine import OnnxEngine
from agent.engine.tuning import Times
from agent.lineup import Lineup, Seat, load_lineup, placed
from tests.models import engine_plan, floor_plan, hungry, save, service_plan


def order(lineup: Lineup) -> list[str]:
    return [seat.plan.engine for seat in lineup.seats]


def test_all_good_engines_sit_in_plan_order(tmp_path: Path) -> None:
    plan = service_plan(engine_plan(tmp_path, "wrist"), engine_plan(tmp_path, "wrist-accel"), floor_plan())
    lineup, reports = load_lineup(plan)
    assert order(lineup) == ["wrist", "wrist-accel", "wrist-floor"]
    assert lineup.reason == "active"
    assert [(report.engine, report.golden_ok, report.error) for report in reports] == [
        ("wrist", True, ""), ("wrist-accel", True, ""), ("wrist-floor", True, "")
    ]  # fmt: skip
    assert reports[0].load_ms > 0


def test_the_active_engine_is_first_wherever_the_plan_lists_it(tmp_path: Path) -> None:
    plan = service_plan(engine_plan(tmp_path, "wrist"), engine_plan(tmp_path, "wrist-accel"), active="wrist-accel")
    lineup, _ = load_lineup(plan)
    assert order(lineup) == ["wrist-accel", "wrist"]
    assert lineup.reason == "active"


def test_an_engine_that_answers_its_golden_inputs_wrongly_is_left_out(tmp_path: Path) -> None:
    plan = service_plan(engine_plan(tmp_path, "wrist", wrong=0.1), engine_plan(tmp_path, "wrist-accel"))
    lineup, reports = load_lineup(plan)
    assert order(lineup) == ["wrist-accel"]
    assert lineup.reason == "switched: wrist is not usable"
    assert (reports[0].golden_ok, reports[0].error_code) == (False, "golden")
    assert "golden input 0" in reports[0].error


def test_a_damaged_or_missing_model_is_left_out_with_its_code(tmp_path: Path) -> None:
    damaged, missing, good = (engine_plan(tmp_path, name) for name in ("damaged", "missing", "good"))
    Path(damaged.model_path).write_bytes(b"x" + Path(damaged.model_path).read_bytes()[1:])
    Path(missing.model_path).unlink()
    lineup, reports = load_lineup(service_plan(damaged, missing, good))
    assert order(lineup) == ["good"]
    assert [report.error_code for report in reports] == ["corrupt", "unavailable", ""]


def test_nothing_usable_is_an_empty_lineup_and_not_an_error(tmp_path: Path) -> None:
    lineup, _ = load_lineup(service_plan(engine_plan(tmp_path, "wrist", wrong=1.0)))
    assert lineup.seats == ()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"views": ()}, "outputs of manifest and graph differ in ew_view_channels"),
        ({"views": (ViewPlan("channels", "ew_view_channels", 9),)}, r"FP32 \[-1, 3\] in the graph, FP32 \[-1, 9\]"),
        (
            {"inputs": (TensorPlan("other", "FP32", (-1, 16, 3)),)},
            "inputs of manifest and graph differ in other, win",
        ),
        ({"inputs": (TensorPlan("window", "FP64", (-1, 16, 3)),)}, "FP64"),
        ({"outputs": (TensorPlan("probability", "FP32", (-1, 5)),)}, r"\[-1, 5\] in the manifest"),
    ],
)
def test_a_graph_that_is_not_what_the_manifest_says_is_refused(
    tmp_path: Path, change: dict[str, object], words: str
) -> None:
    lineup, [report] = load_lineup(service_plan(replace(engine_plan(tmp_path, "wrist"), **change)))
    assert lineup.seats == ()
    assert report.error_code == "incompatible"
    assert re.search(words, report.error)


def test_siblings_must_take_and_give_the_same_tensors(tmp_path: Path) -> None:
    floor = replace(floor_plan(), outputs=(TensorPlan("score", "FP32", (-1, 4)),), floor_outputs={"score": [0.0] * 4})
    lineup, reports = load_lineup(service_plan(engine_plan(tmp_path, "wrist"), floor))
    assert order(lineup) == ["wrist"]
    assert "different outputs" in reports[1].error


def test_a_floor_needs_no_files() -> None:
    lineup, _ = load_lineup(service_plan(floor_plan()))
    assert lineup.seats[0].plan.kind is EngineKind.FLOOR
    assert lineup.slowest_us == 0


def test_preferring_puts_one_first_and_leaves_the_old_lineup_alone(tmp_path: Path) -> None:
    plan = service_plan(engine_plan(tmp_path, "wrist"), engine_plan(tmp_path, "wrist-accel"), floor_plan())
    lineup, _ = load_lineup(plan)
    switched = lineup.prefer("wrist-accel", active="wrist", reason="gyro dead")
    assert order(switched) == ["wrist-accel", "wrist", "wrist-floor"]
    assert switched.reason == "switched: gyro dead"
    assert order(lineup) == ["wrist", "wrist-accel", "wrist-floor"]
    back = switched.prefer("wrist", active="wrist", reason="sensor healed")
    assert (order(back), back.reason) == (order(lineup), "active")


def test_an_engine_that_is_not_usable_cannot_be_preferred(tmp_path: Path) -> None:
    lineup, _ = load_lineup(service_plan(engine_plan(tmp_path, "wrist"), floor_plan()))
    with pytest.raises(UnknownModel, match="'wrist-accel' cannot be preferred, usable are: wrist, wrist-floor"):
        lineup.prefer("wrist-accel", active="wrist", reason="")


def test_an_engine_that_needs_too_much_memory_is_left_out_and_the_chain_serves(tmp_path: Path) -> None:
    path = tmp_path / "hungry.onnx"
    plan = replace(
        engine_plan(tmp_path, "wrist", view=False), model_path=str(path), model_sha256=save(hungry(300), path),
        golden_path="", runtime=RuntimePlan(memory_bytes=100_000_000),
    )  # fmt: skip
    lineup, (first, second) = load_lineup(service_plan(plan, engine_plan(tmp_path, "wrist-accel", view=False)))
    assert [seat.plan.engine for seat in lineup.seats] == ["wrist-accel"]
    assert lineup.reason == "switched: wrist is not usable"
    assert (first.golden_ok, first.error_code) == (False, "too_large")
    assert "needs more than the 100 MB of memory it may take" in first.error
    assert "serving.memory_mb" in first.error
    assert second.golden_ok


def test_a_report_says_how_an_engine_is_run(tmp_path: Path) -> None:
    runtime = RuntimePlan(threads=0, providers=("CUDA",), control_flow=("If",), cache_folder=str(tmp_path / "models"))
    plan = replace(engine_plan(tmp_path, "wrist"), runtime=runtime)
    for cached in (False, True):
        _, (report, floor) = load_lineup(service_plan(plan, floor_plan()))
        assert (report.error, report.cached) == ("", cached)
        assert (report.threads, report.provider, report.placement) == (1, "CPUExecutionProvider", "inline")
        assert 0 < report.p50_us <= report.p95_us
        assert report.memory_bytes >= 0
        assert report.note.startswith("CUDAExecutionProvider was asked for")
        assert (floor.threads, floor.provider, floor.placement) == (0, "", "")


@pytest.mark.parametrize(
    ("placement", "times_us", "expected"),
    [
        (Placement.AUTO, (5.0, 299.0), Placement.INLINE),
        (Placement.AUTO, (5.0, 300.0), Placement.THREAD),  # the slowest decides: any engine may be asked
        (Placement.AUTO, (), Placement.INLINE),
        (Placement.INLINE, (90_000.0,), Placement.INLINE),
        (Placement.THREAD, (5.0,), Placement.THREAD),
    ],
)
def test_a_service_runs_where_it_is_told_or_where_its_slowest_engine_belongs(
    tmp_path: Path, placement: Placement, times_us: tuple[float, ...], expected: Placement
) -> None:
    plan = engine_plan(tmp_path, "wrist")
    service = service_plan(plan, placement=placement)
    seats = []
    for time_us in times_us:
        engine = OnnxEngine.load(Path(plan.model_path))
        engine.times = Times(time_us / 2, time_us)
        seats.append(Seat(0, plan, engine))
    assert placed(service, Lineup(tuple(seats))) is expected
