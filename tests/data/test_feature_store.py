"""Stored features: written and read back to the same rows, refused when their files disagree."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from medssl_cli.core.errors import DataError
from medssl_cli.data.feature_store import (
    FeaturePart,
    ImageFacts,
    PartWriter,
    Row,
    features_in_memory,
    is_features,
    read_features,
    write_features,
)

INFO = {"pool_mode": "mean", "slice_dim": 4, "embedding_dim": 4, "targets": ["bleed", "age"],
        "label_values": {"bleed": ["NO", "YES"]}}  # fmt: skip
ODD_IDS = ("#1.png", "a,b", 'say "x"', "two\nlines", " blank ", "007", "ü")


def part(name: str = "train", ids: tuple[str, ...] = ODD_IDS) -> FeaturePart:
    rng = np.random.default_rng(len(name))
    rows = tuple(Row(i, f"p{n // 2}", "", None, 3, 0, f"{i}/x.png") for n, i in enumerate(ids))
    labels = np.array([[n % 2, 40.5 + n] for n in range(len(ids))], np.float32)
    labels[0] = np.nan
    facts = {i: ImageFacts((3.0, 0.5, 0.25), (3, 8, 9), {"t2": (0.1, 1 / 3, 7.0)}, ("adc", "dwi")) for i in ids[:-1]}
    facts[ids[-1]] = ImageFacts(None, (1, 8, 9), {"dwi": (1.0, 2.0, 3.0)}, ())
    return FeaturePart(name, rng.standard_normal((len(ids), 4)).astype(np.float32), labels, rows, facts)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_features(tmp_path / "features", INFO, [part(), part("val", ("v1", "v2"))])
    return tmp_path / "features"


def test_features_come_back_as_they_were_written(folder: Path) -> None:
    found = read_features(folder.parent)
    wrote, read = part(), found.part("train")
    assert found.names == ("train", "val")
    assert found.folder == folder
    assert read.rows == wrote.rows
    assert read.facts == wrote.facts
    np.testing.assert_array_equal(read.embeddings_RP, wrote.embeddings_RP)
    np.testing.assert_array_equal(read.labels_RC, wrote.labels_RC)
    assert read.case_ids == ODD_IDS


def test_arrays_are_plain_npy_files_and_ids_a_plain_csv(folder: Path) -> None:
    array = np.load(folder / "train_embeddings.npy")
    assert array.dtype == np.float32
    assert array.shape == (len(ODD_IDS), 4)
    with (folder / "train_ids.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["case_id"] for line in lines] == list(ODD_IDS)
    assert {line["slice_index"] for line in lines} == {""}


def test_description_counts_rows_patients_and_classes(folder: Path) -> None:
    info = json.loads((folder / "features.json").read_text(encoding="utf-8"))
    told = info["splits"]["train"]
    assert (told["n_rows"], told["n_cases"], told["n_patients"]) == (7, 7, 4)
    assert told["class_counts"]["bleed"] == {"NO": 3, "YES": 3}
    ids = "\n".join(sorted(ODD_IDS)).encode()
    assert told["split_digest"] == hashlib.sha256(ids).hexdigest()
    assert len(info["feature_digest"]) == 64


def test_an_output_folder_may_be_called_features(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "out" / "features" / "features")
    found = read_features(tmp_path / "out" / "features")
    assert found.info == read_features(folder).info
    assert found.part("train").rows == read_features(folder).part("train").rows


def test_both_names_of_the_folder_are_read(folder: Path, tmp_path: Path) -> None:
    assert read_features(folder).info == read_features(folder.parent).info
    assert is_features(folder)
    assert is_features(folder.parent)
    assert not is_features(tmp_path.parent)


def test_parts_are_opened_when_asked_for_and_counted(folder: Path) -> None:
    (folder / "val_ids.csv").unlink()
    found = read_features(folder)
    found.part("train")
    found.part("train")
    assert dict(found.accesses) == {"train": 2}
    with pytest.raises(DataError) as caught:
        found.part("val")
    assert caught.value.code == "features_damaged"
    assert "val_ids.csv" in caught.value.where


def test_an_unknown_part_names_the_nearest(folder: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_features(folder).part("vall")
    assert "'val'" in caught.value.fix


@pytest.mark.parametrize("name", ["train_embeddings.npy", "train_labels.npy"])
def test_m30_arrays_with_fewer_rows_than_ids_are_refused(folder: Path, name: str) -> None:
    np.save(folder / name, np.load(folder / name)[:-1])
    with pytest.raises(DataError) as caught:
        read_features(folder).part("train")
    assert caught.value.code == "features_misaligned"
    assert "6" in caught.value.where
    assert "7" in caught.value.where


def test_m30_a_row_taken_out_of_the_ids_is_refused(folder: Path) -> None:
    lines = (folder / "val_ids.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "val_ids.csv").write_text("".join(lines[:-1]), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_features(folder).part("val")
    assert caught.value.code == "features_misaligned"


def test_m30_rows_in_another_order_are_refused_though_the_counts_agree(folder: Path) -> None:
    labels = np.load(folder / "train_labels.npy")
    np.save(folder / "train_labels.npy", labels[::-1].copy())
    with pytest.raises(DataError) as caught:
        read_features(folder).part("train")
    assert caught.value.code == "features_changed"


def test_m30_misaligned_rows_are_never_written(tmp_path: Path) -> None:
    whole = part()
    bad = FeaturePart("train", whole.embeddings_RP[:-1], whole.labels_RC, whole.rows)
    with pytest.raises(DataError) as caught:
        write_features(tmp_path / "features", INFO, [bad])
    assert caught.value.code == "features_misaligned"
    assert list(tmp_path.iterdir()) == []


def test_a_vector_that_is_not_finite_is_named(tmp_path: Path) -> None:
    whole = part()
    vectors = whole.embeddings_RP.copy()
    vectors[5, 2] = np.inf
    with pytest.raises(DataError) as caught:
        features_in_memory(INFO, [FeaturePart("train", vectors, whole.labels_RC, whole.rows)])
    assert caught.value.code == "features_nonfinite"
    assert "row 5: case 007" in caught.value.where


@pytest.mark.parametrize("damage", ["", "PK\x03\x04", "\x93NUMPY\x01\x00"])
def test_a_damaged_array_is_named(folder: Path, damage: str) -> None:
    (folder / "train_embeddings.npy").write_text(damage, encoding="latin-1")
    with pytest.raises(DataError) as caught:
        read_features(folder).part("train")
    assert caught.value.code == "features_damaged"
    assert "train_embeddings.npy" in caught.value.where


def test_pickled_objects_are_never_loaded(folder: Path) -> None:
    np.save(folder / "train_embeddings.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError) as caught:
        read_features(folder).part("train")
    assert caught.value.code == "features_damaged"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"splits": 3}', "{"])
def test_a_damaged_description_is_refused(folder: Path, text: str) -> None:
    (folder / "features.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_features(folder)
    assert caught.value.code == "features_damaged"


def test_a_part_name_cannot_lead_out_of_the_folder(folder: Path) -> None:
    info = json.loads((folder / "features.json").read_text(encoding="utf-8"))
    info["splits"]["../../etc/x"] = info["splits"]["train"]
    (folder / "features.json").write_text(json.dumps(info), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_features(folder)
    assert "odd name" in caught.value.where


def test_nothing_there_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_features(tmp_path / "none")
    assert caught.value.code == "features_missing"
    assert "medssl extract" in caught.value.fix


def test_writing_again_replaces_the_whole_folder(folder: Path) -> None:
    write_features(
        folder, {**INFO, "targets": []}, [FeaturePart("all", np.ones((1, 4), np.float32), None, part().rows[:1])]
    )
    assert sorted(path.name for path in folder.iterdir()) == [
        *("all_embeddings.npy", "all_facts.csv", "all_ids.csv", "features.json"),
    ]
    assert sorted(path.name for path in folder.parent.iterdir()) == ["features"]
    assert read_features(folder).part("all").labels_RC is None


def test_the_digest_follows_content_and_nothing_else(tmp_path: Path) -> None:
    def digest(name: str, made: FeaturePart) -> str:
        write_features(tmp_path / name / "features", {**INFO, "note": name}, [made])
        return str(read_features(tmp_path / name).info["feature_digest"])

    whole = part()
    assert digest("a", whole) == digest("b", whole)
    assert whole.labels_RC is not None
    other = whole.labels_RC.copy()
    other[3, 0] = 0
    assert digest("c", FeaturePart("train", whole.embeddings_RP, other, whole.rows, whole.facts)) != digest("d", whole)
    renamed = (*whole.rows[:-1], Row("other", *list(vars(whole.rows[-1]).values())[1:]))
    assert digest("e", FeaturePart("train", whole.embeddings_RP, whole.labels_RC, renamed)) != digest("f", whole)


def test_features_in_memory_have_the_same_description_as_stored_ones(folder: Path) -> None:
    held = features_in_memory(INFO, [part(), part("val", ("v1", "v2"))])
    stored = read_features(folder)
    assert held.info == stored.info
    assert held.folder is None
    assert held.part("val").rows == stored.part("val").rows


def test_rows_go_to_the_disk_as_they_come(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((300, 4)).astype(np.float32)
    with PartWriter(tmp_path, "all", 4) as writer:
        for n in range(100):
            rows = [Row(f"c{n}", f"c{n}", "", z, 3, 0, "") for z in range(3)]
            assert writer.add(rows, vectors[3 * n : 3 * n + 3]) == 3 * n
        assert (tmp_path / "all_embeddings.npy").stat().st_size > 0
    np.testing.assert_array_equal(np.load(tmp_path / "all_embeddings.npy"), vectors)
    assert isinstance(writer.part(None).embeddings_RP, np.memmap)


def test_names_that_are_not_utf8_keep_their_bytes(tmp_path: Path) -> None:
    name = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    info = {**INFO, "targets": []}
    write_features(tmp_path / "features", info, [FeaturePart("all", np.ones((1, 4), np.float32), None,
                                                             (Row(name, name, "", None, 1, 0, name),))])  # fmt: skip
    assert read_features(tmp_path).part("all").rows[0].case_id == name
