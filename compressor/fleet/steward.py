"""One look at the fleet and everything that follows: the closed loop, a step at a time.

    reports -> decisions -> requests for recordings -> pipeline -> publication -> desired documents -> rollout

Each step is durable before its effect and may be repeated after a crash. Every step is a row of the timeline.
Leaves to others: what to decide (`planner`), how far an update got (`rollout`), how a pipeline runs (`pipelines`),
who signs (`Director`), the clock and the thread (`service`).
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from agent.contract.artifact import Artifact, open_artifact
from agent.contract.errors import EdgewardenError, LinkError, StorageError
from agent.contract.topics import Topics
from compressor.config import HostConfig
from compressor.fleet import rollout as rollouts
from compressor.fleet.catalogue import Catalogue
from compressor.fleet.database import Connection, Database, Row, devices, messages, plans, timeline
from compressor.fleet.inbox import ReplySeen
from compressor.fleet.planner import ASKS, Decision, Kind, plan
from compressor.fleet.situation import situations
from compressor.fleet.tokens import hash_token, new_token

MAX_JOB_ATTEMPTS = 2  # a pipeline that was cut off is started once more; its finished stages are cached
PUBLISH_RETRY_S = 10.0
APPROVAL_LOOK_S = 10.0  # a rollout that waits for its approval looks so often
KEPT_BUILDS = 4


@dataclass(frozen=True, slots=True)
class Built:
    """What a pipeline made: artifact folders of one device class."""

    artifacts: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Failed:
    text: str


class Trainer(Protocol):
    """Runs one pipeline at a time, in the background."""

    def start(self, folder: Path, recordings: Path, *, version: int) -> None:
        """Begin to build into `folder`. Raises: EdgewardenError."""

    def poll(self) -> Built | Failed | None:
        """What came of it; None = still running, or nothing was started."""

    def stop(self) -> None:
        """End it now."""


class Publisher(Protocol):
    """Signs and publishes."""

    def publish(self, folders: Sequence[Path]) -> list[str]:
        """Manifest digests in the order given; publishing again changes nothing. Raises: EdgewardenError."""

    def unapproved(self, family: str, digests: Sequence[str], devices: Sequence[str]) -> list[str]:
        """Those that some of the devices would refuse as not approved. Raises: EdgewardenError."""

    def refresh_online(self) -> bool:
        """Sign again what is about to expire. Raises: EdgewardenError."""


class Director(Protocol):
    """Signs what devices obey."""

    def desired(self, **fields: Any) -> bytes:
        """The envelope of a desired document."""

    def command(self, **fields: Any) -> bytes:
        """The envelope of a command."""


class Wire(Protocol):
    """How the steward reaches devices."""

    def retain(self, topic: str, body: bytes) -> None:
        """Keep a document retained."""

    def command(self, topic: str, body: bytes, *, answer_to: str, expiry_s: float) -> None:
        """Send once. Raises: LinkError."""


@dataclass(frozen=True, slots=True)
class Means:
    """What the steward works with; None = this host does not do that."""

    trainer: Trainer | None
    publisher: Publisher | None
    director: Director | None
    wire: Wire
    topics: Callable[[str], Topics]
    public_url: Callable[[], str]
    say: Callable[[str, str, str], None]


class Steward:
    """Owned by one thread."""

    def __init__(self, config: HostConfig, database: Database, catalogue: Catalogue, means: Means) -> None:
        self._config, self._database, self._catalogue, self._means = config, database, catalogue, means
        self._retry_at = self._approval_at = 0.0

    # --- the whole step -----------------------------------------------------------------------------------------
    def start(self, *, now_s: float) -> None:
        """Pick up what a former process left: cut-off pipelines, desired documents that must be retained."""
        with self._database.writing() as tx:
            for job in plans.jobs(tx, states=("running",)):
                self._resume(tx, job, now_s)
            wanted = [(row.id, row.desired) for row in devices.listed(tx) if row.desired]
        for device, document in wanted:
            self._means.wire.retain(self._means.topics(device).desired, _bytes(document))

    def step(self, replies: Sequence[ReplySeen], *, now_s: float) -> bool:
        """Everything that is due; True when something changed."""
        before = self._last_row()
        self._catalogue.refresh()
        self._settle_samples(replies, now_s)
        self._decide(now_s)
        self._run_jobs(now_s)
        self._advance_rollouts(now_s)
        return self._last_row() != before

    def _last_row(self) -> int:
        with self._database.reading() as tx:
            return timeline.last(tx)

    def _note(self, tx: Connection, what: str, text: str, now_s: float, **more: str) -> None:
        timeline.add(tx, what, text, at=now_s, **more)
        self._means.say(more.get("severity", "notice"), what, text)

    # --- decisions ----------------------------------------------------------------------------------------------
    def _decide(self, now_s: float) -> None:
        with self._database.reading() as tx:
            found = situations(tx, self._config, self._catalogue, now_s=now_s)
        for situation in found:
            for decision in plan(situation):
                number = self._record(decision, now_s)
                self._act(decision, number, {r.device: r.reference for r in situation.reports}, now_s)

    def _record(self, decision: Decision, now_s: float) -> int:
        fields = {
            "cohort": decision.cohort, "service": decision.service, "kind": decision.kind.value, "row": decision.row,
            "devices": list(decision.devices), "reason": decision.reason, "numbers": decision.numbers,
        }  # fmt: skip
        with self._database.writing() as tx:
            number, new = plans.record(tx, fields, now_s=now_s)
            if new:
                self._note(tx, "decision", f"{decision.kind.value}: {decision.reason}", now_s)
        return number

    def _act(self, decision: Decision, number: int, reference_of: dict[str, str], now_s: float) -> None:
        mine = (self._config.regeneration.cohort, self._config.regeneration.service)
        if (decision.cohort, decision.service) != mine or self._means.trainer is None:
            return
        if decision.kind in ASKS:
            for device in decision.devices:
                self._ask(device, decision.service, reference_of.get(device, ""), number, now_s)
        elif decision.kind is Kind.REGENERATE:
            self._order(decision, number, now_s)

    # --- recordings ---------------------------------------------------------------------------------------------
    def _ask(self, device: str, service: str, reference: str, number: int, now_s: float) -> None:
        """Ask one device for recordings; when it cannot be reached now, the next step asks again."""
        if self._means.director is None:
            return
        name, token = secrets.token_hex(12), new_token()
        timeout_s, most = self._config.fleet.sample_timeout_s, self._config.http.max_sample_bytes
        with self._database.writing() as tx:
            devices.change(tx, device, now_s=now_s)
            seq = devices.next_command_seq(tx, device)
            plans.add_sample(
                tx, id=name, device=device, service=service, reference=reference, decision=number,
                token_sha256=hash_token(token), max_bytes=most, asked_at=now_s,
            )  # fmt: skip
        body = {
            "id": name, "service": service, "what": "enrolment", "token": token, "max_bytes": most,
            "upload": f"{self._means.public_url()}/samples/{device}/{name}",
        }  # fmt: skip
        topics = self._means.topics(device)
        envelope = self._means.director.command(
            device=device, op="sample", seq=seq, not_after=now_s + timeout_s, nonce=secrets.token_hex(16), body=body
        )
        try:
            self._means.wire.command(
                topics.command("sample"), envelope, answer_to=topics.response("sample"), expiry_s=timeout_s
            )
        except LinkError as error:
            self._means.say("warning", "sample", error.sentence())
            with self._database.writing() as tx:
                plans.remove_sample(tx, name)
            return
        with self._database.writing() as tx:
            self._note(tx, "sample", "asked for an enrolment recording by signed command", now_s, device=device)

    def _settle_samples(self, replies: Sequence[ReplySeen], now_s: float) -> None:
        timeout_s = self._config.fleet.sample_timeout_s
        refusals = {reply.id: reply for reply in replies if reply.op == "sample" and not reply.ok}
        with self._database.reading() as tx:
            waiting = plans.samples(tx, states=("asked",))
        for sample in waiting:
            reply = refusals.get(sample.id)
            if reply is not None and reply.device == sample.device:
                reason = reply.text or reply.code or "no reason given"
                self._close_sample(sample, "refused", f"the device refused: {reason}", now_s)
            elif now_s - sample.asked_at > timeout_s:
                self._close_sample(sample, "expired", f"no recording within {timeout_s:.0f} s", now_s)

    def _close_sample(self, sample: Row[Any], state: str, text: str, now_s: float) -> None:
        with self._database.writing() as tx:
            current = plans.sample(tx, sample.id)
            if current is not None and current.state == "asked":
                plans.change_sample(tx, sample.id, state=state, settled_at=now_s, text=text)
                self._note(
                    tx, "sample", f"recording {state}: {text}", now_s, device=sample.device, severity="warning"
                )

    # --- pipelines ----------------------------------------------------------------------------------------------
    def _order(self, decision: Decision, number: int, now_s: float) -> None:
        """Learn from the recordings of the decision's devices about its references, from no others."""
        with self._database.writing() as tx:
            if plans.jobs(tx, states=plans.OPEN_JOBS):
                return
            accepted = plans.samples(tx, service=decision.service, states=("accepted",))
            samples = _newest_of_each([row for row in accepted if _is_about(decision, row)])
            if len(samples) < self._config.fleet.quorum:
                text = f"{len(samples)} of {self._config.fleet.quorum} recordings are about what the devices report"
                self._means.say("debug", "job", f"no regeneration: {text}")
                return
            job = plans.add_job(
                tx, cohort=decision.cohort, service=decision.service, decision=number, created_at=now_s,
                devices=list(decision.devices), references=sorted({*decision.references} - {""}),
                samples=[row.id for row in samples],
            )  # fmt: skip
            whose = ", ".join(sorted(row.device for row in samples))
            self._note(tx, "job", f"regeneration {job} ordered from the recordings of {whose}", now_s)

    def _run_jobs(self, now_s: float) -> None:
        trainer = self._means.trainer
        if trainer is None:
            return
        with self._database.reading() as tx:
            jobs = plans.jobs(tx, states=plans.OPEN_JOBS)
        for job in jobs:
            match job.state:
                case "queued":
                    self._start_job(trainer, job, now_s)
                case "running":
                    self._follow_job(trainer, job, now_s)
                case _:
                    self._publish(job, now_s)

    def _start_job(self, trainer: Trainer, job: Row[Any], now_s: float) -> None:
        folder = self._config.host.folder / "builds" / str(job.id)
        version = self._catalogue.next_version(job.service)
        with self._database.writing() as tx:
            samples = [plans.sample(tx, name) for name in job.samples]
            plans.change_job(
                tx, job.id, state="running", attempts=job.attempts + 1, started_at=now_s, folder=str(folder)
            )
        try:
            recordings = _lay_out(folder, [row for row in samples if row is not None])
            trainer.start(folder, recordings, version=version)
        except EdgewardenError as error:
            self._fail_job(job, error.sentence(), now_s)
            return
        with self._database.writing() as tx:
            self._note(tx, "job", f"regeneration {job.id} runs the pipeline for version {version}", now_s)

    def _follow_job(self, trainer: Trainer, job: Row[Any], now_s: float) -> None:
        match trainer.poll():
            case Built(artifacts):
                with self._database.writing() as tx:
                    plans.change_job(
                        tx, job.id, state="built", ended_at=now_s, artifacts={p.name: str(p) for p in artifacts}
                    )
                    seconds = now_s - (job.started_at or now_s)
                    text = f"regeneration {job.id} built {', '.join(p.name for p in artifacts)} in {seconds:.0f} s"
                    self._note(tx, "job", text, now_s)
                self._retry_at = 0.0
            case Failed(text):
                self._fail_job(job, text, now_s)
            case None:
                pass

    def _fail_job(self, job: Row[Any], text: str, now_s: float) -> None:
        with self._database.writing() as tx:
            plans.change_job(tx, job.id, state="failed", ended_at=now_s, text=text)
            self._note(tx, "job", f"regeneration {job.id} failed: {text}", now_s, severity="error")

    def _resume(self, tx: Connection, job: Row[Any], now_s: float) -> None:
        """A pipeline whose process went with the former host."""
        if job.attempts < MAX_JOB_ATTEMPTS:
            plans.change_job(tx, job.id, state="queued")
            self._note(tx, "job", f"regeneration {job.id} was cut off and starts again", now_s, severity="warning")
        else:
            text = f"cut off {job.attempts} times"
            plans.change_job(tx, job.id, state="failed", ended_at=now_s, text=text)
            self._note(tx, "job", f"regeneration {job.id} failed: {text}", now_s, severity="error")

    def _publish(self, job: Row[Any], now_s: float) -> None:
        if self._means.publisher is None or now_s < self._retry_at:
            return
        try:
            folders = [Path(folder) for folder in job.artifacts.values()]
            artifacts = [open_artifact(folder) for folder in folders]
            digests = self._means.publisher.publish(folders)
        except StorageError as error:
            self._retry_at = now_s + PUBLISH_RETRY_S
            self._means.say("error", "publish", error.sentence())
            return
        except EdgewardenError as error:
            self._fail_job(job, f"cannot publish: {error.sentence()}", now_s)
            return
        self._catalogue.refresh()
        self._draft(job, artifacts, digests, now_s)

    def _draft(self, job: Row[Any], artifacts: Sequence[Artifact], digests: Sequence[str], now_s: float) -> None:
        """Published: the job is done, and a rollout to its cohort begins."""
        chosen = {artifact.manifest.name: digest for artifact, digest in zip(artifacts, digests, strict=True)}
        members = self._config.fleet.cohorts.get(job.cohort, [])
        named = ", ".join(self._catalogue.label(digest) for digest in digests)
        with self._database.writing() as tx:
            plans.change_job(tx, job.id, state="done", artifacts=chosen)
            self._note(tx, "publish", f"published {named}", now_s)
            number = plans.add_rollout(
                tx, cohort=job.cohort, service=job.service, job=job.id, state="draft", devices=sorted(members),
                versions={}, artifacts=chosen, order=order_of(artifacts, job.service), created_at=now_s, since=now_s,
                text="",
            )  # fmt: skip
            self._note(tx, "rollout", f"rollout {number} of {named} to cohort {job.cohort} drafted", now_s)
        _prune_builds(self._config.host.folder / "builds")

    # --- rollouts -----------------------------------------------------------------------------------------------
    def _advance_rollouts(self, now_s: float) -> None:
        with self._database.reading() as tx:
            open_ = plans.rollouts(tx, states=plans.OPEN_ROLLOUTS)
            said = {row.id: _said(row) for row in devices.listed(tx)} if open_ else {}
        for row in open_:
            before = self._rollout(row)
            if row.state == "draft" and not row.halt_asked:
                if self._is_approved(row, now_s):
                    self._offer(row, before, now_s)
                continue
            heard = {device: words for device, words in said.items() if words is not None}
            after = rollouts.advance(before, heard, now=now_s, halt=bool(row.halt_asked))
            if after is not before:
                self._save(row, after, now_s)

    def _is_approved(self, row: Row[Any], now_s: float) -> bool:
        """Devices would take it; until then it stays a draft whose text says which command approves it."""
        publisher = self._means.publisher
        if publisher is None:
            return True
        if row.text and now_s < self._approval_at:
            return False
        self._approval_at = now_s + APPROVAL_LOOK_S
        try:
            missing = publisher.unapproved(row.service, list(row.artifacts.values()), row.devices)
        except EdgewardenError as error:
            self._means.say("error", "rollout", f"cannot see what is approved: {error.sentence()}")
            return False
        if missing and not row.text:
            self._await_approval(row, missing, now_s)
        return not missing

    def _await_approval(self, row: Row[Any], missing: Sequence[str], now_s: float) -> None:
        repository, regeneration = self._config.repository, self._config.regeneration
        built = self._config.host.folder / "builds" / str(row.job) / "out" / (regeneration.device_class or "*") / "*"
        text = (
            f"awaits approval of {', '.join(self._catalogue.label(digest) for digest in missing)}: "
            f"edgewarden-compressor publish --approve --keys {repository.keys} "
            f"--repository {repository.folder} {built}"
        )
        with self._database.writing() as tx:
            plans.change_rollout(tx, row.id, text=text)
            self._note(tx, "rollout", f"rollout {row.id} {text}", now_s, severity="warning")

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
                    repository=f"{self._means.public_url()}/repository",
                )  # fmt: skip
                devices.change(tx, device, now_s=now_s, desired=json.loads(documents[device]))
                label = self._catalogue.label(row.artifacts[row.order[0]])
                self._note(
                    tx, "desired", f"version {versions[device]}: {label} for {row.service}", now_s, device=device
                )
            after = rollouts.sent(before, now=now_s)
            plans.change_rollout(tx, row.id, state=after.state.value, since=now_s, versions=versions, text=after.text)
            self._note(tx, "rollout", f"rollout {row.id} {after.state.value}: {after.text}", now_s)
        for device, document in documents.items():
            self._means.wire.retain(self._means.topics(device).desired, document)

    def _save(self, row: Row[Any], after: rollouts.Rollout, now_s: float) -> None:
        severity = "error" if after.state is rollouts.State.HALTED else "notice"
        with self._database.writing() as tx:
            plans.change_rollout(tx, row.id, state=after.state.value, since=after.since, text=after.text)
            self._note(tx, "rollout", f"rollout {row.id} {after.state.value}: {after.text}", now_s, severity=severity)
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
            self._note(tx, "desired", "withdrawn: the rollout was halted", now_s, device=device)
        return waiting

    # --- housekeeping -------------------------------------------------------------------------------------------
    def tidy(self, *, now_s: float) -> None:
        """Keep every table within its bound, and the online metadata fresh. Raises: StorageError."""
        with self._database.writing() as tx:
            for row in devices.listed(tx):
                messages.prune(tx, row.id)
            timeline.prune(tx)
            plans.prune_decisions(tx)
            self._prune_recordings(tx)
        if self._means.publisher is not None:
            try:
                self._means.publisher.refresh_online()
            except EdgewardenError as error:
                self._means.say("error", "publish", f"cannot refresh the online metadata: {error.sentence()}")
        self._means.say("debug", "tidy", f"tidied at {now_s:.0f}")

    def _prune_recordings(self, tx: Connection) -> None:
        """What a regeneration learned from goes once its rollout is completed; until then it may be needed again."""
        completed = {row.job for row in plans.rollouts(tx, states=(rollouts.State.COMPLETED,))}
        done = [job for job in plans.jobs(tx, states=("done",)) if job.id in completed]
        for name in {name for job in done for name in job.samples}:
            sample = plans.sample(tx, name)
            if sample is not None and sample.state == "accepted":
                _remove(Path(sample.path))
                plans.change_sample(tx, name, state="used")


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot remove {path}: {error}") from error


def order_of(artifacts: Sequence[Artifact], service: str) -> list[str]:
    """Who answers, best first: the service's own model, its fallbacks as it names them, then whatever is left."""
    names = [artifact.manifest.name for artifact in artifacts]
    active = next((a.manifest for a in artifacts if a.manifest.name == service), artifacts[0].manifest)
    wanted = [active.name, *active.fallbacks, *sorted(names)]
    return list(dict.fromkeys(name for name in wanted if name in names))


def _said(device: Row[Any]) -> rollouts.Said | None:
    reported = device.reported
    if not reported:
        return None
    return rollouts.Said(
        version=int(reported.get("desired_version", 0)),
        state=str(reported.get("update_state", "")),
        code=str(reported.get("code", "")),
    )


def _bytes(document: Any) -> bytes:
    """A stored envelope; the signature is over the canonical form of what it carries, so any JSON form will do."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _is_about(decision: Decision, sample: Row[Any]) -> bool:
    return sample.device in decision.devices and sample.reference in decision.references


def _newest_of_each(samples: Sequence[Row[Any]]) -> list[Row[Any]]:
    """The newest accepted recording of every device. samples: newest first."""
    found: dict[str, Row[Any]] = {}
    for row in samples:
        found.setdefault(row.device, row)
    return list(found.values())


def _lay_out(folder: Path, samples: Sequence[Row[Any]]) -> Path:
    """`folder`/enrolment/<device>.npz for the pipeline. Raises: StorageError."""
    recordings = folder / "enrolment"
    try:
        shutil.rmtree(folder, ignore_errors=True)
        recordings.mkdir(parents=True)
        for sample in samples:
            shutil.copyfile(sample.path, recordings / f"{sample.device}.npz")
    except OSError as error:
        raise StorageError(f"cannot lay out the recordings in {recordings}: {error}") from error
    return recordings


def _prune_builds(folder: Path) -> None:
    numbered = sorted((path for path in folder.glob("*") if path.name.isdecimal()), key=lambda path: int(path.name))
    for path in numbered[:-KEPT_BUILDS]:
        shutil.rmtree(path, ignore_errors=True)
