"""AgentConfig: every setting of the device side, checked once and frozen.

Units stand in the names. Unknown keys are refused with the nearest known name. Relative paths start at the
folder of the configuration file. What a value means is its `description`; the reference page is made of these.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from agent.configuring import CaSource, FilePath, Identifier, Loaded, OptionalPath, Section, check_pair, load
from agent.contract.artifact import MANIFEST
from agent.contract.errors import ConfigError
from agent.contract.plan import GapPolicy, GuardPolicy, Placement
from agent.contract.topics import Topics
from agent.settings import Settings


def _tcp_address(text: str) -> str:
    port = text.rpartition(":")[2]
    if text and int(port) > MAX_PORT:
        raise ValueError(f"the port must be at most {MAX_PORT}")
    return text


def _host_identifier() -> str:
    """The host's name, made fit for a topic."""
    return re.sub(r"[^a-z0-9-]+", "-", platform.node().split(".")[0].lower()).strip("-")[:36] or "device"


MAX_PORT = 65535
TcpAddress = Annotated[str, AfterValidator(_tcp_address)]

REFERENCE_HINT = "docs/reference/agent-config.md explains every key."


class DeviceSection(Section):
    id: Identifier = Field(default_factory=_host_identifier, description="This device; default: the host's name.")
    fleet: Identifier = Field(default="default", description="The fleet this device belongs to.")


class StateSection(Section):
    folder: FilePath = Field(default=Path("/var/lib/edgewarden"), description="Where the agent keeps its own state.")


class ClockSection(Section):
    source: Literal["wall", "data"] = Field(
        default="wall", description="Whose time decides: the wall clock, or the newest `ew_time_s` of the requests."
    )


class ServingSection(Section):
    unix: OptionalPath = Field(
        default="/run/edgewarden/serve.sock",
        description="Unix socket clients ask on; empty = none.",
    )
    unix_mode: str = Field(default="0660", pattern=r"^0[0-7]{3}$", description="Access mode of that socket, octal.")
    tcp: TcpAddress = Field(
        default="",
        pattern=r"^$|^.+:[0-9]{1,5}$",
        description="HOST:PORT to serve on as well (IPv6 in brackets; port 0 = any free one); empty = none.",
    )
    providers: list[Annotated[str, Field(pattern=r"^[A-Za-z0-9]{1,64}$")]] = Field(
        default=[],
        max_length=8,
        description="Execution providers to compute on, best first (`CUDA`, `XNNPACK`...); the CPU does what they "
        "cannot, and everything when they are not there, which `status` and `doctor` say.",
    )
    memory_mb: int = Field(
        default=0,
        ge=0,
        le=1_000_000,
        description="Most memory one engine may take while it is loaded and proven, MB; 0 = what its artifact "
        "promises, else what the device has.",
    )
    spin: bool = Field(
        default=False, description="Waiting threads of an engine stay awake: a little faster, a core each busy."
    )
    cpus: list[Annotated[int, Field(ge=0, le=4095)]] = Field(
        default=[], max_length=256, description="The only CPUs the worker runs on; empty = all."
    )
    max_body_bytes: int = Field(default=64 * 1024 * 1024, ge=1024, le=1 << 31, description="Largest request body.")
    handover: Literal["auto", "beside", "lean"] = Field(
        default="auto",
        description="How a new worker takes over: started beside the old one (`beside`), after the old one has "
        "ended, while clients wait (`lean`), or whichever the free memory allows (`auto`).",
    )
    floor_status: Literal[200, 503] = Field(default=200, description="HTTP status of an answer by the floor.")


class ServiceSection(Section):
    name: Identifier = Field(description="The name clients ask for.")
    artifact: FilePath = Field(description="Folder of the active model's artifact.")
    fallbacks: list[FilePath] = Field(
        default=[], max_length=8, description="Folders of fallback artifacts, best first."
    )
    floor: OptionalPath = Field(default="", description="Folder of the floor's artifact: the answer of last resort.")
    deadline_ms: float = Field(
        default=1000.0, gt=0, le=600_000, description="A request is answered or refused within this."
    )
    queue_limit: int = Field(default=32, ge=1, le=4096, description="Requests that may wait before 503.")
    threads: int = Field(
        default=0, ge=0, le=64, description="CPU threads of each engine; 0 = chosen by measurement at its first load."
    )
    placement: Placement = Field(
        default=Placement.AUTO,
        description="Where its engines run: on the event loop's thread (`inline`), on a thread of their own "
        "(`thread`), or by the time they take (`auto`).",
    )
    control_flow: list[Literal["If", "Loop", "Scan", "SequenceMap"]] = Field(
        default=[],
        description="Operators with graphs inside that its models may use, beside those their manifests name.",
    )
    gap_policy: GapPolicy = Field(
        default=GapPolicy.HOLD,
        description="Samples missing in a stream: repeat the last one before them (`hold`), draw a straight line "
        "over them (`interpolate`) or begin windows anew after them (`reset`).",
    )
    max_gap_s: float = Field(
        default=0.5, ge=0, le=60, description="A longer gap in a stream is not filled: windows begin anew after it."
    )
    max_streams: int = Field(
        default=64, ge=1, le=4096, description="Streams kept at a time; the one unused longest gives way."
    )


class GuardChannelSection(Section):
    name: str = Field(min_length=1, max_length=64, description="The channel, as in the manifest.")
    service: str = Field(default="", description="Of this service; empty = of every one that has such a channel.")
    not_finite: GuardPolicy | None = Field(default=None, description="As `guard.not_finite`, for this channel.")
    out_of_range: GuardPolicy | None = Field(default=None, description="As `guard.out_of_range`, for this channel.")


class GuardSection(Section):
    not_finite: GuardPolicy | None = Field(
        default=None,
        description="NaN or infinity in an input: answer 400 (`refuse`), put the channel's mean in its place "
        "(`impute`, `clip`) or let it through (`pass`); default: the manifest's. A channel that the engine asked "
        "first does not read is imputed, never refused.",
    )
    out_of_range: GuardPolicy | None = Field(
        default=None,
        description="Values out of the channel's range: `refuse`, `impute` and `pass` as above, `clip` to the "
        "nearest allowed one; default: the manifest's.",
    )
    repeated: bool | None = Field(
        default=None,
        description="Raise an alarm when inputs repeat bit for bit; default: only where the manifest has a window, "
        "since numbers of a table may repeat for good reasons.",
    )
    channel: list[GuardChannelSection] = Field(
        default=[], max_length=256, description="Tables `[[guard.channel]]`: policies of single channels."
    )


class FallbackSection(Section):
    dwell_s: float = Field(default=120.0, ge=0, description="Minimum stay on a fallback (decision clock).")
    probation_s: float = Field(default=60.0, ge=0, description="How long a returned model is watched.")
    max_dwell_s: float = Field(
        default=86_400.0, gt=0, description="A failed return doubles the next stay, up to this."
    )
    failures: int = Field(
        default=3, ge=1, description="So many failed requests of the last `of_last` leave an engine."
    )
    of_last: int = Field(default=20, ge=1, le=10_000, description="See `failures`.")


class DriftSection(Section):
    switch: bool = Field(
        default=True,
        description="Switch when a drift does harm: when a fallback with other inputs, which look as ever, keeps "
        "disagreeing. Without it harm is told and nothing follows. Plain drift never switches.",
    )
    least_gain: float = Field(
        default=0.0,
        ge=-1,
        le=1,
        description="Accuracy such a switch must gain at least, as far as disagreement proves it: `0.3` leaves alone "
        "most of what a new user or place brings, and misses the milder faults too.",
    )


class BudgetSection(Section):
    latency_p95_us: float = Field(
        default=0.0, ge=0, description="95th percentile of latency; 0 = the artifact's promise."
    )
    power_w: float = Field(default=0.0, ge=0, description="Device power; 0 = no limit.")
    temperature_c: float = Field(default=0.0, ge=0, description="Device temperature; 0 = no limit.")
    memory_bytes: int = Field(default=0, ge=0, description="Resident memory of agent and worker; 0 = no limit.")


class PowerSection(Section):
    watts_per_cpu: float = Field(
        default=4.0, gt=0, le=1000, description="For the estimate where no meter is found: watts of one busy core."
    )


class LinkSection(Section):
    enabled: bool = Field(default=False, description="Report to a broker.")
    host: str = Field(default="localhost", min_length=1, description="Broker's host name or address.")
    port: int = Field(default=1883, ge=1, le=65535, description="Broker's port (8883 with TLS).")
    username: str = Field(default="", description="User name at the broker; empty = none.")
    password_file: OptionalPath = Field(
        default="",
        description="File holding the password; default: the systemd credential `mqtt-password`, if there is one.",
    )
    tls_ca: CaSource = Field(default="", description="CA certificates (PEM), or `system`; set = TLS.")
    tls_cert: OptionalPath = Field(default="", description="This device's certificate (PEM), for mutual TLS.")
    tls_key: OptionalPath = Field(default="", description="Its key (PEM).")
    prefix: str = Field(default="ew", description="First part of every topic.")
    keepalive_s: int = Field(default=30, ge=5, le=3600, description="MQTT keep-alive.")


class TelemetrySection(Section):
    interval_s: float = Field(default=60.0, ge=0.5, le=86_400, description="Length of one telemetry window.")


class OutboxSection(Section):
    max_bytes: int = Field(
        default=16 * 1024 * 1024, ge=64 * 1024, le=1 << 32, description="Most it may hold on disk."
    )
    max_age_s: float = Field(default=7 * 86_400.0, gt=0, description="Older messages are dropped and counted.")
    keep_unheard: bool = Field(
        default=True,
        description="Keep what the broker acknowledged but had no subscriber for, and send it again; telemetry only "
        "until another topic is heard.",
    )
    delete_after: Literal["puback", "host"] = Field(
        default="puback",
        description="When a message leaves the outbox: taken by the broker (`puback`), or committed by the host "
        "(`host`; takes effect once a host has enrolled this device or acknowledged something).",
    )


class UpdateSection(Section):
    enabled: bool = Field(default=False, description="Obey a director's signed documents and commands.")
    root: OptionalPath = Field(default="", description="The fleet's root.json, in which all trust begins.")
    repository: str = Field(
        default="",
        pattern=r"^$|^https?://",
        max_length=512,
        description="Base URL that says who a director is; empty = the one enrolment or a desired document names.",
    )
    device_class: str = Field(
        default="", max_length=64, description="Only artifacts made for this class are installed; empty = any."
    )
    window: str = Field(
        default="",
        pattern=r"^$|^([01][0-9]|2[0-3]):[0-5][0-9]-([01][0-9]|2[0-3]):[0-5][0-9]$",
        description="HH:MM-HH:MM UTC in which an update may be tried and activated; empty = at any time.",
    )
    probation_s: float = Field(default=60.0, ge=0, le=604_800, description="How long a new model is watched.")
    tls_ca: CaSource = Field(default="", description="CA certificates (PEM) for https, or `system`.")
    max_artifact_bytes: int = Field(
        default=1 << 30, ge=1024, le=1 << 40, description="Most bytes of one update that are fetched."
    )


class SamplesSection(Section):
    allow: bool = Field(default=False, description="Upload recordings when a director asks by signed command.")
    folder: OptionalPath = Field(default="", description="Folder of recordings (*.npz); the newest is offered.")
    max_bytes: int = Field(
        default=64 * 1024 * 1024, ge=1024, le=1 << 32, description="Larger recordings are never uploaded."
    )


class EnrolmentSection(Section):
    url: str = Field(
        default="", pattern=r"^$|^https?://", max_length=512, description="The host's /enrol; empty = not asked for."
    )
    token_file: OptionalPath = Field(default="", description="File holding the one-time token.")


class AdminSection(Section):
    socket: OptionalPath = Field(
        default="", description="Admin socket (mode 0600); default: <state.folder>/admin.sock."
    )


class WorkerSection(Section):
    start_timeout_s: float = Field(default=60.0, gt=0, description="Loading and golden inputs must be done by then.")
    ping_interval_s: float = Field(
        default=1.0, gt=0, le=60, description="How often the worker is asked for a sign of life."
    )
    missed_pings: int = Field(default=3, ge=1, le=100, description="So many unanswered = hung: it is replaced.")
    drain_timeout_s: float = Field(
        default=10.0, gt=0, le=600, description="How long a stopping worker may finish requests."
    )
    stuck_after_s: float = Field(default=5.0, gt=0, le=600, description="A single run longer than this is stuck.")


class LogSection(Section):
    level: Literal["debug", "info", "notice", "warning", "error"] = Field(
        default="info", description="Least severity."
    )
    style: Literal["auto", "text", "json"] = Field(
        default="auto", description="`auto`: text, with `<N>` under systemd."
    )


class AgentConfig(Section):
    """The whole configuration of one agent."""

    device: DeviceSection = Field(default_factory=DeviceSection)
    state: StateSection = Field(default_factory=StateSection)
    clock: ClockSection = Field(default_factory=ClockSection)
    serving: ServingSection = Field(default_factory=ServingSection)
    service: list[ServiceSection] = Field(default=[], max_length=32)
    guard: GuardSection = Field(default_factory=GuardSection)
    fallback: FallbackSection = Field(default_factory=FallbackSection)
    drift: DriftSection = Field(default_factory=DriftSection)
    budget: BudgetSection = Field(default_factory=BudgetSection)
    power: PowerSection = Field(default_factory=PowerSection)
    link: LinkSection = Field(default_factory=LinkSection)
    telemetry: TelemetrySection = Field(default_factory=TelemetrySection)
    outbox: OutboxSection = Field(default_factory=OutboxSection)
    update: UpdateSection = Field(default_factory=UpdateSection)
    samples: SamplesSection = Field(default_factory=SamplesSection)
    enrolment: EnrolmentSection = Field(default_factory=EnrolmentSection)
    admin: AdminSection = Field(default_factory=AdminSection)
    worker: WorkerSection = Field(default_factory=WorkerSection)
    log: LogSection = Field(default_factory=LogSection)

    @property
    def admin_socket(self) -> Path:
        return Path(self.admin.socket) if self.admin.socket else self.state.folder / "admin.sock"

    @property
    def topics(self) -> Topics:
        return Topics(fleet=self.device.fleet, device=self.device.id, prefix=self.link.prefix)


LoadedConfig = Loaded[AgentConfig]


def load_config(file: Path, environment: Mapping[str, str]) -> LoadedConfig:
    """Read, merge and check the configuration.

    Raises:
        ConfigError: a file is missing or not TOML, a key is unknown (the nearest one is named), a value is of
            the wrong type or out of range, or two values contradict each other. Whether artifacts can be used is
            asked later: `absent_artifacts`, `agent.blueprint`.
    """
    loaded = load(AgentConfig, file, environment, hint=REFERENCE_HINT)
    _check_sense(loaded.config, loaded.settings)
    return loaded


def absent_artifacts(loaded: LoadedConfig) -> list[str]:
    """One sentence for each configured folder that holds no artifact."""
    return [
        f"service '{service.name}' in {loaded.settings.origin('service', index)}: {folder} holds no artifact"
        for index, service in enumerate(loaded.config.service)
        for folder in (service.artifact, *service.fallbacks, *([Path(service.floor)] if service.floor else []))
        if not (folder / MANIFEST).is_file()
    ]


def _check_sense(config: AgentConfig, settings: Settings) -> None:
    """What no single key can tell."""
    if not config.service:
        raise ConfigError(f"{settings.file} configures no service", hint="Add a [[service]] with name and artifact.")
    names = [service.name for service in config.service]
    if len(set(names)) < len(names):
        raise ConfigError(f"{settings.file} names a service twice: {', '.join(names)}")
    check_pair(config, "link.tls_cert", "link.tls_key")
    if config.fallback.failures > config.fallback.of_last:
        raise ConfigError("fallback.failures cannot be more than fallback.of_last")
    if config.update.enabled and not Path(config.update.root).is_file():
        raise ConfigError(
            f"update.root names no file: '{config.update.root}'", hint="Copy the repository's 1.root.json there."
        )
    if config.samples.allow and not config.samples.folder:
        raise ConfigError("samples.allow needs samples.folder")
    if config.enrolment.url and not config.enrolment.token_file:
        raise ConfigError("enrolment.url needs enrolment.token_file")
