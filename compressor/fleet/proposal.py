"""What an operator wants to roll out, held against what is published, what devices carry and what is under way.

Pure. Refuses early, with words, what every device would refuse anyway; devices decide for themselves all the same
(`agent.ota.acceptance`). Leaves to others: who signs and when it is offered (`offers`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from agent.contract.artifact import Manifest
from agent.contract.errors import ConfigError

LEAST_DIGEST = 8  # characters of a digest that may stand for all of it


@dataclass(frozen=True, slots=True)
class Wish:
    """artifacts: digests or their beginnings; order: names, () = as the manifests say; rollback: go back to them."""

    service: str
    artifacts: tuple[str, ...]
    devices: tuple[str, ...]
    order: tuple[str, ...] = ()
    rollback: bool = False


@dataclass(frozen=True, slots=True)
class Known:
    """What there is. published: digest -> manifest, of this service; minimum: name -> lowest version allowed.

    carried: device -> engine -> digest, as devices say; versions: digest -> version, as far as known here;
    busy: device -> the rollout that is under way there.
    """

    published: Mapping[str, Manifest]
    minimum: Mapping[str, int]
    carried: Mapping[str, Mapping[str, str]]
    versions: Mapping[str, int]
    busy: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Proposal:
    """artifacts: name -> manifest digest; order: who answers, best first."""

    artifacts: dict[str, str]
    order: list[str]


def propose(wish: Wish, known: Known) -> Proposal:
    """The rollout that fulfils the wish.

    Raises:
        ConfigError: something is not published, incomplete, below a minimum, a step back that was not meant as one
            or one that leads nowhere, or devices are busy with another rollout.
    """
    artifacts = _named(wish, known)
    order = _ordered(wish, {name: known.published[digest] for name, digest in artifacts.items()})
    for name, digest in artifacts.items():
        _check_minimum(name, known.published[digest].version, known.minimum.get(name, 0))
    _check_direction(wish, known, artifacts)
    busy = {device: known.busy[device] for device in wish.devices if device in known.busy}
    if busy:
        number = min(busy.values())
        raise ConfigError(
            f"rollout {number} is under way on {', '.join(sorted(busy))}",
            hint=f"Wait until it ends, or stop it with `rollout halt {number}`.",
        )
    return Proposal(artifacts, order)


def order_of(manifests: Sequence[Manifest], service: str) -> list[str]:
    """Who answers, best first: the service's own model, its fallbacks as it names them, then whatever is left."""
    names = [manifest.name for manifest in manifests]
    active = next((manifest for manifest in manifests if manifest.name == service), manifests[0])
    wanted = [active.name, *active.fallbacks, *sorted(names)]
    return list(dict.fromkeys(name for name in wanted if name in names))


def _named(wish: Wish, known: Known) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in wish.artifacts:
        digest = _digest(text, wish.service, known.published)
        name = known.published[digest].name
        if found.get(name, digest) != digest:
            raise ConfigError(f"'{name}' is named twice", hint="Name one digest of each artifact.")
        found[name] = digest
    return found


def _digest(text: str, service: str, published: Mapping[str, Manifest]) -> str:
    matching = [digest for digest in published if digest.startswith(text)] if len(text) >= LEAST_DIGEST else []
    if len(matching) == 1:
        return matching[0]
    newest = sorted(published, key=lambda digest: (published[digest].name, published[digest].version))
    there = ", ".join(f"{published[one].name} v{published[one].version} {one[:16]}" for one in newest)
    what = "stands for several manifests" if matching else f"is no published manifest of '{service}'"
    raise ConfigError(
        f"'{text[:64]}' {what}",
        hint=f"Published: {there}." if there else "Publish one first: `edgewarden-compressor publish ARTIFACT`.",
    )


def _ordered(wish: Wish, chosen: Mapping[str, Manifest]) -> list[str]:
    if wish.order:
        if sorted(wish.order) != sorted(chosen):
            raise ConfigError(
                f"--order names {', '.join(wish.order)}, the artifacts are {', '.join(sorted(chosen))}",
                hint="Name each of them once, best first.",
            )
        return list(wish.order)
    order = order_of(list(chosen.values()), wish.service)
    missing = [name for name in chosen[order[0]].fallbacks if name not in chosen]
    if missing:
        raise ConfigError(
            f"'{order[0]}' has fallbacks that would be gone: {', '.join(missing)}",
            hint="Name their digests too, or say with --order that it shall serve without them.",
        )
    return order


def _check_minimum(name: str, version: int, minimum: int) -> None:
    if version < minimum:
        raise ConfigError(
            f"'{name}' version {version} is below the signed minimum {minimum}: every device would refuse it",
            hint="A minimum is never lowered: publish what should run as a new version.",
        )


def _check_direction(wish: Wish, known: Known, artifacts: Mapping[str, str]) -> None:
    """A step back has to be meant, and a rollback has to be one. What devices do not tell is left to them."""
    steps = {
        (device, name): (known.versions.get(known.carried.get(device, {}).get(name, "")), digest)
        for device in wish.devices
        for name, digest in artifacts.items()
    }
    back = {
        place: version
        for place, (version, digest) in steps.items()
        if version is not None
        and digest != known.carried[place[0]][place[1]]
        and known.published[digest].version <= version
    }
    if back and not wish.rollback:
        device, name = min(back)
        raise ConfigError(
            f"{device} runs '{name}' version {back[device, name]} and would refuse version "
            f"{known.published[artifacts[name]].version}: it is not newer",
            hint="To go back, use `rollout rollback`.",
        )
    if wish.rollback and not back and all(version is not None for version, _ in steps.values()):
        raise ConfigError(
            f"none of {', '.join(wish.devices)} runs anything newer", hint="To go forward, use `rollout start`."
        )
