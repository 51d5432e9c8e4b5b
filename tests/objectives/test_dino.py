"""The cls loss against loops in float64 and an example worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from medssl_cli.objectives import dino as dino_module
from medssl_cli.objectives.dino import DinoConfig, dino_losses, soft_cross_entropy


def cross_entropy_by_loop(logits: Tensor, target: Tensor, temperature: float = 0.1) -> float:
    scaled = [float(v) / temperature for v in logits]
    largest = max(scaled)
    log_sum = largest + math.log(math.fsum(math.exp(v - largest) for v in scaled))
    return -math.fsum(float(t) * (v - log_sum) for t, v in zip(target, scaled, strict=True))


def random_case(batch: int, local_crops: int, prototypes: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(batch + local_crops)
    targets = (torch.randn(2 * batch, prototypes, generator=rng) * 3).softmax(-1)
    student = torch.randn((2 + local_crops) * batch, prototypes, generator=rng) * 0.3
    return student[: 2 * batch], student[2 * batch :], targets


def test_two_views_worked_by_hand() -> None:
    # one sample, two prototypes, no local crop. Teacher: view 1 (1, 0), view 2 (0.25, 0.75).
    # Student logits / 0.1: view 1 (ln 3, 0) -> p = (0.75, 0.25); view 2 (0, 0) -> p = (0.5, 0.5).
    # student 1 meets teacher 2: -(0.25 ln 0.75 + 0.75 ln 0.25) = 0.071921 + 1.039721 = 1.111641
    # student 2 meets teacher 1: -ln 0.5 = 0.693147; mean of the two: 0.902394
    student = torch.tensor([[0.1 * math.log(3), 0.0], [0.0, 0.0]])
    teacher = torch.tensor([[1.0, 0.0], [0.25, 0.75]])
    assert float(dino_losses(student, None, teacher)["dino_global_crops_loss"]) == pytest.approx(0.902394, abs=1e-6)


@pytest.mark.parametrize(("batch", "local_crops"), [(3, 8), (1, 1), (2, 3)])
def test_pairs_equal_loops_in_float64(batch: int, local_crops: int) -> None:
    global_, local, targets = random_case(batch, local_crops)
    pairs = 2 * local_crops + 2  # 18 with 8 local crops
    local_sum = global_sum = 0.0
    for sample in range(batch):
        for view in range(2):
            target = targets[view * batch + sample]
            global_sum += cross_entropy_by_loop(global_[(1 - view) * batch + sample], target)
            for crop in range(local_crops):
                local_sum += cross_entropy_by_loop(local[crop * batch + sample], target)
    losses = dino_losses(global_, local, targets)
    assert float(losses["dino_local_crops_loss"]) == pytest.approx(local_sum / batch / pairs, rel=1e-6)
    assert float(losses["dino_global_crops_loss"]) == pytest.approx(global_sum / batch / pairs, rel=1e-6)


def test_without_local_crops_there_are_two_pairs() -> None:
    global_, _, targets = random_case(3, 0)
    losses = dino_losses(global_, None, targets)
    swapped = torch.cat([targets[3:], targets[:3]])
    expected = sum(cross_entropy_by_loop(a, b) for a, b in zip(global_, swapped, strict=True)) / 6
    assert list(losses) == ["dino_global_crops_loss"]
    assert float(losses["dino_global_crops_loss"]) == pytest.approx(expected, rel=1e-6)


def test_t06_exchanging_teacher_views_changes_the_global_loss_alone() -> None:
    global_, local, targets = random_case(2, 2)
    exchanged = torch.cat([targets[2:], targets[:2]])
    before, after = dino_losses(global_, local, targets), dino_losses(global_, local, exchanged)
    assert abs(float(before["dino_global_crops_loss"] - after["dino_global_crops_loss"])) > 0.01
    torch.testing.assert_close(before["dino_local_crops_loss"], after["dino_local_crops_loss"])


def test_t06_a_student_that_copies_the_other_view_has_the_least_loss() -> None:
    targets = torch.eye(4)  # view 1: prototypes 0, 1; view 2: prototypes 2, 3
    other, own = targets[[2, 3, 0, 1]], targets
    losses = [float(dino_losses(logits, None, targets)["dino_global_crops_loss"]) for logits in (other, own)]
    assert losses[0] < 1e-3 < 5 < losses[1]


def test_uniform_student_costs_ln_k() -> None:
    loss = dino_losses(torch.zeros(4, 4096), torch.zeros(16, 4096), torch.full((4, 4096), 1 / 4096))
    assert float(sum(loss.values())) == pytest.approx(math.log(4096), rel=1e-6)


def test_soft_cross_entropy_gradient_is_right_by_finite_differences() -> None:
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 5, dtype=torch.float64, generator=rng, requires_grad=True)
    targets = torch.rand(4, 5, dtype=torch.float64, generator=rng)  # rows need not sum to 1
    assert torch.autograd.gradcheck(lambda x: soft_cross_entropy(x, targets, 0.4), (logits,))


def test_soft_cross_entropy_does_not_depend_on_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 11, 6, generator=rng, requires_grad=True)
    targets = torch.rand(11, 6, generator=rng).softmax(-1)
    whole = soft_cross_entropy(logits, targets, 0.1)
    (whole_grad,) = torch.autograd.grad(whole.sum(), logits)
    monkeypatch.setattr(dino_module, "CHUNK_ELEMENTS", 30)
    pieces = soft_cross_entropy(logits, targets, 0.1)
    (pieces_grad,) = torch.autograd.grad(pieces.sum(), logits)
    assert torch.equal(whole, pieces)
    assert torch.equal(whole_grad, pieces_grad)


def test_soft_cross_entropy_agrees_with_pytorch() -> None:
    rng = torch.Generator().manual_seed(3)
    logits = torch.randn(8, 20, generator=rng, requires_grad=True)
    targets = torch.randn(8, 20, generator=rng).softmax(-1)
    ours = soft_cross_entropy(logits, targets, 0.1)
    theirs = torch.nn.functional.cross_entropy(logits / 0.1, targets, reduction="none")
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), logits)[0] for loss in (ours, theirs)))


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits = torch.zeros(2, 65536, dtype=torch.bfloat16, requires_grad=True)
    loss = soft_cross_entropy(logits, torch.full((2, 65536), 1 / 65536), 0.1)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.dtype is torch.float32
    assert grad.dtype is torch.bfloat16
    torch.testing.assert_close(loss, torch.full((2,), math.log(65536)))


def test_rows_and_columns_must_agree() -> None:
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(2, 4\)"):
        soft_cross_entropy(torch.zeros(3, 4), torch.zeros(2, 4), 0.1)


def test_defaults_are_the_framework_s() -> None:
    assert DinoConfig().model_dump() == {
        "head_n_prototypes": 65536,
        "head_bottleneck_dim": 256,
        "head_hidden_dim": 2048,
        "head_nlayers": 3,
        "loss_weight": 1.0,
        "koleo_loss_weight": 0.1,
        "norm_last_layer": False,
        "norm_in_head": "none",
        "act_in_head": "gelu",
    }
