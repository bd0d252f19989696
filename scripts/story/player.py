"""Plays recorded windows to the agent at a multiple of real time, and remembers every answer."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from agent import clock
from agent.client import Client
from compressor.task import Rows
from scripts.story.timeline import Reply


def order_of(rows: Rows, seed: int) -> np.ndarray:
    """Row numbers with whole recordings in a random order, windows of a recording in time order."""
    recordings = np.unique(rows.recordings)
    np.random.default_rng(seed).shuffle(recordings)
    return np.concatenate([np.flatnonzero(rows.recordings == recording) for recording in recordings])


@dataclass
class Player:
    """One client on one connection; its data clock moves on by one hop per window."""

    address: str
    service: str
    hop_s: float
    console: Console
    time_s: float = 0.0
    replies: list[Reply] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.client = Client(self.address, timeout_s=20, retry_once=True)

    def play(
        self, windows: np.ndarray, labels: np.ndarray, *, factor: float, title: str, service: str = ""
    ) -> list[Reply]:
        """Send `windows` (rows, length, channels) one by one, `factor` times faster than they were recorded.

        Raises: ServingError when a request fails (the story expects none to).
        """
        name = service or self.service
        replies = []
        bar = Progress(
            TextColumn("   {task.description}"), BarColumn(40), TextColumn("{task.completed}/{task.total} windows"),
            TimeRemainingColumn(), console=self.console, transient=True, disable=not self.console.is_terminal,
        )  # fmt: skip
        with bar:
            job = bar.add_task(title, total=len(windows))
            due = clock.monotonic_s()
            for window, label in zip(windows, labels, strict=True):
                due += self.hop_s / factor
                replies.append(self._ask(name, window, int(label)))
                bar.advance(job)
                clock.sleep(max(0.0, due - clock.monotonic_s()))
        if name == self.service:
            self.replies += replies
        return replies

    def _ask(self, service: str, window: np.ndarray, label: int) -> Reply:
        self.time_s += self.hop_s
        started = clock.monotonic_s()
        answer = self.client.infer(service, {"window": window[None]}, time_s=self.time_s)
        elapsed_ms = (clock.monotonic_s() - started) * 1e3
        predicted = int(answer.outputs["probability"][0].argmax())
        return Reply(self.time_s, label, predicted, answer.served_by, answer.reason, elapsed_ms)


def accuracy(replies: list[Reply]) -> float:
    return float(np.mean([reply.predicted == reply.label for reply in replies])) if replies else float("nan")
