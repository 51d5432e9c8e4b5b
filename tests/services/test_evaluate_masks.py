from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medssl_cli.core.errors import ConfigError, DataError
from medssl_cli.metrics.segmentation import counts, dice
from medssl_cli.metrics.surface import surface_distances
from medssl_cli.services.evaluate import EvaluateRequest, evaluate
from medssl_cli.services.evaluate_masks_files import core_name, find_pairs

Medssl = Callable[..., Any]
SHAPE = (20, 18, 8)
"""(X, Y, Z) as in the file."""
ZOOMS = (0.5, 0.8, 3.0)


def ball(shape: tuple[int, ...], centre: tuple[float, ...], radius: float) -> np.ndarray:
    grid = np.indices(shape, dtype=float)
    return sum((axis - middle) ** 2 for axis, middle in zip(grid, centre, strict=True)) <= radius**2


def write_nifti(path: Path, array_XYZ: np.ndarray, *, shift_mm: float = 0.0) -> Path:
    affine = np.diag([*ZOOMS, 1.0])
    affine[0, 3] = shift_mm
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array_XYZ, affine), path)
    return path


def label_maps(n: int, classes: int = 2) -> list[tuple[np.ndarray, np.ndarray]]:
    """(prediction, reference) of cases, (X, Y, Z); the last case is empty in both."""
    found = []
    for case in range(n):
        reference, prediction = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
        for c in range(1, classes):
            centre = (6 + 5 * (c - 1), 8, 4)
            reference[ball(SHAPE, centre, 3.2)] = c
            prediction[ball(SHAPE, (centre[0] + case % 3, 8, 4), 3.2)] = c
        if case == n - 1:
            reference[:], prediction[:] = 0, 0
        found.append((prediction, reference))
    return found


def write_folders(
    root: Path, maps: list[tuple[np.ndarray, np.ndarray]], ending: str = "_segmentation"
) -> tuple[Path, Path]:
    for n, (prediction, reference) in enumerate(maps):
        write_nifti(root / "pred" / f"case{n}{ending}.nii.gz", prediction)
        write_nifti(root / "ref" / f"case{n}.nii.gz", reference)
    return root / "pred", root / "ref"


def run(out: Path, prediction: Path, reference: Path, **options: Any) -> dict[str, Any]:
    settings = {"draws": 20, **options}
    evaluate(EvaluateRequest(out=out, predictions=prediction, reference=reference, **settings))
    return json.loads((out / "metrics.json").read_text(encoding="utf-8"), parse_constant=refuse_constant)


def refuse_constant(text: str) -> float:
    raise AssertionError(f"{text} is no strict JSON")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_folders(tmp_path_factory.mktemp("masks"), label_maps(5))


@pytest.fixture(scope="module")
def evaluated(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("out") / "eval"
    return out, run(out, *folders, lesions=True)


def test_numbers_equal_single_metrics(folders: tuple[Path, Path], evaluated: tuple[Path, dict[str, Any]]) -> None:
    _, facts = evaluated
    dices = [float(dice(*counts(p == 1, r == 1)[:3])) for p, r in label_maps(5)]
    assert dices[0] == dices[3] == dices[4] == 1
    assert facts["metrics"]["dice"]["value"] == pytest.approx(np.mean(dices))
    assert facts["metrics"]["dice"]["std"] == pytest.approx(np.std(dices, ddof=1))
    assert facts["metrics"]["dice_non_empty"]["value"] == pytest.approx(np.mean(dices[:4]))
    assert facts["overall"]["dice"]["non_empty_truth"]["cases"]["n"] == 4
    assert (facts["n"], facts["n_empty_truth"], facts["n_both_empty"], facts["n_missed"]) == (5, 1, 1, 0)
    assert [row["dice"] for row in facts["per_image"]] == pytest.approx(dices)
    assert facts["per_image"][4]["hd95"] is None
    assert facts["distance_unit"] == "mm"


def test_distances_are_in_mm_of_the_file(evaluated: tuple[Path, dict[str, Any]]) -> None:
    _, facts = evaluated
    prediction, reference = label_maps(5)[2]
    mean = surface_distances(prediction.T > 0, reference.T > 0, ZOOMS[::-1]).mean()
    assert facts["per_image"][2]["assd"] == pytest.approx(mean)
    rows = read_csv(evaluated[0] / "per_case.csv")
    error = (int((prediction > 0).sum()) - int((reference > 0).sum())) * math.prod(ZOOMS) / 1000
    assert float(rows[2]["volume_error_ml"]) == pytest.approx(error)
    assert facts["metrics"]["hd95"]["n"] == 4


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_metric_has_its_definition_and_its_rules(evaluated: tuple[Path, dict[str, Any]]) -> None:
    _, facts = evaluated
    for metrics in (
        facts["metrics"],
        *facts["per_class"].values(),
        facts["lesions"]["per_class"]["class_1"]["metrics"],
    ):
        for name, metric in metrics.items():
            assert set(metric) >= {"value", "ci_low", "ci_high", "definition", "n", "n_groups"}, name
            assert metric["definition"]
            assert metric["value"] is not None or metric["reason"]
    assert "tolerance 2 mm" in facts["metrics"]["nsd"]["definition"]
    assert "in mm" in facts["metrics"]["hd95"]["definition"]
    assert "both empty" in facts["empty_rules"]
    assert "undefined if prediction or reference is empty" in facts["empty_rules"]


def test_c13_patients_first_and_patients_second(tmp_path: Path) -> None:
    square = np.zeros((30, 30), np.uint8)
    square[:15] = 255
    dot, empty = np.zeros((30, 30), np.uint8), np.zeros((30, 30), np.uint8)
    dot[0, 0] = 255
    pairs = {"p1_slice_1": (square, square), "p1_slice_2": (square, square), "p2_slice_1": (empty, dot)}
    for name, maps in pairs.items():
        for folder, array in zip(("pred", "ref"), maps, strict=True):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(array).save(tmp_path / folder / f"{name}.png")
    facts = run(tmp_path / "out", tmp_path / "pred", tmp_path / "ref")
    assert facts["overall"]["dice"]["cases"] == pytest.approx({"mean": 2 / 3, "std": np.std([1, 1, 0], ddof=1), "n": 3})
    assert facts["overall"]["dice"]["patients"] == pytest.approx({"mean": 0.5, "std": math.sqrt(0.5), "n": 2})
    assert [(row["patient"], row["n"], row["dice"]) for row in facts["per_patient"]] == [("p1", 2, 1), ("p2", 1, 0)]
    assert facts["n_groups"] == 2
    assert facts["n_missed"] == 1
    rows = read_csv(tmp_path / "out" / "per_image.csv")
    assert list(rows[0]) == ["name", "patient", "dice", "iou", "accuracy", "f1", "hd95", "tp", "fp", "fn"]
    assert [row["name"] for row in rows] == ["p1_slice_1.png", "p1_slice_2.png", "p2_slice_1.png"]
    assert (rows[0]["tp"], rows[2]["fn"], rows[2]["hd95"]) == ("450", "1", "")
    assert facts["distance_unit"] == "px"
    diagonal = run(tmp_path / "diagonal", tmp_path / "pred", tmp_path / "ref", hd_empty="diagonal")
    assert [row["hd95"] for row in diagonal["per_image"]] == pytest.approx([0, 0, 30 * math.sqrt(2)])


def test_several_structures_and_ignored_voxels(tmp_path: Path) -> None:
    maps = label_maps(3, classes=3)
    for prediction, reference in maps:
        reference[:, :4] = 9
        prediction[:, :4] = 2
    prediction, reference = write_folders(tmp_path, maps)
    facts = run(tmp_path / "out", prediction, reference, classes=("tumour=2", "ignore=9", "gland=1"))
    assert facts["classes"] == ["background", "tumour", "gland"]
    kept = [(p[:, 4:], r[:, 4:]) for p, r in maps]
    for structure, value in (("gland", 1), ("tumour", 2)):
        expected = np.mean([dice(*counts(p == value, r == value)[:3]) for p, r in kept])
        assert facts["per_class"][structure]["dice"]["value"] == pytest.approx(expected)
    both = np.mean([facts["per_class"][name]["dice"]["value"] for name in ("gland", "tumour")])
    assert facts["metrics"]["dice"]["value"] == pytest.approx(both)
    assert "mean over structures" in facts["metrics"]["dice"]["definition"]
    assert len(read_csv(tmp_path / "out" / "per_case.csv")) == 6


def test_w37_the_background_is_no_structure_and_empty_images_count_once(tmp_path: Path) -> None:
    """Three classes by hand: the second image holds no structure 2 in either label map, the third none at all."""
    reference, prediction = (np.zeros((3, 10, 10), np.uint8) for _ in range(2))
    reference[0, :2, :5], prediction[0, :2, :4] = 1, 1  # 10 and 8 pixels, 8 shared: 16 / 18
    reference[0, 5, :4], prediction[0, 6, :4] = 2, 2  # nothing shared: 0
    reference[1, 0, :6], prediction[1, 0, 3:9] = 1, 1  # 6 and 6, 3 shared: 6 / 12
    for folder, maps in (("pred", prediction), ("ref", reference)):
        (tmp_path / folder).mkdir()
        for n, picture in enumerate(maps):
            Image.fromarray(picture).save(tmp_path / folder / f"i{n}.png")
    facts = run(tmp_path / "out", tmp_path / "pred", tmp_path / "ref")
    of_each = {name: metrics["dice"]["value"] for name, metrics in facts["per_class"].items()}
    assert of_each == pytest.approx({"class_1": (16 / 18 + 0.5 + 1) / 3, "class_2": (0 + 1 + 1) / 3})
    assert [row["dice"] for row in facts["per_image"]] == pytest.approx([8 / 18, 0.75, 1])
    assert facts["per_class"]["class_2"]["dice_non_empty"]["value"] == 0
    assert facts["metrics"]["dice_non_empty"]["value"] == pytest.approx((8 / 18 + 0.5) / 2)
    assert facts["empty_by_class"]["class_2"]["n_both_empty"] == 2
    assert facts["n_both_empty"] == 1


def test_classes_come_from_a_dataset_json(tmp_path: Path) -> None:
    prediction, reference = write_folders(tmp_path, label_maps(3, classes=3))
    described = {"labels": {"background": 0, "PZ": 1, "TZ": 2}}
    (reference / "dataset.json").write_text(json.dumps(described), encoding="utf-8")
    assert run(tmp_path / "out", prediction, reference)["classes"] == ["background", "PZ", "TZ"]


def test_a_mask_of_255_equals_one_of_1(tmp_path: Path) -> None:
    for folder, value in (("pred", 255), ("ref", 1)):
        (tmp_path / folder).mkdir()
        array = np.zeros((9, 9), np.uint8)
        array[2:6, 2:6] = value
        Image.fromarray(array).save(tmp_path / folder / "a.png")
    assert run(tmp_path / "out", tmp_path / "pred", tmp_path / "ref")["metrics"]["dice"]["value"] == 1


def test_arrays_without_geometry_are_measured_in_voxels(tmp_path: Path) -> None:
    for folder, shift in (("pred", 2), ("ref", 0)):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "a.npy", ball((9, 12, 12), (4, 5, 4 + shift), 3))
    facts = run(tmp_path / "out", tmp_path / "pred", tmp_path / "ref")
    assert facts["distance_unit"] == "voxels"
    assert facts["metrics"]["hd95"]["value"] == 2
    assert facts["metrics"]["volume_error_ml"]["value"] is None
    assert any("no geometry" in note for note in facts["notes"])


# --- which file is whose ---------------------------------------------------------------------------------------------


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def test_files_are_matched_by_name_in_all_layouts(tmp_path: Path) -> None:
    flat = touch(tmp_path / "flat", "a_segmentation.nii.gz", "b.nii.gz", "b_probabilities.nii.gz", "summary.json")
    tree = touch(tmp_path / "tree", "a/lesion.nii.gz", "a/t2.nii.gz", "b/lesion.nii.gz", "cases.csv")
    found = find_pairs(flat, tree)
    assert [(p.case_id, p.prediction.name, p.name) for p in found.pairs] == [
        ("a", "a_segmentation.nii.gz", "a/lesion.nii.gz"),
        ("b", "b.nii.gz", "b/lesion.nii.gz"),
    ]
    inferred = touch(tmp_path / "infer", "a/a_segmentation.nii.gz", "a/overlay.png", "b/b_segmentation.nii.gz")
    assert len(find_pairs(inferred, tree).pairs) == 2
    kept = touch(tmp_path / "eval", "predictions/a_segmentation.nii.gz", "predictions/b.nii.gz", "progress.png")
    assert len(find_pairs(kept, tree).pairs) == 2
    eyes = touch(tmp_path / "manual1", "Image_01L_1stHO.png"), touch(tmp_path / "manual2", "Image_01L_2ndHO.png")
    assert find_pairs(*eyes).pairs[0].case_id == "Image_01L"
    with pytest.raises(DataError) as caught:
        find_pairs(flat, touch(tmp_path / "odd", "a/t2.nii.gz", "a/adc.nii.gz"))
    assert caught.value.code == "label_ambiguous"
    assert find_pairs(flat, tmp_path / "odd", label="adc").pairs[0].name == "a/adc.nii.gz"


def test_a_label_names_references_and_predictions_only_where_they_have_it(tmp_path: Path) -> None:
    tree = touch(tmp_path / "tree", "a/zones.nii.gz", "a/t2.nii.gz", "b/zones.nii.gz", "c/other.nii.gz")
    inferred = touch(tmp_path / "infer", "a/a_segmentation.nii.gz", "b/zones.nii.gz", "b/b_segmentation.nii.gz")
    found = find_pairs(inferred, tree, label="zones")
    assert [(p.case_id, p.name) for p in found.pairs] == [("a", "a/zones.nii.gz"), ("b", "b/zones.nii.gz")]
    assert [p.prediction.name for p in found.pairs] == ["a_segmentation.nii.gz", "zones.nii.gz"]
    assert found.missing == found.extra == ()  # c has no such label map


def test_a_list_names_the_cases_to_be_evaluated(tmp_path: Path) -> None:
    tree = touch(tmp_path / "tree", *(f"{case}/lesion.nii.gz" for case in "abcd"))
    inferred = touch(tmp_path / "infer", *(f"{case}/{case}_segmentation.nii.gz" for case in "abx"))

    def listed(*ids: str) -> Path:
        path = tmp_path / "test.csv"
        path.write_text("\n".join(["patient_id", *ids]))
        return path

    found = find_pairs(inferred, tree, split_csv=listed("b", "c"))
    assert [pair.case_id for pair in found.pairs] == ["b"]
    assert [case for case, *_ in found.missing] == ["c"]
    assert found.extra == ("x/x_segmentation.nii.gz",)  # that of a is another case's, not nobody's
    with pytest.raises(DataError) as caught:
        find_pairs(inferred, tree, split_csv=listed("b", "e"))
    assert (caught.value.code, "e" in caught.value.where) == ("id_unknown", True)
    eyes = touch(tmp_path / "eyes", "1_left_1stHO.png", "1_right_1stHO.png")
    seen = touch(tmp_path / "seen", "1_left.png", "1_right.png")
    chosen = find_pairs(seen, eyes, split_csv=listed("images/1_left.jpg")).pairs
    assert [pair.reference.name for pair in chosen] == ["1_left_1stHO.png"]


def test_endings_of_label_maps() -> None:
    names = {"x_mask": "x", "21_manual1": "21", "Image_01L_1stHO": "Image_01L", "a-labels": "a", "plain": "plain"}
    assert {name: core_name(name) for name in names} == names


def test_what_has_no_partner_is_named_and_never_paired_by_position(tmp_path: Path) -> None:
    prediction = touch(tmp_path / "pred", "a.nii.gz", "c.nii.gz")
    reference = touch(tmp_path / "ref", "a.nii.gz", "b.nii.gz")
    found = find_pairs(prediction, reference)
    assert [pair.case_id for pair in found.pairs] == ["a"]
    assert [case for case, _, _ in found.missing] == ["b"]
    assert found.extra == ("c.nii.gz",)
    with pytest.raises(DataError) as caught:
        find_pairs(touch(tmp_path / "two", "a.nii.gz", "a_segmentation.nii.gz"), reference)
    assert caught.value.code == "case_twice"


# --- faults ----------------------------------------------------------------------------------------------------------


def test_a_missing_prediction_is_an_error_or_is_listed(
    folders: tuple[Path, Path], tmp_path: Path, medssl: Medssl
) -> None:
    write_folders(tmp_path, label_maps(5))
    (tmp_path / "pred" / "case1_segmentation.nii.gz").unlink()
    write_nifti(tmp_path / "pred" / "stranger.nii.gz", np.zeros(SHAPE, np.uint8))
    words = ["eval", "--predictions", tmp_path / "pred", "--reference", tmp_path / "ref", "--draws", "20"]
    result = medssl(*words, "--out", tmp_path / "stop")
    assert result.exit_code == 3
    assert "case1" in result.stderr
    assert not (tmp_path / "stop").exists()
    listed = medssl(*words, "--out", tmp_path / "skip", "--on-error", "skip", "--json")
    assert listed.exit_code == 4
    facts = json.loads(listed.stdout)
    assert (facts["n"], facts["n_failed"], facts["extra_predictions"]) == (4, 1, ["stranger.nii.gz"])
    (row,) = read_csv(tmp_path / "skip" / "failures.csv")
    assert row["case_id"] == "case1"


def test_grids_are_compared_first_and_both_values_are_told(tmp_path: Path, medssl: Medssl) -> None:
    prediction, reference = write_folders(tmp_path, label_maps(4))
    write_nifti(prediction / "case0_segmentation.nii.gz", np.zeros((20, 18, 9), np.uint8))
    write_nifti(prediction / "case2_segmentation.nii.gz", label_maps(4)[2][0], shift_mm=7.0)
    words = ["eval", "--predictions", prediction, "--reference", reference, "--draws", "20"]
    result = medssl(*words, "--out", tmp_path / "stop")
    assert result.exit_code == 3
    assert "20 x 18 x 9 and 20 x 18 x 8 voxels" in result.stderr
    assert "7.00 mm apart" in result.stderr
    skipped = medssl(*words, "--out", tmp_path / "skip", "--on-error", "skip")
    assert skipped.exit_code == 4
    rows = read_csv(tmp_path / "skip" / "failures.csv")
    assert [row["case_id"] for row in rows] == ["case0", "case2"]
    assert "different grids" in rows[0]["reason"]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    prediction, reference = write_folders(tmp_path, label_maps(3))
    file = prediction / "case1_segmentation.nii.gz"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DataError, match="cannot be compared") as caught:
        run(tmp_path / "out", prediction, reference)
    assert "case1" in str(caught.value)
    with pytest.raises(DataError, match="No case"):
        run(tmp_path / "none", touch(tmp_path / "bad", "case0.nii.gz"), reference / "case0.nii.gz", on_error="skip")


def test_unknown_values_are_refused(tmp_path: Path) -> None:
    prediction, reference = write_folders(tmp_path, label_maps(3, classes=4))
    with pytest.raises(DataError) as caught:
        run(tmp_path / "out", prediction, reference, classes=("one", "two"))
    assert caught.value.code == "label_values"
    assert "3" in caught.value.where


def test_classes_are_not_made_up_from_predictions(tmp_path: Path) -> None:
    square = np.zeros((24, 24), np.uint8)
    square[3:11, 3:11] = 255
    for folder, suffix in (("pred", "jpg"), ("ref", "png")):
        (tmp_path / folder).mkdir()
        Image.fromarray(square).save(tmp_path / folder / f"a.{suffix}")
    with pytest.raises(DataError) as caught:
        run(tmp_path / "out", tmp_path / "pred", tmp_path / "ref")
    assert caught.value.code == "label_values"
    assert "JPEG" in caught.value.fix
    prediction, reference = write_folders(tmp_path / "more", label_maps(3, classes=3))
    for file in reference.iterdir():
        write_nifti(file, (np.asarray(nib.load(file).dataobj) == 1).astype(np.uint8))
    with pytest.raises(DataError, match="no reference has"):
        run(tmp_path / "out", prediction, reference)
    named = run(tmp_path / "out", prediction, reference, classes=("gland", "lesion"))
    assert named["empty_by_class"]["lesion"]["n_false_alarm"] == 2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"task": "binary"}, "--task"),
        ({"split": "test"}, "--split"),
        ({"labels": Path("x.csv")}, "--labels"),
        ({"save_predictions": True}, "--save-predictions"),
        ({"device": "cpu"}, "--device"),
        ({"hd_empty": "zero"}, "--hd-empty zero"),
        ({"tolerance_mm": -1.0}, "--tolerance-mm"),
        ({"group_by": "a", "group_pattern": "b"}, "--group-pattern"),
    ],
)
def test_options_without_effect_are_refused(
    folders: tuple[Path, Path], tmp_path: Path, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        run(tmp_path / "out", *folders, **options)
    assert told in caught.value.where
    assert not (tmp_path / "out").exists()


def test_settings_without_effect_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        run(tmp_path / "out", *folders, threshold=0.4)
    assert caught.value.code == "threshold_needless"
    with pytest.raises(ConfigError) as caught:
        run(tmp_path / "out", *folders, overrides=("lesion_min_iou=0.2",))
    assert caught.value.code == "flags_without_effect"
    with pytest.raises(ConfigError, match="worst_case"):
        run(tmp_path / "out", *folders, overrides=("worst_case=3",))


def test_mask_options_are_refused_for_tables(tmp_path: Path) -> None:
    (tmp_path / "predictions.csv").write_text("case_id,prob\na,0.5\n", encoding="utf-8")
    request = EvaluateRequest(
        out=tmp_path / "out", predictions=tmp_path / "predictions.csv", lesions=True, hd_empty="nan", label="x"
    )
    with pytest.raises(ConfigError) as caught:
        evaluate(request)
    assert all(name in caught.value.where for name in ("--lesions", "--hd-empty", "--label"))


# --- probabilities and lesions ---------------------------------------------------------------------------------------


def test_probabilities_are_cut_at_the_threshold_and_give_lesions(tmp_path: Path) -> None:
    maps = []
    for n in range(4):
        reference = ball(SHAPE, (6, 8, 4), 3.2).astype(np.uint8) * (n < 2)
        probability = np.where(ball(SHAPE, (6, 8, 4), 3.2), 0.35 + 0.1 * n, 0.0)
        probability[ball(SHAPE, (15, 14, 1), 1.5)] = 0.3
        maps.append((probability.astype(np.float32), reference))
    prediction, reference = write_folders(tmp_path, maps, ending="")
    facts = run(tmp_path / "out", prediction, reference, threshold=0.4)
    assert (facts["threshold"], facts["threshold_source"]) == (0.4, "--threshold")
    assert [row["dice"] for row in facts["per_image"]] == pytest.approx([0, 1, 0, 0])
    lesions = facts["lesions"]["per_class"]["class_1"]
    assert (lesions["n_lesions"], lesions["n_found"], lesions["n_false_positives"]) == (2, 2, 6)
    # candidates by confidence: .65 and .55 are false, .45 and .35 find lesions, then four of .3
    assert lesions["metrics"]["average_precision"]["value"] == pytest.approx(0.5 * 1 / 3 + 0.5 * 2 / 4)
    assert lesions["metrics"]["auroc"]["value"] == 0
    assert lesions["metrics"]["sensitivity_at_0.5_fp"]["value"] == 1
    rows = read_csv(tmp_path / "out" / "lesions.csv")
    assert [row["kind"] for row in rows if row["case_id"] == "case0"] == ["found", "false_positive"]
    default = run(tmp_path / "half", prediction, reference)
    assert (default["threshold"], default["threshold_source"]) == (0.5, "0.5, as none was chosen")


def test_probabilities_beside_label_maps_give_the_lesions(tmp_path: Path) -> None:
    maps = label_maps(3)
    prediction, reference = write_folders(tmp_path, maps)
    for n, (label_map, _) in enumerate(maps):
        four_d = np.stack([1 - 0.7 * label_map, 0.7 * label_map], axis=-1).astype(np.float32)
        write_nifti(tmp_path / "prob" / f"case{n}_probabilities.nii.gz", four_d)
    facts = run(tmp_path / "out", prediction, reference, probabilities=tmp_path / "prob")
    assert facts["threshold"] is None
    assert [point["threshold"] for point in facts["lesions"]["per_class"]["class_1"]["froc"]] == pytest.approx([0.7])
    (tmp_path / "prob" / "case1_probabilities.nii.gz").unlink()
    with pytest.raises(DataError, match="without a prediction") as caught:
        run(tmp_path / "again", prediction, reference, probabilities=tmp_path / "prob")
    assert "no probabilities" in caught.value.where


def test_logits_are_no_probabilities(tmp_path: Path) -> None:
    reference = write_nifti(tmp_path / "ref" / "a.nii.gz", label_maps(1)[0][1])
    write_nifti(tmp_path / "pred" / "a.nii.gz", np.random.default_rng(0).normal(size=SHAPE).astype(np.float32))
    with pytest.raises(DataError) as caught:
        run(tmp_path / "out", tmp_path / "pred", reference.parent)
    assert caught.value.code == "probability_values"


# --- groups and another run ------------------------------------------------------------------------------------------


def test_patients_come_from_the_tables_or_the_pattern(tmp_path: Path) -> None:
    prediction, reference = write_folders(tmp_path, label_maps(6))
    alone = run(tmp_path / "alone", prediction, reference)
    assert (alone["n_groups"], alone["group_by"]) == (6, "case_id")
    assert any("No patients are known" in note for note in alone["notes"])
    by_pattern = run(tmp_path / "pattern", prediction, reference, group_pattern=r"case[0-2]|case")
    assert by_pattern["n_groups"] == 4
    text = "case_id,patient_id,site\n" + "".join(f"case{n},p{n // 2},{'AB'[n % 2]}\n" for n in range(6))
    table = tmp_path / "extra.csv"
    table.write_text(text, encoding="utf-8")
    grouped = run(tmp_path / "grouped", prediction, reference, subgroups=table, subgroup=("site",))
    assert (grouped["n_groups"], grouped["group_by"]) == (3, "patient_id")
    assert [(group["value"], group["n"]) for group in grouped["subgroups"]["site"]] == [("A", 3), ("B", 3)]
    assert "fewer than 10" in grouped["subgroups"]["site"][0]["reason"]
    (reference / "cases.csv").write_text(text, encoding="utf-8")
    assert run(tmp_path / "owners", prediction, reference)["n_groups"] == 3
    by_site = run(tmp_path / "site", prediction, reference, group_by="site")
    assert (by_site["n_groups"], by_site["group_by"]) == (2, "site")


def test_intervals_are_over_patients(tmp_path: Path) -> None:
    """One patient with many slices: of two patients the interval reaches from one to the other."""
    square = np.full((8, 8), 255, np.uint8)
    for name, prediction in [*((f"a_slice_{n}", square) for n in range(9)), ("b_slice_0", np.zeros((8, 8), np.uint8))]:
        for folder, array in (("pred", prediction), ("ref", square)):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(array).save(tmp_path / folder / f"{name}.png")
    metric = run(tmp_path / "out", tmp_path / "pred", tmp_path / "ref", draws=200)["metrics"]["dice"]
    assert (metric["value"], metric["ci_low"], metric["ci_high"]) == (0.9, 0.0, 1.0)


def test_another_run_is_compared_by_a_paired_permutation(tmp_path: Path) -> None:
    maps = label_maps(6)
    prediction, reference = write_folders(tmp_path, maps)
    run(tmp_path / "first", prediction, reference)
    better, _ = write_folders(tmp_path / "perfect", [(r, r) for _, r in maps])
    facts = run(tmp_path / "second", better, reference, compare=tmp_path / "first", draws=100)
    test = facts["comparison"]["tests"]["dice"]
    dices = np.array([float(dice(*counts(p == 1, r == 1)[:3])) for p, r in maps])
    assert test["difference"] == pytest.approx((1 - dices).mean())
    # exact: of 64 swaps a difference this large needs the three cases that differ to stay together, either way
    assert test["p"] == pytest.approx(2 * 2**3 / 64)
    present = [bool((r == 1).any()) for _, r in maps]
    filled = facts["comparison"]["tests"]["dice_non_empty"]
    assert filled["n"] == sum(present) < len(maps)
    assert filled["difference"] == pytest.approx((1 - dices)[present].mean())
    with pytest.raises(DataError) as caught:
        run(tmp_path / "third", *write_folders(tmp_path / "other", label_maps(5)), compare=tmp_path / "first")
    assert caught.value.code == "comparison_differs"
    with pytest.raises(DataError) as caught:
        run(tmp_path / "fourth", better, reference, compare=tmp_path)
    assert caught.value.code == "evaluation_missing"


# --- files and streams -----------------------------------------------------------------------------------------------


def test_the_report_shows_the_worst_cases_and_needs_nothing_else(evaluated: tuple[Path, dict[str, Any]]) -> None:
    out, facts = evaluated
    assert [case["case_id"] for case in facts["worst_cases"]] == ["case2", "case1", "case0", "case3", "case4"]
    page = (out / "report.html").read_text(encoding="utf-8")
    for heading in ("Result", "Mean and standard deviation", "Empty masks", "Lesions", "Cases with the lowest Dice"):
        assert f">{heading}</h2>" in page
    assert page.count("data:image/jpeg") == 5
    assert "http://" not in page.replace("http://www.w3.org", "")
    shown = {entry.name for entry in out.iterdir() if not entry.name.startswith(".")}
    assert shown == {"metrics.json", "per_case.csv", "lesions.csv", "report.html"}


def test_a_hostile_name_is_escaped(tmp_path: Path) -> None:
    name = "<script>alert(1)<"
    for folder in ("pred", "ref"):
        write_nifti(tmp_path / folder / f"{name}.nii.gz", label_maps(2)[0][0])
    run(tmp_path / "out", tmp_path / "pred", tmp_path / "ref")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page


def test_the_same_numbers_come_out_again(folders: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = (run(tmp_path / name, *folders) for name in ("a", "b"))
    for facts in (first, second):
        for key in ("started_at", "elapsed_s", "provenance"):
            facts.pop(key)
    assert first == second
    assert (tmp_path / "a" / "per_case.csv").read_bytes() == (tmp_path / "b" / "per_case.csv").read_bytes()


def test_results_of_another_kind_are_replaced_whole(folders: tuple[Path, Path], tmp_path: Path) -> None:
    run(tmp_path / "out", *folders, lesions=True)
    assert (tmp_path / "out" / "lesions.csv").is_file()
    run(tmp_path / "out", *folders)
    assert not (tmp_path / "out" / "lesions.csv").exists()


def test_r18_one_case_is_in_memory_at_a_time(tmp_path: Path) -> None:
    import tracemalloc

    shape = (96, 96, 96)
    structure = ball(shape, (48, 48, 48), 8).astype(np.uint8)

    def peak(n: int) -> int:
        for case in range(n):
            for folder, shift in (("pred", case % 3), ("ref", 0)):
                write_nifti(tmp_path / str(n) / folder / f"c{case}.nii", np.roll(structure, shift, axis=1))
        tracemalloc.start()
        run(
            tmp_path / str(n) / "out",
            tmp_path / str(n) / "pred",
            tmp_path / str(n) / "ref",
            overrides=("worst_cases=0",),
        )
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(1)  # what is imported once
    few, many = peak(2), peak(7)
    assert many < few + 2 * 96**3, "5 more cases are 10 volumes of a byte a voxel"


def test_command_prints_the_numbers(folders: tuple[Path, Path], tmp_path: Path, medssl: Medssl) -> None:
    result = medssl(
        "eval", "--predictions", folders[0], "--reference", folders[1], "--draws", "20", "--tolerance-mm", "1.5",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 0
    assert "Dice" in result.stdout
    assert "surface Dice at 1.5 mm" in result.stdout
    assert "report:" in result.stdout
