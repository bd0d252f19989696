"""Two pictures of a document: delays at one run length, and actual over claimed run lengths."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CASES = {
    "one_0.25": "one feature\n.25 sd", "one_0.5": "one feature\n.5 sd", "one_1": "one feature\n1 sd",
    "all_0.25": "all\n.25 sd", "sd_1.5": "one feature\nsd x1.5", "correlation": "correlation\nalone",
    "stuck": "stuck", "category": "category",
}  # fmt: skip
COLOURS = ("#1b6ca8", "#7fb2d9", "#b5541c", "#8a8a8a", "#4c9a5b", "#b59f3b", "#8d5a9c")
NEVER = 12_000


def draw(document: Mapping[str, Any], folder: Path, *, ending: str = "png") -> list[Path]:
    """What the document has the figures for; the files written."""
    import matplotlib as mpl

    mpl.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    details, written = document["details"], []
    if "claim" in details:
        written.append(_claims(details["claim"]["cells"], folder / f"claim.{ending}"))
    if "delay" in details:
        found = {"ours": details["delay"]["ours"]["tuned"]}
        found |= {
            name: line
            for name, line in details.get("peers", {}).get("lines", {}).items()
            if "delays" in line and not line.get("unreachable")
        }
        written.append(_delays(found, folder / f"delay.{ending}"))
    return written


def _claims(cells: Mapping[str, Any], path: Path) -> Path:
    from matplotlib import pyplot as plt

    shown = {name: line for name, line in cells.items() if line.get("ratio")}
    figure, axes = plt.subplots(figsize=(7, 0.3 * len(shown) + 1), layout="constrained")
    for place, line in enumerate(shown.values()):
        bound = line["ratio_text"].startswith(">")
        axes.plot([line["ratio_lower_95"], line["ratio"]], [place, place], color=COLOURS[0], linewidth=2)
        axes.plot(line["ratio"], place, marker=">" if bound else "o", color=COLOURS[0])
    axes.axvline(1.0, color="#b5541c", linewidth=1)
    axes.set(
        xscale="log", yticks=range(len(shown)), yticklabels=list(shown),
        xlabel="actual over claimed run length (bar: from the 95 % lower bound; arrow: no alarm, a bound only)",
    )  # fmt: skip
    axes.invert_yaxis()
    return _saved(figure, path)


def _delays(found: Mapping[str, Any], path: Path) -> Path:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    width = 0.8 / len(found)
    for number, (name, line) in enumerate(found.items()):
        places = [case + (number - (len(found) - 1) / 2) * width for case in range(len(CASES))]
        medians = [line["delays"].get(case, {}).get("median") for case in CASES]
        axes.bar(
            places, [NEVER if value is None else value for value in medians], width, label=name,
            color=COLOURS[number % len(COLOURS)],
            hatch=None,
        )  # fmt: skip
    axes.axhline(8_000, color="#888888", linewidth=0.8, linestyle=":")
    axes.text(len(CASES) - 0.5, 8_300, "never found", ha="right", va="bottom", fontsize=8, color="#666666")
    axes.set(
        yscale="log", ylim=(8, NEVER), xticks=range(len(CASES)), xticklabels=list(CASES.values()),
        ylabel="median rows to the alarm",
    )  # fmt: skip
    axes.set_title(f"Everybody at one false alarm in about {10_000:,} rows, 32 features", fontsize=10)
    axes.legend(fontsize=8, ncols=math.ceil(len(found) / 2), loc="upper left")
    return _saved(figure, path)


def _saved(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot as plt

    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
