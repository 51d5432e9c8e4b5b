"""A student, a teacher and a centre on 4 x 4 images: the smallest thing that keeps the Objective protocol."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medssl_cli.core.protocols import Batch, SliceBatch
from medssl_cli.core.run import seed_for
from medssl_cli.engine.checkpoint import Checkpoints
from medssl_cli.engine.optim import build_adamw, parameter_groups
from medssl_cli.engine.precision import Precision
from medssl_cli.engine.schedules import Schedules
from medssl_cli.engine.telemetry import Telemetry
from medssl_cli.engine.trainer import Trainer

CPU = torch.device("cpu")


class Stub(nn.Module):
    """Predicts the teacher's output; dropout makes it depend on the global generator."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        torch.manual_seed(0)
        backbone = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.GELU(), nn.Dropout(dropout))
        self.student = nn.ModuleDict({"backbone": backbone, "dino_head": nn.Linear(8, 4)})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        self.register_buffer("centre", torch.zeros(4))

    def losses(self, batch: Batch, values: Mapping[str, float]) -> dict[str, Tensor]:
        images = batch.global_VSHW
        target = self.teacher["dino_head"](self.teacher["backbone"](images)) - self.centre
        features = self.student["backbone"](images)
        self.last = target.detach()
        return {
            "dino": ((self.student["dino_head"](features) - target - 1) ** 2).mean(),
            "koleo": 0.1 * (features**2).mean(),
        }

    def after_step(self, values: Mapping[str, float]) -> None:
        with torch.no_grad():
            for mine, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                mine.lerp_(theirs, 1 - values["momentum"])
            self.centre.mul_(0.9).add_(self.last.mean(0), alpha=0.1)

    def trained_modules(self) -> dict[str, nn.Module]:
        return dict(self.student.items())

    def health(self) -> dict[str, float]:
        return {"teacher_entropy": 0.8, "effective_rank": 3.5}


def slices(step: int, micro: int, size: int, seed: int = 3) -> SliceBatch:
    rng = np.random.default_rng(seed_for(seed, "data", step, micro))
    images = torch.from_numpy(rng.random((size, 1, 4, 4), dtype=np.float32))
    return SliceBatch(
        images_BSHW=images,
        sizes_B2=torch.full((size, 2), 4),
        available_BS=torch.ones(size, 1, dtype=torch.bool),
        case_ids=[f"PT-{step:03d}-{micro}-{i}" for i in range(size)],
    )


def batches(step: int, accumulation: int = 1, size: int = 4) -> Iterator[SliceBatch]:
    while True:
        for micro in range(accumulation):
            yield slices(step, micro, size)
        step += 1


def views(batch: SliceBatch, step: int, micro: int) -> Batch:
    flipped = batch.images_BSHW.flip(-1)
    return Batch(
        global_VSHW=torch.cat([batch.images_BSHW, flipped]),
        local_VSHW=None,
        token_mask_VN=torch.zeros(2 * len(flipped), 1, dtype=torch.bool),
        available_BS=batch.available_BS,
        case_ids=batch.case_ids,
    )


def trainer(out: Path | None, steps: int = 20, objective: Any = None, **changes: Any) -> Trainer:
    """A trainer of the stub; with ``out`` it logs and saves there every 5 steps."""
    objective = objective or Stub()
    accumulation = changes.pop("accumulation", 1)
    settings: dict[str, Any] = {
        "schedules": Schedules(total_steps=steps, epoch_steps=2, lr=1e-2, warmup_epochs=2, freeze_last_layer_epochs=0),
        "batches": lambda step: batches(step, accumulation),
        "views": views,
        "total_steps": steps,
        "device": CPU,
        "precision": Precision("fp32", CPU),
        "accumulation": accumulation,
        "checkpoint_every": 5,
    }
    if out is not None:
        settings["checkpoints"] = Checkpoints(out / "checkpoints", {"optim": {"base_lr": 0.01}}, ["ax_t2wi"])
        settings["telemetry"] = Telemetry(out, steps, CPU, log_every=1, tensorboard=False)
    optimizer = build_adamw(parameter_groups(objective.trained_modules(), depth=1), CPU)
    return Trainer(objective=objective, optimizer=optimizer, **{**settings, **changes})


def resumed(out: Path, steps: int = 20, **changes: Any) -> Trainer:
    """A fresh trainer that took up the newest checkpoint of ``out``, if there is one."""
    fresh = trainer(out, steps, **changes)
    assert fresh.checkpoints is not None
    newest = fresh.checkpoints.latest()
    if newest is not None:
        fresh.restore(newest)
    return fresh
