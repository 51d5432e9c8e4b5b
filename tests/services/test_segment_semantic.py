"""A pretrained backbone with a decoder: parts, samples, parameter groups, validation, and what a run leaves behind."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from segment_parts import history, same_state, train
from sklearn.metrics import f1_score
from torch import Tensor, nn

from medssl_cli.core.case import Case
from medssl_cli.core.config import load_config
from medssl_cli.core.errors import CheckpointError, ConfigError, DataError, Interrupted
from medssl_cli.core.protocols import LabelledBatch
from medssl_cli.data.labelled_slices import collate_labelled
from medssl_cli.objectives.segmentation import SegmentationLoss, SegmentationLossConfig
from medssl_cli.report.labels import label_colour
from medssl_cli.report.mask_overlay import REFERENCE
from medssl_cli.services.segment import segment
from medssl_cli.services.segment_job import SegmentJob
from medssl_cli.services.segment_request import SegmentRequest, check_segment_request
from medssl_cli.services.segment_semantic import build_groups, build_semantic_job, load_semantic_config
from medssl_cli.services.segment_semantic_config import SemanticConfig, check_semantic_config, sided
from medssl_cli.services.segment_semantic_data import _items, _Looked, _some_patients
from medssl_cli.services.segment_training import build_training
from medssl_cli.services.segment_validation import _mean_distance, draw_overlays, validate_cases
from medssl_cli.services.segmentation_inference import read_slices
from medssl_cli.services.segmenter import open_segmenter, segmenter_of
from medssl_cli.services.slice_pipeline import InferSegmentConfig, segment_planes

CPU = torch.device("cpu")
TINY = ("data.tile=32", "data.slices_per_case=2", "decoder.base=8", "optim.batch_size=4", "train.num_workers=0")


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory, write_run: Callable[..., Path]) -> Path:
    """A run with a tiny backbone of T2, ADC and DWI."""
    return write_run(tmp_path_factory.mktemp("backbone") / "run")


@pytest.fixture(scope="session")
def plain_backbone(tmp_path_factory: pytest.TempPathFactory, write_run: Callable[..., Path]) -> Path:
    """A run with a tiny backbone of plain pictures."""
    return write_run(tmp_path_factory.mktemp("plain") / "run", None)


@pytest.fixture
def request_of(prostate_tree: Path, prepared_cache: Path, backbone: Path, tmp_path: Path) -> Callable[..., Any]:
    """A function that makes a request for the gland of the phantoms; words are overrides."""

    def make(*overrides: str, label: str | None = "roi_Prostate", **options: Any) -> SegmentRequest:
        named = () if label is None else (f"data.label={label}",)
        return SegmentRequest(
            **{
                "task": "semantic",
                "data": prostate_tree,
                "model": backbone,
                "cache": prepared_cache,
                "out": tmp_path / "run",
                "device": "cpu",
                "overrides": (*TINY, *named, *overrides),
                **options,
            }
        )

    return make


@pytest.fixture
def job_of(request_of: Callable[..., SegmentRequest]) -> Callable[..., SegmentJob]:
    """A function that builds the job of such a request."""
    return lambda *overrides, **options: build_semantic_job(request_of(*overrides, **options), CPU)


def _seen(job: SegmentJob, part: str) -> list[str]:
    return [case_id for name, case_id, _ in job.seen if name == part]


def _steps(job: SegmentJob, count: int) -> nn.Module:
    """The objective after some steps."""
    training = build_training(job)
    source = training.trainer.batches(0)
    for _ in range(count):
        training.trainer.step(source)
    return training.objective


# --- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(
    prostate_tree: Path, prepared_cache: Path, backbone: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run folder of two epochs on the gland."""
    out = tmp_path_factory.mktemp("trained") / "run"
    overrides = (*TINY, "data.label=roi_Prostate", "data.classes=[gland]", "optim.epochs=2", "train.save_every=1")
    segment(
        SegmentRequest(
            "semantic",
            data=prostate_tree,
            model=backbone,
            cache=prepared_cache,
            out=out,
            device="cpu",
            overrides=overrides,
        )
    )
    return out


def test_a_run_leaves_what_the_contract_names(trained: Path) -> None:
    names = ("best.safetensors", "model.json", "history.json", "progress.png", "config.yaml", "run.json", "cases.csv")
    assert all((trained / name).is_file() for name in names)
    assert (trained / "checkpoints" / "epoch_0002.safetensors").is_file()
    assert list((trained / "val_overlays").glob("*.png"))
    card = json.loads((trained / "model.json").read_text())
    assert card["classes"] == ["background", "gland"]
    assert card["label_values"] == {"0": "background", "1": "gland"}
    assert len(card["threshold_results"]) == 9
    assert card["score"] == card["val"]["val_best_dice"]
    assert card["ranges"]["slices"] == [12, 12]
    assert json.loads((trained / "history.json").read_text())["val_epoch"] == [1, 2]


def test_a_run_opens_without_its_backbone(trained: Path, backbone: Path, tmp_path: Path) -> None:
    found = open_segmenter(trained, CPU)
    assert found.sequences == ("ax_t2wi", "ax_adc", "ax_dwi")
    with torch.no_grad():
        assert found.network(torch.zeros(1, 3, 40, 36)).shape == (1, 1, 40, 36)


def test_a_frozen_backbone_is_that_of_the_model_to_the_last_bit(trained: Path, backbone: Path) -> None:
    kept = load_file(trained / "best.safetensors")
    given = load_file(backbone / "export" / "teacher_backbone.safetensors")
    assert {f"frozen.backbone.{name}" for name in given} == {name for name in kept if name.startswith("frozen.")}
    assert all(torch.equal(kept[f"frozen.backbone.{name}"], tensor) for name, tensor in given.items())


def test_no_patient_is_on_two_sides(trained: Path) -> None:
    with (trained / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    patients = {part: {row["patient_id"] for row in rows if row["part"] == part} for part in ("train", "val")}
    assert patients["train"]
    assert patients["val"]
    assert not patients["train"] & patients["val"]
    assert len(rows) == 6


class _StopAt:
    """Views that send SIGTERM to this process in one step."""

    def __init__(self, views: Callable[..., LabelledBatch], step: int) -> None:
        self.views, self.step = views, step

    def __call__(self, batch: LabelledBatch, step: int, micro: int) -> LabelledBatch:
        if step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.views(batch, step, micro)


def test_r01_a_run_stopped_within_an_epoch_goes_on_to_the_same_bits(
    job_of: Callable[..., SegmentJob], tmp_path: Path
) -> None:
    lists = _lists(tmp_path / "split", train=["PT-0000", "PT-0002"], val=["PT-0003"])
    words = ("finetune.freeze_backbone=false", "decoder.deep_supervision=true", "data.context=1", "optim.epochs=2")
    words = (*words, "optim.batch_size=1", "decoder.dropout=0.5", "decoder.base=4", "train.val_every=2")
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    train(job_of(*words, splits=lists), straight)
    stopped = job_of(*words, splits=lists)
    stopped.views = _StopAt(stopped.views, 5)  # the second of four steps of the second epoch
    with pytest.raises(Interrupted):
        train(stopped, broken)
    train(job_of(*words, splits=lists), broken)
    same_state(straight, broken)
    assert history(straight) == history(broken)
    best = [load_file(run / "best.safetensors") for run in (straight, broken)]
    assert best[0].keys() == best[1].keys()
    assert all(torch.equal(tensor, best[1][name]) for name, tensor in best[0].items())


def test_w01_a_model_that_does_not_exist_trains_nothing(job_of: Callable[..., SegmentJob], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist") as caught:
        job_of(model=tmp_path / "mistyped")
    assert caught.value.exit_code == 7


def test_a_segment_run_is_no_backbone_for_another(trained: Path, job_of: Callable[..., SegmentJob]) -> None:
    with pytest.raises(ConfigError, match="segmentation network"):
        job_of(model=trained)


# --- the backbone ----------------------------------------------------------------------------------------------------


def test_a_trained_backbone_moves_and_a_frozen_one_does_not(job_of: Callable[..., SegmentJob]) -> None:
    for frozen in (True, False):
        job = job_of(f"finetune.freeze_backbone={str(frozen).lower()}", "optim.warmup_epochs=0")
        before = {name: tensor.clone() for name, tensor in job.network.named_parameters()}
        _steps(job, 2)
        moved = {name for name, tensor in job.network.named_parameters() if not torch.equal(tensor, before[name])}
        assert any(name.startswith("decoder.") for name in moved)
        assert any(name.startswith("backbone.blocks.0.") for name in moved) is not frozen
        assert job.parameter_counts()["frozen"] == (32_480 if frozen else 0)


def test_layer_wise_rates_are_those_of_the_formula(job_of: Callable[..., SegmentJob]) -> None:
    job = job_of("finetune.freeze_backbone=false", "finetune.backbone_lr_scale=0.2", "finetune.layerwise_decay=0.5")
    rates = {name: group["lr_multiplier"] for group in job.groups for name, _ in group["params"]}
    decays = {name: group["wd_multiplier"] for group in job.groups for name, _ in group["params"]}
    expected = {"patch_embed": 0.2 / 8, "blocks.0": 0.2 / 4, "blocks.1": 0.2 / 2, "norm": 0.2}
    for layer, rate in expected.items():
        found = [value for name, value in rates.items() if name.startswith(f"backbone.{layer}.")]
        assert found, layer
        assert found == pytest.approx([rate] * len(found)), layer
    assert rates["backbone.pos_embed"] == pytest.approx(0.2 / 8)
    assert all(rate == 1 for name, rate in rates.items() if name.startswith("decoder."))
    assert decays["backbone.blocks.0.norm1.weight"] == 0
    assert decays["backbone.blocks.0.mlp.fc1.weight"] == 1
    assert len(rates) == sum(1 for _ in job.network.parameters())


def test_a_frozen_backbone_has_no_parameter_group(job_of: Callable[..., SegmentJob]) -> None:
    names = [name for group in job_of().groups for name, _ in group["params"]]
    assert names
    assert all(name.startswith("decoder.") for name in names)


def test_freeze_epochs_become_a_frozen_start(job_of: Callable[..., SegmentJob]) -> None:
    job = job_of("finetune.freeze_backbone=false", "finetune.freeze_epochs=1", "optim.epochs=3")
    assert build_training(job).schedule.at(0)["backbone_frozen"] == 1
    before = job.network.backbone.blocks[0].norm1.weight.clone()
    _steps(job, 1)
    assert torch.equal(job.network.backbone.blocks[0].norm1.weight, before)


def test_sequences_may_be_some_of_the_model_in_another_order(job_of: Callable[..., SegmentJob], backbone: Path) -> None:
    job = job_of("data.mri_sequences=[ax_dwi, ax_t2wi]")
    given = load_file(backbone / "export" / "teacher_backbone.safetensors")
    assert job.network.sequences == ("ax_dwi", "ax_t2wi")
    assert torch.equal(job.network.backbone.seq_embed, given["seq_embed"][[2, 0]])
    assert torch.equal(job.network.backbone.patch_embed.proj.weight, given["patch_embed.proj.weight"])
    assert job.card["sequences"] == ["ax_dwi", "ax_t2wi"]
    assert job.train[(0, 0)].image_SHW.shape[0] == 2


def test_a_random_start_is_the_same_for_one_seed(job_of: Callable[..., SegmentJob], backbone: Path) -> None:
    given = load_file(backbone / "export" / "teacher_backbone.safetensors")["patch_embed.proj.weight"]
    first, again, other = (job_of("init=random", f"train.seed={seed}") for seed in (1, 1, 2))
    weights = [job.network.backbone.patch_embed.proj.weight for job in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], given)
    assert all(parameter.requires_grad for parameter in first.network.parameters())


def test_building_draws_nothing_from_the_global_generator(job_of: Callable[..., SegmentJob]) -> None:
    before = torch.get_rng_state()
    job_of()
    assert torch.equal(torch.get_rng_state(), before)


# --- parts -----------------------------------------------------------------------------------------------------------


def _lists(folder: Path, **parts: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, ids in parts.items():
        (folder / f"{name}.csv").write_text("\n".join(["patient_id", *ids]) + "\n")
    return folder


def test_w04_lists_are_kept_and_the_test_list_is_never_opened(
    job_of: Callable[..., SegmentJob], tmp_path: Path
) -> None:
    folder = _lists(tmp_path / "split", train=["PT-0000", "PT-0002"], val=["PT-0003"])
    (folder / "test.csv").mkdir()  # reading it would raise
    job = job_of(splits=folder)
    assert (_seen(job, "train"), _seen(job, "val")) == (["PT-0000", "PT-0002"], ["PT-0003"])
    assert job.data_facts["parts"]["train"]["slices"] == 24


def test_a_patient_in_both_lists_is_refused(job_of: Callable[..., SegmentJob], tmp_path: Path) -> None:
    folder = _lists(tmp_path / "split", train=["PT-0001_20230106"], val=["PT-0001_20240215"])
    with pytest.raises(DataError, match="share patients") as caught:
        job_of(splits=folder)
    assert "PT-0001" in caught.value.where


def test_r12_one_image_under_two_names_is_refused(
    job_of: Callable[..., SegmentJob], prostate_tree: Path, tmp_path: Path
) -> None:
    root = tmp_path / "data"
    for source, name in (("PT-0000", "A"), ("PT-0003", "B"), ("PT-0000", "C")):
        shutil.copytree(prostate_tree / source, root / name)
    folder = _lists(tmp_path / "split", train=["A", "B"], val=["C"])
    with pytest.raises(DataError) as caught:
        job_of(splits=folder, data=root)
    assert caught.value.code == "split_leak"
    assert "two names" in caught.value.what


def test_patients_of_one_list_are_held_back_by_the_seed(job_of: Callable[..., SegmentJob], tmp_path: Path) -> None:
    listed = ["PT-0000", "PT-0001_20230106", "PT-0001_20240215", "PT-0003", "PT-0004"]
    table = _lists(tmp_path / "split", some=listed) / "some.csv"
    first, again = (job_of("data.val_ratio=0.25", split_csv=table) for _ in range(2))
    assert first.seen == again.seen
    assert sorted(case_id for _, case_id, _ in first.seen) == listed
    assert _seen(first, "val")
    assert "seed 42" in first.data_facts["split"]
    assert any("held back" in line for line in first.introduction)


def test_one_patient_cannot_be_split(job_of: Callable[..., SegmentJob], tmp_path: Path) -> None:
    table = _lists(tmp_path / "split", one=["PT-0001_20230106", "PT-0001_20240215"]) / "one.csv"
    with pytest.raises(DataError, match="too few patients"):
        job_of(split_csv=table)


def test_splits_without_a_validation_list_are_refused(job_of: Callable[..., SegmentJob], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no val\.csv"):
        job_of(splits=_lists(tmp_path / "split", train=["PT-0000"]))


def _looked(cases: list[Case], positive: set[str]) -> _Looked:
    values = {case.case_id: frozenset({0, 1} if case.patient_id in positive else {0}) for case in cases}
    return _Looked({"train": cases}, values, [], None)  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.05, 0.25, 0.5])
def test_percentage_labels_keeps_the_share_of_patients_and_their_mix(share: float) -> None:
    from medssl_cli.data.label_maps import spec_of_values

    cases = [Case(f"P{n}_{visit}", f"P{n}") for n in range(40) for visit in range(1 + n % 3)]
    positive = {f"P{n}" for n in range(10)}
    looked, spec = _looked(cases, positive), spec_of_values([1])

    def kept(seed: int) -> list[str]:
        config = SemanticConfig.model_validate({"data": {"percentage_labels": share}, "train": {"seed": seed}})
        return [case.case_id for case in _some_patients(cases, looked, spec, config)]

    chosen = kept(0)
    patients = {name.partition("_")[0] for name in chosen}
    assert chosen == kept(0)
    assert chosen != kept(1)
    assert [case.case_id for case in cases if case.patient_id in patients] == chosen  # all visits of each
    assert abs(len(chosen) - share * len(cases)) <= 2
    assert patients & positive
    items = [item for item in _items(cases, looked, spec) if item.item_id in set(chosen)]
    of_all = sum(case.patient_id in positive for case in cases) / len(cases)
    assert abs(sum(item.strata == ("class_1",) for item in items) - of_all * len(items)) <= 1.5


def test_percentage_labels_leaves_the_validation_part_alone(job_of: Callable[..., SegmentJob], tmp_path: Path) -> None:
    folder = _lists(tmp_path / "split", train=["PT-0000", "PT-0002", "PT-0003", "PT-0004"], val=["PT-0001_20230106"])
    job = job_of("data.percentage_labels=0.5", splits=folder)
    assert len(_seen(job, "train")) == 2
    assert _seen(job, "val") == ["PT-0001_20230106"]
    assert len(job.train) == 4
    assert job.data_facts["unused_training_cases"] == 2


# --- other layouts ---------------------------------------------------------------------------------------------------


def _nnunet(root: Path, labels: dict[str, Any], values: tuple[int, ...]) -> Path:
    """Four volumes of one channel whose label map is a box for each value."""
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(4):
        image = rng.normal(100, 5, (24, 20, 4)).astype(np.float32)
        label = np.zeros((24, 20, 4), np.uint8)
        for place, value in enumerate(values):
            label[2 + 6 * place : 6 + 6 * place, 3:12, 1:3] = value
        image += 40 * label
        for array, name in ((image, f"imagesTr/case{number}_0000"), (label, f"labelsTr/case{number}")):
            nib.save(nib.Nifti1Image(array, np.diag([1, 1, 3, 1])), root / f"{name}.nii.gz")
    description = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 4, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(description))
    return root


def test_nnunet_tells_classes_and_folds(
    job_of: Callable[..., SegmentJob], plain_backbone: Path, tmp_path: Path
) -> None:
    root = _nnunet(tmp_path / "Dataset001", {"background": 0, "liver": 2, "spleen": 3, "ignore": 7}, (2, 3, 7))
    folds = [{"train": ["case0"], "val": ["case1"]}, {"train": ["case1", "case3"], "val": ["case2"]}]
    (root / "splits_final.json").write_text(json.dumps(folds))
    job = job_of("data.fold=1", label=None, data=root, model=plain_backbone)
    assert job.classes == ("background", "liver", "spleen")
    assert job.outputs == 3
    assert (_seen(job, "train"), _seen(job, "val")) == (["case1", "case3"], ["case2"])
    assert set(job.train[(0, 0)].label_HW.unique().tolist()) <= {0, 1, 2, 255}
    assert job.card["sequences"] is None
    assert job.card["channels"] == 3
    figures = job.validate(job.network.eval())
    assert 0 <= figures["val_dice"] <= 1
    assert figures["val_best_threshold"] is None
    with pytest.raises(ConfigError, match="no such fold"):
        job_of("data.fold=2", label=None, data=root, model=plain_backbone)


def test_a_plain_backbone_needs_one_sequence(job_of: Callable[..., SegmentJob], plain_backbone: Path) -> None:
    with pytest.raises(ConfigError, match="slices of one sequence") as caught:
        job_of(model=plain_backbone)
    assert "ax_t2wi" in caught.value.where
    job = job_of("data.mri_sequences=[ax_t2wi]", model=plain_backbone)
    assert job.train[(0, 0)].image_SHW.shape == (3, 32, 32)


def _pictures(root: Path, count: int = 6) -> Path:
    """Grey pictures of a bright disc, labels of 0 and 255."""
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(1)
    y, x = np.mgrid[:48, :40]
    for number in range(count):
        disc = (y - rng.integers(15, 33)) ** 2 + (x - rng.integers(12, 28)) ** 2 < 64
        picture = np.clip(rng.normal(60, 10, disc.shape) + 120 * disc, 0, 255).astype(np.uint8)
        Image.fromarray(picture).save(root / "images" / f"p{number // 2}_{number}.png")
        Image.fromarray((255 * disc).astype(np.uint8)).save(root / "labels" / f"p{number // 2}_{number}.png")
    return root


def test_pictures_with_patients_in_their_names(
    job_of: Callable[..., SegmentJob], plain_backbone: Path, tmp_path: Path
) -> None:
    root = _pictures(tmp_path / "pictures")
    job = build_semantic_job(
        SegmentRequest(
            "semantic",
            data=root,
            model=plain_backbone,
            device="cpu",
            out=tmp_path / "run",
            overrides=(
                *TINY,
                "data.classes=[disc]",
                r"data.group_pattern=(p\d+)_",
                "data.val_ratio=0.3",
            ),
        ),
        CPU,
    )
    assert job.card["kind"] == "images"
    assert len(job.train) == 2 * len(_seen(job, "train"))  # data.slices_per_case
    assert job.config.augment.vertical_flip == 0.5
    patients = {part: {patient for name, _, patient in job.seen if name == part} for part in ("train", "val")}
    assert patients["train"] | patients["val"] == {"p0", "p1", "p2"}
    assert not patients["train"] & patients["val"]
    objective = _steps(job, 2)
    figures = job.validate(objective.averaged.eval())
    assert figures["val_loss"] > 0
    assert len(figures["threshold_results"]) == 9
    job.overlays(objective.averaged, tmp_path, 0.5)
    assert len(list(tmp_path.glob("*.png"))) == len(_seen(job, "val"))


def test_a_backbone_of_sequences_refuses_pictures(job_of: Callable[..., SegmentJob], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        job_of(data=_pictures(tmp_path / "pictures", 2), label=None, overrides=())
    assert caught.value.code == "backbone_of_sequences"


# --- refusals of data and keys ---------------------------------------------------------------------------------------


def test_a_label_without_name_asks_for_it(job_of: Callable[..., SegmentJob]) -> None:
    with pytest.raises(ConfigError) as caught:
        job_of(label=None)
    assert "--label lesion" in caught.value.fix
    with pytest.raises(DataError, match="did you mean 'lesion'"):
        job_of(label="lesoin")


def test_label_classes_and_patients_are_options_too(request_of: Callable[..., SegmentRequest]) -> None:
    options = {"label": "roi_Prostate", "classes": "gland, ignore=255", "group_pattern": r"^(PT-\d+)"}
    data = load_semantic_config(replace(request_of(label=None), **options)).data
    assert (data.label, data.group_pattern) == (options["label"], options["group_pattern"])
    assert data.classes == ("gland", "ignore=255")
    given = replace(request_of("data.label=lesion", label=None), label="roi_Prostate")
    assert load_semantic_config(given).data.label == "lesion"  # KEY=VALUE comes after options


def test_options_of_the_semantic_task_are_refused_for_pairs() -> None:
    with pytest.raises(ConfigError) as caught:
        check_segment_request(SegmentRequest("ct-pet", label="a", classes="b", group_pattern="c"))
    assert all(f"--{name} has no effect" in caught.value.where for name in ("label", "classes", "group-pattern"))


def test_cases_of_volumes_have_their_patients_by_pattern(job_of: Callable[..., SegmentJob]) -> None:
    job = job_of(r"data.group_pattern=PT-000(\d)", "data.val_ratio=0.4")
    assert {case_id: patient for _, case_id, patient in job.seen} == {case_id: case_id[6] for _, case_id, _ in job.seen}
    parts = {part: {patient for name, _, patient in job.seen if name == part} for part in ("train", "val")}
    assert parts["train"].isdisjoint(parts["val"])
    with pytest.raises(DataError, match="does not match"):
        job_of("data.group_pattern=PT-000(0)")


def test_a_value_of_no_class_is_refused_before_training(job_of: Callable[..., SegmentJob]) -> None:
    with pytest.raises(DataError) as caught:
        job_of("data.classes=[zone=2]")
    assert caught.value.code == "label_values"
    assert "--classes" in caught.value.fix


def test_an_unknown_sequence_is_refused(job_of: Callable[..., SegmentJob]) -> None:
    with pytest.raises(ConfigError, match="does not know the sequence ax_t1"):
        job_of("data.mri_sequences=[ax_t2wi, ax_t1]")


def test_training_cases_without_a_structure_are_refused(job_of: Callable[..., SegmentJob], tmp_path: Path) -> None:
    job = job_of("data.classes=[lesion]", label="lesion")
    without = _without_lesion(job)
    with_one = [case_id for _, case_id, _ in job.seen if case_id not in without]
    assert without
    folder = _lists(tmp_path / "split", train=without[:1], val=with_one[:1])
    with pytest.raises(DataError, match="nothing to learn"):
        job_of("data.classes=[lesion]", label="lesion", splits=folder)


def _without_lesion(job: SegmentJob) -> list[str]:
    data = job.validate.keywords["data"]  # type: ignore[attr-defined]
    return [case.case_id for cases in data.parts.values() for case in cases if not data.has_structure(case)]


def test_on_error_skip_lists_the_case_that_has_no_label(
    job_of: Callable[..., SegmentJob], prostate_tree: Path, tmp_path: Path
) -> None:
    root = tmp_path / "data"
    for name in ("PT-0000", "PT-0002", "PT-0003"):
        shutil.copytree(prostate_tree / name, root / name)
    (root / "PT-0002" / "roi_Prostate.nii.gz").unlink()
    with pytest.raises(DataError, match="no label map"):
        job_of(data=root)
    job = job_of(data=root, on_error="skip")
    assert [failure[0] for failure in job.failures] == ["PT-0002"]
    assert sorted(case_id for _, case_id, _ in job.seen) == ["PT-0000", "PT-0003"]


@pytest.mark.parametrize(
    ("keys", "kind", "told"),
    [
        ({"data": {"context": 1, "pixel_mm": 0.5}}, "images", ("data.context", "data.pixel_mm")),
        ({"data": {"splits": "a", "split_csv": "b", "val_ratio": 0.1}}, "volumes", ("data.split_csv", "val_ratio")),
        ({"finetune": {"layerwise_decay": 0.5, "freeze_epochs": 2}}, "volumes", ("layerwise_decay", "freeze_epochs")),
        ({"init": "random", "finetune": {"freeze_backbone": True}}, "volumes", ("stay random",)),
        ({"finetune": {"freeze_backbone": False, "freeze_epochs": 100}}, "volumes", ("never be trained",)),
        ({"optim": {"min_lr": 1.0}}, "volumes", ("optim.min_lr",)),
        ({"optim": {"warmup_epochs": 3, "epochs": 3}}, "volumes", ("warm-up",)),
    ],
)
def test_keys_without_effect_are_refused_all_at_once(keys: dict[str, Any], kind: Any, told: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_semantic_config(SemanticConfig.model_validate(keys), kind)
    assert all(text in caught.value.where for text in told)


@pytest.mark.parametrize("name", ["prostate_gland", "lesion", "images_vessels"])
def test_recipes_hold_no_key_without_effect(name: str) -> None:
    config = load_config(SemanticConfig, name, recipes="segment")
    check_semantic_config(config, "images" if name == "images_vessels" else "volumes")


def test_flips_suit_the_data() -> None:
    config = SemanticConfig()
    assert config.settled("volumes", ("background", "gland")).augment.vertical_flip == 0
    assert config.settled("volumes", ("background", "gland")).augment.horizontal_flip == 0.5
    assert config.settled("volumes", ("background", "kidney_left")).augment.horizontal_flip == 0
    assert config.settled("images", ("background", "vessel")).augment.vertical_flip == 0.5
    given = SemanticConfig.model_validate({"augment": {"vertical_flip": 0.25, "horizontal_flip": 1.0}})
    assert given.settled("volumes", ("background", "R lung")).augment == given.augment
    assert sided(("Right lung",))
    assert sided(("hippocampus_l",))
    assert not sided(("cleft", "lesion", "bright"))


def test_the_warm_up_of_a_short_run_is_short() -> None:
    assert SemanticConfig.model_validate({"optim": {"epochs": 1}}).warmup_epochs == 0.5
    assert SemanticConfig.model_validate({"optim": {"epochs": 9, "warmup_epochs": 4}}).warmup_epochs == 4


# --- samples ---------------------------------------------------------------------------------------------------------


def test_views_are_a_function_of_seed_and_step(job_of: Callable[..., SegmentJob]) -> None:
    job = job_of("data.context=1", "augment.noise_prob=1")
    batch = collate_labelled([job.train[(n, n)] for n in range(2)])
    first, again, other = job.views(batch, 3, 0), job.views(batch, 3, 0), job.views(batch, 4, 0)
    assert first.images_BSHW.shape[1] == 9
    assert torch.equal(first.images_BSHW, again.images_BSHW)
    assert not torch.equal(first.images_BSHW, other.images_BSHW)


def test_without_changes_views_only_normalise(job_of: Callable[..., SegmentJob]) -> None:
    off = ("horizontal_flip", "affine_prob", "elastic_prob", "brightness_contrast_prob", "noise_prob")
    job = job_of(*(f"augment.{key}=0" for key in off))
    batch = collate_labelled([job.train[(0, 0)]])
    seen = job.views(batch, 0, 0)
    torch.testing.assert_close(seen.images_BSHW, (batch.images_BSHW - 0.45) / 0.22)
    assert torch.equal(seen.label_map_BHW, batch.label_map_BHW)


def test_each_channel_of_each_slice_has_its_own_mean(
    job_of: Callable[..., SegmentJob], write_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = write_run(tmp_path / "three", mean=[0.1, 0.2, 0.3], std=[0.5, 1.0, 2.0])
    job = job_of("data.context=1", model=run)
    images = torch.rand(2, 9, 8, 8)
    mean, std = (torch.tensor(three * 3)[:, None, None] for three in ([0.1, 0.2, 0.3], [0.5, 1.0, 2.0]))
    expected = (images - mean) / std
    torch.testing.assert_close(job.views.normalised(images.clone()), expected)  # type: ignore[attr-defined]


def test_a_tile_is_rounded_up_to_the_patch(job_of: Callable[..., SegmentJob]) -> None:
    job = job_of("data.tile=27")
    assert job.card["tile"] == 32
    assert job.train[(0, 0)].image_SHW.shape[-2:] == (32, 32)


# --- validation ------------------------------------------------------------------------------------------------------


class _Bright(nn.Module):
    """Says that what is bright in the first channel is the structure."""

    def forward(self, images_BSHW: Tensor, available_BS: Tensor | None = None) -> Tensor:
        return images_BSHW[:, :1] * 3


def test_validation_gives_the_figures_of_scikit_learn(job_of: Callable[..., SegmentJob], tmp_path: Path) -> None:
    folder = _lists(tmp_path / "split", train=["PT-0000"], val=["PT-0001_20230106", "PT-0001_20240215", "PT-0003"])
    job = job_of(splits=folder)
    data, segmenter = (job.validate.keywords[name] for name in ("data", "segmenter"))  # type: ignore[attr-defined]
    found = validate_cases(_Bright().eval(), segmenter, data.validation(), job.loss, InferSegmentConfig())
    truth: dict[str, list[np.ndarray]] = {}
    bright: dict[str, list[np.ndarray]] = {}
    for planes in (data.validation()[n] for n in range(3)):
        for index in range(len(planes)):
            truth.setdefault(planes.patient_id, []).append(planes.classes(index).ravel())
            bright.setdefault(planes.patient_id, []).append(planes.scaled(index)[0].ravel())

    def dice_at(threshold: float) -> float:
        cut = 0.45 + 0.22 * np.log(threshold / (1 - threshold)) / 3  # undoes sigmoid, factor and normalisation
        scores = [f1_score(np.concatenate(truth[p]), np.concatenate(bright[p]) >= cut) for p in truth]
        return float(np.mean(scores))

    assert len(truth) == 2  # two visits of one patient count once
    assert found["val_dice"] == pytest.approx(dice_at(0.5), abs=1e-4)
    assert found["val_dice"] == found["val_f1"]
    assert found["score"] == found["val_best_dice"]
    table = {row["threshold"]: row["dice"] for row in found["threshold_results"]}
    assert table[0.6] == pytest.approx(dice_at(0.6), abs=1e-4)
    assert found["val_best_dice"] == pytest.approx(max(table.values()))
    assert table[found["val_best_threshold"]] == found["val_best_dice"]
    assert found["val_hd95"] > 0


class _Planes:
    """One plane of given classes, whose image tells what is to be predicted."""

    spacing_mm, spacing, available_S = (1.0, 1.0, 1.0), (1.0, 1.0), np.ones(1, dtype=bool)

    def __init__(self, patient_id: str, predicted_HW: list[list[int]], classes_HW: list[list[int]]) -> None:
        self.case_id = self.patient_id = patient_id
        self._predicted = np.asarray(predicted_HW, dtype=np.float32)
        self._classes = np.asarray(classes_HW, dtype=np.uint8)

    def __len__(self) -> int:
        return 1

    def scaled(self, index: int) -> np.ndarray:
        return self._predicted[None]

    def classes(self, index: int) -> np.ndarray:
        return self._classes

    def shown(self, image_HW: np.ndarray) -> np.ndarray:
        return image_HW


class _Says(nn.Module):
    """Three logits, the highest of the class that the image names."""

    def forward(self, images_BSHW: Tensor, available_BS: Tensor | None = None) -> Tensor:
        return torch.cat([-10 * (images_BSHW - index).abs() for index in range(3)], dim=1)


def test_distances_are_those_by_hand_and_of_ragged_surfaces_left_out() -> None:
    planes = _Planes("A", [[0]], [[0]])
    predicted, reference = (np.zeros((6, 9), np.uint8) for _ in range(2))
    predicted[2, 1], reference[2, 5] = 1, 1
    assert _mean_distance([(predicted, reference)], 2, planes) == 4
    assert _mean_distance([(predicted, np.zeros_like(reference))], 2, planes) is None
    predicted[1:4, 1] = 1
    assert _mean_distance([(predicted, reference)], 2, planes, most=2) is None


def test_w37_dice_leaves_the_background_out_and_two_empty_sides_agree() -> None:
    card = {"task": "semantic", "classes": ["background", "a", "b"], "outputs": 3, "mean": 0, "std": 1, "tile": 0}
    network = _Says().eval()
    segmenter = segmenter_of(Path("run"), {**card, "channels": 1}, network, CPU)
    loss = SegmentationLoss(SegmentationLossConfig(), 3)
    empty = _Planes("A", [[0, 0], [0, 0]], [[0, 0], [0, 0]])
    # of a: 1 right, 1 wrong, 1 missed (Dice 2/4); of b: 1 right, the other pixel does not count (Dice 1)
    mixed = _Planes("B", [[1, 1, 0], [2, 2, 0]], [[1, 0, 1], [2, 255, 0]])
    one = _Planes("C", [[0, 1]], [[1, 1]])  # b is on neither side: a alone counts, 2/3
    found = validate_cases(network, segmenter, [empty, mixed, one], loss, InferSegmentConfig())
    assert found["val_dice"] == pytest.approx((1 + (0.5 + 1) / 2 + 2 / 3) / 3)
    assert found["val_iou"] == pytest.approx((1 + (1 / 3 + 1) / 2 + 1 / 2) / 3)
    assert found["val_best_dice"] is None
    assert found["score"] == pytest.approx(((0.5 + 1) / 2 + 2 / 3) / 2)  # nobody is rewarded for finding nothing in A
    assert validate_cases(network, segmenter, [empty], loss, InferSegmentConfig())["score"] == 1


def test_a_network_that_finds_nothing_is_not_the_best_where_most_patients_have_nothing() -> None:
    card = {"task": "semantic", "classes": ["background", "lesion"], "outputs": 1, "mean": 0, "std": 1, "tile": 0}
    segmenter = segmenter_of(Path("run"), {**card, "channels": 1}, _Bright().eval(), CPU)
    loss = SegmentationLoss(SegmentationLossConfig(), 1)
    without = [_Planes(f"N{n}", [[-9, 0]], [[0, 0]]) for n in range(4)]  # 0.5 of the second pixel
    lesion = _Planes("L", [[-9, 0.1]], [[0, 1]])  # 0.57
    found = validate_cases(_Bright().eval(), segmenter, [*without, lesion], loss, InferSegmentConfig())
    assert (found["val_best_dice"], found["score"], found["val_best_threshold"]) == (1, 1, 0.5)
    blind = _Planes("L", [[-9, -9]], [[0, 1]])
    assert validate_cases(_Bright().eval(), segmenter, [*without, blind], loss, InferSegmentConfig())["score"] == 0


def test_validation_loss_is_that_of_the_logits(job_of: Callable[..., SegmentJob], tmp_path: Path) -> None:
    folder = _lists(tmp_path / "split", train=["PT-0000"], val=["PT-0003"])
    job = job_of(splits=folder)
    data, segmenter = (job.validate.keywords[name] for name in ("data", "segmenter"))  # type: ignore[attr-defined]
    network, planes = _Bright().eval(), data.validation()[0]
    expected = []
    for index in range(len(planes)):
        image = torch.from_numpy((planes.scaled(index) - 0.45) / 0.22)[None].double()
        label = torch.from_numpy(planes.classes(index).astype(np.int64))[None]
        expected.append(float(sum(job.loss(network(image), label).values())))
    found = validate_cases(network, segmenter, data.validation(), job.loss, InferSegmentConfig())
    assert found["val_loss"] == pytest.approx(np.mean(expected), rel=1e-4)


def test_validation_sees_what_inference_sees(trained: Path, job_of: Callable[..., SegmentJob]) -> None:
    job = job_of("data.classes=[gland]")
    data = job.validate.keywords["data"]  # type: ignore[attr-defined]
    segmenter = open_segmenter(trained, CPU)
    config = InferSegmentConfig()
    stored = list(segment_planes(segmenter, data.validation()[0], config))
    from_files = list(segment_planes(segmenter, read_slices(data.val[0], segmenter), config))
    assert len(stored) == len(from_files) == 12
    np.testing.assert_allclose(np.stack(stored), np.stack(from_files), atol=1e-6)


def test_validation_leaves_the_network_as_it_was(job_of: Callable[..., SegmentJob]) -> None:
    job = job_of()
    before = {name: tensor.clone() for name, tensor in job.network.state_dict().items()}
    first, again = job.validate(job.network.eval()), job.validate(job.network.eval())
    assert first == again
    assert all(torch.equal(tensor, before[name]) for name, tensor in job.network.state_dict().items())


def test_overlays_draw_reference_as_a_line_and_prediction_as_an_area(
    job_of: Callable[..., SegmentJob], tmp_path: Path
) -> None:
    job = job_of()
    data, segmenter = (job.validate.keywords[name] for name in ("data", "segmenter"))  # type: ignore[attr-defined]
    draw_overlays(_Bright().eval(), segmenter, data.validation(), tmp_path, InferSegmentConfig())
    (path,) = tmp_path.glob("*.png")
    picture = np.asarray(Image.open(path)).astype(int)
    for colour in (REFERENCE, label_colour(0)):
        assert (picture == colour).all(-1).any()
    assert picture.shape[1] > 3 * picture.shape[0]  # three sequences and the overlay, side by side


# --- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_gland_of_unseen_patients_is_found_better_than_by_the_mean_mask(
    tmp_path: Path, write_run: Callable[..., Path]
) -> None:
    from medssl_cli.services.phantom import make_phantom

    root = tmp_path / "phantoms"
    make_phantom("prostate", root, cases=14, seed=3, size="small")
    words = ("data.label=roi_Prostate", "data.tile=64", "data.slices_per_case=6", "decoder.base=8", "optim.lr=3e-3")
    more = ("init=random", "optim.epochs=40", "train.val_every=10", "train.ema_decay=0.9", "train.num_workers=0")
    run = segment(
        SegmentRequest(
            "semantic",
            data=root,
            model=write_run(tmp_path / "backbone"),
            cache=tmp_path / "cache",
            out=tmp_path / "run",
            device="cpu",
            overrides=(*words, *more),
        )
    )
    assert run is not None
    card = json.loads((tmp_path / "run" / "model.json").read_text())
    with (tmp_path / "run" / "cases.csv").open() as file:
        parts = {row["case_id"]: row["part"] for row in csv.DictReader(file)}
    masks = {name: np.asarray(nib.load(root / name / "roi_Prostate.nii.gz").dataobj) > 0 for name in parts}
    shape = next(iter(masks.values())).shape
    mean = np.mean([mask for name, mask in masks.items() if parts[name] == "train" and mask.shape == shape], axis=0)
    held = [mask for name, mask in masks.items() if parts[name] == "val" and mask.shape == shape]
    assert held
    baseline = float(np.mean([f1_score(mask.ravel(), (mean >= 0.5).ravel()) for mask in held]))
    assert card["score"] > baseline + 0.05, (card["score"], baseline)


def test_groups_of_the_job_are_those_of_the_network(job_of: Callable[..., SegmentJob]) -> None:
    job = job_of("finetune.freeze_backbone=false")
    again = build_groups(job.network, job.config)  # type: ignore[arg-type]
    assert [g["lr_multiplier"] for g in again] == [g["lr_multiplier"] for g in job.groups]
    assert isinstance(job.views(collate_labelled([job.train[(0, 0)]]), 0, 0), LabelledBatch)
    segmenter_of(Path("run"), {"task": "semantic", "classes": job.classes, "outputs": 1, **job.card}, job.network, CPU)
