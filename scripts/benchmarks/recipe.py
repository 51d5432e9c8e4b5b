"""The documented recipe at the size of a benchmark, and the trainer that ``medssl pretrain`` would build from it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measuring import Options
from medssl_cli.core.config import load_config
from medssl_cli.core.protocols import Batch, SliceBatch
from medssl_cli.engine.acceleration import AccelerationConfig, accelerate
from medssl_cli.engine.precision import Precision
from medssl_cli.engine.trainer import Trainer
from medssl_cli.services.build import build_objective, build_optimizer, build_schedules, build_views
from medssl_cli.services.pretrain_config import PretrainConfig

SEQUENCES = ("ax_t2wi", "ax_adc", "ax_dwi")
TINY = (
    *("student.embed_dim=64", "student.depth=2", "student.num_heads=2", "train.img_size=28", "data.spatial_size=28"),
    *("crops.global_crops_size=28", "crops.local_crops_size=14", "crops.local_crops_number=2", "crops.rc_size=32"),
    *("dino.head_n_prototypes=64", "dino.head_hidden_dim=64", "dino.head_bottleneck_dim=32"),
    *("ibot.head_n_prototypes=64", "ibot.head_hidden_dim=64", "ibot.head_bottleneck_dim=32"),
)


def pretrain_config(options: Options, batch: int, *overrides: str) -> PretrainConfig:
    """The recipe of the prostate in the size and precision asked for."""
    flags = {
        "student.arch": options.arch,
        "train.batch_size_per_gpu": batch,
        "compute_precision.precision": options.precision,
        "data.random_axes": False,  # of thick slices only one axis is cut
    }
    tiny = TINY if options.tiny else ()
    return load_config(
        PretrainConfig, "prostate_vitb14", recipes="pretrain", flags=flags, overrides=[*tiny, *overrides]
    )


def crop_sizes(config: PretrainConfig) -> dict[str, Any]:
    """Crops of a sample, for the record."""
    crops = config.crops
    return {
        "sequences": len(SEQUENCES),
        "global_crops": f"2 x {crops.global_crops_size}",
        "local_crops": f"{crops.local_crops_number} x {crops.local_crops_size}",
    }


def random_slices(config: PretrainConfig, device: torch.device) -> SliceBatch:
    """What the loader would yield, filled with noise, with a region of interest in the middle."""
    batch, side = config.train.batch_size_per_gpu, config.data.spatial_size
    images_BSHW = torch.rand(batch, len(SEQUENCES), side, side, generator=torch.Generator().manual_seed(0))
    roi_BHW = torch.zeros(batch, side, side, dtype=torch.bool)
    roi_BHW[:, side // 3 : 2 * side // 3, side // 3 : 2 * side // 3] = True
    available_BS = torch.ones(batch, len(SEQUENCES), dtype=torch.bool)
    return SliceBatch(images_BSHW, torch.full((batch, 2), side), available_BS, roi_BHW).to(device)


def build_trainer(config: PretrainConfig, options: Options, make_views: Callable[..., Batch] | None = None) -> Trainer:
    """The trainer as ``medssl pretrain`` builds it, with a loader that gives the same noise for ever."""
    slices = random_slices(config, options.device)
    objective = build_objective(config, SEQUENCES, options.device, None)
    if options.compile:
        name = config.compute_precision.precision
        wanted = AccelerationConfig(compile=True, cudagraphs=options.cudagraphs)
        accelerate(objective, wanted, options.device, name, steps=0)
    batch = build_views(config, len(SEQUENCES))(slices, 0)
    schedules = build_schedules(config, config.epoch_length(400))
    return Trainer(
        objective=objective,
        optimizer=build_optimizer(config, objective, options.device),
        schedules=schedules,
        batches=lambda step: itertools.repeat(slices),
        views=make_views or (lambda slices, step, micro: batch),
        total_steps=schedules.total_steps,
        device=options.device,
        precision=Precision(config.compute_precision.precision, options.device),
        clip_grad=config.optim.clip_grad,
    )


def tflop_per_sample(config: PretrainConfig) -> float:
    """Multiply-adds counted twice: blocks of the teacher once, of the student three times (forward and backward).

    Stochastic depth, heads and patch convolution are left out, as in the anchor of 2.04 for ViT-B/14.
    """
    width, depth, _ = config.student.size
    crops, patch = config.crops, config.student.patch_size
    views = ((2, crops.global_crops_size, 1 + 3), (crops.local_crops_number, crops.local_crops_size, 3))
    flop = 0
    for number, side, passes in views:
        tokens = 1 + config.student.num_register_tokens + len(SEQUENCES) * (side // patch) ** 2
        flop += passes * number * depth * tokens * (24 * width**2 + 4 * tokens * width)
    return flop / 1e12
