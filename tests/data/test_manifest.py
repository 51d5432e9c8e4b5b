import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from medssl_cli.core.case import Case
from medssl_cli.core.errors import ConfigError, DataError, MedsslError
from medssl_cli.data.images import write_image
from medssl_cli.data.manifest import (
    check_no_overlap,
    class_folders,
    detect_kind,
    groups_by_pattern,
    parse_dataset_string,
    patient_of,
    read_cases,
    read_ids,
    read_image_cases,
    read_labels,
    read_owners,
    read_table,
    read_table_cases,
    row_ids,
    split_digest,
)


def tree(root: Path, *ids: str) -> Path:
    for name in ids:
        (root / name).mkdir(parents=True)
        for stem in ("ax_t2wi", "ax_adc", "ax_dwi_b1400"):
            (root / name / f"{stem}.nii.gz").write_bytes(b"")
    return root


def csv_file(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


# --- tables and ids --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"patient_id\n007\n010\n",
        b"\xef\xbb\xbfpatient_id\r\n010\r\n007\r\n",
        b"\xef\xbb\xbfid\n007\n010\n",
        b"site,ID\nA,007\nB,010\n",
        b"site;case_id\nA;007\nB; 010 \n",
        b"site\tsubject\nA\t007\nB\t010\n",
        b"# made by hand\n\nname\n007\n\n# the second\n010\n010\n",
        b'Patient_ID,note\n"007","a, b"\n"010","two\nlines"\n',
        b"whatever\n007\n010",
        b"patient_id\r007\r010\r",
        b"patient_id,\n007,\n010,\n",
    ],
)
def test_r11_t22_every_spelling_gives_the_same_ids(tmp_path: Path, data: bytes) -> None:
    path = csv_file(tmp_path / "a.csv", data)
    assert read_ids(path).ids == ("007", "010")
    root = tree(tmp_path / "root", "007", "010", "7")
    assert [c.case_id for c in read_cases(root, ("ax_t2wi",), split_csv=path)] == ["007", "010"]


def test_r11_duplicates_are_reported(tmp_path: Path) -> None:
    ids = read_ids(csv_file(tmp_path / "a.csv", "id\nb\na\nb\n"))
    assert (ids.ids, ids.duplicates, ids.column) == (("a", "b"), ("b",), "id")


def test_r11_order_of_aliases(tmp_path: Path) -> None:
    path = csv_file(tmp_path / "a.csv", "name,id,case_id,patient_id\nn,i,c,p\n")
    assert read_ids(path).ids == ("p",)
    assert read_ids(csv_file(tmp_path / "b.csv", "x,name,ID\nx,n,i\n")).ids == ("i",)


def test_list_file_without_header(tmp_path: Path) -> None:
    assert read_ids(csv_file(tmp_path / "train.txt", "b/2\n# no\n\na/1\n")).ids == ("a/1", "b/2")
    assert read_ids(csv_file(tmp_path / "t.txt", "patient_id\n7\n")).ids == ("7",)


@pytest.mark.parametrize(
    ("data", "code", "where"),
    [
        (b"id\nM\xfcller\n", "table_encoding", "line 2"),
        ("id\nx\n".encode("utf-16"), "table_encoding", "line 1"),
        (b"id\na\0b\n", "table_encoding", "NUL"),
        (b"", "table_empty", "header"),
        (b"# only\n\n", "table_empty", "header"),
        (b"id,b\n1\n", "table_ragged", "line 2"),
        (b"id,b\n1,2,3\n", "table_ragged", "line 2"),
        (b'id\n"a\nb\n', "table_quotes", "line 2"),
        (b"id\n" + b"x" * 200_000, "table_quotes", "line 2"),
        (b"id\n", "ids_none", "a.csv"),
        (b"id,b\n,2\n", "id_empty", "line 2"),
        (b"id,id\n1,2\n", "column_missing", "id, id"),
    ],
)
def test_r11_one_clear_error(tmp_path: Path, data: bytes, code: str, where: str) -> None:
    with pytest.raises(DataError) as caught:
        read_ids(csv_file(tmp_path / "a.csv", data))
    assert caught.value.code == code
    assert where in caught.value.where
    assert caught.value.fix


def test_missing_table_and_column(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_table(tmp_path / "no.csv")
    with pytest.raises(DataError, match="no column 'lable'") as caught:
        read_labels(csv_file(tmp_path / "a.csv", "id,label\na,1\n"), "lable")
    assert "'label'" in caught.value.fix


def test_labels_of_any_id_column(tmp_path: Path) -> None:
    assert read_labels(csv_file(tmp_path / "a.csv", "image;y\nx.png;1\n"), "y") == {"x.png": "1"}
    both = csv_file(tmp_path / "c.csv", "patient_id,image,y\np,x.png,1\n")
    assert read_labels(both, "y", of_images=True) == {"x.png": "1"}
    assert read_labels(both, "y") == {"p": "1"}
    with pytest.raises(DataError, match="two labels"):
        read_labels(csv_file(tmp_path / "b.csv", "id,y\na,1\na,2\n"), "y")


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.text(alphabet='ab",;#\t\r\n\ufeff id', max_size=120).map(str.encode)))
@example(b'id\n"')
@example(b"id\n'\x0b'\n")
def test_r21_any_bytes_give_ids_or_a_known_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = csv_file(tmp_path_factory.mktemp("c") / "a.csv", data)
    refusal = None
    try:
        ids, table = read_ids(path), read_table(path)
    except MedsslError as error:
        refusal = error
    if refusal is not None:
        assert refusal.code
        assert refusal.exit_code == 3
        return
    assert ids.ids == tuple(sorted(set(ids.ids)))
    assert all(len(row) == len(table.header) for row in table.rows)
    assert not any(cell != cell.strip() for row in table.rows for cell in row)


# --- case trees ------------------------------------------------------------------------------------------------------


def test_only_folders_are_cases(tmp_path: Path) -> None:
    root = tree(tmp_path / "root", "b", "a", ".hidden")
    (root / "readme.txt").write_text("x")
    (root / "split").mkdir()
    (root / "split" / ".medssl.json").write_text("{}")
    cases = read_cases(root, ("ax_t2wi", "ax_dwi", "ax_cor"), split="train")
    assert [c.case_id for c in cases] == ["a", "b"]
    assert list(cases[0].sequences) == ["ax_t2wi", "ax_dwi"]
    assert cases[0].missing(("ax_t2wi", "ax_cor")) == ("ax_cor",)
    assert (cases[0].patient_id, cases[0].split, cases[0].roi) == ("a", "train", None)


def test_unknown_ids_name_the_nearest(tmp_path: Path) -> None:
    root = tree(tmp_path / "root", "007", "case_12", "Z-1")
    with pytest.raises(DataError, match="3 of 3 ids") as caught:
        read_cases(root, ("ax_t2wi",), split_csv=csv_file(tmp_path / "a.csv", "id\n7\ncase_21\nz-1\n"))
    assert caught.value.code == "id_unknown"
    for part in ("'7' (did you mean '007'?)", "did you mean 'case_12'?", "'z-1' (did you mean 'Z-1'?)"):
        assert part in caught.value.where


def test_file_without_header_is_noticed(tmp_path: Path) -> None:
    root = tree(tmp_path / "root", "a", "b")
    with pytest.raises(DataError, match="no header") as caught:
        read_cases(root, ("ax_t2wi",), split_csv=csv_file(tmp_path / "a.csv", "a\nb\n"))
    assert "patient_id" in caught.value.fix


@pytest.mark.parametrize("name", ["../out", "/etc", "a/../../out", "a/..", ".", "..", "x" * 300, "ä" * 200, "link"])
def test_r13_ids_stay_below_the_root(tmp_path: Path, name: str) -> None:
    root = tree(tmp_path / "root", "a")
    tree(tmp_path, "out")
    (root / "link").symlink_to(tmp_path / "out")
    with pytest.raises(DataError) as caught:
        read_cases(root, ("ax_t2wi",), split_csv=csv_file(tmp_path / "a.csv", f"patient_id\n{name}\n"))
    assert caught.value.code == "path_escapes"


def test_r13_odd_names_that_stay_inside_are_read(tmp_path: Path) -> None:
    names = ("Fall 1 ", "größe", "a;b", "<script>")
    root = tree(tmp_path / "root", *(n.strip() for n in names))
    path = csv_file(tmp_path / "a.csv", "patient_id,x\n" + "".join(f'"{n}",1\n' for n in names))
    assert {c.case_id for c in read_cases(root, ("ax_t2wi",), split_csv=path)} == {n.strip() for n in names}
    long = csv_file(tmp_path / "b.csv", "patient_id\n" + "/".join(["a" * 200] * 30) + "\n")
    with pytest.raises(DataError):
        read_cases(root, ("ax_t2wi",), split_csv=long)


def test_r13_a_file_may_not_lead_out(tmp_path: Path) -> None:
    root = tree(tmp_path / "root", "a")
    outside = tmp_path / "secret.nii.gz"
    outside.write_bytes(b"")
    (root / "a" / "ax_t2wi.nii.gz").unlink()
    (root / "a" / "ax_t2wi.nii.gz").symlink_to(outside)
    with pytest.raises(DataError) as caught:
        read_cases(root, ("ax_t2wi",))
    assert caught.value.code == "path_escapes"


def test_all_faults_at_once_or_one_by_one(tmp_path: Path) -> None:
    root = tree(tmp_path / "root", "a", "b", "c")
    for name in ("a", "b"):
        (root / name / "ax_dwi_b1400.nii.gz").rename(root / name / "dwi_x.nii.gz")
        (root / name / "dwi_y.nii.gz").write_bytes(b"")
    with pytest.raises(DataError, match="2 cases") as caught:
        read_cases(root, ("ax_dwi",))
    assert "dwi_x" in caught.value.where
    seen: list[str] = []
    cases = read_cases(root, ("ax_dwi",), on_fault=lambda case_id, error: seen.append(f"{case_id} {error.code}"))
    assert [c.case_id for c in cases] == ["c"]
    assert seen == ["a dwi_ambiguous", "b dwi_ambiguous"]


def test_cases_csv_tells_patient_and_study(tmp_path: Path) -> None:
    root = tree(tmp_path / "root", "p1_s1", "p1_s2", "x")
    text = "case_id,patient_id,study_uid,stem\np1_s1,p1,1.2,ax_t2wi\np1_s1,p1,1.2,ax_adc\np1_s2,p1,1.3,ax_t2wi\n"
    csv_file(root / "cases.csv", text)
    cases = read_cases(root, ("ax_t2wi",))
    assert [(c.patient_id, c.study_uid) for c in cases] == [("p1", "1.2"), ("p1", "1.3"), ("x", "")]
    csv_file(root / "cases.csv", text + "p1_s1,p2,1.2,roi\n")
    with pytest.raises(DataError, match="two patients"):
        read_owners(root)
    (root / "cases.csv").unlink()
    csv_file(root / "labels.csv", "case_id,patient,label\np1_s1,p1,0\np1_s2,p1,1\n")
    assert [c.patient_id for c in read_cases(root, ("ax_t2wi",))] == ["p1", "p1", "x"]
    csv_file(root / "labels.csv", "patient_id,label\np1_s1,0\np1_s2,1\n")
    assert read_owners(root) == {}


# --- image trees and tables ------------------------------------------------------------------------------------------


def images(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_image(root / name, np.zeros((4, 4), np.uint8))
    return root


def test_imagenet_folders_give_split_and_label(tmp_path: Path) -> None:
    root = images(tmp_path / "r", "train/cat/a.png", "validation/dog/b.png", "x/c.png", "d.png")
    cases = {c.case_id: (c.split, c.label) for c in read_image_cases(root)}
    assert cases == {
        "train/cat/a.png": ("train", "cat"),
        "validation/dog/b.png": ("val", "dog"),
        "x/c.png": ("", ""),
        "d.png": ("", ""),
    }


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("cat/a.png", "cat/b.png", "dog/c.png", "dog/a.png"), {"cat", "dog"}),
        (("cat/a.png", "cat/b.png", "cat/c.png", "dog/d.png"), {"cat", "dog"}),
        (("cat/a.png", "cat/b.png"), set()),  # one folder tells nothing
        (("p1/a.png", "p2/a.png", "p3/a.png"), set()),  # a folder for each image
        (("cat/a.png", "cat/b.png", "dog/c.png", "d.png"), set()),
        (("cat/a.png", "cat/b.png", "dog/c.png", "dog/x/d.png"), set()),
        (("train/a.png", "train/b.png", "test/c.png", "test/d.png"), set()),
        (("train/cat/a.png", "train/cat/b.png", "train/dog/a.png", "train/dog/c.png"), set()),
    ],
)
def test_class_folders_are_told_by_every_image(tmp_path: Path, names: tuple[str, ...], found: set[str]) -> None:
    classes = class_folders(images(tmp_path / "r", *names))
    assert set(classes.values()) == found
    assert all(name.split("/")[0] == folder for name, folder in classes.items())
    assert not found or set(classes) == set(names)
    assert {case.label for case in read_image_cases(tmp_path / "r")} <= {"", "cat", "dog"}
    if found:  # what `split` and `pretrain` read is as it was
        assert {case.label for case in read_image_cases(tmp_path / "r")} == {""}


def test_w24_names_with_several_dots_stay_apart(tmp_path: Path) -> None:
    root = images(tmp_path, "a.b.png", "a.c.png", "a.png")
    cases = read_image_cases(root, labels={"a.b": "1", "a.c.png": "2"})
    assert {case.case_id: case.label for case in cases} == {"a.b.png": "1", "a.c.png": "2", "a.png": ""}


def test_images_of_a_csv(tmp_path: Path) -> None:
    root = images(tmp_path / "images", "P1_L.png", "P1_R.png", "sub/P2_L.png")
    path = csv_file(tmp_path / "a.csv", "patient_id,group\nimages/P1_L.png,P1\nP1_R.png,P1\nP2_L,P2\n")
    cases = read_image_cases(root, split_csv=path, labels={"P1_L": "1"})
    assert [(c.case_id, c.patient_id, c.label) for c in cases] == [
        ("P1_L.png", "P1", "1"),
        ("P1_R.png", "P1", ""),
        ("sub/P2_L.png", "P2", ""),
    ]
    with pytest.raises(DataError, match="1 of 1 images") as caught:
        read_image_cases(root, split_csv=csv_file(tmp_path / "b.csv", "id\nP1_M.png\n"))
    assert "'P1_M.png' (did you mean 'P1_" in caught.value.where


def test_r13_image_links_may_not_lead_out(tmp_path: Path) -> None:
    root = images(tmp_path / "r", "a.png")
    images(tmp_path / "other", "b.png")
    (root / "b.png").symlink_to(tmp_path / "other/b.png")
    with pytest.raises(DataError) as caught:
        read_image_cases(root)
    assert caught.value.code == "path_escapes"
    (root / "b.png").unlink()
    (root / "folder").symlink_to(tmp_path / "other")
    with pytest.raises(DataError):
        read_image_cases(root)


def test_names_beside_the_pattern_follow_their_beginning(caplog: pytest.LogCaptureFixture) -> None:
    names = ["P25_L.jpg", "P254_L.jpg", "P254-R.jpg", "P25 R.jpg"]
    assert list(groups_by_pattern(names, r"(P\d+)_").values()) == ["P25", "P254", "P254", "P25"]
    assert "P254-R.jpg to P254" in caplog.text
    with pytest.raises(DataError, match="1 of 2"):
        groups_by_pattern(["P25_L.jpg", "P256-R.jpg"], r"(P\d+)_")


def test_group_pattern() -> None:
    assert groups_by_pattern(["P01_L.jpg", "P01_R.jpg"], r"(P\d+)_") == {"P01_L.jpg": "P01", "P01_R.jpg": "P01"}
    with pytest.raises(DataError, match="1 of 2") as caught:
        groups_by_pattern(["P01_L.jpg", "x.jpg"], r"(P\d+)_")
    assert "x.jpg" in caught.value.where
    with pytest.raises(ConfigError):
        groups_by_pattern(["a"], "(")


def test_series_table(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    text = "study_uid,series_uid,nifti_path,label_any\n1,a,x/1.nii.gz,0\n1,b,x/2.nii.gz,1\n"
    path = csv_file(tmp_path / "t" / "series.csv", text)
    cases = read_table_cases(path, target="label_any")
    assert [(c.case_id, c.patient_id, c.study_uid, c.label) for c in cases] == [
        ("1__a", "1", "1", "0"),
        ("1__b", "1", "1", "1"),
    ]
    assert cases[0].sequences["image"].path == tmp_path / "t" / "x/1.nii.gz"
    inside = csv_file(tmp_path / "t" / "b.csv", f"path\n{tmp_path}/t/x/1.nii.gz\n")
    assert read_table_cases(inside)[0].sequences["image"].path == tmp_path / "t" / "x/1.nii.gz"
    for bad in ("../1.nii.gz", "/etc/passwd", "x/../../y.nii"):
        with pytest.raises(DataError) as caught:
            read_table_cases(csv_file(tmp_path / "t" / "c.csv", f"path\n{bad}\n"))
        assert caught.value.code == "path_escapes"
    with pytest.raises(DataError, match="twice"):
        read_table_cases(csv_file(tmp_path / "t" / "d.csv", text + "1,a,x/3.nii.gz,0\n"))


def test_r13_paths_of_a_table_stay_below_its_folder_or_the_one_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "t").mkdir()
    table = csv_file(tmp_path / "t/rows.csv", f"id,path\na,{tmp_path}/data/a.nii.gz\n")
    with pytest.raises(DataError) as caught:
        read_table_cases(table)
    assert "line 2" in caught.value.where
    assert "DATASETS_DIR" in caught.value.fix
    monkeypatch.setenv("DATASETS_DIR", str(tmp_path / "data"))
    assert [case.sequences["image"].path for case in read_table_cases(table)] == [tmp_path / "data/a.nii.gz"]
    with pytest.raises(DataError):
        read_table_cases(csv_file(tmp_path / "t/out.csv", "id,path\na,../a.nii.gz\n"))


def test_detect_kind(tmp_path: Path) -> None:
    assert detect_kind(tree(tmp_path / "c", "a")) == "cases"
    assert detect_kind(images(tmp_path / "i", "a/b.png")) == "images"
    assert detect_kind(csv_file(tmp_path / "a.csv", "id\n")) == "table"
    (tmp_path / "e" / "folder").mkdir(parents=True)
    assert detect_kind(tmp_path / "e") == "cases"
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.nii.gz").write_bytes(b"")
    (tmp_path / "void").mkdir()
    for bad, text in (
        ("flat", "without case folders"),
        ("void", "empty"),
        ("nowhere", "not exist"),
        ("flat/a.nii.gz", "one file"),
    ):
        with pytest.raises(DataError) as caught:
            detect_kind(tmp_path / bad)
        assert text in caught.value.where


def test_real_tables_keep_patients_together(real_data: Path) -> None:
    table = read_table(real_data / "picai_labels_subset/marksheet.csv")
    groups, level = patient_of(table)
    assert (level, len(groups), len(set(groups))) == ("patient_id", 1000, 984)
    assert len(set(row_ids(table))) == 1000
    eyes = read_table(real_data / "fundus_dr_grading/labels.csv")
    assert (patient_of(eyes)[1], len(set(patient_of(eyes)[0]))) == ("patient_id", 188)
    assert read_labels(real_data / "prostate_dx_t2/labels.csv", "EPE_Sensitive")["ProstateDx-01-0001"] == "1"
    images_root = real_data / "fundus_dr_grading/images"
    cases = read_image_cases(
        images_root, group_pattern=r"(Patient\d+)_", labels=read_labels(eyes.path, "any_dr", of_images=True)
    )
    assert len(cases) == 376
    assert sum(c.label == "1" for c in cases) == 197
    assert len({c.patient_id for c in cases}) == 188


# --- leaks -----------------------------------------------------------------------------------------------------------


def test_r12_overlap_is_refused() -> None:
    a, b = Case("s1", "p1", study_uid="1.1"), Case("s2", "p1", study_uid="1.2")
    c = Case("s3", "p3", study_uid="1.1")
    check_no_overlap({"train": [a, b], "val": [Case("s9", "p9")]})
    for other, word in ((b, "patient p1"), (a, "case s1"), (c, "study 1.1")):
        with pytest.raises(DataError) as caught:
            check_no_overlap({"train": [a], "test": [other]})
        assert word in caught.value.where
        assert "train" in caught.value.where
        assert "test" in caught.value.where
        assert caught.value.exit_code == 3


def test_split_digest_ignores_order() -> None:
    assert split_digest(["b", "a"]) == hashlib.sha256(b"a\nb").hexdigest()


# --- dataset string --------------------------------------------------------------------------------------------------


def test_dataset_string_of_the_manual() -> None:
    text = (
        "ProstateSSL:split=TRAIN:root=/d:split_csv=split/train.csv:mri_sequences=ax_t2wi,ax_adc,ax_dwi"
        ":random_axes=True:random_slices=true:percentage_labels=1.5:spatial_size=224"
    )
    assert parse_dataset_string(text) == {
        "split": "TRAIN",
        "root": "/d",
        "split_csv": "split/train.csv",
        "mri_sequences": ("ax_t2wi", "ax_adc", "ax_dwi"),
        "random_axes": True,
        "random_slices": True,
        "percentage_labels": 1.0,
        "spatial_size": 224,
    }


@pytest.mark.parametrize("quote", ['"', "'"])
def test_dataset_string_keeps_quoted_colons(quote: str) -> None:
    parsed = parse_dataset_string(f"ProstateSSL:split=val:root={quote}X:/a=b:c{quote}:split_csv=k=v.csv")
    assert parsed == {"split": "VAL", "root": "X:/a=b:c", "split_csv": "k=v.csv"}


def test_dataset_string_reports_every_fault() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_dataset_string("ProstatSSL:split=ALL:root=X:/a:random_axis=True:spatial_size=1.5:random_slices=1")
    for part in (
        "did you mean ProstateSSL",
        "TRAIN, VAL or TEST",
        "needs quotes",
        "did you mean random_axes",
        "positive whole",
        "True or False",
    ):
        assert part in caught.value.where
    with pytest.raises(ConfigError) as caught:
        parse_dataset_string("ProstateSSL:split=TRAIN:split=VAL")
    assert "twice" in caught.value.where
    assert "root is missing" in caught.value.where


@settings(max_examples=80, deadline=None)
@given(
    st.one_of(
        st.text(max_size=80),
        st.lists(
            st.sampled_from(
                [
                    "ProstateSSL",
                    "split=TRAIN",
                    "root=/a",
                    'root="a:b"',
                    "root='",
                    "spatial_size=inf",
                    "percentage_labels=nan",
                    "x=",
                    "=",
                ]
            )
        ).map(":".join),
    )
)
def test_r21_any_dataset_string_parses_or_is_refused(text: str) -> None:
    refusal = None
    try:
        values = parse_dataset_string(text)
    except ConfigError as error:
        refusal = error
    if refusal is not None:
        assert refusal.code == "dataset_string"
        return
    assert values["split"] in {"TRAIN", "VAL", "TEST"}
    assert values["root"]


def test_names_of_data_sets_tell_their_layout() -> None:
    for name, layout in (("GliomaSSL", "mmdinov2"), ("GliomaSupervised", "mmdinov2")):
        assert parse_dataset_string(f"{name}:split=TRAIN:root=/d:mri_sequences=t1,t1c")["layout"] == layout
    for name in ("ProstateSSL", "MedicalDataset"):
        assert "layout" not in parse_dataset_string(f"{name}:split=TRAIN:root=/d")
    with pytest.raises(ConfigError) as caught:
        parse_dataset_string("GliomaSSSL:split=TRAIN:root=/d")
    assert "did you mean GliomaSSL" in caught.value.where


def test_rows_of_a_table_are_told_apart_by_the_same_columns_in_every_part(tmp_path: Path) -> None:
    text = "study_id,image,split\n1,a.png,train\n1,b.png,train\n2,c.png,\n"
    table = csv_file(tmp_path / "t.csv", text)
    assert row_ids(read_table(table)) == ["a.png", "b.png", "c.png"]  # a study has several rows
    part = csv_file(tmp_path / "p.csv", "study_id,image,split\n1,b.png,train\n2,c.png,\n")  # here each has one
    assert [case.case_id for case in read_table_cases(table, split_csv=part)] == ["b.png", "c.png"]
    assert {case.split for case in read_table_cases(table)} == {""}  # a row without a split: the column tells nothing
