"""Label tables: matched by any of the known ids, the same text rules as everywhere, and conflicts told."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from medssl_cli.core.errors import DataError
from medssl_cli.data.feature_store import Row
from medssl_cli.data.labels import encode_columns, read_patients, read_targets
from medssl_cli.data.manifest import read_labels

Write = Callable[[str], Path]


def row(case_id: str, patient: str = "", study: str = "", z: int | None = None, path: str = "") -> Row:
    return Row(case_id, patient or case_id, study, z, 1, 0, path or case_id)


VISITS = [row("P1_a", "P1", "s1"), row("P1_b", "P1", "s2"), row("P2", "P2", "s3")]
SERIES = [row("s1__x", "P1", "s1"), row("s1__y", "P1", "s1"), row("s2__z", "P2", "s2")]
PICTURES = [row("train/a/x.png"), row("train/b/x.png"), row("train/b/a.b.png")]


@pytest.fixture
def table(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        path = tmp_path / "labels.csv"
        path.write_bytes(text.encode())
        return path

    return write


def cells(path: Path, rows: list[Row], *targets: str, images: bool = False, root: Path | None = None) -> list[str]:
    found = read_targets(path, targets or ("y",), rows, of_images=images, root=root)
    return ["|".join(texts) for texts in found]


def test_a_table_of_patients_labels_all_cases_of_each(table: Write) -> None:
    assert cells(table("patient_id,y\nP1,1\nP2,0\n"), VISITS) == ["1", "1", "0"]


@pytest.mark.parametrize("column", ["case_id", "id", "ID", "name", "subject", "case"])
def test_r11_every_alias_of_the_id_column_gives_what_the_other_readers_read(table: Write, column: str) -> None:
    path = table(f"note,{column},y\nk,P1_a,1\nk,P1_b,0\nk,P2,1\n")
    other = read_labels(path, "y")
    assert cells(path, VISITS) == [other[visit.case_id] for visit in VISITS] == ["1", "0", "1"]


def test_r11_a_first_column_without_a_known_name_is_the_id(table: Write) -> None:
    assert cells(table("Fallnummer,y\nP2,1\n"), VISITS) == ["", "", "1"]


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffcase_id,y\n007,1\n",
        "case_id,y\r\n007,1\r\n",
        "case_id;y\n007;1\n",
        "# made by hand\n\ncase_id\ty\n007\t1\n\n",
        'case_id,y\n"007", 1\n',
    ],
)
def test_r11_marks_line_ends_separators_comments_and_leading_zeros(table: Write, text: str) -> None:
    assert cells(table(text), [row("007")]) == ["1"]


def test_leading_zeros_that_a_spreadsheet_cut_do_not_match(table: Write) -> None:
    with pytest.raises(DataError) as caught:
        cells(table("case_id,y\n7,1\n"), [row("007")])
    assert caught.value.code == "labels_missing"
    assert "leading zeros" in caught.value.fix
    assert "'7'" in caught.value.where
    assert "'007'" in caught.value.where


def test_study_and_series_together_are_finer_than_each_alone(table: Write) -> None:
    text = "patient_id,study_uid,series_uid,y\nP1,s1,x,1\nP1,s1,y,0\nP2,s2,z,1\n"
    assert cells(table(text), SERIES) == ["1", "0", "1"]


def test_series_and_studies_alone_are_ids_too(table: Write) -> None:
    assert cells(table("series_uid,y\nx,1\ny,0\n"), SERIES) == ["1", "0", ""]
    assert cells(table("study_uid,y\ns1,1\ns2,0\n"), SERIES) == ["1", "1", "0"]


def test_volumes_are_matched_by_path(table: Write, tmp_path: Path) -> None:
    rows = [row("A", path="s1/a.nii.gz"), row("B", path="s2/a.nii.gz")]
    path = table(f"nifti_path,y\ns1/a.nii.gz,1\n{tmp_path}/s2/a.nii.gz,0\n")
    assert cells(path, rows, root=tmp_path) == ["1", "0"]


def test_w24_pictures_are_told_apart_by_their_whole_name(table: Write) -> None:
    rows = [row("t/a.b.png"), row("t/a.c.png")]
    assert cells(table("image,y\na.b.png,1\na.c.png,0\n"), rows, images=True) == ["1", "0"]


def test_pictures_are_matched_in_several_spellings(table: Write, tmp_path: Path) -> None:
    path = table(f"patient,file,y\np,train/a/x.png,1\np,{tmp_path.name}/train/b/x.png,2\np,a.b,3\n")
    assert cells(path, PICTURES, images=True, root=tmp_path) == ["1", "2", "3"]


def test_a_file_name_that_two_pictures_have_matches_neither(table: Write) -> None:
    assert cells(table("image,y\nx.png,1\na.b.png,0\n"), PICTURES, images=True) == ["", "", "0"]


def test_several_targets_come_in_the_order_asked_for(table: Write) -> None:
    assert cells(table("case_id,a,b\nP2,1,2\n"), VISITS[2:], "b", "a") == ["2|1"]


def test_unknown_columns_are_told_at_once_with_the_nearest(table: Write) -> None:
    with pytest.raises(DataError) as caught:
        cells(table("case_id,label_any,label_epidural\nP2,1,0\n"), VISITS, "label_ani", "label_epidurl", "nothing")
    assert caught.value.code == "column_missing"
    assert "did you mean 'label_any'" in caught.value.where
    assert "did you mean 'label_epidural'" in caught.value.where
    assert "'nothing'" in caught.value.where


def test_one_id_with_two_labels_is_refused_with_both_lines(table: Write) -> None:
    with pytest.raises(DataError) as caught:
        cells(table("case_id,y\nP2,1\nP1_a,0\nP2,0\n"), VISITS)
    assert caught.value.code == "label_conflict"
    assert "lines 2 and 4" in caught.value.where
    assert cells(table("case_id,y\nP2,1\nP2,1\n"), VISITS[2:]) == ["1"]


def test_labels_of_slices_are_found_by_id_and_slice(table: Write) -> None:
    rows = [row("s1__x", "P1", "s1", z) for z in range(3)] + [row("s1__y", "P1", "s1", 0)]
    text = "study_uid,series_uid,slice_index,y\ns1,x,0,1\ns1,x,2,0\ns1,y,0,1\n"
    assert cells(table(text), rows) == ["1", "", "0", "1"]
    assert cells(table("series_uid,slice_index,y\nx,1,1\n"), rows) == ["", "1", "", ""]


def test_labels_of_slices_are_refused_for_whole_cases(table: Write) -> None:
    with pytest.raises(DataError) as caught:
        cells(table("case_id,slice_index,y\nP2,0,1\n"), VISITS)
    assert caught.value.code == "labels_by_slice"
    assert "--pool none" in caught.value.fix


@pytest.mark.parametrize("text", ["-1", "1.5", "x", ""])
def test_a_slice_index_is_a_whole_number(table: Write, text: str) -> None:
    with pytest.raises(DataError) as caught:
        cells(table(f"case_id,slice_index,y\nP2,{text},1\n"), [row("P2", z=0)])
    assert caught.value.code == "slice_index"


def test_cases_without_label_are_counted_in_the_log(table: Write, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert cells(table("case_id,y\nP2,1\n"), VISITS) == ["", "", "1"]
    assert "2 cases" in caplog.text
    assert "P1_a" in caplog.text


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_numbers_stay_as_they_are_and_empty_cells_are_unknown() -> None:
    labels, values = encode_columns([("2", "-0.5"), ("", "1e3"), ("0", "")], ("a", "b"))
    np.testing.assert_array_equal(labels, np.array([[2, -0.5], [np.nan, 1000], [0, np.nan]], np.float32))
    assert values == {}


def test_texts_become_their_place_in_sorted_order() -> None:
    labels, values = encode_columns([("YES",), ("NO",), ("",), ("YES",)], ("csPCa",))
    np.testing.assert_array_equal(labels[:, 0], np.array([1, 0, np.nan, 1], np.float32))
    assert values == {"csPCa": ["NO", "YES"]}


def test_one_text_among_numbers_makes_classes() -> None:
    labels, values = encode_columns([("1",), ("2",), ("unclear",)], ("grade",))
    assert values == {"grade": ["1", "2", "unclear"]}
    assert labels[:, 0].tolist() == [0, 1, 2]


def test_an_underscore_does_not_make_a_number() -> None:
    assert encode_columns([("1_2",), ("1_3",)], ("a",))[1] == {"a": ["1_2", "1_3"]}


def test_known_classes_keep_their_places() -> None:
    labels, values = encode_columns([("b",), ("",)], ("kind",), {"kind": ["c", "b", "a"]})
    assert labels[0, 0] == 1
    assert np.isnan(labels[1, 0])
    assert values == {"kind": ["c", "b", "a"]}


def test_a_text_that_no_known_class_has_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        encode_columns([("d",)], ("kind",), {"kind": ["a", "b"]})
    assert caught.value.code == "label_unknown"
    assert "'d'" in caught.value.where
    assert "a, b" in caught.value.where


def test_a_text_where_numbers_were_known_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        encode_columns([("1",), ("x",)], ("age",), {})
    assert caught.value.code == "label_number"
    assert "age: 'x'" in caught.value.where


@pytest.mark.parametrize("text", ["inf", "-inf", "1e999"])
def test_infinite_labels_are_refused(text: str) -> None:
    with pytest.raises(DataError) as caught:
        encode_columns([("1",), (text,)], ("age",))
    assert caught.value.code == "label_number"


# --- whose is a picture ----------------------------------------------------------------------------------------------


def test_paths_may_tell_folders_above_the_root(table: Write) -> None:
    rows = [row("1_L.png"), row("1_R.png"), row("b/2.png")]
    path = table("image,y\nimages/1_L.png,1\n/data/eyes/1_R.png,0\nold\\b\\2.png,1\n")
    assert cells(path, rows, images=True) == ["1", "0", "1"]
    twice = table("image,y\ntrain/1_L.png,1\ntest/1_L.png,0\nx/1_R.png,0\n")
    assert cells(twice, rows, images=True) == ["", "0", ""]


def test_r12_a_table_of_labels_tells_the_patients_of_pictures(table: Write) -> None:
    rows = [row("1_L.png"), row("1_R.png"), row("2_L.png", "known"), row("3_L.png")]
    path = table("image,patient,y\n1_L.png,P1,0\n1_R.png,P1,1\n2_L.png,P2,1\n")
    assert read_patients(path, rows, of_images=True, root=None) == {"1_L.png": "P1", "1_R.png": "P1"}
    assert read_patients(table("image,y\n1_L.png,1\n"), rows, of_images=True, root=None) == {}
    assert read_patients(table("image,patient,y\nz.png,P1,1\n"), rows, of_images=True, root=None) == {}


def test_one_picture_of_two_patients_is_refused(table: Write) -> None:
    path = table("image,patient,y\n1.png,P1,0\n1.png,P2,0\n")
    with pytest.raises(DataError, match="two labels") as caught:
        read_patients(path, [row("1.png")], of_images=True, root=None)
    assert "P1" in caught.value.where
    assert "P2" in caught.value.where
