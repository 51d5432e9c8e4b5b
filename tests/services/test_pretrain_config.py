"""One configuration from DINOv2's sections, the dataset string, flags and overrides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from medssl_cli.core.config import dump_config, leaves, load_config
from medssl_cli.core.errors import ConfigError
from medssl_cli.services.pretrain import PretrainRequest, resolve_config
from medssl_cli.services.pretrain_config import PretrainConfig, TrainConfig

STRING = "ProstateSSL:split=TRAIN:root=/data/x:random_slices=True"


def resolved(tmp_path: Path, values: dict[str, Any], *overrides: str, **flags: Any) -> PretrainConfig:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return resolve_config(PretrainRequest(config=str(path), overrides=overrides, **flags))


def test_framework_defaults_of_dinov2() -> None:
    config = PretrainConfig()
    assert (config.train.batch_size_per_gpu, config.train.OFFICIAL_EPOCH_LENGTH, config.train.img_size) == (
        64,
        1250,
        518,
    )
    assert (config.train.saveckp_freq, config.train.seed, config.train.num_workers) == (20, 0, 10)
    assert (config.dino.head_n_prototypes, config.dino.koleo_loss_weight, config.ibot.loss_weight) == (65536, 0.1, 1.0)
    assert (config.student.arch, config.student.patch_size, config.student.drop_path_rate) == ("vit_large", 16, 0.3)
    assert (config.optim.base_lr, config.optim.weight_decay_end, config.optim.clip_grad) == (0.004, 0.4, 3.0)
    assert (config.crops.global_crops_size, config.crops.local_crops_size) == (224, 96)
    # 518 is no multiple of 16: DINOv2 counts the whole patches, 32 a side
    assert config.position_side == 512
    assert config.warnings() == [
        "train.img_size 518 is no multiple of student.patch_size 16: the position table has the grid of 512."
    ]


def test_the_documented_recipe() -> None:
    """Column M of the specification's table."""
    config = load_config(PretrainConfig, "prostate_vitb14", recipes="pretrain")
    assert (config.train.batch_size_per_gpu, config.train.OFFICIAL_EPOCH_LENGTH, config.train.img_size) == (8, 50, 224)
    assert (config.optim.epochs, config.optim.warmup_epochs, config.optim.base_lr) == (300, 30, 3.5e-4)
    assert (config.dino.head_n_prototypes, config.ibot.head_n_prototypes) == (4096, 4096)
    assert config.crops.global_crops_scale == (0.5, 1.0)
    assert config.crops.local_crops_scale == (0.2, 0.5)
    assert (config.crops.crop_from_tumor_foreground, config.crops.intensity_aug) == (True, "rc")
    assert (config.data.random_axes, config.data.random_slices) == (True, True)
    assert (config.student.use_mri_seq_embed, config.compute_precision.precision) == (True, "fp32")
    assert config.warnings() == []


def test_precedence_default_file_flag_override(tmp_path: Path) -> None:
    values = {"train": {"seed": 1, "num_workers": 1}, "data": {"root": "/file"}}
    config = resolved(tmp_path, values, "train.num_workers=3", seed=2, workers=2, data=Path("/flag"))
    assert (config.train.seed, config.train.num_workers, config.data.root) == (2, 3, "/flag")
    assert config.optim.epochs == 100


# --- the dataset string ----------------------------------------------------------------------------------------------


def test_t39_sequence_flags_do_not_depend_on_the_dataset_string(tmp_path: Path) -> None:
    flags = {"student": {"use_mri_seq_embed": True, "img_wise_pos_embed": False}}
    configs = [
        resolved(tmp_path, {**flags, "train": {"dataset_path": text}})
        for text in (STRING, STRING + ":mri_sequences=ax_t2wi,ax_adc,ax_dwi")
    ]
    for config in configs:
        assert (config.student.use_mri_seq_embed, config.student.img_wise_pos_embed) == (True, False)
        assert config.data.mri_sequences == ("ax_t2wi", "ax_adc", "ax_dwi")
        assert (config.data.root, config.data.random_slices) == ("/data/x", True)
    assert configs[0].data == configs[1].data


def test_a_dataset_string_counts_with_the_rank_of_its_place(tmp_path: Path) -> None:
    values = {"train": {"dataset_path": STRING}, "data": {"random_slices": False}}
    config = resolved(tmp_path, values)
    assert config.data.random_slices is False
    (line,) = [text for text in config.warnings() if "dataset_path" in text]
    assert line == ("train.dataset_path says random_slices=True, but data.random_slices=False was given and counts.")
    overridden = resolved(tmp_path, {"data": {"random_slices": False, "root": "/file"}}, f"train.dataset_path={STRING}")
    assert (overridden.data.random_slices, overridden.data.root) == (True, "/data/x")
    last = resolved(tmp_path, {}, f"train.dataset_path={STRING}", "data.root=/y", data=Path("/flag"))
    assert last.data.root == "/y"
    assert resolved(tmp_path, {"train": {"dataset_path": STRING}}, data=Path("/flag")).data.root == "/flag"


def test_a_bad_dataset_string_is_told_with_all_other_faults(tmp_path: Path) -> None:
    values = {"train": {"dataset_path": "ProstateSSL:split=TRAIN:rot=/x"}, "optim": {"epochs": "many"}}
    with pytest.raises(ConfigError) as caught:
        resolved(tmp_path, values)
    for words in ("train.dataset_path", "unknown key 'rot'; did you mean root?", "root is missing"):
        assert words in caught.value.where
    with pytest.raises(ConfigError, match="dataset string"):
        resolved(tmp_path, {}, "train.dataset_path=ProstateSSL:split=TRAIN")


# --- files of DINOv2 -------------------------------------------------------------------------------------------------


def test_keys_of_dinov2_without_effect_are_accepted_and_named(tmp_path: Path) -> None:
    half = {"sharding_strategy": "SHARD_GRAD_OP", "mixed_precision": {"param_dtype": "fp16"}}
    values = {
        "compute_precision": {"grad_scaler": True, "student": {"backbone": half}, "precision": "fp32"},
        "train": {"cache_dataset": True},
        "optim": {"lr": 0.0, "epochs": 3},
        "evaluation": {"eval_period_iterations": 1000, "metric_types": ["mcc"]},
        "semi_supervised": {"loss_weight": 0.0, "label_smoothing": 0.1},
        "teacher": {"init_with_student_weights": False},
    }
    config = resolved(tmp_path, values)
    assert config.optim.epochs == 3
    text = "\n".join(config.warnings())
    for key in (
        *("compute_precision.grad_scaler", "compute_precision.student", "compute_precision.parallel=fsdp"),
        *("train.cache_dataset", "optim.lr", "evaluation.eval_period_iterations"),
        *("teacher.init_with_student_weights",),
    ):
        assert key in text
    again = PretrainConfig.model_validate(yaml.safe_load(dump_config(config)))
    assert again.model_dump() == config.model_dump()


def test_keys_of_other_dinov2_files_are_read_by_their_meaning(tmp_path: Path) -> None:
    train = {"auto_epoch_length": True, "persistent_workers": True, "pin_memory": True, "prefetch_factor": 2}
    values = {"train": {**train, "OFFICIAL_EPOCH_LENGTH": 50}, "logging": {"log_period_iterations": 200}}
    config = resolved(tmp_path, values)
    assert (config.train.OFFICIAL_EPOCH_LENGTH, config.train.log_period_iterations) == ("auto", 200)
    text = "\n".join(config.warnings())
    assert "train.auto_epoch_length is read as train.OFFICIAL_EPOCH_LENGTH=auto, and counts instead of 50." in text
    assert "logging.log_period_iterations is read as train.log_period_iterations=200." in text
    assert "No effect: train.persistent_workers" in text
    assert "No effect: train.pin_memory" in text
    both = {"train": {"auto_epoch_length": False, "log_period_iterations": 5}, "logging": values["logging"]}
    config = resolved(tmp_path, both)
    assert (config.train.OFFICIAL_EPOCH_LENGTH, config.train.log_period_iterations) == (1250, 5)
    assert any(text.startswith("No effect: logging.log_period_iterations") for text in config.warnings())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"logging": {"level": "info"}}, "logging"),
        ({"train": {"auto_epoch_length": "perhaps"}}, "train.auto_epoch_length is 'perhaps'"),
        ({"train": {"auto_epoch_lenght": True}}, "auto_epoch_lenght"),
    ],
)
def test_other_keys_are_still_refused(tmp_path: Path, values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(tmp_path, values)
    assert words in caught.value.where


def test_the_semi_supervised_loss_wants_to_know_its_labels(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(tmp_path, {"semi_supervised": {"loss_weight": 0.5}})
    assert "semi_supervised.target" in caught.value.where
    config = resolved(tmp_path, {"semi_supervised": {"loss_weight": 0.5, "target": "grade"}})
    assert config.semi_supervised.label_smoothing == 0.1


def test_json_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"optim": {"epochs": 7}}))
    assert resolve_config(PretrainRequest(config=str(path))).optim.epochs == 7


# --- together --------------------------------------------------------------------------------------------------------


def test_faults_that_show_only_together(tmp_path: Path) -> None:
    values = {
        "student": {"patch_size": 14},
        "train": {"img_size": 13},
        "dino": {"loss_weight": 0},
        "ibot": {"loss_weight": 0},
    }
    with pytest.raises(ConfigError) as caught:
        resolved(tmp_path, values)
    for words in (
        "train.img_size 13 is smaller than student.patch_size 14",
        "nothing to learn",
        "96 is not a multiple of the patch size 14",
    ):
        assert words in caught.value.where


def test_epoch_length_and_share_of_masks(tmp_path: Path) -> None:
    values = {"train": {"OFFICIAL_EPOCH_LENGTH": "auto", "batch_size_per_gpu": 8, "percentage_labels": 0.5}}
    config = resolved(tmp_path, values)
    assert [config.epoch_length(n) for n in (1, 8, 9, 400)] == [1, 1, 2, 50]
    assert config.data.percentage_labels == 0.5
    assert resolved(tmp_path, {}, "train.OFFICIAL_EPOCH_LENGTH=50").epoch_length(9) == 50


def test_initial_weights(tmp_path: Path) -> None:
    assert PretrainConfig().initial_weights is None
    assert resolved(tmp_path, {"student": {"pretrained_weights": "a.pth"}}).initial_weights == Path("a.pth")
    both = resolved(tmp_path, {"student": {"pretrained_weights": "a.pth"}}, init=Path("b.pth"))
    assert both.initial_weights == Path("b.pth")


@pytest.mark.parametrize(("crop", "given", "in_force"), [(True, None, True), (False, None, False), (False, True, True)])
def test_the_mask_is_handed_on_as_the_crops_need_it(
    tmp_path: Path, crop: bool, given: bool | None, in_force: bool
) -> None:
    data = {} if given is None else {"append_label_mask": given}
    config = resolved(tmp_path, {"crops": {"crop_from_tumor_foreground": crop}, "data": data})
    assert config.data.append_label_mask is in_force
    assert PretrainConfig.model_validate(config.model_dump()) == config
    assert not any("append_label_mask" in text for text in config.warnings())


def test_a_mask_that_the_crops_need_and_do_not_get_is_told(tmp_path: Path) -> None:
    values = {"crops": {"crop_from_tumor_foreground": True}, "data": {"append_label_mask": False}}
    (line,) = [text for text in resolved(tmp_path, values).warnings() if "append_label_mask" in text]
    assert "centred on the middle of its slice" in line


def test_a_config_made_in_code_is_completed_like_one_from_a_file() -> None:
    assert PretrainConfig().data.append_label_mask is False
    assert PretrainConfig(train=TrainConfig(percentage_labels=0.25)).data.percentage_labels == 0.25


@pytest.mark.parametrize("text", ["null", "none", ""])
def test_no_change_of_intensities_has_one_meaning(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"crops:\n  intensity_aug: {text}\n")
    config = resolve_config(PretrainRequest(config=str(path)))
    assert config.crops.intensity_aug == "none"
    assert PretrainConfig().crops == config.crops


def test_keys_without_effect_on_pictures_are_named() -> None:
    config = load_config(
        PretrainConfig,
        "images_small",
        recipes="pretrain",
        overrides=("data.random_slices=true", "crops.crop_from_tumor_foreground=true"),
    )
    assert config.without_effect("images") == ["data.random_slices: True", "crops.crop_from_tumor_foreground: True"]
    assert not config.without_effect("volumes")
    assert not load_config(PretrainConfig, "images_small", recipes="pretrain").without_effect("images")


def test_a_convolutional_backbone_is_refused_with_masks_and_taken_without() -> None:
    arch = {"student": {"arch": "convnext_tiny"}, "crops": {"global_crops_size": 64, "local_crops_size": 32}}
    with pytest.raises(ValidationError, match="convnext_tiny has no mask token"):
        PretrainConfig.model_validate({**arch, "ibot": {"loss_weight": 0.0}})
    without = {"ibot": {"loss_weight": 0.0, "mask_sample_probability": 0.0}}
    assert PretrainConfig.model_validate({**arch, **without}).student.size == (768, 18, 1)


def test_labels_and_roles_without_use_are_named() -> None:
    def told(*overrides: str) -> str:
        return " ".join(resolve_config(PretrainRequest(config="demo", overrides=overrides)).warnings())

    assert "semi_supervised.target, semi_supervised.labels" in told(
        "semi_supervised.target=grade", "semi_supervised.labels=a.csv"
    )
    assert "semi_supervised" not in told("semi_supervised.target=grade", "semi_supervised.loss_weight=0.5")
    assert "MODEL.init_from student" in told("MODEL.init_from=student")
    assert "init_from" not in told("MODEL.init_from=student", "MODEL.WEIGHTS=a.pth")


def test_v04_another_modality_brings_its_own_statistics() -> None:
    config = resolve_config(PretrainRequest(config="visionfm_fundus", overrides=("data.modality=B-Ultrasound",)))
    assert config.crops.mean == (0.05989236, 0.05978666, 0.056694973)
    assert config.crops.std == (0.154277, 0.15504874, 0.14464583)
    assert not config.warnings()
    own = resolve_config(PretrainRequest(config="visionfm_fundus", overrides=("crops.mean=[0.1, 0.2, 0.3]",)))
    assert own.crops.mean == (0.1, 0.2, 0.3)
    (line,) = own.warnings()
    assert "crops.mean" in line
    assert "crops.std" not in line
    again = PretrainConfig.model_validate(config.model_dump(mode="json"))
    assert again == config
    assert not any("data.modality" in text for text in again.warnings()), "its own file says the same"


def test_sequences_of_the_evaluation_mean_nothing_for_pictures() -> None:
    config = load_config(
        PretrainConfig,
        "images_small",
        recipes="pretrain",
        overrides=("evaluation.missing_sequences=true", "evaluation.slices=3"),
    )
    assert config.without_effect("images") == ["evaluation.slices: 3", "evaluation.missing_sequences: True"]


VISIONFM = {
    "train.batch_size_per_gpu": 128, "train.centering": "centering", "student.arch": "vit_base",
    "student.patch_size": 16,
    "student.layerscale": 0.0, "student.num_register_tokens": 0, "student.drop_path_rate": 0.1,
    "student.drop_path_uniform": False, "dino.head_n_prototypes": 8192, "dino.norm_last_layer": True,
    "dino.koleo_loss_weight": 0.0, "dino.loss_weight": 1.0, "ibot.loss_weight": 1.0, "ibot.separate_head": False,
    "ibot.separate_last_layer": False, "ibot.mask_sampling": "per_image", "ibot.pred_ratio": [0.0, 0.3],
    "ibot.pred_ratio_var": [0.0, 0.2], "ibot.pred_shape": "block", "ibot.pred_start_epoch": 0,
    "ibot.center_tokens": "all", "teacher.momentum_teacher": 0.996, "teacher.warmup_teacher_patch_temp": 0.04,
    "teacher.teacher_patch_temp": 0.07, "teacher.warmup_teacher_temp_epochs": 30,
    "crops.global_crops_scale": [0.32, 1.0],
    "crops.local_crops_number": 0, "crops.crops_aspect": [0.8, 1.2], "crops.color_jitter": [0.4, 0.4, 0.2, 0.1],
    "crops.grey_prob": 0.2, "crops.solarize_prob": 0.2, "crops.blur_probs": [1.0, 0.1, 0.5],
    "crops.max_blur_radius": 2.0,
    "crops.gamma_range": [1.0, 1.0], "optim.epochs": 400, "optim.warmup_epochs": 50, "optim.base_lr": 7.5e-5,
    "optim.min_lr": 2e-6, "optim.scaling_rule": "linear_wrt_256", "optim.weight_decay": 0.04,
    "optim.weight_decay_end": 0.4, "optim.clip_grad": 3.0, "optim.clip_mode": "tensor",
    "optim.freeze_last_layer": "gradient", "optim.freeze_last_layer_epochs": 3, "optim.layerwise_decay": 1.0,
    "optim.patch_embed_lr_mult": 1.0,
}  # fmt: skip
"""iBOT as VisionFM runs it, and what one engine must be told for it."""

TABLES = {
    "visionfm_ffa": VISIONFM,
    "visionfm_slitlamp": VISIONFM,
    "ibot_vits16": {
        "student.arch": "vit_small", "dino.norm_last_layer": False, "crops.local_crops_number": 10,
        "crops.global_crops_scale": [0.14, 1.0], "crops.local_crops_scale": [0.05, 0.4], "crops.local_crops_size": 96,
        "optim.base_lr": 5e-4, "optim.min_lr": 1e-6, "optim.epochs": 100, "optim.warmup_epochs": 10,
        "optim.freeze_last_layer_epochs": 1, "teacher.momentum_teacher": 0.996,
    },
    "glioma_vitb14": {
        "train.batch_size_per_gpu": 64, "train.OFFICIAL_EPOCH_LENGTH": 42, "train.num_workers": 15,
        "train.img_size": 518,
        "student.arch": "glioma_vit_base", "student.patch_size": 14, "student.use_mri_seq_embed": True,
        "dino.head_n_prototypes": 3, "ibot.mask_per_channel": True, "semi_supervised.loss_weight": 0.5,
        "crops.global_crops_size": 98, "crops.local_crops_size": 56, "crops.global_crops_scale": [0.5, 1.0],
        "crops.local_crops_scale": [0.2, 0.5], "crops.crop_from_tumor_foreground": True, "crops.intensity_aug": "none",
        "optim.epochs": 200, "optim.warmup_epochs": 20, "optim.base_lr": 1e-4, "optim.freeze_backbone_epochs": 10,
        "evaluation.eval_period_iterations": 210, "data.min_roi_pixels": 500, "data.spatial_size": 96,
        "evaluation.metric_types": ["mcc", "mean_per_class_accuracy", "multiclass_auc", "f1"],
    },
    "meddinov3_vitb16_ct": {
        "student.pos_embed_type": "rope", "student.num_register_tokens": 4, "student.qkv_bias": False,
        "student.pos_embed_rope_dtype": "bf16", "student.layernorm_eps": 1e-6, "student.drop_path_rate": 0.3,
        "crops.global_crops_scale": [0.32, 1.0], "crops.local_crops_size": 96, "crops.local_crops_number": 8,
        "ibot.mask_sample_probability": 0.5, "ibot.mask_ratio_min_max": [0.1, 0.5], "optim.base_lr": 1e-3,
        "data.preprocess.window_hu": [-1000.0, 1000.0], "compute_precision.precision": "bf16",
    },
    "dinov2_vitl14": {
        "dino.head_n_prototypes": 131072, "dino.head_bottleneck_dim": 384, "ibot.separate_head": True,
        "train.centering": "sinkhorn_knopp", "student.ffn_layer": "swiglufused", "student.drop_path_rate": 0.4,
        "teacher.momentum_teacher": 0.994, "optim.weight_decay_end": 0.2, "optim.layerwise_decay": 1.0,
        "crops.local_crops_size": 98, "optim.warmup_epochs": 80,
    },
    "prostate_vitg14": {"student.arch": "vit_giant2", "dino.head_n_prototypes": 4096, "crops.intensity_aug": "rc"},
}  # fmt: skip
"""Published values by recipe."""


@pytest.mark.parametrize("name", TABLES)
def test_recipes_have_the_published_values(name: str) -> None:
    found = dict(leaves(load_config(PretrainConfig, name, recipes="pretrain").model_dump(mode="json")))
    assert {key: found[key] for key in TABLES[name]} == TABLES[name]


def test_meddinov3_normalises_to_its_units() -> None:
    """-1000, 0 and 1000 HU become -5.983, -0.3657 and 5.2517."""
    crops = load_config(PretrainConfig, "meddinov3_vitb16_ct", recipes="pretrain").crops
    assert isinstance(crops.mean, float)
    assert isinstance(crops.std, float)
    for hu, expected in ((-1000, -5.983), (0, -0.3657), (1000, 5.2517)):
        assert ((hu + 1000) / 2000 - crops.mean) / crops.std == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    "name", ["demo", "prostate_vitb14", "visionfm_oct", "glioma_vitb14", "images_small", "head_ct_small"]
)
def test_a_configuration_fed_back_gives_the_same_words(name: str) -> None:
    config = load_config(PretrainConfig, name, recipes="pretrain")
    again = PretrainConfig.model_validate(yaml.safe_load(dump_config(config)))
    assert again.warnings() == config.warnings()
