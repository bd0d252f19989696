"""How much energy the device uses, from the best meter it has; else an estimate that says so.

    power = Power(find_meters(Path("/sys"), cpu_seconds=processes.cpu_s, watts_per_cpu=4.0))
    reading = power.sample(monotonic_s())              # about once a second
    message = power.take_window(inferences=1_200)      # fields of contract.messages.Power

| meter    | source   | reads                                           | sees                             |
|----------|----------|-------------------------------------------------|----------------------------------|
| Rapl     | rapl     | class/powercap/intel-rapl:N energy counters     | processor and memory, all programs |
| Hwmon    | hwmon    | class/hwmon/hwmonN of a power monitor (INA...)  | what is behind it, mostly the board |
| Battery  | battery  | class/power_supply/* while discharging          | the whole device                 |
| Estimate | estimate | CPU seconds of our processes x configured watts | our processes only               |

Tried in that order at every sample, so a battery that is plugged in, or a counter that may not be read, falls
through to the next; a window that held one estimated interval is an estimate (`measured` False).
Sources: Linux Documentation/power/powercap/powercap.rst, Documentation/hwmon/sysfs-interface.rst,
Documentation/ABI/testing/sysfs-class-power. Mutable, owned by one thread; time is an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from agent.sysfs import folders, read_number, read_text

MICRO: Final = 1e-6
MILLI: Final = 1e-3
POWER_MONITORS: Final = ("ina", "ltc29", "power_meter")
"""Prefixes of hwmon names that measure a board (TI INA, Analog LTC29xx, ACPI); a graphics card's own is none."""
TOTAL_RAILS: Final = ("VDD_IN", "POM_5V_IN", "SYS")
"""Labels of a Jetson's input rail: the other rails of the same chip are parts of it."""
DEFAULT_WATTS_PER_CPU: Final = 4.0
"""Assumed power of one busy core: between a Raspberry Pi 4's (about 1 W) and a desktop core's (10 W and more). It is
a placeholder for `estimate`, to be configured per device; figures from it compare versions, not devices."""
LONGEST_INTERVAL_S: Final = 60.0
"""A power reading is not stretched over a longer gap than this (suspend, stopped clock)."""


class Meter(Protocol):
    """Energy since the last call. `measured`: False for an estimate; `scope`: what the number covers."""

    source: str
    measured: bool
    scope: str

    def joules(self, interval_s: float) -> float | None:
        """Joules used in the last `interval_s`; None when unknown (then, or on the first call)."""
        ...


class Rapl:
    """Running Average Power Limit counters: monotone microjoules that wrap at `max_energy_range_uj`."""

    source = "rapl"
    measured = True
    scope = "package"

    def __init__(self, sysfs: Path) -> None:
        self._zones = _rapl_zones(sysfs)
        self._last_uj: dict[Path, int] = {}
        self._range_uj = {zone: read_number(zone / "max_energy_range_uj") for zone in self._zones}

    def joules(self, interval_s: float) -> float | None:  # noqa: ARG002 - a counter needs no interval
        """None also when one zone cannot be read (root only since Linux 5.10): half a sum would mislead."""
        parts = [self._delta_uj(zone) for zone in self._zones]
        known = [part for part in parts if part is not None]
        return sum(known) * MICRO if known and len(known) == len(parts) else None

    def _delta_uj(self, zone: Path) -> int | None:
        now_uj, before_uj = read_number(zone / "energy_uj"), self._last_uj.pop(zone, None)
        if now_uj is None:
            return None
        self._last_uj[zone] = now_uj
        if before_uj is None:
            return None
        if now_uj >= before_uj:
            return now_uj - before_uj
        range_uj = self._range_uj[zone]
        return None if range_uj is None else now_uj - before_uj + range_uj


def _rapl_zones(sysfs: Path) -> list[Path]:
    """Packages, and their memory where it is a zone of its own (it is not part of the package's counter)."""
    packages = [
        zone
        for zone in folders(sysfs / "class/powercap", "*-rapl:[0-9]*")
        if zone.name.count(":") == 1 and (read_text(zone / "name") or "").startswith("package")
    ]
    memory = [
        part
        for zone in packages
        for part in folders(zone, f"{zone.name}:[0-9]*")
        if read_text(part / "name") == "dram"
    ]
    return packages + memory


class Hwmon:
    """Power monitors on the board: `powerN_input` in microwatts, or millivolts times milliamperes."""

    source = "hwmon"
    measured = True
    scope = "board"

    def __init__(self, sysfs: Path) -> None:
        self._chips = [
            chip
            for chip in folders(sysfs / "class/hwmon", "hwmon*")
            if (read_text(chip / "name") or "").lower().startswith(POWER_MONITORS)
        ]

    def joules(self, interval_s: float) -> float | None:
        known = [watts for chip in self._chips if (watts := _chip_watts(chip)) is not None]
        return sum(known) * interval_s if known else None


def _chip_watts(chip: Path) -> float | None:
    rails = _rails(chip)
    totals = [watts for label, watts in rails if label in TOTAL_RAILS]
    chosen = totals[:1] or [watts for _, watts in rails]
    return sum(chosen) if chosen else None


def _rails(chip: Path) -> list[tuple[str, float]]:
    direct = []
    for file in (*folders(chip, "power*_input"), *folders(chip, "power*_average")):
        number = read_number(file)
        if number is not None:
            direct.append((read_text(chip / f"{file.name.split('_')[0]}_label") or "", number * MICRO))
    if direct:
        return direct
    pairs = []
    for file in folders(chip, "curr*_input"):
        rail = file.name.removeprefix("curr").removesuffix("_input")
        current_ma, voltage_mv = read_number(file), read_number(chip / f"in{rail}_input")
        if current_ma is not None and voltage_mv is not None:
            label = read_text(chip / f"in{rail}_label") or ""
            pairs.append((label, current_ma * MILLI * voltage_mv * MILLI))
    return pairs


class Battery:
    """What the batteries give while they discharge; unknown while they charge or rest."""

    source = "battery"
    measured = True
    scope = "device"

    def __init__(self, sysfs: Path) -> None:
        self._supplies = [
            supply
            for supply in folders(sysfs / "class/power_supply", "*")
            if read_text(supply / "type") == "Battery" and (read_text(supply / "scope") or "System") == "System"
        ]

    def joules(self, interval_s: float) -> float | None:
        known = [watts for supply in self._supplies if (watts := _battery_watts(supply)) is not None]
        return sum(known) * interval_s if known else None


def _battery_watts(supply: Path) -> float | None:
    if read_text(supply / "status") != "Discharging":
        return None
    power_uw = read_number(supply / "power_now")
    if power_uw is not None:
        return abs(power_uw) * MICRO  # some drivers give a negative number while discharging
    current_ua, voltage_uv = read_number(supply / "current_now"), read_number(supply / "voltage_now")
    return None if current_ua is None or voltage_uv is None else abs(current_ua) * MICRO * voltage_uv * MICRO


class Estimate:
    """CPU seconds of our processes times a configured figure. Says nothing of idle power, memory or radio."""

    source = "estimate"
    measured = False
    scope = "processes"

    def __init__(self, cpu_seconds: Callable[[], float], watts_per_cpu: float = DEFAULT_WATTS_PER_CPU) -> None:
        """`cpu_seconds`: of all our processes so far, never falling."""
        self._cpu_seconds = cpu_seconds
        self._watts_per_cpu = watts_per_cpu
        self._last_s: float | None = None

    def joules(self, interval_s: float) -> float | None:  # noqa: ARG002 - CPU time is its own interval
        now_s, before_s = self._cpu_seconds(), self._last_s
        self._last_s = now_s
        return None if before_s is None else max(0.0, now_s - before_s) * self._watts_per_cpu


def find_meters(
    sysfs: Path, *, cpu_seconds: Callable[[], float], watts_per_cpu: float = DEFAULT_WATTS_PER_CPU
) -> tuple[Meter, ...]:
    """All meters, best first; those without hardware answer None and cost a few failed opens."""
    return (Rapl(sysfs), Hwmon(sysfs), Battery(sysfs), Estimate(cpu_seconds, watts_per_cpu))


@dataclass(frozen=True, slots=True)
class Reading:
    """The last interval. `watts` None: no interval yet."""

    source: str
    measured: bool
    scope: str
    watts: float | None


UNKNOWN: Final = Reading(source="estimate", measured=False, scope="processes", watts=None)


class Power:
    """Adds intervals of the best meter up to windows."""

    def __init__(self, meters: Sequence[Meter]) -> None:
        self._meters = tuple(meters)
        self._last_s: float | None = None
        self._joules = 0.0
        self._total_joules = 0.0
        self._seconds = 0.0
        self._worst: Meter | None = None
        self.reading = UNKNOWN

    def sample(self, now_s: float) -> Reading:
        """Read all meters at monotonic time `now_s`; the first that knows counts."""
        interval_s = 0.0 if self._last_s is None else max(0.0, now_s - self._last_s)
        self._last_s = now_s
        # every meter is read each time: a counter that becomes the best must know its own last value
        answers = [(meter, meter.joules(interval_s)) for meter in self._meters]
        if not 0.0 < interval_s <= LONGEST_INTERVAL_S:
            return self.reading
        meter, joules = next(((one, answer) for one, answer in answers if answer is not None), (None, None))
        if meter is None or joules is None:
            return self.reading
        self._add(meter, joules, interval_s)
        self.reading = Reading(meter.source, meter.measured, meter.scope, joules / interval_s)
        return self.reading

    def take_window(self, *, inferences: int) -> dict[str, Any] | None:
        """The energy since the last call as fields of `contract.messages.Power`; None when no interval was known."""
        if self._worst is None:
            return None
        fields = {
            "source": self._worst.source,
            "measured": self._worst.measured,
            "scope": self._worst.scope,
            "joules": self._joules,
            "inferences": inferences,
            "joules_per_inference": self._joules / inferences if inferences else None,
            "watts": self._joules / self._seconds,
        }
        self._joules, self._seconds, self._worst = 0.0, 0.0, None
        return fields

    def statistics(self) -> dict[str, float | str | bool | None]:
        """The last reading and the joules since the start."""
        reading = self.reading
        return {
            "source": reading.source,
            "measured": reading.measured,
            "scope": reading.scope,
            "watts": reading.watts,
            "joules": self._total_joules,
        }

    def _add(self, meter: Meter, joules: float, interval_s: float) -> None:
        self._joules += joules
        self._total_joules += joules
        self._seconds += interval_s
        if self._worst is None or self._meters.index(meter) > self._meters.index(self._worst):
            self._worst = meter
