"""What happened when, for reading: rows on the terminal, a line of sparks, and one picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from rich.console import Console
from rich.table import Table

SPARKS = "▁▂▃▄▅▆▇█"
SMOOTH = 24  # windows in the moving accuracy: half a minute of data
COLOURS = {
    "wrist": "#2a7f62", "wrist-accel": "#d98b1f", "wrist-gyro": "#3a6ea5", "wrist-norm": "#7b5aa6",
    "wrist-faulty": "#b3402f", "wrist-floor": "#777777",
}  # fmt: skip


@dataclass(frozen=True)
class Reply:
    """One answered window."""

    time_s: float
    label: int
    predicted: int
    served_by: str
    reason: str
    latency_ms: float


@dataclass(frozen=True)
class Entry:
    time_s: float
    mark: str
    text: str
    style: str = ""


@dataclass
class Timeline:
    """Entries in data time (seconds since the first window)."""

    entries: list[Entry] = field(default_factory=list)
    told: int = 0  # entries already printed when their chapter ended

    def add(self, time_s: float, mark: str, text: str, style: str = "") -> None:
        self.entries.append(Entry(time_s, mark, text, style))

    def show(self, console: Console) -> None:
        table = Table(title="What happened", title_justify="left", show_header=True, box=None, padding=(0, 1))
        table.add_column("data time", justify="right", style="dim", no_wrap=True)
        table.add_column("")
        table.add_column("event", overflow="fold")
        for entry in sorted(self.entries, key=lambda entry: entry.time_s):
            table.add_row(
                clock_text(entry.time_s), entry.mark, f"[{entry.style}]{entry.text}[/]" if entry.style else entry.text
            )
        console.print(table)


def clock_text(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def moving_accuracy(replies: list[Reply]) -> np.ndarray:
    """Share of right answers over the last SMOOTH replies, one number per reply."""
    right = np.array([reply.predicted == reply.label for reply in replies], float)
    sums = np.cumsum(np.concatenate([[0.0], right]))
    ends = np.arange(1, len(right) + 1)
    starts = np.maximum(ends - SMOOTH, 0)
    return np.asarray((sums[ends] - sums[starts]) / (ends - starts))


def sparkline(values: np.ndarray, width: int = 72) -> str:
    """Mean of `values` (0..1) in `width` columns as block characters."""
    if not len(values):
        return ""
    parts = np.array_split(values, min(width, len(values)))
    return "".join(SPARKS[min(len(SPARKS) - 1, int(part.mean() * len(SPARKS)))] for part in parts)


def draw(replies: list[Reply], without: list[Reply], path: Path, *, marks: list[tuple[float, str]]) -> None:
    """Accuracy over data time with the serving model as a coloured band, as one PNG file.

    `without`: what the preferred engine would have answered while the fault lasted. The upper picture shows the time
    around the fault, the lower one everything.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (near, whole) = plt.subplots(2, 1, figsize=(10, 6.2), constrained_layout=True, height_ratios=[3, 1])
    for axes in (near, whole):
        _bands(axes, replies)
        axes.plot(_minutes(replies), moving_accuracy(replies), color="#1b2a33", linewidth=1.4, label="as served")
        axes.set(ylim=(0, 1.05))
        axes.spines[["top", "right"]].set_visible(False)
    if without:
        near.plot(
            _minutes(without), moving_accuracy(without), color="#b3402f", linewidth=1.2, linestyle=":",
            label="without the switch",
        )  # fmt: skip
        start, end = without[0].time_s - 90, without[-1].time_s + 210
        near.set_xlim(start / 60, end / 60)
        marks = [(time_s, text) for time_s, text in marks if start <= time_s <= end]
    for time_s, text in marks:
        near.axvline(time_s / 60, color="#1b2a33", linewidth=0.9, linestyle="--")
        near.annotate(text, (time_s / 60, 0.03), rotation=90, fontsize=8, ha="right", va="bottom")
    near.set(ylabel=f"accuracy over {SMOOTH} windows", title="A sensor dies, another model answers, the sensor heals")
    near.legend(loc="lower right", fontsize=8, framealpha=0.9)
    whole.set(xlabel="minutes of data", ylabel="all of it")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _minutes(replies: list[Reply]) -> np.ndarray:
    return np.array([reply.time_s for reply in replies]) / 60


def _bands(axes: Axes, replies: list[Reply]) -> None:
    """One coloured band for every stretch answered by one engine; each engine once in the legend."""
    times, start, named = _minutes(replies), 0, set()
    for index in range(1, len(replies) + 1):
        if index < len(replies) and replies[index].served_by == replies[start].served_by:
            continue
        engine = replies[start].served_by
        axes.axvspan(
            times[start], times[index - 1] + 1e-3, color=COLOURS.get(engine, "#555555"), alpha=0.25, linewidth=0,
            label=None if engine in named else f"served by {engine}",
        )  # fmt: skip
        named.add(engine)
        start = index
