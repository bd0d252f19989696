import os
from pathlib import Path

from agent.vitals import Vitals


def test_readings_are_one_value_and_unknown_is_none(tmp_path: Path) -> None:
    vitals = Vitals(tmp_path, watts_per_cpu=4.0, sysfs=tmp_path)
    assert vitals.gauges() == {}
    vitals.sample(10.0, [os.getpid()])
    sum(number * number for number in range(200_000))
    vital = vitals.sample(11.0, [os.getpid()])
    assert vital.heat.temperature_c is None
    assert vital.usage.resident_bytes
    assert (vital.power.source, vital.power.measured) == ("estimate", False)
    gauges = vitals.gauges()
    assert gauges["temperature_c"] is None
    assert gauges["disk_free_bytes"]
    window = vitals.take_power_window(inferences=10)
    assert window is not None
    assert window["joules_per_inference"] == window["joules"] / 10
    assert vitals.take_power_window(inferences=1) is None
