"""How hot the device is, and whether it is being slowed down for it. None = the device does not say.

    thermal = Thermal(Path("/sys"))
    reading = thermal.read()        # Heat(temperature_c=61.5, zone="cpu-thermal", throttled=False)

Temperature: the hottest zone of the processor (`class/thermal`), else the hottest zone at all, else the hottest
sensor of a processor driver (`class/hwmon`). Throttling, any of: Intel's throttle counters rose since the last
read; a processor cooling device is active; a Raspberry Pi's firmware says so.
Sources: Linux Documentation/driver-api/thermal/sysfs-api.rst; Raspberry Pi documentation, `vcgencmd get_throttled`
(bit 1 frequency capped, bit 2 throttled, bit 3 soft temperature limit, all "now").
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent.sysfs import folders, read_number, read_text

MILLI: Final = 1e-3
PLAUSIBLE_C: Final = (-60.0, 200.0)  # a driver without data gives 0 K, -274 or 255 degrees
CPU_ZONES: Final = ("x86_pkg", "cpu", "soc", "tcpu", "big", "little", "cluster")
CPU_CHIPS: Final = ("coretemp", "k10temp", "zenpower", "cpu_thermal")
CPU_COOLERS: Final = ("cpufreq", "processor", "thermal-cpufreq")
PI_THROTTLED: Final = "devices/platform/soc/soc:firmware/get_throttled"
PI_NOW: Final = 0b1110


@dataclass(frozen=True, slots=True)
class Heat:
    """`zone`: which sensor gave the temperature; "" when none did."""

    temperature_c: float | None
    zone: str
    throttled: bool | None


class Thermal:
    """Remembers the throttle counters between reads. Owned by one thread."""

    def __init__(self, sysfs: Path) -> None:
        self._sysfs = sysfs
        self._counts: dict[Path, int] = {}

    def read(self) -> Heat:
        temperature_c, zone = max(self._temperatures(), default=(None, ""), key=lambda one: one[0] or 0.0)
        answers = [self._by_counters(), self._by_cooling(), self._by_firmware()]
        known = [answer for answer in answers if answer is not None]
        return Heat(temperature_c, zone, any(known) if known else None)

    def _temperatures(self) -> list[tuple[float, str]]:
        zones = [
            (celsius, read_text(zone / "type") or zone.name)
            for zone in folders(self._sysfs / "class/thermal", "thermal_zone*")
            if (celsius := _celsius(zone / "temp")) is not None
        ]
        cpu_zones = [one for one in zones if one[1].lower().startswith(CPU_ZONES)]
        return cpu_zones or zones or self._chip_temperatures()

    def _chip_temperatures(self) -> list[tuple[float, str]]:
        return [
            (celsius, name)
            for chip in folders(self._sysfs / "class/hwmon", "hwmon*")
            if (name := read_text(chip / "name") or "") in CPU_CHIPS
            for file in folders(chip, "temp*_input")
            if (celsius := _celsius(file)) is not None
        ]

    def _by_counters(self) -> bool | None:
        """None before the second read: a count since boot says nothing of now."""
        counts = _numbers(folders(self._sysfs / "devices/system/cpu", "cpu[0-9]*/thermal_throttle/*_throttle_count"))
        rose = [count > self._counts[file] for file, count in counts.items() if file in self._counts]
        self._counts = counts
        return any(rose) if rose else None

    def _by_cooling(self) -> bool | None:
        coolers = [
            cooler / "cur_state"
            for cooler in folders(self._sysfs / "class/thermal", "cooling_device*")
            if (read_text(cooler / "type") or "").lower().startswith(CPU_COOLERS)
        ]
        states = _numbers(coolers)
        return any(state > 0 for state in states.values()) if states else None

    def _by_firmware(self) -> bool | None:
        text = read_text(self._sysfs / PI_THROTTLED)
        try:
            return None if text is None else bool(int(text, 16) & PI_NOW)
        except ValueError:
            return None


def _celsius(file: Path) -> float | None:
    number = read_number(file)
    if number is None or not PLAUSIBLE_C[0] < number * MILLI < PLAUSIBLE_C[1]:
        return None
    return number * MILLI


def _numbers(files: Iterable[Path]) -> dict[Path, int]:
    return {file: number for file in files if (number := read_number(file)) is not None}
