"""`scripts/bench drift`: what the drift monitors promise, find and cost, beside their peers, in one run."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agent.contract.errors import EdgewardenError
from scripts.drift_bench import delays, plots
from scripts.drift_bench.parts import PARTS, QUICK, QUICK_SHARE, Bench
from scripts.drift_bench.results import compare, empty, lines
from scripts.lib.environments import Failed
from scripts.lib.machine import BUILD, keep, load_average, machine, previous

RESULTS = BUILD / "drift-results"
PACKAGES = ("numpy", "onnxruntime", "torch")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 measured, whatever the result; 1 a part could not be measured; 2 wrong usage."""
    options = _parser().parse_args(arguments)
    names = _wanted(options)
    before = _previous(options.compare)
    document = empty()
    document["machine"] = machine(PACKAGES, quick=options.quick)
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ewd-") as scratch:
        try:
            _measure(Bench(BUILD, Path(scratch), options.quick, _say), names, document, options.json)
        except KeyboardInterrupt:
            document["missing"]["the rest"] = "interrupted"
    document["machine"]["load_average_after"] = load_average()
    document["seconds"] = round(time.monotonic() - began_s, 1)
    keep(document, RESULTS, options.json)
    _print(document, before)
    if options.plots:
        for path in plots.draw(document, BUILD / "drift-plots"):
            _say(f"plot: {path}")
    return 1 if document["missing"] else 0


def _measure(bench: Bench, names: Sequence[str], document: dict[str, Any], out: Path | None) -> None:
    expected_s = sum(PARTS[name][1] for name in names) * (QUICK_SHARE if bench.quick else 1.0)
    began_s = time.monotonic()
    for number, name in enumerate(names, 1):
        spent_s = time.monotonic() - began_s
        _say(f"[{number}/{len(names)}] {name}   {spent_s:.0f} s of about {expected_s:.0f} s")
        try:
            found = PARTS[name][0](bench)
        except (Failed, EdgewardenError, OSError, ImportError) as error:
            document["missing"][name] = " ".join(str(error).split())[:500]
            _say(f"    not measured: {error}")
            continue
        document["details"][name] = {
            **found.pop("details", {}), "seconds": round(time.monotonic() - began_s - spent_s, 1),
        }  # fmt: skip
        document.update(found.pop("", {}))
        for section, values in found.items():
            document[section].update(values)
        keep(document, RESULTS, out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/bench drift",
        description="What the drift monitors promise, find and cost, beside their peers. Results are kept below "
        "build/bench/drift-results, by commit and machine.",
        epilog=f"Parts: {', '.join(PARTS)}.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the document there, after every part")
    parser.add_argument("--quick", action="store_true", help="little of everything and no peers, under 3 minutes")
    parser.add_argument("--only", default="", metavar="PART,...", help="measure these parts alone")
    parser.add_argument("--plots", action="store_true", help="draw PNGs below build/bench/drift-plots")
    parser.add_argument(
        "--compare", default="", metavar="FILE|last", help="show the change since an earlier document"
    )
    return parser


def _wanted(options: argparse.Namespace) -> list[str]:
    wanted = [name for name in options.only.split(",") if name] or list(QUICK if options.quick else PARTS)
    unknown = [name for name in wanted if name not in PARTS]
    if unknown:
        _parser().error(f"there is no part {', '.join(unknown)}; parts are: {', '.join(PARTS)}")
    return wanted


def _previous(text: str) -> dict[str, Any] | None:
    try:
        return previous(text, RESULTS) if text else None
    except ValueError as error:
        _parser().error(str(error))


def _print(document: dict[str, Any], before: dict[str, Any] | None) -> None:
    details = document["details"]
    print("  ".join(f"{key} {value}" for key, value in document["machine"].items()) + "\n")
    told = [line for line in lines(document) if len(details) > 1 or not line.endswith("not measured")]
    print("\n".join(told))
    if "claim" in details:
        print("\nclaim of one false alarm per 10,000 rows: actual over claimed run length, by cell")
        for name, line in details["claim"]["cells"].items():
            told = (
                f"{line['alarms']} alarms in {line['rows']:,} rows" if line["ratio"] else f"refused {line['refused']}"
            )
            print(f"  {name:28}{line['references']:>4} references  {line.get('ratio_text', '-'):>8}   {told}")
    table = _delay_lines(details)
    if table:
        print("\nmedian rows from a change to the alarm (d = 32, reference of 20,000 rows)")
        print("\n".join(table))
    for name, us in details.get("cost", {}).get("us_per_row", {}).items():
        print(f"{name:30}{us:>12,.2f} us a row")
    for name in ("employment", "shuttle", "digits"):
        if name in details:
            print(f"{name}: {details[name]['claim']}")
    if before is not None:
        print(f"\nchange since {before['machine']['commit']}\n" + "\n".join(compare(before, document)))
    print(f"\n{document['seconds']:.0f} s")


def _delay_lines(details: dict[str, Any]) -> list[str]:
    found: dict[str, Any] = {}
    if "delay" in details:
        found["ours, at its claim of 10,000"] = details["delay"]["ours"]["shipped"]
        found["ours, tuned as all"] = details["delay"]["ours"]["tuned"]
    found |= details.get("peers", {}).get("lines", {})
    return delays.table(found) if found else []


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
