"""Recorded folder trees: the files a board shows under /sys, as text, written below a temporary root."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

LAPTOP: Mapping[str, str] = {
    "class/powercap/intel-rapl/enabled": "1",
    "class/powercap/intel-rapl:0/name": "package-0",
    "class/powercap/intel-rapl:0/energy_uj": "261000000000",
    "class/powercap/intel-rapl:0/max_energy_range_uj": "262143328850",
    "class/powercap/intel-rapl:0/intel-rapl:0:0/name": "core",
    "class/powercap/intel-rapl:0/intel-rapl:0:0/energy_uj": "77",
    "class/powercap/intel-rapl:0/intel-rapl:0:0/max_energy_range_uj": "262143328850",
    "class/powercap/intel-rapl:0/intel-rapl:0:2/name": "dram",
    "class/powercap/intel-rapl:0/intel-rapl:0:2/energy_uj": "5000000",
    "class/powercap/intel-rapl:0/intel-rapl:0:2/max_energy_range_uj": "65712999613",
    "class/powercap/intel-rapl:1/name": "psys",
    "class/powercap/intel-rapl:1/energy_uj": "999",
    "class/power_supply/AC/type": "Mains",
    "class/power_supply/BAT0/type": "Battery",
    "class/power_supply/BAT0/status": "Discharging",
    "class/power_supply/BAT0/power_now": "7340000",
    "class/power_supply/hidpp_battery_0/type": "Battery",
    "class/power_supply/hidpp_battery_0/scope": "Device",
    "class/power_supply/hidpp_battery_0/status": "Discharging",
    "class/power_supply/hidpp_battery_0/power_now": "100",
    "class/thermal/thermal_zone0/type": "acpitz",
    "class/thermal/thermal_zone0/temp": "95000",
    "class/thermal/thermal_zone1/type": "x86_pkg_temp",
    "class/thermal/thermal_zone1/temp": "61000",
    "class/thermal/thermal_zone2/type": "iwlwifi_1",
    "class/thermal/thermal_zone2/temp": "255000",
    "class/thermal/cooling_device0/type": "Processor",
    "class/thermal/cooling_device0/cur_state": "0",
    "devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "10",
    "devices/system/cpu/cpu0/thermal_throttle/package_throttle_count": "30",
}
RASPBERRY_PI: Mapping[str, str] = {
    "class/hwmon/hwmon0/name": "cpu_thermal",
    "class/hwmon/hwmon0/temp1_input": "52082",
    "class/hwmon/hwmon1/name": "ina219",
    "class/hwmon/hwmon1/power1_input": "3420000",
    "class/hwmon/hwmon1/in1_input": "5070",
    "class/hwmon/hwmon1/curr1_input": "674",
    "class/thermal/thermal_zone0/type": "cpu-thermal",
    "class/thermal/thermal_zone0/temp": "52582",
    "devices/platform/soc/soc:firmware/get_throttled": "50000",
}
JETSON: Mapping[str, str] = {
    "class/hwmon/hwmon3/name": "ina3221",
    "class/hwmon/hwmon3/in1_label": "VDD_IN",
    "class/hwmon/hwmon3/in1_input": "5000",
    "class/hwmon/hwmon3/curr1_input": "1200",
    "class/hwmon/hwmon3/in2_label": "VDD_CPU_GPU_CV",
    "class/hwmon/hwmon3/in2_input": "5000",
    "class/hwmon/hwmon3/curr2_input": "400",
    "class/hwmon/hwmon4/name": "amdgpu",
    "class/hwmon/hwmon4/power1_average": "25000000",
    "class/thermal/thermal_zone0/type": "cpu-thermal",
    "class/thermal/thermal_zone0/temp": "48500",
    "class/thermal/thermal_zone1/type": "soc2-thermal",
    "class/thermal/thermal_zone1/temp": "49250",
    "class/thermal/cooling_device1/type": "thermal-cpufreq-0",
    "class/thermal/cooling_device1/cur_state": "2",
}


def plant(root: Path, tree: Mapping[str, str]) -> Path:
    """Write `tree` below `root` (again: with new values) and return `root`."""
    for name, text in tree.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    return root
