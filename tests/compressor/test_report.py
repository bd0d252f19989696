from __future__ import annotations

import json
import re

import pytest

from compressor.report import shade
from tests.compressor.conftest import Run

pytestmark = pytest.mark.torch


def test_the_report_gives_every_candidate_a_verdict_with_a_reason(tiny_run: Run) -> None:
    device = tiny_run.report["device_classes"][0]
    assert {v["name"] for v in device["variants"]} == {"teacher", "teacher-int8", "small", "small-int8"}
    assert {v["name"] for v in device["fallback_variants"]} == {"one", "one-int8"}
    assert [v["chosen"] for v in device["variants"]].count(True) == 1
    assert all(v["reason"] for v in device["variants"] + device["fallback_variants"])
    wanted = {"name", "accuracy", "latency_p50_us", "size_bytes", "chosen", "reason"}
    assert all(wanted <= v.keys() for v in device["variants"])


def test_the_five_gates_are_there_with_measure_and_limit(tiny_run: Run) -> None:
    gates = tiny_run.report["device_classes"][0]["variants"][0]["gates"]
    assert {"accuracy", "parity", "latency", "size", "golden"} <= {gate["name"] for gate in gates}
    assert all(isinstance(gate["measured"], float | int) and "limit" in gate for gate in gates)


def test_figures_say_their_role_and_ratios_are_ratios(tiny_run: Run) -> None:
    report = tiny_run.report
    assert report["teacher"]["role"] == report["roles"]["accuracy"] == "stream"
    for candidate in report["candidates"]:
        assert 0 <= candidate["accuracy"] <= 1
        assert candidate["latency_cpu_p20_us"] > 0
        assert candidate["size_bytes"] > 0


def test_measurements_lie_beside_the_artifacts_with_machine_and_method(tiny_run: Run) -> None:
    document = json.loads((tiny_run.out / "measurements.json").read_text())
    assert document["method"]["threads"] == 1
    assert document["machine"]["onnxruntime"]
    assert set(document["models"]) == {c["name"] for c in tiny_run.report["candidates"]}


def test_the_page_needs_nothing_but_itself(tiny_run: Run) -> None:
    page = (tiny_run.out / "report.html").read_text()
    assert "<svg" in page
    assert not re.search(r"<(script|link|img|iframe)\b", page)
    assert not re.search(r'(?:src|href)="(?!#)', page.replace("xlink:href", ""))
    assert "flow_off" in page
    assert "small-int8" in page


def test_a_better_accuracy_is_greener() -> None:
    hue = [float(shade(value).split("(")[1].split()[0]) for value in (0.1, 0.5, 0.8, 0.99)]
    assert hue == sorted(hue)
