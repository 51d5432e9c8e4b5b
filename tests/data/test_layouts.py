"""Data sets of other programs, written here after their documents and read as they stand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medssl_cli.core.case import Case
from medssl_cli.core.errors import ConfigError, DataError
from medssl_cli.core.volume import Volume
from medssl_cli.data.images import write_volume
from medssl_cli.data.layouts import (
    asked_layout,
    check_template,
    detect_layout,
    layout_channels,
    read_layout_cases,
    select_cases,
)
from medssl_cli.data.preprocess import PreprocessConfig, prepare_case


def volume(path: Path, value: int = 0, channels: int = 0) -> Path:
    """A small volume whose values tell ``value`` and the channel."""
    array = np.arange(60, dtype=np.int16).reshape(3, 4, 5) + 100 * value
    if channels:
        array = np.stack([array + 1000 * c for c in range(channels)])
    write_volume(path, Volume(array, np.diag([1.0, 1, 2, 1])))
    return path


def mask(path: Path) -> Path:
    array = np.zeros((3, 4, 5), np.uint8)
    array[1, 1:3, 1:3] = 2
    array[1, 0, 0] = 1
    write_volume(path, Volume(array, np.diag([1.0, 1, 2, 1])))
    return path


def describe(root: Path, **values: Any) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset.json").write_text(json.dumps(values), encoding="utf-8")
    return root


@pytest.fixture
def nnunet(tmp_path: Path) -> Path:
    """Two channels, two training cases, one of them without the second channel and without label, one test case."""
    root = describe(
        tmp_path / "Dataset501_Prostate",
        channel_names={"0": "T2", "1": "ADC map"},
        labels={"background": 0, "PZ": 1, "TZ": 2},
        numTraining=2,
        file_ending=".nii.gz",
    )
    volume(root / "imagesTr/prostate_00_0000.nii.gz", 1)
    volume(root / "imagesTr/prostate_00_0001.nii.gz", 2)
    volume(root / "imagesTr/prostate_01_0000.nii.gz", 3)
    mask(root / "labelsTr/prostate_00.nii.gz")
    volume(root / "imagesTs/prostate_07_0000.nii.gz", 4)
    (root / "imagesTr/._prostate_00_0000.nii.gz").write_bytes(b"ghost")
    return root


@pytest.fixture
def decathlon(tmp_path: Path) -> Path:
    """Two modalities in one 4-D file, two training cases and a test case."""
    root = tmp_path / "Task05_Prostate"
    for name in ("prostate_00", "prostate_02"):
        volume(root / f"imagesTr/{name}.nii.gz", 1, channels=2)
        mask(root / f"labelsTr/{name}.nii.gz")
    volume(root / "imagesTs/prostate_03.nii.gz", 2, channels=2)
    (root / "imagesTr/._prostate_00.nii.gz").write_bytes(b"ghost")
    return describe(
        root,
        modality={"0": "T2", "1": "ADC"},
        labels={"0": "background", "1": "PZ", "2": "TZ"},
        training=[
            {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}
            for name in ("prostate_00", "prostate_02", "._prostate_00")
        ],
        test=["./imagesTs/prostate_03.nii.gz"],
    )


@pytest.fixture
def glioma(tmp_path: Path) -> Path:
    root = tmp_path / "glioma"
    for split, case_id, names in (
        ("train", "0007", ("t1", "t1c", "t2", "flair", "seg")),
        ("train", "UCSF-2", ("t1", "flair")),
        ("val", "0009", ("t1", "t1c", "t2", "flair")),
    ):
        for number, name in enumerate(names):
            volume(root / split / case_id / "preop" / f"sub-{case_id}_ses-preop_space-sri_{name}.nii.gz", number)
    (root / "phenoData.csv").write_text("Patient,Age,WHO2021_Int\n0007,50,4\n0009,61,2\nother,1,3\n")
    return root


def ids(cases: list[Case]) -> list[str]:
    return [case.case_id for case in cases]


# --- nnU-Net ---------------------------------------------------------------------------------------------------------


def test_nnunet_channels_become_sequences_and_the_label_a_region(nnunet: Path) -> None:
    assert detect_layout(nnunet) == "nnunet"
    assert layout_channels(nnunet, "nnunet") == ("t2", "adc_map")
    cases = read_layout_cases(nnunet, "nnunet", ("t2", "adc_map"), roi="any")
    assert [(c.case_id, c.split) for c in cases] == [
        ("prostate_00", "train"),
        ("prostate_01", "train"),
        ("prostate_07", "test"),
    ]
    assert cases[0].sequences["adc_map"].path == nnunet / "imagesTr/prostate_00_0001.nii.gz"
    assert cases[1].missing(("t2", "adc_map")) == ("adc_map",)
    assert [case.roi for case in cases] == [nnunet / "labelsTr/prostate_00.nii.gz", None, None]
    assert read_layout_cases(nnunet, "nnunet", ("t2",))[0].roi is None
    prepared = prepare_case(cases[0], ("adc_map", "t2"), PreprocessConfig())
    assert prepared.images_SZYX[:, 0, 0, 0].tolist() == [200, 100]
    assert prepared.roi_ZYX is not None
    assert int(prepared.roi_ZYX.sum()) == 5  # every class above 0


def test_nnunet_answers_to_channel_numbers_and_to_its_own_spelling(nnunet: Path) -> None:
    case = read_layout_cases(nnunet, "nnunet", ("0001", "T2", "t1"))[0]
    assert {name: sequence.path.name for name, sequence in case.sequences.items()} == {
        "0001": "prostate_00_0001.nii.gz",
        "T2": "prostate_00_0000.nii.gz",
    }


def test_nnunet_1_is_told_from_the_decathlon_by_its_files(nnunet: Path) -> None:
    entries = [{"image": "./imagesTr/prostate_00.nii.gz", "label": "./labelsTr/prostate_00.nii.gz"}]
    describe(nnunet, modality={"0": "T2", "1": "ADC map"}, training=entries, test=[])
    assert detect_layout(nnunet) == "nnunet"
    assert layout_channels(nnunet, "nnunet") == ("t2", "adc_map")


def test_equal_channel_names_get_their_number(nnunet: Path) -> None:
    describe(nnunet, channel_names={"0": "CT", "1": "ct", "2": "+"}, file_ending=".nii.gz")
    assert layout_channels(nnunet, "nnunet") == ("ct_0000", "ct_0001", "0002")


def test_nnunet_of_pictures_says_where_to_read_them(nnunet: Path) -> None:
    describe(nnunet, channel_names={"0": "R"}, file_ending=".png")
    with pytest.raises(DataError, match="Only NIfTI") as caught:
        read_layout_cases(nnunet, "nnunet", ("r",))
    assert "data.layout=images" in caught.value.fix


def test_a_file_without_channel_number_is_named(nnunet: Path) -> None:
    volume(nnunet / "imagesTr/extra.nii.gz")
    with pytest.raises(DataError, match="no channel number") as caught:
        read_layout_cases(nnunet, "nnunet", ("t2",))
    assert "extra" in caught.value.where


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("{", "Expecting"),
        ("[]", "no mapping"),
        ("[" * 100_000, "recursion"),
        ("{}", "channel_names or modality is missing"),
        ('{"channel_names": {"0": "a", "2": "b"}}', "[0, 2]"),
        ('{"channel_names": {"x": "a"}}', "channel numbers"),
        ('{"channel_names": {}}', "missing"),
        ('{"modality": {"0": "a"}, "training": {}}', "no list"),
        ('{"modality": {"0": "a"}, "training": [{"label": "x"}]}', "without image"),
    ],
)
def test_a_damaged_description_is_refused_in_one_sentence(decathlon: Path, text: str, detail: str) -> None:
    (decathlon / "dataset.json").write_text(text)
    with pytest.raises(DataError) as caught:
        read_layout_cases(decathlon, detect_layout(decathlon), layout_channels(decathlon, "decathlon"))
    assert caught.value.code == "layout_json"
    assert detail in caught.value.where
    assert len(caught.value.where) < 500


# --- Decathlon -------------------------------------------------------------------------------------------------------


def test_decathlon_modalities_are_volumes_of_one_file(decathlon: Path) -> None:
    assert detect_layout(decathlon) == "decathlon"
    assert layout_channels(decathlon, "decathlon") == ("t2", "adc")
    cases = read_layout_cases(decathlon, "decathlon", ("t2", "adc"), roi="x")
    assert [(c.case_id, c.split, c.roi is not None) for c in cases] == [
        ("prostate_00", "train", True),
        ("prostate_02", "train", True),
        ("prostate_03", "test", False),
    ]
    assert [s.volume_index for s in cases[0].sequences.values()] == [0, 1]
    prepared = prepare_case(cases[0], ("adc", "t2"), PreprocessConfig())
    assert prepared.images_SZYX[:, 0, 0, 0].tolist() == [1100, 100]


def test_decathlon_of_one_modality_is_three_dimensional(tmp_path: Path) -> None:
    root = tmp_path / "Task09_Spleen"
    volume(root / "imagesTr/spleen_2.nii.gz", 3)
    describe(root, modality={"0": "CT"}, training=[{"image": "./imagesTr/spleen_2.nii.gz"}])
    case = read_layout_cases(root, "decathlon", layout_channels(root, "decathlon"), roi="x")[0]
    assert (case.sequences["ct"].volume_index, case.roi) == (None, None)
    assert prepare_case(case, ("ct",), PreprocessConfig()).images_SZYX[0, 0, 0, 0] == 300


@pytest.mark.parametrize("bad", ["../x.nii.gz", "/etc/passwd", "imagesTr/../../x.nii.gz", "a\0b"])
def test_r13_paths_of_a_description_stay_inside(decathlon: Path, bad: str) -> None:
    for entry in ({"image": bad}, {"image": "imagesTr/prostate_00.nii.gz", "label": bad}):
        describe(decathlon, modality={"0": "T2"}, training=[entry])
        with pytest.raises(DataError) as caught:
            read_layout_cases(decathlon, "decathlon", ("t2",), roi="x")
        assert caught.value.code == "path_escapes"


def test_one_case_named_twice_is_refused(decathlon: Path) -> None:
    entry = {"image": "imagesTr/prostate_00.nii.gz"}
    describe(decathlon, modality={"0": "T2"}, training=[entry, entry])
    with pytest.raises(DataError, match="two cases"):
        read_layout_cases(decathlon, "decathlon", ("t2",))
    describe(decathlon, modality={"0": "T2"}, training=[entry], test=["imagesTr/prostate_00.nii.gz"])
    with pytest.raises(DataError) as caught:
        read_layout_cases(decathlon, "decathlon", ("t2",))
    assert caught.value.code == "split_leak"


def test_owners_of_a_labels_table_count_in_every_layout(decathlon: Path) -> None:
    (decathlon / "labels.csv").write_text("case_id,patient_id\nprostate_00,P1\nprostate_02,P1\n")
    cases = read_layout_cases(decathlon, "decathlon", ("t2",))
    assert [case.patient_id for case in cases] == ["P1", "P1", "prostate_03"]


# --- mm-dinov2 -------------------------------------------------------------------------------------------------------


def test_glioma_layout(glioma: Path) -> None:
    assert detect_layout(glioma) == "mmdinov2"
    assert layout_channels(glioma, "mmdinov2") == ("t1", "t1c", "t2", "flair")
    cases = read_layout_cases(glioma, "mmdinov2", ("t1", "t1c", "t2", "flair"), roi="seg")
    assert [(c.case_id, c.split, c.label) for c in cases] == [
        ("0007", "train", "4"),
        ("0009", "val", "2"),
        ("UCSF-2", "train", ""),
    ]
    assert cases[0].roi == glioma / "train/0007/preop/sub-0007_ses-preop_space-sri_seg.nii.gz"
    assert cases[2].missing(("t1", "t1c", "t2", "flair")) == ("t1c", "t2")
    assert "seg" not in cases[0].sequences


def test_glioma_case_in_two_splits_is_a_leak(glioma: Path) -> None:
    volume(glioma / "val/0007/preop/sub-0007_ses-preop_space-sri_t1.nii.gz")
    with pytest.raises(DataError, match="two cases") as caught:
        read_layout_cases(glioma, "mmdinov2", ("t1",))
    assert caught.value.code == "split_leak"
    assert "0007 in train and val" in caught.value.where


# --- templates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "place", "expected"),
    [
        ("{subject}/{sequence}.nii.gz", "P1", "P1"),
        ("{dataset}/{subject}/anat/{subject}_{sequence}.nii.gz", "siteA/P1", "siteA/P1"),
        ("{relative}/{sequence}.nii.gz", "a/b/P1", "a/b/P1"),
        ("{sequence}.nii.gz", "a/P1", "a/P1"),
        ("{dataset}/{sequence}.nii.gz", "D1", "D1"),
    ],
)
def test_templates_find_cases_and_files(tmp_path: Path, template: str, place: str, expected: str) -> None:
    folder = tmp_path / place
    if "anat" in template:
        paths = {name: folder / "anat" / f"P1_{name}.nii.gz" for name in ("t2", "adc", "gland")}
    else:
        paths = {name: folder / f"{name}.nii.gz" for name in ("t2", "adc", "gland")}
    for path in paths.values():
        volume(path)
    (tmp_path / ".hidden").mkdir()
    volume(tmp_path / ".hidden/t2.nii.gz")
    assert detect_layout(tmp_path, template) == "template"
    (case,) = read_layout_cases(tmp_path, "template", ("t2", "adc"), roi="gland", template=template)
    assert (case.case_id, case.roi) == (expected, paths["gland"])
    assert {name: s.path for name, s in case.sequences.items()} == {n: paths[n] for n in ("t2", "adc")}
    assert ids(read_layout_cases(tmp_path, "template", (), template=template)) == [expected]


def test_a_file_may_be_a_folder_of_its_name(tmp_path: Path) -> None:
    volume(tmp_path / "P1/t2.nii.gz/whatever.nii")
    volume(tmp_path / "P1/adc/0001.nii.gz")
    volume(tmp_path / "P1/AX_DWI_b1400.nii.gz")
    volume(tmp_path / "P1/ax_dwi_b50.nii.gz")
    names = ("t2", "adc", "ax_dwi")
    (case,) = read_layout_cases(tmp_path, "template", names, template="{subject}/{sequence}.nii.gz")
    found = {name: s.path.relative_to(tmp_path / "P1").as_posix() for name, s in case.sequences.items()}
    assert found == {"t2": "t2.nii.gz/whatever.nii", "adc": "adc/0001.nii.gz", "ax_dwi": "AX_DWI_b1400.nii.gz"}
    volume(tmp_path / "P1/t2.nii.gz/second.nii")
    with pytest.raises(DataError) as caught:
        read_layout_cases(tmp_path, "template", names, template="{subject}/{sequence}.nii.gz")
    assert caught.value.code == "sequence_ambiguous"


def test_lists_tell_cases_and_splits(tmp_path: Path) -> None:
    for name in ("siteA/P1", "siteA/P2", "siteB/P1", "siteB/P9"):
        volume(tmp_path / name / "series" / "t2.nii.gz")
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits/train.txt").write_text("siteA/P1\nsiteB/P1/\n\n")
    (tmp_path / "splits/test.txt").write_text("# held out\nsiteA/P2\n")
    read = {"layout": "template", "sequences": ("t2",), "template": "{sequence}.nii.gz"}
    cases = read_layout_cases(tmp_path, **read)  # type: ignore[arg-type]
    assert [(c.case_id, c.split) for c in cases] == [("siteA/P1", "train"), ("siteA/P2", "test"), ("siteB/P1", "train")]
    assert all("t2" in case.sequences for case in cases)  # found below the folder of the case
    volume(tmp_path / "siteA/P2/other/t2.nii.gz")
    with pytest.raises(DataError, match="Several files could be"):
        read_layout_cases(tmp_path, **read)  # type: ignore[arg-type]
    faults: list[str] = []
    cases = read_layout_cases(tmp_path, **read, on_fault=lambda name, _: faults.append(name))  # type: ignore[arg-type]
    assert (ids(cases), faults) == (["siteA/P1", "siteB/P1"], ["siteA/P2"])
    (tmp_path / "splits/test.txt").write_text("siteA/P1\n")
    with pytest.raises(DataError) as caught:
        read_layout_cases(tmp_path, **read)  # type: ignore[arg-type]
    assert caught.value.code == "split_leak"


@pytest.mark.parametrize("line", ["../x", "/etc", ".", "a/../b", ".."])
def test_r13_lists_stay_below_the_root(tmp_path: Path, line: str) -> None:
    (tmp_path / "root/splits").mkdir(parents=True)
    (tmp_path / "root/splits/train.txt").write_text(f"{line}\n")
    with pytest.raises(DataError) as caught:
        read_layout_cases(tmp_path / "root", "template", ("t2",), template="{relative}/{sequence}.nii.gz")
    assert caught.value.code == "path_escapes"


def test_r13_a_link_out_of_the_root_is_refused(tmp_path: Path) -> None:
    volume(tmp_path / "away.nii.gz")
    (tmp_path / "root/P1").mkdir(parents=True)
    (tmp_path / "root/P1/t2.nii.gz").symlink_to(tmp_path / "away.nii.gz")
    with pytest.raises(DataError) as caught:
        read_layout_cases(tmp_path / "root", "template", ("t2",), template="{subject}/{sequence}.nii.gz")
    assert caught.value.code == "path_escapes"


@pytest.mark.parametrize(
    "text", ["{subject}.nii", "{subjekt}/{sequence}", "{sequence", "/a/{sequence}", "../{sequence}"]
)
def test_templates_are_checked(text: str) -> None:
    with pytest.raises(ValueError, match=r"field|below the data root"):
        check_template(text)


def test_no_case_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="template has no case here"):
        read_layout_cases(tmp_path, "template", ("t2",), template="{subject}/{sequence}.nii.gz")


def test_lists_select_by_id(decathlon: Path, tmp_path: Path) -> None:
    cases = read_layout_cases(decathlon, "decathlon", ("t2",))
    (tmp_path / "some.csv").write_text("patient_id\nprostate_02\n")
    assert ids(select_cases(cases, tmp_path / "some.csv")) == ["prostate_02"]
    (tmp_path / "bad.csv").write_text("patient_id\nprostate_2\n")
    with pytest.raises(DataError, match="1 of 1 ids have no case") as caught:
        select_cases(cases, tmp_path / "bad.csv")
    assert "did you mean 'prostate_02'?" in caught.value.where


PARTS = ("{subject}", "{dataset}", "{relative}", "{sequence}", "{x}", "/", "..", ".nii.gz", "{", "}", "a(", "\\", "\0")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(PARTS), max_size=6).map("".join), st.text(max_size=12))
def test_r21_any_template_and_list_is_read_or_refused(tmp_path: Path, text: str, line: str) -> None:
    (tmp_path / "splits").mkdir(exist_ok=True)
    (tmp_path / "P1").mkdir(exist_ok=True)
    (tmp_path / "P1/t2.nii.gz").write_bytes(b"")
    (tmp_path / "splits/train.txt").write_text(f"P1\n{line}\n", encoding="utf-8", newline="")
    try:
        check_template(text)
        cases = read_layout_cases(tmp_path, "template", ("t2",), roi="roi", template=text)
    except (ValueError, DataError):
        return
    assert "P1" in ids(cases)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.sampled_from(["0", "1", "T2", "imagesTr/a.nii.gz", "../x"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["modality", "channel_names", "training", "test", "image", "label", "file_ending", "0"]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_r21_any_description_is_read_or_refused(tmp_path: Path, description: Any) -> None:
    (tmp_path / "imagesTr").mkdir(exist_ok=True)
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    try:
        layout = detect_layout(tmp_path)
        cases = read_layout_cases(tmp_path, layout, layout_channels(tmp_path, layout), roi="x")
    except DataError:
        return
    assert all(case.case_id for case in cases)


def test_a_template_beside_another_layout_is_refused(tmp_path: Path) -> None:
    template = "{subject}/{sequence}.nii.gz"
    assert asked_layout(tmp_path, "auto", template) == asked_layout(tmp_path, "template", template) == "template"
    assert asked_layout(tmp_path, "nnunet", "") == "nnunet"
    for layout, text, word in (
        ("nnunet", template, "no effect"),
        ("template", "", "{sequence}"),
        ("auto", "x", "field"),
    ):
        with pytest.raises(ConfigError) as caught:
            asked_layout(tmp_path, layout, text)  # type: ignore[arg-type]
        assert word in caught.value.where
