"""`edgewarden-agent`: what a person types. The only file that prints.

Light commands start fast: what they do not need is not imported. Expected failures are one sentence on stderr and a
documented exit code, never a traceback.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent import VERSION
from agent.asking import ask
from agent.clock import monotonic_s, sleep
from agent.contract.errors import ArtifactError, ConfigError, EdgewardenError, InvalidRequest

if TYPE_CHECKING:
    from agent.batch import Asker, FileResult
    from agent.inputs import Wanted

DEFAULT_CONFIG = "/etc/edgewarden/agent.toml"
INTERRUPTED = 130
MAX_CONCURRENCY = 64
RELOAD_POLL_S = 0.02
SHOW_PROGRESS_AFTER_S = 2.0
REDRAW_S = 0.1

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
    from agent.batch import Batch
    from agent.inputs import find_files
    from agent.outputs import plan_outputs, write_outputs

    model, names = _model_and_inputs(options)
    files = find_files([Path(name) for name in names])
    targets = plan_outputs(files, Path(options.out), options.format) if options.out else {}
    asked = _artifact(Path(options.artifact)) if options.artifact else _agent(_serving_address(options), model)
    progress = _Progress(len(files))
    batch = Batch(asked.wanted, asked.make_asker, advance=progress.advance)
    failures: list[EdgewardenError] = []
    answered = 0
    try:
        for result in batch.run(files, concurrency=options.concurrency):
            progress.clear()
            error = result.error
            if error is None and targets:
                try:
                    write_outputs(targets[result.file], result.file, result.pieces, asked.labels)
                except EdgewardenError as failed:
                    error = failed
            if error is not None:
                failures.append(error)
                _tell_failure(options, result.file, error)
            else:
                answered += 1
                _tell_answers(options, result, asked.labels, targets.get(result.file))
    finally:
        progress.clear()
        if len(files) > 1 and (failures or answered < len(files)):
            text = f"{answered} of {len(files)} files were answered, {len(failures)} could not be"
            print(f"edgewarden-agent: {text}", file=sys.stderr)
    return failures[0].exit_code if failures else 0


# --- infer -------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class _Asked:
    """Who is asked: what it takes, the names of its classes, and how one asks it from a thread."""

    wanted: list[Wanted]
    labels: list[str]
    make_asker: Callable[[], Asker]


def _model_and_inputs(options: argparse.Namespace) -> tuple[str, list[str]]:
    """`infer MODEL INPUT...` and `infer INPUT...`: a first word that names no file can name the model."""
    from agent.inputs import KINDS

    first, *others = options.inputs
    named = options.service or options.artifact or not others
    if named or "/" in first or first.lower().endswith(KINDS) or Path(first).exists():
        return options.service or "", options.inputs
    return first, others


def _agent(address: str, model: str) -> _Asked:
    from agent.client import Client
    from agent.inputs import Wanted
    from agent.outputs import Piece

    with Client(address, retry_once=True) as client:
        service = model or _only_service(client.models())
        described = client.metadata(service)

    class OfAgent:
        def __init__(self) -> None:
            self._client = Client(address, retry_once=True)

        def ask(self, inputs: dict[str, Any]) -> Piece:
            given = self._client.infer(service, inputs)
            return Piece(None, given.outputs, given.served_by, given.reason, given.guard)

        def close(self) -> None:
            self._client.close()

    wanted = [Wanted(one["name"], one["datatype"], tuple(one["shape"])) for one in described["inputs"]]
    labels = described.get("parameters", {}).get("labels", [])
    return _Asked(wanted, labels if isinstance(labels, list) else [], OfAgent)


def _artifact(folder: Path) -> _Asked:
    from agent.contract.artifact import open_artifact
    from agent.contract.plan import TensorPlan
    from agent.engine import FloorEngine, OnnxEngine
    from agent.inputs import Wanted
    from agent.outputs import Piece

    artifact = open_artifact(folder)
    manifest = artifact.manifest
    wanted = [Wanted(one.name, one.datatype, tuple(one.shape)) for one in manifest.inputs]
    public = [one.name for one in manifest.outputs]
    if manifest.kind == "floor":
        outputs = tuple(TensorPlan(one.name, one.datatype, tuple(one.shape)) for one in manifest.outputs)
        inputs = tuple(TensorPlan(one.name, one.datatype, one.shape) for one in wanted)
        engine: Any = FloorEngine(manifest.floor_outputs or {}, inputs, outputs)
    else:
        engine = OnnxEngine.load(artifact.path("model"), sha256=manifest.blobs["model"].sha256, name=manifest.name)

    class OfArtifact:
        def ask(self, inputs: dict[str, Any]) -> Piece:
            return Piece(None, engine.run(inputs, public), manifest.name, "asked directly", "")

        def close(self) -> None:
            pass

    return _Asked(wanted, list(manifest.labels), OfArtifact)


def _tell_failure(options: argparse.Namespace, file: Path, error: EdgewardenError) -> None:
    sentence = error.sentence()
    named = sentence if str(file) in sentence else f"{file}: {sentence}"
    print(f"edgewarden-agent: {named}", file=sys.stderr)
    if options.json:
        print(json.dumps({"file": str(file), "error": sentence, "code": error.code}), flush=True)


def _tell_answers(options: argparse.Namespace, result: FileResult, labels: list[str], target: Path | None) -> None:
    from agent.outputs import answers, as_json

    if target is not None:
        count = sum(piece.rows or 1 for piece in result.pieces)
        told = {"file": str(result.file), "out": str(target), "rows": count}
        print(json.dumps(told) if options.json else f"{result.file} -> {target}  {count} rows", flush=True)
        return
    for answer in answers(result.file, result.pieces, labels):
        print(as_json(answer) if options.json else _answer_line(answer))
    sys.stdout.flush()


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
    """A bar on a terminal's stderr, when it takes longer than SHOW_PROGRESS_AFTER_S. Any thread may advance it."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0.0
        self._started_s = self._drawn_s = monotonic_s()
        self._shown = False
        self._lock = threading.Lock()

    def advance(self, share: float) -> None:
        """So much of a file is done; redraws a few times a second."""
        with self._lock:
            self._done = min(self._done + share, self._total)
            now_s = monotonic_s()
            spent_s = now_s - self._started_s
            if spent_s < SHOW_PROGRESS_AFTER_S or now_s - self._drawn_s < REDRAW_S or not sys.stderr.isatty():
                return
            self._drawn_s, self._shown = now_s, True
            filled = int(30 * self._done / self._total)
            left_s = spent_s / self._done * (self._total - self._done)
            bar = "█" * filled + "·" * (30 - filled)
            text = f"\r{bar} {int(self._done)}/{self._total} files, {left_s:.0f} s left \033[K"
            print(text, end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Make room for a line of text."""
        with self._lock:
            if self._shown:
                print("\r\033[K", end="", file=sys.stderr, flush=True)
                self._shown = False


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
    asked.usage = "%(prog)s [options] [MODEL] INPUT..."
    asked.add_argument("inputs", nargs="+", metavar="INPUT", help="files and folders; a model's name may stand first")
    where = asked.add_mutually_exclusive_group()
    where.add_argument("--artifact", metavar="FOLDER", help="ask this artifact directly, without an agent")
    where.add_argument("--server", metavar="ADDRESS", help="unix:/path or host:port (default: as configured)")
    asked.add_argument("--service", metavar="MODEL", help="which model, when the agent serves several")
    asked.add_argument("--out", metavar="FOLDER", help="write a file of answers for every input file")
    asked.add_argument("--format", choices=("npz", "csv", "jsonl"), default="npz", help="of these files (npz)")
    asked.add_argument(
        "--concurrency", type=_concurrency, default=1, metavar="N", help="files answered at the same time (1)"
    )
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


def _concurrency(text: str) -> int:
    value = int(text)
    if not 1 <= value <= MAX_CONCURRENCY:
        raise argparse.ArgumentTypeError(f"must lie between 1 and {MAX_CONCURRENCY}")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError("must lie between 0.1 and 3600")
    return value
