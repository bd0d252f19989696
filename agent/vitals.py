"""How the device is, read about once a second: processes, memory, disk, energy and heat in one value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.sensors.device import Device, DeviceInfo, Usage, describe
from agent.sensors.power import Power, Reading, find_meters
from agent.sensors.thermal import Heat, Thermal


@dataclass(frozen=True, slots=True)
class Vital:
    """The newest readings; None inside them = the device does not say."""

    usage: Usage
    power: Reading
    heat: Heat


class Vitals:
    """All sensors of the device. Owned by one thread; time is an argument."""

    def __init__(self, folder: Path, *, watts_per_cpu: float, sysfs: Path = Path("/sys")) -> None:
        self.info: DeviceInfo = describe()
        self._device = Device(folder)
        meters = find_meters(sysfs, cpu_seconds=self._device.cpu_s, watts_per_cpu=watts_per_cpu)
        self._power = Power(meters)
        self._thermal = Thermal(sysfs)
        self.newest: Vital | None = None

    def sample(self, now_s: float, pids: Sequence[int]) -> Vital:
        """Read everything at monotonic time `now_s`; `pids` are the agent's own processes."""
        usage = self._device.read(pids)  # before the power: an estimate is made of its CPU seconds
        self.newest = Vital(usage, self._power.sample(now_s), self._thermal.read())
        return self.newest

    def take_power_window(self, *, inferences: int) -> dict[str, Any] | None:
        """As `sensors.power.Power.take_window`."""
        return self._power.take_window(inferences=inferences)

    def gauges(self) -> dict[str, float | None]:
        """The newest readings as flat numbers for telemetry."""
        if self.newest is None:
            return {}
        usage, heat = self.newest.usage, self.newest.heat
        return {
            "temperature_c": heat.temperature_c,
            "throttled": None if heat.throttled is None else float(heat.throttled),
            "resident_bytes": usage.resident_bytes,
            "memory_available_bytes": usage.memory_available_bytes,
            "disk_free_bytes": usage.disk_free_bytes,
            "cpu_share": usage.cpu_share,
            "load_1min": usage.load_1min,
            "power_w": self.newest.power.watts,
        }

    def energy(self) -> dict[str, float | str | bool | None]:
        """Source, scope, watts of the last interval and joules since the start."""
        return self._power.statistics()
