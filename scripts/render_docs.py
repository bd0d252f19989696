"""Reference pages made from the code, so that they cannot say anything else: `scripts/render-docs`."""

from __future__ import annotations

import json
import sys
from enum import EnumType
from pathlib import Path
from types import NoneType
from typing import get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

import agent.ota.errors
import agent.session
import compressor.errors
import compressor.fleet.http
import compressor.reference
from agent.config import AgentConfig, GuardChannelSection, ServiceSection
from agent.contract import artifact, errors, messages

REFERENCE = Path(__file__).resolve().parents[1] / "docs/reference"
ERROR_MODULES = {
    errors: "Device and host",
    agent.session: "The link",
    agent.ota.errors: "Updates (device)",
    compressor.errors: "Compressor (host)",
    compressor.reference: "Drift references (host)",
    compressor.fleet.http: "Answers to devices (host)",
}


def pages() -> dict[str, str]:
    """Every generated page by its path below docs/reference."""
    schemas: dict[str, type[BaseModel]] = {
        "status": messages.Status,
        "birth": messages.Birth,
        "reported": messages.Reported,
        "tm": messages.Telemetry,
        "ev": messages.Event,
        "explanation": messages.DriftExplanation,
        "manifest": artifact.Manifest,
    }
    made = {f"schema/{name}.json": _schema(model) for name, model in schemas.items()}
    return made | {"agent-config.md": configuration(), "errors.md": error_codes()}


def _schema(model: type[BaseModel]) -> str:
    return json.dumps(model.model_json_schema(), indent=1, sort_keys=True) + "\n"


def configuration() -> str:
    lines = [
        "# Keys of agent.toml",
        "",
        "Made from `agent/config.py` by `scripts/render-docs`. Drop-ins `agent.toml.d/*.toml` and variables",
        "`EDGEWARDEN_SECTION__KEY` override single keys; `edgewarden-agent check-config` shows who set what.",
    ]
    for name, section in AgentConfig.model_fields.items():
        model = ServiceSection if name == "service" else section.annotation
        lines += _table(f"[[{name}]]" if name == "service" else f"[{name}]", model)
        if name == "guard":
            lines += _table("[[guard.channel]]", GuardChannelSection)
    return "\n".join(lines) + "\n"


def _table(title: str, model: object) -> list[str]:
    assert isinstance(model, type)
    assert issubclass(model, BaseModel)
    rows = [
        f"| `{key}` | {_values(field)} | {_default(field)} | {field.description} |"
        for key, field in model.model_fields.items()
    ]
    return ["", f"## {title}", "", "| key | values | default | meaning |", "|---|---|---|---|", *rows]


def _values(field: FieldInfo) -> str:
    """What may be written: the words of a choice, a number with its bounds, or the kind of value."""
    kind = field.annotation
    if get_origin(kind) is list:
        return "list"
    kinds = [one for one in get_args(kind) or (kind,) if one is not NoneType]
    words = [word for one in kinds for word in (one if isinstance(one, EnumType) else [one])]
    if not any(isinstance(word, type) for word in words):
        return ", ".join(f"`{json.dumps(word)}`" for word in words)
    name = {bool: "`true`, `false`", int: "integer", float: "number", Path: "path"}.get(kinds[0], "text")
    return ", ".join([name, *(bound for rule in field.metadata for bound in _bounds(rule))])


def _bounds(rule: object) -> list[str]:
    limits = {sign: getattr(rule, name, None) for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))}
    return [f"{sign} {limit:_}".removesuffix(".0") for sign, limit in limits.items() if limit is not None]


def _default(field: object) -> str:
    if field.is_required():  # type: ignore[attr-defined]
        return "required"
    if field.default_factory is not None:  # type: ignore[attr-defined]
        return "see meaning"
    value = field.default  # type: ignore[attr-defined]
    return "none" if value is None else f"`{json.dumps(value, default=str)}`"


def error_codes() -> str:
    lines = [
        "# Error codes",
        "",
        "Made from the error classes by `scripts/render-docs`. `code` travels in messages and reports; the exit code",
        "is what a command returns when this error ends it (9 is no running agent to `edgewarden-agent`, missing or",
        "unfit data to `edgewarden-compressor`). A wrong command line exits 2, an interrupt 130.",
    ]
    every = _tree(errors.EdgewardenError)
    for module, title in ERROR_MODULES.items():
        lines += ["", f"## {title}", ""]
        lines += ["| error | code | exit code | may succeed later |", "|---|---|---|---|"]
        for error in every:
            if error.__module__ == module.__name__:
                later = "yes" if error.retryable else "no"
                lines.append(f"| {error.__name__} | `{error.code}` | {error.exit_code} | {later} |")
    return "\n".join(lines) + "\n"


def _tree(error: type[errors.EdgewardenError]) -> list[type[errors.EdgewardenError]]:
    return [error] + [below for kind in error.__subclasses__() for below in _tree(kind)]


def main() -> int:
    check = sys.argv[1:] == ["--check"]
    stale = []
    for name, text in pages().items():
        path = REFERENCE / name
        if path.exists() and path.read_text() == text:
            continue
        stale.append(name)
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    print(f"{'out of date' if check else 'written'}: {', '.join(stale) or 'nothing'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
