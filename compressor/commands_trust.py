"""`edgewarden-compressor keys ...` and `publish`: the part of the command line that makes and uses keys.

    keys init --keys DIR [--family NAME ...]      every key of a fleet, once
    keys show --keys DIR                          names, key ids, which private files are here
    keys rotate NAME --keys DIR --repository REPO
    publish ARTIFACT... --keys DIR --repository REPO [--approve]

`register` adds them to the parser of `compressor.cli`, which translates errors into exit codes. Heavy imports
happen inside the commands.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agent.contract.repository import FamilyPolicy
    from compressor.keys import KeyRing
    from compressor.publish import Repository

Subparsers = Any  # argparse's own type is private


def register(subparsers: Subparsers) -> None:
    """Add `keys` and `publish`; each sets `run`, called with the parsed options and returning the exit code."""
    keys = subparsers.add_parser("keys", help="make, show and rotate the keys that devices trust")
    actions = keys.add_subparsers(required=True, metavar="ACTION")
    init = _action(actions, "init", _init, "make every key of a fleet, once")
    init.add_argument("--family", action="append", default=[], metavar="NAME", help="a service (default: wrist)")
    _action(actions, "show", _show, "names, key ids, and which private files are here")
    rotate = _action(actions, "rotate", _rotate, "replace one key; run again after an interruption")
    rotate.add_argument("name", help="such as timestamp, pipeline-wrist, director, root1")
    rotate.add_argument("--repository", type=Path, required=True, metavar="DIR", help="the repository to sign anew")
    add = _action(actions, "add", _add, "a key and the policy 'approve' for one more service")
    add.add_argument("family", help="the name of the service")
    add.add_argument("--repository", type=Path, required=True, metavar="DIR", help="the repository that learns of it")
    publish = _action(subparsers, "publish", _publish, "sign artifacts into the update repository")
    publish.add_argument("artifacts", nargs="*", type=Path, metavar="ARTIFACT", help="artifact folders")
    publish.add_argument("--repository", type=Path, required=True, metavar="DIR", help="made when it is not there")
    publish.add_argument("--approve", action="store_true", help="confirm them with the offline targets key")
    publish.add_argument(
        "--policy", choices=("approve", "auto"), help="who may run what the pipeline signed, unapproved"
    )
    publish.add_argument("--canary", action="append", default=[], metavar="DEVICE", help="with --policy auto")
    publish.add_argument(
        "--minimum",
        action="append",
        default=[],
        metavar="NAME=VERSION",
        help="devices refuse anything lower for ever",
    )
    publish.add_argument("--root", type=Path, metavar="FILE", help="write the root that devices embed")


def _action(actions: Subparsers, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=text)
    parser.add_argument("--keys", type=Path, required=True, metavar="DIR", help="folder of private keys")
    parser.add_argument("--passphrase-file", type=Path, metavar="FILE", help="if the keys are encrypted")
    parser.add_argument("--json", action="store_true", help="print a document instead of lines")
    parser.set_defaults(run=run)
    return parser


# --- keys --------------------------------------------------------------------------------------------------
def _init(options: argparse.Namespace) -> int:
    from compressor.keys import KeyRing, read_passphrase

    families = options.family or ["wrist"]
    ring = KeyRing.create(options.keys, families, passphrase=read_passphrase(options.passphrase_file))
    lines = [
        f"{len(ring.names)} keys in {options.keys}",
        "Move root1.pem, root2.pem, root3.pem and targets.pem offline once the repository is made.",
    ]
    return _say(options, _key_document(ring), lines)


def _show(options: argparse.Namespace) -> int:
    document = _key_document(_ring(options))
    lines = [f"{name:<18} {key['keyid'][:16]}  {key['private']}" for name, key in document["keys"].items()]
    return _say(options, document, lines)


def _rotate(options: argparse.Namespace) -> int:
    from compressor.publish import Repository

    ring = _ring(options)
    Repository(options.repository, ring).rotate(options.name)
    return _say(options, _key_document(ring), [f"{options.name} is replaced; the old key is worth nothing now"])


def _add(options: argparse.Namespace) -> int:
    from agent.contract.errors import ConfigError
    from agent.contract.repository import FamilyPolicy
    from compressor.publish import Repository

    ring = _ring(options)
    repository = Repository(options.repository, ring)
    if options.family in ring.families:
        try:
            repository.policy(options.family)
        except ConfigError:  # interrupted between key and policy
            pass
        else:
            raise ConfigError(f"'{options.family}' has its key and policy already")
    ring.add_family(options.family)
    repository.set_policy(options.family, FamilyPolicy())
    return _say(options, _key_document(ring), [f"artifacts of '{options.family}' can be published now"])


def _key_document(ring: KeyRing) -> dict[str, Any]:
    from agent.contract.signed import key_id

    return {
        "keys": {
            name: {
                "keyid": key_id(ring.public(name)),
                "private": _private(ring, name),
                "public": ring.public(name).hex(),
            }
            for name in ring.names
        }
    }


def _private(ring: KeyRing, name: str) -> str:
    if ring.is_rotating(name):
        return "rotation unfinished"
    return "here" if (ring.folder / f"{name}.pem").exists() else "offline"


def _ring(options: argparse.Namespace) -> KeyRing:
    from compressor.keys import KeyRing, read_passphrase

    return KeyRing(options.keys, passphrase=read_passphrase(options.passphrase_file))


# --- publish -----------------------------------------------------------------------------------------------
def _publish(options: argparse.Namespace) -> int:
    from compressor.files import write_file

    repository = _repository(options)
    digests = repository.publish(options.artifacts)
    if options.approve:
        repository.approve(digests)
    if options.root:
        write_file(options.root, repository.trusted_root())
    found = {entry.digest: entry for entry in repository.published()}
    entries = [found[digest] for digest in digests]
    document = {
        "repository": str(options.repository),
        "published": [
            {"name": entry.name, "version": entry.version, "digest": entry.digest, "approved": entry.approved}
            for entry in entries
        ],
        "days_left": {role: round(days, 1) for role, days in repository.days_left().items()},
    }
    lines = [
        f"{entry.name} {entry.version}  {entry.digest[:16]}  {'approved' if entry.approved else 'not approved'}"
        for entry in entries
    ]
    return _say(options, document, lines or [f"{options.repository} is signed; nothing was added"])


def _repository(options: argparse.Namespace) -> Repository:
    """The repository, made or given a new policy first if that is asked for."""
    from compressor.publish import Repository

    ring = _ring(options)
    if not Repository.exists(options.repository):
        policy = _policy(options)
        return Repository.init(options.repository, ring, dict.fromkeys(ring.families, policy))
    repository = Repository(options.repository, ring)
    if options.policy or options.canary or options.minimum:
        for family in ring.families:
            repository.set_policy(family, _policy(options))
    return repository


def _policy(options: argparse.Namespace) -> FamilyPolicy:
    from agent.contract.errors import ConfigError
    from agent.contract.repository import FamilyPolicy

    minimum = {}
    for text in options.minimum:
        name, _, version = text.partition("=")
        if not version.isdecimal():
            raise ConfigError(f"'{text}' is no minimum version", hint="Write it as NAME=VERSION, as in wrist=2.")
        minimum[name] = int(version)
    return FamilyPolicy(options.policy or "approve", tuple(options.canary), minimum)


def _say(options: argparse.Namespace, document: dict[str, Any], lines: list[str]) -> int:
    text = json.dumps(document, indent=1, sort_keys=True) if options.json else "\n".join(lines)
    sys.stdout.write(text + "\n")
    return 0
