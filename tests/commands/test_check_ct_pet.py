"""``check-data --task ct-pet`` names every bad file of a data set at once, and finds what leaks between its parts."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from medssl_cli.app import app

SIDE = 24


def medssl(*words: object) -> tuple[int, str, str]:
    answer = CliRunner().invoke(app, ["check-data", *map(str, words), "--task", "ct-pet", "--workers", "1"])
    return answer.exit_code, answer.stdout, answer.stderr


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def write_slice(folder: Path, name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for kind in ("CT", "PET"):
        save(folder / kind / name, rng.integers(0, 256, (SIDE, SIDE), dtype=np.uint8))
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[4:9, 6:12] = 255
    save(folder / "masks" / name, mask)


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    for patient in range(4):
        for number in range(2):
            write_slice(tmp_path / "data", f"p{patient}_slice_{number}.png", 2 * patient + number)
    return tmp_path / "data"


def report(folder: Path) -> dict:
    return json.loads((folder / "check_data.json").read_text())


def found(folder: Path, severity: str = "errors") -> list[tuple[str, str]]:
    return [(entry["code"], entry["case_id"]) for entry in report(folder)[severity]]


def test_a_good_data_set(flat: Path, tmp_path: Path) -> None:
    code, out, err = medssl(flat, "--out", tmp_path / "out")
    assert code == 0, err
    assert "8 of 8 cases without error (ct-pet)" in out
    facts = report(tmp_path / "out")
    assert (facts["errors"], facts["warnings"], facts["infos"]) == ([], [], [])
    assert (facts["layout"], facts["n_patients"], facts["n_with_lesion"]) == ("flat", 4, 8)
    assert (facts["sequences"], facts["splits"]) == (["CT", "PET"], {})
    html = (tmp_path / "out/check_data.html").read_text()
    assert html.count("data:image/jpeg") == 8
    assert "30 pixels of lesion" in html
    assert "the third is the mask" in html
    assert not (tmp_path / "out/failures.csv").exists()


def test_all_bad_files_are_told_at_once(flat: Path, tmp_path: Path) -> None:
    (flat / "PET/p0_slice_0.png").unlink()
    (flat / "CT/p0_slice_1.png").write_bytes(b"no picture")
    save(flat / "masks/p1_slice_0.png", np.full((SIDE, SIDE), 3, np.uint8))
    save(flat / "masks/p1_slice_1.png", np.zeros((SIDE, SIDE + 1), np.uint8))
    save(flat / "PET/p2_slice_0.png", np.full((SIDE, SIDE), 9, np.uint8))
    write_slice(flat, "nobody.png", 99)
    code, out, err = medssl(flat, "--out", tmp_path / "out")
    assert code == 3
    assert sorted(found(tmp_path / "out")) == [
        ("image_constant", "p2_slice_0.png"),
        ("image_unreadable", "p0_slice_1.png"),
        ("mask_values", "p1_slice_0.png"),
        ("partner_missing", "p0_slice_0.png"),
        ("patient_unknown", "nobody.png"),
        ("size_mismatch", "p1_slice_1.png"),
    ]
    by_code = {entry["code"]: entry for entry in report(tmp_path / "out")["errors"]}
    assert by_code["partner_missing"]["path"].endswith("PET/p0_slice_0.png")
    assert "3 (576 px)" in by_code["mask_values"]["message"]
    assert "mask 25 x 24" in by_code["size_mismatch"]["message"]
    assert report(tmp_path / "out")["n_ok"] == 3
    assert "6 errors in 6 of 9 cases" in err
    assert "--fix-csv" not in err
    assert "error mask_values p1_slice_0.png: " in out
    with (tmp_path / "out/failures.csv").open(newline="") as file:
        assert len(list(csv.reader(file))) == 7
    assert medssl(flat, "--on-error", "skip")[0] == 4


def test_a_threshold_and_a_pattern_mend_what_they_are_for(flat: Path) -> None:
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[:3] = 128
    save(flat / "masks/p1_slice_0.png", mask)
    write_slice(flat, "q7-1.png", 99)
    assert medssl(flat)[0] == 3
    assert medssl(flat, "--mask-threshold", "0")[0] == 3
    code, _, err = medssl(flat, "--mask-threshold", "0", "--patient-regex", r"^([pq]\d)")
    assert code == 0, err
    code, _, err = medssl(flat, "--patient-regex", "p")
    assert code == 2
    assert "no group" in err


def split_of(flat: Path, root: Path) -> Path:
    for file in sorted(flat.glob("*/*.png")):
        part = "val" if file.name.startswith("p3") else "train"
        (root / part / file.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, root / part / file.parent.name / file.name)
    return root


def test_what_leaks_between_parts_is_an_error(flat: Path, tmp_path: Path) -> None:
    tree = split_of(flat, tmp_path / "tree")
    assert medssl(tree, "--out", tmp_path / "out")[0] == 0
    assert report(tmp_path / "out")["splits"] == {"train": 6, "val": 2}
    for kind in ("CT", "PET", "masks"):
        shutil.copy(tree / "train" / kind / "p0_slice_0.png", tree / "val" / kind / "new_slice_0.png")
        shutil.copy(tree / "train" / kind / "p1_slice_0.png", tree / "val" / kind / "p1_slice_9.png")
        shutil.copy(tree / "train" / kind / "p2_slice_0.png", tree / "train" / kind / "p2_slice_8.png")
    code, _, err = medssl(tree, "--out", tmp_path / "out", "--on-error", "skip")
    assert code == 3, err
    errors = found(tmp_path / "out")
    assert {case for code, case in errors if code == "patient_across_splits"} == {
        "train/p1_slice_0.png",
        "train/p1_slice_1.png",
        "val/p1_slice_9.png",
    }
    assert {case for code, case in errors if code == "duplicate_across_splits"} == {
        "train/p0_slice_0.png",
        "train/p1_slice_0.png",
        "val/new_slice_0.png",
        "val/p1_slice_9.png",
    }
    assert len(errors) == 3 + 2 * 4  # CT and PET of each copy
    assert set(found(tmp_path / "out", "warnings")) == {
        ("duplicate_content", "train/p2_slice_0.png"),
        ("duplicate_content", "train/p2_slice_8.png"),
    }


def test_pet_that_is_a_copy_of_ct_is_told(flat: Path, tmp_path: Path) -> None:
    shutil.copy(flat / "CT/p0_slice_0.png", flat / "PET/p0_slice_0.png")
    assert medssl(flat, "--out", tmp_path / "out")[0] == 0
    assert set(found(tmp_path / "out", "warnings")) == {("duplicate_within_case", "p0_slice_0.png")}


def test_masks_without_any_lesion_and_dark_pictures_are_told(flat: Path, tmp_path: Path) -> None:
    for file in (flat / "masks").iterdir():
        save(file, np.zeros((SIDE, SIDE), np.uint8))
    save(flat / "CT/p0_slice_0.png", np.arange(SIDE * SIDE, dtype=np.uint16).reshape(SIDE, SIDE))
    assert medssl(flat, "--out", tmp_path / "out")[0] == 3
    assert found(tmp_path / "out") == [("lesion_none", "")]
    assert found(tmp_path / "out", "warnings") == [("range_unused", "p0_slice_0.png")]


def test_pclt20k_and_its_strange_names(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for patient in ("0001", "0002"):
        for kind in ("CT", "PET"):
            image = rng.integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
            save(tmp_path / f"data/{patient}/{patient}_001_{kind}.png", image)
        save(tmp_path / f"data/{patient}/{patient}_001_mask.png", np.tri(SIDE, dtype=np.uint8))
    for dataset_type in ("auto", "pclt"):
        assert medssl(tmp_path / "data", "--dataset-type", dataset_type, "--out", tmp_path / "out")[0] == 0
    assert report(tmp_path / "out")["layout"] == "pclt20k"
    save(tmp_path / "data/0001/scan.png", np.zeros((SIDE, SIDE), np.uint8))
    assert medssl(tmp_path / "data", "--out", tmp_path / "out")[0] == 3
    assert found(tmp_path / "out") == [("pclt_name", "")]
    assert medssl(tmp_path / "data", "--dataset-type", "flat")[0] == 3


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (("--task", "ct-pet", "--sequences", "ct"), "--sequences with --task ct-pet"),
        (("--task", "ct-pet", "--stats", "--roi", "x"), "--roi, --stats with --task ct-pet"),
        (("--task", "ct-pet", "--fix-csv", "good.csv"), "--fix-csv"),
        (("--mask-threshold", "3"), "--mask-threshold without --task"),
        (("--task", "images", "--patient-regex", "(a)"), "--patient-regex with --task images"),
    ],
)
def test_options_that_would_do_nothing_are_refused(flat: Path, words: tuple[str, ...], where: str) -> None:
    answer = CliRunner().invoke(app, ["check-data", str(flat), *words])
    assert answer.exit_code == 2
    assert where in re.sub(r"\s+", " ", answer.stderr)


def test_json_is_one_document_and_the_source_stays(flat: Path) -> None:
    before = {path: path.read_bytes() for path in flat.rglob("*.png")}
    code, out, _ = medssl(flat, "--json")
    assert code == 0
    assert json.loads(out)["n_cases"] == 8
    assert {path: path.read_bytes() for path in flat.rglob("*.png")} == before


def test_real_slices(real_data: Path, tmp_path: Path) -> None:
    root = real_data / "sts_ct_pet_png"
    code, _, err = medssl(root, "--patient-regex", r"(STS_\d+)_", "--out", tmp_path / "out")
    assert code == 0, err
    facts = report(tmp_path / "out")
    assert (facts["n_cases"], facts["n_patients"], facts["n_with_lesion"]) == (186, 31, 155)


@pytest.mark.slow
def test_workers_change_nothing(real_data: Path, tmp_path: Path) -> None:
    words = [real_data / "sts_ct_pet_png", "--patient-regex", r"(STS_\d+)_", "--json", "--task", "ct-pet", "--workers"]
    answers = [CliRunner().invoke(app, ["check-data", *map(str, words), str(n)]) for n in (1, 2)]
    alone, together = (json.loads(answer.stdout) for answer in answers)
    for facts in (alone, together):
        del facts["started_at"], facts["elapsed_s"]
    assert alone == together
