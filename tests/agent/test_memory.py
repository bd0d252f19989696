"""Free memory as /proc and the control groups tell it, both versions, recorded trees."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.memory import available_bytes
from tests.agent.sensors.trees import plant

MIB = 1 << 20
MEMINFO = "MemTotal:       8000000 kB\nMemFree:          100 kB\nMemAvailable:     409600 kB\n"  # 400 MiB
NO_LIMIT_V1 = "9223372036854771712\n"


def v2(place: str, most: str, used: int, *, unused: int = 0, high: str = "max") -> dict[str, str]:
    return {
        f"{place}memory.max": most, f"{place}memory.high": high, f"{place}memory.current": f"{used}\n",
        f"{place}memory.stat": f"anon 1\nfile 2\ninactive_file {unused}\n",
    }  # fmt: skip


def v1(place: str, most: str, used: int, unused: int = 0) -> dict[str, str]:
    return {
        f"memory/{place}memory.limit_in_bytes": most, f"memory/{place}memory.usage_in_bytes": f"{used}\n",
        f"memory/{place}memory.stat": f"cache 5\ninactive_file 3\ntotal_inactive_file {unused}\n",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("membership", "groups", "expected"),
    [
        ("0::/\n", {}, 400),
        ("", {}, 400),
        ("nonsense\n", {}, 400),
        ("0::/a/b\n", v2("a/b/", f"{300 * MIB}", 100 * MIB), 200),
        ("0::/a/b\n", v2("a/b/", f"{300 * MIB}", 100 * MIB, unused=50 * MIB), 250),
        ("0::/a/b\n", v2("a/b/", "max", 100 * MIB) | v2("a/", f"{150 * MIB}", 120 * MIB), 30),
        ("0::/a/b\n", v2("a/b/", f"{300 * MIB}", 100 * MIB, high=f"{110 * MIB}"), 10),
        ("0::/a/b\n", v2("a/b/", f"{100 * MIB}", 100 * MIB, high=f"{50 * MIB}"), 0),
        ("0::/not/seen/here\n", v2("", f"{60 * MIB}", 10 * MIB), 50),
        ("0::/../../x\n", v2("", f"{60 * MIB}", 10 * MIB), 50),
        ("0::/a\n", v2("a/", f"{900 * MIB}", 100 * MIB), 400),
        ("4:cpu,memory:/a\n1:cpu:/b\n0::/\n", v1("a/", f"{100 * MIB}", 80 * MIB, 5 * MIB), 25),
        ("4:memory:/a\n", v1("a/", NO_LIMIT_V1, 80 * MIB), 400),
    ],
)
def test_the_tightest_limit_counts(tmp_path: Path, membership: str, groups: dict[str, str], expected: int) -> None:
    proc = plant(tmp_path / "proc", {"meminfo": MEMINFO, "self/cgroup": membership})
    cgroups = plant(tmp_path / "cgroup", groups)
    assert available_bytes(proc=proc, cgroups=cgroups) == expected * MIB


def test_unknown_is_no_number(tmp_path: Path) -> None:
    assert available_bytes(proc=tmp_path, cgroups=tmp_path) is None


def test_this_machine_says() -> None:
    assert available_bytes()
