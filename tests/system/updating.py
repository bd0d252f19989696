"""A fleet with one device that is updated: keys, a signed repository behind a real server, and a director's words."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from agent.clock import wall_s
from agent.contract.artifact import FILES, MANIFEST, Blob, open_artifact, parse_manifest, sha256
from agent.contract.desired import Desired, SignedCommand, seal
from agent.contract.repository import FamilyPolicy
from agent.contract.topics import Topics
from compressor.keys import KeyRing
from compressor.publish import Repository
from scripts.story.subscriber import Subscriber
from tests.agent.ota.server import Server, serving
from tests.system.conftest import DEVICE, FLEET, WAIT_S, Agent, wait_until

ENDS = frozenset({"committed", "rejected", "failed", "quarantined", "rolled_back", "superseded"})
TOPICS = Topics(FLEET, DEVICE)


class Director:
    """Signs and publishes what the device shall do; `keys` of another ring are a stranger's."""

    def __init__(self, keys: KeyRing, repository: Repository, server: Server, subscriber: Subscriber) -> None:
        self.keys = keys
        self.repository = repository
        self.server = server
        self.subscriber = subscriber
        self.version = 0
        self.seq = 0
        self.digests: dict[str, str] = {}

    def publish(self, folders: dict[str, Path]) -> dict[str, str]:
        """Sign artifacts into the repository; engine -> digest."""
        return dict(zip(folders, self.repository.publish(list(folders.values())), strict=True))

    def want(self, artifacts: dict[str, str], *, keys: KeyRing | None = None, **fields: Any) -> int:
        """Say what is desired; returns the document's version."""
        self.version += 1
        fields = {"device": DEVICE, "version": self.version, "repository": self.server.url, **fields}
        order = [name for name in ("wrist", "wrist-accel", "wrist-floor", "wrist-faulty") if name in artifacts]
        services = {"wrist": {"artifacts": artifacts, "order": order}}
        document = Desired(issued_at=wall_s(), services=services, **fields)
        self.retain(seal(document, (keys or self.keys).private("director")))
        return document.version

    def retain(self, envelope: bytes) -> None:
        self.subscriber.publish(TOPICS.desired, envelope, retain=True)

    def order(self, op: str, body: dict[str, Any] | None = None, **fields: Any) -> int:
        """Send a signed command; returns its number."""
        self.seq += 1
        fields = {"device": DEVICE, "seq": self.seq, "not_after": wall_s() + 60.0, **fields}
        command = SignedCommand(op=op, nonce="0123456789abcdef", body=body or {}, **fields)
        self.subscriber.publish(TOPICS.command(op), seal(command, self.keys.private("director")), retain=False)
        return command.seq

    def reply(self, op: str, seq: int) -> dict[str, Any]:
        def found() -> dict[str, Any] | None:
            replies = self.subscriber.documents(DEVICE, f"res/{op}")
            return next((one for one in replies if one["seq"] == seq), None)

        answer: dict[str, Any] = wait_until(found, f"the answer to {op} {seq}")
        return answer

    def states(self, version: int) -> list[str]:
        """The states the device told of one desired version, each once.

        Of its events: a `reported` document may take the place of one that was not sent yet.
        """
        seen = [one["details"] for one in said(self.subscriber, "update")]
        return list(dict.fromkeys(one["state"] for one in seen if one.get("version") == version))

    def reports(self) -> list[dict[str, Any]]:
        return self.subscriber.documents(DEVICE, "reported")

    def code(self) -> str:
        """What the newest report complains of; "" = nothing, or no report yet."""
        return next((str(one["code"]) for one in reversed(self.reports())), "")

    def end(self, version: int, *, within_s: float = WAIT_S) -> dict[str, Any]:
        """What the device reported when it was done with a desired version."""

        def found() -> dict[str, Any] | None:
            done = [
                one for one in self.reports() if one["desired_version"] == version and one["update_state"] in ENDS
            ]
            return done[-1] if done else None

        report: dict[str, Any] = wait_until(found, f"desired version {version} comes to an end", within_s=within_s)
        return report


@contextlib.contextmanager
def fleet(folder: Path, subscriber: Subscriber, *, canary: tuple[str, ...] = (DEVICE,)) -> Iterator[Director]:
    """Keys and a repository with policy `auto`, served."""
    keys = KeyRing.create(folder / "keys", ["wrist"])
    repository = Repository.init(folder / "repository", keys, {"wrist": FamilyPolicy("auto", canary)})
    (folder / "root.json").write_bytes(repository.trusted_root())
    with serving(repository.folder) as server:
        yield Director(keys, repository, server, subscriber)


def update_toml(folder: Path, url: str = "", *, probation_s: float = 0.5, **more: str) -> str:
    """TOML of an agent that obeys this fleet's director; `more`: key="value" of [update]."""
    lines = [f'{name} = "{value}"' for name, value in more.items()]
    return "\n".join([
        "[update]", "enabled = true", f'root = "{folder / "root.json"}"', f'repository = "{url}"',
        f"probation_s = {probation_s}", *lines, "",
    ])  # fmt: skip


def next_version(
    artifacts: dict[str, Path],
    folder: Path,
    version: int,
    *,
    names: tuple[str, ...] = ("wrist", "wrist-accel"),
    wrong: bool = False,
    device_class: str = "",
    wrist: str = "wrist",
) -> dict[str, Path]:
    """Copies of these artifacts with another version; `wrong`: the first answers its golden inputs wrongly;
    `wrist`: whose model the engine `wrist` gets.
    """
    made = {}
    for name in names:
        made[name] = folder / f"v{version}" / name
        shutil.copytree(artifacts[wrist if name == "wrist" else name], made[name])
        changes: dict[str, Any] = {"version": version, "name": name}
        if wrong and name == names[0]:
            _spoil(made[name])
            changes["blobs"] = {**open_blobs(made[name]), "golden": _blob(made[name], "golden")}
        manifest = parse_manifest((made[name] / MANIFEST).read_bytes())
        if device_class:
            budgets = [one.model_copy(update={"device_class": device_class}) for one in manifest.budgets]
            changes["budgets"] = budgets
        (made[name] / MANIFEST).write_bytes(manifest.model_copy(update=changes).encode())
        open_artifact(made[name])
    return made


def open_blobs(folder: Path) -> dict[str, Blob]:
    return dict(parse_manifest((folder / MANIFEST).read_bytes()).blobs)


def _spoil(folder: Path) -> None:
    with np.load(folder / FILES["golden"]) as golden:
        arrays = dict(golden)
    arrays["out_probability"] = arrays["out_probability"][:, ::-1].copy()
    np.savez(folder / FILES["golden"], **arrays)


def _blob(folder: Path, role: str) -> Blob:
    data = (folder / FILES[role]).read_bytes()
    return Blob(file=FILES[role], size=len(data), sha256=sha256(data))


def versions(agent: Agent) -> dict[str, int]:
    """Engine -> version that serves."""
    return {one["engine"]: one["version"] for one in agent.service()["engines"]}


def said(subscriber: Subscriber, kind: str) -> list[dict[str, Any]]:
    return [event for event in subscriber.events() if event["kind"] == kind]
