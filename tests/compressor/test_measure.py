from __future__ import annotations

from compressor.measure import interleaved, machine


def test_candidates_take_turns() -> None:
    order: list[str] = []
    interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, runs=2)
    measured = order[40:]  # twenty warm runs each come first
    assert measured == ["a", "a", "a", "b", "b", "b"] * 3


def test_more_work_takes_more_time() -> None:
    timing = interleaved({"little": lambda: sum(range(10)), "much": lambda: sum(range(100_000))}, rounds=3, runs=3)
    assert timing["much"].cpu_p20_us > timing["little"].cpu_p20_us > 0
    assert timing["much"].wall_p95_us >= timing["much"].wall_p50_us


def test_figures_name_the_machine_they_belong_to() -> None:
    assert {"processor", "cores", "onnxruntime"} <= machine().keys()
