"""What watching costs: CPU time a row, in processes of their own, asked in turn so that the neighbours cancel."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from agent.drift import MomentWindow, Reference, dump_reference
from scripts.drift_bench.ours import CLAIM_ROWS, stationary_reference, watching
from scripts.drift_bench.streams import Source
from scripts.drift_bench.workers import ALIBI, FROUROS, OLD_RIVER, RIVER, Worker, open_ours, open_peer
from scripts.lib.environments import Failed
from scripts.lib.goals import median, ratio
from scripts.lib.machine import ROOT

D = 32
N_REF = 20_000
ROUNDS = 9
BATCH = 16  # rows given at once; a detector's own block
WINDOW_ROWS = 256

# what is timed: (peer, detector, its default knob, rows a round)
TIMED = (
    (RIVER, "adwin", 0.002, 2_048),
    (OLD_RIVER, "adwin", 0.002, 1_024),
    (RIVER, "page_hinkley", 50.0, 2_048),
    (RIVER, "kswin", 0.005, 16),
    (FROUROS, "cusum", 50.0, 256),
    (FROUROS, "page_hinkley", 50.0, 256),
    (ALIBI, "mmd", 500.0, 256),
)

Say = Callable[[str], None]


def measure(build: Path, say: Say, *, rounds: int = ROUNDS, quick: bool = False) -> dict[str, Any]:
    """The section `cost`, `reference_bytes`, and details of memory and bytes. A quick run leaves alibi out."""
    costs: dict[str, list[float]] = {"ours": [], "ours, 64 rows at once": []}
    prepared: dict[str, Any] = {}
    unreachable: dict[str, str] = {}
    workers: list[tuple[str, Worker, int]] = []
    versions: dict[str, dict[str, str]] = {}
    own = open_ours(build)
    try:
        prepared["ours"] = own.ask(300, do="prepare", detector="suite", knob=CLAIM_ROWS, d=D, n_ref=N_REF)
        for peer, detector, knob, rows in TIMED:
            name = f"{peer.name} {detector}"
            if quick and (peer is ALIBI or detector == "kswin"):
                unreachable[name] = "not part of a quick run"
                continue
            say(f"preparing {name}")
            try:
                worker, versions[peer.name] = open_peer(peer, build)
                workers.append((name, worker, rows))
                prepared[name] = worker.ask(600, do="prepare", detector=detector, knob=knob, d=D, n_ref=2_000)
                costs[name] = []
            except Failed as error:
                unreachable[name] = str(error)
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            costs["ours"].append(own.ask(60, do="cost", rows=4_096, batch=BATCH)["us"])
            for name, worker, rows in workers:
                if name in costs:
                    costs[name].append(worker.ask(120, do="cost", rows=rows, batch=rows)["us"])
            costs["ours, 64 rows at once"].append(own.ask(60, do="cost", rows=4_096, batch=64)["us"])
    finally:
        for _, worker, _ in workers:
            worker.end()
        own.end()
    us = {name: round(median(values), 3) for name, values in costs.items() if values}
    reference = stationary_reference(Source("gauss", D, 0).take(N_REF))
    sizes = bytes_of(reference)
    return {
        "cost": {
            "ours_us": us["ours"],
            "adwin_over_ours": _over(us, "river adwin"),
            "alibi_over_ours": _over(us, "alibi mmd"),
        },
        "": {"reference_bytes": sizes["reference"]},
        "details": {
            "us_per_row": us, "batch_rows": BATCH, "bytes": sizes, "prepared": prepared, "unreachable": unreachable,
            "old_adwin_over_ours": _over(us, "river-0.23 adwin"),
            "rss_mb": {"a process with our monitor": rss_mb(reference, build)}
            | {name: told["rss_mb"] for name, told in prepared.items() if name != "ours"},
            "versions": versions,
        },
    }  # fmt: skip


def _over(us: dict[str, float], name: str) -> float | None:
    return ratio(us[name], us["ours"]) if name in us else None


def bytes_of(reference: Reference, d: int = D) -> dict[str, int]:
    """Of the file, of the state a restart reads, of one drift window on the wire, plain and packed."""
    ours = watching(reference)
    rows = Source("gauss", d, 0, run=7).take(WINDOW_ROWS)
    ours.first_alarm(rows)
    window = MomentWindow.empty(reference.fixed_point()).add(rows.features, np.full(len(rows), -1))
    fields = {name: list(getattr(window, name)) for name in ("sums", "squares", "products") if hasattr(window, name)}
    wire = json.dumps({"rows": window.rows, **fields}, separators=(",", ":")).encode()
    return {
        "reference": len(dump_reference(reference)),
        "state": len(json.dumps(ours.monitor.state(), separators=(",", ":"))),
        "wire": len(wire),
        "wire_packed": len(zstandard.compress(wire, 3)),
    }


def rss_mb(reference: Reference, build: Path) -> float:
    """Resident memory of a fresh process that loads the reference and has followed 4,096 rows."""
    file = build / "reference.npz"
    file.write_bytes(dump_reference(reference))
    program = (
        "import os, sys, pathlib, numpy as np\n"
        "from agent.drift import load_reference, drift_monitor\n"
        "monitor = drift_monitor(load_reference(pathlib.Path(sys.argv[1])))\n"
        f"x = np.random.default_rng(0).normal(size=(4096, {D}))\n"
        "monitor.follow(x, np.full(4096, -1), np.arange(4096.0))\n"
        "print(int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 1e6)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(file)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    return round(float(done.stdout), 1) if done.returncode == 0 else 0.0
