"""Heat and throttling from recorded boards; silence is unknown, not cool."""

from __future__ import annotations

from pathlib import Path

from agent.sensors.thermal import Heat, Thermal
from tests.agent.sensors.trees import JETSON, LAPTOP, RASPBERRY_PI, plant

COUNT = "devices/system/cpu/cpu0/thermal_throttle/package_throttle_count"
FIRMWARE = "devices/platform/soc/soc:firmware/get_throttled"


def test_the_processors_zone_counts_not_the_hottest_thing_in_the_case(tmp_path: Path) -> None:
    heat = Thermal(plant(tmp_path, LAPTOP)).read()
    assert (heat.temperature_c, heat.zone) == (61.0, "x86_pkg_temp")


def test_of_several_processor_zones_the_hottest_counts(tmp_path: Path) -> None:
    heat = Thermal(plant(tmp_path, JETSON)).read()
    assert (heat.temperature_c, heat.zone) == (49.25, "soc2-thermal")


def test_without_a_processor_zone_the_hottest_plausible_zone_counts(tmp_path: Path) -> None:
    tree = {name: text for name, text in LAPTOP.items() if "thermal_zone1" not in name}
    heat = Thermal(plant(tmp_path, tree)).read()
    assert (heat.temperature_c, heat.zone) == (95.0, "acpitz")


def test_without_zones_the_processors_driver_is_asked(tmp_path: Path) -> None:
    tree = {name: text for name, text in RASPBERRY_PI.items() if "class/hwmon" in name}
    heat = Thermal(plant(tmp_path, tree)).read()
    assert (heat.temperature_c, heat.zone) == (52.082, "cpu_thermal")


def test_throttling_is_a_counter_that_rises_between_two_reads(tmp_path: Path) -> None:
    counters = {name: text for name, text in LAPTOP.items() if "thermal_throttle" in name}
    thermal = Thermal(plant(tmp_path, counters))
    assert thermal.read().throttled is None
    assert thermal.read().throttled is False
    plant(tmp_path, {COUNT: "31"})
    assert thermal.read().throttled is True
    assert thermal.read().throttled is False


def test_an_active_processor_cooler_is_throttling(tmp_path: Path) -> None:
    assert Thermal(plant(tmp_path, JETSON)).read().throttled is True
    plant(tmp_path, {"class/thermal/cooling_device1/cur_state": "0"})
    assert Thermal(tmp_path).read().throttled is False


def test_the_firmware_of_a_raspberry_pi_is_asked_about_now_not_about_earlier(tmp_path: Path) -> None:
    thermal = Thermal(plant(tmp_path, RASPBERRY_PI))
    assert thermal.read().throttled is False  # 0x50000: it has happened
    plant(tmp_path, {FIRMWARE: "50005"})
    assert thermal.read().throttled is True
    plant(tmp_path, {FIRMWARE: "nonsense"})
    assert thermal.read().throttled is None


def test_a_board_that_says_nothing_is_unknown(tmp_path: Path) -> None:
    assert Thermal(tmp_path).read() == Heat(None, "", None)
    plant(tmp_path, {"class/thermal/thermal_zone0/temp": "-274000"})
    assert Thermal(tmp_path).read() == Heat(None, "", None)
