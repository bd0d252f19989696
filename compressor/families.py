"""Network families a task may offer. Input is normalised (rows, channels, length); output is logits.

Plain modules of convolutions, batch norms and activations, so that `lowering` can fold and quantise them.
"""

from __future__ import annotations

from torch import Tensor, nn


class PlainConv1d(nn.Module):
    """Three convolutions, each halving the length, then a mean over time: the shape of small sensors' models."""

    def __init__(self, channels: int, width: int, classes: int) -> None:
        super().__init__()
        self.first = _norm_relu(channels, width, kernel=7, stride=2)
        self.second = _norm_relu(width, 2 * width, kernel=5, stride=2)
        self.third = _norm_relu(2 * width, 2 * width, kernel=3, stride=2)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.third(self.second(self.first(x))).mean(2))
        return out


class ResidualConv1d(nn.Module):
    """A stem and eight residual blocks of two convolutions; the length is halved four times."""

    def __init__(self, channels: int, width: int, classes: int) -> None:
        super().__init__()
        self.stem = _norm_relu(channels, width, kernel=7, stride=2)
        blocks: list[nn.Module] = []
        for stage in range(4):
            blocks += [nn.MaxPool1d(2)] if stage in {0, 1, 2} else []
            blocks += [_Residual(width), _Residual(width)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.stem(x)).mean(2))
        return out


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one = _norm_relu(width, width, kernel=5, stride=1)
        self.two = nn.Sequential(nn.Conv1d(width, width, 5, padding=2, bias=False), nn.BatchNorm1d(width))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(x + self.two(self.one(x)))
        return out


def _norm_relu(inputs: int, outputs: int, *, kernel: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv1d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm1d(outputs), nn.ReLU())


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
