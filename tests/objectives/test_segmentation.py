"""Losses on label maps: against loops in float64 from the formulas, MONAI, PyTorch, and values worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from medssl_cli.core.protocols import IGNORE_LABEL
from medssl_cli.objectives.segmentation import SegmentationLoss, SegmentationLossConfig, at_size

KINDS = ("dice", "ce", "iou", "tversky", "focal")
S = 1e-6


def make(kind: str = "combined", outputs: int = 1, **settings: Any) -> SegmentationLoss:
    return SegmentationLoss(SegmentationLossConfig(loss_type=kind, **settings), outputs)


def total(loss: SegmentationLoss, logits: Any, label_map: Tensor) -> Tensor:
    return torch.stack(list(loss(logits, label_map).values())).sum()


def example(outputs: int, *, ignored: bool = True, seed: int = 0, size: int = 7) -> tuple[Tensor, Tensor]:
    """Logits and a label map of three samples; some pixels of each, and all of the second row, do not count."""
    rng = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(3, outputs, size, size + 2, generator=rng)
    label_map = torch.randint(0, max(outputs, 2), (3, size, size + 2), generator=rng)
    if ignored:
        label_map[torch.rand(label_map.shape, generator=rng) < 0.2] = IGNORE_LABEL
        label_map[:, 1] = IGNORE_LABEL
    return logits, label_map


# --- the formulas, pixel by pixel ------------------------------------------------------------------------------------


def pixels(logits: Tensor, label_map: Tensor, samples: list[int]) -> Iterator[tuple[list[float], int]]:
    """(probability of each class with background, true class) of the pixels that count."""
    for b in samples:
        for y in range(logits.shape[2]):
            for x in range(logits.shape[3]):
                truth = int(label_map[b, y, x])
                if truth == IGNORE_LABEL:
                    continue
                z = [float(v) for v in logits[b, :, y, x]]
                z = [0.0, *z] if len(z) == 1 else z  # a sigmoid is a softmax against 0
                norm = sum(math.exp(v) for v in z)
                yield [math.exp(v) / norm for v in z], truth


def loss_by_loop(loss: SegmentationLoss, logits: Tensor, label_map: Tensor) -> float:
    config, rows = loss.config, [[b] for b in range(len(logits))]
    if config.reduction == "batch":
        rows = [[b for (b,) in rows]]
    values = []
    for row in rows:
        seen = list(pixels(logits, label_map, row))
        if seen:
            values.append(row_loss(config, seen, loss.classes))
    return sum(values) / len(values) if values else 0.0


def row_loss(config: SegmentationLossConfig, seen: list[tuple[list[float], int]], classes: int) -> float:
    def area(kind: str) -> float:
        losses = []
        for c in range(0 if config.include_background else 1, classes):
            tp = sum(p[c] for p, t in seen if t == c)
            fn = sum(1 - p[c] for p, t in seen if t == c)
            fp = sum(p[c] for p, t in seen if t != c)
            sum_p, sum_t = tp + fp, tp + fn
            ratio = {
                "dice": (2 * tp + S) / (sum_p + sum_t + S),
                "iou": (tp + S) / (sum_p + sum_t - tp + S),
                "tversky": (tp + S) / (tp + config.fn_weight * fn + config.fp_weight * fp + S),
            }[kind]
            losses.append(1 - ratio)
        return sum(losses) / len(losses)

    def ce() -> float:
        return sum(-math.log(p[t]) * (config.pos_weight if t else 1) for p, t in seen) / len(seen)

    def focal() -> float:
        terms = [config.focal_alpha * (1 - p[t]) ** config.focal_gamma * -math.log(p[t]) for p, t in seen]
        return sum(terms) / len(seen)

    if config.loss_type == "combined":
        return config.dice_weight * area("dice") + config.ce_weight * ce()
    return {"ce": ce, "focal": focal}.get(config.loss_type, lambda: area(config.loss_type))()


@pytest.mark.parametrize("reduction", ["sample", "batch"])
@pytest.mark.parametrize("outputs", [1, 2, 4])
@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "dice"},
        {"kind": "dice", "include_background": True},
        {"kind": "ce"},
        {"kind": "ce", "pos_weight": 5.0},
        {"kind": "iou"},
        {"kind": "tversky"},
        {"kind": "tversky", "fn_weight": 0.2, "fp_weight": 0.9, "include_background": True},
        {"kind": "focal"},
        {"kind": "focal", "focal_alpha": 0.4, "focal_gamma": 0.5},
        {"kind": "combined", "dice_weight": 0.7, "ce_weight": 0.3, "pos_weight": 5.0},
    ],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_every_loss_equals_its_formula_in_a_float64_loop(
    settings: dict[str, Any], outputs: int, reduction: str
) -> None:
    loss = make(outputs=outputs, reduction=reduction, **settings)
    logits, label_map = example(outputs)
    found = total(loss, logits, label_map)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(loss_by_loop(loss, logits, label_map), rel=2e-6)


# --- values by hand --------------------------------------------------------------------------------------------------


def test_c12_no_double_sigmoid() -> None:
    label_map = torch.zeros(2, 8, 8, dtype=torch.int64)
    label_map[:, :, 4:] = 1
    terms = make()(torch.zeros(2, 1, 8, 8), label_map)
    assert float(terms["ce"]) == pytest.approx(0.5 * math.log(2), abs=1e-7)
    assert float(terms["dice"]) == pytest.approx(0.5 * 0.5, abs=1e-7)
    assert float(make("ce")(torch.zeros(2, 1, 8, 8), label_map)["ce"]) == pytest.approx(math.log(2), abs=1e-7)
    assert float(make("dice")(torch.zeros(2, 1, 8, 8), label_map)["dice"]) == pytest.approx(0.5, abs=1e-7)


def test_c11_fp_weight_costs_false_positives_and_fn_weight_false_negatives() -> None:
    truth = torch.zeros(1, 4, 4, dtype=torch.int64)
    truth[0, :2] = 1
    too_much = torch.full((1, 1, 4, 4), -40.0)
    too_much[0, 0, :3] = 40.0  # all of the truth and a row more
    too_little = torch.full((1, 1, 4, 4), -40.0)
    too_little[0, 0, :1] = 40.0

    def tversky(logits: Tensor, **weights: float) -> float:
        return float(make("tversky", **weights)(logits, truth)["tversky"])

    assert tversky(too_much) == pytest.approx(1 - 8 / (8 + 0.3 * 4), abs=1e-6)
    assert tversky(too_little) == pytest.approx(1 - 4 / (4 + 0.7 * 4), abs=1e-6)
    assert tversky(too_much, fp_weight=0.9) > tversky(too_much) + 0.1
    assert tversky(too_much, fn_weight=0.1) == tversky(too_much)
    assert tversky(too_little, fn_weight=0.9) > tversky(too_little) + 0.05
    assert tversky(too_little, fp_weight=0.9) == tversky(too_little)


def test_w37_dice_of_three_classes_leaves_the_background_out() -> None:
    """Certain logits: of 8 pixels 4 are background, 3 are of class 1, 1 is of class 2; the last of class 1 is missed.

    Class 1: 2 * 2 / (2 + 3) = 0.8; class 2: 2 * 1 / (2 + 1) = 2/3; background: 2 * 4 / (4 + 4) = 1.
    """
    truth = torch.tensor([[[0, 0, 0, 0], [1, 1, 1, 2]]])
    predicted = torch.tensor([[[0, 0, 0, 0], [1, 1, 2, 2]]])
    logits = 60.0 * F.one_hot(predicted, 3).movedim(-1, 1).float()
    without = float(make("dice", 3)(logits, truth)["dice"])
    assert without == pytest.approx(1 - (0.8 + 2 / 3) / 2, abs=1e-6)
    withal = float(make("dice", 3, include_background=True)(logits, truth)["dice"])
    assert withal == pytest.approx(1 - (0.8 + 2 / 3 + 1) / 3, abs=1e-6)


def test_w37_empty_prediction_and_empty_reference_agree() -> None:
    truth = torch.zeros(1, 6, 6, dtype=torch.int64)
    logits = torch.zeros(1, 3, 6, 6)
    logits[:, 0] = 60.0
    for kind in ("dice", "iou", "tversky"):
        assert float(make(kind, 3)(logits, truth)[kind]) == pytest.approx(0, abs=1e-6)
        assert float(make(kind)(torch.full((1, 1, 6, 6), -60.0), truth)[kind]) == pytest.approx(0, abs=1e-6)


def test_a_large_and_a_missed_small_lesion_weigh_alike_by_sample_and_not_by_batch() -> None:
    truth = torch.zeros(2, 10, 10, dtype=torch.int64)
    truth[0] = 1
    truth[1, 0, 0] = 1
    logits = torch.full((2, 1, 10, 10), -40.0)
    logits[0] = 40.0
    assert float(make("dice")(logits, truth)["dice"]) == pytest.approx(0.5, abs=1e-6)
    assert float(make("dice", reduction="batch")(logits, truth)["dice"]) == pytest.approx(1 - 200 / 201, abs=1e-6)


def test_focal_alpha_multiplies_both_classes() -> None:
    logits, label_map = example(1)
    once, twice = make("focal")(logits, label_map)["focal"], make("focal", focal_alpha=2.0)(logits, label_map)["focal"]
    assert float(twice) == pytest.approx(2 * float(once), rel=1e-6)


# --- against others --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["sample", "batch"])
@pytest.mark.parametrize(("outputs", "background"), [(1, False), (4, False), (4, True)])
def test_regions_equal_monai(outputs: int, reduction: str, background: bool) -> None:
    from monai.losses import DiceLoss, TverskyLoss

    logits, label_map = example(outputs, ignored=False)
    target = label_map[:, None].float()
    several = {"softmax": True, "to_onehot_y": True} if outputs > 1 else {"sigmoid": True}
    options = {**several, "batch": reduction == "batch", "include_background": background or outputs == 1}
    theirs = {
        "dice": DiceLoss(**options, smooth_nr=S, smooth_dr=S),
        "iou": DiceLoss(**options, jaccard=True, smooth_nr=2 * S, smooth_dr=2 * S),
        "tversky": TverskyLoss(**options, alpha=0.3, beta=0.7, smooth_nr=S, smooth_dr=S),  # alpha: false positives
    }
    for kind, module in theirs.items():
        mine = make(kind, outputs, reduction=reduction, include_background=background)(logits, label_map)[kind]
        assert float(mine) == pytest.approx(float(module(logits, target)), rel=1e-5), kind


def test_pixels_equal_pytorch_and_monai() -> None:
    from monai.losses import FocalLoss

    logits, label_map = example(1, ignored=False)
    truth = label_map[:, None].float()
    weighted = F.binary_cross_entropy_with_logits(logits, truth, pos_weight=torch.tensor(5.0))
    assert float(make("ce", pos_weight=5.0)(logits, label_map)["ce"]) == pytest.approx(float(weighted), rel=1e-6)
    focal = FocalLoss(gamma=2.0)(logits, truth)
    assert float(make("focal")(logits, label_map)["focal"]) == pytest.approx(float(focal), rel=1e-6)

    logits, label_map = example(5)
    by_batch = F.cross_entropy(logits, label_map, ignore_index=IGNORE_LABEL)
    assert float(make("ce", 5, reduction="batch")(logits, label_map)["ce"]) == pytest.approx(float(by_batch), rel=1e-6)
    logits, label_map = example(5, ignored=False)
    theirs = FocalLoss(gamma=2.0, use_softmax=True, to_onehot_y=True)(logits, label_map[:, None])
    mine = make("focal", 5)(logits, label_map)["focal"]
    assert float(mine) == pytest.approx(5 * float(theirs), rel=1e-5)  # theirs is a mean over the classes too


@pytest.mark.parametrize("kind", ["combined", *KINDS])
def test_one_output_equals_two_with_a_background_of_zero(kind: str) -> None:
    logits, label_map = example(1)
    two = torch.cat([torch.zeros_like(logits), logits], 1)
    one = total(make(kind, pos_weight=3.0), logits, label_map)
    assert float(one) == pytest.approx(float(total(make(kind, 2, pos_weight=3.0), two, label_map)), rel=1e-6)


@pytest.mark.parametrize("reduction", ["sample", "batch"])
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_differences(kind: str, outputs: int, reduction: str) -> None:
    loss = make(kind, outputs, reduction=reduction, include_background=outputs > 1)
    logits, label_map = example(outputs, size=3)
    logits = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, label_map)[kind], (logits,))


# --- what does not count ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("kind", ["combined", *KINDS])
def test_ignored_pixels_reach_no_loss_and_no_gradient(kind: str, outputs: int) -> None:
    loss = make(kind, outputs)
    logits, label_map = example(outputs)
    ignored = (label_map == IGNORE_LABEL)[:, None].expand_as(logits)
    changed = torch.where(ignored, torch.full_like(logits, torch.inf), logits).requires_grad_()
    found = total(loss, changed, label_map)
    assert torch.equal(found, total(loss, logits, label_map))
    found.backward()
    assert changed.grad is not None
    assert not changed.grad[ignored].any()
    assert changed.grad[~ignored].all()


@pytest.mark.parametrize("reduction", ["sample", "batch"])
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("kind", ["combined", *KINDS])
def test_a_batch_without_any_pixel_that_counts_gives_zero(kind: str, outputs: int, reduction: str) -> None:
    logits, label_map = example(outputs)
    logits.requires_grad_()
    found = total(make(kind, outputs, reduction=reduction), logits, torch.full_like(label_map, IGNORE_LABEL))
    found.backward()
    assert float(found.detach()) == pytest.approx(0, abs=1e-9)
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize("kind", ["combined", *KINDS])
def test_padding_to_a_larger_tile_changes_nothing(kind: str) -> None:
    logits, label_map = example(3)
    padded = total(
        make(kind, 3), F.pad(logits, (0, 5, 0, 3), value=9.0), F.pad(label_map, (0, 5, 0, 3), value=IGNORE_LABEL)
    )
    assert float(padded) == pytest.approx(float(total(make(kind, 3), logits, label_map)), rel=1e-6)


def test_a_sample_without_pixels_that_count_does_not_dilute_the_mean() -> None:
    logits, label_map = example(1)
    one = total(make(), logits[:1], label_map[:1])
    label_map[1:] = IGNORE_LABEL
    assert float(total(make(), logits, label_map)) == pytest.approx(float(one), rel=1e-6)


# --- number formats --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("kind", ["combined", *KINDS])
def test_half_precision_is_left_at_the_door(kind: str, outputs: int) -> None:
    """2 * 96 * 96 pixels of 0.5 sum up to 9216, beyond what bfloat16 can count."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(2, outputs, 96, 96, generator=rng).bfloat16()
    label_map = torch.randint(0, max(outputs, 2), (2, 96, 96), generator=rng)
    loss = make(kind, outputs)
    with torch.autocast("cpu", torch.bfloat16):
        under = total(loss, logits, label_map)
    assert under.dtype == torch.float32
    assert float(under) == pytest.approx(float(total(loss, logits.double(), label_map)), rel=1e-5)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_is_finite_where_the_network_is_certain(outputs: int, gamma: float) -> None:
    logits = torch.full((1, outputs, 2, 2), -200.0)
    logits[0, -1] = 200.0
    logits.requires_grad_()
    label_map = torch.tensor([[[0, 0], [outputs - 1 or 1, outputs - 1 or 1]]])
    value = total(make("focal", outputs, focal_gamma=gamma), logits, label_map)
    value.backward()
    assert float(value.detach()) == pytest.approx(0.5 * (400 if outputs > 1 else 200), rel=1e-5)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


# --- deep supervision ------------------------------------------------------------------------------------------------


def test_levels_count_half_as_much_each_and_all_together_one() -> None:
    loss = make("combined", 3)
    rng = torch.Generator().manual_seed(1)
    label_map = torch.randint(0, 3, (2, 12, 8), generator=rng)
    levels = [torch.randn(2, 3, 12 // n, 8 // n, generator=rng) for n in (1, 2, 4)]
    found = loss(levels, label_map)
    for name in ("dice", "ce"):
        each = [float(loss(level, at_size(label_map, level.shape[-2:]))[name]) for level in levels]
        expected = sum(w * v for w, v in zip((4 / 7, 2 / 7, 1 / 7), each, strict=True))
        assert float(found[name]) == pytest.approx(expected, rel=1e-6)
    assert float(total(loss, levels[:1], label_map)) == float(total(loss, levels[0], label_map))


@pytest.mark.parametrize("size", [(7, 5), (3, 9), (1, 1), (16, 20), (4, 4)])
def test_label_maps_are_resized_as_pytorch_does_by_centres(size: tuple[int, int]) -> None:
    label_map = torch.randint(0, 5, (2, 8, 10), generator=torch.Generator().manual_seed(2))
    label_map[0, 3] = IGNORE_LABEL
    theirs = F.interpolate(label_map[:, None].double(), size, mode="nearest-exact")[:, 0].long()
    assert torch.equal(at_size(label_map, size), theirs)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused() -> None:
    logits, label_map = example(3)
    with pytest.raises(ValueError, match=r"\(3, 3, 7, 9\).*\(3, 7, 9\).*1 outputs"):
        make()(logits, label_map)
    with pytest.raises(ValueError, match="do not fit"):
        make(outputs=3)(logits[:2], label_map)
    with pytest.raises(ValueError, match="at least 1"):
        make(outputs=0)
    with pytest.raises((IndexError, RuntimeError), match="bounds"):
        make()(logits[:, :1], label_map)  # a third class for one structure


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(ValidationError, match="nothing to learn"):
        SegmentationLossConfig(dice_weight=0, ce_weight=0)
    with pytest.raises(ValidationError, match="nothing to learn"):
        SegmentationLossConfig(loss_type="tversky", fn_weight=0, fp_weight=0)
    assert set(make(dice_weight=0)(*example(1))) == {"ce"}
    assert set(make(ce_weight=0)(*example(1))) == {"dice"}
