"""The device as psutil sees it, with processes that come and go."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from agent.sensors.device import ML_FLAGS, Device, cpu_flags, describe
from tests.agent.sensors.trees import plant

BUSY = "import time\nwhile time.process_time() < 0.2: pass\nprint('done', flush=True)\ninput()"


def test_the_device_says_what_it_is() -> None:
    info = describe()
    assert info.machine
    assert info.cpus >= 1
    assert info.memory_bytes > 0
    assert info.boot_s > 0
    assert set(info.cpu_flags) <= set(ML_FLAGS)


def test_flags_are_read_on_both_kinds_of_processor(tmp_path: Path) -> None:
    x86 = plant(tmp_path / "x86", {"cpuinfo": "processor\t: 0\nflags\t\t: fpu avx avx2 fma hypervisor avx512_vnni\n"})
    assert cpu_flags(x86) == ("avx", "avx2", "fma", "avx512_vnni")
    arm = plant(tmp_path / "arm", {"cpuinfo": "processor\t: 0\nFeatures\t: fp asimd evtstrm asimddp\n"})
    assert cpu_flags(arm) == ("asimd", "asimddp")
    assert cpu_flags(tmp_path / "none") == ()


def test_usage_counts_our_processes_and_the_disk_of_the_state(tmp_path: Path) -> None:
    device = Device(tmp_path)
    usage = device.read((os.getpid(),))
    assert usage.resident_bytes is not None
    assert usage.resident_bytes > 1_000_000
    assert usage.disk_free_bytes is not None
    assert 0 < usage.disk_free_bytes <= (usage.disk_total_bytes or 0)
    assert 0 < usage.memory_available_bytes <= usage.memory_total_bytes
    assert usage.cpu_share is not None
    assert 0.0 <= usage.cpu_share <= 1.0


def test_a_folder_or_process_that_is_gone_is_unknown(tmp_path: Path) -> None:
    usage = Device(tmp_path / "gone").read(())
    assert (usage.resident_bytes, usage.disk_free_bytes, usage.disk_total_bytes) == (None, None, None)
    assert Device(tmp_path).read((2**22 + 1,)).resident_bytes is None


def test_cpu_seconds_of_a_process_that_ended_stay_in_the_sum(tmp_path: Path) -> None:
    device = Device(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "done\n"
        device.read((child.pid,))
        used_s = device.cpu_s()
        child.communicate("\n")
    assert used_s >= 0.15
    device.read((child.pid,))
    assert device.cpu_s() == used_s
    device.read(())
    assert device.cpu_s() == used_s
