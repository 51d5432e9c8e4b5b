"""Labelled cases: which ones, of which class, in which part, and no patient on two sides."""

from __future__ import annotations

import csv
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from medssl_cli.core.errors import ConfigError, DataError
from medssl_cli.data.datasets import DataConfig
from medssl_cli.services.labelled_data import EvaluationConfig, count_seen, read_labelled_data
from medssl_cli.services.training_data import read_training_data


def config(**values: Any) -> EvaluationConfig:
    return EvaluationConfig(**{"eval_period_iterations": 1, "target": "label", **values})


def rows_of(root: Path) -> dict[str, dict[str, str]]:
    with (root / "labels.csv").open(newline="", encoding="utf-8") as file:
        return {row["case_id"]: row for row in csv.DictReader(file)}


def write_list(path: Path, ids: list[str]) -> str:
    path.write_text("case_id\n" + "".join(f"{name}\n" for name in ids), encoding="utf-8")
    return str(path)


def test_labels_come_from_the_table_and_patients_stay_together(labelled_tree: Path) -> None:
    found = read_labelled_data(config(), DataConfig(root=str(labelled_tree)))
    rows = rows_of(labelled_tree)
    assert found.classes == ("0", "1")
    assert {case.case_id for case in found.cases} == rows.keys()
    assert all(case.label == rows[case.case_id]["label"] for case in found.cases)
    assert all(case.patient_id == rows[case.case_id]["patient_id"] for case in found.cases)
    patients = {name: {case.patient_id for case in part} for name, part in found.parts.items()}
    assert patients.keys() == {"train", "val"}
    assert not patients["train"] & patients["val"]
    assert len(found.parts["train"]) == pytest.approx(0.7 * 16, abs=2)
    assert all(all(of.values()) for of in found.counts().values())
    assert (found.division, found.group_level) == ("70 to 30 by patient_id, seed 42", "patient_id")
    again = read_labelled_data(config(), DataConfig(root=str(labelled_tree)))
    assert again == found


def test_c_is_chosen_on_a_tenth_of_the_training_cases_and_whole_patients(labelled_tree: Path) -> None:
    found = read_labelled_data(config(), DataConfig(root=str(labelled_tree)))
    train = found.parts["train"]
    assert found.held < {case.case_id for case in train}
    held = {case.patient_id for case in train if case.case_id in found.held}
    rest = {case.patient_id for case in train if case.case_id not in found.held}
    assert held
    assert not held & rest


def test_the_run_trains_on_some_of_them_and_that_is_counted(labelled_tree: Path, tmp_path: Path) -> None:
    ids = sorted(rows_of(labelled_tree))
    data = DataConfig(root=str(labelled_tree), split_csv=write_list(tmp_path / "some.csv", ids[:1]))
    found = read_labelled_data(config(), data)
    assert len(found.cases) == 16  # the list of the pretraining does not limit them
    pretraining = read_training_data(data).cases
    same_patient = [row for row in rows_of(labelled_tree).values() if row["patient_id"] == pretraining[0].patient_id]
    assert count_seen(found.cases, pretraining) == len(same_patient)
    assert count_seen(found.cases, []) == 0


def test_lists_name_the_parts(labelled_tree: Path, tmp_path: Path) -> None:
    rows = rows_of(labelled_tree)
    patients = sorted({row["patient_id"] for row in rows.values()})

    def of(part: list[str]) -> list[str]:
        return [name for name, row in rows.items() if row["patient_id"] in part]

    lists = {
        f"{name}_split_csv": write_list(tmp_path / f"{name}.csv", of(part))
        for name, part in (("train", patients[:8]), ("val", patients[8:11]), ("test", patients[11:]))
    }
    data = DataConfig(root=str(labelled_tree))
    found = read_labelled_data(config(**lists), data)
    assert found.division == "as listed"
    assert [case.case_id for case in found.parts["test"]] == sorted(of(patients[11:]))
    strings = {
        f"{part}_dataset_path": f'ProstateSSL:root="{labelled_tree}":split_csv="{tmp_path / part}.csv"'
        for part in ("train", "val", "test")
    }
    assert read_labelled_data(config(**strings), DataConfig(root="/nowhere")).digest == found.digest
    other_order = {**lists, "train_split_csv": lists["val_split_csv"], "val_split_csv": lists["train_split_csv"]}
    assert read_labelled_data(config(**other_order), data).digest != found.digest


def test_r12_parts_that_share_a_patient_are_refused(labelled_tree: Path, tmp_path: Path) -> None:
    rows = rows_of(labelled_tree)
    ids = sorted(rows)
    twice = next(name for name in ids if sum(r["patient_id"] == rows[name]["patient_id"] for r in rows.values()) > 1)
    train = write_list(tmp_path / "fit.csv", [name for name in ids if name != twice])
    val = write_list(tmp_path / "score.csv", [twice])
    with pytest.raises(DataError, match="share patients") as caught:
        read_labelled_data(config(train_split_csv=train, val_split_csv=val), DataConfig(root=str(labelled_tree)))
    assert caught.value.exit_code == 3
    assert rows[twice]["patient_id"] in caught.value.where


def test_r12_the_same_image_under_two_names_is_refused(labelled_tree: Path, tmp_path: Path) -> None:
    tree = Path(shutil.copytree(labelled_tree, tmp_path / "tree"))
    shutil.copytree(tree / "PT-0000", tree / "COPY")
    with (tree / "labels.csv").open("a", encoding="utf-8") as file:
        file.write("COPY,COPY,,,,0,0,,0.0\n")
    ids = sorted(rows_of(tree))
    train = write_list(tmp_path / "fit.csv", [name for name in ids if name != "COPY"])
    val = write_list(tmp_path / "score.csv", ["COPY"])
    with pytest.raises(DataError, match="same images under two names"):
        read_labelled_data(config(train_split_csv=train, val_split_csv=val), DataConfig(root=str(tree)))


def test_a_column_of_the_labels_groups_cases(labelled_tree: Path, tmp_path: Path) -> None:
    rows = rows_of(labelled_tree)
    table = tmp_path / "labels.csv"
    sites = {name: f"site {i % 5}" for i, name in enumerate(sorted(rows))}
    lines = [f"{name},{sites[name]},{row['label']}" for name, row in rows.items()]
    table.write_text("case_id,site,outcome\n" + "\n".join(lines) + "\n", encoding="utf-8")
    found = read_labelled_data(
        config(labels=str(table), target="outcome", group_by="site"), DataConfig(root=str(labelled_tree))
    )
    sides = [{sites[case.case_id] for case in part} for part in found.parts.values()]
    assert not sides[0] & sides[1]
    assert found.group_level == "site"


def test_labels_by_patient_reach_all_cases_and_unlabelled_cases_are_counted(
    labelled_tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = rows_of(labelled_tree)
    patients = sorted({row["patient_id"] for row in rows.values()})[:-2]
    table = tmp_path / "outcome.csv"
    text = "".join(f"{patient},{'bad' if i % 2 else 'good'}\n" for i, patient in enumerate(patients))
    table.write_text("patient_id,outcome\n" + text, encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        found = read_labelled_data(config(labels=str(table), target="outcome"), DataConfig(root=str(labelled_tree)))
    assert {case.patient_id for case in found.cases} == set(patients)
    missing = len(rows) - len(found.cases)
    assert any(f"{missing} cases of the train part without label" in r.getMessage() for r in caplog.records)
    assert found.classes == ("bad", "good")


def test_most_cases_are_the_same_in_every_run(labelled_tree: Path) -> None:
    data = DataConfig(root=str(labelled_tree))
    few = read_labelled_data(config(max_cases=4), data)
    assert [len(part) for part in few.parts.values()] == [4, 4]
    everything = read_labelled_data(config(), data)
    assert {c.case_id for c in few.parts["val"]} < {c.case_id for c in everything.parts["val"]}
    assert read_labelled_data(config(max_cases=4), data) == few


def test_classes_that_are_numbers_are_in_their_order(labelled_tree: Path, tmp_path: Path) -> None:
    table = tmp_path / "grades.csv"
    names = sorted(rows_of(labelled_tree))
    lines = [f"{name},{(2, 10, 9)[i % 3]}" for i, name in enumerate(names)]
    table.write_text("case_id,grade\n" + "\n".join(lines) + "\n", encoding="utf-8")
    found = read_labelled_data(config(labels=str(table), target="grade"), DataConfig(root=str(labelled_tree)))
    assert found.classes == ("2", "9", "10")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("case_id,grade\nPT-0000,1\nPT-0002,1\n", "classes_missing"),
        ("case_id,grade\nnobody,1\nno one,0\n", "labels_missing"),
        ("case_id,other\nPT-0000,1\n", "column_missing"),
        ("case_id,grade\nPT-0000,1\nPT-0000,0\n", "label_conflict"),
    ],
)
def test_r11_labels_that_cannot_be_used_are_one_clear_error(
    labelled_tree: Path, tmp_path: Path, text: str, code: str
) -> None:
    table = tmp_path / "grades.csv"
    table.write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_labelled_data(config(labels=str(table), target="grade"), DataConfig(root=str(labelled_tree)))
    assert caught.value.code == code
    assert caught.value.fix


def test_a_class_that_cannot_be_learned_is_refused(labelled_tree: Path, tmp_path: Path) -> None:
    rows = rows_of(labelled_tree)
    alone = {row["patient_id"]: name for name, row in rows.items()}  # one case of each patient
    ids = sorted(alone.values())
    table = tmp_path / "grades.csv"
    lines = [f"{name},{'rare' if i == len(ids) - 1 else i % 2}" for i, name in enumerate(ids)]
    table.write_text("case_id,grade\n" + "\n".join(lines) + "\n", encoding="utf-8")
    lists = {
        "train_split_csv": write_list(tmp_path / "fit.csv", ids[:8]),
        "val_split_csv": write_list(tmp_path / "score.csv", ids[8:]),
    }
    with pytest.raises(DataError, match="classes that no training case has") as caught:
        read_labelled_data(config(labels=str(table), target="grade", **lists), DataConfig(root=str(labelled_tree)))
    assert "'rare'" in caught.value.where


def test_the_column_must_be_named_and_its_choices_are_told(labelled_tree: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_labelled_data(
            EvaluationConfig(eval_period_iterations=1, labels=str(labelled_tree / "labels.csv")),
            DataConfig(root=str(labelled_tree)),
        )
    assert "lesion_mm3" in caught.value.where


def test_a_dataset_string_with_keys_of_the_run_is_refused(labelled_tree: Path) -> None:
    text = f"ProstateSSL:root={labelled_tree}:random_axes=True"
    with pytest.raises(ConfigError, match="without effect") as caught:
        read_labelled_data(config(train_dataset_path=text, val_dataset_path=text), DataConfig(root=str(labelled_tree)))
    assert "random_axes" in caught.value.where


def write_pictures(root: Path, names: list[str]) -> None:
    rng = np.random.default_rng(0)
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16), dtype=np.uint8)).save(path)


def test_pictures_in_folders_of_their_class_need_no_table(tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    write_pictures(root, [f"{part}/{kind}/{i}.png" for part in ("train", "val") for kind in "ab" for i in range(3)])
    found = read_labelled_data(EvaluationConfig(eval_period_iterations=1, root=str(root)), DataConfig())
    assert found.kind == "images"
    assert found.classes == ("a", "b")
    assert {name: len(part) for name, part in found.parts.items()} == {"train": 6, "val": 6}
    assert found.division == "by the folders of the tree"
    write_pictures(root, [f"test/{kind}/{i}.png" for kind in "ab" for i in range(3, 5)])
    for i, path in enumerate(sorted((root / "test").rglob("*.png"))):
        Image.fromarray(np.full((16, 16), i + np.arange(16), dtype=np.uint8)).save(path)
    assert "test" in read_labelled_data(EvaluationConfig(eval_period_iterations=1, root=str(root)), DataConfig()).parts


def test_pictures_are_named_by_a_table_and_grouped_by_its_patients(tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    names = [f"p{i}_{eye}.png" for i in range(10) for eye in "LR"]
    write_pictures(root, names)
    table = tmp_path / "labels.csv"
    lines = [f"{name},p{i // 2},{(i // 2) % 2}" for i, name in enumerate(names)]
    table.write_text("image,patient,grade\n" + "\n".join(lines) + "\n", encoding="utf-8")
    found = read_labelled_data(
        config(labels=str(table), target="grade", group_by="patient"), DataConfig(root=str(root))
    )
    sides = [{case.case_id.split("_")[0] for case in part} for part in found.parts.values()]
    assert not sides[0] & sides[1]
    assert sum(len(part) for part in found.parts.values()) == 20


# --- the config ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"metric_types": ["mmc"]}, "mcc"),
        ({"metric_types": ["multilabel_auc"]}, "one class"),
        ({"metric_types": []}, "one or more"),
        ({"probes": "knn,svm"}, "linear"),
        ({"train_split_csv": "a.csv"}, "both train and val"),
        ({"test_split_csv": "a.csv"}, "without train and val"),
        ({"c_values": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values: dict[str, Any], word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        EvaluationConfig(**values)


def test_nothing_is_scored_by_default_nor_without_labels() -> None:
    assert not EvaluationConfig().is_on
    assert EvaluationConfig().warnings() == []
    dinov2 = EvaluationConfig(eval_period_iterations=12_500)  # as DINOv2's own file has it
    assert not dinov2.is_on
    assert "evaluation.labels" in dinov2.warnings()[0]
    assert EvaluationConfig(eval_period_iterations=100, target="grade").is_on
    assert "is 0" in EvaluationConfig(target="grade").warnings()[0]
    assert EvaluationConfig(metric_types="mcc, f1", probes="knn").metric_types == ("mcc", "f1")
    assert EvaluationConfig(probes="knn").deciding_probe == "knn"
