"""One filled-in example of every document of contract v1; golden/ holds their bytes."""

from __future__ import annotations

from agent.contract import artifact, messages

STATUS = messages.Status(
    device="gateway-1", boot="b7f3", state="online", reason="started", at=1764000000.25, kept_from={"b7f2": 41}
)
BIRTH = messages.Birth(
    device="gateway-1",
    boot="b7f3",
    at=1764000000.25,
    agent="0.1.0",
    runtime="1.32.0",
    machine="x86_64",
    system="Linux 6.1",
    cpu_flags=["avx2", "avx512_vnni"],
    memory_bytes=2_000_000_000,
    capabilities=["serve", "drift"],
    artifacts={"wrist": "ab" * 32},
)
REPORTED = messages.Reported(
    device="gateway-1",
    boot="b7f3",
    at=1764000001.0,
    services={"wrist": {"active": "wrist-accel", "preferred": "wrist", "reason": "gx is dead", "health": "degraded"}},
)
DRIFT_WINDOW = messages.DriftWindow(
    service="wrist",
    view="channels",
    reference="cd" * 32,
    first=1,
    last=64,
    rows=64,
    clip=4.0,
    fraction_bits=10,
    sums=[-1024, 0, 512],
    squares=[65536, 0, 4096],
    classes=[60, 4],
    counters={"dead:gx": 3},
)
TELEMETRY = messages.Telemetry(
    device="gateway-1",
    boot="b7f3",
    seq=12,
    at=1764000060.0,
    from_s=1764000000.0,
    to_s=1764000060.0,
    counters={"wrist.requests": 640, "wrist.errors": 0},
    latency=[
        messages.LatencySketch(
            service="wrist",
            engine="wrist",
            relative_error=0.02,
            count=3,
            total_us=310,
            minimum_us=90,
            maximum_us=120,
            buckets={"112": 2, "119": 1},
        )
    ],
    drift=[DRIFT_WINDOW],
    power=messages.Power(source="estimate", measured=False, joules=1.5, inferences=640, joules_per_inference=0.0023),
    gauges={"temperature_c": None, "memory_bytes": 64000000.0},
    health={"wrist": "healthy"},
)
EVENT = messages.Event(
    device="gateway-1",
    boot="b7f3",
    seq=13,
    at=1764000061.5,
    severity="warning",
    kind="fallback",
    service="wrist",
    text="gx, gy, gz are dead: wrist-accel (0.90 under this fault) answers instead of wrist (0.55)",
    channels=["gx", "gy", "gz"],
    numbers={"accuracy_from": 0.55, "accuracy_to": 0.9},
    details={"from": "wrist", "to": "wrist-accel"},
)
EXPLAINED = messages.Event(
    device="gateway-1",
    boot="b7f3",
    seq=14,
    at=1764000105.0,
    severity="warning",
    kind="drift",
    service="wrist",
    text="the input has left every known regime, most in gx",
    channels=["gx"],
    numbers={"evidence": 1.04},
    details={
        "raised": True,
        "alarm": "drift",
        "explanation": messages.DriftExplanation(
            rows=34,
            looked_at=34,
            scope="one sensor",
            blamed="gx",
            relative=True,
            changed_at_s=1764000061.0,
            changed_ago_s=44.0,
            channels={"gx": 0.9, "ax": 0.1},
            features=[
                messages.ChangedFeature(
                    feature="gx.mean", channel="gx", share=0.9, how="shift", shift=0.8, shift_sd=4.2, spread=1.1,
                    unit="rad/s",
                ),
                messages.ChangedFeature(
                    feature="ax.log_sd", channel="ax", share=0.1, how="shift", shift=0.64, shift_sd=3.0, spread=1.0
                ),
            ],
            pictures=[
                messages.DriftPicture(
                    feature="gx.mean",
                    low=-0.8,
                    high=0.8,
                    reference=[0, 0, 40, 160, 300, 300, 160, 40, 0, 0, 0, 0, 0, 0, 0, 0],
                    now=[0, 0, 0, 0, 0, 0, 0, 0, 0, 30, 170, 300, 300, 170, 30, 0],
                )
            ],
        ).model_dump(mode="json"),
    },
)  # fmt: skip
MANIFEST = artifact.Manifest(
    name="wrist",
    version=3,
    service="wrist",
    task="which of seven shoulder exercises a wrist is doing",
    inputs=[
        artifact.Input(
            name="window",
            datatype="FP32",
            shape=[-1, 128, 6],
            meaning="2.56 s of raw samples",
            channels=[
                artifact.Channel(name="ax", unit="g", group="accel", minimum=-16.0, maximum=16.0),
                artifact.Channel(
                    name="gx",
                    unit="rad/s",
                    group="gyro",
                    minimum=-35.0,
                    maximum=35.0,
                    missing="impute",
                    out_of_range="clip",
                ),
            ],
        )
    ],
    outputs=[artifact.Output(name="probability", datatype="FP32", shape=[-1, 2])],
    labels=["PEN", "ABD"],
    label_output="probability",
    window=artifact.Window(length=128, hop=64, rate_hz=50.0),
    budgets=[artifact.Budget(device_class="gateway", latency_p95_us=2000.0, size_bytes=300_000)],
    fallbacks=["wrist-accel", "wrist-floor"],
    views=[artifact.View(name="channels", kind="channels", output="ew_view_channels", features=["ax.mean"])],
    runtime=artifact.Runtime(opset=20, minimum="1.20", precision="int8"),
    choice=artifact.Choice(variant="c48-int8", device_class="gateway", reason="fastest within all gates"),
    provenance={"recipe_sha256": "ef" * 32},
    blobs={"model": artifact.Blob(file="model.onnx", size=61234, sha256="01" * 32)},
)

DOCUMENTS = {
    "status": STATUS,
    "birth": BIRTH,
    "reported": REPORTED,
    "tm": TELEMETRY,
    "event": EVENT,
    "event-drift": EXPLAINED,
    "manifest": MANIFEST,
}
