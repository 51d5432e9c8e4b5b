"""A DINOv2 file loads as it stands; what has no effect here is named."""

from __future__ import annotations

from pathlib import Path

import yaml

from medssl_cli.services.pretrain import PretrainRequest, resolve_config

# the published values of facebookresearch/dinov2, dinov2/configs/train/vitl14.yaml
VITL14 = """
dino: {head_n_prototypes: 131072, head_bottleneck_dim: 384}
ibot: {separate_head: true, head_n_prototypes: 131072}
train: {batch_size_per_gpu: 32, dataset_path: ImageNet22k, centering: sinkhorn_knopp}
student: {arch: vit_large, patch_size: 14, drop_path_rate: 0.4, ffn_layer: swiglufused, block_chunks: 4}
teacher: {momentum_teacher: 0.994}
optim: {epochs: 500, weight_decay_end: 0.2, base_lr: 2.0e-04, warmup_epochs: 80, layerwise_decay: 1.0}
crops: {local_crops_size: 98}
"""

HALF = {
    "sharding_strategy": "SHARD_GRAD_OP",
    "mixed_precision": {"param_dtype": "fp16", "reduce_dtype": "fp16", "buffer_dtype": "fp32"},
}

# all sections of dinov2/configs/ssl_default_config.yaml
DEFAULTS = {
    "MODEL": {"WEIGHTS": ""},
    "compute_precision": {
        "grad_scaler": True,
        "teacher": {"backbone": HALF, "dino_head": HALF, "ibot_head": HALF},
        "student": {"backbone": HALF, "dino_head": HALF, "ibot_head": HALF},
    },
    "train": {
        "dataset_path": "ImageNet:split=TRAIN",
        "output_dir": ".",
        "saveckp_freq": 20,
        "seed": 0,
        "num_workers": 10,
        "OFFICIAL_EPOCH_LENGTH": 1250,
        "cache_dataset": True,
        "centering": "centering",
    },
    "student": {"num_register_tokens": 0, "interpolate_antialias": False, "interpolate_offset": 0.1},
    "optim": {"lr": 0.0, "scaling_rule": "sqrt_wrt_1024", "adamw_beta1": 0.9, "adamw_beta2": 0.999},
    "evaluation": {"eval_period_iterations": 12500},
}


def test_the_large_recipe_of_dinov2_loads_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "vitl14.yaml"
    path.write_text(VITL14)
    config = resolve_config(PretrainRequest(config=str(path), data=tmp_path))
    assert config.student.size == (1024, 24, 16)
    assert (config.optim.base_lr, config.dino.head_n_prototypes, config.crops.local_crops_size) == (2e-4, 131072, 98)
    assert (config.data.layout, config.data.root) == ("images", str(tmp_path))
    assert config.warnings() == []


def test_the_framework_file_of_dinov2_loads_and_names_what_has_no_effect(tmp_path: Path) -> None:
    path = tmp_path / "default.yaml"
    path.write_text(yaml.safe_dump(DEFAULTS))
    config = resolve_config(PretrainRequest(config=str(path)))
    assert config.compute_precision.student.backbone.mixed_precision.param_dtype == "fp16"
    text = "\n".join(config.warnings())
    for key in ("grad_scaler", "compute_precision.student", "cache_dataset", "optim.lr", "eval_period_iterations"):
        assert key in text


def test_a_dataset_of_photographs_with_a_root(tmp_path: Path) -> None:
    text = f"ImageNet:split=VAL:root={tmp_path}:extra=/indices"
    config = resolve_config(PretrainRequest(overrides=(f"train.dataset_path={text}",)))
    assert (config.data.root, config.data.split, config.data.layout) == (str(tmp_path), "VAL", "images")
