"""What is offered to devices: rollouts from draft to end, and the desired documents that carry them.

Written down before it is published; a crash between is healed at the start. A rollout stays a draft until its devices
would take it.
Leaves to others: how far an update got (`rollout`), who signs (`means`), when to look (`steward`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from agent.contract.errors import EdgewardenError
from compressor.config import HostConfig
from compressor.fleet import rollout as rollouts
from compressor.fleet.catalogue import Catalogue
from compressor.fleet.database import Connection, Database, Row, devices, plans
from compressor.fleet.means import Director, Means

DRAFT_LOOK_S = 10.0  # a rollout that cannot be offered yet is looked at so often
RENEW_LOOK_S = 5.0  # a rotated key is noticed so soon
RENEWED = frozenset({rollouts.Stand.WAITING, rollouts.Stand.COMMITTED})


class Offers:
    """Owned by the steward's thread."""

    def __init__(self, config: HostConfig, database: Database, catalogue: Catalogue, means: Means) -> None:
        self._config, self._database, self._catalogue, self._means = config, database, catalogue, means
        self._renew_at = 0.0
        self._look_at: dict[int, float] = {}  # rollout -> when its draft is looked at again
        self._signed_by = ""  # the key that signed everything that is stored, as far as it has to be

    def restore(self, now_s: float) -> None:
        """Retain again what a former process desired, signed with the key of now; withdraw again what it withdrew."""
        self.renew(now_s)
        with self._database.reading() as tx:
            wanted = [(row.id, row.desired) for row in devices.listed(tx) if row.desired_version]
        for device, document in wanted:
            self._means.wire.retain(self._means.topics(device).desired, _bytes(document) if document else b"")

    def renew(self, now_s: float) -> None:
        """After a rotation of the director key: sign anew what devices still have to believe.

        Versions and contents stay. Who is busy with it believed it already, and would begin again; its turn comes
        when it has committed. What a device refused or undid is not brought up again.
        """
        director = self._means.director
        if director is None or now_s < self._renew_at:
            return
        self._renew_at = now_s + RENEW_LOOK_S
        try:
            key = director.key_id()
            if key != self._signed_by:
                self._renew(director, key, now_s)
        except EdgewardenError as error:
            self._means.say("error", "desired", f"cannot sign desired documents anew: {error.sentence()}")

    def _renew(self, director: Director, key: str, now_s: float) -> None:
        renewed, later = {}, False
        with self._database.writing() as tx:
            for row in devices.listed(tx):
                if row.desired and key not in _signers(row.desired):
                    where = rollouts.stand(row.desired_version, _said(row))
                    later = later or where is rollouts.Stand.BUSY
                    if where in RENEWED:
                        renewed[row.id] = director.renewed(row.desired)
            for device, document in renewed.items():
                devices.change(tx, device, now_s=now_s, desired=json.loads(document))
            if renewed:
                whose = ", ".join(sorted(renewed))
                text = f"signed anew with the director key {key[:12]}: {whose}"
                self._means.note(tx, "desired", text, now_s)
        for device, document in renewed.items():
            self._means.wire.retain(self._means.topics(device).desired, document)
        self._signed_by = "" if later else key

    def advance(self, now_s: float) -> None:
        """Offer what is drafted and approved; judge what is under way by what its devices report."""
        with self._database.reading() as tx:
            open_ = plans.rollouts(tx, states=plans.OPEN_ROLLOUTS)
            said = {row.id: _said(row) for row in devices.listed(tx)} if open_ else {}
        taken = {device for row in open_ if row.state != "draft" for device in row.devices}
        self._look_at = {row.id: self._look_at[row.id] for row in open_ if row.id in self._look_at}
        for row in open_:
            before = self._rollout(row)
            if row.state == "draft" and not row.halt_asked:
                # one at a time on every device: a document takes the place of one that is still on its way
                if taken.isdisjoint(row.devices):
                    self._try_to_offer(row, before, now_s)
                taken |= set(row.devices)
                continue
            heard = {device: words for device, words in said.items() if words is not None}
            after = rollouts.advance(before, heard, now=now_s, halt=bool(row.halt_asked))
            if after is not before:
                self._save(row, after, now_s)

    def _try_to_offer(self, row: Row[Any], before: rollouts.Rollout, now_s: float) -> None:
        if now_s < self._look_at.get(row.id, 0.0):
            return
        self._look_at[row.id] = now_s + DRAFT_LOOK_S
        try:
            if self._is_approved(row, now_s):
                self._offer(row, before, now_s)
        except EdgewardenError as error:
            self._means.say("error", "rollout", f"cannot offer rollout {row.id}: {error.sentence()}")

    def _is_approved(self, row: Row[Any], now_s: float) -> bool:
        """Devices would take it; until then it stays a draft whose text says which command approves it."""
        if self._means.publisher is None:
            return True
        missing = self._means.publisher.unapproved(row.service, list(row.artifacts.values()), row.devices)
        if missing and not row.text:
            self._await_approval(row, missing, now_s)
        return not missing

    def _await_approval(self, row: Row[Any], missing: Sequence[str], now_s: float) -> None:
        repository, regeneration = self._config.repository, self._config.regeneration
        built = self._config.host.folder / "builds" / str(row.job) / "out" / (regeneration.device_class or "*") / "*"
        folders = "ARTIFACT..." if row.job is None else str(built)
        text = (
            f"awaits approval of {', '.join(self._catalogue.label(digest) for digest in missing)}: "
            f"edgewarden-compressor publish --approve --keys {repository.keys} "
            f"--repository {repository.folder} {folders}"
        )
        with self._database.writing() as tx:
            plans.change_rollout(tx, row.id, text=text)
            self._means.note(tx, "rollout", f"rollout {row.id} {text}", now_s, severity="warning")

    def _rollout(self, row: Row[Any]) -> rollouts.Rollout:
        regeneration = self._config.regeneration
        return rollouts.Rollout(
            versions=row.versions, state=rollouts.State(row.state), since=row.since,
            deadline_s=regeneration.update_deadline_s, soak_s=regeneration.soak_s, text=row.text,
        )  # fmt: skip

    def _offer(self, row: Row[Any], before: rollouts.Rollout, now_s: float) -> None:
        """Write down what is desired of every device, then publish it; a crash between is healed at the start."""
        if self._means.director is None:
            return
        documents = {}
        with self._database.writing() as tx:
            versions = {}
            for device in row.devices:
                devices.change(tx, device, now_s=now_s)
                versions[device] = devices.next_desired_version(tx, device)
                documents[device] = self._means.director.desired(
                    device=device, version=versions[device], issued_at=now_s, rollout=str(row.id),
                    deadline_s=self._config.regeneration.update_deadline_s,
                    services={row.service: {"artifacts": row.artifacts, "order": row.order}},
                    repository=f"{self._means.public_url()}/repository", rollback=bool(row.rollback),
                )  # fmt: skip
                devices.change(tx, device, now_s=now_s, desired=json.loads(documents[device]))
                label = self._catalogue.label(row.artifacts[row.order[0]])
                self._means.note(
                    tx, "desired", f"version {versions[device]}: {label} for {row.service}", now_s, device=device
                )
            after = rollouts.sent(before, now=now_s)
            plans.change_rollout(tx, row.id, state=after.state.value, since=now_s, versions=versions, text=after.text)
            self._means.note(tx, "rollout", f"rollout {row.id} {after.state.value}: {after.text}", now_s)
        for device, document in documents.items():
            self._means.wire.retain(self._means.topics(device).desired, document)

    def _save(self, row: Row[Any], after: rollouts.Rollout, now_s: float) -> None:
        severity = "error" if after.state is rollouts.State.HALTED else "notice"
        with self._database.writing() as tx:
            plans.change_rollout(tx, row.id, state=after.state.value, since=after.since, text=after.text)
            self._means.note(
                tx, "rollout", f"rollout {row.id} {after.state.value}: {after.text}", now_s, severity=severity
            )
            waiting = self._withdraw(tx, row, now_s) if after.state is rollouts.State.HALTED else []
        for device in waiting:
            self._means.wire.retain(self._means.topics(device).desired, b"")

    def _withdraw(self, tx: Connection, row: Row[Any], now_s: float) -> list[str]:
        """A halted rollout is no longer offered to devices that have not taken it up."""
        found = [devices.find(tx, device) for device in row.versions]
        waiting = [
            device.id
            for device in found
            if device is not None
            and device.desired_version == row.versions[device.id]
            and rollouts.stand(row.versions[device.id], _said(device)) is rollouts.Stand.WAITING
        ]
        for device in waiting:
            devices.change(tx, device, now_s=now_s, desired=None)
            self._means.note(tx, "desired", "withdrawn: the rollout was halted", now_s, device=device)
        return waiting


def _said(device: Row[Any]) -> rollouts.Said | None:
    reported = device.reported
    if not reported:
        return None
    return rollouts.Said(
        version=int(reported.get("desired_version", 0)),
        state=str(reported.get("update_state", "")),
        code=str(reported.get("code", "")),
    )


def _signers(envelope: Any) -> list[str]:
    return [str(signature.get("keyid", "")) for signature in envelope.get("signatures", ())]


def _bytes(document: Any) -> bytes:
    """A stored envelope; the signature is over the canonical form of what it carries, so any JSON form will do."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
