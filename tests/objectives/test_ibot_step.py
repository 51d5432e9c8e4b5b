"""iBOT's step (Zhou et al. 2022) by the same engine: its loss mix, heads, centre, temperatures and masks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl_cli.core.protocols import Batch, Features
from medssl_cli.objectives.dino import DinoConfig
from medssl_cli.objectives.ibot import IbotConfig
from medssl_cli.objectives.self_distillation import (
    SelfDistillation,
    cross_entropy_of_equals,
    expected_first_loss,
)

VALUES = {"teacher_temp": 0.07, "momentum": 0.9}
Make = Callable[..., Any]


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def train(objective: SelfDistillation, make_batch: Make, steps: int, local_crops: int = 2) -> None:
    """Some steps, so that teacher and student differ and the centres are not zero."""
    optimizer = torch.optim.SGD([p for p in objective.student.parameters() if p.requires_grad], lr=0.03)
    for seed in range(steps):
        optimizer.zero_grad()
        total(objective.losses(make_batch(samples=3, local_crops=local_crops, seed=seed), VALUES)).backward()
        optimizer.step()
        objective.after_step(VALUES)


# --- worked by hand --------------------------------------------------------------------------------------------------


class Table(nn.Module):
    """An image (1, 1 + N, 2) is its own features: the first row is the cls token, the others are patch tokens."""

    embed_dim = 2

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(
        self, images_BSHW: Tensor, token_mask_BN: Tensor | None = None, available_BS: Tensor | None = None
    ) -> Features:
        rows = self.scale * images_BSHW[:, 0]
        return Features(rows[:, 0], rows[:, 1:], rows[:, :0], (1, rows.shape[1] - 1, 1))

    def forward_list(
        self, images: Sequence[Tensor], token_masks: Sequence[Tensor | None], available: Sequence[Tensor | None]
    ) -> list[Features]:
        return [self(*crops) for crops in zip(images, token_masks, available, strict=True)]


def by_table(odds_VN: list[list[float]], masked: list[list[int]]) -> dict[str, float]:
    """Losses of crops whose tokens say "second prototype" with these odds to 1, for student and teacher alike."""
    logits = torch.tensor(odds_VN).log() * 0.1
    images = torch.stack([torch.zeros_like(logits), logits], -1)[:, None]
    token_mask = torch.zeros(len(odds_VN), len(odds_VN[0]) - 1, dtype=torch.bool)
    for crop, token in masked:
        token_mask[crop, token] = True
    objective = SelfDistillation(
        Table(),
        Table(),
        lambda _: nn.Identity(),
        dino=DinoConfig(head_n_prototypes=2, koleo_loss_weight=0.0),
        ibot=IbotConfig(),
    )
    batch = Batch(images, None, token_mask, torch.ones(len(odds_VN) // 2, 1, dtype=torch.bool))
    return {name: loss.item() for name, loss in objective.losses(batch, {"teacher_temp": 0.1}).items()}


def entropy(share: float, log_share: float | None = None) -> float:
    """Cross-entropy of (1 - share, share) against itself, or against another pair."""
    other = share if log_share is None else log_share
    return -(1 - share) * math.log(1 - other) - share * math.log(other)


def test_w12_two_views_by_hand() -> None:
    """Cls tokens meet the other view only, patch tokens their own place of their own view only."""
    losses = by_table([[3, 1, 3], [9, 9, 4]], masked=[[0, 1], [1, 0], [1, 1]])
    first, second = 3 / 4, 9 / 10
    assert losses["dino_global_crops_loss"] == pytest.approx(
        (entropy(first, second) + entropy(second, first)) / 2, rel=1e-5
    )
    # view 1: its second patch; view 2: the mean of both; then the mean over the two crops
    assert losses["ibot_loss"] == pytest.approx((entropy(3 / 4) + (entropy(9 / 10) + entropy(4 / 5)) / 2) / 2, rel=1e-5)


def test_w14_mask_of_view_2_of_sample_0_alone() -> None:
    odds = [[2, 2, 2], [2, 2, 2], [2, 5, 9], [2, 2, 2]]  # view-major: the third crop is view 2 of sample 0
    losses = by_table(odds, masked=[[2, 1]])
    assert losses["ibot_loss"] == pytest.approx(entropy(9 / 10) / 4, rel=1e-5)


# --- the mix of the losses -------------------------------------------------------------------------------------------


@torch.no_grad()
def ibot_by_double_loop(objective: SelfDistillation, batch: Batch, cls_temp: float, patch_temp: float) -> float:
    """All teacher views against all student views in float64: own view -> patches, other views -> cls tokens."""
    double = copy.deepcopy(objective).double()
    samples = len(batch.available_BS)
    global_, local = batch.global_VSHW.double(), batch.local_VSHW
    available = batch.available_BS

    def both(network: nn.ModuleDict, images: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        features = network["backbone"](images, mask, available)
        head = network["dino_head"]
        if "ibot_head" in network:
            return head(features.cls_BD), network["ibot_head"](features.patches_BND.flatten(0, 1)).unflatten(
                0, features.patches_BND.shape[:2]
            )
        if objective.ibot.separate_last_layer:
            rows = features.patches_BND.flatten(0, 1)
            return head(features.cls_BD, 0)[0], head(rows, len(rows))[1].unflatten(0, features.patches_BND.shape[:2])
        return head(features.cls_BD), head(features.patches_BND.flatten(0, 1)).unflatten(
            0, features.patches_BND.shape[:2]
        )

    teacher, student, masks = [], [], []
    for view in range(2):
        crops = slice(view * samples, (view + 1) * samples)
        teacher.append(both(double.teacher, global_[crops], None))
        masks.append(batch.token_mask_VN[crops])
        student.append(both(double.student, global_[crops], masks[-1]))
    for i in range(0 if local is None else len(local) // samples):
        student.append(both(double.student, local[i * samples : (i + 1) * samples].double(), None))
    cls_sum = patch_sum = 0.0
    cls_terms = patch_terms = 0
    for q in range(2):
        cls_target = F.softmax((teacher[q][0] - double.dino_center.center) / cls_temp, -1)
        patch_target = F.softmax((teacher[q][1] - double.ibot_center.center) / patch_temp, -1)
        for v in range(len(student)):
            if v == q:
                loss_BN = -(patch_target * F.log_softmax(student[v][1] / 0.1, -1)).sum(-1)
                mask = masks[q].double()
                patch_sum += float(((loss_BN * mask).sum(1) / mask.sum(1).clamp_min(1)).mean())
                patch_terms += 1
            else:
                cls_sum += float(-(cls_target * F.log_softmax(student[v][0] / 0.1, -1)).sum(-1).mean())
                cls_terms += 1
    return cls_sum / cls_terms + patch_sum / patch_terms


@pytest.mark.parametrize("local_crops", [0, 3])
@pytest.mark.parametrize(
    "ibot", [{}, {"separate_head": True}, {"separate_last_layer": True, "head_n_prototypes": 12}], ids=str
)
def test_the_sum_is_ibots_double_loop(
    make_objective: Make, make_batch: Make, real_head: Make, ibot: dict[str, Any], local_crops: int
) -> None:
    objective = make_objective(head=real_head, dino={"koleo_loss_weight": 0.0}, ibot={"center_tokens": "all", **ibot})
    train(objective, make_batch, 2, local_crops)
    batch = make_batch(samples=3, local_crops=local_crops, seed=9)
    losses = objective.losses(batch, {"teacher_temp": 0.06, "teacher_patch_temp": 0.05})
    assert float(objective.ibot_center.center.abs().max()) > 0
    expected = ibot_by_double_loop(objective, batch, 0.06, 0.05)
    assert total(losses).item() == pytest.approx(expected, rel=2e-5, abs=1e-6)


# --- heads -----------------------------------------------------------------------------------------------------------


def test_w10_teachers_patch_layer_tracks_the_students(make_objective: Make, make_batch: Make, real_head: Make) -> None:
    objective = make_objective(head=real_head, ibot={"separate_last_layer": True, "head_n_prototypes": 12})
    student, teacher = (n["dino_head"].last_layer2 for n in (objective.student, objective.teacher))
    assert student.weight_v.shape == (12, 8)
    average = student.weight_v.detach().double()
    start = average.clone()
    optimizer = torch.optim.SGD(objective.student.parameters(), lr=0.5)
    for seed in range(10):
        optimizer.zero_grad()
        total(objective.losses(make_batch(seed=seed), VALUES)).backward()
        optimizer.step()
        objective.after_step(VALUES)
        average = 0.9 * average + 0.1 * student.weight_v.detach().double()
    assert float((average - start).abs().max()) > 1e-3
    torch.testing.assert_close(teacher.weight_v.double(), average, atol=1e-6, rtol=1e-6)
    assert objective.trained_modules().keys() == {"backbone", "dino_head"}


@pytest.mark.parametrize(
    "settings",
    [
        {"ibot": {"separate_last_layer": True}, "dino": {"loss_weight": 0.0}},
        {"ibot": {"separate_last_layer": True, "loss_weight": 0.0}},
        {"ibot": {"separate_last_layer": True, "center_tokens": "all"}, "centering": "sinkhorn_knopp"},
        {"ibot": {"separate_last_layer": True}, "dino": {"norm_last_layer": True, "norm_in_head": "bn"}},
        {"ibot": {"separate_head": True, "norm_in_head": "ln", "act_in_head": "relu"}},
    ],
    ids=str,
)
def test_every_trained_parameter_takes_part(
    make_objective: Make, make_batch: Make, real_head: Make, settings: dict[str, Any]
) -> None:
    objective = make_objective(head=real_head, **settings)
    total(objective.losses(make_batch(), VALUES)).backward()
    objective.after_step(VALUES)
    left_out = [n for n, p in objective.student.named_parameters() if p.requires_grad and p.grad is None]
    assert left_out == []
    frozen = [n for n, p in objective.student.named_parameters() if not p.requires_grad]
    assert bool(frozen) == bool(settings.get("dino", {}).get("norm_last_layer"))


def test_without_a_cls_loss_the_head_ends_in_the_patch_layer(make_objective: Make, real_head: Make) -> None:
    ibot = {"separate_last_layer": True, "head_n_prototypes": 12}
    objective = make_objective(head=real_head, dino={"loss_weight": 0.0}, ibot=ibot)
    assert objective.student["dino_head"].last_layer.weight_v.shape == (12, 8)
    assert objective.student["dino_head"].last_layer2 is None


@pytest.mark.parametrize("separate", [False, True])
def test_a_norm_over_rows_makes_the_student_see_all_patches(
    make_objective: Make, make_batch: Make, separate: bool
) -> None:
    """The stub head has no norm, so the losses must be those of a head that sees the masked tokens only."""
    batch = make_batch(samples=4, local_crops=3)
    batch.available_BS[1, 2] = False
    few = make_objective(ibot={"separate_head": separate})
    all_ = make_objective(dino={"norm_in_head": "bn"}, ibot={"separate_head": separate, "norm_in_head": "bn"})
    expected, found = few.losses(batch, VALUES), all_.losses(batch, VALUES)
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss, msg=name)
    existing, masked = 8 * 12 - 2 * 4, few.student["ibot_head" if separate else "dino_head"].rows[0]
    head = all_.student["ibot_head" if separate else "dino_head"]
    assert head.rows == [existing if separate else 8 + 12 + existing]
    assert masked < head.rows[0]
    teacher = all_.teacher["ibot_head" if separate else "dino_head"]
    assert teacher.rows == few.teacher["ibot_head" if separate else "dino_head"].rows  # in eval mode: no statistics


def test_batch_norm_in_the_head_learns_and_its_statistics_reach_the_teacher(
    make_objective: Make, make_batch: Make, real_head: Make
) -> None:
    objective = make_objective(head=real_head, dino={"norm_in_head": "bn"})
    train(objective, make_batch, 3)
    student, teacher = (n["dino_head"].mlp[1] for n in (objective.student, objective.teacher))
    assert not torch.equal(student.running_mean, torch.zeros_like(student.running_mean))
    assert torch.equal(student.running_mean, teacher.running_mean)
    assert int(teacher.num_batches_tracked) == 3


# --- centre and temperature ------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("separate", [False, True])
def test_centre_of_all_tokens_and_targets_at_masked_ones(
    make_objective: Make, make_batch: Make, separate: bool
) -> None:
    masked = make_objective(ibot={"separate_head": separate})
    every = make_objective(ibot={"separate_head": separate, "center_tokens": "all"})
    batch = make_batch()
    batch.available_BS[2, 1] = False
    features = every.teacher["backbone"](batch.global_VSHW, available_BS=batch.available_BS.repeat(2, 1))
    exists_VN = batch.available_BS.repeat(2, 1).repeat_interleave(4, 1)
    expected, found = masked.losses(batch, VALUES), every.losses(batch, VALUES)
    torch.testing.assert_close(found, expected)  # at first both centres are zero
    every.after_step(VALUES)
    masked.after_step(VALUES)
    head = every.teacher["ibot_head" if separate else "dino_head"]
    mean = 0.1 * head(features.patches_BND[exists_VN]).mean(0)
    torch.testing.assert_close(every.ibot_center.center, mean)
    assert not torch.allclose(masked.ibot_center.center, mean)
    torch.testing.assert_close(every.dino_center.center, masked.dino_center.center)


def test_patch_targets_have_their_own_temperature(make_objective: Make, make_batch: Make) -> None:
    cold, warm, mixed = (
        make_objective().losses(make_batch(), values)
        for values in (
            {"teacher_temp": 0.04},
            {"teacher_temp": 0.07},
            {"teacher_temp": 0.07, "teacher_patch_temp": 0.04},
        )
    )
    assert torch.equal(mixed["ibot_loss"], cold["ibot_loss"])
    assert not torch.equal(mixed["ibot_loss"], warm["ibot_loss"])
    for name in ("dino_local_crops_loss", "dino_global_crops_loss"):
        assert torch.equal(mixed[name], warm[name])


# --- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
@pytest.mark.parametrize("ibot", [{}, {"separate_head": True}, {"separate_last_layer": True}], ids=str)
def test_w13_without_masked_tokens_the_patch_loss_is_zero(
    make_objective: Make, make_batch: Make, real_head: Make, ibot: dict[str, Any], centering: str
) -> None:
    objective, batch = make_objective(head=real_head, ibot=ibot, centering=centering), make_batch()
    batch.token_mask_VN[:] = False
    losses = objective.losses(batch, VALUES)
    assert losses["ibot_loss"].item() == 0.0
    total(losses).backward()
    objective.after_step(VALUES)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in objective.student.parameters())
    assert all(bool(value.isfinite().all()) for value in objective.state_dict().values())


# --- only the tokens that are needed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("center_tokens", ["masked", "all"])
@pytest.mark.parametrize("local_crops", [0, 2])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_only_the_needed_tokens_are_asked_for_and_the_numbers_stay(
    make_objective: Make, make_batch: Make, needed_backbone: Any, local_crops: int, center_tokens: str, weight: float
) -> None:
    settings = {"ibot": {"center_tokens": center_tokens, "loss_weight": weight}}
    whole, needed = make_objective(**settings), make_objective(backbone=needed_backbone, **settings)
    batch = make_batch(local_crops=local_crops)
    batch.available_BS[1, 0] = False
    for objective in (whole, needed):
        objective.found = objective.losses(batch, VALUES)
        total(objective.found).backward()
        objective.after_step(VALUES)
    torch.testing.assert_close(needed.found, whole.found, atol=1e-6, rtol=1e-6)
    for (name, mine), theirs in zip(needed.student.named_parameters(), whole.student.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-6, rtol=1e-5, msg=name)
    exists = batch.available_BS.repeat(2, 1).repeat_interleave(4, 1)
    targets = (batch.token_mask_VN & exists).flatten().nonzero().squeeze(1) if weight else torch.empty(0).long()
    (student,), (teacher,) = needed.student["backbone"].asked, needed.teacher["backbone"].asked
    assert torch.equal(student[0], targets)
    assert [len(index) for index in student[1:]] == [0] * bool(local_crops)
    everything = exists.flatten().nonzero().squeeze(1)
    assert torch.equal(teacher[0], everything if center_tokens == "all" and weight else targets)
    assert all(index.dtype is torch.int64 for index in (*student, *teacher))


# --- expectation -----------------------------------------------------------------------------------------------------


def test_prediction_of_ibots_settings_by_hand() -> None:
    dino = DinoConfig(head_n_prototypes=4096, koleo_loss_weight=0.0)
    per_image = IbotConfig(mask_sampling="per_image", separate_last_layer=True, head_n_prototypes=512)
    found = expected_first_loss(dino, per_image, 0, n_sequences=1)
    assert found["dino_global_crops_loss"] == pytest.approx(cross_entropy_of_equals(4096, 256, 0.04))
    assert found["ibot_loss"] == pytest.approx(0.5 * math.log(512))
    late = expected_first_loss(dino, IbotConfig(pred_start_epoch=1), 0, n_sequences=3)
    assert late["ibot_loss"] == 0.0
    always = IbotConfig(mask_sampling="per_image", pred_ratio=0.3, pred_ratio_var=0.2)
    assert expected_first_loss(dino, always, 0, n_sequences=1)["ibot_loss"] == pytest.approx(math.log(4096))


@pytest.mark.parametrize("norm", ["none", "ln", "bn"])
@pytest.mark.parametrize("ibot", [{}, {"separate_last_layer": True, "center_tokens": "all"}], ids=str)
def test_first_loss_with_other_heads_is_what_was_predicted(
    make_objective: Make, make_batch: Make, real_head: Make, norm: str, ibot: dict[str, Any]
) -> None:
    shape = {"head_n_prototypes": 4096, "head_bottleneck_dim": 256, "norm_last_layer": True, "norm_in_head": norm}
    objective = make_objective(head=real_head, dino={**shape, "koleo_loss_weight": 0.0}, ibot={**shape, **ibot})
    batch = make_batch(samples=8)
    batch.token_mask_VN[:] = False
    batch.token_mask_VN[::2, 3:8] = True
    expected = expected_first_loss(objective.dino, objective.ibot, 2, batch_size=8, n_sequences=3)
    values = {"teacher_temp": 0.04, "teacher_patch_temp": 0.06}
    found = {name: loss.item() for name, loss in objective.losses(batch, values).items()}
    assert found.keys() == expected.keys()
    for name, loss in found.items():
        assert loss == pytest.approx(expected[name], rel=0.25), name
