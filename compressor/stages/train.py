"""Trains one network on the train role, picks its epoch on the select role. The same seed gives the same bytes.

One thread per training: two threads sum in another order. Parallelism is two trainings side by side.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from agent.contract.errors import Corrupt
from agent.drift.views import Combination
from compressor.recipe import ModelTable, TrainTable
from compressor.task import Role, Rows, Task, TaskData
from compressor.views import choose, combine

Arrays = Mapping[str, NDArray[np.generic]]
SOURCES = ("stages/train.py", "families.py", "task.py", "views.py")


@dataclass(frozen=True, slots=True)
class Trained:
    """A network's state, the input statistics it was trained with, and its select accuracy after each epoch."""

    arrays: dict[str, NDArray[np.generic]]
    history: tuple[float, ...]
    epoch: int


def prepare_torch() -> None:
    """One thread, deterministic algorithms: call once per process before anything is computed."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(mode=True)


def train(
    task: Task, data: TaskData, model: ModelTable, settings: TrainTable, *, seed: int,
    on_epoch: Callable[[int, float], None], start: Arrays | None = None,
) -> Trained:  # fmt: skip
    """A trained network of the model's family; `on_epoch(epoch, select_accuracy)` after each epoch.

    start: arrays of an earlier training of this model to go on from; its input statistics stay.
    """
    torch.manual_seed(_seed(seed, model.name))
    reads = task.positions(model.channels)
    network = task.build(model.family, model.width, len(reads)) if start is None else restore(task, model, start)
    rows, select = data.role(Role.TRAIN), data.role(Role.SELECT)
    feed = _Feed(rows, reads, start, task.combinations)
    history: list[float] = []
    best: tuple[float, int, dict[str, Tensor]] = (-1.0, 0, {})
    for epoch in _epochs(network, feed, task, model, settings, seed):
        history.append(_accuracy(network, feed, select))
        # the later of equals: it has seen more of the falling learning rate
        if epoch >= model.epochs // 2 and history[-1] >= best[0]:
            best = (history[-1], epoch, {k: v.clone() for k, v in network.state_dict().items()})
        on_epoch(epoch, history[-1])
    arrays = {f"state.{name}": value.numpy() for name, value in best[2].items()}
    arrays |= {"mean": feed.mean.numpy(), "sd": feed.sd.numpy()}
    return Trained(arrays, tuple(history), best[1])


class _Feed:
    """Training rows on the way to a network: raw batches, then normalised with the first training's statistics."""

    def __init__(
        self, rows: Rows, reads: tuple[int, ...], start: Arrays | None, combinations: tuple[Combination, ...]
    ) -> None:
        self.windows = torch.from_numpy(rows.windows)
        self.labels = torch.from_numpy(rows.labels)
        self.reads = list(reads)
        self.combinations = combinations
        if start is None:
            series = combine(self.windows.transpose(1, 2), combinations).double()
            self.mean = series.mean((0, 2)).float()
            self.sd = series.std((0, 2)).float().clamp_min(1e-6)
        else:
            self.mean, self.sd = (torch.from_numpy(np.asarray(start[name], np.float32)) for name in ("mean", "sd"))

    def normalise(self, windows: Tensor) -> Tensor:
        return normalise(windows, self.combinations, self.reads, self.mean, self.sd)


def normalise(
    windows: Tensor, combinations: Sequence[Combination], reads: Sequence[int], mean: Tensor, sd: Tensor
) -> Tensor:
    """(rows, length, channels) raw -> (rows, series read, length); `mean`, `sd`: of all series."""
    chosen = list(reads)
    series = choose(windows.transpose(1, 2), combinations, chosen)
    return ((series - mean[chosen].view(1, -1, 1)) / sd[chosen].view(1, -1, 1)).contiguous()


def _epochs(
    network: nn.Module, feed: _Feed, task: Task, model: ModelTable, settings: TrainTable, seed: int
) -> Iterator[int]:
    """Runs one epoch per step; the network is in evaluation mode whenever an epoch is handed out."""
    generator = torch.Generator().manual_seed(_seed(seed, model.name))
    batches = math.ceil(len(feed.labels) / settings.batch)
    optimiser = torch.optim.AdamW(network.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, settings.learning_rate, total_steps=model.epochs * batches
    )
    for epoch in range(model.epochs):
        network.train()
        order = torch.randperm(len(feed.labels), generator=generator)
        for chosen in torch.split(order, settings.batch):
            logits = network(feed.normalise(task.augment(feed.windows[chosen], generator)))
            loss = nn.functional.cross_entropy(logits, feed.labels[chosen], label_smoothing=settings.label_smoothing)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
        network.eval()
        yield epoch


def _accuracy(network: nn.Module, feed: _Feed, rows: Rows) -> float:
    with torch.no_grad():
        predicted = network(feed.normalise(torch.from_numpy(rows.windows))).argmax(1)
    return float((predicted.numpy() == rows.labels).mean())


def _seed(seed: int, name: str) -> int:
    """Every model of a recipe has its own stream of random numbers, whatever runs beside it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")


def restore(task: Task, model: ModelTable, arrays: Arrays) -> nn.Module:
    """The network whose state `train` returned, in evaluation mode.

    Raises:
        Corrupt: the arrays are not the state of this model.
    """
    reads = task.positions(model.channels)
    network = task.build(model.family, model.width, len(reads))
    state = {
        name.removeprefix("state."): torch.from_numpy(value)
        for name, value in arrays.items()
        if name.startswith("state.")
    }
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise Corrupt(f"these weights are not a '{model.family}' of width {model.width}: {error}") from None
    return network.eval()
