"""The chapters of the story; each plays something real and returns what it saw for report.json."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from rich.console import Console

from agent import clock
from agent.client import Client
from agent.contract.errors import EdgewardenError
from agent.drift import Claim
from agent.engine import OnnxEngine
from compressor.task import Rows, Task
from scripts.story.player import Player, accuracy, order_of
from scripts.story.timeline import Reply, Timeline
from scripts.story.world import DEVICE, SERVICE, SHAKY, StoryError, World, wait_until

QUIET_FACTOR = 100.0  # recordings are played this many times faster than they were made
FAULT_FACTOR = 50.0
ORDERS = 5
CLEAN_LEAD = 60  # windows before the sensor breaks
BROKEN = 220  # windows with the broken sensor: 282 s of data, over the dwell of 120 s
HEALED = 160  # windows after it healed: dwell and the probation of 60 s end within


@dataclass
class Context:
    world: World
    player: Player
    task: Task
    stream: Rows  # held-out recordings of the enrolled wearers
    timeline: Timeline
    console: Console
    engine: OnnxEngine  # the active artifact, loaded here to know what it would have answered
    claim: Claim  # how many alarms the artifact's drift monitor allows itself
    report: dict[str, Any] = field(default_factory=dict)
    counterfactual: list[Reply] = field(default_factory=list)  # what the active engine would have answered

    def settle(self) -> None:
        """Wait until the agent has read every observation and the broker has every message."""
        wait_until(lambda: _settled(self.world.status()), "the agent has read all observations and sent all messages")


def _settled(status: dict[str, Any]) -> bool:
    return status["ring"]["behind"] == 0 and status["outbox"]["rows"] == 0


def _alarms(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kinds = ("drift", "sensor", "fallback")
    ours = [event for event in events if event["service"] == SERVICE and event["kind"] in kinds]
    return [event for event in ours if event["severity"] != "info"]


def quiet(context: Context) -> None:
    """(b) All enrolled wearers' held-out recordings, in several orders: nothing to report."""
    before = context.world.subscriber.position()
    replies = []
    for order in range(ORDERS):
        rows = order_of(context.stream, order)
        replies += context.player.play(
            context.stream.windows[rows], context.stream.labels[rows],
            factor=QUIET_FACTOR, title=f"order {order + 1} of {ORDERS}",
        )  # fmt: skip
    context.settle()
    alarms = _alarms(context.world.subscriber.events(before))
    context.report["null_stream"] = {
        "windows": len(context.stream),
        "orders": ORDERS,
        "rows": len(replies),
        "alarms": len(alarms),
        "alarm_texts": [alarm["text"] for alarm in alarms],
        "declared_budget": context.claim.declared_budget(len(replies)),
        "claim": context.claim.text,
        "accuracy": accuracy(replies),
        "compression_factor": QUIET_FACTOR,
    }
    context.timeline.add(
        replies[-1].time_s, "○",
        f"{len(replies)} windows of enrolled wearers in {ORDERS} orders: {len(alarms)} alarms, "
        f"accuracy {accuracy(replies):.3f}",
    )  # fmt: skip


def sensor_dies(context: Context) -> None:
    """(c) The gyro reads zero: named, switched, healed, probation, returned."""
    player, rows = context.player, np.tile(order_of(context.stream, 101), 2)
    windows, labels = context.stream.windows[rows], context.stream.labels[rows]
    lead = slice(0, CLEAN_LEAD)
    broken = slice(CLEAN_LEAD, CLEAN_LEAD + BROKEN)
    healed = slice(CLEAN_LEAD + BROKEN, CLEAN_LEAD + BROKEN + HEALED)
    player.play(windows[lead], labels[lead], factor=FAULT_FACTOR, title="before")
    before = context.world.subscriber.position()
    dead_at = player.time_s
    faulty = context.task.fault("gyro_off").apply(windows[broken])
    during = player.play(faulty, labels[broken], factor=FAULT_FACTOR, title="the gyro is dead")
    healed_at = player.time_s
    after = player.play(windows[healed], labels[healed], factor=FAULT_FACTOR, title="the gyro works again")
    context.settle()
    context.timeline.add(dead_at, "✗", "the gyro dies: gx, gy and gz read zero", "red")
    context.timeline.add(healed_at, "✓", "the gyro works again", "green")
    events = context.world.subscriber.events(before)
    sensor = [event for event in events if event["kind"] == "sensor" and event["channels"]]
    switch = [event for event in events if event["kind"] == "fallback"]
    switched = [index for index, reply in enumerate(during) if reply.served_by != SERVICE]
    if not sensor or not switch or not switched:
        raise StoryError(
            f"the dead gyro was not named or no fallback answered: {[event['text'] for event in events]}"
        )
    served_by = during[switched[0]].served_by
    returned = [reply for reply in after if reply.served_by == SERVICE]
    without = context.engine.run({"window": faulty})["probability"].argmax(1)
    context.counterfactual = [
        replace(reply, predicted=int(guess), served_by=SERVICE) for reply, guess in zip(during, without, strict=True)
    ]
    context.report["fallback"] = {
        "from": SERVICE,
        "to": served_by,
        "reason": switch[0]["text"],
        "named_channel": sensor[0]["channels"][0],
        "delay_windows": switched[0],
        "accuracy_without": float(np.mean(without == labels[broken])),
        "accuracy_with": accuracy(during),
        "accuracy_before": accuracy(player.replies[-len(after) - len(during) - CLEAN_LEAD :][:CLEAN_LEAD]),
        "accuracy_after": accuracy(after),
        "returned": bool(returned) and after[-1].served_by == SERVICE,
        "windows_until_return": next((i for i, reply in enumerate(after) if reply.served_by == SERVICE), None),
        "compression_factor": FAULT_FACTOR,
    }
    _tell(context, events, during + after)


def _tell(context: Context, events: list[dict[str, Any]], replies: list[Reply]) -> None:
    for event in events:
        if event["kind"] in ("sensor", "drift", "fallback", "health") and event["service"] == SERVICE:
            time_s = float(event["details"].get("decision_time_s", replies[0].time_s))
            style = {"warning": "yellow", "error": "red", "critical": "red"}.get(event["severity"], "")
            context.timeline.add(time_s, "●", event["text"], style)


def engine_fails(context: Context) -> None:
    """(d) A faulty test artifact passes its golden inputs and fails on real ones: the same request is answered."""
    rows = order_of(context.stream, 7)[:30]
    before = context.world.subscriber.position()
    replies = context.player.play(
        context.stream.windows[rows],
        context.stream.labels[rows],
        factor=FAULT_FACTOR,
        title="a failing engine",
        service=SHAKY,
    )
    context.settle()
    first = replies[0]
    context.report["failover"] = {
        "served_by": first.served_by,
        "reason": first.reason,
        "requests": len(replies),
        "answered": sum(reply.served_by == SERVICE for reply in replies),
    }
    context.timeline.add(
        first.time_s, "↻", f"engine wrist-faulty fails; {first.served_by} answers the same request ({first.reason})"
    )
    for event in context.world.subscriber.events(before):
        if event["service"] == SHAKY and event["kind"] == "fallback":
            context.timeline.add(replies[-1].time_s, "●", event["text"], "yellow")


def worker_killed(context: Context, *, clients: int = 4, seconds: float = 5.0) -> None:
    """(e) kill -9 of the worker while several clients ask: they wait, none fails after one retry."""
    pid = int(context.world.status()["worker"]["pid"])
    counts = [_Count() for _ in range(clients)]
    stop = threading.Event()
    rows = order_of(context.stream, 3)
    threads = [
        threading.Thread(target=_ask_on, args=(context, context.stream.windows[rows[n::clients]], count, stop))
        for n, count in enumerate(counts)
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    clock.sleep(seconds / 2)
    os.kill(pid, signal.SIGKILL)
    clock.sleep(seconds / 2)
    stop.set()
    for thread in threads:
        thread.join()
    wait_until(lambda: int(context.world.status()["worker"]["pid"]) != pid, "a new worker replaces the killed one")
    context.settle()
    context.report["kill"] = {
        "requests": sum(count.requests for count in counts),
        "failed_requests": sum(count.requests - count.answered for count in counts),
        "retried": sum(count.retried for count in counts),
        "longest_wait_ms": max(count.longest_ms for count in counts),
        "clients": clients,
    }
    kill = context.report["kill"]
    context.timeline.add(
        context.player.time_s, "⚡",
        f"worker {pid} killed under load: {kill['requests']} requests, {kill['failed_requests']} failed, "
        f"{kill['retried']} retried once, longest wait {kill['longest_wait_ms']:.0f} ms",
    )  # fmt: skip


@dataclass
class _Count:
    requests: int = 0
    answered: int = 0
    retried: int = 0
    longest_ms: float = 0.0


def _ask_on(context: Context, windows: np.ndarray, count: _Count, stop: threading.Event) -> None:
    with Client(context.player.address, timeout_s=20, retry_once=True) as client:
        while not stop.is_set():
            window = windows[count.requests % len(windows)]
            started = clock.monotonic_s()
            count.requests += 1  # before asking: whatever ends this thread is a failed request
            with contextlib.suppress(EdgewardenError):
                client.infer(SERVICE, {"window": window[None]})
                count.answered += 1
            count.longest_ms = max(count.longest_ms, (clock.monotonic_s() - started) * 1e3)
            clock.sleep(0.002)
        count.retried = client.retries


def broker_away(context: Context, *, windows: int = 400) -> None:
    """(f) The broker is killed, the device goes on serving and keeps what it has to say, the broker returns."""
    context.world.broker.kill()
    away_at = context.player.time_s
    rows = order_of(context.stream, 11)[:windows]
    context.player.play(
        context.stream.windows[rows], context.stream.labels[rows], factor=QUIET_FACTOR, title="no broker"
    )
    waiting = int(context.world.status()["outbox"]["rows"])
    context.world.broker.start()
    back_at = context.player.time_s
    wait_until(lambda: _settled(context.world.status()), "the outbox is empty again", timeout_s=60)
    sent = int(context.world.status()["outbox"]["next_seq"]) - 1
    with contextlib.suppress(StoryError):  # if something is lost for good, the report says so
        wait_until(lambda: _missing(context, sent) == 0, "every message arrived", timeout_s=60)
    context.report["outage"] = {
        "lost": _missing(context, sent),
        "messages": sent,
        "waiting_at_return": waiting,
        "windows_served": windows,
    }
    context.timeline.add(away_at, "⌁", "the broker is killed", "red")
    context.timeline.add(back_at, "⌁", f"the broker is back; {waiting} waiting messages delivered", "green")


def _missing(context: Context, sent: int) -> int:
    return context.world.subscriber.missing(DEVICE, sent=sent)
