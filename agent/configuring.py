"""What the configurations of both sides share: sections, path types, and problems told with key, place and origin.

Knows no key: `agent.config` and `compressor.config` declare theirs. Unknown keys are refused with the nearest known
name; relative paths start at the folder of the configuration file.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, ValidationInfo

from agent.contract.errors import ConfigError
from agent.contract.topics import IDENTIFIER
from agent.settings import Key, Settings, read_settings

MAX_PROBLEMS = 5  # told at once


def _resolved(path: Path, info: ValidationInfo) -> Path:
    folder: Path = (info.context or {}).get("folder", Path.cwd())
    return folder / path.expanduser()


def _resolved_or_empty(text: str, info: ValidationInfo) -> str:
    return str(_resolved(Path(text), info)) if text else ""


def _resolved_or_system(text: str, info: ValidationInfo) -> str:
    return text if text == "system" else _resolved_or_empty(text, info)


def _identifier(text: str) -> str:
    if not IDENTIFIER.fullmatch(text):
        raise ValueError("must be 1 to 36 characters of a-z, 0-9 and '-'")
    return text


FilePath = Annotated[Path, AfterValidator(_resolved)]
OptionalPath = Annotated[str, AfterValidator(_resolved_or_empty)]
CaSource = Annotated[str, AfterValidator(_resolved_or_system)]
Identifier = Annotated[str, AfterValidator(_identifier)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Config = TypeVar("Config", bound=Section)


@dataclass(frozen=True, slots=True)
class Explained:
    """One effective value: what it is, who set it and what it means."""

    key: str
    value: str
    origin: str
    description: str


@dataclass(frozen=True, slots=True)
class Loaded(Generic[Config]):
    config: Config
    settings: Settings

    def explain(self) -> list[Explained]:
        """Every key with value and origin, in the order of the sections."""
        return list(_explain(self.config, self.settings, ()))


def load(model: type[Config], file: Path, environment: Mapping[str, str], *, hint: str = "") -> Loaded[Config]:
    """Read and merge the layers, and check each key by itself. `hint` ends a refusal.

    Raises:
        ConfigError: a file is missing or not TOML, a key is unknown, a value is missing, of the wrong type or out of
            range.
    """
    settings = read_settings(file, environment)
    try:
        config = model.model_validate(settings.values, context={"folder": settings.folder})
    except ValidationError as error:
        details = error.errors()
        problems = [_problem(detail, model, settings) for detail in details[:MAX_PROBLEMS]]
        more = f"; and {len(details) - MAX_PROBLEMS} more" if len(details) > MAX_PROBLEMS else ""
        raise ConfigError("; ".join(problems) + more, hint=hint) from None
    return Loaded(config, settings)


def check_pair(config: Section, first: str, second: str) -> None:
    """Refuse one of two values without the other; keys as in 'link.tls_cert'.

    Raises:
        ConfigError
    """
    given = []
    for key in (first, second):
        section, _, name = key.partition(".")
        given.append(bool(getattr(getattr(config, section), name)))
    if given[0] != given[1]:
        raise ConfigError(f"{first} and {second} belong together", hint="Set both or none.")


def nearest(name: str, known: list[str]) -> str:
    """What a wrong name may have meant, in a few words."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'" if close else f"known: {', '.join(known)}"


def _problem(detail: Any, model: type[Section], settings: Settings) -> str:
    place: Key = detail["loc"]
    name, where = _spoken(place, model), settings.origin(*place)
    if detail["type"] == "extra_forbidden":
        return f"unknown key {name} in {where} ({nearest(str(place[-1]), _known_keys(place[:-1], model))})"
    if detail["type"] == "missing":
        return f"{name} is missing in {settings.origin(*place[:-1])}"
    return f"{name} in {where}: {detail['msg'].removeprefix('Value error, ')} (found {detail['input']!r:.60})"


def _spoken(place: Key, model: type[Section]) -> str:
    """'link.port', or 'fallbacks' number 2 of [[service]] number 1: as a person sees it in the file."""
    if len(place) > 1 and isinstance(place[1], int) and _below(model, str(place[0])):
        table = f"[[{place[0]}]] number {place[1] + 1}"
        return f"{_spoken(place[2:], model)} of {table}" if place[2:] else table
    if len(place) > 1 and isinstance(place[-1], int):
        return f"{_spoken(place[:-1], model)} number {place[-1] + 1}"
    return f"'{'.'.join(str(part) for part in place)}'"


def _known_keys(place: Key, model: type[Section]) -> list[str]:
    for part in place:
        if isinstance(part, str):
            model = _below(model, part) or model
    return list(model.model_fields)


def _below(model: type[Section], name: str) -> type[Section] | None:
    """The section a key holds, alone or in a list; None where it holds a plain value."""
    field = model.model_fields.get(name)
    kinds = () if field is None else (field.annotation, *get_args(field.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def _explain(part: Section, settings: Settings, place: Key) -> Iterator[Explained]:
    for name, field in type(part).model_fields.items():
        value, key = getattr(part, name), (*place, name)
        if isinstance(value, Section):
            yield from _explain(value, settings, key)
        elif _below(type(part), name):
            for index, one in enumerate(value):
                yield from _explain(one, settings, (*key, index))
        else:
            yield Explained(
                key=".".join(str(item) for item in key),
                value=json.dumps(value, default=str),
                origin=settings.origin(*key),
                description=field.description or "",
            )
