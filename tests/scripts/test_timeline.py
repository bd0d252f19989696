"""The story's picture and sparks say what the replies say."""

from __future__ import annotations

import numpy as np
from rich.console import Console

from scripts.story.subscriber import Seen, Subscriber
from scripts.story.timeline import Reply, Timeline, clock_text, draw, moving_accuracy, sparkline


def replies(pattern):
    return [
        Reply(float(i), 1, right, "wrist" if i < 3 else "wrist-accel", "", 0.1) for i, right in enumerate(pattern)
    ]


def test_accuracy_is_the_share_of_right_answers_over_the_last_window():
    assert moving_accuracy(replies([1, 0, 1, 1])).tolist() == [1.0, 0.5, 2 / 3, 0.75]


def test_a_long_run_of_errors_fills_the_whole_window():
    assert moving_accuracy(replies([1] * 30 + [0] * 24))[-1] == 0.0


def test_sparks_rise_with_the_values():
    assert sparkline(np.array([0.0, 0.5, 1.0]), 3) == "▁▅█"
    assert sparkline(np.array([])) == ""


def test_clock_shows_hours_minutes_seconds():
    assert clock_text(3725.9) == "1:02:05"


def test_the_picture_is_written(tmp_path):
    draw(replies([1, 1, 0, 1, 1]), replies([0, 0]), tmp_path / "story.png", marks=[(2.0, "gyro dies")])
    assert (tmp_path / "story.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_is_in_order_of_time():
    timeline = Timeline()
    timeline.add(9.0, "●", "second")
    timeline.add(1.0, "●", "first")
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    with console.file:
        timeline.show(console)
        text = console.export_text()
    assert text.index("first") < text.index("second")


def test_the_subscriber_counts_missing_numbers_per_boot_and_repeats_once():
    subscriber = Subscriber(0, "", "", "")
    for boot, seq in (("a", 1), ("a", 2), ("a", 2), ("a", 4), ("b", 3)):
        at = {"a": 1.0, "b": 2.0}[boot]
        subscriber.seen.append(Seen("x/tm", {"device": "d", "boot": boot, "seq": seq, "at": at}, retained=False))
    subscriber.seen.append(Seen("x/status", {"device": "d", "boot": "a"}, retained=True))
    assert subscriber.missing("d") == 1 + 2  # a: 3;  b: 1 and 2
    assert subscriber.missing("d", sent=5) == 1 + 4  # b: 1, 2, 4 and 5
    assert subscriber.missing("other") == 0
