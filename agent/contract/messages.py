"""What travels over MQTT, as pydantic models. Unknown fields are kept: an older reader loses nothing.

Every upward message carries `v` (message format), `device`, `boot` (id of this agent start), `seq` (per boot, from
1 on, without gaps over all queued topics) and `at` (wall time, seconds since 1970). Shares are 0..1.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agent.contract.errors import MalformedMessage, UnsupportedVersion

FORMAT = 1
MAX_MESSAGE_BYTES = 256 * 1024


class Message(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    def encode(self) -> bytes:
        """Compact JSON with sorted keys: the same message is always the same bytes."""
        import json

        return json.dumps(
            self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False
        ).encode()

    @classmethod
    def decode(cls, payload: bytes) -> Self:
        """Read one message.

        Raises:
            MalformedMessage: not JSON, too large, or a field is missing or wrong.
            UnsupportedVersion: a message format newer than this reader.
        """
        if len(payload) > MAX_MESSAGE_BYTES:
            raise MalformedMessage(f"{cls.__name__} of {len(payload)} bytes is over {MAX_MESSAGE_BYTES}")
        try:
            message = cls.model_validate_json(payload)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise MalformedMessage(f"{cls.__name__}: {place}: {first['msg']}") from None
        version = getattr(message, "v", FORMAT)
        if version > FORMAT:
            raise UnsupportedVersion(f"{cls.__name__} has format {version}, this reader knows {FORMAT}")
        return message


class Envelope(Message):
    v: int = FORMAT
    device: str
    boot: str
    seq: int = Field(ge=0)
    at: float


class Status(Message):
    """Retained presence; also the last will. Not queued, so it has no `seq`.

    `kept_from`: boot -> nothing of that boot below this sequence number will come any more, because it is settled or
    was dropped; said only while the host waits for such messages.
    """

    v: int = FORMAT
    device: str
    boot: str
    state: Literal["online", "offline", "sleeping"]
    reason: str = ""
    at: float
    kept_from: dict[str, int] = {}


class Birth(Message):
    """Retained: what this device is and carries."""

    v: int = FORMAT
    device: str
    boot: str
    at: float
    agent: str
    runtime: str
    machine: str
    system: str
    cpu_flags: list[str] = []
    memory_bytes: int = 0
    capabilities: list[str] = []
    artifacts: dict[str, str] = {}  # engine -> manifest digest


class Reported(Message):
    """Retained: what runs now, and how far the last desired document got."""

    v: int = FORMAT
    device: str
    boot: str
    at: float
    desired_version: int = 0
    update_state: str = "idle"
    code: str = ""
    attempt: int = 0
    moved_bytes: int = 0
    services: dict[str, Any] = {}  # service -> {active, preferred, reason, since, health, versions}


class DriftWindow(Message):
    """Sums of one view over `rows` consecutive rows: integers, so that merging is exact in any order.

    Row r, feature j contributes q = round(clip((x - centre_j) / scale_j, -clip, clip) * 2**fraction_bits) to
    `sums[j]` and q*q to `squares[j]`; centre and scale are those of the reference named by `reference`.
    """

    service: str
    view: str
    reference: str  # sha256 of reference.npz
    first: int  # sequence of the first and last row on this device and boot
    last: int
    rows: int = Field(ge=0)
    clip: float
    fraction_bits: int = Field(ge=0, le=20)
    sums: list[int]
    squares: list[int]
    classes: list[int] = []  # rows per predicted class
    counters: dict[str, int] = {}
    """not_finite, out_of_range, repeated, dead:<channel>, stuck:<channel>, scale:<group>, gap"""


class LatencySketch(Message):
    """Log-histogram of latencies; see `agent.sketch`. `buckets` maps a bucket number to its count."""

    service: str
    engine: str
    relative_error: float
    count: int
    total_us: int
    minimum_us: int
    maximum_us: int
    buckets: dict[str, int]


class Power(Message):
    source: str  # rapl | hwmon | battery | estimate
    measured: bool  # False: `joules` is an estimate from CPU time
    joules: float
    inferences: int
    joules_per_inference: float | None = None
    watts: float | None = None


class Telemetry(Envelope):
    """One batch of windows. Counters are totals over [from_s, to_s] of this boot."""

    from_s: float
    to_s: float
    counters: dict[str, int]
    latency: list[LatencySketch] = []
    drift: list[DriftWindow] = []
    power: Power | None = None
    gauges: dict[str, float | None] = {}  # temperature_c, memory_bytes, disk_free_bytes, throttled...
    health: dict[str, str] = {}  # service -> health state


Severity = Literal["info", "notice", "warning", "error", "critical"]


class ChangedFeature(Message):
    """One feature since a drift began. `share` of the evidence; `shift` of its mean in `unit`, of a feature
    `CHANNEL.log_...` the logarithm of a factor; `shift_sd` in reference standard deviations; `spread`: standard
    deviation over the reference's. `how`: shift | spread | relation | repeated | missing | range | shares.
    """

    feature: str = Field(max_length=64)
    channel: str = Field(default="", max_length=64)
    share: float = Field(ge=0, le=1)
    how: str = Field(max_length=16)
    shift: float = Field(allow_inf_nan=False)
    shift_sd: float = Field(allow_inf_nan=False)
    spread: float = Field(ge=0, allow_inf_nan=False)
    unit: str = Field(default="", max_length=16)


Thousandths = Annotated[int, Field(ge=0, le=1000)]


class DriftPicture(Message):
    """One feature's histogram: thousandths of the rows in equal bins from `low` to `high`, others in the outer."""

    feature: str = Field(max_length=64)
    low: float = Field(allow_inf_nan=False)
    high: float = Field(allow_inf_nan=False)
    reference: list[Thousandths] = Field(max_length=16)  # empty: the reference has none
    now: list[Thousandths] = Field(max_length=16)


class DriftExplanation(Message):
    """`details["explanation"]` of a drift event: what changed, largest share first. `rows` since the estimated
    change, of which `looked_at` are described; `scope`: "one sensor" (`blamed`) or "the world"; `relative`: to
    what is usual for the class, the season or the past, not to a constant; `changed_at_s`: the data's time of the
    change; `changed_ago_s`: seconds from there to the newest row.
    """

    rows: int = Field(ge=0)
    looked_at: int = Field(ge=0)
    scope: str = Field(max_length=16)
    blamed: str = Field(default="", max_length=64)
    relative: bool = False
    changed_at_s: float | None = Field(default=None, allow_inf_nan=False)
    changed_ago_s: float | None = Field(default=None, allow_inf_nan=False)
    channels: dict[str, float] = Field(default={}, max_length=8)
    features: list[ChangedFeature] = Field(max_length=8)
    pictures: list[DriftPicture] = Field(default=[], max_length=3)


class Event(Envelope):
    """Something a person or the host should know. `numbers` are the evidence, `text` reads without them."""

    severity: Severity
    kind: str  # drift | fallback | sensor | power | update | health | engine | worker | link
    service: str = ""
    text: str
    channels: list[str] = []
    numbers: dict[str, float] = {}
    details: dict[str, Any] = {}
