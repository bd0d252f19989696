"""The page is valid Prometheus text, and only what is in the table gets onto it."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.metrics import METRICS, Kind, Sample, documented, latency_samples, one_of, render
from agent.monitor import Monitor, MonitorPlan
from agent.observation import RECORD

# the grammar of prometheus.io/docs/instrumenting/exposition_formats, read as a second source
VALUE = r"(?:NaN|[+-]Inf|-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)"
LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\\\|\\"|\\n)*"'
SERIES = re.compile(rf"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{{({LABEL}(?:,{LABEL})*)\}})? ({VALUE})")


def lines(page: str) -> list[str]:
    assert page == "" or page.endswith("\n")
    return page.splitlines()


def test_every_name_and_unit_keeps_the_conventions() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert re.fullmatch(r"edgewarden_[a-z0-9_]+", metric.name)
        assert metric.help.endswith(".")
        assert (metric.kind is Kind.COUNTER) == metric.name.endswith("_total")
        assert not metric.name.endswith(("_ms", "_us", "_mb", "_percent"))


def test_every_metric_renders_to_valid_lines() -> None:
    samples = [
        Sample(
            metric.name,
            1.5,
            dict.fromkeys((*metric.labels, *(["quantile"] if metric.kind is Kind.SUMMARY else [])), "x"),
        )
        for metric in METRICS
    ]
    page = lines(render(samples))
    assert len(page) == 3 * len(METRICS)
    for metric, (help_line, type_line, series) in zip(METRICS, zip(*[iter(page)] * 3, strict=True), strict=True):
        assert help_line == f"# HELP {metric.name} {metric.help}"
        assert type_line == f"# TYPE {metric.name} {metric.kind.value}"
        assert SERIES.fullmatch(series)


@given(st.text(), st.floats())
def test_any_label_and_any_number_keep_the_page_valid(text: str, value: float) -> None:
    page = render([Sample("edgewarden_temperature_celsius", value, {"zone": text})])
    _help, _type, series, end = page.split("\n")
    match = SERIES.fullmatch(series)
    assert match
    assert end == ""
    assert float(match[3]) == value or (math.isnan(float(match[3])) and math.isnan(value))


def test_quotes_backslashes_and_newlines_in_labels_are_escaped() -> None:
    page = render([Sample("edgewarden_rows_total", 1, {"service": 'a"b\\c\nd'})])
    assert lines(page)[-1] == 'edgewarden_rows_total{service="a\\"b\\\\c\\nd"} 1'


def test_an_unknown_value_is_left_out_with_its_heading() -> None:
    assert render([Sample("edgewarden_throttled", None)]) == ""


def test_whole_numbers_have_no_decimals_and_large_ones_stay_exact() -> None:
    assert render([Sample("edgewarden_resident_bytes", 93_000_001.0)]).endswith(
        "edgewarden_resident_bytes 93000001\n"
    )


@pytest.mark.parametrize(
    "samples",
    [
        [Sample("edgewarden_invented", 1)],
        [Sample("edgewarden_rows_total", 1)],
        [Sample("edgewarden_rows_total", 1, {"service": "a", "more": "b"})],
        [Sample("edgewarden_throttled", 1), Sample("edgewarden_throttled", 0)],
        [Sample("edgewarden_throttled_sum", 1)],
    ],
)
def test_a_sample_outside_the_table_is_refused(samples: list[Sample]) -> None:
    with pytest.raises(ValueError, match=r"edgewarden_"):
        render(samples)


def test_the_latency_of_an_engine_is_a_summary_in_seconds() -> None:
    records = np.zeros(100, RECORD)
    records["latency_us"] = 1000.0
    monitor = Monitor(MonitorPlan("wrist", 0, ("wrist", "floor")))
    monitor.observe(records)
    latency = monitor.statistics()["latency"]
    page = render(
        [*latency_samples("wrist", "wrist", latency["wrist"]), *latency_samples("wrist", "floor", latency["floor"])]
    )
    assert "# TYPE edgewarden_latency_seconds summary" in page
    values = {match[1] + (match[2] or ""): float(match[3]) for match in map(SERIES.fullmatch, lines(page)) if match}
    assert values['edgewarden_latency_secondsservice="wrist",engine="wrist",quantile="0.95"'] == pytest.approx(
        1e-3, rel=0.02
    )
    assert values['edgewarden_latency_seconds_sumservice="wrist",engine="wrist"'] == pytest.approx(0.1)
    assert values['edgewarden_latency_seconds_countservice="wrist",engine="floor"'] == 0
    assert not any("floor" in name and "quantile" in name for name in values)


def test_a_state_is_one_series_per_value() -> None:
    samples = one_of("edgewarden_health", ("healthy", "failing"), "failing", "state", {"service": "wrist"})
    assert [(sample.labels["state"], sample.value) for sample in samples] == [("healthy", 0.0), ("failing", 1.0)]
    render(samples)


def test_the_table_can_be_documented() -> None:
    assert [row["name"] for row in documented()] == [metric.name for metric in METRICS]
