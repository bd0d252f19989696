"""One look at the fleet and everything that follows: the closed loop, a step at a time.

    reports -> decisions -> requests for recordings -> pipeline -> publication -> desired documents -> rollout

Each step is durable before its effect and may be repeated after a crash. Every step is a row of the timeline.
Leaves to others: what to decide (`planner`), what becomes of a rollout (`offers`), how a pipeline runs (`pipelines`),
who signs (`means`), the clock and the thread (`service`).
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agent.contract.artifact import Artifact, open_artifact
from agent.contract.errors import EdgewardenError, StorageError
from compressor.config import HostConfig
from compressor.fleet.catalogue import Catalogue
from compressor.fleet.database import Connection, Database, Row, devices, messages, plans, timeline
from compressor.fleet.inbox import ReplySeen
from compressor.fleet.means import Built, Failed, Means, Trainer
from compressor.fleet.offers import Offers
from compressor.fleet.planner import ASKS, Decision, Kind, plan
from compressor.fleet.proposal import order_of
from compressor.fleet.rollout import State
from compressor.fleet.situation import situations
from compressor.fleet.tokens import hash_token, new_token

MAX_JOB_ATTEMPTS = 2  # a pipeline that was cut off is started once more; its finished stages are cached
PUBLISH_RETRY_S = 10.0
KEPT_BUILDS = 4
KEPT_RECORDINGS_S = 30 * 86_400.0


class Steward:
    """Owned by one thread."""

    def __init__(self, config: HostConfig, database: Database, catalogue: Catalogue, means: Means) -> None:
        self._config, self._database, self._catalogue, self._means = config, database, catalogue, means
        self._offers = Offers(config, database, catalogue, means)
        self._retry_at = 0.0

    # --- the whole step -----------------------------------------------------------------------------------------
    def start(self, *, now_s: float) -> None:
        """Pick up what a former process left: cut-off pipelines and requests, desired documents to be retained."""
        if self._means.trainer is not None:
            self._means.trainer.stop()
        with self._database.writing() as tx:
            for job in plans.jobs(tx, states=("running",)):
                self._resume(tx, job, now_s)
            for sample in plans.samples(tx, states=("asked",)):
                if sample.text is None and not sample.attempts:  # perhaps it never left: it is asked for again
                    plans.remove_sample(tx, sample.id)
        self._offers.restore(now_s)

    def step(self, replies: Sequence[ReplySeen], *, now_s: float) -> bool:
        """Everything that is due; True when something changed."""
        before = self._last_row()
        self._catalogue.refresh()
        self._settle_samples(replies, now_s)
        self._decide(now_s)
        self._run_jobs(now_s)
        self._offers.renew(now_s)
        self._offers.advance(now_s)
        return self._last_row() != before

    def _last_row(self) -> int:
        with self._database.reading() as tx:
            return timeline.last(tx)

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
                self._means.note(tx, "decision", f"{decision.kind.value}: {decision.reason}", now_s)
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
        try:
            nonce = secrets.token_hex(16)
            envelope = self._means.director.command(
                device=device, op="sample", seq=seq, not_after=now_s + timeout_s, nonce=nonce, body=body
            )
            self._means.wire.command(
                topics.command("sample"), envelope, answer_to=topics.response("sample"), expiry_s=timeout_s
            )
        except EdgewardenError as error:
            self._means.say("warning", "sample", error.sentence())
            with self._database.writing() as tx:
                current = plans.sample(tx, name)
                if current is not None and not current.attempts:  # else it arrived: only the broker's yes was lost
                    plans.remove_sample(tx, name)
            return
        with self._database.writing() as tx:
            current = plans.sample(tx, name)
            if current is not None and current.state == "asked":  # a fast device has answered already
                plans.change_sample(tx, name, text="the broker took the request")
            self._means.note(tx, "sample", "asked for an enrolment recording by signed command", now_s, device=device)

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
                self._means.note(
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
            self._means.note(tx, "job", f"regeneration {job} ordered from the recordings of {whose}", now_s)

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
            members = [devices.find(tx, device) for device in self._config.fleet.cohorts.get(job.cohort, [])]
            plans.change_job(
                tx, job.id, state="running", attempts=job.attempts + 1, started_at=now_s, folder=str(folder)
            )
        try:
            recordings = _lay_out(folder, [row for row in samples if row is not None])
            parents = self._catalogue.deployed(job.service, [_carried(row) for row in members if row is not None])
            trainer.start(folder, recordings, version=version, parents=parents)
        except EdgewardenError as error:
            self._fail_job(job, error.sentence(), now_s)
            return
        with self._database.writing() as tx:
            self._means.note(tx, "job", f"regeneration {job.id} runs the pipeline for version {version}", now_s)

    def _follow_job(self, trainer: Trainer, job: Row[Any], now_s: float) -> None:
        match trainer.poll():
            case Built(artifacts):
                with self._database.writing() as tx:
                    plans.change_job(
                        tx, job.id, state="built", ended_at=now_s, artifacts={p.name: str(p) for p in artifacts}
                    )
                    seconds = now_s - (job.started_at or now_s)
                    text = f"regeneration {job.id} built {', '.join(p.name for p in artifacts)} in {seconds:.0f} s"
                    self._means.note(tx, "job", text, now_s)
                self._retry_at = 0.0
            case Failed(text):
                self._fail_job(job, text, now_s)
            case None:
                pass

    def _fail_job(self, job: Row[Any], text: str, now_s: float) -> None:
        with self._database.writing() as tx:
            plans.change_job(tx, job.id, state="failed", ended_at=now_s, text=text)
            self._means.note(tx, "job", f"regeneration {job.id} failed: {text}", now_s, severity="error")

    def _resume(self, tx: Connection, job: Row[Any], now_s: float) -> None:
        """A pipeline whose process went with the former host."""
        if job.attempts < MAX_JOB_ATTEMPTS:
            plans.change_job(tx, job.id, state="queued")
            self._means.note(
                tx, "job", f"regeneration {job.id} was cut off and starts again", now_s, severity="warning"
            )
        else:
            text = f"cut off {job.attempts} times"
            plans.change_job(tx, job.id, state="failed", ended_at=now_s, text=text)
            self._means.note(tx, "job", f"regeneration {job.id} failed: {text}", now_s, severity="error")

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
        manifests = [artifact.manifest for artifact in artifacts]
        with self._database.writing() as tx:
            plans.change_job(tx, job.id, state="done", artifacts=chosen)
            self._means.note(tx, "publish", f"published {named}", now_s)
            number = plans.add_rollout(
                tx, cohort=job.cohort, service=job.service, job=job.id, state="draft", devices=sorted(members),
                versions={}, artifacts=chosen, order=order_of(manifests, job.service), created_at=now_s, since=now_s,
                text="",
            )  # fmt: skip
            self._means.note(tx, "rollout", f"rollout {number} of {named} to cohort {job.cohort} drafted", now_s)
        _prune_builds(self._config.host.folder / "builds")

    # --- housekeeping -------------------------------------------------------------------------------------------
    def tidy(self, *, now_s: float) -> None:
        """Keep every table within its bound, and the online metadata fresh. Raises: StorageError."""
        with self._database.writing() as tx:
            for row in devices.listed(tx):
                messages.prune(tx, row.id)
            timeline.prune(tx)
            plans.prune_decisions(tx)
            self._prune_recordings(tx, now_s)
        if self._means.publisher is not None:
            try:
                self._means.publisher.refresh_online()
            except EdgewardenError as error:
                self._means.say("error", "publish", f"cannot refresh the online metadata: {error.sentence()}")
        self._means.say("debug", "tidy", f"tidied at {now_s:.0f}")

    def _prune_recordings(self, tx: Connection, now_s: float) -> None:
        """What a regeneration learned from goes once its rollout is completed; until then it may be needed again.

        What none learned from goes after a month: all recordings together are bounded, and new ones need the room.
        """
        completed = {row.job for row in plans.rollouts(tx, states=(State.COMPLETED,))}
        used = {name for job in plans.jobs(tx, states=("done",)) if job.id in completed for name in job.samples}
        needed = {name for job in plans.jobs(tx, states=plans.OPEN_JOBS) for name in job.samples}
        for sample in plans.samples(tx, states=("accepted",)):
            old = sample.id not in needed and now_s - (sample.settled_at or now_s) > KEPT_RECORDINGS_S
            if (sample.id in used or old) and self._remove(Path(sample.path)):
                plans.change_sample(tx, sample.id, state="used" if sample.id in used else "expired")

    def _remove(self, path: Path) -> bool:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._means.say("error", "tidy", f"cannot remove the recording {path}: {error.strerror}")
            return False
        return True


def _carried(device: Row[Any]) -> dict[str, str]:
    """Engine -> manifest digest, as the device says."""
    return dict((device.birth or {}).get("artifacts", {}))


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
