"""``medssl segment --task semantic``: a pretrained backbone with a decoder, as a job that ``segment_run`` trains.

Letters: B samples, S sequences or colours, K neighbouring slices, C outputs, H W pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medssl_cli.core.config import load_config
from medssl_cli.core.protocols import LabelledBatch
from medssl_cli.core.run import hide_home, seed_for
from medssl_cli.data.labelled_slices import LabelledSource
from medssl_cli.data.labelled_volumes import LabelledPictures, SliceLabels
from medssl_cli.data.paired_augmentation import PairedAugment
from medssl_cli.data.views import normalize
from medssl_cli.engine.distributed import rank, world_size
from medssl_cli.engine.memory import KeyNames
from medssl_cli.engine.optim import BACKBONE, parameter_groups
from medssl_cli.models.convnext import ConvNeXt
from medssl_cli.models.dense_decoder import DenseNetwork
from medssl_cli.models.layers import nearest_legal_sizes
from medssl_cli.models.vit import VisionTransformer
from medssl_cli.models.zoo import load_into
from medssl_cli.objectives.segmentation import SegmentationLoss
from medssl_cli.services.backbone import Backbone, open_backbone
from medssl_cli.services.lookup import find_backbone
from medssl_cli.services.segment_history import DEFINITIONS as HISTORY_DEFINITIONS
from medssl_cli.services.segment_job import SCORE, VAL_FIGURES, SegmentJob, TrainSettings
from medssl_cli.services.segment_request import SegmentRequest
from medssl_cli.services.segment_semantic_config import SemanticConfig
from medssl_cli.services.segment_semantic_data import SemanticData, read_semantic_data
from medssl_cli.services.segment_validation import DEFINITIONS, draw_overlays, validate_cases
from medssl_cli.services.segmenter import Segmenter, network_facts, segmenter_of
from medssl_cli.services.slice_pipeline import InferSegmentConfig

__all__ = ["SemanticConfig", "build_semantic_job"]

log = logging.getLogger(__name__)

VALIDATION_OVERLAP = 0.5
"""Share of a tile that its neighbour sees again, as `medssl infer` does it by default."""
SAFE_KEYS = frozenset({"train.num_workers", "train.log_every", "train.loader_timeout_s", "train.save_every"})
BATCH_KEYS = frozenset({"optim.batch_size", "optim.accumulation"})
GROWING_KEYS = frozenset({"optim.epochs", "train.patience"})
KEYS = KeyNames(
    batch="optim.batch_size",
    accumulation="optim.accumulation",
    workers="train.num_workers",
    less_memory="finetune.grad_checkpointing=true, a smaller data.tile or --precision bf16 need less",
    not_finite="lower the learning rate tenfold (--lr), keep optim.clip_grad at 3.0, or compute with --precision fp32",
)
LOCATION_KEYS = frozenset({"data.root", "data.splits", "data.split_csv"})


def build_semantic_job(request: SegmentRequest, device: torch.device) -> SegmentJob:
    """Read the backbone and the labelled cases, and build everything that is trained; no step is taken.

    Raises:
        ConfigError: Settings that contradict each other or the data, or no backbone to be found.
        CheckpointError: The backbone cannot be loaded.
        DataError: Bad cases, label maps with unknown values, or a patient on both sides of the split.
        ResourceError: No room on the disk for the prepared data.
    """
    config = load_semantic_config(request)
    backbone = open_backbone(find_backbone(request.model), device)
    data = read_semantic_data(config, backbone, request)
    config = data.config
    network = build_network(backbone, data, config).to(device)
    loss = SegmentationLoss(config.loss, data.spec.outputs)
    card = model_card(backbone, data, config, network)
    shown = {"task": "semantic", "classes": data.spec.classes, "outputs": data.spec.outputs, **card}
    segmenter = segmenter_of(request.run_folder(), shown, network, device)
    infer = InferSegmentConfig(overlap=VALIDATION_OVERLAP, batch_size=config.optim.batch_size)
    return SegmentJob(
        task="semantic",
        recipe=request.recipe,
        config=config,
        settings=train_settings(config),
        network=network,
        loss=loss,
        classes=data.spec.classes,
        outputs=data.spec.outputs,
        groups=build_groups(network, config),
        train=training_source(data, config, card["tile"]),
        views=Views(
            PairedAugment(config.augment), segmenter.mean, segmenter.std, 2 * config.data.context + 1, config.train.seed
        ),
        validate=partial(_validate, segmenter=segmenter, data=data, loss=loss, infer=infer),
        overlays=partial(_overlays, segmenter=segmenter, data=data, infer=infer),
        card=card,
        data_facts=data.facts(),
        keys=KEYS,
        distance_unit="px" if data.kind == "images" else "mm",
        seen=data.seen(),
        introduction=[*data.lines(), _backbone_line(backbone, config)],
        safe_keys=SAFE_KEYS,
        growing_keys=GROWING_KEYS,
        batch_keys=BATCH_KEYS,
        location_keys=LOCATION_KEYS,
        digests={"model": str(backbone.card["sha256"])},
        notes=data.notes,
        failures=data.failures,
    )


def load_semantic_config(request: SegmentRequest) -> SemanticConfig:
    """The settings: default < file < option < KEY=VALUE.

    Raises:
        ConfigError: Every fault of the keys at once.
    """

    def text(path: Path | None) -> str | None:
        return None if path is None else str(path)

    flags = {
        "data.root": text(request.data),
        "data.splits": text(request.splits),
        "data.split_csv": text(request.split_csv),
        "data.label": request.label,
        "data.classes": request.classes,
        "data.group_pattern": request.group_pattern,
        "data.val_ratio": request.val_ratio,
        "data.on_error": request.on_error,
        "optim.epochs": request.epochs,
        "optim.lr": request.lr,
        "optim.batch_size": request.batch_size,
        "loss.loss_type": request.loss_type,
        "loss.dice_weight": request.dice_weight,
        "loss.ce_weight": request.ce_weight,
        "loss.pos_weight": request.pos_weight,
        "train.val_every": request.val_freq,
        "train.save_every": request.save_freq,
        "train.precision": request.precision,
        "train.seed": request.seed,
        "train.num_workers": request.workers,
    }
    return load_config(SemanticConfig, request.config, recipes="segment", flags=flags, overrides=request.overrides)


def train_settings(config: SemanticConfig) -> TrainSettings:
    """How the network is trained."""
    optim, train = config.optim, config.train
    return TrainSettings(
        epochs=optim.epochs,
        batch_size=optim.batch_size,
        accumulation=optim.accumulation,
        lr=optim.lr,
        min_lr=optim.min_lr,
        warmup_epochs=config.warmup_epochs,
        weight_decay=optim.weight_decay,
        per="step",
        ema_decay=train.ema_decay,
        val_freq=train.val_every,
        save_freq=train.save_every,
        patience=train.patience,
        precision=train.precision,
        clip_grad=optim.clip_grad,
        num_workers=train.num_workers,
        seed=train.seed,
        log_every=train.log_every,
        freeze_backbone_epochs=0 if config.freezes else config.finetune.freeze_epochs,
        loader_timeout_s=train.loader_timeout_s,
    )


# --- the network -----------------------------------------------------------------------------------------------------


def build_network(backbone: Backbone, data: SemanticData, config: SemanticConfig) -> DenseNetwork:
    """The backbone with a fresh decoder; torch's generators are left as they were.

    The same seed gives the same decoder, and with ``init: random`` the same backbone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(config.train.seed, "segmentation network"))
        return DenseNetwork(
            _prepared_backbone(backbone, data, config),
            data.spec.outputs,
            config.decoder,
            context=config.data.context,
            freeze_backbone=config.freezes,
        )


def _prepared_backbone(backbone: Backbone, data: SemanticData, config: SemanticConfig) -> VisionTransformer | ConvNeXt:
    """The backbone for the sequences asked for, with its weights unless these are to be random."""
    old = backbone.model
    settings = dict(old.settings)
    if isinstance(old, VisionTransformer) and old.sequences is not None:
        settings["sequences"] = list(data.sequences or ())
    fresh = type(old)(**settings)
    if config.init == "pretrained":
        load_into(fresh, old.state_dict(), source="the backbone", sequences=old.sequences, quiet=True)
    count = len(fresh.drop_rates)
    fresh.drop_rates = [config.finetune.drop_path * i / max(count - 1, 1) for i in range(count)]
    fresh.grad_checkpointing = config.finetune.grad_checkpointing
    return fresh


def build_groups(network: DenseNetwork, config: SemanticConfig) -> list[dict[str, Any]]:
    """Parameter groups: the decoder at rate 1, the backbone's last layer at its scale, each layer below it at less.

    A frozen backbone has none. Source: layer-wise decay as in Clark et al. 2020 (ELECTRA) and He et al. 2022 (MAE).
    """
    parts = network.trained_parts()
    groups = parameter_groups({name: part for name, part in parts.items() if name != BACKBONE}, 0)
    if BACKBONE not in parts:
        return groups
    depth = len(network.backbone.drop_rates)
    deep = parameter_groups(
        {BACKBONE: parts[BACKBONE]},
        depth,
        layerwise_decay=config.finetune.layerwise_decay,
        patch_embed_lr_mult=1.0,
    )
    for group in deep:
        group["lr_multiplier"] *= config.finetune.backbone_lr_scale
    return [*deep, *groups]


def model_card(backbone: Backbone, data: SemanticData, config: SemanticConfig, network: DenseNetwork) -> dict[str, Any]:
    """What ``model.json`` holds beyond the facts of every model: all that inference needs."""
    tile, patch = config.data.tile, backbone.model.patch_size
    if tile % patch:
        tile = nearest_legal_sizes(tile, patch)[1]
        log.info("tile %d: %d is no multiple of the patch size %d", tile, config.data.tile, patch)
    origin = backbone.found.run or backbone.found.weights
    return {
        "network": network_facts(network),
        "kind": data.kind,
        "sequences": None if data.sequences is None else list(data.sequences),
        "channels": data.channels,
        "preprocess": backbone.preprocess.model_dump(mode="json"),
        "mean": backbone.mean,
        "std": backbone.std,
        "tile": tile,
        "pixel_mm": config.data.pixel_mm,
        "context": config.data.context,
        "windows_hu": [list(window) for window in backbone.windows_hu] or None,
        "label_values": {str(value): data.spec.classes[index] for value, index in data.spec.values.items()},
        "ignore_values": list(data.spec.ignore_values),
        "ranges": data.ranges(),
        "missing_in_training": data.missing(),
        "modality": backbone.card.get("modality"),
        "backbone": {
            "path": hide_home(str(origin)),
            "sha256": backbone.card.get("sha256"),
            "init": config.init,
            "frozen": config.freezes,
        },
        "definitions": {**{name: HISTORY_DEFINITIONS[name] for name in (*VAL_FIGURES, SCORE)}, **DEFINITIONS},
    }


def _backbone_line(backbone: Backbone, config: SemanticConfig) -> str:
    origin = hide_home(str(backbone.found.run or backbone.found.weights))
    how = "frozen" if config.freezes else f"trained, layer-wise decay {config.finetune.layerwise_decay:g}"
    return f"backbone: {origin} ({backbone.found.why}), {'random weights, ' if config.init == 'random' else ''}{how}"


# --- samples ---------------------------------------------------------------------------------------------------------


def training_source(data: SemanticData, config: SemanticConfig, tile: int) -> LabelledSource:
    """Random tiles of the training cases."""
    if data.kind == "images":
        return LabelledPictures(
            data.train,
            data.spec,
            data.preprocess,
            tile=tile,
            seed=config.train.seed,
            foreground_share=config.data.foreground_share,
            tiles_per_picture=config.data.slices_per_case,
            colours=data.channels,
        )
    assert data.train_store is not None
    return SliceLabels(
        data.train_store,
        data.spec,
        tile=tile,
        pixel_mm=config.data.pixel_mm,
        context=config.data.context,
        seed=config.train.seed,
        foreground_share=config.data.foreground_share,
        slices_per_case=config.data.slices_per_case,
        windows_hu=data.windows_hu,
        colours=data.colours,
    )


@dataclass(frozen=True)
class Views:
    """What the network takes of a batch: changed at random, and normalised as at inference.

    Args:
        augment: Random changes.
        mean, std: One number, or one a channel of a slice.
        slices: K.
        seed: Of the run.
    """

    augment: PairedAugment
    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]
    slices: int
    seed: int

    def __call__(self, batch: LabelledBatch, step: int, micro: int) -> LabelledBatch:
        """The batch for the network; the same seed, step, micro-batch and rank give the same one."""
        place = (step, micro, rank()) if world_size() > 1 else (step, micro)
        changed = self.augment(batch, seed_for(self.seed, "segmentation views", *place))
        return replace(changed, images_BSHW=self.normalised(changed.images_BSHW))

    def normalised(self, images_BSHW: Tensor) -> Tensor:
        """(B, K * S, H W), each of the K slices by the same numbers."""
        return normalize(images_BSHW, _each_slice(self.mean, self.slices), _each_slice(self.std, self.slices))


def _each_slice(value: float | tuple[float, ...], slices: int) -> float | tuple[float, ...]:
    return value * slices if isinstance(value, tuple) and len(value) > 1 else value


# --- validation ------------------------------------------------------------------------------------------------------


def _validate(
    network: nn.Module, *, segmenter: Any, data: SemanticData, loss: SegmentationLoss, infer: InferSegmentConfig
) -> Mapping[str, Any]:
    return validate_cases(network, segmenter, data.validation(), loss, infer)


def _overlays(
    network: nn.Module,
    folder: Path,
    threshold: float | None,
    *,
    segmenter: Segmenter,
    data: SemanticData,
    infer: InferSegmentConfig,
) -> None:
    draw_overlays(network, replace(segmenter, threshold=threshold), data.validation(), folder, infer)
