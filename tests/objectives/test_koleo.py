"""KoLeo against loops in float64 and values worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from medssl_cli.objectives.koleo import koleo_loss


def koleo_by_loop(rows: Tensor) -> float:
    unit = [row.double() / row.double().norm() for row in rows]
    total = 0.0
    for i, a in enumerate(unit):
        nearest = max((j for j in range(len(unit)) if j != i), key=lambda j: float(a @ unit[j]))
        total += math.log(float((a - unit[nearest] + 1e-8).norm()) + 1e-8)
    return -total / len(unit)


def test_two_points_at_a_known_distance() -> None:
    # unit vectors at 60 degrees are 1 apart: log 1 = 0; at 90 degrees sqrt 2 apart: -ln(2)/2; lengths do not matter
    sixty = torch.tensor([[2.0, 0.0], [0.5, math.sqrt(0.75)]])
    assert float(koleo_loss(sixty)) == pytest.approx(0.0, abs=1e-6)
    assert float(koleo_loss(torch.tensor([[3.0, 0.0], [0.0, 7.0]]))) == pytest.approx(-math.log(2) / 2, abs=1e-6)


def test_equals_the_formula_in_float64() -> None:
    rows = torch.randn(9, 12, generator=torch.Generator().manual_seed(0))
    assert float(koleo_loss(rows)) == pytest.approx(koleo_by_loop(rows), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_t12_duplicates_stay_finite_in_half_precision(dtype: torch.dtype) -> None:
    rows = torch.ones(3, 768, dtype=dtype, requires_grad=True)
    loss = koleo_loss(rows)
    # the distance of duplicates is 1e-8 * sqrt(768), plus 1e-8 in the log
    assert loss.item() == pytest.approx(-math.log(1e-8 * math.sqrt(768) + 1e-8), abs=1e-3)
    assert loss.item() == pytest.approx(15.06, abs=0.01)
    assert loss.dtype is torch.float32
    (grad,) = torch.autograd.grad(loss, rows)
    assert bool(grad.isfinite().all())


def test_t12_near_duplicates_under_autocast_are_measured_in_float32() -> None:
    rows = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    rows[1] = rows[0] + 1e-4 * torch.randn(64, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = koleo_loss(rows)
    assert float(loss) == pytest.approx(koleo_by_loop(rows), abs=1e-4)


@pytest.mark.parametrize("samples", [0, 1])
def test_t12_fewer_than_two_samples_give_zero_with_zero_gradient(samples: int) -> None:
    rows = torch.randn(samples, 8, requires_grad=True)
    loss = koleo_loss(rows)
    (grad,) = torch.autograd.grad(loss, rows)
    assert loss.item() == 0.0
    assert torch.equal(grad, torch.zeros(samples, 8))


def test_gradient_pushes_neighbours_apart() -> None:
    rows = torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.0]], requires_grad=True)
    (grad,) = torch.autograd.grad(koleo_loss(rows), rows)
    assert grad[0, 1] < 0 < grad[1, 1]  # a step against the gradient turns them away from each other
