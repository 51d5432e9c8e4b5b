"""The whole configuration of a pretraining run: DINOv2's sections, with `data` for what the dataset string held."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from medssl_cli.core.config import Config
from medssl_cli.data.datasets import DataConfig
from medssl_cli.data.manifest import parse_dataset_string
from medssl_cli.data.views import CropsConfig, check_patch
from medssl_cli.engine.optim import OptimConfig
from medssl_cli.engine.precision import ComputePrecisionConfig
from medssl_cli.models.zoo import StudentConfig
from medssl_cli.objectives.dino import DinoConfig
from medssl_cli.objectives.ibot import IbotConfig, head_warning
from medssl_cli.objectives.self_distillation import TeacherConfig

SAFE_KEYS = frozenset(
    {
        "train.num_workers",
        "train.prefetch_factor",
        "train.log_period_iterations",
        "train.saveckp_freq",
        "train.checkpoint_period_iterations",
        "train.keep_checkpoints",
        "train.loader_timeout_s",
        "train.output_dir",
        "optim.epochs",
        "data.root",
        "data.split_csv",
    }
)
"""Keys that may differ when a run resumes. Moved data is recognised by its digest, which must not change; epochs may only
grow."""


class ModelConfig(Config):
    """DINOv2's top-level `MODEL` section."""

    WEIGHTS: str = ""
    """Weights for the student's backbone when nothing is resumed; the same as --init."""


class TrainConfig(Config):
    """The run as a whole."""

    batch_size_per_gpu: PositiveInt = 64
    """Samples a process and micro-batch."""
    grad_accumulation: PositiveInt = 1
    """Micro-batches an optimizer step; the learning-rate rule counts their sum."""
    dataset_path: str = ""
    """DINOv2's dataset string, e.g. ProstateSSL:split=TRAIN:root=/data; read into `data`, whose own keys win."""
    output_dir: str = "."
    """Set by --out; kept for DINOv2's files."""
    saveckp_freq: PositiveInt = 20
    """Epochs between checkpoints."""
    checkpoint_period_iterations: NonNegativeInt = 0
    """Steps between checkpoints, instead of saveckp_freq; 0 leaves it to saveckp_freq."""
    keep_checkpoints: int = Field(default=3, ge=2)
    """Newest checkpoints kept; two at least, for the last may be in the process of being saved."""
    seed: NonNegativeInt = 0
    """Every draw of the run is a function of it."""
    num_workers: NonNegativeInt = 10
    """Loader processes at most; never more than there are CPUs to spare."""
    prefetch_factor: PositiveInt = 4
    """Batches that each loader process keeps ready."""
    loader_timeout_s: PositiveInt = 180
    """A loader process that is silent for so long ends the run with an error."""
    OFFICIAL_EPOCH_LENGTH: PositiveInt | Literal["auto"] = 1250
    """Optimizer steps an epoch; auto is one pass over the cases."""
    centering: Literal["centering", "sinkhorn_knopp"] = "centering"
    """How teacher logits become targets."""
    img_size: PositiveInt = 518
    """Side of the image whose grid the position table has; 518 for public DINOv2 weights."""
    percentage_labels: float | None = Field(default=None, ge=0.0, le=1.0)
    """Share of cases whose region of interest is used; the same as data.percentage_labels, and wins over it."""
    log_period_iterations: PositiveInt = 10
    """Steps between log lines."""
    tensorboard: bool = True
    """Write event files to tb/."""


class PretrainConfig(Config):
    """A pretraining run."""

    MODEL: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    student: StudentConfig = StudentConfig()
    teacher: TeacherConfig = TeacherConfig()
    dino: DinoConfig = DinoConfig()
    ibot: IbotConfig = IbotConfig()
    optim: OptimConfig = OptimConfig()
    crops: CropsConfig = CropsConfig()
    compute_precision: ComputePrecisionConfig = ComputePrecisionConfig()

    @model_validator(mode="before")
    @classmethod
    def _read_dataset_string(cls, values: Any) -> Any:
        train = values.get("train") if isinstance(values, dict) else None
        text = train.get("dataset_path") if isinstance(train, dict) else None
        if not text:
            return values
        return {**values, "data": {**parse_dataset_string(str(text)), **(values.get("data") or {})}}

    @model_validator(mode="after")
    def _join_shares(self) -> PretrainConfig:
        share = self.train.percentage_labels
        if share is None or share == self.data.percentage_labels:
            return self
        return self.model_copy(update={"data": self.data.model_copy(update={"percentage_labels": share})})

    @model_validator(mode="after")
    def _check_together(self) -> PretrainConfig:
        faults = list(check_patch(self.crops, self.student.patch_size))
        if self.train.img_size % self.student.patch_size:
            faults.append(
                f"train.img_size {self.train.img_size} is no multiple of student.patch_size {self.student.patch_size}"
            )
        if self.dino.loss_weight == 0 and self.ibot.loss_weight == 0:
            faults.append("dino.loss_weight and ibot.loss_weight are both 0: there is nothing to learn")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def warnings(self) -> list[str]:
        """Settings that have no effect, in words."""
        found = [head_warning(self.dino, self.ibot)]
        if self.optim.warmup_epochs > self.optim.epochs:
            found.append(f"optim.warmup_epochs {self.optim.warmup_epochs} is cut to optim.epochs {self.optim.epochs}")
        return [text for text in found if text]

    def epoch_length(self, n_cases: int, world: int = 1) -> int:
        """Optimizer steps an epoch."""
        if self.train.OFFICIAL_EPOCH_LENGTH != "auto":
            return self.train.OFFICIAL_EPOCH_LENGTH
        return max(1, math.ceil(n_cases / self.samples_per_step(world)))

    def samples_per_step(self, world: int = 1) -> int:
        """Samples that one optimizer step sees over all processes."""
        return self.train.batch_size_per_gpu * self.train.grad_accumulation * world
