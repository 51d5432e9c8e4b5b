"""Settings of `medssl train-head --finetune`: those of a head, and how its backbone moves with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from medssl_cli.core.errors import ConfigError
from medssl_cli.data.views import Range, Share
from medssl_cli.models.feature_heads import HeadKind
from medssl_cli.models.layers import nearest_legal_sizes
from medssl_cli.services.backbone import Backbone
from medssl_cli.services.embedding_config import ExtractConfig
from medssl_cli.services.head_config import HeadConfig, Task, check_head_config

PICTURE_CROPS, VOLUME_CROPS = (0.08, 1.0), (0.6, 1.0)
"""Share of a picture that a training view takes, as VisionFM has it; a lesion of a volume must stay in sight."""
_TRAINED = ("linear", "mlp", "attention_mil")


class FinetuneConfig(HeadConfig):
    """A head and its backbone, trained end to end on images."""

    epochs: PositiveInt = 30
    """Passes over the training cases."""
    batch_size: PositiveInt = 16
    """Cases of one optimizer step."""
    weight_decay: NonNegativeFloat = 0.05
    """Weight decay of AdamW, of head and backbone; biases, norms and layer scales have none."""
    backbone_lr_scale: PositiveFloat = 0.1
    """Learning rate of the last layer of the backbone over that of the head."""
    layerwise_decay: float = Field(default=0.75, gt=0, le=1)
    """Factor on the learning rate from each block of the backbone to the one below it."""
    warmup_epochs: NonNegativeFloat = 1.0
    """Epochs in which the learning rate rises; after them it falls as half a cosine."""
    min_lr: NonNegativeFloat = 1e-6
    """Learning rate of the head at the end; the backbone's has the same factors as ever."""
    freeze_epochs: NonNegativeInt = 1
    """Epochs in which the head alone is trained, so that a random head does not tear at the backbone."""
    crop_scale: Share | None = None
    """Share of the area that a random training view takes; null: [0.08, 1] of pictures, [0.6, 1] of slices of volumes.
    [1, 1] with crop_aspect=[1,1] shows them whole."""
    crop_aspect: Range = (3 / 4, 4 / 3)
    """Aspect of such a view before it is brought to the proportions of the whole image."""
    horizontal_flip: bool | None = None
    """Mirror half of the training views left to right; null: yes."""
    vertical_flip: bool | None = None
    """Mirror half of the training views top to bottom; null: of pictures yes, of slices of volumes no."""
    slices_per_case: PositiveInt = 8
    """Random slices of a volume in each training step, drawn anew each time; validation looks at all of them."""
    drop_path: float = Field(default=0.1, ge=0, lt=1)
    """Stochastic depth in training: the last block is left out so often, the ones before it less."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of the backbone in training; extract.precision is that of validation and inference."""
    clip_grad: NonNegativeFloat = 3.0
    """Largest gradient norm, of the backbone and of the head each; 0 turns clipping off."""
    accumulation: PositiveInt = 1
    """Parts in which the cases of a step are computed one after the other: less memory, the same step."""
    grad_checkpointing: bool = False
    """Compute the blocks again on the way back instead of keeping them: less memory, a third more time."""
    cache_gb: NonNegativeFloat = 4.0
    """Decoded images that are kept in memory, in GB; what does not fit is read anew in every epoch."""
    num_workers: NonNegativeInt = 2
    """Threads that read ahead; 0 reads in turn."""
    keep_last: bool = True
    """Keep the backbone of the last epoch too, in export/last_backbone.safetensors."""

    def kind(self, task: Task) -> HeadKind:
        """The head to train: as named, by ``pool: attention``, else linear."""
        return "linear" if self.head is None and self.pool != "attention" else super().kind(task)

    def crops(self, *, pictures: bool) -> tuple[float, float]:
        """Range of the share of the area that a view takes."""
        return self.crop_scale or (PICTURE_CROPS if pictures else VOLUME_CROPS)

    def flips(self, *, pictures: bool) -> tuple[bool, bool]:
        """Whether views are mirrored top to bottom, and left to right."""
        rows = pictures if self.vertical_flip is None else self.vertical_flip
        return rows, True if self.horizontal_flip is None else self.horizontal_flip


def check_finetune_config(config: FinetuneConfig, task: Task) -> None:
    """Refuse keys that contradict each other, or that would have no effect; all of them at once.

    Raises:
        ConfigError: With each fault.
    """
    faults = list(_faults(config, task))
    try:
        check_head_config(config, task)
    except ConfigError as error:
        faults += [line for line in error.where.splitlines() if line not in faults]
    if faults:
        raise ConfigError(
            f"{'One key does' if len(faults) == 1 else f'{len(faults)} keys do'} not fit this fine-tuning.",
            where="\n".join(faults),
            fix="leave them out or change them; nothing was written",
            code="config_invalid",
        )


def _faults(config: FinetuneConfig, task: Task) -> Iterator[str]:
    if config.kind(task) not in _TRAINED:
        yield f"head: {config.kind(task)} has no gradient to follow; fine-tuning takes {', '.join(_TRAINED)}"
    if config.level == "slice":
        yield "level: fine-tuning learns from labels of cases; leave level=slice out"
    if config.refit:
        yield "refit: the epoch is chosen on the validation cases, which then cannot train too"
    if config.repeats > 1:
        yield "repeats: one fine-tuning is one run; start others with another seed"
    if config.freeze_epochs >= config.epochs:
        yield f"freeze_epochs: {config.freeze_epochs} of {config.epochs} epochs: the backbone would never be trained"
    if config.accumulation > config.batch_size:
        yield f"accumulation: {config.batch_size} cases cannot be computed in {config.accumulation} parts"
    given = config.extract.model_fields_set
    for key in sorted(given & {"views", "sim_slice", "sim_patch", "digest"}):
        yield f"extract.{key}: nothing is extracted here; training views have keys of their own (crop_scale, …)"
    if "patch" in config.extract.tokens:
        yield "extract.tokens: patch tokens are not part of the vector that a head sees"


def settle(config: FinetuneConfig, backbone: Backbone, *, pictures: bool) -> FinetuneConfig:
    """The settings once the data are known; pictures are shown as squares of the backbone's own size by default.

    Raises:
        ConfigError: A key for volumes was given, and these are pictures.
    """
    if pictures and "slices_per_case" in config.model_fields_set:
        raise ConfigError(
            "One key does not fit this fine-tuning.",
            where="slices_per_case: a picture is one slice",
            fix="leave it out; nothing was written",
            code="config_invalid",
        )
    if not pictures or config.extract.model_fields_set & {"resize", "max_side"}:
        return config
    side = backbone.spatial_size
    if side % backbone.model.patch_size:
        side = nearest_legal_sizes(side, backbone.model.patch_size)[1]
    kept = config.extract.model_dump(exclude_unset=True)
    extract = ExtractConfig.model_validate({"antialias": True, **kept, "resize": side})
    return config.model_copy(update={"extract": extract})
