"""Energy from recorded boards: the best meter counts, wraps are seen, an estimate says that it is one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from agent.contract.messages import Power as PowerMessage
from agent.sensors.power import Battery, Estimate, Hwmon, Power, Rapl, find_meters
from tests.agent.sensors.trees import JETSON, LAPTOP, RASPBERRY_PI, plant

PACKAGE = "class/powercap/intel-rapl:0/energy_uj"
DRAM = "class/powercap/intel-rapl:0/intel-rapl:0:2/energy_uj"


class Cpu:
    """CPU seconds that a test moves."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def meter_of(root: Path, cpu: Cpu | None = None, watts_per_cpu: float = 4.0) -> Power:
    return Power(find_meters(root, cpu_seconds=cpu or Cpu(), watts_per_cpu=watts_per_cpu))


def test_rapl_adds_packages_and_memory_but_neither_cores_nor_psys(tmp_path: Path) -> None:
    rapl = Rapl(plant(tmp_path, LAPTOP))
    assert rapl.joules(1.0) is None
    plant(tmp_path, {PACKAGE: "261003500000", DRAM: "6500000"})
    assert rapl.joules(1.0) == pytest.approx(5.0)


def test_a_rapl_counter_that_wraps_goes_on(tmp_path: Path) -> None:
    rapl = Rapl(plant(tmp_path, LAPTOP))
    rapl.joules(1.0)
    plant(tmp_path, {PACKAGE: "1000000"})  # over the top: 262143.328850 J
    assert rapl.joules(1.0) == pytest.approx(262143.328850 - 261000.0 + 1.0)


def test_a_rapl_counter_that_wraps_without_a_known_range_is_unknown(tmp_path: Path) -> None:
    tree = {name: text for name, text in LAPTOP.items() if not name.endswith("intel-rapl:0/max_energy_range_uj")}
    rapl = Rapl(plant(tmp_path, tree))
    rapl.joules(1.0)
    plant(tmp_path, {PACKAGE: "1000000"})
    assert rapl.joules(1.0) is None


def test_half_a_rapl_sum_is_no_sum(tmp_path: Path) -> None:
    rapl = Rapl(plant(tmp_path, LAPTOP))
    rapl.joules(1.0)
    (tmp_path / DRAM).unlink()
    assert rapl.joules(1.0) is None


def test_a_board_monitor_gives_watts(tmp_path: Path) -> None:
    assert Hwmon(plant(tmp_path, RASPBERRY_PI)).joules(2.0) == pytest.approx(6.84)


def test_the_input_rail_of_a_jetson_is_the_whole_board(tmp_path: Path) -> None:
    assert Hwmon(plant(tmp_path, JETSON)).joules(1.0) == pytest.approx(6.0)


def test_a_graphics_card_is_not_the_board(tmp_path: Path) -> None:
    only_card = {name: text for name, text in JETSON.items() if "hwmon4" in name}
    assert Hwmon(plant(tmp_path, only_card)).joules(1.0) is None


def test_a_battery_counts_while_it_discharges_and_a_mouse_never(tmp_path: Path) -> None:
    battery = Battery(plant(tmp_path, LAPTOP))
    assert battery.joules(10.0) == pytest.approx(73.4)
    plant(tmp_path, {"class/power_supply/BAT0/status": "Charging"})
    assert battery.joules(10.0) is None


def test_a_battery_without_power_gives_current_times_voltage(tmp_path: Path) -> None:
    tree = {
        "class/power_supply/BAT1/type": "Battery",
        "class/power_supply/BAT1/status": "Discharging",
        "class/power_supply/BAT1/current_now": "-500000",
        "class/power_supply/BAT1/voltage_now": "12000000",
    }
    assert Battery(plant(tmp_path, tree)).joules(1.0) == pytest.approx(6.0)


def test_the_best_meter_counts(tmp_path: Path) -> None:
    power = meter_of(plant(tmp_path, LAPTOP))
    power.sample(100.0)
    plant(tmp_path, {PACKAGE: "261004000000", DRAM: "6000000"})
    reading = power.sample(102.0)
    assert (reading.source, reading.measured, reading.scope) == ("rapl", True, "package")
    assert reading.watts == pytest.approx(2.5)


def test_joules_per_inference_are_of_the_window(tmp_path: Path) -> None:
    power = meter_of(plant(tmp_path, RASPBERRY_PI))
    for now_s in range(11):
        power.sample(float(now_s))
    fields = power.take_window(inferences=342)
    assert fields is not None
    message = PowerMessage(**fields)
    assert (message.source, message.measured, message.inferences) == ("hwmon", True, 342)
    assert message.joules == pytest.approx(34.2)
    assert message.joules_per_inference == pytest.approx(0.1)
    assert message.watts == pytest.approx(3.42)
    assert power.take_window(inferences=1) is None
    assert power.statistics()["joules"] == pytest.approx(34.2)


def test_a_window_without_inferences_has_no_joules_per_inference(tmp_path: Path) -> None:
    power = meter_of(plant(tmp_path, RASPBERRY_PI))
    power.sample(0.0)
    power.sample(1.0)
    fields = power.take_window(inferences=0)
    assert fields is not None
    assert fields["joules_per_inference"] is None


def test_without_any_meter_cpu_time_gives_an_estimate_that_says_so(tmp_path: Path) -> None:
    cpu = Cpu()
    power = meter_of(tmp_path, cpu, watts_per_cpu=5.0)
    power.sample(0.0)
    cpu.seconds = 0.4
    reading = power.sample(2.0)
    assert (reading.source, reading.measured, reading.scope) == ("estimate", False, "processes")
    assert reading.watts == pytest.approx(1.0)


def test_an_estimate_never_gives_energy_back() -> None:
    cpu = Cpu()
    cpu.seconds = 9.0
    meter = Estimate(cpu)
    meter.joules(1.0)
    cpu.seconds = 1.0
    assert meter.joules(1.0) == 0.0


def test_a_window_with_one_estimated_interval_is_an_estimate(tmp_path: Path) -> None:
    cpu = Cpu()
    supply = {name: text for name, text in LAPTOP.items() if "power_supply" in name}
    power = meter_of(plant(tmp_path, supply), cpu)
    power.sample(0.0)
    assert power.sample(1.0).source == "battery"
    plant(tmp_path, {"class/power_supply/BAT0/status": "Full"})
    cpu.seconds = 0.5
    assert power.sample(2.0).watts == pytest.approx(2.0)
    fields = power.take_window(inferences=1)
    assert fields is not None
    assert (fields["source"], fields["measured"]) == ("estimate", False)
    assert fields["joules"] == pytest.approx(7.34 + 2.0)


def test_a_long_gap_is_not_filled_with_a_guess(tmp_path: Path) -> None:
    power = meter_of(plant(tmp_path, RASPBERRY_PI))
    power.sample(0.0)
    power.sample(3600.0)
    assert power.take_window(inferences=1) is None
    assert power.reading.watts is None


def test_readings_of_this_machine_are_finite_or_unknown() -> None:
    cpu = Cpu()
    power = meter_of(Path("/sys"), cpu)
    power.sample(0.0)
    watts = power.sample(1.0).watts
    assert watts is None or (math.isfinite(watts) and watts >= 0)
