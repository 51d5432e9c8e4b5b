"""Settings of ``medssl segment --task ct-pet``: the flat keys of CoCoSeg's JSON presets, and what they leave open."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from medssl_cli.core.config import load_config
from medssl_cli.core.errors import ConfigError
from medssl_cli.data.ct_pet import DatasetType
from medssl_cli.data.paired_augmentation import PairedAugmentConfig
from medssl_cli.engine.precision import PrecisionName
from medssl_cli.models.dual_encoder import DualEncoderConfig
from medssl_cli.objectives.segmentation import SegmentationLossConfig
from medssl_cli.services.segment_job import TrainSettings
from medssl_cli.services.segment_request import SegmentRequest

ALIASES = {"alpha": "fn_weight", "beta": "fp_weight"}
"""CoCoSeg's names of the Tversky weights, with the meaning of its code: alpha on missed pixels, beta on wrong ones."""
RANDOM = "random"
"""Value of ``vgg_weights`` that leaves the trunks untrained."""

SAFE_KEYS = frozenset(
    {"num_workers", "log_every", "loader_timeout_s", "cache_gb", "save_freq", "patience", "use_gpu", "logdir"}
)
"""Keys that change no step of a training."""

_KEYS_OF_LOSS: dict[str, tuple[str, ...]] = {
    "combined": ("dice_weight", "ce_weight", "pos_weight"),
    "dice": (),
    "ce": ("pos_weight",),
    "iou": (),
    "tversky": ("fn_weight", "fp_weight"),
    "focal": ("focal_alpha", "focal_gamma"),
}


class CtPetConfig(SegmentationLossConfig, DualEncoderConfig):
    """A run of CoCoSeg on CT-PET pairs, with the key names of its presets."""

    epoch: PositiveInt = 500
    """Length of the run in epochs."""
    lr: PositiveFloat = 1e-4
    """Learning rate of the first epoch; it falls along half a cosine, once an epoch."""
    min_lr: NonNegativeFloat = 1e-6
    """Where that cosine would end after the last epoch."""
    weight_decay: NonNegativeFloat = 1e-4
    """Of AdamW, on every trained tensor."""
    bs: PositiveInt = 8
    """Slices of one process and update."""
    vgg_weights: str | None = None
    """File of an ImageNet VGG19 (of `medssl convert weights --source vgg19`, or torchvision's .pth); `random` leaves
    the trunks untrained."""
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    """Highest decay of the averaged weights, which are those that are validated and kept; 0 averages nothing."""
    clip_grad: NonNegativeFloat = 0.0
    """Largest gradient norm; 0 turns clipping off."""
    val_freq: PositiveInt = 1
    """Epochs between validations; the last epoch always has one."""
    save_freq: NonNegativeInt = 5
    """Epochs between files in checkpoints/; 0 for none. The newest state is always kept in last/."""
    patience: NonNegativeInt = 0
    """Validations without a better score after which training ends; 0: never."""
    val_hd95: bool = True
    """Measure the 95th percentile Hausdorff distance in every validation."""
    num_workers: NonNegativeInt = 4
    """Loader processes, fewer where the machine has fewer CPUs."""
    use_gpu: bool | None = None
    """true: a GPU is needed; false: compute on the CPU; not given: a GPU if there is one. --device wins."""
    precision: PrecisionName = "fp32"
    """Number format: fp32, tf32, bf16 or fp16."""
    val_ratio: float = Field(default=0.2, gt=0, lt=1)
    """Share of the patients that is held back where no folder of a split and no --splits tells which."""
    random_seed: NonNegativeInt = 42
    """Of every draw."""
    logdir: str | None = None
    """Run folder; --out wins."""
    dataset_root: str | None = None
    """Folder of the data; --data wins."""
    dataset_type: DatasetType = "auto"
    """How the files lie: flat, presplit, pclt20k (also pclt); auto looks."""
    patient_regex: str | None = None
    """Searched for in each file name; its first group is the patient. If not given: what stands before
    the last `_slice_`."""
    mask_threshold: int | None = Field(default=None, ge=0, le=254)
    """Grey value above which a mask pixel is lesion. Without it masks hold 0 and 1, or 0 and 255, and nothing else."""
    cache_gb: NonNegativeFloat = 4.0
    """Decoded slices that are kept in memory."""
    augment: PairedAugmentConfig = Field(default_factory=PairedAugmentConfig)
    """Random changes of CT, PET and mask together."""
    log_every: PositiveInt = 10
    """Steps between lines of the log."""
    loader_timeout_s: PositiveFloat = 600.0
    """Longest wait for a batch."""

    def _faults(self) -> Iterator[str]:
        own = _KEYS_OF_LOSS[self.loss_type]
        for key in dict.fromkeys(key for keys in _KEYS_OF_LOSS.values() for key in keys):
            if key not in own and getattr(self, key) != type(self).model_fields[key].default:
                yield f"{key}: no effect with loss_type={self.loss_type}"
        if self.min_lr > self.lr:
            yield f"min_lr: {self.min_lr:g} is above lr {self.lr:g}"
        if self.fusion == "2way" and self.vgg_weights is not None:
            yield "vgg_weights: no effect with fusion=2way, which has no VGG trunks"
        yield from super()._faults()

    # --- for the parts ---

    def loss(self) -> SegmentationLossConfig:
        """The loss."""
        return SegmentationLossConfig(**{key: getattr(self, key) for key in SegmentationLossConfig.model_fields})

    def loss_line(self) -> str:
        """The loss with its weights, and what they weigh, in words."""
        weights = ", ".join(f"{key} {getattr(self, key):g}" for key in _KEYS_OF_LOSS[self.loss_type])
        if self.loss_type == "tversky":
            weights = (
                f"fn_weight (alpha) {self.fn_weight:g} on missed pixels, fp_weight (beta) {self.fp_weight:g} on "
                "wrongly marked ones"
            )
        return f"loss: {self.loss_type}{': ' if weights else ''}{weights}; of each {self.reduction}"

    def network(self) -> DualEncoderConfig:
        """The network."""
        return DualEncoderConfig(fusion=self.fusion, cam_scale=self.cam_scale, skip_attention=self.skip_attention)

    def training(self) -> TrainSettings:
        """How it is trained."""
        return TrainSettings(
            epochs=self.epoch,
            batch_size=self.bs,
            lr=self.lr,
            min_lr=self.min_lr,
            weight_decay=self.weight_decay,
            per="epoch",
            ema_decay=self.ema_decay,
            val_freq=self.val_freq,
            save_freq=self.save_freq,
            patience=self.patience,
            precision=self.precision,
            clip_grad=self.clip_grad,
            num_workers=self.num_workers,
            seed=self.random_seed,
            log_every=self.log_every,
            loader_timeout_s=self.loader_timeout_s,
        )


def load_ct_pet_config(request: SegmentRequest) -> CtPetConfig:
    """The settings in force: default < file < flag < KEY=VALUE.

    Raises:
        ConfigError: Unreadable file, unknown keys, wrong types, keys without effect: all of them in one message.
    """
    flags = {
        "epoch": request.epochs,
        "lr": request.lr,
        "bs": request.batch_size,
        "loss_type": request.loss_type,
        "dice_weight": request.dice_weight,
        "ce_weight": request.ce_weight,
        "pos_weight": request.pos_weight,
        "val_ratio": request.val_ratio,
        "val_freq": request.val_freq,
        "save_freq": request.save_freq,
        "random_seed": request.seed,
        "num_workers": request.workers,
        "precision": request.precision,
        "dataset_type": request.dataset_type,
        "patient_regex": request.patient_regex,
        "mask_threshold": request.mask_threshold,
        "vgg_weights": request.vgg_weights,
        "dataset_root": None if request.data is None else str(request.data),
        "logdir": None if request.out is None else str(request.out),
    }
    return load_config(
        CtPetConfig, request.config, recipes="segment", flags=flags, overrides=request.overrides, aliases=ALIASES
    )


def settle_ct_pet(request: SegmentRequest) -> SegmentRequest:
    """The request with what its config says of data, run folder and device, where no option does.

    Raises:
        ConfigError: Faults of the config, no data, no VGG weights.
    """
    config = load_ct_pet_config(request)
    if config.dataset_root is None:
        raise ConfigError(
            "No data was named.",
            where="neither --data nor dataset_root in the config",
            fix="pass --data ROOT, a folder with CT, PET and masks",
            code="data_missing",
        )
    if config.fusion == "4way" and config.vgg_weights is None:
        raise _no_vgg()
    if request.splits is not None and request.val_ratio is not None:
        raise ConfigError(
            "The lists of --splits tell the validation cases.",
            where=f"--splits {request.splits} --val-ratio {request.val_ratio:g}",
            fix="leave --val-ratio out",
            code="flags_without_effect",
        )
    device = request.device
    if device == "auto" and config.use_gpu is not None:
        device = "cuda" if config.use_gpu else "cpu"
    return replace(
        request,
        data=Path(config.dataset_root).expanduser(),
        out=Path(config.logdir).expanduser() if config.logdir else None,
        vgg_weights=config.vgg_weights if config.vgg_weights != RANDOM else request.vgg_weights,
        device=device,
    )


def _no_vgg() -> ConfigError:
    return ConfigError(
        "Four-way fusion needs the weights of an ImageNet VGG19.",
        where="fusion=4way without vgg_weights",
        fix="pass --vgg-weights FILE (torchvision's vgg19 file, or the output of `medssl convert weights FILE OUT "
        "--source vgg19`);\n--vgg-weights random, which leaves the trunks untrained and is written into the model; "
        "\nor fusion=2way, which has no trunks",
        code="vgg_missing",
    )
