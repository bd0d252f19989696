"""Layered settings: one TOML file, its drop-ins, the environment; every value keeps where it came from.

    agent.toml  <  agent.toml.d/*.toml (by name)  <  EDGEWARDEN_SECTION__KEY

Knows nothing of which keys exist: `agent.config` checks them. Plain Python, so that a light command can look
up one path without loading a validation library.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from agent.contract.errors import ConfigError

ENVIRONMENT_PREFIX = "EDGEWARDEN_"
MAX_FILE_BYTES = 1024 * 1024

Key = tuple[str | int, ...]
"""Where a value stands: ("link", "port") or ("service", 0, "name")."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What was written, merged. `origins` maps the place of every leaf to a few words for a person."""

    file: Path
    values: dict[str, Any]
    origins: dict[Key, str]

    @property
    def folder(self) -> Path:
        """Relative paths in the settings start here."""
        return self.file.parent

    def look_up(self, *key: str | int) -> Any:
        """The value at `key`, or None when nobody wrote it."""
        place: Any = self.values
        for part in key:
            try:
                place = place[part]
            except (KeyError, IndexError, TypeError):
                return None
        return place

    def origin(self, *key: str | int) -> str:
        """Who wrote the value at `key` or, for a table, the first value below it."""
        if key in self.origins:
            return self.origins[key]
        return next((origin for place, origin in self.origins.items() if place[: len(key)] == key), "default")


def read_settings(file: Path, environment: Mapping[str, str]) -> Settings:
    """Read and merge all layers.

    Tables merge key by key. Lists of tables with a `name` merge by that name, so a drop-in can change one
    service; other lists are replaced.

    Raises:
        ConfigError: the file is missing, unreadable or not TOML (with its line).
    """
    file = Path(file).absolute()
    settings = Settings(file=file, values={}, origins={})
    _merge(settings, _read_toml(file), str(file))
    for drop_in in sorted(file.with_name(file.name + ".d").glob("*.toml")):
        _merge(settings, _read_toml(drop_in), f"drop-in {drop_in}")
    for name, key, value in _from_environment(environment):
        _merge_at(settings, key, value, f"environment {name}")
    return settings


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_FILE_BYTES} bytes", hint="Is it really a configuration?")
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}", hint="Correct that line.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text", hint="Save it as UTF-8.") from None
    except OSError as error:
        raise ConfigError(
            f"cannot read the configuration {path}: {error.strerror}",
            hint="Name an existing file with --config; systemd/agent.toml is an example.",
        ) from None


def _from_environment(environment: Mapping[str, str]) -> Iterator[tuple[str, Key, Any]]:
    for name in sorted(environment):
        path = name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
        # EDGEWARDEN_X without "__" is not a setting: such names are free for scripts
        if name.startswith(ENVIRONMENT_PREFIX) and len(path) > 1:
            key: Key = tuple(int(part) if part.isdigit() else part for part in path)
            yield name, key, _typed(name, environment[name])


def _typed(name: str, text: str) -> Any:
    """Lists and tables are read as TOML; a plain word stays text and is turned into its type later."""
    if not text.startswith(("[", "{")):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"environment variable {name} is not a TOML list or table: {error}") from None


def _merge(settings: Settings, table: dict[str, Any], origin: str) -> None:
    for name, value in table.items():
        _merge_at(settings, (name,), value, origin)


def _merge_at(settings: Settings, key: Key, value: Any, origin: str) -> None:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            _merge_at(settings, (*key, name), inner, origin)
    elif _is_named_list(value):
        for item in value:
            _merge_at(settings, (*key, _index_of(settings, key, item["name"])), item, origin)
    else:
        _forget_below(settings, key)
        _write(settings.values, key, value, origin)
        settings.origins[key] = origin


def _is_named_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(i, dict) and "name" in i for i in value)


def _index_of(settings: Settings, key: Key, name: Any) -> int:
    present = settings.look_up(*key)
    items = present if isinstance(present, list) else []
    return next(
        (i for i, item in enumerate(items) if isinstance(item, dict) and item.get("name") == name), len(items)
    )


def _forget_below(settings: Settings, key: Key) -> None:
    for place in [place for place in settings.origins if place[: len(key)] == key]:
        del settings.origins[place]


def _write(values: dict[str, Any], key: Key, value: Any, origin: str) -> None:
    place: Any = values
    for part, following in pairwise(key):
        place = _descend(place, part, following, origin)
    if isinstance(key[-1], int):
        _fill(place, key[-1], origin)
    elif not isinstance(place, dict):
        raise _clash(key[-1], origin)
    place[key[-1]] = value


def _descend(place: Any, part: str | int, following: str | int, origin: str) -> Any:
    empty: Any = [] if isinstance(following, int) else {}
    if isinstance(part, int):
        _fill(place, part, origin)
    elif not isinstance(place, dict):
        raise _clash(part, origin)
    elif not isinstance(place.get(part), dict | list):
        place[part] = empty
    return place[part]


def _fill(place: Any, index: int, origin: str) -> None:
    if not isinstance(place, list) or index > len(place):
        raise _clash(index, origin)
    if index == len(place):
        place.append({})


def _clash(part: str | int, origin: str) -> ConfigError:
    return ConfigError(f"{origin}: '{part}' does not fit what is already configured at that place")
