"""The whole configuration of a pretraining run: DINOv2's sections, with `data` for what the dataset string held."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ModelWrapValidatorHandler, NonNegativeInt, PositiveInt, PrivateAttr, model_validator

from medssl_cli.core.config import Config, leaves
from medssl_cli.core.errors import ConfigError
from medssl_cli.data.datasets import DataConfig
from medssl_cli.data.manifest import parse_dataset_string
from medssl_cli.data.modalities import Modality, resolve_modality
from medssl_cli.data.views import CropsConfig, check_patch
from medssl_cli.engine.acceleration import AccelerationConfig
from medssl_cli.engine.health import HealthConfig
from medssl_cli.engine.optim import OptimConfig
from medssl_cli.engine.precision import ComputePrecisionConfig
from medssl_cli.models.zoo import StudentConfig
from medssl_cli.objectives.dino import DinoConfig
from medssl_cli.objectives.ibot import IbotConfig, head_warning, mask_warning
from medssl_cli.objectives.self_distillation import TeacherConfig
from medssl_cli.objectives.semi_supervised import SemiSupervisedConfig
from medssl_cli.services.dinov2_keys import set_aside
from medssl_cli.services.labelled_data import EvaluationConfig
from medssl_cli.services.lookup import EXPORT

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
        "train.tensorboard",
        "train.dataset_path",
        "teacher.init_with_student_weights",
        "train.compile",
        "train.cudagraphs",
        "student.grad_checkpointing",
        "compute_precision.parallel",
        "sharding_strategy",
        *(f"evaluation.{name}" for name in EvaluationConfig.model_fields),
        *(f"health.{name}" for name in HealthConfig.model_fields),
        "data.root",
        "data.on_error",
    }
)
"""Keys that may differ when a run resumes, because no number depends on them beyond rounding. The dataset string counts
by what it sets in `data`, the data root by the digest of its files."""


PRESETS: dict[str, dict[str, Any]] = {
    "visionfm": {"teacher.warmup_teacher_temp": 0.07, "teacher.teacher_temp": 0.04},
}
"""Values of a published run that the recipes depart from, by the name given to --preset."""

VOLUMES_ONLY = (
    "data.mri_sequences",
    "data.random_axes",
    "data.random_slices",
    "data.roi",
    "data.min_roi_pixels",
    "data.spatial_size",
    "data.percentage_labels",
    "data.preprocess.orientation",
    "data.preprocess.reference",
    "data.preprocess.adc_scale",
    "data.preprocess.adc_range",
    "data.preprocess.resample_mm",
    "data.preprocess.window_hu",
    "data.preprocess.window_sequences",
    "data.windows_hu",
    "data.as_pictures",
    "crops.crop_from_tumor_foreground",
    "student.use_mri_seq_embed",
    "evaluation.slices",
    "evaluation.missing_sequences",
)
"""Keys that mean nothing for plain pictures."""


class ModelConfig(Config):
    """DINOv2's top-level `MODEL` section."""

    WEIGHTS: str = ""
    """Weights for the student's backbone when nothing is resumed; the same as --init."""
    init_from: Literal["teacher", "student"] = "teacher"
    """Which network of a file that holds both; the same as --init-from. Student and teacher both start from it."""


class TrainConfig(AccelerationConfig):
    """The run as a whole."""

    batch_size_per_gpu: PositiveInt = 64
    """Samples a process and micro-batch."""
    grad_accumulation: PositiveInt = 1
    """Micro-batches an optimizer step; the learning-rate rule counts their sum."""
    dataset_path: str = ""
    """DINOv2's dataset string, e.g. ProstateSSL:split=TRAIN:root=/data; read into `data`, whose own keys win."""
    output_dir: str = ""
    """Run folder; the same as --out, which wins. Empty or `.`: runs/NAME OF CONFIG."""
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
    """Side of the image whose grid of whole patches the position table has; 518 for public DINOv2 weights."""
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
    semi_supervised: SemiSupervisedConfig = SemiSupervisedConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    health: HealthConfig = HealthConfig()
    compute_precision: ComputePrecisionConfig = ComputePrecisionConfig()

    _notes: list[str] = PrivateAttr(default_factory=list)

    @model_validator(mode="wrap")
    @classmethod
    def _read_dinov2(cls, values: Any, handler: ModelWrapValidatorHandler[PretrainConfig]) -> PretrainConfig:
        if not isinstance(values, dict):
            return handler(values)
        kept, notes = set_aside(values)
        from_string = _read_dataset_string(kept.get("train"))
        data = kept.get("data") or {}
        if from_string and isinstance(data, dict):
            kept["data"] = {**from_string, **data}
        config = handler(kept)
        config._notes += notes + _overruled(from_string, config.data)
        return config

    @model_validator(mode="after")
    def _complete_data(self) -> PretrainConfig:
        """Settings of `data` that other sections decide."""
        update: dict[str, Any] = {}
        if self.train.percentage_labels is not None:
            update["percentage_labels"] = self.train.percentage_labels
        if self.data.append_label_mask is None:
            update["append_label_mask"] = self.crops.crop_from_tumor_foreground
        # in place, while it is being made: pydantic ignores another instance that a validator returns to a constructor
        self.__dict__["data"] = self.data.model_copy(update=update)
        if self.data.modality:
            modality = resolve_modality(self.data.modality)
            self._notes += _other_statistics(self.crops, modality)
            self.__dict__["crops"] = _normalised(self.crops, modality)
        return self

    @model_validator(mode="after")
    def _check_together(self) -> PretrainConfig:
        faults = list(check_patch(self.crops, self.student.patch_size))
        if self.train.img_size < self.student.patch_size:
            faults.append(
                f"train.img_size {self.train.img_size} is smaller than student.patch_size {self.student.patch_size}"
            )
        if self.dino.loss_weight == 0 and self.ibot.loss_weight == 0:
            faults.append("dino.loss_weight and ibot.loss_weight are both 0: there is nothing to learn")
        if self.semi_supervised.loss_weight and not self.semi_supervised.target:
            faults.append("semi_supervised.loss_weight is set: semi_supervised.target must name the column of labels")
        if self.student.family == "convnext" and (self.ibot.loss_weight or self.ibot.mask_sample_probability):
            faults.append(
                f"student.arch {self.student.arch} has no mask token: set ibot.loss_weight and "
                "ibot.mask_sample_probability to 0"
            )
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def without_effect(self, kind: Literal["volumes", "images"]) -> list[str]:
        """Keys that were changed from their default and mean nothing for this kind of data, with their values."""
        if kind == "volumes":
            return []
        values, defaults = (dict(leaves(config.model_dump(mode="json"))) for config in (self, PretrainConfig()))
        return [f"{key}: {values[key]!r}" for key in VOLUMES_ONLY if values[key] != defaults[key]]

    def warnings(self) -> list[str]:
        """Settings that have no effect, in words."""
        found = [*self._notes, head_warning(self.dino, self.ibot), mask_warning(self.ibot, self.train.centering)]
        found += [*self.evaluation.warnings(), self._unused_sharding(), self._unused_labels(), self._unused_role()]
        if not self.teacher.init_with_student_weights:
            found.append(
                "No effect: teacher.init_with_student_weights: the teacher always starts as a copy of the student."
            )
        if self.crops.crop_from_tumor_foreground and not self.data.append_label_mask:
            found.append(
                "data.append_label_mask is false, so crops.crop_from_tumor_foreground sees no region of interest: "
                "every crop is centred on the middle of its slice."
            )
        if self.position_side != self.train.img_size:
            found.append(
                f"train.img_size {self.train.img_size} is no multiple of student.patch_size {self.student.patch_size}: "
                f"the position table has the grid of {self.position_side}."
            )
        return [text for text in found if text]

    def _unused_sharding(self) -> str | None:
        compute, usual = self.compute_precision, ComputePrecisionConfig()
        named = [f"compute_precision.{n}" for n in ("student", "teacher") if getattr(compute, n) != getattr(usual, n)]
        if not named or compute.parallel == "fsdp":
            return None
        return f"No effect without compute_precision.parallel=fsdp: {', '.join(named)}; precision is the number format."

    def _unused_labels(self) -> str | None:
        semi = self.semi_supervised
        named = [f"semi_supervised.{name}" for name in ("target", "labels") if getattr(semi, name)]
        if not named or semi.loss_weight:
            return None
        return f"No effect: {', '.join(named)}: semi_supervised.loss_weight is 0."

    def _unused_role(self) -> str | None:
        if self.MODEL.init_from == "teacher" or self.initial_weights is not None:
            return None
        return f"No effect: MODEL.init_from {self.MODEL.init_from}: no weights are named (--init)."

    @property
    def position_side(self) -> int:
        """`train.img_size` down to a multiple of the patch size, as DINOv2 counts whole patches (518 / 16 is 32)."""
        return self.train.img_size // self.student.patch_size * self.student.patch_size

    @property
    def initial_weights(self) -> Path | None:
        """Weights for the student's backbone at step 0: `MODEL.WEIGHTS`, else `student.pretrained_weights`.

        A run folder, or one that `medssl convert weights` wrote, stands for the backbone in it.
        """
        named = self.MODEL.WEIGHTS or self.student.pretrained_weights
        if not named:
            return None
        inside = (Path(named) / place for place in (EXPORT, EXPORT.name))
        return next((path for path in inside if path.is_file()), Path(named))

    def epoch_length(self, n_cases: int, world: int = 1) -> int:
        """Optimizer steps an epoch."""
        if self.train.OFFICIAL_EPOCH_LENGTH != "auto":
            return self.train.OFFICIAL_EPOCH_LENGTH
        return max(1, math.ceil(n_cases / self.samples_per_step(world)))

    def samples_per_step(self, world: int = 1) -> int:
        """Samples that one optimizer step sees over all processes."""
        return self.train.batch_size_per_gpu * self.train.grad_accumulation * world


def _normalised(crops: CropsConfig, modality: Modality) -> CropsConfig:
    """The crops with the modality's mean and standard deviation, where none were given."""
    known = {"mean": modality.mean, "std": modality.std}
    return crops.model_copy(update={name: value for name, value in known.items() if name not in crops.model_fields_set})


def _other_statistics(crops: CropsConfig, modality: Modality) -> list[str]:
    known = {"mean": modality.mean, "std": modality.std}
    other = [f"crops.{key}" for key in known if key in crops.model_fields_set and getattr(crops, key) != known[key]]
    if not other:
        return []
    return [f"{' and '.join(other)}: the values given count, not those of data.modality {modality.name}."]


def dataset_string_as_overrides(text: str) -> list[str]:
    """The values of a dataset string as ``data.KEY=VALUE``, to count with the rank of the place where it was given."""
    return [f"data.{key}={json.dumps(value)}" for key, value in parse_dataset_string(text).items()]


def _read_dataset_string(train: Any) -> dict[str, Any]:
    text = train.get("dataset_path") if isinstance(train, dict) else None
    if not text:
        return {}
    try:
        return parse_dataset_string(str(text))
    except ConfigError as error:  # told together with all other faults
        raise ValueError("; ".join(["train.dataset_path", *error.where.splitlines(), error.fix])) from error


def _overruled(from_string: dict[str, Any], data: DataConfig) -> list[str]:
    """What the dataset string says and the `data` section says otherwise."""
    in_force = data.model_dump()
    said = DataConfig.model_validate(from_string).model_dump() if from_string else {}
    return [
        f"train.dataset_path says {key}={said[key]!r}, but data.{key}={in_force[key]!r} was given and counts."
        for key in from_string
        if said[key] != in_force[key]
    ]
