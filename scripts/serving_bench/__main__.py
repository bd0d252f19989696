"""`scripts/bench serving`: measures our serving and its peers in one run, and prints ratios against the goals."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.lib.machine import BUILD, keep, load_average, machine, previous
from scripts.serving_bench.load import Load
from scripts.serving_bench.parts import PARTS, QUICK, Bench
from scripts.serving_bench.processes import Failed
from scripts.serving_bench.results import compare, empty, lines

RESULTS = BUILD / "results"
PACKAGES = ("onnxruntime", "numpy", "uvloop", "httptools", "msgspec")
QUICK_SCALE = 0.07  # at 0.1: 94 s where four times as much was running as there were cores


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 measured, whatever the result; 1 a part could not be measured; 2 wrong usage."""
    options = _parser().parse_args(arguments)
    names = _wanted(options)
    before = _previous(options.compare)
    document = empty()
    document["machine"] = machine(PACKAGES, quick=options.quick)
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ewb-") as scratch:  # a short path: sockets live below it
        try:
            load = Load.compile(BUILD)
            bench = Bench(BUILD, Path(scratch), QUICK_SCALE if options.quick else options.scale, _say, load)
            _measure(bench, names, document, options.json)
        except Failed as error:
            document["missing"]["everything"] = str(error)
        except KeyboardInterrupt:
            document["missing"]["the rest"] = "interrupted"
    document["machine"]["load_average_after"] = load_average()
    document["seconds"] = round(time.monotonic() - began_s, 1)
    keep(document, RESULTS, options.json)
    _print(document, before)
    return 1 if document["missing"] else 0


def _measure(bench: Bench, names: Sequence[str], document: dict[str, Any], out: Path | None) -> None:
    expected_s = sum(PARTS[name][1] for name in names) * bench.scale
    began_s = time.monotonic()
    for number, name in enumerate(names, 1):
        spent_s = time.monotonic() - began_s
        _say(f"[{number}/{len(names)}] {name}   {spent_s:.0f} s of about {expected_s:.0f} s")
        try:
            found = PARTS[name][0](bench)
        except (Failed, OSError, ImportError) as error:
            document["missing"][name] = " ".join(str(error).split())[:500]
            _say(f"    not measured: {error}")
            continue
        document["details"][name] = found.pop("details", {})
        for section, values in found.items():
            document[section].update(values)
        keep(document, RESULTS, out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/bench serving",
        description="Our serving and its peers in one run, as ratios against the goals. Results are kept below "
        "build/bench/results, by commit and machine.",
        epilog=f"Parts: {', '.join(PARTS)}.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the document there, after every part")
    parser.add_argument("--quick", action="store_true", help="short runs without peers, under 90 s")
    parser.add_argument("--only", default="", metavar="PART,...", help="measure these parts alone")
    parser.add_argument("--no-peers", action="store_true", help="leave the part `peers` out")
    parser.add_argument("--scale", type=float, default=1.0, help="length of runs, 1 = full (%(default)s)")
    parser.add_argument(
        "--compare", default="", metavar="FILE|last", help="show the change against an earlier document"
    )
    return parser


def _wanted(options: argparse.Namespace) -> list[str]:
    wanted = [name for name in options.only.split(",") if name] or list(QUICK if options.quick else PARTS)
    unknown = [name for name in wanted if name not in PARTS]
    if unknown:
        _parser().error(f"there is no part {', '.join(unknown)}; parts are: {', '.join(PARTS)}")
    if not 0.05 <= options.scale <= 10:
        _parser().error("--scale must lie between 0.05 and 10")
    return [name for name in wanted if not (options.no_peers and name == "peers")]


def _previous(text: str) -> dict[str, Any] | None:
    try:
        return previous(text, RESULTS) if text else None
    except ValueError as error:
        _parser().error(str(error))


def _print(document: dict[str, Any], before: dict[str, Any] | None) -> None:
    print("  ".join(f"{key} {value}" for key, value in document["machine"].items()))
    floor = document["floor"]
    print(f"\nfloor: C echo {floor['echo_us']} us, bound run {floor['bound_run_us']} us")
    print("\n".join(lines(document)))
    seen = document["monitors"]
    if seen["rate_on"] is not None:
        print(
            f"monitors on / off over a Unix socket, 16 connections: {seen['rate_on']:,.0f} / {seen['rate_off']:,.0f} "
            f"requests/s, {seen['cpu_us_on']:.1f} / {seen['cpu_us_off']:.1f} us of CPU a request, all processes"
        )
    versions = document["details"].get("peers", {}).get("versions", {})
    for name, packages in versions.items():
        print(f"{name}: " + ", ".join(f"{package} {number}" for package, number in packages.items()))
    if before is not None:
        print(f"\nchange since {before['machine']['commit']}\n" + "\n".join(compare(before, document)))
    print(f"\n{document['seconds']:.0f} s")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
