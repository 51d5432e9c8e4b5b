"""A segmentation job of a fraction of a second, and CT-PET trees of bright discs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from medssl_cli.core.config import Config
from medssl_cli.core.protocols import LabelledBatch
from medssl_cli.core.result import Result
from medssl_cli.core.run import seed_for
from medssl_cli.data.labelled_slices import LabelledSample
from medssl_cli.engine.memory import KeyNames
from medssl_cli.engine.optim import parameter_groups
from medssl_cli.objectives.segmentation import SegmentationLoss, SegmentationLossConfig
from medssl_cli.services.run_folder import HeldLog, RunFolder
from medssl_cli.services.segment_job import SegmentJob, TrainSettings
from medssl_cli.services.segment_request import COMMAND, SegmentRequest
from medssl_cli.services.segment_run import train_job

SIDE = 16


class TinyConfig(Config):
    """What a tiny run can be told."""

    epochs: int = 4
    lr: float = 0.01
    workers: int = 0
    batch: int = 4


class TinyNetwork(nn.Module):
    """Two convolutions with running statistics between them, and a frozen one beside."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.frozen = nn.Conv2d(2, width, 3, padding=1).requires_grad_(False)
        self.first = nn.Conv2d(2, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.last = nn.Conv2d(width, 1, 1)

    def forward(self, images_BSHW: Tensor, available_BS: Tensor | None = None) -> Tensor:
        return self.last(self.norm(self.first(images_BSHW) + self.frozen(images_BSHW)).relu())

    def trained_parts(self) -> dict[str, nn.Module]:
        return {"network": self}


class Squares:
    """Squares in noise; a pure function of the index."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: tuple[int, int]) -> LabelledSample:
        rng = np.random.default_rng(key[1])
        label = np.zeros((SIDE, SIDE), np.uint8)
        y, x = rng.integers(0, SIDE - 6, 2)
        label[y : y + 6, x : x + 6] = 1
        image = rng.random((2, SIDE, SIDE)) * 0.5 + 0.4 * label
        return LabelledSample(
            torch.from_numpy(image.astype(np.float32)),
            torch.from_numpy(label),
            torch.ones(2, dtype=torch.bool),
            f"s{key[1]}",
        )

    def case_id(self, index: int) -> str:
        return f"s{index}"


def scripted(scores: list[float | None]) -> Callable[[nn.Module], Mapping[str, Any]]:
    """A validation that gives these scores in turn."""
    given = iter(scores)

    def validate(network: nn.Module) -> Mapping[str, Any]:
        score = next(given)
        return {"val_loss": 1.0, "val_dice": score, "val_best_dice": score, "val_best_threshold": 0.4, "score": score}

    return validate


def looked(network: nn.Module) -> Mapping[str, Any]:
    """A validation whose figures are a function of the weights."""
    batch = torch.stack([Squares(3)[(0, index)].image_SHW for index in range(3)])
    mean = float(network(batch).sigmoid().mean())
    return {"val_loss": mean, "val_dice": mean, "val_best_dice": mean, "val_best_threshold": 0.4, "score": mean}


def draw_nothing(network: nn.Module, folder: Path, threshold: float | None) -> None:
    """One picture."""
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(folder / "s0.png")


def tiny_job(config: TinyConfig | None = None, *, width: int = 4, views: Any = None, **given: Any) -> SegmentJob:
    """A job of nine samples."""
    config = config or TinyConfig()
    settings: dict[str, Any] = {"num_workers": config.workers, "save_freq": 2, "log_every": 1, "seed": 7}
    settings |= {key: given.pop(key) for key in list(given) if key in TrainSettings.__dataclass_fields__}
    torch.manual_seed(0)
    network = TinyNetwork(width)
    facts = {"n_slices": 9, "split_digest": "b" * 64, "data_digest": "a" * 64, **given.pop("data_facts", {})}
    parts: dict[str, Any] = {
        "task": "ct-pet",
        "recipe": "tiny",
        "config": config,
        "settings": TrainSettings(epochs=config.epochs, batch_size=config.batch, lr=config.lr, **settings),
        "network": network,
        "loss": SegmentationLoss(SegmentationLossConfig(), 1),
        "classes": ("background", "square"),
        "groups": parameter_groups({"network": network}, 0),
        "train": Squares(9),
        "views": views or noisy,
        "validate": looked,
        "overlays": draw_nothing,
        "card": {"network": {"name": "tiny"}, "sequences": ["CT", "PET"], "mean": 0.5, "std": 0.5, "tile": 0},
        "data_facts": facts,
        "keys": KeyNames(batch="batch", accumulation=None, workers="workers", not_finite="--lr"),
        "distance_unit": "px",
        "seen": [("train", "s0", "p0"), ("val", "s1", "p1")],
        "safe_keys": frozenset({"workers"}),
        "growing_keys": frozenset({"epochs"}),
        "batch_keys": frozenset({"batch"}),
    }
    return SegmentJob(**(parts | given))


def noisy(batch: LabelledBatch, step: int, micro: int) -> LabelledBatch:
    """Noise that is a function of the place in the run."""
    generator = torch.Generator().manual_seed(seed_for(7, "noise", step, micro))
    batch.images_BSHW = batch.images_BSHW + 0.05 * torch.randn(batch.images_BSHW.shape, generator=generator)
    return batch


def train(job: SegmentJob, out: Path, **request: Any) -> Result:
    """The run, as the command does it."""
    with HeldLog() as lines, RunFolder(out, COMMAND, lines) as folder:
        return train_job(job, folder, SegmentRequest(task=job.task, out=out, **request), time.time())


def history(out: Path) -> dict[str, list[Any]]:
    return json.loads((out / "history.json").read_text(encoding="utf-8"))


def state(out: Path) -> dict[str, Tensor]:
    """Every tensor of the newest checkpoint: model and optimizer."""
    folder = (out / "last" / "last").resolve()
    return {
        f"{name}/{key}": tensor
        for name in ("model", "optimizer")
        for key, tensor in load_file(folder / f"{name}.safetensors").items()
    }


def same_state(first: Path, second: Path) -> None:
    """Bit by bit."""
    one, two = state(first), state(second)
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def write_discs(root: Path, parts: Mapping[str, int], side: int = 32, *, seed: int = 0, per_patient: int = 4) -> Path:
    """Bright discs in PET, noise in CT; ``parts``: train, val, test, or an empty name for a flat tree, to slices."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    patient = 0
    for part, count in parts.items():
        for kind in ("CT", "PET", "masks"):
            (root / part / kind).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            patient += number % per_patient == 0
            radius = rng.uniform(side / 10, side / 5)
            centre_y, centre_x = rng.uniform(radius + 1, side - radius - 1, 2)
            mask = (y - centre_y) ** 2 + (x - centre_x) ** 2 <= radius**2
            pictures = {
                "CT": rng.normal(120, 40, mask.shape),
                "PET": rng.normal(50, 15, mask.shape) + 130 * mask,
                "masks": 255.0 * mask,
            }
            for kind, picture in pictures.items():
                name = f"patient_{patient:03d}_slice_{number % per_patient:02d}.png"
                Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(root / part / kind / name)
    return root
