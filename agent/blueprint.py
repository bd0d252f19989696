"""What is to be built, from configuration and artifacts: per service the plan, the policy and what to monitor.

Promises: every byte of an artifact is verified before anything uses it; one that is damaged or does not fit its
siblings is left out and told, as long as another model can answer. Starts nothing and decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from agent.config import AgentConfig, GuardChannelSection, GuardSection, ServiceSection
from agent.contract.artifact import Artifact, Channel, Manifest, View, open_artifact, promised, running
from agent.contract.errors import ArtifactError, Incompatible
from agent.contract.plan import (
    ChannelPlan,
    EngineKind,
    EnginePlan,
    GuardPlan,
    GuardPolicy,
    RuntimePlan,
    ServicePlan,
    TensorPlan,
    ViewPlan,
    WindowPlan,
)
from agent.decisions.choice import Card, read_card
from agent.decisions.events import AlarmKind
from agent.decisions.fallback import Limits
from agent.decisions.service import ServicePolicy, switching
from agent.drift import Reference, load_reference
from agent.modelcache import FOLDER as CACHE
from agent.monitor import MonitorPlan


@dataclass(frozen=True, slots=True)
class Blueprint:
    """One service. `artifacts` best first, the floor last; `problems`: sentences about artifacts left out."""

    name: str
    artifacts: tuple[Artifact, ...]
    plan: ServicePlan
    policy: ServicePolicy
    monitor: MonitorPlan
    reference: Reference | None
    problems: tuple[str, ...]

    def plan_of(self, engines: tuple[str, ...]) -> ServicePlan:
        """The plan with only these engines; the preferred one stays the active one if it is among them."""
        chosen = tuple(plan for plan in self.plan.engines if plan.engine in engines)
        active = self.plan.active if self.plan.active in engines else chosen[0].engine
        return replace(self.plan, engines=chosen, active=active)


def draw_up(config: AgentConfig, chosen: Mapping[str, Sequence[Path]] | None = None) -> tuple[Blueprint, ...]:
    """Open and verify every artifact of every service.

    `chosen`: service -> folders, best first, instead of the configured ones; the configured floor stays behind
    those that bring none.

    Raises:
        ArtifactError: some service has no model left that could answer; says what is wrong with each artifact.
    """
    made: list[Blueprint] = []
    faults: list[ArtifactError] = []
    for index, section in enumerate(config.service):
        try:
            folders = (chosen or {}).get(section.name) or configured_folders(section)
            made.append(_service(config, section, index, folders))
        except ArtifactError as error:
            faults.append(error)
    if faults:
        raise type(faults[0])("; ".join(str(fault) for fault in faults), hint=faults[0].hint)
    strangers = _strangers(config.guard.channel, made)
    return tuple(replace(one, problems=(*one.problems, *strangers)) if one is made[0] else one for one in made)


def _strangers(listed: Iterable[GuardChannelSection], made: Sequence[Blueprint]) -> list[str]:
    """Sentences about configured channels that nobody has; told with the first service."""
    known = {(one.name, channel) for one in made for channel in one.monitor.channels}
    return [
        f"[[guard.channel]] names '{one.name}'" + (f" of '{one.service}'" if one.service else "") + ", which is no"
        " channel of a served model: it changes nothing"
        for one in listed
        if not any(one.name == channel and one.service in ("", service) for service, channel in known)
    ]


def configured_folders(section: ServiceSection) -> tuple[Path, ...]:
    """What the configuration serves, best first, the floor last."""
    return (section.artifact, *section.fallbacks, *([Path(section.floor)] if section.floor else []))


def configured_runtime(config: AgentConfig, section: ServiceSection) -> RuntimePlan:
    """How the configuration wants a service's engines to be run; what an artifact brings comes on top (`running`)."""
    return RuntimePlan(
        threads=section.threads,
        providers=tuple(config.serving.providers),
        spin=config.serving.spin,
        memory_bytes=config.serving.memory_mb * 1_000_000,
        control_flow=tuple(section.control_flow),
        cache_folder=str((config.state.folder / CACHE).absolute()),
    )


def _service(config: AgentConfig, section: ServiceSection, index: int, folders: Sequence[Path]) -> Blueprint:
    artifacts, problems = _open_all(section, folders)
    active = artifacts[0].manifest
    reference, reference_problem = _reference(artifacts[0])
    problems += [reference_problem] if reference_problem else []
    guard = _guard(config, active, reference)
    runtime = configured_runtime(config, section)
    engines = tuple(_engine(artifact, runtime) for artifact in artifacts)
    plan = ServicePlan(
        service=section.name,
        engines=engines,
        active=active.name,
        guard=guard,
        labels=tuple(active.labels),
        label_output=active.label_output,
        deadline_ms=section.deadline_ms,
        queue_limit=section.queue_limit,
        floor_status=config.serving.floor_status,
        placement=section.placement,
        window=_window(section, active),
    )
    channels = tuple(channel.name for channel in guard.channels) if guard else ()
    groups = {channel.name: channel.group for channel in guard.channels} if guard else {}
    view = _watched_view(active, reference)
    card = _card(artifacts, groups)
    monitor = MonitorPlan(
        service=section.name,
        index=index,
        engines=tuple(engine.engine for engine in engines),
        channels=channels,
        groups=groups,
        classes=len(active.labels),
        view=view.name if view else "",
        view_at=_places(artifacts, view) if view and view.source == "graph" else (),
        of_outputs=view is not None and view.source == "agent",
        latency_p95_us=config.budget.latency_p95_us or promised(active).latency_p95_us or 0.0,
        hop_s=active.window.hop / active.window.rate_hz if active.window else 0.0,
        repeats=active.window is not None if config.guard.repeated is None else config.guard.repeated,
        accuracy={one.engine: one.accuracy for one in card.engines if one.accuracy is not None},
        units={channel.name: channel.unit for tensor in active.inputs for channel in tensor.channels},
    )
    return Blueprint(
        name=section.name,
        artifacts=tuple(artifacts),
        plan=plan,
        policy=_policy(config, section.name, card, _missing(folders, artifacts)),
        monitor=monitor,
        reference=reference if view else None,
        problems=tuple(problems),
    )


# --- artifacts ---------------------------------------------------------------------------------------------
def _open_all(section: ServiceSection, folders: Sequence[Path]) -> tuple[list[Artifact], list[str]]:
    sound: list[Artifact] = []
    faults: list[ArtifactError] = []
    for folder in folders:
        try:
            artifact = open_artifact(folder)
            _check_fits(artifact, sound)
            _card([artifact], {})  # a malformed one must not stop its siblings
            sound.append(artifact)
        except ArtifactError as error:
            faults.append(error)
    if not any(artifact.manifest.kind == "onnx" for artifact in sound):
        first = faults[0] if faults else Incompatible("it has a floor but no model")
        every = "; ".join(str(fault) for fault in faults or [first])
        raise type(first)(f"service '{section.name}' has no usable model: {every}", hint=first.hint)
    models = [artifact for artifact in sound if artifact.manifest.kind == "onnx"]
    floors = [artifact for artifact in sound if artifact.manifest.kind != "onnx"] or _own_floor(section, sound)
    return [*models, *floors], [
        f"service '{section.name}' goes without an artifact: {fault.sentence()}" for fault in faults
    ]


def _own_floor(section: ServiceSection, siblings: list[Artifact]) -> list[Artifact]:
    """The configured floor, for a selection that brings none; one that does not fit is not needed."""
    if not section.floor:
        return []
    try:
        floor = open_artifact(Path(section.floor))
        _check_fits(floor, siblings)
        _card([floor], {})
    except ArtifactError:
        return []
    return [floor]


def _check_fits(artifact: Artifact, siblings: list[Artifact]) -> None:
    """Raises: Incompatible: a name is taken, or inputs and outputs differ from those of the siblings."""
    manifest = artifact.manifest
    if any(other.manifest.name == manifest.name for other in siblings):
        raise Incompatible(f"{artifact.folder}: another artifact of this service is called '{manifest.name}' too")
    if siblings and _signature(manifest) != _signature(siblings[0].manifest):
        first = siblings[0]
        raise Incompatible(
            f"{artifact.folder}: inputs or outputs of '{manifest.name}' differ from those of '{first.manifest.name}'",
            hint="Fallbacks must take the same inputs and give the same outputs as the active model.",
        )


def _signature(manifest: Manifest) -> list[tuple[str, str, tuple[int, ...]]]:
    inputs = [(one.name, one.datatype, tuple(one.shape)) for one in manifest.inputs]
    outputs = [(one.name, one.datatype, tuple(one.shape)) for one in manifest.outputs]
    return sorted(inputs) + sorted(outputs)


def _reference(artifact: Artifact) -> tuple[Reference | None, str]:
    if "reference" not in artifact.manifest.blobs:
        return None, ""
    try:
        return load_reference(artifact.path("reference")), ""
    except ArtifactError as error:
        return None, f"drift of '{artifact.manifest.service}' is not watched: {error.sentence()}"


def _watched_view(manifest: Manifest, reference: Reference | None) -> View | None:
    """The view the reference is about."""
    if reference is None:
        return None
    can = [view for view in manifest.views if view.source == "graph" or view.kind == "outputs"]
    return next((view for view in can if tuple(view.features) == reference.features), None)


def _places(artifacts: Iterable[Artifact], view: View) -> tuple[int, ...]:
    """Where the watched view begins among the views of each engine; -1 = it has no such view."""
    places = []
    for artifact in artifacts:
        drawn = [one for one in artifact.manifest.views if one.source == "graph"]
        same = [at for at, one in enumerate(drawn) if one.features == view.features]
        places.append(sum(len(one.features) for one in drawn[: same[0]]) if same else -1)
    return tuple(places)


# --- plans -------------------------------------------------------------------------------------------------
def _engine(artifact: Artifact, runtime: RuntimePlan) -> EnginePlan:
    manifest = artifact.manifest
    hidden = {view.output for view in manifest.views if view.source == "graph"}
    model = manifest.blobs.get("model")
    return EnginePlan(
        engine=manifest.name,
        version=manifest.version,
        digest=artifact.digest,
        kind=EngineKind(manifest.kind),
        model_path=str(artifact.path("model").absolute()) if model else "",
        model_sha256=model.sha256 if model else "",
        golden_path=str(artifact.path("golden").absolute()) if "golden" in manifest.blobs else "",
        inputs=tuple(TensorPlan(one.name, one.datatype, tuple(one.shape)) for one in manifest.inputs),
        outputs=tuple(
            TensorPlan(one.name, one.datatype, tuple(one.shape)) for one in manifest.outputs if one.name not in hidden
        ),
        views=tuple(
            ViewPlan(view.name, view.output, len(view.features)) for view in manifest.views if view.source == "graph"
        ),
        floor_outputs=manifest.floor_outputs,
        reads=() if manifest.kind == "floor" else tuple(manifest.reads) or None,
        runtime=running(manifest, runtime),
    )


def _guard(config: AgentConfig, manifest: Manifest, reference: Reference | None) -> GuardPlan | None:
    described = next(
        (one for one in manifest.inputs if one.channels), manifest.inputs[0] if manifest.inputs else None
    )
    if described is None:
        return None
    statistics = reference.guard if reference else None
    means = statistics.channel_mean if statistics else {}
    return GuardPlan(
        input=described.name,
        channels=tuple(
            _channel(config.guard, manifest.service, one, means.get(one.name, 0.0)) for one in described.channels
        ),
        not_finite=config.guard.not_finite or GuardPolicy(described.missing),
        out_of_range=config.guard.out_of_range or GuardPolicy(described.out_of_range),
        group_rms=statistics.group_rms if statistics else None,
    )


def _channel(config: GuardSection, service: str, channel: Channel, mean: float) -> ChannelPlan:
    """Whose own policy: the configuration's for this channel, the configuration's for all, the manifest's."""
    own = [one for one in config.channel if one.name == channel.name and one.service in ("", service)]
    not_finite, out_of_range = config.not_finite, config.out_of_range
    for one in own:  # the last one that says something
        not_finite, out_of_range = one.not_finite or not_finite, one.out_of_range or out_of_range
    return ChannelPlan(
        channel.name, channel.group, channel.minimum, channel.maximum, mean,
        not_finite or (GuardPolicy(channel.missing) if channel.missing else None),
        out_of_range or (GuardPolicy(channel.out_of_range) if channel.out_of_range else None),
    )  # fmt: skip


def _window(section: ServiceSection, manifest: Manifest) -> WindowPlan | None:
    """How raw samples become the service's only input; None when the manifest says nothing that fits it."""
    window = manifest.window
    if window is None or len(manifest.inputs) != 1:
        return None
    only = manifest.inputs[0]
    if (
        only.datatype == "BYTES"
        or only.shape[:2] not in ([-1, window.length], [1, window.length])
        or -1 in only.shape[2:]
    ):
        return None
    return WindowPlan(
        only.name, window.length, window.hop, window.rate_hz,
        section.gap_policy, section.max_gap_s, section.max_streams,
    )  # fmt: skip


def _card(artifacts: Iterable[Artifact], groups: dict[str, str]) -> Card:
    manifests = [artifact.manifest for artifact in artifacts]
    document = next((card for artifact in artifacts if (card := artifact.card())), {})
    return read_card(
        document,
        engines=tuple(manifest.name for manifest in manifests),
        reads={manifest.name: manifest.reads for manifest in manifests},
        floors=[manifest.name for manifest in manifests if manifest.kind == "floor"],
        groups=groups,
    )


def _missing(folders: Sequence[Path], artifacts: Sequence[Artifact]) -> str:
    if folders[0] == artifacts[0].folder:
        return ""
    return f"the active artifact {folders[0]} cannot be used, {artifacts[0].manifest.name} takes its place"


def _policy(config: AgentConfig, service: str, card: Card, missing: str) -> ServicePolicy:
    fallback = config.fallback
    return ServicePolicy(
        service=service,
        card=card,
        limits=Limits(fallback.dwell_s, fallback.probation_s, fallback.max_dwell_s),
        failures=fallback.failures,
        of_last=fallback.of_last,
        switching=switching(card) - (frozenset() if config.drift.switch else {AlarmKind.HARM}),
        missing=missing,
        least_gain=config.drift.least_gain,
    )
