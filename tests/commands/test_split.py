import csv
import itertools
import json
import re
from pathlib import Path

import pytest
from sklearn.model_selection import train_test_split
from typer.testing import CliRunner

from medssl_cli.app import app
from medssl_cli.core.run import locked
from medssl_cli.data.manifest import read_ids, split_digest

PARTS = ("train", "val", "test")


def medssl(*words: object) -> tuple[int, str, str]:
    answer = CliRunner().invoke(app, ["split", *map(str, words)])
    return answer.exit_code, answer.stdout, answer.stderr


def tree(root: Path, n: int) -> Path:
    for i in range(n):
        (root / f"{i:03d}").mkdir(parents=True)
    return root


def rows(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_p08_case_tree(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", 40)
    code, out, _ = medssl(root, "--out", tmp_path / "split")
    assert code == 0, out
    train, held = train_test_split([f"{i:03d}" for i in range(40)], test_size=0.30, random_state=42)
    val, test = train_test_split(held, test_size=0.5, random_state=42)
    for name, ids in zip(PARTS, (train, val, test), strict=True):
        assert rows(tmp_path / "split" / f"{name}.csv") == [["patient_id"], *([i] for i in sorted(ids))]
        assert read_ids(tmp_path / "split" / f"{name}.csv").ids == tuple(sorted(ids))
    summary = json.loads((tmp_path / "split" / "split_summary.json").read_text())
    assert summary["counts"] == {"train": 28, "val": 6, "test": 6}
    assert (summary["group_by"], summary["seed"], summary["command"]) == ("case", 42, "split")
    assert summary["sha256"]["val"] == split_digest(val)
    assert "kept together by case" in out
    before = (tmp_path / "split" / "train.csv").read_bytes()
    assert medssl(root, "--out", tmp_path / "split", "--ratios", 0.7, 0.15, 0.15)[0] == 0
    assert (tmp_path / "split" / "train.csv").read_bytes() == before


def test_a_part_without_share_has_no_file(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", 10)
    assert medssl(root, "--out", tmp_path / "s")[0] == 0
    code, out, _ = medssl(root, "--out", tmp_path / "s", "--ratios", 0.8, 0.2, 0, "--overwrite")
    assert code == 0
    assert "test.csv" not in out
    assert sorted(p.name for p in (tmp_path / "s").glob("*.csv")) == ["train.csv", "val.csv"]


def test_split_inside_the_tree_is_no_case(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", 10)
    for _ in range(2):
        assert medssl(root, "--out", root / "split")[0] == 0
    assert json.loads((root / "split/split_summary.json").read_text())["n_items"] == 10


def test_folds_leave_the_test_part_alone(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", 20)
    assert medssl(root, "--out", tmp_path / "s", "--folds", 5)[0] == 0
    assert medssl(root, "--out", tmp_path / "s", "--folds", 3, "--overwrite")[0] == 0
    assert sorted(p.name for p in (tmp_path / "s").glob("fold_*")) == ["fold_0", "fold_1", "fold_2"]
    pairs = json.loads((tmp_path / "s/splits_final.json").read_text())
    test = set(read_ids(tmp_path / "s/test.csv").ids)
    assert sorted(i for pair in pairs for i in pair["val"]) == sorted({f"{i:03d}" for i in range(20)} - test)
    for k, pair in enumerate(pairs):
        assert list(read_ids(tmp_path / f"s/fold_{k}/train.csv").ids) == pair["train"]
        assert not set(pair["train"]) & (set(pair["val"]) | test)
    assert medssl(root, "--out", tmp_path / "s", "--overwrite")[0] == 0
    assert not (tmp_path / "s/splits_final.json").exists()
    assert not (tmp_path / "s/fold_0").exists()


def test_table_keeps_its_columns_and_patients(tmp_path: Path, real_data: Path) -> None:
    source = real_data / "picai_labels_subset/marksheet.csv"
    code, out, err = medssl(source, "--out", tmp_path / "s", "--stratify", "case_csPCa", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["group_by"] == "patient_id"
    assert document["prevalence"]["test"]["case_csPCa=YES"] == pytest.approx(0.28, abs=0.01)
    theirs = rows(source)
    ours = [rows(tmp_path / "s" / f"{name}.csv") for name in PARTS]
    assert all(part[0] == [*theirs[0], "split"] for part in ours)
    assert sorted(row[:-1] for part in ours for row in part[1:]) == sorted(theirs[1:])
    assert [{row[-1] for row in part[1:]} for part in ours] == [{name} for name in PARTS]
    patients = [{row[0] for row in part[1:]} for part in ours]
    assert not any(a & b for a, b in itertools.combinations(patients, 2))
    assert document["sha256"]["test"] == split_digest(patients[2])


def test_image_tree_by_group_pattern(tmp_path: Path, real_data: Path) -> None:
    source = real_data / "fundus_dr_grading"
    options = ("--group-pattern", r"(Patient\d+)_", "--stratify", "dr_grade", "--labels", source / "labels.csv")
    code, _, err = medssl(source / "images", "--out", tmp_path / "s", *options)
    assert code == 0, err
    groups = [{row[1] for row in rows(tmp_path / "s" / f"{name}.csv")[1:]} for name in PARTS]
    names = [{row[0][:10] for row in rows(tmp_path / "s" / f"{name}.csv")[1:]} for name in PARTS]
    assert groups == names
    assert not any(a & b for a, b in itertools.combinations(names, 2))
    assert sum(map(len, names)) == 188


def test_cases_csv_gives_the_patients(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", 20)
    lines = [f"{i:03d},p{i // 2},1.{i},ax_t2wi" for i in range(20)]
    (root / "cases.csv").write_text("case_id,patient_id,study_uid,stem\n" + "\n".join(lines) + "\n")
    code, out, _ = medssl(root, "--out", tmp_path / "s", "--json")
    assert code == 0
    assert (json.loads(out)["group_by"], json.loads(out)["n_groups"]) == ("patient_id", 10)
    sides = [{int(row[0]) // 2 for row in rows(tmp_path / "s" / f"{name}.csv")[1:]} for name in PARTS]
    assert not any(a & b for a, b in itertools.combinations(sides, 2))
    text = (root / "cases.csv").read_text().replace("patient_id", "nothing")
    (root / "cases.csv").write_text(text)
    assert json.loads(medssl(root, "--out", tmp_path / "s", "--overwrite", "--json")[1])["group_by"] == "study_uid"


def test_labels_csv_of_the_tree_gives_patients_and_strata(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", 20)
    lines = [f"{i:03d},p{i // 2},{i // 2 % 2}" for i in range(20)]
    text = "case_id,patient_id,label\n" + "\n".join(lines) + "\n"
    (root / "labels.csv").write_text(text)
    code, out, err = medssl(root, "--out", tmp_path / "s", "--stratify", "label", "--json")
    assert code == 0, err
    assert (json.loads(out)["group_by"], json.loads(out)["n_groups"]) == ("patient_id", 10)
    (root / "labels.csv").rename(tmp_path / "labels.csv")
    code, out, _ = medssl(root, "--out", tmp_path / "t", "--labels", tmp_path / "labels.csv", "--json")
    assert json.loads(out)["n_groups"] == 10
    (tmp_path / "labels.csv").write_text("\n".join(text.splitlines()[:4]))
    code, out, _ = medssl(root, "--out", tmp_path / "t", "--labels", tmp_path / "labels.csv", "--overwrite")
    assert "17 cases are in no table of patients" in out


def test_labels_of_a_tree(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", 20)
    labels = tmp_path / "labels.csv"
    labels.write_text("patient_id,label,site\n" + "".join(f"{i:03d},{i % 2},{i // 4}\n" for i in range(20)))
    options = ("--out", tmp_path / "s", "--labels", labels)
    code, out, _ = medssl(root, *options, "--stratify", "label", "--group-by", "site", "--json")
    assert code == 0
    assert json.loads(out)["prevalence"]["train"] == {"label=0": 0.5, "label=1": 0.5}
    assert json.loads(out)["n_groups"] == 5
    labels.write_text("patient_id,label\n000,1\n")
    code, _, err = medssl(root, *options, "--stratify", "label")
    assert code == 3
    assert "19 of 20 cases have no row" in err


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (["--ratios", "0.7", "0.2", "0.2"], 2, "sum is 1.1"),
        (["--group-by", "site", "--group-pattern", "x"], 2, "not from both"),
        (["--stratify", "label"], 2, "--labels"),
        (["--folds", "1"], 2, "Folds"),
        (["--folds", "50"], 3, "too few groups"),
        (["--group-pattern", "("], 2, "regular expression"),
        (["--group-pattern", "(x)"], 3, "does not match"),
        (["--labels", "nowhere.csv"], 3, "cannot be read"),
    ],
)
def test_faults_have_their_code_and_write_nothing(tmp_path: Path, options: list[str], code: int, text: str) -> None:
    root = tree(tmp_path / "data", 12)
    found, _, err = medssl(root, "--out", tmp_path / "s", *options)
    assert found == code, err
    assert text in err
    assert "fix:" in err
    assert not (tmp_path / "s").exists()


def test_measurements_are_no_strata(tmp_path: Path, real_data: Path) -> None:
    source = real_data / "picai_labels_subset/marksheet.csv"
    code, _, err = medssl(source, "--out", tmp_path / "s", "--stratify", "mri_date")
    assert code == 3
    assert "cannot be spread evenly" in err
    code, _, err = medssl(source, "--out", tmp_path / "s", "--stratify", "case_csPC")
    assert code == 3
    assert "'case_csPCa'" in err


def test_foreign_folder_is_kept(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", 12)
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "thesis.txt").write_text("mine")
    code, _, err = medssl(root, "--out", tmp_path / "s")
    assert code == 2
    assert "--overwrite" in err
    assert (tmp_path / "s" / "thesis.txt").exists()
    with locked(tmp_path / "s", "output folder"):
        code, _, err = medssl(root, "--out", tmp_path / "s", "--overwrite")
        assert code == 2
        assert "Another process" in err
        assert (tmp_path / "s" / "thesis.txt").exists()
    assert medssl(root, "--out", tmp_path / "s", "--overwrite")[0] == 0
    assert not (tmp_path / "s" / "thesis.txt").exists()


def test_overwrite_never_deletes_what_is_split(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", 12)
    (tmp_path / "tables").mkdir()
    labels = tmp_path / "tables/labels.csv"
    labels.write_text("patient_id,label\n" + "".join(f"{case.name},1\n" for case in root.iterdir()))
    before = sorted(tmp_path.rglob("*"))
    for words in ((root, "--out", root), (root, "--out", tmp_path), (labels, "--out", labels.parent)):
        code, _, err = medssl(*words, "--overwrite")
        assert code == 2, err
        assert "more than old results" in err
    code, _, err = medssl(root, "--labels", labels, "--stratify", "label", "--out", labels.parent, "--overwrite")
    assert code == 2
    assert str(labels) in err
    assert sorted(tmp_path.rglob("*")) == before


def test_another_split_is_not_replaced_unasked(tmp_path: Path) -> None:
    root, out = tree(tmp_path / "data", 20), tmp_path / "s"
    assert medssl(root, "--out", out)[0] == 0
    before = {path.name: path.read_bytes() for path in out.glob("*.csv")}
    code, _, err = medssl(root, "--out", out, "--seed", 1)
    assert code == 2
    digest = split_digest(i for [i] in rows(out / "train.csv")[1:])[:12]
    for word in ("seed 42", digest, "--out", "--overwrite"):
        assert word in err
    assert {path.name: path.read_bytes() for path in out.glob("*.csv")} == before
    assert medssl(root, "--out", out)[0] == 0  # the same ids
    assert medssl(root, "--out", out, "--folds", 3)[0] == 0  # more lists, none of them changed
    code, _, err = medssl(root, "--out", out)
    assert (code, "fold_0/train.csv" in err) == (2, True)  # a list would go
    assert medssl(root, "--out", out, "--seed", 1, "--overwrite")[0] == 0
    assert {path.name: path.read_bytes() for path in out.glob("*.csv")} != before
    (out / "train.csv").write_text("")
    assert medssl(root, "--out", out, "--seed", 1)[0] == 2


def test_the_same_split_of_a_table_may_be_written_again(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("series_uid,patient_id,label\n" + "".join(f"s{i},p{i // 2},{i % 3}\n" for i in range(40)))
    for _ in range(2):
        code, _, err = medssl(table, "--out", tmp_path / "s")
        assert code == 0, err
    assert medssl(table, "--out", tmp_path / "s", "--seed", 1)[0] == 2


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ([f"Patient{i:03d}{side}" for i in range(20) for side in ("_L", "-R")], "left and right"),
        ([f"P{i}_{n}" for i in range(20) for n in (1, 2)], "a last number"),
        ([f"img_{i:03d}" for i in range(20)], ""),
        ([f"{kind}_{i}" for kind in ("glioma", "normal") for i in range(20)], ""),
    ],
)
def test_names_that_share_a_patient_are_told(tmp_path: Path, names: list[str], told: str) -> None:
    (tmp_path / "images").mkdir()
    for name in names:
        (tmp_path / f"images/{name}.jpg").touch()
    code, out, err = medssl(tmp_path / "images", "--out", tmp_path / "s")
    assert code == 0, err
    if not told:
        assert "--group-pattern" not in out
        return
    assert told in out
    pattern = re.search(r"--group-pattern '([^']+)'", out)
    assert pattern is not None
    code, out, err = medssl(tmp_path / "images", "--out", tmp_path / "t", "--group-pattern", pattern[1])
    assert "40 cases in 20 groups" in out, err


def test_other_layouts_are_split_by_their_cases(tmp_path: Path) -> None:
    root = tmp_path / "Dataset001_P"
    for folder, numbers in (("imagesTr", range(10)), ("imagesTs", range(90, 93))):
        (root / folder).mkdir(parents=True)
        for i in numbers:
            (root / folder / f"c{i:02d}_0000.nii.gz").write_bytes(b"")
    (root / "dataset.json").write_text('{"channel_names": {"0": "CT"}, "file_ending": ".nii.gz"}')
    code, out, err = medssl(root, "--out", tmp_path / "s")
    assert code == 0, err
    assert "3 cases of the layout's own test set are left out" in out
    written = [row[0] for name in PARTS for row in rows(tmp_path / f"s/{name}.csv")[1:]]
    assert sorted(written) == [f"c{i:02d}" for i in range(10)]
    (root / "labels.csv").write_text("case_id,patient_id\n" + "".join(f"c{i:02d},p{i // 2}\n" for i in range(10)))
    assert medssl(root, "--out", tmp_path / "t")[0] == 0
    sides = [{int(row[0][1:]) // 2 for row in rows(tmp_path / f"t/{name}.csv")[1:]} for name in PARTS]
    assert not any(a & b for a, b in itertools.combinations(sides, 2))


def test_gliomas_are_stratified_by_their_grade(tmp_path: Path) -> None:
    labels = ["Patient,WHO2021_Int"]
    for i in range(20):
        folder = tmp_path / f"g/train/{i:04d}/preop"
        folder.mkdir(parents=True)
        (folder / f"sub-{i:04d}_ses-preop_space-sri_t1.nii.gz").write_bytes(b"")
        labels.append(f"{i:04d},{4 if i % 4 else 2}")
    (tmp_path / "g/phenoData.csv").write_text("\n".join(labels) + "\n")
    code, _, err = medssl(tmp_path / "g", "--out", tmp_path / "s", "--stratify", "label", "--ratios", 0.8, 0.2, 0)
    assert code == 0, err
    grades = [int(row[0]) % 4 == 0 for row in rows(tmp_path / "s/val.csv")[1:]]
    assert (len(grades), sum(grades)) == (4, 1)


def test_a_template_is_split_by_its_cases(tmp_path: Path) -> None:
    for i in range(10):
        (tmp_path / f"d/site{i % 2}/P{i}").mkdir(parents=True)
        (tmp_path / f"d/site{i % 2}/P{i}/t2.nii.gz").write_bytes(b"")
    words = ("--template", "{dataset}/{subject}/{sequence}.nii.gz", "--out", tmp_path / "s")
    assert medssl(tmp_path / "d", *words)[0] == 0
    written = [row[0] for name in PARTS for row in rows(tmp_path / f"s/{name}.csv")[1:]]
    assert sorted(written) == sorted(f"site{i % 2}/P{i}" for i in range(10))
    code, _, err = medssl(tmp_path / "d", "--layout", "template", "--out", tmp_path / "t")
    assert code == 2
    assert "{sequence}" in err
