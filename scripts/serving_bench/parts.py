"""The parts of the serving bench. Each takes the `Bench`, measures, and returns what goes into the document.

A part raises `Failed` when it cannot measure; the others go on without it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from agent.asking import ask
from agent.contract.errors import EdgewardenError
from scripts.serving_bench import peers as peers_
from scripts.serving_bench.cold import cold_start_s
from scripts.serving_bench.load import Load, Question, Target, cores
from scripts.serving_bench.models import OUTPUT, VIEW, Model, build
from scripts.serving_bench.ours import Ours, answer_length, ours_request
from scripts.serving_bench.processes import Failed, Group, cpu_s, pss_mb, rss_mb, tree
from scripts.serving_bench.results import median, ratio

Found = dict[str, Any]
MANY = 16
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Bench:
    """What the parts share. `scale`: 1 = full, smaller = shorter runs. `say(text)`: progress."""

    build: Path
    scratch: Path
    scale: float
    say: Callable[[str], None]
    load: Load
    models: dict[str, Model] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)  # what one part leaves for another
    _made: int = 0

    def model(self, name: str) -> Model:
        if name not in self.models:
            self.models[name] = build(self.scratch / "models", name)
        return self.models[name]

    def folder(self, name: str) -> Path:
        """A new folder with a short path: sockets live in it."""
        self._made += 1
        place = self.scratch / f"{self._made}{name}"
        place.mkdir()
        return place

    def seconds(self, full: float) -> float:
        return max(0.5, full * self.scale)

    def rounds(self, full: int) -> int:
        return max(1, round(full * self.scale))


def inprocess(bench: Bench) -> Found:
    """The request path without sockets, beside a bare run of the same model: CPU time of one thread."""
    from scripts.bench_request import measure_inprocess

    found = measure_inprocess(max(10, round(40 * bench.scale)))
    bare, path, unmonitored = found["bare_us"], found["path_us"], found["unmonitored_us"]
    return {
        "ratios": {
            "inprocess_over_bare": ratio(path, bare),
            "monitoring_over_bare": ratio(path - unmonitored, bare),
        },
        "details": found,
    }


def floor(bench: Bench) -> Found:
    """C to C over a Unix socket with our message sizes, plus a bound run; then our worker, all on one core."""
    model = bench.model("mlp")
    core, other = cores()[0], cores()[-1]
    echoes, ours, runs = [], [], []
    with Ours(bench.folder("f"), [model]) as server:
        question = server.question("mlp", binary=True)
        answer = server.folder / "answer"
        answer.write_bytes(b"HTTP/1.1 200 OK\r\nContent-Length: %06d\r\n\r\n" % (question.answer_bytes - 44))
        answer.write_bytes(answer.read_bytes() + b"x" * (question.answer_bytes - 44))
        request_bytes = question.file.stat().st_size
        worker = server.worker_pid()
        for pid in server.group.pids():
            _pin(pid, core if pid == worker else other)
        path = server.folder / "echo.sock"
        echo = bench.load.echo(path, request_bytes, answer, cpu=core)
        try:
            _wait(path.exists, "the echo")
            for _ in range(bench.rounds(5)):
                arguments = {"seconds": bench.seconds(2), "extra": ["--cpu", str(core)]}
                echoed = bench.load.ask(Target(unix=path), Question(question.file), **arguments)
                echoes.append(echoed["p50_us"])
                runs.append(_bound_run_us(model, core))
                ours.append(_sound(bench.load.ask(server.target(unix=True), question, **arguments))["p50_us"])
        finally:
            echo.kill()
            echo.wait()
    echo_us, run_us, ours_us = median(echoes), median(runs), median(ours)
    return {
        "floor": {"echo_us": round(echo_us, 2), "bound_run_us": round(run_us, 2)},
        "ratios": {"uds_over_floor": ratio(ours_us, echo_us + run_us)},
        "details": {"ours_p50_us": ours, "echo_p50_us": echoes, "bound_run_us": runs, "pinned_to_core": core},
    }


def ours(bench: Bench) -> Found:
    """Our server alone: every model, both sockets, 1 and 16 connections, binary and JSON, monitors on and off."""
    table: list[Found] = []
    models = [bench.model(name) for name in ("mlp", "conv", "mobilenet")]
    with Ours(bench.folder("o"), models) as server:
        for model in models:
            for binary in (True, False):
                question = server.question(model.name, binary=binary)
                for unix in (True, False):
                    for connections in (1, MANY):
                        found = _ask(bench, server, question, unix=unix, connections=connections, seconds=2)
                        table.append({"model": model.name, "binary": binary, "unix": unix, **found})
        memory = {
            "agent_rss_mb": rss_mb(server.group.pid), "worker_rss_mb": rss_mb(server.worker_pid()),
            "agent_pss_mb": pss_mb(server.group.pid), "worker_pss_mb": pss_mb(server.worker_pid()),
        }  # fmt: skip
    with Ours(bench.folder("w"), [], extra=_wrist()) as server:
        question = _wrist_question(server)
        for connections in (1, MANY):
            found = _ask(bench, server, question, unix=True, connections=connections, seconds=2)
            table.append({"model": "wrist", "binary": True, "unix": True, **found})
    return {"details": {"runs": table, "memory_mb": memory}}


def monitors(bench: Bench) -> Found:
    """Over a Unix socket with everything that watches, and with nothing of it: same server, same model, in turns.

    CPU counts all processes: watching happens in the agent process, too. The idle agent process is part of it.
    """
    model, folder = bench.model("mlp"), bench.folder("n")
    unwatched = folder / "alone.sock"
    command = [sys.executable, "-m", "scripts.serving_bench.alone", str(folder), str(unwatched), model.name]
    runs: dict[str, list[Found]] = {"on": [], "off": []}
    with (
        Ours(bench.folder("w"), [model]) as server,
        Group([*command, *map(str, model.artifacts)], folder / "alone.log", folder=ROOT) as alone,
    ):
        request = server.question("mlp", binary=True)
        alone.wait_until(lambda: _asked(unwatched, request), "the server alone answers")
        subjects = {"on": (server.group, server.target(unix=True)), "off": (alone, Target(unix=unwatched))}
        for _, target in subjects.values():
            bench.load.ask(target, request, seconds=bench.seconds(1), connections=MANY)  # warm
        for _ in range(max(3, bench.rounds(5))):
            for name, (group, target) in subjects.items():
                runs[name].append(_measured(bench, group.pids(), target, request, MANY, bench.seconds(2)))
    found = {
        f"{key}_{name}": median([run[key] for run in many])
        for name, many in runs.items()
        for key in ("rate", "cpu_us")
    }
    return {"monitors": {name: round(value, 2) for name, value in found.items()}, "details": runs}


def peers(bench: Bench) -> Found:
    """FastAPI, MLServer, LitServe and BentoML beside ours: same model, same client, JSON on both sides."""
    model = bench.model("mlp")
    environments = bench.build / "environments"
    versions: dict[str, dict[str, str]] = {}
    for peer in peers_.PEERS:
        bench.say(f"environment of {peer.name}")
        versions[peer.name] = peers_.prepare(peer, environments)
    found: dict[str, dict[str, list[float]]] = {}
    memory: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Ours(bench.folder("p"), [model]))
        subjects: dict[str, tuple[Group, Target, Question]] = {
            "ours": (server.group, server.target(unix=False), server.question("mlp", binary=False))
        }
        for peer in peers_.PEERS:
            bench.say(f"start {peer.name}")
            group, target, question = peers_.start(peer, environments, model, bench.folder(peer.name[0]))
            stack.enter_context(group)

            def good(target: Target = target, question: Question = question) -> bool:
                return peers_.answers(bench.load, target, question)

            group.wait_until(good, f"{peer.name} answers", within_s=120)
            subjects[peer.name] = (group, target, question)
        for number in range(max(3, bench.rounds(3))):
            for name, (group, target, question) in subjects.items():
                bench.say(f"round {number + 1}: {name}")
                if number == 0:
                    bench.load.ask(target, question, seconds=bench.seconds(1), connections=MANY)  # warm
                for connections in (1, MANY):
                    one = _measured(bench, group.pids(), target, question, connections, bench.seconds(4))
                    for key in ("rate", "cpu_us", "p50_us", "p99_us"):
                        found.setdefault(name, {}).setdefault(f"{key}_c{connections}", []).append(one[key])
        memory["ours"] = rss_mb(server.worker_pid())
        for name, (group, _, _) in subjects.items():
            if name != "ours":
                memory[name] = sum(rss_mb(pid) for pid in group.pids())
    typical = {name: {key: median(values) for key, values in keys.items()} for name, keys in found.items()}
    mine, rates = typical["ours"], {name: one[f"rate_c{MANY}"] for name, one in typical.items()}
    return {
        "ratios": {
            "cpu_over_fastapi": ratio(mine[f"cpu_us_c{MANY}"], typical["fastapi"][f"cpu_us_c{MANY}"]),
            **{f"rps_over_{peer.name}": ratio(rates["ours"], rates[peer.name]) for peer in peers_.PEERS},
            "rss_over_mlserver": ratio(memory["ours"], memory["mlserver"]),
        },
        "details": {"typical": typical, "rss_mb": memory, "versions": versions, "rounds": found},
    }


def startup(bench: Bench) -> Found:
    """From exec to the first answer: our worker, and MLServer with the same model."""
    model = bench.model("mlp")
    ours_s = [cold_start_s(bench.folder("c"), model) for _ in range(bench.rounds(5))]
    mobilenet_s = [cold_start_s(bench.folder("c"), bench.model("mobilenet")) for _ in range(bench.rounds(3))]
    bench.measured["cold_s"] = median(ours_s)
    mlserver = next(peer for peer in peers_.PEERS if peer.name == "mlserver")
    details: Found = {"ours_s": ours_s, "ours_mobilenet_s": mobilenet_s}
    if bench.scale < 1 and not (bench.build / "environments/mlserver/pinned.txt").exists():
        return {"details": details}
    peers_.prepare(mlserver, bench.build / "environments")
    theirs_s = []
    for _ in range(bench.rounds(3)):
        began_s = time.monotonic()
        group, target, question = peers_.start(
            mlserver, bench.build / "environments", model, bench.folder("m")
        )  # fmt: skip
        with group:
            group.wait_until(lambda t=target, q=question: peers_.answers(bench.load, t, q), "MLServer answers")
            theirs_s.append(time.monotonic() - began_s)
    return {
        "ratios": {"first_reply_over_mlserver": ratio(median(ours_s), median(theirs_s))},
        "details": {**details, "mlserver_s": theirs_s},
    }


def kill(bench: Bench) -> Found:
    """Kill -9 of the worker, then ask until somebody answers well."""
    model = bench.model("mlp")
    if "cold_s" not in bench.measured:
        bench.measured["cold_s"] = median([cold_start_s(bench.folder("c"), model) for _ in range(bench.rounds(3))])
    times = []
    request = ours_request(model, binary=True)
    for _ in range(
        bench.rounds(5)
    ):  # a fresh agent each time: a worker that dies again soon is restarted with a delay
        with Ours(bench.folder("k"), [model]) as server:
            _wait(lambda one=server: _answers(one.unix, request), "a first answer")
            pid = server.worker_pid()
            began_s = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            _wait(lambda one=server: _answers(one.unix, request), "an answer after the kill", pause_s=0.0)
            times.append(time.monotonic() - began_s)
    return {
        "ratios": {"kill_over_cold_start": ratio(median(times), bench.measured["cold_s"])},
        "details": {"kill_s": times, "cold_s": bench.measured["cold_s"]},
    }


def tail(bench: Bench) -> Found:
    """p999 over a Unix socket while the agent process is busy half of the time, over an idle one, in turns."""
    model = bench.model("mlp")
    idle, busy = [], []
    with (
        Ours(bench.folder("i"), [model]) as calm,
        Ours(bench.folder("b"), [model], module="scripts.serving_bench.busy_agent") as hectic,
    ):
        questions = {server: server.question("mlp", binary=True) for server in (calm, hectic)}
        for _ in range(bench.rounds(5)):
            for server, values in ((calm, idle), (hectic, busy)):
                with _stopped(hectic.group.pid) if server is calm else contextlib.nullcontext():
                    found = bench.load.ask(
                        server.target(unix=True), questions[server], seconds=bench.seconds(4), connections=1
                    )
                values.append(_sound(found)["p999_us"])
    return {
        "ratios": {"p999_busy_over_idle": ratio(median(busy), median(idle))},
        "details": {"idle_p999_us": idle, "busy_p999_us": busy},
    }


def swaps(bench: Bench) -> Found:
    """Switches of the preferred engine and whole new generations, under load; not one request may notice."""
    model = bench.model("mlp")
    wanted, whole = max(20, round(1000 * bench.scale)), max(4, round(100 * bench.scale))
    least = round(1_000_000 * bench.scale)
    stop = bench.scratch / "stop-swaps"
    stop.unlink(missing_ok=True)
    with Ours(bench.folder("s"), [model]) as server:
        question = server.question("mlp", binary=True)
        question = Question(question.file)  # answers of two engines differ in length
        _swap(server, 6, 3, bench.say)  # both sides have had all they keep
        before = _resident(server)
        extra = ["--stop-file", str(stop)]
        with bench.load.begin(
            server.target(unix=True), question, seconds=3000, connections=MANY, extra=extra
        ) as running:
            generations = _swap(server, wanted, whole, bench.say)
            _wait(lambda: _answered(server) >= least, "enough requests", within_s=600, pause_s=0.5)
            stop.touch()
            found = running.result(120)
        after = _resident(server)
    growth = max(after[name] / before[name] - 1 for name in before)
    bad = found["errors"] + found["resets"] + found["unanswered"] + found["refused"]
    return {
        "swap": {
            "swaps": wanted, "generations": generations, "requests": found["ok"], "errors": bad,
            "rss_growth": round(growth, 4),
        },
        "details": {"load": found, "before_mb": before, "after_mb": after},
    }  # fmt: skip


def overload(bench: Bench) -> Found:
    """Twice the measured capacity is offered to a model of about a millisecond."""
    model = bench.model("mobilenet")
    with Ours(bench.folder("v"), [model]) as server:
        question, target = server.question("mobilenet", binary=True), server.target(unix=True)
        capacities, goodputs, p99s, details = [], [], [], []
        for _ in range(bench.rounds(3)):
            capacity = _sound(bench.load.ask(target, question, seconds=bench.seconds(5), connections=4))["rate"]
            extra = ["--rate", f"{2 * capacity:.1f}"]
            found = bench.load.ask(target, question, seconds=bench.seconds(8), connections=128, extra=extra)
            if found["errors"] or found["resets"]:
                raise Failed(f"overload brought {found['errors']} errors and {found['resets']} resets")
            capacities.append(capacity)
            goodputs.append(found["rate"] / capacity)
            p99s.append(found["p99_us"] / 1e3)
            details.append(found)
    return {
        "overload": {"goodput_over_capacity": round(median(goodputs), 4), "p99_ms": round(median(p99s), 2)},
        "details": {"capacity": capacities, "runs": details},
    }


def memory(bench: Bench) -> Found:
    """All processes with the MobileNet-like model after some work, less the size of the model's file."""
    model = bench.model("mobilenet")
    with Ours(bench.folder("r"), [Model(model.name, model.input, model.shape, _alone(model))]) as server:
        question = server.question("mobilenet", binary=True)
        _sound(bench.load.ask(server.target(unix=True), question, seconds=bench.seconds(4), connections=4))
        time.sleep(2)
        pids = server.group.pids()
        by_pid = {f"{'agent' if pid == server.group.pid else 'worker'} {pid}": round(pss_mb(pid), 2) for pid in pids}
    size_mb = model.onnx.stat().st_size / 1e6
    return {
        "memory": {"total_pss_mb": round(sum(by_pid.values()) - size_mb, 2)},
        "details": {"pss_mb": by_pid, "model_mb": round(size_mb, 2)},
    }


PARTS: dict[str, tuple[Callable[[Bench], Found], float]] = {
    # name: (function, expected seconds of a full run)
    "inprocess": (inprocess, 30),
    "floor": (floor, 40),
    "startup": (startup, 30),
    "kill": (kill, 25),
    "memory": (memory, 12),
    "ours": (ours, 90),
    "monitors": (monitors, 25),
    "tail": (tail, 50),
    "overload": (overload, 50),
    "swaps": (swaps, 200),
    "peers": (peers, 240),
}
QUICK = tuple(name for name in PARTS if name not in ("peers", "ours", "monitors"))


# --- helpers ------------------------------------------------------------------------------------------------
def _sound(found: Found) -> Found:
    """Raises: Failed: something other than good answers came."""
    bad = {key: found[key] for key in ("errors", "refused", "resets", "unanswered") if found[key]}
    if bad or not found["ok"]:
        raise Failed(f"{found['ok']} good answers and {bad}")
    return found


def _measured(
    bench: Bench, pids: Sequence[int], target: Target, question: Question, connections: int, seconds: float
) -> Found:
    before = cpu_s(pids)
    found = _sound(bench.load.ask(target, question, seconds=seconds, connections=connections))
    return {**found, "cpu_us": (cpu_s(pids) - before) / found["ok"] * 1e6}


def _ask(bench: Bench, server: Ours, question: Question, *, unix: bool, connections: int, seconds: float) -> Found:
    target, worker = server.target(unix=unix), server.worker_pid()
    before = cpu_s([worker])
    found = _measured(bench, server.group.pids(), target, question, connections, bench.seconds(seconds))
    keys = ("rate", "p50_us", "p99_us", "p999_us", "cpu_us")
    worker_us = (cpu_s([worker]) - before) / found["ok"] * 1e6
    return {"connections": connections, **{key: found[key] for key in keys}, "worker_cpu_us": worker_us}


def _bound_run_us(model: Model, core: int) -> float:
    """Median wall time of one pre-bound run on one core."""
    mine = os.sched_getaffinity(0)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(model.onnx), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    memory = {name: np.zeros((1, width), np.float32) for name, width in (("x", 32), (OUTPUT, 10), (VIEW, 64))}
    memory["x"][:] = model.row()
    binding.bind_input("x", "cpu", 0, np.float32, (1, 32), memory["x"].ctypes.data)
    for name in (OUTPUT, VIEW):
        binding.bind_output(name, "cpu", 0, np.float32, memory[name].shape, memory[name].ctypes.data)
    run, bound, wanted = session._sess.run_with_iobinding, binding._iobinding, onnxruntime.RunOptions()  # noqa: SLF001
    os.sched_setaffinity(0, {core})
    try:
        times = []
        for _ in range(2000):
            began_ns = time.perf_counter_ns()
            run(bound, wanted)
            times.append(time.perf_counter_ns() - began_ns)
    finally:
        os.sched_setaffinity(0, mine)
    return median(times) / 1e3


def _pin(pid: int, core: int) -> None:
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(task.name), {core})


def _wait(true: Callable[[], bool], what: str, *, within_s: float = 60.0, pause_s: float = 0.01) -> None:
    end_s = time.monotonic() + within_s
    while True:
        with contextlib.suppress(EdgewardenError, OSError):
            if true():
                return
        if time.monotonic() > end_s:
            raise Failed(f"waited {within_s:.0f} s in vain for {what}")
        if pause_s:
            time.sleep(pause_s)


def _asked(unix: Path, question: Question) -> bool:
    try:
        return answer_length(unix, question.file.read_bytes()) == question.answer_bytes
    except OSError:
        return False


def _answers(unix: Path, request: bytes) -> bool:
    return answer_length(unix, request) > 0


@contextlib.contextmanager
def _stopped(pid: int) -> Iterator[None]:
    """The process does nothing meanwhile; its worker goes on."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _swap(server: Ours, swaps: int, generations: int, say: Callable[[str], None]) -> int:
    """`swaps` changes in all, every so many a whole generation; returns how many of those there were."""
    (model,) = server.models.values()
    engines = [folder.name for folder in model.artifacts[:2]]
    every, done = max(1, swaps // generations), 0
    for number in range(swaps):
        if number % 50 == 49:
            say(f"swap {number + 1} of {swaps}")
        if number % every == 0 and done < generations:
            old = server.worker_pid()
            ask(server.admin, "/generation", {})
            _wait(lambda old=old: server.worker_pid() not in (0, old), "a new generation")
            done += 1
        else:
            ask(server.admin, "/pin", {"service": model.name, "engine": engines[number % 2]})
    return done


def _answered(server: Ours) -> int:
    return int(server.status()["services"][0]["requests"])


def _resident(server: Ours) -> dict[str, float]:
    """RSS of agent and worker once old workers are gone."""
    _wait(lambda: len(tree(server.group.pid)) <= 2, "old workers to be gone", within_s=60)
    time.sleep(3)
    return {"agent": rss_mb(server.group.pid), "worker": rss_mb(server.worker_pid())}


def _alone(model: Model) -> tuple[Path, ...]:
    return model.artifacts[0], model.artifacts[-1]


def _wrist() -> str:
    models = ROOT / "fallback_models"
    return f"""
[[service]]
name = "wrist"
artifact = "{models / "wrist-accel"}"
floor = "{models / "wrist-floor"}"
"""


def _wrist_question(server: Ours) -> Question:
    with np.load(ROOT / "fallback_models/wrist-accel/golden.npz", allow_pickle=False) as golden:
        window = golden["in_window"][:1]
    model = _Wrist(window)
    raw = ours_request(model, binary=True)  # type: ignore[arg-type]
    file = server.folder / "wrist.request"
    file.write_bytes(raw)
    return Question(file, answer_length(server.unix, raw))


class _Wrist:
    """The wrist model's request: a real window."""

    name, input = "wrist", "window"

    def __init__(self, window: Any) -> None:
        self._window = window

    def row(self) -> Any:
        return self._window
