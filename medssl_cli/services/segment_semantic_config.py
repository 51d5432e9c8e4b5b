"""Settings of `medssl segment --task semantic`: a pretrained backbone with a decoder on volumes or pictures."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from medssl_cli.core.config import Config
from medssl_cli.core.errors import ConfigError
from medssl_cli.data.layouts import LayoutChoice
from medssl_cli.data.paired_augmentation import PairedAugmentConfig
from medssl_cli.engine.precision import PrecisionName
from medssl_cli.models.dense_decoder import DecoderConfig
from medssl_cli.objectives.segmentation import SegmentationLossConfig

Kind = Literal["volumes", "images"]
_SIDED = re.compile(r"(?<![a-z])(left|right|l|r|lt|rt)(?![a-z])")
_OF_VOLUMES = ("mri_sequences", "pixel_mm", "context", "template")
_OF_TRAINED_BACKBONE = ("backbone_lr_scale", "layerwise_decay", "freeze_epochs", "drop_path", "grad_checkpointing")


class LabelledDataConfig(Config):
    """Which images and label maps, and how a training sample is drawn."""

    root: str = ""
    """Folder of a case tree, an image tree, the raw folder of nnU-Net, or the Medical Segmentation Decathlon."""
    split_csv: str | None = None
    """Table with the ids to use; a share of their patients is held back for validation."""
    splits: str | None = None
    """Folder of `medssl split` with train.csv and val.csv; its test.csv is never opened."""
    layout: LayoutChoice = "auto"
    """How the files under `root` are named; auto looks."""
    template: str = ""
    """Path of a sequence with the fields {subject}, {dataset}, {relative} and {sequence}, for the layout template."""
    fold: NonNegativeInt = 0
    """Which fold of nnU-Net's splits_final.json, where `root` has one and no other split is named."""
    mri_sequences: tuple[str, ...] | None = None
    """Sequences in channel order; those of the model if not given, of which these must be some. Of a model for plain
    pictures: the one sequence of the volumes."""
    label: str = ""
    """Case tree: file stem of the label map in the folder of each case, e.g. roi_Prostate. Pictures: the folder of the
    label maps, where its name is unusual. nnU-Net and the Decathlon name theirs themselves."""
    group_pattern: str = ""
    """Regular expression whose first group is the patient in the id of a case or the path of a picture, as of
    `medssl split`. Without it every picture, and every case of nnU-Net and the Decathlon, is a patient of its own, and
    the folders of a case tree tell theirs: PT-0001_20240215 is a visit of PT-0001."""
    classes: tuple[str, ...] = ()
    """Structures: names for the values 1, 2, …, or names with their values, e.g. [lesion=2+3, ignore=255]; what is
    called ignore counts neither in the loss nor in a metric. If not given: as the layout says, else one structure for
    each value that is found."""
    pixel_mm: PositiveFloat | None = None
    """Side of a pixel in mm at which slices are shown; if not given, the smaller side of each slice's own pixels."""
    tile: PositiveInt = 224
    """Side in pixels of the window that training cuts and inference slides; rounded up to the patch size."""
    context: Literal[0, 1, 2] = 0
    """Neighbouring slices on each side that the network sees too: 0 is 2-D, 1 is 2.5-D with three slices."""
    slices_per_case: PositiveInt = 4
    """Windows that are drawn from each volume, or picture, in an epoch."""
    foreground_share: float = Field(default=0.5, ge=0, le=1)
    """Probability that a window is drawn about a pixel of a structure, rather than anywhere."""
    percentage_labels: float = Field(default=1.0, gt=0, le=1)
    """Share of the training patients that is used, the same mix of those with and without structures; one at least."""
    val_ratio: float = Field(default=0.2, gt=0, lt=1)
    """Share of the patients that is held back where nothing tells which; drawn from train.seed."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a bad case does: stop the run before it trains, or be left out and listed."""

    @field_validator("mri_sequences", "classes", mode="before")
    @classmethod
    def _split_names(cls, value: Any) -> Any:
        return [name.strip() for name in value.split(",")] if isinstance(value, str) else value

    @field_validator("mri_sequences")
    @classmethod
    def _names_differ(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and (not value or not all(value) or len(set(value)) != len(value)):
            raise ValueError("one or more different names are needed")
        return value


class TuningConfig(Config):
    """How the pretrained backbone moves with the decoder."""

    freeze_backbone: bool | None = None
    """Keep the backbone as it is, and train the decoder alone; if not given: yes, unless init is random."""
    backbone_lr_scale: PositiveFloat = 0.1
    """Learning rate of the last layer of the backbone over that of the decoder."""
    layerwise_decay: float = Field(default=0.75, gt=0, le=1)
    """Factor on the learning rate from each block of the backbone to the one below it."""
    freeze_epochs: NonNegativeInt = 0
    """Epochs in which the decoder alone is trained, so that a random decoder does not tear at the backbone."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Stochastic depth in training: the last block is left out so often, the ones before it less."""
    grad_checkpointing: bool = False
    """Compute the blocks again on the way back instead of keeping them: less memory, a third more time."""


class SemanticOptimConfig(Config):
    """AdamW and its schedule."""

    epochs: PositiveInt = 100
    """Passes over the training cases."""
    batch_size: PositiveInt = 8
    """Windows of one process and one forward pass."""
    accumulation: PositiveInt = 1
    """Forward passes of one optimizer step."""
    lr: PositiveFloat = 1e-4
    """Learning rate of the decoder at its highest."""
    min_lr: NonNegativeFloat = 1e-6
    """Learning rate at the end; it falls as half a cosine, with every step."""
    warmup_epochs: NonNegativeFloat = 1.0
    """Epochs in which the learning rate rises from 0."""
    weight_decay: NonNegativeFloat = 1e-4
    """Weight decay; biases, norms and layer scales have none."""
    clip_grad: NonNegativeFloat = 3.0
    """Largest gradient norm, of the backbone and of the decoder each; 0 turns clipping off."""


class SemanticTrainConfig(Config):
    """The run."""

    seed: NonNegativeInt = 42
    """Of every draw."""
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    """Highest decay of the averaged weights, which are those that are validated and kept; 0 averages nothing."""
    val_every: PositiveInt = 1
    """Epochs between validations on whole cases."""
    save_every: NonNegativeInt = 0
    """Epochs between files in checkpoints/; 0 for none. The newest state is always kept in last/."""
    patience: NonNegativeInt = 0
    """Validations without a better score after which training ends; 0: never."""
    precision: PrecisionName = "fp32"
    """Number format of the network in training; the loss is in float32."""
    num_workers: NonNegativeInt | None = None
    """Loader processes; null: as many as this machine has CPUs to spare."""
    log_every: PositiveInt = 10
    """Steps between lines of the log."""
    loader_timeout_s: PositiveFloat = 600.0
    """Longest wait for a batch."""


class SemanticConfig(Config):
    """A run of ``medssl segment --task semantic``."""

    init: Literal["pretrained", "random"] = "pretrained"
    """random: take the architecture of --model without its weights, as the baseline of training from scratch."""
    data: LabelledDataConfig = Field(default_factory=LabelledDataConfig)
    """Images and label maps."""
    decoder: DecoderConfig = Field(default_factory=DecoderConfig)
    """The decoder on the tokens of the backbone."""
    loss: SegmentationLossConfig = Field(default_factory=SegmentationLossConfig)
    """The loss."""
    finetune: TuningConfig = Field(default_factory=TuningConfig)
    """The backbone."""
    optim: SemanticOptimConfig = Field(default_factory=SemanticOptimConfig)
    """Optimizer and schedule."""
    augment: PairedAugmentConfig = Field(default_factory=PairedAugmentConfig)
    """Random changes of images and label maps together. vertical_flip, if not given: 0.5 of pictures, 0 of volumes,
    whose front and back are never exchanged. horizontal_flip, if not given: 0.5, or 0 where the name of a structure
    tells a side of the body, for a mirrored left kidney is a right one."""
    train: SemanticTrainConfig = Field(default_factory=SemanticTrainConfig)
    """The run."""

    @property
    def freezes(self) -> bool:
        """The backbone is never trained."""
        given = self.finetune.freeze_backbone
        return self.init == "pretrained" if given is None else given

    @property
    def warmup_epochs(self) -> float:
        """Epochs of warm-up; that of the default is at most half of a short run."""
        given = "warmup_epochs" in self.optim.model_fields_set
        return self.optim.warmup_epochs if given else min(self.optim.warmup_epochs, self.optim.epochs / 2)

    def settled(self, kind: Kind, classes: tuple[str, ...]) -> SemanticConfig:
        """The settings once the data are known, with the flips that suit them."""
        given = self.augment.model_fields_set
        update = {}
        if kind == "volumes" and "vertical_flip" not in given:
            update["vertical_flip"] = 0.0
        if "horizontal_flip" not in given and sided(classes):
            update["horizontal_flip"] = 0.0
        augment = self.augment.model_copy(update=update)
        finetune = self.finetune.model_copy(update={"freeze_backbone": self.freezes})
        return self.model_copy(update={"augment": augment, "finetune": finetune})


def sided(classes: tuple[str, ...]) -> bool:
    """Whether the name of a structure tells a side of the body: ``kidney_left``, ``L ventricle``."""
    return any(_SIDED.search(name.lower().replace("_", " ")) for name in classes)


def check_semantic_config(config: SemanticConfig, kind: Kind) -> None:
    """Refuse keys that contradict each other, or that have no effect on these data; all of them at once.

    Raises:
        ConfigError: With each fault.
    """
    faults = list(_faults(config, kind))
    if faults:
        raise ConfigError(
            f"{'One key does' if len(faults) == 1 else f'{len(faults)} keys do'} not fit this training.",
            where="\n".join(faults),
            fix="leave them out or change them; nothing was written",
            code="config_invalid",
        )


def _faults(config: SemanticConfig, kind: Kind) -> Iterator[str]:
    data = config.data
    idle = [name for name in _OF_VOLUMES if kind == "images" and name in data.model_fields_set]
    yield from (f"data.{name}: no effect on pictures" for name in idle)
    if data.splits is not None and data.split_csv is not None:
        yield "data.splits, data.split_csv: they exclude each other"
    if data.splits is not None and "val_ratio" in data.model_fields_set:
        yield "data.val_ratio: no effect with data.splits, which tells the validation cases"
    if config.init == "random" and config.finetune.freeze_backbone:
        yield "finetune.freeze_backbone: with init=random the backbone would stay random"
    tuning = config.finetune
    if config.freezes:
        given = [name for name in _OF_TRAINED_BACKBONE if name in tuning.model_fields_set]
        yield from (
            f"finetune.{name}: no effect on a frozen backbone; set finetune.freeze_backbone=false" for name in given
        )
    elif tuning.freeze_epochs >= config.optim.epochs:
        count = f"{tuning.freeze_epochs} of {config.optim.epochs} epochs"
        yield f"finetune.freeze_epochs: {count}; the backbone would never be trained"
    if config.optim.min_lr > config.optim.lr:
        yield f"optim.min_lr: {config.optim.min_lr:g} is above optim.lr {config.optim.lr:g}"
    if "warmup_epochs" in config.optim.model_fields_set and config.optim.warmup_epochs >= config.optim.epochs:
        yield f"optim.warmup_epochs: {config.optim.warmup_epochs:g} of {config.optim.epochs} epochs are warm-up"
