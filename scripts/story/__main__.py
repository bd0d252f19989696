"""The quickstart: `scripts/quickstart` sets up and runs `python -m scripts.story`.

Everything it writes lies in one folder (default build/quickstart): report.json, story.png, the artifacts with
their own report.html, the agent's configuration and log.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from agent import VERSION, clock
from agent.contract.artifact import open_artifact
from agent.contract.errors import EdgewardenError
from scripts.story.timeline import Timeline, clock_text, draw, moving_accuracy, sparkline

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "compressor/examples/wrist/recipe.quick.toml"
DEVICE_CLASS = "gateway"
VARIANT_KEYS = ("name", "accuracy", "latency_p50_us", "latency_cpu_p20_us", "size_bytes", "chosen", "reason")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/quickstart",
        description="Compress a model, serve it, break a sensor, fall back, recover: real data, real processes.",
        epilog="Exit codes: 0 the story held; 1 something in it did not, the last lines say what; 2 usage or set-up.",
    )
    parser.add_argument("--new-wearers", default="1,2,3", help="three wearers the model never sees (default: 1,2,3)")
    parser.add_argument("--out", type=Path, default=ROOT / "build/quickstart", help="where everything is written")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    console = Console(highlight=False)
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").unlink(missing_ok=True)
    started = clock.monotonic_s()
    console.print(f"[bold]Edgewarden {VERSION}[/]: the story so far, in about five minutes, written to {shown(out)}")
    try:
        report = tell(console, out, options.new_wearers, started)
    except (EdgewardenError, RuntimeError, OSError) as error:
        sentence = error.sentence() if isinstance(error, EdgewardenError) else str(error)
        console.print(f"[red]The story stopped:[/] {sentence}")
        return 1
    (out / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    return finish(console, out, report)


def tell(console: Console, out: Path, new_wearers: str, started: float) -> dict[str, Any]:
    heading(console, "a", "compress: teacher, students, int8; gates; one choice per device class")
    compress(out, new_wearers)
    compressed_s = clock.monotonic_s() - started
    from scripts.story import chapters  # numpy, task and data: after the compressor had the machine for itself

    report: dict[str, Any] = compression_report(out)
    context, close = stage(console, out, new_wearers)
    try:
        quick, slower = (
            f"{chapters.QUIET_FACTOR:.0f} times life speed",
            f"{chapters.FAULT_FACTOR:.0f} times life speed",
        )
        for letter, title, chapter in (
            ("b", f"quiet: held-out recordings of enrolled wearers, at {quick}", chapters.quiet),
            ("c", f"a sensor dies and heals, at {slower}", chapters.sensor_dies),
            ("d", "an engine fails", chapters.engine_fails),
            ("e", "the worker is killed under load", chapters.worker_killed),
            ("f", "the broker goes away", chapters.broker_away),
        ):  # fmt: skip
            heading(console, letter, title)
            chapter(context)
            say(console, context.timeline)
        report |= context.report | device_report(context)
    finally:
        close()
    # the agent said goodbye: count again what the subscriber has
    report["outage"]["lost"] = context.world.subscriber.missing("wrist-1")
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


def compress(out: Path, new_wearers: str) -> None:
    command = [
        sys.executable, "-m", "compressor", "compress", str(RECIPE), "--out", str(out / "artifacts"),
        "--set", f"new_wearers={new_wearers}", "--cache", str(out / "cache"),
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


def stage(console: Console, out: Path, new_wearers: str) -> tuple[Any, Callable[[], None]]:
    """Start the processes; returns the chapters' context and what ends them."""
    from agent.drift import load_reference
    from agent.engine import OnnxEngine
    from compressor.examples.faulty import build_faulty
    from compressor.examples.wrist.task import TASK
    from compressor.task import Role
    from scripts.story.chapters import Context
    from scripts.story.player import Player
    from scripts.story.world import SERVICE, World

    data = TASK.load({"new_wearers": [int(number) for number in new_wearers.split(",")]})
    artifacts = out / "artifacts" / DEVICE_CLASS
    active = open_artifact(artifacts / SERVICE)
    faulty = build_faulty(active.folder, out / "faulty")
    world = World(out, artifacts, faulty)
    try:
        world.start()
    except BaseException:
        world.close()
        raise
    window = TASK.window
    player = Player(f"unix:{world.serve_socket}", SERVICE, window.hop / window.rate_hz, console)
    context = Context(
        world=world,
        player=player,
        task=TASK,
        stream=data.role(Role.STREAM),
        timeline=Timeline(),
        console=console,
        engine=OnnxEngine.load(active.path("model")),
        claim=load_reference(active.path("reference")).claim,
    )
    return context, world.close


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
    for entry in timeline.entries[timeline.told :]:
        console.print(f"   {clock_text(entry.time_s)} {entry.mark} {entry.text}", style=entry.style)
    timeline.told = len(timeline.entries)


def finish(console: Console, out: Path, report: dict[str, Any]) -> int:
    """Print what to do next; the exit code says whether every promise of the story held."""
    fallback, quiet = report["fallback"], report["null_stream"]
    promises = {
        "teacher at least 0.9 on enrolled wearers' held-out recordings": report["teacher"]["accuracy"] >= 0.9,
        "no alarm beyond the declared budget on the quiet stream": quiet["alarms"] <= quiet["declared_budget"],
        "no request failed": report["serving"]["errors"] == 0,
        "the switch gained at least 0.1 accuracy": fallback["accuracy_with"] >= fallback["accuracy_without"] + 0.1,
        "the preferred model returned": fallback["returned"],
        "the failing engine's requests were answered": report["failover"]["answered"]
        == report["failover"]["requests"],
        "no client failed when the worker was killed": report["kill"]["failed_requests"] == 0,
        "no message was lost": report["outage"]["lost"] == 0,
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
        f"\n            edgewarden-agent check-config --config {shown(out)}/agent.toml"
        "\n            edgewarden-compressor compress compressor/examples/wrist/recipe.toml --out build/wrist"
    )
    return 0 if all(promises.values()) else 1


def shown(path: Path) -> str:
    """The path as a person in the current folder would write it."""
    return os.path.relpath(path)


if __name__ == "__main__":
    sys.exit(main())
