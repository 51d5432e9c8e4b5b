"""The classification term against a loop in float64, and what it must leave alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from medssl_cli.objectives.semi_supervised import (
    SemiSupervised,
    SemiSupervisedConfig,
    class_weights,
    keep_labels,
)

VALUES = {"teacher_temp": 0.07, "momentum": 0.9}
Make = Callable[..., Any]


def head(counts: tuple[int, ...] = (5, 3, 2), width: int = 32, **settings: Any) -> SemiSupervised:
    torch.manual_seed(1)
    module = SemiSupervised(width, counts, SemiSupervisedConfig(**{"loss_weight": 0.7, **settings}))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-0.1, 0.1)
    return module


def loss_by_loop(module: SemiSupervised, cls_VD: Tensor, labels: list[int], counts: tuple[int, ...]) -> float:
    """Crop by crop and class by class, from the text."""
    n, classes, config = sum(counts), len(counts), module.config
    rarity = [math.log(n / count) for count in counts]
    mean = sum(count * r for count, r in zip(counts, rarity, strict=True)) / n
    weight, bias = module.linear.weight.detach().double(), module.linear.bias.detach().double()
    sum_ = 0.0
    for v, x in enumerate(cls_VD.detach().double()):
        label = labels[v % len(labels)]
        if label < 0:
            continue
        z = [(float(weight[c] @ x) + float(bias[c])) / config.temperature for c in range(classes)]
        norm = math.log(sum(math.exp(value) for value in z))
        for c in range(classes):
            target = config.label_smoothing / classes + (1 - config.label_smoothing) * (c == label)
            sum_ -= rarity[label] / mean * target * (z[c] - norm)
    crops = len(cls_VD) // len(labels)
    labelled = sum(label >= 0 for label in labels)
    mean_loss = sum_ / (crops * labelled)
    return config.loss_weight * mean_loss * labelled / len(labels)  # times the labelled share of the batch


@pytest.mark.parametrize("labels", [[0, 2, -1, 1], [1, 1, 1, 1], [-1, -1, -1, 0]])
def test_p42_equals_a_loop_in_float64(labels: list[int]) -> None:
    module, cls_VD = head(), torch.randn(5 * 4, 32)
    found = module(cls_VD, torch.tensor(labels))
    assert found.dtype is torch.float32
    assert found.item() == pytest.approx(loss_by_loop(module, cls_VD, labels, (5, 3, 2)), rel=1e-5)


@pytest.mark.parametrize("labels", [None, [-1, -1, -1, -1]])
def test_p42_without_labels_it_is_zero_with_a_gradient(labels: list[int] | None) -> None:
    module, cls_VD = head(), torch.randn(8, 32, requires_grad=True)
    loss = module(cls_VD, None if labels is None else torch.tensor(labels))
    loss.backward()
    assert loss.item() == 0.0
    for tensor in (cls_VD, *module.parameters()):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_p42_weights_by_hand() -> None:
    # shares 3/4 and 1/4: ln 4/3 and ln 4 over the entropy 0.5623
    torch.testing.assert_close(class_weights([3, 1]), torch.tensor([0.287682, 1.386294]) / 0.562335)
    torch.testing.assert_close(class_weights([7, 7, 7]), torch.ones(3))
    counts = torch.tensor([900.0, 90.0, 10.0])
    weights = class_weights(counts.int().tolist())
    assert float((weights * counts).sum() / 1000) == pytest.approx(1.0)
    assert bool((weights[1:] > weights[:-1]).all())
    for impossible in ([4], [4, 0]):
        with pytest.raises(ValueError, match="each with a sample"):
            class_weights(impossible)


def test_p42_a_class_that_the_batch_lacks_changes_no_weight() -> None:
    module, cls_VD = head(), torch.randn(4, 32)
    both = [module(cls_VD[i : i + 1], torch.tensor([label])).item() for i, label in enumerate((0, 2, 0, 2))]
    joint = module(cls_VD, torch.tensor([0, 2, 0, 2])).item()
    assert joint == pytest.approx(sum(both) / 4, rel=1e-5)


def test_p42_first_loss_is_the_labelled_share_of_ln_c() -> None:
    module = SemiSupervised(32, [6, 6, 6], SemiSupervisedConfig(loss_weight=1.0))
    loss = module(100 * torch.randn(8, 32), torch.tensor([0, -1, 2, 1]))
    assert loss.item() == pytest.approx(0.75 * math.log(3), rel=1e-5)


def test_labels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="7 crops do not fit 4 labels"):
        head()(torch.randn(7, 32), torch.tensor([0, 1, 2, 0]))


def test_settings_are_off_by_default_and_checked() -> None:
    assert SemiSupervisedConfig().model_dump() == {
        "loss_weight": 0.0, "label_smoothing": 0.1, "temperature": 0.1, "target": "", "labels": "",
    }  # fmt: skip
    for values in ({"label_smoothing": 1.0}, {"temperature": 0.0}, {"loss_weight": -1.0}):
        with pytest.raises(ValidationError):
            SemiSupervisedConfig(**values)


# --- in the objective ------------------------------------------------------------------------------------------------


def test_p42_is_one_more_term_and_moves_no_other(make_objective: Make, make_batch: Make) -> None:
    plain, module = make_objective(), head()
    labelled = make_objective(classes=module)
    batch = make_batch(samples=4, local_crops=2)
    batch.labels_B = torch.tensor([1, -1, 0, 2])
    expected, found = plain.losses(batch, VALUES), labelled.losses(batch, VALUES)
    assert found.keys() - expected.keys() == {"semi_supervised_loss"}
    assert all(torch.equal(found[name], loss) for name, loss in expected.items())
    backbone = labelled.student["backbone"]
    global_, local = backbone.forward_list(
        [batch.global_VSHW, batch.local_VSHW], [batch.token_mask_VN, None], [None, None]
    )
    cls = torch.cat([global_.cls_BD, local.cls_BD])
    assert found["semi_supervised_loss"].item() == pytest.approx(
        loss_by_loop(module, cls, [1, -1, 0, 2], (5, 3, 2)), rel=1e-5
    )


def test_p42_head_belongs_to_the_student_alone(make_objective: Make, make_batch: Make) -> None:
    objective = make_objective(classes=head())
    assert objective.trained_modules().keys() == {"backbone", "dino_head", "class_head"}
    names = [name for name in objective.state_dict() if "class_head" in name]
    assert names == ["class_head.linear.weight", "class_head.linear.bias"]
    losses = objective.losses(make_batch(), VALUES)
    assert losses["semi_supervised_loss"].item() == 0.0  # no labels came
    torch.stack(list(losses.values())).sum().backward()
    objective.after_step(VALUES)
    assert all(p.grad is not None for module in objective.trained_modules().values() for p in module.parameters())
    assert not any("class" in name for name in objective.teacher.state_dict())


def test_p42_classes_are_learned(make_objective: Make, make_batch: Make) -> None:
    module = SemiSupervised(32, [2, 2, 2], SemiSupervisedConfig(loss_weight=1.0))
    objective, batch = make_objective(classes=module), make_batch(samples=6)
    batch.labels_B = torch.tensor([0, 1, 2, 0, 1, 2])
    trained = [p for part in objective.trained_modules().values() for p in part.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    losses = []
    for _ in range(40):
        terms = objective.losses(batch, VALUES)
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
        objective.after_step(VALUES)
        losses.append(terms["semi_supervised_loss"].item())
    assert losses[0] == pytest.approx(math.log(3), rel=1e-4)
    assert losses[-1] < 0.6


# --- share of the labels ---------------------------------------------------------------------------------------------

LABELS = {f"PT-{i:03d}": ("low" if i % 10 else "high") for i in range(100)} | {"PT-900": "rare"}


@pytest.mark.parametrize(
    ("share", "counts"),
    [
        (1.0, {"low": 90, "high": 10, "rare": 1}),
        (0.3, {"low": 27, "high": 3, "rare": 1}),
        (0.01, {"low": 1, "high": 1, "rare": 1}),
        (0.0, {"low": 1, "high": 1, "rare": 1}),
    ],
)
def test_p42_share_of_each_class_and_never_none(share: float, counts: dict[str, int]) -> None:
    kept = keep_labels(LABELS, share, seed=3)
    assert Counter(kept.values()) == counts
    assert all(LABELS[case_id] == label for case_id, label in kept.items())


def test_p42_kept_labels_depend_on_the_seed_and_not_on_the_order() -> None:
    kept = keep_labels(LABELS, 0.2, seed=3)
    assert keep_labels(dict(reversed(LABELS.items())), 0.2, seed=3) == kept
    assert keep_labels(LABELS, 0.2, seed=4) != kept
    assert kept.items() <= keep_labels(LABELS, 0.5, seed=3).items()
