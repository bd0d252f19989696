"""`edgewarden-agent`: what a person types. The only file that prints.

Light commands start fast: what they do not need is not imported. Expected failures are one sentence on stderr and a
documented exit code, never a traceback.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent import VERSION
from agent.asking import ask
from agent.clock import monotonic_s, sleep
from agent.contract.errors import ArtifactError, ConfigError, EdgewardenError, InvalidRequest

if TYPE_CHECKING:
    from agent.inputs import Wanted

DEFAULT_CONFIG = "/etc/edgewarden/agent.toml"
INTERRUPTED = 130
ROWS_AT_ONCE = 64
RELOAD_POLL_S = 0.02
SHOW_PROGRESS_AFTER_S = 2.0

EPILOG = """\
exit codes:
  0  done                          5  the broker refused or cannot be reached
  1  an unexpected error           6  state cannot be stored (disk full, unreadable)
  2  configuration or usage        7  another agent holds the state folder
  3  a document breaks a contract  8  a request was not answered
  4  an artifact cannot be used    9  no agent is running
  130  interrupted

The configuration is --config, else $EDGEWARDEN_CONFIG, else /etc/edgewarden/agent.toml.
Settings can be overridden: EDGEWARDEN_LINK__HOST=broker edgewarden-agent run
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except EdgewardenError as error:
        print(f"edgewarden-agent: {error.sentence()}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `status | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


# --- commands ----------------------------------------------------------------------------------------------
def run(options: argparse.Namespace) -> int:
    from agent.daemon import run as run_daemon

    return run_daemon(_config_file(options), os.environ)


def status(options: argparse.Namespace) -> int:
    path = _admin_socket(options)
    while True:
        document = ask(path, "/status")
        if options.json:
            print(json.dumps(document, indent=None if options.watch else 2), flush=True)
        else:
            _show(document, clear=options.watch is not None)
        if options.watch is None:
            return 0
        sleep(options.watch)


def pin(options: argparse.Namespace) -> int:
    document = ask(_admin_socket(options), "/pin", {"service": options.service, "engine": options.engine})
    return _told(options, document, f"{options.service} is pinned to {document['serving']}: {document['reason']}")


def unpin(options: argparse.Namespace) -> int:
    document = ask(_admin_socket(options), "/unpin", {"service": options.service})
    return _told(
        options, document, f"{options.service} is not pinned; {document['serving']} serves: {document['reason']}"
    )


def rollback(options: argparse.Namespace) -> int:
    document = ask(_admin_socket(options), "/rollback", {})
    return _told(options, document, "going back to the previous selection; `status` shows how far it is")


def reload(options: argparse.Namespace) -> int:
    socket = _admin_socket(options)
    number = int(ask(socket, "/generation", {})["generation"])
    while True:
        worker = ask(socket, "/status")["worker"]
        if worker["generation"] >= number and worker["phase"] == "serving":
            return _told(options, worker, f"worker {worker['generation']} serves; no connection was closed")
        if worker["incoming"] < number and worker["generation"] < number:
            raise EdgewardenError(f"worker {number} did not come up", hint="The agent's log says why.")
        sleep(RELOAD_POLL_S)


def check_config(options: argparse.Namespace) -> int:
    from agent.config import absent_artifacts, load_config

    loaded = load_config(_config_file(options), os.environ)
    rows = loaded.explain()
    if options.json:
        print(json.dumps({row.key: {"value": json.loads(row.value), "origin": row.origin} for row in rows}, indent=2))
    else:
        widths = [max(len(row.key) for row in rows), min(48, max(len(row.value) for row in rows))]
        for row in rows:
            print(f"{row.key:<{widths[0]}}  {row.value:<{widths[1]}}  {row.origin}")
    absent = absent_artifacts(loaded)
    for sentence in absent:
        print(f"edgewarden-agent: problem: {sentence}", file=sys.stderr)
    return ArtifactError.exit_code if absent else 0


def doctor(options: argparse.Namespace) -> int:
    from agent.doctor import Verdict, examine

    colours = {Verdict.OK: "32", Verdict.WARN: "33", Verdict.FAIL: "31"}
    findings = []
    for finding in examine(_config_file(options), os.environ):
        findings.append(finding)
        if not options.json:
            word = f"{finding.verdict.value:<5}"
            word = f"\033[{colours[finding.verdict]}m{word}\033[0m" if _colour() else word
            print(f"{word} {finding.check:<10} {finding.text}")
            if finding.advice:
                print(f"{'':16} -> {finding.advice}")
    if options.json:
        fields = ("check", "verdict", "text", "advice")
        print(json.dumps([{name: getattr(finding, name) for name in fields} for finding in findings], indent=2))
    failed = [finding for finding in findings if finding.verdict is Verdict.FAIL]
    if not options.json:
        print(f"\n{len(failed)} of {len(findings)} checks failed" if failed else "\nall well")
    return failed[0].exit_code or 1 if failed else 0


def infer(options: argparse.Namespace) -> int:
    from agent.inputs import find_files

    files = find_files([Path(name) for name in options.inputs])
    answers = _answers_of_artifact(options, files) if options.artifact else _answers_of_agent(options, files)
    if options.json:
        for answer in answers:
            print(json.dumps(_with_nulls(answer), allow_nan=False), flush=True)
        return 0
    for answer in answers:
        print(_answer_line(answer), flush=True)
    return 0


# --- infer -------------------------------------------------------------------------------------------------
def _answers_of_agent(options: argparse.Namespace, files: list[Path]) -> Iterator[dict[str, Any]]:
    from agent.client import Client
    from agent.inputs import Wanted

    with Client(_serving_address(options), retry_once=True) as client:
        service = options.service or _only_service(client.models())
        described = client.metadata(service)
        wanted = [Wanted(one["name"], one["datatype"], tuple(one["shape"])) for one in described["inputs"]]
        labels = described.get("parameters", {}).get("labels", [])

        def answer(inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
            given = client.infer(service, inputs)
            told = {"served_by": given.served_by, "reason": given.reason, "guard": given.guard}
            return given.outputs, told

        yield from _answers(files, wanted, labels if isinstance(labels, list) else [], answer)


def _answers_of_artifact(options: argparse.Namespace, files: list[Path]) -> Iterator[dict[str, Any]]:
    from agent.contract.artifact import open_artifact
    from agent.contract.plan import TensorPlan
    from agent.engine import FloorEngine, OnnxEngine
    from agent.inputs import Wanted

    artifact = open_artifact(Path(options.artifact))
    manifest = artifact.manifest
    wanted = [Wanted(one.name, one.datatype, tuple(one.shape)) for one in manifest.inputs]
    public = [one.name for one in manifest.outputs]
    if manifest.kind == "floor":
        outputs = tuple(TensorPlan(one.name, one.datatype, tuple(one.shape)) for one in manifest.outputs)
        inputs = tuple(TensorPlan(one.name, one.datatype, one.shape) for one in wanted)
        engine: Any = FloorEngine(manifest.floor_outputs or {}, inputs, outputs)
    else:
        engine = OnnxEngine.load(artifact.path("model"), sha256=manifest.blobs["model"].sha256, name=manifest.name)
    told = {"served_by": manifest.name, "reason": "asked directly", "guard": ""}
    yield from _answers(files, wanted, manifest.labels, lambda arrays: (engine.run(arrays, public), told))


def _answers(files: list[Path], wanted: Sequence[Wanted], labels: list[str], answer: Any) -> Iterator[dict[str, Any]]:
    """One dictionary per row, in the order of files and rows."""
    from agent.inputs import read_inputs, rows

    progress = _Progress(len(files))
    for file in files:
        number = 0
        for piece in rows(read_inputs(file, wanted), ROWS_AT_ONCE):
            outputs, told = answer(piece)
            for row in range(len(next(iter(outputs.values())))):
                values = {name: array[row].tolist() for name, array in outputs.items()}
                yield {"file": str(file), "row": number, **told, "label": _label(values, labels), "outputs": values}
                number += 1
        progress.step()
    progress.end()


def _with_nulls(value: Any) -> Any:
    """JSON knows no NaN and no infinity."""
    if isinstance(value, dict):
        return {name: _with_nulls(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_with_nulls(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _label(values: dict[str, Any], labels: list[str]) -> str:
    fitting = [value for value in values.values() if isinstance(value, list) and len(value) == len(labels) > 0]
    return labels[max(range(len(labels)), key=fitting[0].__getitem__)] if fitting else ""


def _answer_line(answer: dict[str, Any]) -> str:
    numbers = "  ".join(f"{name} {_numbers(value)}" for name, value in answer["outputs"].items())
    guard = f"  guard: {answer['guard']}" if answer["guard"] else ""
    label = f"{answer['label']}  " if answer["label"] else ""
    return f"{Path(answer['file']).name}[{answer['row']}]  {label}{numbers}  by {answer['served_by']}{guard}"


def _numbers(value: Any) -> str:
    if not isinstance(value, list):
        return f"{value:.4g}" if isinstance(value, float) else str(value)
    shown = " ".join(_numbers(one) for one in value[:8])
    return f"[{shown}{' …' if len(value) > 8 else ''}]"


class _Progress:
    """A bar on a terminal's stderr, only when it takes longer than SHOW_PROGRESS_AFTER_S."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._started_s = monotonic_s()
        self._shown = False

    def step(self) -> None:
        self._done += 1
        spent_s = monotonic_s() - self._started_s
        if spent_s < SHOW_PROGRESS_AFTER_S or not sys.stderr.isatty():
            return
        self._shown = True
        filled = 30 * self._done // self._total
        left_s = spent_s / self._done * (self._total - self._done)
        bar = "█" * filled + "·" * (30 - filled)
        print(f"\r{bar} {self._done}/{self._total} files, {left_s:.0f} s left ", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._shown:
            print(file=sys.stderr)


# --- where things are --------------------------------------------------------------------------------------
def _config_file(options: argparse.Namespace) -> Path:
    return Path(options.config or os.environ.get("EDGEWARDEN_CONFIG") or DEFAULT_CONFIG)


def _admin_socket(options: argparse.Namespace) -> Path:
    """From --socket, else looked up in the configuration without checking the rest of it."""
    if options.socket:
        return Path(options.socket)
    from agent.settings import read_settings

    settings = read_settings(_config_file(options), os.environ)
    configured = settings.look_up("admin", "socket")
    folder = settings.look_up("state", "folder") or "/var/lib/edgewarden"
    return settings.folder / Path(str(configured)) if configured else settings.folder / str(folder) / "admin.sock"


def _serving_address(options: argparse.Namespace) -> str:
    if options.server:
        return str(options.server)
    from agent.settings import read_settings

    settings = read_settings(_config_file(options), os.environ)
    unix = settings.look_up("serving", "unix")
    if unix is None:
        unix = "/run/edgewarden/serve.sock"
    address = f"unix:{settings.folder / str(unix)}" if unix else str(settings.look_up("serving", "tcp") or "")
    if not address:
        raise ConfigError("the configuration serves on no address", hint="Name one with --server.")
    return address


def _only_service(models: list[dict[str, Any]]) -> str:
    names = sorted(str(model["name"]) for model in models)
    if len(names) != 1:
        raise InvalidRequest(f"the agent serves {', '.join(names) or 'nothing'}", hint="Choose one with --service.")
    return names[0]


# --- printing ----------------------------------------------------------------------------------------------
def _show(document: dict[str, Any], *, clear: bool) -> None:
    from agent.screen import Look, draw

    # whoever reads a pipe or a file wants whole sentences
    width = shutil.get_terminal_size((100, 40)).columns if sys.stdout.isatty() else 0
    print(
        ("\033[H\033[2J" if clear and sys.stdout.isatty() else "") + draw(document, Look(width, _colour())),
        flush=True,
    )


def _told(options: argparse.Namespace, document: dict[str, Any], sentence: str) -> int:
    print(json.dumps(document, indent=2) if options.json else sentence)
    return 0


def _colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


# --- the command line --------------------------------------------------------------------------------------
def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edgewarden-agent",
        description="Serves models on this device, watches them, falls back and reports.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"Edgewarden {VERSION}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Any, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name, help=text, description=text, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        made.add_argument("--config", metavar="FILE", help="the agent's configuration (TOML)")
        made.set_defaults(command=command)
        return made

    def add_json(*made: argparse.ArgumentParser) -> None:
        for one in made:
            one.add_argument("--json", action="store_true", help="for programs")

    add("run", run, "Run the agent in the foreground until SIGTERM.")
    shown = add("status", status, "Show how the running agent is, on one screen, with reasons.")
    shown.add_argument(
        "--watch", nargs="?", const=2.0, type=_seconds, metavar="SECONDS", help="again every SECONDS (default 2)"
    )
    asked = add("infer", infer, "Answer inputs from files: .npy, .npz, .csv, or folders of them.")
    asked.add_argument("inputs", nargs="+", metavar="INPUT")
    where = asked.add_mutually_exclusive_group()
    where.add_argument("--artifact", metavar="FOLDER", help="ask this artifact directly, without an agent")
    where.add_argument("--server", metavar="ADDRESS", help="unix:/path or host:port (default: as configured)")
    asked.add_argument("--service", help="which service, when the agent serves several")
    checked = add("check-config", check_config, "Show every setting with its value and who set it.")
    pinned = add("pin", pin, "Let one engine serve, whatever happens, until `unpin`.")
    pinned.add_argument("service")
    pinned.add_argument("engine")
    released = add("unpin", unpin, "Give the choice of engine back to the agent.")
    released.add_argument("service")
    returned = add("rollback", rollback, "Go back to the models that served before the last update.")
    renewed = add("reload", reload, "Replace the worker by a new one with the same models; no client notices.")
    examined = add("doctor", doctor, "Look for what would keep the agent from working, and say what to do.")
    for one in (shown, pinned, released, returned, renewed):
        one.add_argument("--socket", metavar="PATH", help="the admin socket (default: as configured)")
    add_json(shown, asked, checked, pinned, released, returned, renewed, examined)
    return parser


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError("must lie between 0.1 and 3600")
    return value
