"""The device: what it is, and how much memory, processor and disk is used. The only door to psutil.

    info = describe()                                      # once: for the birth message
    device = Device(state_folder)
    usage = device.read((agent_pid, worker_pid))           # about once a second; about 0.2 ms
    device.cpu_s()                                         # CPU seconds of all processes ever given to `read`

A process that ends between two reads keeps its CPU seconds in the sum, so `cpu_s` never falls.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from agent.sysfs import read_text

ML_FLAGS: Final = (
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8",
    "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip
"""Processor features a runtime's kernels choose by; the dozens of others say nothing about a model's speed."""


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """What does not change until the next boot. `boot_id`: the kernel's, "" when it has none."""

    machine: str
    system: str
    cpus: int
    cpu_flags: tuple[str, ...]
    memory_bytes: int
    boot_id: str
    boot_s: float


@dataclass(frozen=True, slots=True)
class Usage:
    """`resident_bytes`: of our processes; `cpu_share`: of all processors, since the last read; None = unknown."""

    resident_bytes: int | None
    cpu_share: float | None
    memory_total_bytes: int
    memory_available_bytes: int
    disk_total_bytes: int | None
    disk_free_bytes: int | None
    load_1min: float


def describe(proc: Path = Path("/proc")) -> DeviceInfo:
    return DeviceInfo(
        machine=platform.machine(),
        system=f"{platform.system()} {platform.release()}",
        cpus=psutil.cpu_count(logical=True) or 1,
        cpu_flags=cpu_flags(proc),
        memory_bytes=int(psutil.virtual_memory().total),
        boot_id=read_text(proc / "sys/kernel/random/boot_id") or "",
        boot_s=float(psutil.boot_time()),
    )


def cpu_flags(proc: Path) -> tuple[str, ...]:
    """Those of ML_FLAGS that the first processor has, in that order (`flags` on x86, `Features` on ARM)."""
    for line in (read_text(proc / "cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in {"flags", "Features"}:
            present = set(value.split())
            return tuple(flag for flag in ML_FLAGS if flag in present)
    return ()


class Device:
    """Owned by one thread. `folder`: the file system whose free space matters."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: dict[int, psutil.Process] = {}
        self._cpu_s: dict[int, float] = {}
        self._gone_cpu_s = 0.0
        psutil.cpu_percent()  # the first call only starts psutil's interval

    def read(self, pids: Sequence[int]) -> Usage:
        self._follow(pids)
        memory = psutil.virtual_memory()
        disk_total, disk_free = self._disk()
        return Usage(
            resident_bytes=self._resident(),
            cpu_share=float(psutil.cpu_percent()) / 100.0,
            memory_total_bytes=int(memory.total),
            memory_available_bytes=int(memory.available),
            disk_total_bytes=disk_total,
            disk_free_bytes=disk_free,
            load_1min=os.getloadavg()[0],
        )

    def cpu_s(self) -> float:
        """CPU seconds of our processes, living and gone; as of the last `read`."""
        return self._gone_cpu_s + sum(self._cpu_s.values())

    def _follow(self, pids: Sequence[int]) -> None:
        for pid in set(self._processes) - set(pids):
            self._forget(pid)
        for pid in pids:
            try:
                process = self._processes.setdefault(pid, psutil.Process(pid))
                times = process.cpu_times()  # psutil checks that the pid was not given to another process
                self._cpu_s[pid] = float(times.user + times.system)
            except psutil.Error:
                self._forget(pid)

    def _forget(self, pid: int) -> None:
        self._processes.pop(pid, None)
        self._gone_cpu_s += self._cpu_s.pop(pid, 0.0)

    def _resident(self) -> int | None:
        total = 0
        for process in self._processes.values():
            try:
                total += int(process.memory_info().rss)
            except psutil.Error:
                continue  # it has just ended; its memory is free
        return total if self._processes else None

    def _disk(self) -> tuple[int | None, int | None]:
        try:
            usage = psutil.disk_usage(str(self._folder))
        except OSError:
            return None, None
        return int(usage.total), int(usage.free)
