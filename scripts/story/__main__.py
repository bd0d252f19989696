"""The quickstart: `scripts/quickstart` sets up and runs `python -m scripts.story`.

Everything it writes lies in one folder (default build/quickstart): report.json, story.png, the artifacts with
their own report.html, the agent's configuration and log.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from rich.console import Console

from agent import VERSION, clock
from agent.contract.artifact import open_artifact
from agent.contract.errors import EdgewardenError
from scripts.story.timeline import Timeline, clock_text, draw, moving_accuracy, sparkline

CALLER = Path(os.environ.get("EW_CALLER_PWD", Path.cwd()))  # where the person stands; the scripts work in ROOT
ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "compressor/examples/wrist/recipe.quick.toml"
DEVICE_CLASS = "gateway"
PROBATION_S = 30.0  # how long a new wearer's device watches its update
VARIANT_KEYS = ("name", "accuracy", "latency_p50_us", "latency_cpu_p20_us", "size_bytes", "chosen", "reason")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/quickstart",
        description="Compress a model, serve it, break a sensor, fall back, recover: real data, real processes.",
        epilog="Exit codes: 0 the story held; 1 something in it did not, the last lines say what; 2 usage or set-up.",
    )
    parser.add_argument(
        "--new-wearers", type=three_wearers, default=(1, 2, 3), metavar="A,B,C",
        help="three of the ten wearers, 1 to 10, whom the first model never sees (default: 1,2,3)",
    )  # fmt: skip
    parser.add_argument("--stay", action="store_true", help="keep everything running at the end, until Ctrl-C")
    parser.add_argument("--out", type=Path, default=ROOT / "build/quickstart", help="where everything is written")
    return parser.parse_args()


def three_wearers(text: str) -> tuple[int, ...]:
    """Three distinct wearers from 1 to 10."""
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(set(numbers)) != 3 or len(numbers) != 3 or not set(numbers) <= set(range(1, 11)):
        raise argparse.ArgumentTypeError(f"'{text}' does not name three different wearers from 1 to 10")
    return numbers


def main() -> int:
    options = arguments()
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(highlight=False, soft_wrap=True, width=160)  # a file has no width: do not break lines
    out: Path = (CALLER / options.out).resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.json").unlink(missing_ok=True)
    except OSError as error:
        console.print(f"[red]Cannot write to {out}:[/] {error.strerror}. Name another folder with --out.")
        return 2
    started = clock.monotonic_s()
    for number in (signal.SIGTERM, signal.SIGHUP):  # end what was started, as Ctrl-C does
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    console.print(f"[bold]Edgewarden {VERSION}[/]: the whole story, in about eight minutes, written to {shown(out)}")
    try:
        report = tell(console, out, options, started)
    except KeyboardInterrupt:
        console.print("[red]Interrupted.[/] Finished stages are kept; the next run goes on from there.")
        return 130
    except (EdgewardenError, RuntimeError, OSError) as error:
        sentence = error.sentence() if isinstance(error, EdgewardenError) else str(error)
        console.print(f"[red]The story stopped:[/] {sentence}")
        return 1
    (out / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    return finish(console, out, report)


def tell(console: Console, out: Path, options: argparse.Namespace, started: float) -> dict[str, Any]:
    """Everything, in order; returns the report. Processes are ended when the last line is told."""
    heading(console, "a", "compress: teacher, students, int8; gates; one choice per device class")
    compress(out, options.new_wearers)
    compressed_s = clock.monotonic_s() - started
    report: dict[str, Any] = compression_report(out)
    with contextlib.ExitStack() as stack:
        context, fleet = stage(console, out, options.new_wearers, stack)
        play(context, fleet)
        report |= context.report | device_report(context)
        if options.stay:
            stay(console, fleet.host.page)
    # the agents said goodbye: count again what the subscriber has
    report["outage"]["lost"] = max(report["outage"]["lost"], context.world.subscriber.missing("wrist-1"))
    picture(out, context)
    total_s = clock.monotonic_s() - started
    setup_s = float(os.environ.get("EW_SETUP_SECONDS", "0"))
    report["seconds"] = {
        "setup": setup_s,
        "compress": round(compressed_s, 1),
        "story": round(total_s - compressed_s, 1),
        "total": round(total_s + setup_s, 1),
    }
    report["machine"] = {
        "cpu": platform.machine(),
        "python": platform.python_version(),
        "load": list(os.getloadavg()),
    }
    context.timeline.show(console)
    console.print(f"accuracy  {sparkline(moving_accuracy(context.player.replies))}", style="cyan")
    return report


def play(context: Any, fleet: Any) -> None:
    """Chapters (b) to (k)."""
    from scripts.story import chapters, loop  # numpy, data: not before the compressor had the machine for itself

    quick, slower = f"{chapters.QUIET_FACTOR:.0f} times life speed", f"{chapters.FAULT_FACTOR:.0f} times life speed"
    people = ", ".join(str(wearer.number) for wearer in fleet.wearers)
    for letter, title, chapter, subject in (
        ("b", f"quiet: held-out recordings of enrolled wearers, at {quick}", chapters.quiet, context),
        ("c", f"a sensor dies and heals, at {slower}", chapters.sensor_dies, context),
        ("d", "an engine fails", chapters.engine_fails, context),
        ("e", "the worker is killed under load", chapters.worker_killed, context),
        ("f", "the broker goes away", chapters.broker_away, context),
        ("g, h", f"new wearers {people} arrive: evidence, regeneration, signed update", loop.recover, fleet),
        ("i", "before and after", loop.judge, fleet),
        ("j, k", "a broken and a forged version 3", loop.refuse, fleet),
    ):  # fmt: skip
        heading(context.console, letter, title)
        chapter(subject)
        say(context.console, context.timeline)


def stay(console: Console, page: str) -> None:
    console.print(f"\nEverything keeps running. The fleet's page: {page}   Ctrl-C ends it all.")
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()


def compress(out: Path, new_wearers: tuple[int, ...], *, recipe: Path = RECIPE) -> None:
    command = [
        sys.executable, "-m", "compressor", "compress", str(recipe), "--out", str(out / "artifacts"),
        "--set", f"new_wearers={','.join(map(str, new_wearers))}", "--cache", str(out / "cache"),
    ]  # fmt: skip
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise RuntimeError(f"the compressor ended with exit code {done.returncode}; its last lines say why")


def compression_report(out: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((out / "artifacts/report.json").read_text())
    chosen = next(item for item in document["device_classes"] if item["name"] == DEVICE_CLASS)
    return {
        "teacher": document["teacher"],
        "device_class": DEVICE_CLASS,
        "variants": [{key: variant[key] for key in VARIANT_KEYS} for variant in chosen["variants"]],
    }


def stage(
    console: Console, out: Path, new_wearers: tuple[int, ...], stack: contextlib.ExitStack, *, recipe: Path = RECIPE,
    probation_s: float = PROBATION_S,
) -> tuple[Any, Any]:  # fmt: skip
    """Start the first device's processes; returns what the chapters are told about. `stack` ends it all."""
    from agent.drift import load_reference
    from agent.engine import OnnxEngine
    from compressor.examples.faulty import build_faulty
    from compressor.examples.wrist.task import TASK
    from compressor.task import Role
    from scripts.story.chapters import Context
    from scripts.story.fleet import wearer_device
    from scripts.story.loop import gather
    from scripts.story.player import Player
    from scripts.story.world import SERVICE, World

    data = TASK.load({"new_wearers": list(new_wearers)})
    artifacts = out / "artifacts" / DEVICE_CLASS
    active = open_artifact(artifacts / SERVICE)
    faulty = build_faulty(active.folder, out / "faulty")
    world = World(out, artifacts, faulty, wearers=tuple(map(wearer_device, new_wearers)))
    stack.callback(world.close)
    world.start()
    hop_s = TASK.window.hop / TASK.window.rate_hz
    context = Context(
        world=world,
        player=Player(f"unix:{world.serve_socket}", SERVICE, hop_s, console),
        task=TASK,
        stream=data.role(Role.STREAM),
        timeline=Timeline(),
        console=console,
        engine=OnnxEngine.load(active.path("model")),
        claim=load_reference(active.path("reference")).claim,
    )
    fleet = gather(context, data, out, artifacts, new_wearers, recipe, probation_s=probation_s)
    stack.callback(fleet.close)
    return context, fleet


def device_report(context: Any) -> dict[str, Any]:
    """What the agent itself says at the end."""
    status = context.world.status()
    service = next(item for item in status["services"] if item["name"] == "wrist")
    return {
        "serving": {"requests": service["requests"], "errors": service["errors"]},
        "latency": {"p50_us": service["latency_p50_us"], "p95_us": service["latency_p95_us"]},
        "power": {
            "source": status["power"]["source"],
            "measured": status["power"]["measured"],
            "joules_per_inference": status["power"]["joules_per_inference"],
        },
    }


def picture(out: Path, context: Any) -> None:
    marks = [(entry.time_s, entry.text.split(":")[0]) for entry in context.timeline.entries if entry.mark in "✗✓"]
    draw(context.player.replies, context.counterfactual, out / "story.png", marks=marks)


def heading(console: Console, letter: str, title: str) -> None:
    console.print(f"\n[bold]({letter}) {title}[/]")


def say(console: Console, timeline: Timeline) -> None:
    """Print what the last chapter added."""
    for entry in sorted(timeline.entries[timeline.told :], key=lambda entry: entry.time_s):
        console.print(f"   {clock_text(entry.time_s)} {entry.mark} {entry.text}", style=entry.style)
    timeline.told = len(timeline.entries)


def finish(console: Console, out: Path, report: dict[str, Any]) -> int:
    """Print what to do next; the exit code says whether every promise of the story held."""
    from scripts.story.world import PROMISED_LOOP_S

    fallback, quiet, kill = report["fallback"], report["null_stream"], report["kill"]
    loop_s, typed = report["loop"]["seconds"], report["hands"]
    promises = {
        "teacher at least 0.9 on enrolled wearers' held-out recordings": report["teacher"]["accuracy"] >= 0.9,
        "no alarm beyond the declared budget on the quiet stream": quiet["alarms"] <= (quiet["declared_budget"] or 0),
        "no request failed": report["serving"]["errors"] == 0,
        "the dead gyro was named": fallback["named_channel"] in ("gx", "gy", "gz"),
        "the switch gained at least 0.1 accuracy": fallback["accuracy_with"] >= fallback["accuracy_without"] + 0.1,
        "the preferred model returned": fallback["returned"],
        "the failing engine's requests were answered": report["failover"]["answered"]
        == report["failover"]["requests"],
        "no client failed when the worker was killed": kill["failed_requests"] == 0 < kill["requests"],
        "no message was lost": report["outage"]["lost"] == 0,
        f"the loop closed in {loop_s:.0f} s from the first report, {PROMISED_LOOP_S:.0f} are allowed": loop_s
        <= PROMISED_LOOP_S,
        f"a person's steps from the first report to the comparison: {typed}, 0 are allowed": typed == 0,
        "no request failed during the update": report["update"]["failed_requests"] == 0,
        "the update helps new wearers": report["recovery"]["new_after"] > report["recovery"]["new_before"],
        "the broken and the forged version were refused": [item["code"] for item in report["refused"]]
        == ["golden_mismatch", "untrusted"],
    }
    console.print()
    for promise, kept in promises.items():
        console.print(f"   {'[green]✓[/]' if kept else '[red]✗[/]'} {promise}")
    seconds = report["seconds"]
    console.print(
        f"\nDone in {seconds['total']:.0f} s: set-up {seconds['setup']:.0f}, compress {seconds['compress']:.0f}, "
        f"story {seconds['story']:.0f}."
        f"\nRead next:  {shown(out)}/report.json   {shown(out)}/story.png   {shown(out)}/artifacts/report.html"
        "\nType next:  . .venv/bin/activate"
        f"\n            edgewarden-compressor artifact show {shown(out)}/artifacts/gateway/wrist"
        f"\n            edgewarden-agent run --config {shown(out)}/device.toml      (and in another shell: status)"
        "\n            edgewarden-compressor compress compressor/examples/wrist/recipe.toml --out build/wrist"
    )
    return 0 if all(promises.values()) else 1


def shown(path: Path) -> str:
    """The path as a person in the current folder would write it."""
    return os.path.relpath(path, CALLER)


if __name__ == "__main__":
    sys.exit(main())
