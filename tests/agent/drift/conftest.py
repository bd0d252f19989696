"""A stream of regimes that is cheap to make and known in every detail."""

import numpy as np
import pytest

from agent.drift import GuardStatistics, Reference
from compressor.reference import ViewNames, ViewRows, WitnessRows, build_reference, channel_view_names

CHANNELS = ("ax", "ay", "gx")
GROUPS = {"ax": "accel", "ay": "accel", "gx": "gyro"}
REGIMES = 16
NO_GUARD = GuardStatistics({"accel": (0.5, 1.5)}, {"ax": 0.0}, {"ax": (-1.0, 1.0)})


class RegimeStream:
    """Recordings that each sit around a mean of their own; two labels share the recordings."""

    def __init__(self, seed: int = 7) -> None:
        self.names: ViewNames = channel_view_names(CHANNELS, GROUPS, ("walk", "rest"))
        width = len(self.names.features)
        generator = np.random.default_rng(seed)
        self.means = generator.normal(0.0, 4.0, (REGIMES, width))
        mixing = generator.normal(0.0, 0.3, (width, width)) + np.eye(width)
        self.mixing = mixing

    def rows(self, per_recording: int, *, seed: int) -> ViewRows:
        generator = np.random.default_rng(seed)
        recordings = np.repeat(np.arange(REGIMES), per_recording)
        noise = generator.normal(0.0, 0.5, (len(recordings), self.means.shape[1])) @ self.mixing.T
        return ViewRows(self.means[recordings] + noise, recordings % 2, recordings)


@pytest.fixture(scope="session")
def stream() -> RegimeStream:
    return RegimeStream()


@pytest.fixture(scope="session")
def reference(stream: RegimeStream) -> Reference:
    return build_reference(stream.rows(8, seed=1), stream.names, guard=NO_GUARD, held_out=stream.rows(8, seed=2))


@pytest.fixture(scope="session")
def witnessed(stream: RegimeStream) -> Reference:
    return witnessed_reference(stream)


def witnessed_reference(stream: RegimeStream) -> Reference:
    """Two witnesses that agree with the serving engine on every reference row; each looks at a group of its own."""
    rows = stream.rows(8, seed=1)
    said = [
        WitnessRows("wrist-accel", tuple(range(8)), rows.predicted),
        WitnessRows("wrist-gyro", (8, 9, 10, 11), rows.predicted),
    ]
    return build_reference(rows, stream.names, guard=NO_GUARD, held_out=stream.rows(8, seed=2), witnesses=said)
