"""A task that trains in seconds: three waves told apart by two sensors. Shaped as a user's own would be."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from agent.contract.artifact import Channel, Window
from compressor import corruptions
from compressor.families import PlainConv1d
from compressor.task import Fault, Role, Rows, Settings, Task, TaskData

LENGTH = 32
RECORDINGS, PER_ROLE = 12, 8
ROLES = (Role.TRAIN, Role.SELECT, Role.CALIBRATE, Role.STREAM)
CHANNELS = (
    Channel(name="left", unit="V", group="one", minimum=-9.0, maximum=9.0),
    Channel(name="right", unit="V", group="one", minimum=-9.0, maximum=9.0),
    Channel(name="flow", unit="l/s", group="two", minimum=-9.0, maximum=9.0),
)


def load(settings: Settings) -> TaskData:
    generator = np.random.default_rng(int(str(settings.get("noise_seed", 0))))
    return TaskData("0" * 64, {role: _rows(generator, place) for place, role in enumerate(ROLES)})


def _rows(generator: np.random.Generator, place: int) -> Rows:
    recordings = np.repeat(np.arange(RECORDINGS), PER_ROLE)
    labels = recordings % 3
    time = np.arange(LENGTH)[None, :, None]
    pitch = (0.3 + 0.35 * labels)[:, None, None]
    phase = generator.uniform(0, 6, (len(recordings), 1, 3))
    level = 0.2 * recordings[:, None, None] / RECORDINGS
    waves = np.sin(pitch * time + phase) + level + 0.1 * generator.standard_normal((len(recordings), LENGTH, 3))
    starts = place * 1000 + np.tile(np.arange(PER_ROLE), RECORDINGS) * LENGTH
    return Rows(waves.astype(np.float32), labels, recordings, recordings % 2, starts)


def build(family: str, width: int, channels: int) -> nn.Module:
    assert family == "plain"
    return PlainConv1d(channels, width, 3)


def augment(windows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return windows + 0.05 * torch.randn(windows.shape, generator=generator)


TASK = Task(
    name="tiny-waves",
    service="tiny",
    labels=("slow", "middle", "fast"),
    channels=CHANNELS,
    window=Window(length=LENGTH, hop=LENGTH, rate_hz=10.0),
    input_name="wave",
    input_meaning="three channels",
    families=("plain",),
    settings={"noise_seed": 0},
    load=load,
    build=build,
    augment=augment,
    faults=(
        Fault("flow_off", "dead", ("flow",), "harmful", corruptions.dead([2])),
        Fault("louder", "unknown", ("left", "right", "flow"), "harmless", corruptions.scale([0, 1, 2], 1.1)),
    ),
    unit_factors={"two": 1000.0},
)
