"""What a worker is told: one compiled plan over the channel, and the frames both sides exchange.

Plain frozen dataclasses, so that the worker needs no validation library: the agent process has already
checked the artifacts and the configuration. All paths are absolute. Tensors are named as in the manifest.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class EngineKind(StrEnum):
    ONNX = "onnx"
    FLOOR = "floor"  # a declared constant answer; needs no runtime


class Placement(StrEnum):
    """Where a service's engines run."""

    AUTO = "auto"  # by what they take: short runs inline, long ones on the thread
    INLINE = "inline"  # on the event loop's thread: no hand-over, but nobody else is answered meanwhile
    THREAD = "thread"  # on a thread of the service: costs a hand-over, health stays answered


class GuardPolicy(StrEnum):
    """What happens to an input that a guard finds wrong."""

    REFUSE = "refuse"  # 400, nothing is run; imputed in channels the first engine does not read
    IMPUTE = "impute"  # bad numbers are replaced by the channel's reference mean
    CLIP = "clip"  # out-of-range numbers are moved to the nearest allowed one
    PASS = "pass"  # served as it is; said in the response and counted  # noqa: S105


class GapPolicy(StrEnum):
    """What takes the place of samples that a stream did not bring."""

    HOLD = "hold"  # the last sample before the gap, repeated
    INTERPOLATE = "interpolate"  # a straight line from the last sample before the gap to the first after it
    RESET = "reset"  # nothing: windows begin anew after the gap


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One input or output. `shape` holds -1 for a free axis; `datatype` is the Open Inference name (FP32...)."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ChannelPlan:
    """One sensor channel on the last axis of an input; the guard's numbers are in the channel's own unit.

    `minimum`/`maximum`: allowed range. `mean`: what imputing writes. `group`: channels that share a sensor.
    `not_finite`, `out_of_range`: this channel's own policies, None = those of the input.
    """

    name: str
    group: str
    minimum: float
    maximum: float
    mean: float
    not_finite: GuardPolicy | None = None
    out_of_range: GuardPolicy | None = None


@dataclass(frozen=True, slots=True)
class GuardPlan:
    """How inputs are checked. `channels` describe the last axis of `input`; empty = only NaN/Inf is checked.

    dead: standard deviation over the window below `dead_sd`; stuck: one value repeated for `stuck_share` of
    the window while the channel's neighbours move; scale: a group's rms outside reference range by more
    than `scale_factor`.  `group_rms` maps a group to its reference (minimum, maximum) rms.
    """

    input: str
    channels: tuple[ChannelPlan, ...] = ()
    not_finite: GuardPolicy = GuardPolicy.REFUSE
    out_of_range: GuardPolicy = GuardPolicy.PASS
    dead_sd: float = 1e-3
    stuck_share: float = 0.9
    scale_factor: float = 2.5
    group_rms: dict[str, tuple[float, float]] | None = None


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """How a stream of raw samples becomes rows of `input`, whose axes are (rows, length, ...).

    `length` and `hop` in samples. A gap over `max_gap_s` is never filled. At most `max_streams` streams are kept.
    """

    input: str
    length: int
    hop: int
    rate_hz: float
    gap_policy: GapPolicy = GapPolicy.HOLD
    max_gap_s: float = 0.5
    max_streams: int = 64


@dataclass(frozen=True, slots=True)
class ViewPlan:
    """One view: a graph output of shape (rows, width) that stays on the device."""

    name: str
    output: str
    width: int


@dataclass(frozen=True, slots=True)
class RuntimePlan:
    """How an engine is loaded and run. `threads`: 0 = chosen by measurement.

    `providers`: wanted execution providers, best first, before the CPU. `spin`: waiting threads stay awake.
    `memory_bytes`: the most it may take while it is loaded and proven, 0 = what the device has.
    `control_flow`: operators with graphs inside it may use. `cache_folder`: of `agent.modelcache`, "" = none.
    """

    threads: int = 1
    providers: tuple[str, ...] = ()
    spin: bool = False
    memory_bytes: int = 0
    control_flow: tuple[str, ...] = ()
    cache_folder: str = ""


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """One model of a service's lineup. `model_path` and `golden_path` are empty for a floor.

    `reads`: the channels it looks at, None = all; a floor looks at none.
    """

    engine: str
    version: int
    digest: str  # sha256 of the manifest
    kind: EngineKind
    model_path: str = ""
    model_sha256: str = ""
    golden_path: str = ""
    inputs: tuple[TensorPlan, ...] = ()
    outputs: tuple[TensorPlan, ...] = ()
    views: tuple[ViewPlan, ...] = ()
    floor_outputs: dict[str, list[float]] | None = None  # one row per output
    reads: tuple[str, ...] | None = None
    runtime: RuntimePlan = RuntimePlan()


@dataclass(frozen=True, slots=True)
class ServicePlan:
    """One served name and the engines that may answer it, best first; the last is the floor.

    `label_output`: the output whose argmax is the predicted class of an observation ("" = none).
    """

    service: str
    engines: tuple[EnginePlan, ...]
    active: str
    guard: GuardPlan | None
    labels: tuple[str, ...] = ()
    label_output: str = ""
    deadline_ms: float = 1000.0
    queue_limit: int = 32
    floor_status: int = 200  # HTTP status of a floor answer: 200 or 503
    placement: Placement = Placement.AUTO
    window: WindowPlan | None = None  # None: the service takes no streams


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """Everything one worker needs. Sockets, ring and channel come as file descriptors, not names."""

    generation: int
    services: tuple[ServicePlan, ...]
    max_body_bytes: int = 64 * 1024 * 1024
    stuck_after_s: float = 5.0
    cpus: tuple[int, ...] = ()  # the only ones to run on; empty = all


# --- frames: agent -> worker -------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Start:
    plan: WorkerPlan


@dataclass(frozen=True, slots=True)
class Serve:
    """Accept connections from now on."""


@dataclass(frozen=True, slots=True)
class Prefer:
    """From now on `engine` answers first for `service`; the others stay behind it in plan order."""

    service: str
    engine: str
    reason: str


@dataclass(frozen=True, slots=True)
class Consult:
    """From now on these engines are asked too, after the answer has gone out; what they say leaves records. Empty =
    nobody is asked.
    """

    service: str
    engines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Drain:
    """Stop accepting, finish what is being answered, exit within `limit_s`.

    `hand_over`: leave connections and streams to a successor, which may not be there yet; else connections end.
    """

    limit_s: float = 30.0
    hand_over: bool = False


@dataclass(frozen=True, slots=True)
class Ping:
    nonce: int


# --- frames: worker -> agent -------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class EngineLoaded:
    """`golden_ok` is False when the engine's golden inputs were answered wrongly; it is then not used.

    `placement`: where its service's runs happen, `inline` or `thread`. `provider`: what computes it; `note`: in
    words why it is not the one asked for. `cached`: its optimised graph was. `memory_bytes`: what it took while it
    was loaded and proven. A floor has none of these.
    """

    service: str
    engine: str
    load_ms: float
    golden_ok: bool
    error_code: str = ""
    error: str = ""
    threads: int = 0
    provider: str = ""
    placement: str = ""
    p50_us: float = 0.0
    p95_us: float = 0.0
    cached: bool = False
    memory_bytes: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True)
class Ready:
    generation: int
    pid: int
    engines: tuple[EngineLoaded, ...]


@dataclass(frozen=True, slots=True)
class Preferred:
    """The worker has switched; every request read after this frame was written is answered by `engine`."""

    service: str
    engine: str


@dataclass(frozen=True, slots=True)
class EngineTrouble:
    """A run failed (exception, non-finite output, deadline, stuck). At most a few a second; `count` since last."""

    service: str
    engine: str
    code: str  # engine_failed | non_finite | deadline_exceeded | stuck
    text: str
    count: int


@dataclass(frozen=True, slots=True)
class Pong:
    """`statistics`: flat numbers of the worker (connections, queue, resident_bytes, cpu_s, requests, errors...)."""

    nonce: int
    statistics: dict[str, float]


@dataclass(frozen=True, slots=True)
class Drained:
    generation: int


@dataclass(frozen=True, slots=True)
class Inherited:
    """Everything `generation` left has been taken over; it has ended. `lost`: descriptors there was no room for."""

    generation: int
    connections: int
    streams: int
    refused: int
    lost: int


ToWorker = Start | Serve | Prefer | Consult | Drain | Ping
FromWorker = Ready | Preferred | EngineTrouble | Pong | Drained | Inherited
