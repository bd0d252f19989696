"""The status document as one terminal screen: a pure function from the document to lines.

Plain words first: who answers and why; numbers beside what they are judged against; unknown is a dash, never zero.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from agent.clock import iso
from agent.drift.explanation import lines

Document = Mapping[str, Any]
LABEL = 12  # columns of the first column
ESCAPE = re.compile("\033\\[[0-9;]*m")
COLOURS = {"green": "32", "yellow": "33", "red": "31", "dim": "2", "bold": "1"}
OF_HEALTH = {"healthy": "green", "degraded": "yellow", "failing": "red"}
OF_SEVERITY = {"critical": "red", "error": "red", "warning": "yellow"}
OF_LINK = {"connected": "green", "waiting": "yellow", "connecting": "yellow", "refused": "red"}

OF_UPDATE = {
    "committed": "green", "deferred": "yellow", "probation": "yellow", "rolling_back": "yellow", "rejected": "red",
    "failed": "red", "rolled_back": "red", "quarantined": "red",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Look:
    """How wide (0 = as wide as it takes), and whether colours may be used."""

    width: int = 100
    colour: bool = False

    def paint(self, text: str, colour: str) -> str:
        code = COLOURS.get(colour)
        return f"\033[{code}m{text}\033[0m" if self.colour and code and text else text

    def cut(self, line: str) -> str:
        """A line no wider than the screen; colours take no room."""
        if not self.width or len(ESCAPE.sub("", line)) <= self.width:
            return line
        kept, room = "", self.width - 1
        for part in re.split(f"({ESCAPE.pattern})", line):
            if ESCAPE.fullmatch(part):
                kept += part
            else:
                kept, room = kept + part[:room], room - min(len(part), room)
        return kept + "…"


def draw(status: Document, look: Look) -> str:
    """The whole screen."""
    lines = [*_head(status, look), ""]
    for service in status["services"]:
        lines += [*_service(service, status["clock"], look), ""]
    lines += [
        *_device(status, look),
        *_link(status, look),
        *_update(status["update"], look),
        "",
        *_events(status["events"], look, several=len(status["services"]) > 1),
    ]
    return "\n".join(look.cut(line.rstrip()) for line in lines)


# --- parts -------------------------------------------------------------------------------------------------
def _head(status: Document, look: Look) -> Iterator[str]:
    agent, device, worker = status["agent"], status["device"], status["worker"]
    title = look.paint(f"{device['id']}", "bold")
    yield (
        f"{title} of fleet {device['fleet']} · Edgewarden {agent['version']} · up {duration(agent['uptime_s'])}"
        f" · {device['system']}, {device['machine']}, {device['cpus']} CPUs"
    )
    serving = worker["phase"] in ("serving", "ready")
    state = f"generation {worker['generation']}, process {worker['pid']}, {worker['phase']}"
    losses = f" · {worker['losses']} lost in the last minute" if worker["losses"] else ""
    text = state if serving else f"no worker serves ({worker['phase']})"
    yield _row("worker", look.paint(text, "" if serving else "red") + look.paint(losses, "yellow"))
    yield _row("clients", "ask on " + ", ".join(agent["addresses"]))
    if status.get("faults"):
        yield _row("", look.paint(f"{status['faults']} faults of the agent itself; see its log", "red"))


def _service(service: Document, clock: Document, look: Look) -> Iterator[str]:
    health = look.paint(service["health"], OF_HEALTH.get(service["health"], ""))
    asked = "" if service["health"] != "unknown" or service["requests"] else " until the first request"
    yield f"{look.paint(service['name'], 'bold')}  {health}{asked}"
    colour = "" if service["serving"] == service["preferred"] and not service["missing"] else "yellow"
    yield _row("serves", look.paint(service["serving"], colour) + _position(service, clock))
    yield _row("why", service["reason"])
    for complaint in _complaints(service):
        yield _row("", look.paint(complaint, "yellow"))
    for problem in service["problems"]:
        yield _row("problem", look.paint(problem, "red"))
    yield _row("engines", "  ".join(_engine(engine, service, look) for engine in service["engines"]))
    for text, colour in _runs(service):
        yield _row("runs", look.paint(text, colour))
    yield _row("requests", _requests(service, look))
    yield _row("latency", _latency(service, look))
    yield _row("guards", _guards(service, look))
    yield _row("drift", _drift(service, look))
    for at, line in enumerate(lines(service["explanation"]) if service.get("explanation") else ()):
        yield _row("" if at else "changed", line)
    if service.get("harm"):
        yield _row("harm", _harm(service, look))


def _complaints(service: Document) -> Iterator[str]:
    """Without what the line above them says."""
    reason = service["reason"]
    for complaint in service["complaints"]:
        if complaint not in (reason, f"{service['phase']}: {reason}"):
            yield complaint.removesuffix(f" ({reason})")


def _position(service: Document, clock: Document) -> str:
    words = {"preferred": "the preferred engine", "fallback": "a fallback", "pinned": "pinned by an operator"}
    text = words.get(service["phase"], f"on {service['phase']}")
    if service["missing"] and service["phase"] == "preferred":
        text = "the best of what is here"
    if clock["source"] == "wall":
        text += f" since {duration(max(0.0, clock['now_s'] - service['since_s']))}"
    check_s = service["next_check_in_s"]
    return f"  {text}" + (f", next check in {duration(check_s)}" if check_s is not None else "")


def _engine(engine: Document, service: Document, look: Look) -> str:
    name = f"{engine['engine']} v{engine['version']}"
    accuracy = "" if engine["accuracy"] is None else f" {engine['accuracy']:.2f}"
    usable = service["usable"]
    if usable is not None and engine["engine"] not in usable:
        return look.paint(f"{name} (not loaded)", "red")
    if engine["engine"] in service["benched"]:
        return look.paint(f"{name} (resting)", "yellow")
    return f"{name}{accuracy}" + (" (floor)" if engine["kind"] == "floor" else "")


def _runs(service: Document) -> Iterator[tuple[str, str]]:
    """How the engine that serves is run, and the wishes that could not be met."""
    for engine in service["engines"]:
        loaded = engine.get("loaded")
        if loaded and engine["engine"] == service["serving"]:
            threads = f"{loaded['threads']} thread{'s' if loaded['threads'] > 1 else ''}"
            where = {"inline": "inline", "thread": "on a thread of its own"}.get(loaded["placement"], "")
            provider = loaded["provider"].removesuffix("ExecutionProvider")
            yield f"{provider}, {threads}, {where}, {microseconds(loaded['p50_us'])} when warm", ""
        if loaded and loaded["note"]:
            yield f"{engine['engine']}: {loaded['note']}", "yellow"


def _requests(service: Document, look: Look) -> str:
    counters = service["counters"]
    parts = [f"{service['requests']:,}"]
    for name, words in (("failed_over", "failed over"), ("floor", "by the floor"), ("refused_by_guard", "refused")):
        if counters.get(name):
            parts.append(look.paint(f"{counters[name]:,} {words}", "yellow"))
    errors = f"{service['errors']:,} unanswered"
    return " · ".join([*parts, look.paint(errors, "red" if service["errors"] else "")])


def _latency(service: Document, look: Look) -> str:
    if service["latency_p95_us"] is None:
        return "- (no request yet)"
    text = " · ".join(f"p{q} {microseconds(service[f'latency_p{q}_us'])}" for q in (50, 95, 99))
    budget = service["budget_p95_us"]
    if budget is None:
        return f"{text} · no budget"
    over = service["latency_p95_us"] > budget
    return f"{text} · budget p95 {microseconds(budget)} " + look.paint(
        "exceeded" if over else "kept", "red" if over else "green"
    )


def _guards(service: Document, look: Look) -> str:
    raised = [f"{', '.join(channels) or 'the whole input'} {kind}" for kind, channels in service["guards"].items()]
    return look.paint("; ".join(raised), "yellow") if raised else "quiet"


def _drift(service: Document, look: Look) -> str:
    drift = service["drift"]
    if not drift:
        return "not watched (the artifact has no reference)"
    raised, rows = bool(drift["raised"]), int(drift["rows"])
    shares = {name.removeprefix("evidence:"): value for name, value in drift.items() if name.startswith("evidence:")}
    top = sorted((name for name in shares if name != "total"), key=lambda name: -shares[name])[:3]
    state = look.paint("outside every known regime", "red") if raised else "inside what is known"
    named = ", ".join(f"{name} {100 * shares[name]:.0f} %" for name in top if shares[name] > 0)
    evidence = f"evidence {100 * drift['evidence']:.0f} % of the threshold" + (f" (most: {named})" if named else "")
    return f"{state} · {evidence} · {rows:,} rows"


def _harm(service: Document, look: Look) -> str:
    """What witnesses say: engines with other inputs, each as far as its own inputs look as ever."""
    harm = service["harm"]
    against = {name.removeprefix("harm:"): value for name, value in harm.items() if name.startswith("harm:")}
    loud = [name.removeprefix("quietness:") for name, value in harm.items() if _is_loud(name, value)]
    if harm["harmful"]:
        state = look.paint("the drift does harm", "red")
    elif against:
        state = ", ".join(f"{name} {100 * value:.0f} %" for name, value in against.items()) + " of what would be harm"
    else:
        state = "witnesses are not asked while nothing drifts"
    return state + (f" · not believed now: {', '.join(loud)}" if loud and against else "")


def _is_loud(name: str, value: float) -> bool:
    return name.startswith("quietness:") and value >= 0.5


def _device(status: Document, look: Look) -> Iterator[str]:
    power, thermal, memory, disk = status["power"], status["thermal"], status["memory"], status["disk"]
    scope = {"processes": "agent and worker only", "package": "processor"}.get(power["scope"], power["scope"])
    estimate = look.paint("estimate", "yellow") + f" from CPU time, {scope}"
    label = f"measured by {power['source']}, {scope}" if power["measured"] else estimate
    watts = "-" if power["watts"] is None else f"{power['watts']:.2f} W"
    each = power["joules_per_inference"]
    per_inference = "" if each is None else f" · {1e3 * each:.2f} mJ per inference"
    yield _row("power", f"{watts} ({label}){per_inference}")
    celsius = "-" if thermal["temperature_c"] is None else f"{thermal['temperature_c']:.0f} °C ({thermal['zone']})"
    slowed = {True: look.paint("throttled", "red"), False: "not throttled", None: "throttling unknown"}
    cpu = status["cpu"]["share"]
    yield _row(
        "heat", f"{celsius} · {slowed[thermal['throttled']]} · CPU {'-' if cpu is None else f'{100 * cpu:.0f} %'}"
    )
    yield _row(
        "memory",
        f"{size(memory['resident_bytes'])} of agent and worker · {size(memory['available_bytes'])} available"
        f" · disk {size(disk['free_bytes'])} free",
    )


def _link(status: Document, look: Look) -> Iterator[str]:
    link, outbox = status["link"], status["outbox"]
    if link["state"] == "off":
        yield _row("link", "off (link.enabled = false)")
        return
    state = look.paint(link["state"], OF_LINK.get(link["state"], ""))
    secure = "TLS" if link["tls"] else "no TLS"
    yield _row(
        "link",
        f"{state} · {link['broker']} ({secure}) · {link['published']:,} published, {link['in_flight']} on their way",
    )
    if link["error"]:
        yield _row("", look.paint(link["error"], "yellow"))
    if link["unheard"]:
        words = ", ".join(topic.split("/", 4)[-1] for topic in link["unheard"])
        yield _row("", look.paint(f"nobody subscribes to this device's {words}", "yellow"))
    dropped = int(outbox["dropped"] + outbox["expired"] + outbox["refused"])
    text = f"{int(outbox['rows']):,} waiting, {size(outbox['bytes'])} of {size(outbox['max_bytes'])}"
    yield _row("outbox", text + " · " + look.paint(f"{dropped:,} dropped", "red" if dropped else ""))
    if outbox["held"]:
        yield _row("", look.paint(f"the disk is full: {int(outbox['held'])} messages wait in memory", "red"))


def _update(update: Document, look: Look) -> Iterator[str]:
    orders = update["orders"]
    if update["state"] == "off":
        yield _row("update", "off (update.enabled = false)")
        return
    state = look.paint(update["state"].replace("_", " "), OF_UPDATE.get(update["state"], ""))
    moved = f" · {size(update['moved_bytes'])} moved" if update["moved_bytes"] else ""
    attempt = f" · attempt {update['attempt']}" if update["attempt"] > 1 else ""
    desired = f"desired version {update['desired_version']}: " if update["desired_version"] else ""
    yield _row("update", f"{desired}{state}{_journey(update)}{moved}{attempt}")
    if update["code"]:
        yield _row("", look.paint(f"{update['code']}: {update['text']}", "yellow"))
    elif update["waiting"]["code"]:
        yield _row("", look.paint(f"waits: {update['waiting']['text']}", "yellow"))
    if orders["refused"]:
        counts = ", ".join(f"{count} {code}" for code, count in sorted(orders["refused"].items()))
        yield _row("", look.paint(f"refused documents: {counts}", "yellow"))


def _journey(update: Document) -> str:
    parts = [
        f"{update['from'].get(service, '-')} -> {label}" if update["from"].get(service) != label else label
        for service, label in update["to"].items()
    ]
    return f" ({', '.join(parts)})" if parts else ""


def _events(events: list[Document], look: Look, *, several: bool) -> Iterator[str]:
    """The last ones; whose they are is said where the device has several services."""
    yield look.paint("last events (UTC)", "dim")
    for event in events[-8:]:
        time = iso(event["at"])[11:19]
        whose = f" ({event['service']})" if several and event["service"] else ""
        text = f"{event['event']}{whose}: {event['text']}"
        yield f"  {time} {look.paint(text, OF_SEVERITY.get(event['severity'], ''))}"


# --- words -------------------------------------------------------------------------------------------------
def _row(label: str, text: str) -> str:
    return f"  {label:<{LABEL - 2}}{text}"


def duration(seconds: float) -> str:
    """12 s, 3 min 5 s, 2 h 7 min, 3 d 4 h."""
    whole = int(seconds)
    for unit, size_s, below, below_s in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size_s:
            rest = whole % size_s // below_s
            return f"{whole // size_s} {unit}" + (f" {rest} {below}" if rest else "")
    return f"{whole} s"


def microseconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f} µs" if value < 1e4 else f"{value / 1e3:.1f} ms" if value < 1e6 else f"{value / 1e6:.2f} s"


def size(count: float | None) -> str:
    if count is None:
        return "-"
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
