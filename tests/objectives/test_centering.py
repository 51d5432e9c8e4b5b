"""Centre and Sinkhorn-Knopp against loops in float64 written from the published formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from medssl_cli.objectives.centering import Centering, sinkhorn_knopp


def softmax_by_loop(values: list[float]) -> list[float]:
    largest = max(values)
    parts = [math.exp(v - largest) for v in values]
    return [p / math.fsum(parts) for p in parts]


def sinkhorn_by_loop(logits: Tensor, temperature: float, n_iterations: int = 3) -> Tensor:
    """As published: Q of (K, n), divided by its sum, then rows by K and columns by n in turn, at last times n."""
    n, prototypes = logits.shape
    q = [[math.exp(float(logits[b, k]) / temperature) for b in range(n)] for k in range(prototypes)]
    total = math.fsum(math.fsum(row) for row in q)
    q = [[v / total for v in row] for row in q]
    for _ in range(n_iterations):
        q = [[v / math.fsum(row) / prototypes for v in row] for row in q]
        sums = [math.fsum(q[k][b] for k in range(prototypes)) for b in range(n)]
        q = [[q[k][b] / sums[b] / n for b in range(n)] for k in range(prototypes)]
    return torch.tensor([[q[k][b] * n for k in range(prototypes)] for b in range(n)], dtype=torch.float64)


def logits_of(rows: int, prototypes: int, seed: int, scale: float = 0.3) -> Tensor:
    return torch.randn(rows, prototypes, generator=torch.Generator().manual_seed(seed)) * scale


def test_centre_follows_the_formula_over_several_steps() -> None:
    centering = Centering(5)
    center = [0.0] * 5
    for step, temperature in enumerate([0.04, 0.05, 0.06, 0.07]):
        logits = logits_of(6, 5, step)
        targets = centering.targets(logits, temperature)
        for row, target in zip(logits.double().tolist(), targets, strict=True):
            expected = softmax_by_loop([(v - c) / temperature for v, c in zip(row, center, strict=True)])
            assert target.tolist() == pytest.approx(expected, abs=1e-5)
        centering.update()
        center = [0.9 * c + 0.1 * m for c, m in zip(center, logits.double().mean(0).tolist(), strict=True)]
        assert centering.center.tolist() == pytest.approx(center, abs=1e-7)


def test_targets_of_a_step_use_earlier_batches_only() -> None:
    centering = Centering(4)
    first = centering.targets(logits_of(3, 4, 0), 0.1)
    again = centering.targets(logits_of(3, 4, 0), 0.1)  # a second micro-batch of the same step
    assert torch.equal(first, again)
    centering.update()
    assert not torch.equal(first, centering.targets(logits_of(3, 4, 0), 0.1))


def test_micro_batches_move_the_centre_once_as_one_batch_does() -> None:
    joint, parts = Centering(4), Centering(4)
    logits = logits_of(10, 4, 0)
    joint.targets(logits, 0.1)
    joint.update()
    for piece in logits.split([1, 7, 2]):
        parts.targets(piece, 0.1)
    parts.update()
    torch.testing.assert_close(parts.center, joint.center)


def test_update_without_rows_keeps_the_centre() -> None:
    centering = Centering(4)
    centering.targets(logits_of(3, 4, 0), 0.1)
    centering.update()
    before = centering.center.clone()
    centering.update()  # no call since
    centering.targets(torch.zeros(0, 4), 0.1)  # a batch without a masked token
    centering.update()
    assert torch.equal(centering.center, before)


def test_r01_state_between_steps_is_the_centre_alone() -> None:
    one, two = Centering(4), Centering(4)
    for step in range(3):
        one.targets(logits_of(3, 4, step), 0.1)
        one.update()
    assert list(one.state_dict()) == ["center"]
    two.load_state_dict(one.state_dict())
    for centering in (one, two):
        centering.targets(logits_of(3, 4, 9), 0.1)
        centering.update()
    assert torch.equal(one.center, two.center)


def test_centre_is_kept_in_float32_for_half_precision_logits() -> None:
    centering = Centering(4)
    targets = centering.targets(logits_of(300, 4, 0).bfloat16(), 0.04)
    centering.update()
    assert targets.dtype is centering.center.dtype is torch.float32
    torch.testing.assert_close(centering.center, 0.1 * logits_of(300, 4, 0).bfloat16().float().mean(0))


@pytest.mark.parametrize(("rows", "prototypes", "iterations"), [(6, 4, 3), (3, 9, 3), (5, 5, 1), (1, 4, 3), (7, 3, 10)])
def test_sinkhorn_equals_the_published_formula(rows: int, prototypes: int, iterations: int) -> None:
    logits = logits_of(rows, prototypes, rows)
    targets = sinkhorn_knopp(logits, 0.07, iterations)
    torch.testing.assert_close(targets.double(), sinkhorn_by_loop(logits, 0.07, iterations), atol=1e-6, rtol=1e-5)


def test_sinkhorn_rows_sum_to_one_and_prototypes_are_balanced() -> None:
    targets = sinkhorn_knopp(logits_of(64, 8, 0), 0.1, n_iterations=200)
    torch.testing.assert_close(targets.sum(1), torch.ones(64))
    torch.testing.assert_close(targets.sum(0), torch.full((8,), 8.0), rtol=1e-3, atol=0)


def test_sinkhorn_does_not_change_with_a_common_offset() -> None:
    logits = logits_of(8, 5, 0)
    torch.testing.assert_close(sinkhorn_knopp(logits + 3.0, 0.04), sinkhorn_knopp(logits, 0.04), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_sinkhorn_survives_logits_that_overflow_or_vanish(dtype: torch.dtype) -> None:
    logits = torch.tensor([[90.0, 0.0, 1.0], [-90.0, -89.0, -95.0], [0.0, 0.0, 0.0]], dtype=dtype)
    targets = sinkhorn_knopp(logits, 0.04)  # the exponents span 4600 nats
    assert bool(targets.isfinite().all())
    torch.testing.assert_close(targets.sum(1), torch.ones(3))


def test_sinkhorn_loses_no_row_that_is_far_below_the_others() -> None:
    # row 0 takes prototype 0; row 1, whose best exponent is e^-500 of row 0's, likes all other prototypes equally
    logits = torch.full((2, 64), -1000.0)
    logits[0, 0] = 0.0
    logits[1, 1:] = -500.0
    expected = torch.zeros(2, 64)
    expected[0, 0], expected[1, 1:] = 1.0, 1 / 63
    torch.testing.assert_close(sinkhorn_knopp(logits, 1.0), expected)


def test_sinkhorn_takes_no_rows_and_refuses_no_iterations() -> None:
    assert sinkhorn_knopp(torch.zeros(0, 5), 0.1).shape == (0, 5)
    with pytest.raises(ValueError, match="at least 1"):
        sinkhorn_knopp(torch.zeros(2, 5), 0.1, 0)


def test_targets_take_no_gradient() -> None:
    logits = torch.zeros(2, 3, requires_grad=True)
    assert not Centering(3).targets(logits, 0.1).requires_grad
    assert not sinkhorn_knopp(logits, 0.1).requires_grad
