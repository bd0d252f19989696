"""`edgewarden-compressor`: what a person types on the host. The only file of the host that prints."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from agent import VERSION
from agent.contract.errors import EdgewardenError
from compressor import commands_fleet, commands_trust, commands_views
from compressor.errors import MissingExtra
from compressor.stopping import Stopped, stoppable

if TYPE_CHECKING:
    from compressor.pipeline import Orders
    from compressor.recipe import Recipe

EXIT_CODES = """\
exit codes:
  0  done
  2  the recipe, its task module, the configuration or the command line is wrong, or the extra is not installed
  3  a document is not what the contract says
  4  an artifact is damaged, cannot be used or is not trusted
  5  the broker cannot be reached
  6  a file cannot be written (disk full, no permission)
  7  another host holds the database
  9  the task's data is missing or not what it should be
 10  a stage of the pipeline failed
 11  a gate refused every candidate; nothing was shipped
129, 130, 143  stopped by SIGHUP, Ctrl-C, SIGTERM; finished stages are kept in the cache
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except EdgewardenError as error:
        return _told(error)
    except ModuleNotFoundError as error:
        if missing := MissingExtra.of(error):
            return _told(missing)
        raise
    except KeyboardInterrupt as stop:
        print("edgewarden-compressor: interrupted; finished stages are kept, run again to go on.", file=sys.stderr)
        return stop.exit_code if isinstance(stop, Stopped) else 130
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has gone; nothing is left to say it to
        return 0
    return code


def _told(error: EdgewardenError) -> int:
    print(f"edgewarden-compressor: {error.sentence()}", file=sys.stderr)
    return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edgewarden-compressor",
        description="From a model and data to the smallest artifact that keeps its promises.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"edgewarden {VERSION}")
    verbs = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    compress = verbs.add_parser(
        "compress", help="train, compress, validate, choose and package", epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    compress.add_argument("recipe", type=Path, help="a recipe, such as compressor/examples/wrist/recipe.toml")
    compress.add_argument("--out", type=Path, required=True, metavar="DIR", help="where artifacts and reports go")
    compress.add_argument(
        "--cache", type=Path, default=Path("build/cache"), metavar="DIR", help="finished stages (default %(default)s)"
    )
    compress.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="override a recipe value; a key without a dot is a task setting, as in --set new_wearers=4,5,6",
    )  # fmt: skip
    compress.add_argument(
        "--replay",
        type=Path,
        metavar="FILE",
        help="measurements.json of an earlier run: choose by it, measure nothing",
    )
    compress.add_argument(
        "--enrolment", type=Path, metavar="DIR",
        help="folder of newcomers' recordings, <device>.npz: teach the recipe's models what is in them",
    )  # fmt: skip
    compress.add_argument(
        "--parent", action="append", default=[], metavar="ARTIFACT",
        help="what this run succeeds: an artifact folder or NAME=DIGEST; may be repeated",
    )  # fmt: skip
    compress.add_argument(
        "--device-class", default="", metavar="NAME", help="build for this device class only (default: for all)"
    )
    compress.add_argument("--json", action="store_true", help="print report.json instead of tables")
    compress.add_argument(
        "--explain", action="store_true", help="say what each step does, how each gate went, and why"
    )
    compress.set_defaults(run=_compress)
    artifact = verbs.add_parser("artifact", help="look at an artifact folder")
    actions = artifact.add_subparsers(required=True, metavar="ACTION")
    for name, run, text in (
        ("show", _show, "what it is, what it promises, how it fares under faults"),
        ("verify", _verify, "check every byte, load it, answer its golden inputs"),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument("folder", type=Path)
        action.add_argument("--json", action="store_true")
        action.set_defaults(run=run)
    commands_trust.register(verbs)
    commands_fleet.register(verbs)
    commands_views.register(verbs)
    return parser


# --- compress ----------------------------------------------------------------------------------------------
def _compress(options: argparse.Namespace) -> int:
    with stoppable():
        return _compress_all(options)


def _compress_all(options: argparse.Namespace) -> int:
    from compressor.files import try_folder
    from compressor.recipe import open_task, read_recipe

    recipe = read_recipe(options.recipe, overrides=options.overrides)
    open_task(recipe, options.recipe)  # before the heavy imports: a wrong recipe is told at once
    names = [device.name for device in recipe.device_class if options.device_class in {"", device.name}]
    for folder in (options.cache, options.out, *(options.out / name for name in names)):
        try_folder(folder)
    parents = dict(_parent(text) for text in options.parent)
    from compressor.pipeline import Orders, compress
    from compressor.report import write_reports

    orders = Orders(options.replay, options.enrolment, parents, options.device_class)
    if options.explain:
        _explain(recipe, orders)

    with _Progress(recipe, orders) as progress:
        result = compress(
            recipe, options.recipe, options.out, cache=options.cache, report=progress.report, orders=orders
        )
        document = write_reports(result, options.out)
    if options.json:
        print(json.dumps(document, indent=1, ensure_ascii=False))
    else:
        _tables(document, options.out, explain=options.explain)
    return 0


def _parent(text: str) -> tuple[str, str]:
    """(name, manifest digest) of an artifact folder or of NAME=DIGEST."""
    from agent.contract.artifact import open_artifact
    from agent.contract.errors import ConfigError

    name, separator, digest = text.partition("=")
    if not separator:
        artifact = open_artifact(Path(text))
        return artifact.manifest.name, artifact.digest
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ConfigError(f"'{text}' names no parent", hint="Write it as NAME=DIGEST, or name an artifact folder.")
    return name, digest


class _Progress:
    """A bar with the time left, on stderr; plain lines of progress where that is no terminal."""

    def __init__(self, recipe: Recipe, orders: Orders) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        from compressor.pipeline import total_work

        self.console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("[bold]{task.fields[subject]:<12}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.description}"),
            console=self.console, transient=True, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task("starting", total=total_work(recipe, orders), subject=recipe.name)

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self.bar.stop()

    def report(self, subject: str, step: str, done: float) -> None:
        self.bar.update(self.task, advance=done, description=step, subject=subject)
        if not self.console.is_terminal and not step.startswith("epoch"):
            self.console.print(f"{subject}: {step}", highlight=False)


def _explain(recipe: Recipe, orders: Orders) -> None:
    from rich.console import Console
    from rich.table import Table

    from compressor.pipeline import plan

    table = Table(title=f"What will happen to '{recipe.name}'", title_justify="left", box=None)
    table.add_column("step", style="bold")
    table.add_column("")
    for step, text in plan(recipe, orders):
        table.add_row(step, text)
    Console(stderr=True).print(table)


def _tables(document: dict[str, Any], out: Path, *, explain: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title="Candidates (accuracy: held-out stream)", title_justify="left", box=None)
    for name in ("name", "accuracy", "varied", "bytes", "CPU us", "wall us"):
        table.add_column(name, justify="left" if name == "name" else "right", no_wrap=True)
    table.add_column("ships to")
    for candidate in document["candidates"]:
        name = candidate["name"]
        ships = [
            device["name"] for device, verdict in _verdicts(document) if verdict["chosen"] and verdict["name"] == name
        ]
        table.add_row(
            name, f"{candidate['accuracy']:.3f}", f"{candidate['accuracy_varied']:.3f}",
            f"{candidate['size_bytes']:,}", f"{candidate['latency_cpu_p20_us']:.0f}",
            f"{candidate['latency_p50_us']:.0f}", ", ".join(ships), style="bold" if ships else "",
        )  # fmt: skip
    console.print(table)
    for device, verdict in _verdicts(document):
        if verdict["chosen"] or explain:
            mark = "ships" if verdict["chosen"] else "no"
            print(f"{device['name']}: {verdict['name']} {mark}: {verdict['reason']}.")
    for line in _regeneration_lines(document.get("regeneration")):
        print(line)
    if explain:
        for device in document["device_classes"]:
            console.print(_gate_table(device))
    print(f"Report: {out / 'report.html'}")


def _regeneration_lines(told: dict[str, Any] | None) -> list[str]:
    """First and second run side by side."""
    if told is None:
        return []
    return [f"left out: {sentence}" for sentence in told["left_out"]] + [
        f"{device['name']}: {engine['name']} {'kept' if engine['kept'] else 'taught'}: newcomers "
        f"{engine['before']['new']:.3f} -> {engine['after']['new']:.3f}, known sources "
        f"{engine['before']['stream']:.3f} -> {engine['after']['stream']:.3f}."
        for device in told["device_classes"]
        for engine in device["engines"]
    ]


def _verdicts(document: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    classes = document["device_classes"]
    return [(device, v) for device in classes for v in device["variants"] + device["fallback_variants"]]


def _gate_table(device: dict[str, Any]) -> Any:
    """One row per candidate, one column per gate; what fails stands in brackets with its limit."""
    from rich.table import Table

    from compressor.select import figure

    verdicts = device["variants"] + device["fallback_variants"]
    table = Table(title=f"Gates of '{device['name']}'", title_justify="left", box=None)
    table.add_column("candidate", no_wrap=True)
    for gate in verdicts[0]["gates"]:
        table.add_column(gate["name"], justify="right")
    for verdict in verdicts:
        cells = [
            figure(gate["measured"])
            if gate["passed"]
            else f"FAIL {figure(gate['measured'])} / {figure(gate['limit'])}"
            for gate in verdict["gates"]
        ]
        table.add_row(verdict["name"], *cells)
    return table


# --- artifact ----------------------------------------------------------------------------------------------
def _show(options: argparse.Namespace) -> int:
    from agent.contract.artifact import open_artifact

    artifact = open_artifact(options.folder)
    manifest, card = artifact.manifest, artifact.card()
    if options.json:
        document = {"digest": artifact.digest, "manifest": manifest.model_dump(mode="json"), "card": card}
        print(json.dumps(document, indent=1, ensure_ascii=False))
        return 0
    lines = [
        f"{manifest.name} version {manifest.version}, serves '{manifest.service}' ({manifest.runtime.precision})",
        f"digest     {artifact.digest}",
        f"reads      {', '.join(manifest.reads) or 'all channels'}",
        f"fallbacks  {', '.join(manifest.fallbacks) or 'none'}",
    ]
    lines += [f"blob       {blob.file} {blob.size:,} bytes {blob.sha256[:16]}" for blob in manifest.blobs.values()]
    lines += [_budget_line(budget) for budget in manifest.budgets]
    if manifest.choice:
        lines.append(f"choice     {manifest.choice.variant}: {manifest.choice.reason}")
    print("\n".join(lines + _card_lines(card)))
    return 0


def _budget_line(budget: Any) -> str:
    promised = f"p95 {budget.latency_p95_us:g} us" if budget.latency_p95_us is not None else "no latency promised"
    return f"budget     {budget.device_class}: {promised}, at most {budget.size_bytes or 0:,} bytes"


def _card_lines(card: dict[str, Any]) -> list[str]:
    if not card:
        return ["card       none"]
    clean = card.get("accuracy", {})
    accuracy = {name: value for name, value in clean.items() if name not in {"role", "rows"}}
    names = list(accuracy)
    lines = ["", f"{'accuracy on ' + str(clean.get('role', '')):<24}" + "".join(f"{name:>14}" for name in names)]
    lines.append(f"{'no fault':<24}" + "".join(f"{accuracy[name]:>14.3f}" for name in names))
    for fault in card.get("faults", ()):
        mark = " harmful" if fault.get("harmful") else ""
        under = fault.get("accuracy", {})
        lines.append(
            f"{fault.get('name', ''):<24}" + "".join(f"{under.get(n, float('nan')):>14.3f}" for n in names) + mark
        )
    if new := card.get("accuracy_new"):
        lines.append(f"{'on ' + new['role']:<24}" + "".join(f"{new.get(n, float('nan')):>14.3f}" for n in names))
    if card.get("claim"):
        lines += ["", f"claim      {card['claim']['text']}"]
    return lines + _monitor_lines(card.get("monitor") or {})


def _monitor_lines(monitor: dict[str, Any]) -> list[str]:
    """Which drift monitor, why, and what it finds."""
    if not monitor:
        return []
    lines = [f"monitor    {monitor['kind']}", *(f"           {text}" for text in monitor["because"])]
    lines += [f"watched    {name} only: {why}" for name, why in monitor["watched"].items()]
    lines += [f"tolerates  {name}: {sd:.2g} sd" for name, sd in monitor["tolerance_sd"].items()]
    for fault in monitor.get("battery", ()):
        median = fault["median_delay_rows"]
        delay = "mostly never" if median is None else f"after {median:.0f} rows (median)"
        lines.append(
            f"finds      {fault['fault']:<42}{fault['found_share']:>5.0%} within {fault['within_rows']}, {delay}"
        )
    return [*lines, *([f"promises   {monitor['promise']}"] if "promise" in monitor else [])]


def _verify(options: argparse.Namespace) -> int:
    from compressor.verify import verify_artifact

    told = verify_artifact(options.folder)
    if options.json:
        print(json.dumps(told, indent=1))
    else:
        print(f"{told['name']} {told['digest'][:16]}: " + "; ".join(told["checks"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
