"""Commands about the fleet: `serve`, `device`, `drift`, `rollout`. Light ones load no server.

    serve --config F                     run the host
    device list|show|enrol               who is out there, what it runs, a one-time token for a new one
    drift list|show                      what was decided, on which numbers, for which reason
    rollout list|halt                    how far updates got
    rollout start|rollback SERVICE       offer published artifacts to devices, or go back to earlier ones

`register` adds them to the parser of `compressor.cli`, which translates errors into exit codes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.contract.errors import ConfigError

if TYPE_CHECKING:
    from compressor.config import HostConfig
    from compressor.fleet.approval import SignedRepository
    from compressor.fleet.catalogue import Catalogue
    from compressor.fleet.database import Connection, Database
    from compressor.fleet.proposal import Known, Wish
    from compressor.publish import Published
    from compressor.web.explanation import Told

Commands = Any  # argparse names the type of its sub-parsers privately
TOKEN_LIFETIME_S = 24 * 3600.0


def register(commands: Commands) -> None:
    """Add this module's commands to a parser."""
    serve = commands.add_parser("serve", help="run the host: ingest, decide, regenerate, publish, roll out, show")
    _common(serve, _serve, json_form=False)
    _group(commands, "device", "the devices of the fleet", {
        "list": (_device_list, "every device: presence, health, desired and reported version", ()),
        "show": (_device_show, "one device in full", ("device",)),
        "enrol": (_device_enrol, "make a one-time token with which a device enrols itself", ("device",)),
    })  # fmt: skip
    _group(commands, "drift", "what drift led to", {
        "list": (_drift_list, "decisions, newest first", ()),
        "show": (_drift_show, "one decision with its numbers and reason", ("decision",)),
    })  # fmt: skip
    rollouts = _group(commands, "rollout", "updates on their way", {
        "list": (_rollout_list, "rollouts, newest first", ()),
        "halt": (_rollout_halt, "offer it to nobody else", ("rollout",)),
    })  # fmt: skip
    start = "offer published artifacts to devices; the running host does it, once they are approved"
    _proposing(rollouts.add_parser("start", help=start), rollback=False)
    back = "go back to earlier versions, not below the signed minimum"
    _proposing(rollouts.add_parser("rollback", help=back), rollback=True)


def _proposing(parser: argparse.ArgumentParser, *, rollback: bool) -> None:
    parser.add_argument("service", metavar="SERVICE")
    parser.add_argument(
        "--artifact", action="extend", nargs="+", required=True, metavar="DIGEST", dest="artifacts",
        help="manifest digests, or their first 8 characters or more: the whole chain of the service",
    )  # fmt: skip
    parser.add_argument(
        "--order", type=_names, default=(), metavar="NAME,...",
        help="who answers, best first (default: the service's model, then its fallbacks as it names them)",
    )  # fmt: skip
    to = parser.add_mutually_exclusive_group()
    to.add_argument("--device", action="extend", nargs="+", default=[], metavar="DEVICE", dest="devices")
    to.add_argument("--cohort", default="", metavar="NAME", help="default: the one of [regeneration]")
    _common(parser, _rollout_start)
    parser.set_defaults(rollback=rollback)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _group(commands: Commands, name: str, text: str, verbs: dict[str, Any]) -> Commands:
    actions = commands.add_parser(name, help=text).add_subparsers(required=True, metavar="ACTION")
    for verb, (run, explanation, arguments) in verbs.items():
        parser = actions.add_parser(verb, help=explanation)
        for argument in arguments:
            parser.add_argument(argument, metavar=argument.upper())
        _common(parser, run)
    return actions


def _common(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int], *, json_form: bool = True
) -> None:
    parser.add_argument(
        "--config", type=Path, default=Path("/etc/edgewarden/compressor.toml"), metavar="FILE",
        help="the host's configuration (default %(default)s)",
    )  # fmt: skip
    if json_form:
        parser.add_argument("--json", action="store_true", help="print a document instead of text")
    parser.set_defaults(run=run)


# --- serve -----------------------------------------------------------------------------------------------------
def _serve(options: argparse.Namespace) -> int:
    from compressor.fleet.service import Service

    service = Service(_config(options), say=_speaker())
    service.run()
    return 0


def _speaker() -> Callable[[str, str, str], None]:
    """One line per thing worth saying: time, severity, what, sentence."""
    from agent.clock import iso, wall_s

    def say(severity: str, event: str, text: str) -> None:
        if severity != "debug":
            sys.stderr.write(f"{iso(wall_s())} {severity} {event} | {' '.join(text.split())}\n")

    return say


def _config(options: argparse.Namespace) -> HostConfig:
    from compressor.config import load_config

    return load_config(options.config, os.environ).config


@contextmanager
def _opened(options: argparse.Namespace) -> Iterator[tuple[HostConfig, Database]]:
    """The host's database, beside a running host. Raises: ConfigError when there is none yet."""
    from compressor.fleet.database import Database
    from compressor.fleet.database.store import DATABASE

    config = _config(options)
    if not (config.host.folder / DATABASE).exists() and options.run is not _device_enrol:
        raise ConfigError(
            f"there is no host in {config.host.folder}", hint="Start it with `edgewarden-compressor serve`."
        )
    database = Database(config.host.folder)
    try:
        yield config, database
    finally:
        database.close()


def _show(options: argparse.Namespace, document: Any, text: str) -> int:
    sys.stdout.write((json.dumps(document, indent=1, ensure_ascii=False) if options.json else text) + "\n")
    return 0


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]], *, empty: str) -> str:
    if not rows:
        return empty
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [head, *rows]
    )


# --- device ----------------------------------------------------------------------------------------------------
def _device_list(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from compressor.web import views

    with _opened(options) as (config, database), database.reading() as tx:
        devices = views.all_devices(tx, config, _catalogue(config))
    rows = [
        (d.id, d.cohort or "-", d.presence, ", ".join(f"{s.model} {s.health}" for s in d.services) or "-",
         str(d.desired or "-"), f"{d.seen or '-'} {d.update} {d.update_code}".rstrip(), d.last_seen)
        for d in devices
    ]  # fmt: skip
    head = ("DEVICE", "COHORT", "PRESENCE", "ANSWERS", "DESIRED", "REPORTED", "LAST SEEN (UTC)")
    return _show(options, [asdict(device) for device in devices], _table(head, rows, empty="No device yet."))


def _device_show(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from compressor.fleet.database import devices
    from compressor.web import views

    with _opened(options) as (config, database), database.reading() as tx:
        row = devices.find(tx, options.device)
        if row is None:
            raise ConfigError(f"nothing is known of a device '{options.device}'", hint="`device list` shows all.")
        view = views.device_view(row, config, _catalogue(config))
        events = views.events_view(tx, row.id)[:20]
        document = {
            **asdict(view), "birth": row.birth, "reported_document": row.reported, "vitals": row.vitals,
            "events": events, "refusals": views.refusals_view(tx, row.id),
        }  # fmt: skip
    because = f" ({view.presence_reason})" if view.presence_reason else ""
    lines = [
        f"{view.id}: {view.presence}{because}, cohort {view.cohort or 'none'}, last seen {view.last_seen} UTC",
        *(f"  {s.name}: {s.model} answers, {s.health}. {s.reason}" for s in view.services),
        f"  desired {view.desired or '-'}, reported {view.seen or '-'}: {view.update} {view.update_code}".rstrip(),
        *(f"  {event['at']} {event['severity']} {event['kind']}: {event['text']}" for event in events),
    ]
    return _show(options, document, "\n".join(lines))


def _device_enrol(options: argparse.Namespace) -> int:
    from agent.clock import wall_s
    from agent.contract.topics import check_identifier
    from compressor.fleet.database import devices
    from compressor.fleet.tokens import hash_token, new_token

    device, token = check_identifier(options.device), new_token()
    with _opened(options) as (config, database), database.writing() as tx:
        devices.add_token(tx, hash_token(token), device, now_s=wall_s(), lifetime_s=TOKEN_LIFETIME_S)
    url = config.http.public_url or f"http://{config.http.host}:{config.http.port}"
    document = {"device": device, "token": token, "url": f"{url}/enrol", "lifetime_s": TOKEN_LIFETIME_S}
    text = (
        f"Token for '{device}', good once within 24 hours:\n  {token}\n"
        f"On the device: write it into the file that enrolment.token_file names, and set enrolment.url to {url}/enrol"
    )
    return _show(options, document, text)


def _catalogue(config: HostConfig) -> Catalogue:
    from compressor.fleet.catalogue import Catalogue

    catalogue = Catalogue(Path(config.repository.folder) if config.repository.folder else None)
    catalogue.refresh()
    return catalogue


# --- drift -----------------------------------------------------------------------------------------------------
def _drift_list(options: argparse.Namespace) -> int:
    from compressor.web import views

    with _opened(options) as (_config, database), database.reading() as tx:
        decisions = views.decisions_view(tx, limit=100)
    rows = [(str(d["id"]), d["at"], d["kind"], f"{d['cohort']}/{d['service']}", d["reason"]) for d in decisions]
    head = ("ID", "SINCE (UTC)", "DECISION", "WHERE", "REASON")
    return _show(options, decisions, _table(head, rows, empty="Nothing was reported that asks for a decision."))


def _drift_show(options: argparse.Namespace) -> int:
    from agent.clock import wall_s
    from compressor.fleet.database import plans
    from compressor.web import views
    from compressor.web.explanation import explanations

    with _opened(options) as (config, database), database.reading() as tx:
        row = plans.decision(tx, int(options.decision)) if options.decision.isdecimal() else None
        if row is None:
            raise ConfigError(f"there is no decision '{options.decision}'", hint="`drift list` shows all.")
        decision = views.decision_view(row)
        told = explanations(tx, config, row.devices, service=row.service, now_s=wall_s())
    lines = [
        f"Decision {decision['id']}: {decision['kind']} (row '{decision['row']}' of the table)",
        f"  {decision['reason']}.",
        f"  cohort {decision['cohort']}, service {decision['service']}",
        f"  devices {', '.join(decision['devices']) or 'none'}",
        f"  since {decision['at']}, last looked at {decision['last_at']} UTC",
        *(f"  {name:<24} {value}" for name, value in decision["numbers"].items()),
        *(line for one in told for line in _explained(one)),
    ]
    document = {
        **decision, "numbers": row.numbers,
        "explanations": [
            {"device": one.device, "at": one.at, "over": one.over, "cohort": one.cohort, "explanation": one.document}
            for one in told
        ],
    }  # fmt: skip
    return _show(options, document, "\n".join(lines))


def _explained(told: Told) -> Iterator[str]:
    yield f"  {told.device} at {told.at} UTC, {f'over since {told.over}' if told.over else 'not over yet'}:"
    yield from (f"    {line}" for line in told.lines)
    if told.cohort:
        yield f"    in the fleet: {told.cohort}"


# --- rollout ---------------------------------------------------------------------------------------------------
def _rollout_list(options: argparse.Namespace) -> int:
    from compressor.web import views

    with _opened(options) as (config, database), database.reading() as tx:
        rollouts = views.updates_view(tx, _catalogue(config))["rollouts"]
    rows = [(str(r["id"]), r["state"], r["cohort"], ", ".join(r["models"]), r["since"], r["text"]) for r in rollouts]
    head = ("ID", "STATE", "COHORT", "MODELS", "SINCE (UTC)", "WHY")
    return _show(options, rollouts, _table(head, rows, empty="No rollout yet."))


def _rollout_halt(options: argparse.Namespace) -> int:
    from compressor.fleet.database import plans

    with _opened(options) as (_config, database), database.writing() as tx:
        known = options.rollout.isdecimal() and plans.change_rollout(tx, int(options.rollout), halt_asked=True)
        if not known:
            raise ConfigError(f"there is no rollout '{options.rollout}'", hint="`rollout list` shows all.")
    document = {"rollout": int(options.rollout), "halt_asked": True}
    return _show(options, document, f"Rollout {options.rollout} will be halted by the running host.")


def _rollout_start(options: argparse.Namespace) -> int:
    """Draft a rollout beside the running host, which offers it; `options.rollback`: lower versions are meant."""
    from agent.clock import wall_s
    from compressor.fleet.database import plans, timeline
    from compressor.fleet.proposal import Wish, propose

    with _opened(options) as (config, database):
        repository, catalogue = _signed(config), _catalogue(config)
        minimum, published = repository.policy(options.service).minimum_version, repository.published()
        with database.writing() as tx:
            wish = Wish(
                options.service, tuple(options.artifacts), _addressed(options, config, tx), options.order,
                options.rollback,
            )  # fmt: skip
            proposal = propose(wish, _known(tx, wish, published, minimum, catalogue))
            now_s = wall_s()
            number = plans.add_rollout(
                tx, cohort=_cohort(options, config), service=wish.service, job=None, state="draft",
                devices=list(wish.devices), versions={}, artifacts=proposal.artifacts, order=proposal.order,
                created_at=now_s, since=now_s, text="", rollback=wish.rollback,
            )  # fmt: skip
            what = ", ".join(catalogue.label(proposal.artifacts[name]) for name in proposal.order)
            whom = ", ".join(wish.devices)
            verb = "back to" if wish.rollback else "of"
            text = f"rollout {number} {verb} {what} to {whom} drafted by an operator"
            timeline.add(tx, "rollout", text, at=now_s)
        waiting = repository.unapproved(wish.service, list(proposal.artifacts.values()), wish.devices)
    document = {
        "rollout": number, "service": wish.service, "devices": list(wish.devices), "artifacts": proposal.artifacts,
        "order": proposal.order, "rollback": wish.rollback, "unapproved": waiting,
    }  # fmt: skip
    then = (
        f"It waits until {', '.join(map(catalogue.label, waiting))} is approved: "
        f"`edgewarden-compressor publish --approve ARTIFACT ...`; `rollout list` says so."
        if waiting
        else "The running host offers it; `rollout list` shows how far it got."
    )
    return _show(options, document, f"Rollout {number} {verb} {what} to {whom} is drafted.\n{then}")


def _signed(config: HostConfig) -> SignedRepository:
    """Raises: ConfigError: this host signs nothing."""
    from compressor.fleet.approval import SignedRepository
    from compressor.keys import KeyRing

    if not config.repository.folder:
        raise ConfigError(
            "this host has no update repository", hint="Set repository.folder and repository.keys, then restart it."
        )
    return SignedRepository(Path(config.repository.folder), KeyRing(Path(config.repository.keys)))


def _cohort(options: argparse.Namespace, config: HostConfig) -> str:
    """The cohort that is addressed; "" = devices are, by name."""
    return "" if options.devices else str(options.cohort or config.regeneration.cohort)


def _addressed(options: argparse.Namespace, config: HostConfig, tx: Connection) -> tuple[str, ...]:
    """Ids of the devices that shall get it. Raises: ConfigError."""
    from compressor.fleet.database import devices

    cohort = _cohort(options, config)
    if cohort and not config.fleet.cohorts.get(cohort):
        named = ", ".join(sorted(config.fleet.cohorts)) or "none"
        raise ConfigError(
            f"no device is in a cohort '{cohort}'", hint=f"fleet.cohorts names {named}; or use --device."
        )
    known = devices.known(tx) | {one for members in config.fleet.cohorts.values() for one in members}
    wanted = sorted(set(options.devices or config.fleet.cohorts[cohort]))
    strangers = [device for device in wanted if device not in known]
    if strangers:
        raise ConfigError(f"nothing is known of a device '{strangers[0][:60]}'", hint="`device list` shows all.")
    return tuple(wanted)


def _known(
    tx: Connection, wish: Wish, published: Sequence[Published], minimum: Mapping[str, int], catalogue: Catalogue
) -> Known:
    from compressor.fleet.database import devices, plans
    from compressor.fleet.proposal import Known

    manifests = {
        entry.digest: found.manifest
        for entry in published
        if entry.family == wish.service and (found := catalogue.find(entry.digest)) is not None
    }
    rows = [row for device in wish.devices if (row := devices.find(tx, device)) is not None]
    carried = {row.id: dict((row.birth or {}).get("artifacts", {})) for row in rows}
    digests = {digest for engines in carried.values() for digest in engines.values()}
    return Known(
        published=manifests,
        minimum=minimum,
        carried=carried,
        versions={digest: found.manifest.version for digest in digests if (found := catalogue.find(digest))},
        busy={
            device: row.id
            for row in plans.rollouts(tx, states=plans.OPEN_ROLLOUTS)
            if not row.halt_asked
            for device in row.devices
        },
    )
