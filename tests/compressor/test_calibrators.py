from __future__ import annotations

import pytest
import torch

from compressor.calibrators import Calibrator, scale_for, weight_scales

pytestmark = pytest.mark.torch


def test_the_range_is_covered_and_zero_is_exact() -> None:
    scale = scale_for(torch.tensor([-1.0, 0.5, 4.1]), Calibrator.MINMAX)
    assert scale.scale * (255 - scale.zero_point) >= 4.1 - scale.scale
    assert -scale.scale * scale.zero_point <= -1.0 + scale.scale
    assert isinstance(scale.zero_point, int)


def test_values_of_one_sign_still_include_zero() -> None:
    assert scale_for(torch.tensor([2.0, 3.0]), Calibrator.MINMAX).zero_point == 0
    assert scale_for(torch.tensor([-2.0, -3.0]), Calibrator.MINMAX).zero_point == 255


def test_a_single_odd_sample_does_not_set_the_percentile_scale() -> None:
    values = torch.linspace(0, 1, 100_000)
    values[7] = 1000.0
    assert scale_for(values, Calibrator.PERCENTILE).scale < 1.1 / 255
    assert scale_for(values, Calibrator.MINMAX).scale > 3.9


def test_all_zero_does_not_divide_by_zero() -> None:
    assert scale_for(torch.zeros(5), Calibrator.MINMAX).scale > 0
    assert bool((weight_scales(torch.zeros(2, 3, 4)) > 0).all())


def test_each_output_channel_has_its_own_weight_scale() -> None:
    weight = torch.tensor([[[1.27]], [[-12.7]]])
    assert torch.allclose(weight_scales(weight), torch.tensor([0.01, 0.1]))
