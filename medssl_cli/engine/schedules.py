"""Pure functions step -> value: learning rate, weight decay, teacher momentum and temperature.

Everything is computed from the step alone and nothing is remembered, so a resumed run has the values of an undisturbed
one. Form and end points follow DINOv2 (Oquab et al. 2023): the ramp includes its end point, the cosine begins at the
base value again, and beyond the last step the final value holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

ScalingRule = Literal["sqrt_wrt_1024", "linear_wrt_256", "identity"]


def effective_lr(base_lr: float, total_batch: int, rule: ScalingRule) -> float:
    """Learning rate after scaling by the batch; to be applied once.

    Args:
        base_lr: Rate at the rule's own batch size.
        total_batch: Images of one optimizer update: batch per process x processes x accumulation.
        rule: Square root with respect to 1024, linear with respect to 256, or unchanged.
    """
    if total_batch < 1:
        raise ValueError(f"total_batch is at least 1, got {total_batch}")
    factors = {"sqrt_wrt_1024": math.sqrt(total_batch / 1024), "linear_wrt_256": total_batch / 256, "identity": 1.0}
    return base_lr * factors[rule]


def linear_ramp(step: int, start: float, end: float, steps: int) -> float:
    """``steps`` evenly spaced values from ``start`` to ``end``, both included; before and after them, the nearest."""
    if step >= steps:
        return end
    if steps == 1:
        return start
    return start + (end - start) * max(step, 0) / (steps - 1)


def warmup_cosine(step: int, start: float, base: float, final: float, warmup_steps: int, total_steps: int) -> float:
    """Linear from ``start`` to ``base``, then half a cosine to ``final``; ``final`` from ``total_steps`` on.

    A warm-up longer than the run is shortened to the run.
    """
    warmup_steps = min(warmup_steps, total_steps)
    if step >= total_steps:
        return final
    if step < warmup_steps:
        return linear_ramp(step, start, base, warmup_steps)
    share = (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps))) / 2
    return share * base + (1 - share) * final


@dataclass(frozen=True)
class Schedules:
    """All values that change while training, as functions of the step.

    Args:
        total_steps: Optimizer updates of the whole run.
        epoch_steps: Updates of one epoch; the unit of the ``..._epochs`` arguments.
        lr: Effective learning rate, already scaled by the batch.
        freeze_last_layer: ``lr``: the last layer has rate 0 while it is frozen (DINOv2), so that its moments build up;
            ``gradient``: it has no gradient (DINO, iBOT), so that nothing acts on it.
        warmup_teacher_patch_temp, teacher_patch_temp, warmup_teacher_patch_temp_epochs: Temperature of the patch
            targets; None is that of the cls targets.
    """

    total_steps: int
    epoch_steps: int
    lr: float
    min_lr: float = 1e-6
    warmup_epochs: float = 10
    weight_decay: float = 0.04
    weight_decay_end: float = 0.4
    freeze_last_layer_epochs: float = 1
    freeze_last_layer: Literal["lr", "gradient"] = "lr"
    freeze_backbone_epochs: float = 0
    momentum: float = 0.992
    final_momentum: float = 1.0
    warmup_teacher_temp: float = 0.04
    teacher_temp: float = 0.07
    warmup_teacher_temp_epochs: float = 30
    warmup_teacher_patch_temp: float | None = None
    teacher_patch_temp: float | None = None
    warmup_teacher_patch_temp_epochs: float | None = None

    def at(self, step: int) -> dict[str, float]:
        """Values of the update with this index, counted from 0.

        Returns:
            ``lr``, ``last_layer_lr``, ``wd``, ``momentum``, ``teacher_temp``, and ``backbone_frozen`` (0 or 1);
            ``teacher_patch_temp`` if it differs in any setting, ``last_layer_frozen`` (0 or 1) if freezing means no
            gradient.
        """
        total = self.total_steps
        lr = warmup_cosine(step, 0.0, self.lr, self.min_lr, self._steps(self.warmup_epochs), total)
        last_layer_frozen = step < self._steps(self.freeze_last_layer_epochs)
        values = {
            "lr": lr,
            "last_layer_lr": 0.0 if last_layer_frozen else lr,
            "wd": warmup_cosine(step, 0.0, self.weight_decay, self.weight_decay_end, 0, total),
            "momentum": warmup_cosine(step, 0.0, self.momentum, self.final_momentum, 0, total),
            "teacher_temp": linear_ramp(
                step, self.warmup_teacher_temp, self.teacher_temp, self._steps(self.warmup_teacher_temp_epochs)
            ),
            "backbone_frozen": float(step < self._steps(self.freeze_backbone_epochs)),
        }
        if self._patch_temperature() != self._cls_temperature():
            start, end, epochs = self._patch_temperature()
            values["teacher_patch_temp"] = linear_ramp(step, start, end, self._steps(epochs))
        if self.freeze_last_layer == "gradient":
            values["last_layer_frozen"] = float(last_layer_frozen)
        return values

    def _cls_temperature(self) -> tuple[float, float, float]:
        return self.warmup_teacher_temp, self.teacher_temp, self.warmup_teacher_temp_epochs

    def _patch_temperature(self) -> tuple[float, float, float]:
        own = (self.warmup_teacher_patch_temp, self.teacher_patch_temp, self.warmup_teacher_patch_temp_epochs)
        start, end, epochs = (c if p is None else p for p, c in zip(own, self._cls_temperature(), strict=True))
        return start, end, epochs

    def warnings(self) -> list[str]:
        """What is legal and yet unlikely to be meant, one sentence each."""
        texts = []
        warmup = self._steps(self.warmup_epochs)
        if warmup > self.total_steps:
            texts.append(
                f"The warm-up of {warmup} steps is longer than the run of {self.total_steps} and was shortened to it: "
                "the learning rate only rises. Lower optim.warmup_epochs."
            )
        if self.lr < self.min_lr:
            texts.append(
                f"The effective learning rate {self.lr:.3g} lies below optim.min_lr {self.min_lr:.3g}: "
                "it rises after the warm-up. Lower optim.min_lr."
            )
        frozen = {"freeze_backbone_epochs": "backbone", "freeze_last_layer_epochs": "last layer of the heads"}
        for key, part in frozen.items():
            if self._steps(getattr(self, key)) >= self.total_steps:
                texts.append(f"The {part} is frozen for the whole run. Lower optim.{key}.")
        return texts

    def _steps(self, epochs: float) -> int:
        return round(epochs * self.epoch_steps)
