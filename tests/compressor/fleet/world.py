"""A steward without network or time, its database, and everything it touches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from agent.contract.artifact import sha256
from agent.contract.topics import Topics
from compressor.config import HostConfig
from compressor.fleet import ingest
from compressor.fleet.catalogue import Catalogue
from compressor.fleet.database import Database, devices, messages, plans, timeline
from compressor.fleet.inbox import EventSeen, Key, ReplySeen, ReportedSeen, TelemetrySeen
from compressor.fleet.means import Means
from compressor.fleet.steward import Steward
from tests.compressor.fleet.doubles import (
    DEVICES,
    FLEET,
    NOW,
    REFERENCE,
    FakeDirector,
    FakePublisher,
    FakeTrainer,
    FakeWire,
    artifact_folder,
    drift_window,
    recording,
)


def config_of(folder: Path, **regeneration: Any) -> HostConfig:
    (folder / "recipe.toml").write_text("")
    return HostConfig.model_validate({
        "host": {"folder": folder / "host"},
        "fleet": {"name": FLEET, "cohorts": {"canary": list(DEVICES)}, "patience_s": 10, "collect_s": 60,
                  "sample_timeout_s": 100},
        "repository": {"folder": str(folder / "repository"), "keys": str(folder / "keys")},
        "regeneration": {"recipe": str(folder / "recipe.toml"), "service": "wrist", "budget_per_day": 1,
                         "update_deadline_s": 200, "soak_s": 30, **regeneration},
    })  # fmt: skip


class World:
    """A steward, its database and everything it touches; time is a number."""

    def __init__(self, folder: Path, **regeneration: Any) -> None:
        self.folder = folder
        self.config = config_of(folder, **regeneration)
        self.database = Database(self.config.host.folder)
        self.trainer, self.wire, self.director = FakeTrainer(), FakeWire(), FakeDirector()
        self.publisher = FakePublisher(folder / "repository")
        self.now = NOW
        self.seq = 0
        self.steward = self.new_steward()

    def new_steward(self) -> Steward:
        means = Means(
            trainer=self.trainer, publisher=self.publisher, director=self.director, wire=self.wire,
            topics=lambda device: Topics(FLEET, device), public_url=lambda: "http://host:1",
            say=lambda *_words: None,
        )  # fmt: skip
        return Steward(self.config, self.database, Catalogue(self.folder / "repository"), means)

    # --- what devices do ---
    def hear(self, item: Any) -> None:
        with self.database.writing() as tx:
            if isinstance(item, EventSeen | TelemetrySeen):
                messages.admit(tx, [item], now_s=self.now)
            ingest.note(tx, item, now_s=self.now)

    def key(self, device: str) -> Key:
        self.seq += 1
        return Key(device, "b1", self.seq)

    def drifts(self, device: str, *, reference: bytes = REFERENCE[1], evidence: bool = True, **details: Any) -> None:
        if evidence:
            window = drift_window(reference=reference)
            fields = {name: window.pop(name) for name in ("service", "view", "reference", "rows")}
            self.hear(TelemetrySeen(self.key(device), NOW, ({**fields, "body": window},), (), {"health": {}}))
        said = {"raised": True, "alarm": "drift", "guards": [], "single_channel": False, "persisted_windows": 64,
                "reference": sha256(reference)}  # fmt: skip
        self.hear(EventSeen(self.key(device), NOW, "warning", "drift", "wrist", "left all regimes", ("ax",), {},
                            said | details))  # fmt: skip

    def breaks(self, device: str, *channels: str) -> None:
        self.hear(EventSeen(self.key(device), NOW, "warning", "sensor", "wrist", "gx is dead", channels, {},
                            {"raised": True, "alarm": "dead", "level": "broken-input"}))  # fmt: skip

    def publishes(self, version: int, name: str = "wrist") -> str:
        (digest,) = self.publisher.publish([artifact_folder(self.folder / f"{name}-{version}", version, name)])
        return digest

    def starts(self, artifacts: dict[str, str], *members: str, rollback: bool = False) -> int:
        """A rollout as an operator's command drafts it."""
        with self.database.writing() as tx:
            return plans.add_rollout(
                tx, cohort="", service="wrist", job=None, state="draft", devices=list(members), versions={},
                artifacts=artifacts, order=list(artifacts), created_at=self.now, since=self.now, text="",
                rollback=rollback,
            )  # fmt: skip

    def holds_recording(self, device: str, reference: bytes) -> None:
        with self.database.writing() as tx:
            path = self.folder / f"{device}.npz"
            path.write_bytes(recording())
            devices.change(tx, device, now_s=self.now)
            plans.add_sample(tx, id=f"of-{device}", device=device, service="wrist", reference=sha256(reference),
                             decision=0, token_sha256="0" * 64, max_bytes=10, asked_at=self.now)  # fmt: skip
            plans.change_sample(tx, f"of-{device}", state="accepted", settled_at=self.now, path=str(path))

    def delivers(self, device: str) -> None:
        with self.database.writing() as tx:
            (sample,) = plans.samples(tx, device=device, states=("asked",))
            path = self.folder / f"{device}.npz"
            path.write_bytes(recording())
            plans.change_sample(tx, sample.id, state="accepted", settled_at=self.now, path=str(path), size_bytes=10)

    def reports(self, device: str, version: int, state: str, code: str = "") -> None:
        self.hear(ReportedSeen(device, "b1", {"desired_version": version, "update_state": state, "code": code}))

    # --- what happened ---
    def step(self, *replies: ReplySeen, later_s: float = 1.0) -> bool:
        self.now += later_s
        return self.steward.step(replies, now_s=self.now)

    def rows(self) -> list[str]:
        """Rows of the table that decided, oldest first."""
        with self.database.reading() as tx:
            return [row.row for row in plans.decisions(tx)][::-1]

    def story(self, what: str) -> list[str]:
        with self.database.reading() as tx:
            return [row.text for row in timeline.newest(tx, limit=1000) if row.what == what][::-1]

    def rollout(self) -> Any:
        with self.database.reading() as tx:
            return plans.rollouts(tx)[-1]

    def desired(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """Device -> the key that signed what is retained for it, and what that says."""
        found = {topic.split("/")[3]: json.loads(body) for topic, body in self.wire.retained.items() if body}
        return {device: (body["signatures"][0]["keyid"], body["signed"]) for device, body in found.items()}

    def states(self) -> list[str]:
        with self.database.reading() as tx:
            return [row.state for row in plans.rollouts(tx)]

    def job(self) -> Any:
        with self.database.reading() as tx:
            return plans.jobs(tx)[-1]

    def to_rollout(self) -> None:
        """Through the whole loop until the update is offered."""
        for device in DEVICES:
            self.drifts(device)
        self.step()
        for device in DEVICES:
            self.delivers(device)
        for _ in range(5):
            self.step()
