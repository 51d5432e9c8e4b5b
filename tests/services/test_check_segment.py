"""``check-data --task segment``: every fault of a label map is found before a training meets it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medssl_cli.core.case import Case, Sequence
from medssl_cli.core.errors import ConfigError, DataError
from medssl_cli.core.volume import Volume
from medssl_cli.data.checks import CaseRules
from medssl_cli.data.images import write_volume
from medssl_cli.data.label_checks import LabelRules
from medssl_cli.services.check_data import CheckResult, check_data, look
from medssl_cli.services.check_data import Job as CheckJob

SHAPE = (4, 40, 44)
AFFINE = np.diag([0.6, 0.6, 1.5, 1.0])


def image(path: Path, seed: int, affine: np.ndarray = AFFINE) -> None:
    array = np.random.default_rng(seed).gamma(2, 100, SHAPE).astype(np.int16)
    write_volume(path, Volume(array, affine))


def label(path: Path, array: np.ndarray | None = None, affine: np.ndarray = AFFINE) -> None:
    if array is None:
        array = np.zeros(SHAPE, np.uint8)
        array[1:3, 10:20, 12:30] = 1
    write_volume(path, Volume(array, affine))


def check(source: Path, **settings: Any) -> CheckResult:
    return check_data(source, **{"task": "segment", "workers": 1, **settings})


def codes(result: CheckResult, severity: str = "error") -> dict[str, str]:
    return {f.case_id: f.code for f in result.findings if f.severity == severity}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for seed, name in enumerate(("a", "b")):
        image(root / name / "t2.nii.gz", seed)
        label(root / name / "lesion.nii.gz")
    return root


def test_a_sound_tree_has_no_finding(tree: Path, tmp_path: Path) -> None:
    result = check(tree, sequences=("t2",), label="lesion", out=tmp_path / "out")
    assert [f for f in result.findings if f.severity != "info"] == []
    assert result.report["classes"] == [
        {"name": "background", "values": "0", "n_cases": 2, "n_voxels": 2 * (4 * 40 * 44 - 360)},
        {"name": "lesion", "values": "1", "n_cases": 2, "n_voxels": 720},
    ]
    assert "class lesion (value 1): in 2 of 2 cases, 720 voxels" in result.summary()
    saved = json.loads((tmp_path / "out" / "check_data.json").read_text(encoding="utf-8"))
    assert (saved["task"], saved["n_ok"]) == ("segment", 2)
    page = (tmp_path / "out" / "check_data.html").read_text(encoding="utf-8")
    assert "The line is the label map." in page
    text = re.sub(r"<[^>]*>", " ", page)
    assert re.search(r"Class\s+Value\s+Cases\s+Voxels\s+background\s+0\s+2\s+13360\s+lesion\s+1\s+2\s+720\s", text)


def test_every_fault_of_a_label_map_is_found(tree: Path) -> None:
    half = np.zeros(SHAPE, np.float32)
    half[1, 5, 6] = 0.5
    two = np.zeros(SHAPE, np.uint8)
    two[1, 5, 6:11] = 2
    few = np.zeros(SHAPE, np.uint8)
    few[1, 5, 6:9] = 1
    apart = AFFINE.copy()
    apart[:3, 3] = 900
    rims = np.zeros((8, *SHAPE[1:]), np.uint8)
    rims[2:4, 10:20] = 1
    fine = np.diag([0.6, 0.6, 0.75, 1.0])
    faults: dict[str, tuple[np.ndarray | None, np.ndarray, str, str]] = {
        "fraction": (half, AFFINE, "error", "label_values"),
        "negative": (-(half > 0).astype(np.int16), AFFINE, "error", "label_values"),
        "unknown": (two, AFFINE, "error", "label_values"),
        "apart": (None, apart, "error", "grids_apart"),
        "four": (np.zeros((2, *SHAPE), np.uint8), AFFINE, "error", "volume_4d"),
        "empty": (np.zeros(SHAPE, np.uint8), AFFINE, "warning", "label_empty"),
        "full": (np.ones(SHAPE, np.uint8), AFFINE, "warning", "label_full"),
        "grid": (rims, fine, "warning", "label_grid"),
        "small": (few, AFFINE, "warning", "label_small"),
    }
    for seed, (name, (array, affine, _, _)) in enumerate(faults.items(), start=5):
        image(tree / name / "t2.nii.gz", seed)
        label(tree / name / "lesion.nii.gz", array, affine)
    image(tree / "missing" / "t2.nii.gz", 40)
    image(tree / "damaged" / "t2.nii.gz", 41)
    (tree / "damaged" / "lesion.nii.gz").write_bytes(b"no image")
    result = check(tree, sequences=("t2",), label="lesion", classes=("lesion",), min_roi_pixels=4)
    for severity in ("error", "warning"):
        expected = {name: code for name, (_, _, level, code) in faults.items() if level == severity}
        if severity == "error":
            expected |= {"missing": "label_missing", "damaged": "nifti_truncated"}
        assert codes(result, severity) == expected
    unknown = next(f for f in result.findings if f.case_id == "unknown")
    assert "2 (5 voxels); known are 0 background, 1 lesion" in unknown.message
    assert "--classes" in unknown.fix
    assert result.report["n_ok"] == len(faults) - 5 + 2
    with pytest.raises(DataError, match="7 errors"):
        result.raise_if_bad()


def test_images_are_checked_as_usual(tree: Path) -> None:
    write_volume(tree / "a" / "t2.nii.gz", Volume(np.full(SHAPE, 7, np.int16), AFFINE))
    image(tree / "c" / "adc.nii.gz", 9)
    label(tree / "c" / "lesion.nii.gz")
    result = check(tree, sequences=("t2",), label="lesion")
    assert codes(result) == {"a": "volume_constant", "c": "sequence_missing"}


def test_splits_choose_cases_and_may_not_overlap(tree: Path, tmp_path: Path) -> None:
    for name, ids in (("train", "a"), ("val", "b"), ("test", "gone")):
        (tmp_path / f"{name}.csv").write_text(f"patient_id\n{ids}\n", encoding="utf-8")
    result = check(tree, sequences=("t2",), label="lesion", split_csv=[tmp_path / "train.csv", tmp_path / "val.csv"])
    assert (result.report["n_cases"], codes(result)) == (2, {})
    gone = check(tree, sequences=("t2",), label="lesion", split_csv=[tmp_path / "test.csv"])
    assert {f.code for f in gone.findings if f.case_id == "gone"} == {"folder_missing", "label_missing"}
    (tmp_path / "val.csv").write_text("patient_id\na\n", encoding="utf-8")
    leak = check(tree, sequences=("t2",), label="lesion", split_csv=[tmp_path / "train.csv", tmp_path / "val.csv"])
    assert codes(leak) == {"a": "id_across_splits"}


def test_a_stem_that_is_not_there_is_told_at_once(tree: Path) -> None:
    with pytest.raises(DataError, match="did you mean 'lesion'"):
        check(tree, sequences=("t2",), label="leson")
    with pytest.raises(ConfigError, match="no name"):
        check(tree, sequences=("t2",))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"labels": Path("x.csv")}, "--labels with --task segment"),
        ({"roi": "gland"}, "--roi with --task segment"),
        ({"task": "pretrain"}, "--label with --task pretrain"),
    ],
)
def test_options_without_effect_are_refused(tree: Path, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(tree, **{"sequences": ("t2",), "label": "lesion", **settings})
    assert error.value.where == told


def test_nnunet_brings_its_classes_and_test_cases_without_labels(tmp_path: Path) -> None:
    root = tmp_path / "Dataset001"
    for seed, name in enumerate(("p1", "p2")):
        image(root / f"imagesTr/{name}_0000.nii.gz", seed)
        label(root / f"labelsTr/{name}.nii.gz")
    image(root / "imagesTs/p3_0000.nii.gz", 5)
    about = {"channel_names": {"0": "T2"}, "labels": {"background": 0, "PZ": 1, "TZ": 2}, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(about), encoding="utf-8")
    result = check(root)
    assert codes(result) == {}
    assert [f.code for f in result.findings if f.severity == "warning"] == ["class_absent"]
    assert codes(result, "info")["p3"] == "label_absent"
    assert [entry["n_cases"] for entry in result.report["classes"]] == [2, 2, 0]


# --- pictures --------------------------------------------------------------------------------------------------------


def picture(root: Path, name: str, value: int = 1, size: tuple[int, int] = (40, 50)) -> None:
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(name))
    Image.fromarray(rng.integers(0, 255, (40, 50, 3)).astype(np.uint8)).save(root / "images" / f"{name}.png")
    array = np.zeros(size, np.uint8)
    array[10:20, 10:30] = value
    Image.fromarray(array).save(root / "labels" / f"{name}.png")


def test_pictures_are_held_against_their_labels(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for name, value in (("a", 1), ("bb", 1), ("beyond", 3)):
        picture(root, name, value)
    picture(root, "unequal", size=(30, 31))
    picture(root, "unlabelled")
    (root / "labels" / "unlabelled.png").unlink()
    (root / "images" / "Thumbs.db").write_bytes(b"x")
    result = check(root, classes=("vessel",), out=tmp_path / "out")
    assert result.report["n_cases"] == 5
    assert codes(result) == {
        "images/beyond.png": "label_values",
        "images/unequal.png": "label_size",
        "images/unlabelled.png": "label_missing",
    }
    assert result.report["classes"][1] == {"name": "vessel", "values": "1", "n_cases": 2, "n_voxels": 400}


def test_masks_of_0_and_255_are_one_class(tmp_path: Path) -> None:
    picture(tmp_path / "set", "a", 255)
    picture(tmp_path / "set", "bb", 255)
    for classes in ((), ("vessel",)):
        result = check(tmp_path / "set", classes=classes)
        assert codes(result) == {}
        assert result.report["classes"][1]["values"] == "255"


def test_a_split_of_pictures_is_checked(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for name in ("a", "bb", "ccc"):
        picture(root, name)
    (tmp_path / "train.csv").write_text("image\na.png\n", encoding="utf-8")
    (tmp_path / "val.csv").write_text("image\nbb.png\n", encoding="utf-8")
    result = check(root, split_csv=[tmp_path])
    assert (result.report["n_cases"], codes(result)) == (2, {})


def test_the_thumbnail_shows_the_contour_also_from_another_grid(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    image(root / "a" / "t2.nii.gz", 0)
    label(root / "a" / "lesion.nii.gz")
    coarse = np.zeros((2, 20, 22), np.uint8)
    coarse[0:2, 5:10, 6:15] = 1
    grid = np.diag([1.2, 1.2, 3.0, 1.0])
    grid[:3, 3] = (0.3, 0.3, 0.75)
    label(root / "a" / "coarse.nii.gz", coarse, grid)
    case = Case("a", "a", {"t2": Sequence("t2", root / "a" / "t2.nii.gz")})
    seen = []
    for stem in ("lesion", "coarse", ""):
        rules = LabelRules(root / "a" / f"{stem}.nii.gz", stem) if stem else None
        looked = look(CheckJob(case, CaseRules(("t2",), ""), root, how="named", labels=rules))
        assert looked.thumbnail is not None
        seen.append(looked.thumbnail)
    assert len(set(seen)) == 3


def test_real_vessels_are_sound(real_data: Path) -> None:
    result = check(real_data / "chase_db1_vessels", classes=("vessel",))
    assert (result.report["n_cases"], codes(result)) == (16, {})
    assert result.report["classes"][1]["n_cases"] == 16
    second = check(real_data / "chase_db1_vessels", label="manual2")
    assert second.report["classes"][1]["n_voxels"] != result.report["classes"][1]["n_voxels"]


def test_real_volumes_with_masks_on_their_grid_are_sound(real_data: Path) -> None:
    result = check(real_data / "sts_ct_pet_mr_volumes", sequences=("CT_image",), label="CT_mask")
    assert codes(result) == {}
    assert result.report["classes"][1]["n_cases"] == 4
    crossed = check(real_data / "sts_ct_pet_mr_volumes", sequences=("CT_image",), label="PET_mask")
    assert {f.code for f in crossed.findings if f.severity == "warning"} >= {"label_grid"}
    assert codes(crossed) == {}


def test_the_command_prints_classes_and_ends_with_3(tree: Path, medssl: Callable[..., Any]) -> None:
    words = ("check-data", tree, "--sequences", "t2", "--label", "lesion", "--workers", 1)
    good = medssl(*words, "--classes", "lesion")
    assert good.exit_code == 0, good.output
    assert "class lesion (value 1): in 2 of 2 cases, 720 voxels" in good.stdout
    bad = medssl(*words, "--classes", "lesion=2")
    assert bad.exit_code == 3
    assert "label_values" in bad.stdout
