"""Reference pages made from the code, so that they cannot say anything else: `scripts/render-docs`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pydantic import BaseModel

from agent.config import AgentConfig, ServiceSection
from agent.contract import artifact, errors, messages

REFERENCE = Path(__file__).resolve().parents[1] / "docs/reference"


def pages() -> dict[str, str]:
    """Every generated page by its path below docs/reference."""
    schemas = {
        "status": messages.Status,
        "birth": messages.Birth,
        "reported": messages.Reported,
        "tm": messages.Telemetry,
        "ev": messages.Event,
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
        assert isinstance(model, type)
        assert issubclass(model, BaseModel)
        lines += [
            "",
            f"## [[{name}]]" if name == "service" else f"## [{name}]",
            "",
            "| key | default | meaning |",
            "|---|---|---|",
        ]
        for key, field in model.model_fields.items():
            lines.append(f"| `{key}` | {_default(field)} | {field.description} |")
    return "\n".join(lines) + "\n"


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
        "Made from `agent/contract/errors.py` by `scripts/render-docs`. `code` travels in messages and reports; the",
        "exit code is what a command returns when this error ends it.",
        "",
        "| error | code | exit code | may succeed later |",
        "|---|---|---|---|",
    ]
    for error in _tree(errors.EdgewardenError):
        later = "yes" if error.retryable else "no"
        lines.append(f"| {error.__name__} | `{error.code}` | {error.exit_code} | {later} |")
    return "\n".join(lines) + "\n"


def _tree(error: type[errors.EdgewardenError]) -> list[type[errors.EdgewardenError]]:
    mine = [kind for kind in error.__subclasses__() if kind.__module__ == errors.__name__]
    return [error] + [below for kind in mine for below in _tree(kind)]


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
