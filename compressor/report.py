"""The run's pages: report.json for programs, report.html for people, measurements.json beside the artifacts.

The page is self-contained: one file, plot as inline SVG, nothing fetched.
"""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from agent.contract.artifact import MANIFEST, sha256_file
from compressor.candidate import Candidate, Gate, Verdict
from compressor.enrolment import Halves
from compressor.files import write_file
from compressor.measure import load_average
from compressor.pipeline import Result
from compressor.regenerate import KEPT, SWAPPED, new_accuracy
from compressor.select import RANK, figure
from compressor.shipping import Shipped
from compressor.task import Role

FORMAT = 1
TEMPLATE = "report.html.jinja"
COLOURS = {"teacher": "#7a7f87", "student": "#1f6feb", "fallback": "#b35900"}


def write_reports(result: Result, out: Path) -> dict[str, Any]:
    """Write the three files below `out` and return the content of report.json.

    Raises:
        DiskFull, StorageError
    """
    document = report_document(result, out)
    write_file(out / "report.json", _pretty(document))
    write_file(out / "measurements.json", _pretty(measurements_document(result)))
    write_file(out / "report.html", render_html(document, pareto_svg(result)).encode())
    return document


def report_document(result: Result, out: Path) -> dict[str, Any]:
    """Everything about the run; accuracies name the role they were taken on."""
    teacher = result.teacher
    return {
        "format": FORMAT,
        "recipe": result.recipe.name,
        "recipe_sha256": result.origin.recipe_sha256,
        "data_sha256": result.origin.data_sha256,
        "settings": dict(result.recipe.data),
        "task": result.task.name,
        "labels": list(result.task.labels),
        "rows": {role.value: len(rows) for role, rows in result.data.rows.items()},
        "roles": {
            "accuracy": Role.STREAM.value,
            "accuracy_select": Role.SELECT.value,
            "accuracy_varied": "select, mean over clean and harmless variations",
        },
        "teacher": {
            "name": teacher.name,
            "role": Role.STREAM.value,
            "accuracy": round(teacher.accuracy[Role.STREAM], 4),
        },
        "candidates": [_candidate(candidate, result) for candidate in result.candidates],
        "pareto_front": list(result.front),
        "harmful_drop": result.recipe.faults.harmful_drop,
        "device_classes": [_shipped(ship, result, out / ship.device.name) for ship in result.shipped],
        "machine": result.timings.machine,
        "load_average": load_average(),
        "latency_replayed": result.timings.replayed,
        "seconds": result.seconds,
        "regeneration": _regeneration(result),
    }


def _regeneration(result: Result) -> dict[str, Any] | None:
    """The first run's choice against this one's, old rows and newcomers'; None for a first run."""
    told = result.regeneration
    if told is None:
        return None
    devices = []
    for ship in result.shipped:
        first = told.before[ship.device.name]
        pairs = [(ship.active_name, first.active, ship.active)]
        pairs += [(name, first.fallbacks[name], one) for name, one in ship.fallbacks.items()]
        engines = [
            {"name": name, "kept": one.name.endswith(KEPT), "before": _standing(old, told.halves),
             "after": _standing(one, told.halves)}
            for name, old, one in pairs
        ]  # fmt: skip
        devices.append({"name": ship.device.name, "engines": engines})
    enrolment, rules = told.enrolment, result.recipe.regenerate
    return {
        "enrolment_sha256": enrolment.sha256,
        "sources": [asdict(source) for source in enrolment.sources],
        "left_out": list(enrolment.left_out),
        "rules": rules.model_dump(),
        "roles": {
            "stream": "known sources, held out", "select": "known sources: the gate of forgetting",
            "enrol_reference": "second halves of newcomers' recordings; the model was trained on the first",
            "enrol_swapped": "first halves; a training with the halves exchanged answers for the model",
            "new": "both together, by rows: the gate of newcomers",
        },
        "device_classes": devices,
    }  # fmt: skip


def _standing(candidate: Candidate, halves: Halves) -> dict[str, Any]:
    roles = (Role.STREAM, Role.SELECT, Role.ENROL_REFERENCE, SWAPPED)
    accuracies = {str(role): round(candidate.accuracy[role], 4) for role in roles}
    return {"variant": candidate.name, "new": round(new_accuracy(candidate, halves), 4), **accuracies}


def measurements_document(result: Result) -> dict[str, Any]:
    """Times only, with what they belong to; unsigned."""
    return {
        "format": FORMAT,
        "machine": result.timings.machine,
        "load_average": load_average(),
        "replayed": result.timings.replayed,
        "method": {
            "threads": 1, "batch": 1, "interleaved": True, **result.recipe.measure.model_dump(),
            "cpu_p20_us": "20th percentile over rounds of thread CPU time per run",
        },
        "models": {
            candidate.name: {"sha256": candidate.variant.sha256, **asdict(candidate.latency)}
            for candidate in result.candidates
        },
    }  # fmt: skip


def _candidate(candidate: Candidate, result: Result) -> dict[str, Any]:
    variant = candidate.variant
    return {
        "name": candidate.name,
        "model": variant.model.name,
        "role": variant.model.role,
        "family": variant.model.family,
        "precision": variant.precision,
        "reads": list(variant.model.channels) or [channel.name for channel in result.task.channels],
        "parameters": variant.parameters,
        "size_bytes": variant.size_bytes,
        "sha256": variant.sha256,
        "accuracy": round(candidate.accuracy[Role.STREAM], 4),
        "accuracy_select": round(candidate.accuracy[Role.SELECT], 4),
        "accuracy_varied": round(candidate.accuracy[RANK], 4),
        "agreement_with_teacher": round(candidate.agreement, 4),
        "latency_cpu_p20_us": candidate.latency.cpu_p20_us,
        "latency_p50_us": candidate.latency.wall_p50_us,
        "latency_p95_us": candidate.latency.wall_p95_us,
        "latency_view_us": candidate.latency.view_us,
        "gates": [_gate(gate) for gate in candidate.gates],
    }


def _gate(gate: Gate) -> dict[str, Any]:
    return {**asdict(gate), "passed": gate.passed}


def _shipped(ship: Shipped, result: Result, folder: Path) -> dict[str, Any]:
    by_name = {candidate.name: candidate for candidate in (*result.candidates, *ship.fallbacks.values())}
    return {
        "name": ship.device.name,
        "budget": {key: value for key, value in ship.device.model_dump().items() if key != "name"},
        "chosen": ship.active.name,
        "variants": [_verdict(verdict, by_name[verdict.candidate]) for verdict in ship.verdicts],
        "fallback_variants": [_verdict(verdict, by_name[verdict.candidate]) for verdict in ship.fallback_verdicts],
        "accuracy": {"role": Role.STREAM.value, **{name: round(value, 4) for name, value in ship.accuracy.items()}},
        "accuracy_new": dict(ship.accuracy_new),
        "faults": [{**asdict(line), "channels": list(line.channels)} for line in ship.faults],
        "claim": ship.watch.claim,
        "detectability": list(ship.watch.detectability),
        "monitor": ship.watch.monitor,
        "artifacts": {
            name: {"folder": f"{ship.device.name}/{name}", "manifest_sha256": sha256_file(folder / name / MANIFEST)}
            for name in ship.accuracy
        },
    }


def _verdict(verdict: Verdict, candidate: Candidate) -> dict[str, Any]:
    return {
        "name": verdict.candidate,
        "accuracy": round(candidate.accuracy[Role.STREAM], 4),
        "latency_p50_us": candidate.latency.wall_p50_us,
        "latency_cpu_p20_us": candidate.latency.cpu_p20_us,
        "size_bytes": candidate.variant.size_bytes,
        "chosen": verdict.chosen,
        "reason": verdict.reason,
        "gates": [_gate(gate) for gate in verdict.gates],
    }


def pareto_svg(result: Result) -> str:
    """Accuracy against CPU time; area shows size; the front is joined, chosen candidates are ringed."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(
        {"svg.hashsalt": "edgewarden", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}
    ):
        figure = Figure(figsize=(8.4, 4.2), layout="constrained")
        axes = figure.subplots()
        chosen = {ship.active.name for ship in result.shipped} | {
            c.name for ship in result.shipped for c in ship.fallbacks.values()
        }
        for candidate in result.candidates:
            _plot(axes, candidate, ringed=candidate.name in chosen)
        front = sorted((c.latency.cpu_p20_us, c.accuracy[RANK]) for c in result.candidates if c.name in result.front)
        axes.plot(*zip(*front, strict=True), color="#1f6feb", alpha=0.35, linewidth=1.2, zorder=1)
        axes.set_xscale("log")
        axes.set_xticks(*_ticks(result))
        axes.minorticks_off()
        axes.set_xlabel("CPU time of one row, microseconds (one thread, 20th percentile)")
        axes.set_ylabel("accuracy over harmless variations")
        axes.margins(0.12)
        axes.spines[["top", "right"]].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _plot(axes: Any, candidate: Candidate, *, ringed: bool) -> None:
    place = (candidate.latency.cpu_p20_us, candidate.accuracy[RANK])
    area = 20 + (candidate.variant.size_bytes / 1000) ** 0.6 * 6
    colour = COLOURS[candidate.variant.model.role]
    axes.scatter(*place, s=area, color=colour, alpha=0.75, edgecolor="white", linewidth=0.8, zorder=3)
    if ringed:
        axes.scatter(*place, s=area + 130, facecolor="none", edgecolor="#1a7f37", linewidth=1.8, zorder=2)
    below = candidate.variant.precision == "float32"
    axes.annotate(
        candidate.name, place, xytext=(0, -17 if below else 11), textcoords="offset points", ha="center", fontsize=9
    )


def _ticks(result: Result) -> tuple[list[float], list[str]]:
    largest = max(candidate.latency.cpu_p20_us for candidate in result.candidates)
    smallest = min(candidate.latency.cpu_p20_us for candidate in result.candidates)
    scale = [a * 10**b for b in range(-1, 7) for a in (1, 2, 5)]
    ticks = [value for value in scale if smallest / 2 <= value <= largest * 2]
    return ticks, [f"{value:g}" for value in ticks]


def render_html(document: dict[str, Any], svg: str) -> str:
    """The page, from report.json's content alone."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = lambda value: f"{100 * value:.1f} %"
    environment.filters["shade"] = shade
    environment.filters["figure"] = figure
    template = environment.from_string(files("compressor").joinpath(TEMPLATE).read_text(encoding="utf-8"))
    return template.render(report=document, svg=svg)


def shade(accuracy: float) -> str:
    """Background of a table cell: red below a half, green towards one."""
    hue = max(0.0, min(1.0, (accuracy - 0.4) / 0.55)) * 130
    return f"hsl({hue:.0f} 65% 50% / 0.28)"


def _pretty(document: dict[str, Any]) -> bytes:
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"
