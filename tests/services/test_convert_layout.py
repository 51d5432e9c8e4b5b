"""Published layouts, written here after their documents, become what our own readers take without any option."""

from __future__ import annotations

import csv
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medssl_cli.core.errors import ConfigError, DataError, MedsslError, PartialFailure
from medssl_cli.core.volume import Volume
from medssl_cli.data.ct_pet import read_ct_pet
from medssl_cli.data.images import read_volume, write_volume
from medssl_cli.data.labelled_cases import described_spec, find_label_cases, find_label_pictures
from medssl_cli.data.layouts import detect_layout
from medssl_cli.data.manifest import read_cases, read_ids, read_image_cases, read_owners
from medssl_cli.services import convert_layout as module
from medssl_cli.services.convert_layout import LayoutRequest, LayoutResult, convert_layout

AFFINE = np.array([[-0.7, 0.1, 0, 12.5], [0.1, 0.8, 0.02, -3.25], [0, -0.02, 3.1, 40.125], [0, 0, 0, 1]])


def run(source: Path, out: Path, kind: str, **more: Any) -> LayoutResult:
    return convert_layout(LayoutRequest(source, out, kind, **more))


def converted(source: Path, out: Path, kind: str, **more: Any) -> LayoutResult:
    result = run(source, out, kind, **more)
    assert result.error is None, result.error
    return result


def refused(source: Path, out: Path, kind: str, **more: Any) -> MedsslError:
    """The error of a conversion that writes nothing."""
    try:
        error = run(source, out, kind, **more).error
    except MedsslError as raised:
        error = raised
    assert error is not None
    assert not out.exists()
    assert not out.with_name(f".{out.name}.partial").exists()
    return error


def volume(path: Path, channels: int = 1, seed: int = 0, shape: tuple[int, ...] = (3, 4, 5)) -> Path:
    array = np.random.default_rng(seed).integers(0, 900, (channels, *shape)).astype(np.int16)
    write_volume(path, Volume(array if channels > 1 else array[0], AFFINE))
    return path


def mask(path: Path) -> Path:
    array = np.zeros((3, 4, 5), np.uint8)
    array[1, 1:3, 1:3] = 2
    array[1, 0, 0] = 1
    write_volume(path, Volume(array, AFFINE))
    return path


def picture(path: Path, seed: int = 0, side: int = 16, values: int = 256) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(seed).integers(0, values, (side, side)).astype(np.uint8)
    Image.fromarray(array).save(path)
    return path


def describe(root: Path, **values: Any) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset.json").write_text(json.dumps(values), encoding="utf-8")
    return root


def files_of(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# --- sources ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def pclt(tmp_path: Path) -> Path:
    root = tmp_path / "PCLT20K"
    for n, (patient, number) in enumerate([("0001", "001"), ("0001", "002"), ("0007", "001"), ("0010", "003")]):
        for kind in ("CT", "PET", "mask"):
            picture(root / patient / f"{patient}_{number}_{kind}.png", seed=n, values=2 if kind == "mask" else 256)
    return root


@pytest.fixture
def nnunet(tmp_path: Path) -> Path:
    root = describe(
        tmp_path / "Dataset501_Prostate",
        name="Prostate",
        channel_names={"0": "T2", "1": "ADC map"},
        labels={"background": 0, "PZ": 1, "TZ": 2},
        numTraining=2,
        file_ending=".nii.gz",
    )
    for n, name in enumerate(("prostate_00", "prostate_01")):
        for channel in (0, 1):
            volume(root / f"imagesTr/{name}_{channel:04d}.nii.gz", seed=10 * n + channel)
        mask(root / f"labelsTr/{name}.nii.gz")
    for channel in (0, 1):
        volume(root / f"imagesTs/prostate_07_{channel:04d}.nii.gz", seed=70 + channel)
    (root / "imagesTr/._prostate_00_0000.nii.gz").write_bytes(b"ghost")
    return root


@pytest.fixture
def decathlon(tmp_path: Path) -> Path:
    root = tmp_path / "Task05_Prostate"
    for n, name in enumerate(("prostate_00", "prostate_02")):
        volume(root / f"imagesTr/{name}.nii.gz", channels=2, seed=n)
        mask(root / f"labelsTr/{name}.nii.gz")
    volume(root / "imagesTs/prostate_03.nii.gz", channels=2, seed=9)
    return describe(
        root,
        name="PROSTATE",
        modality={"0": "T2", "1": "ADC"},
        labels={"0": "background", "1": "PZ", "2": "TZ"},
        training=[
            {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}
            for name in ("prostate_00", "prostate_02")
        ],
        test=["./imagesTs/prostate_03.nii.gz"],
    )


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    root = tmp_path / "imagenet"
    for part, count in (("training", 4), ("val", 2), ("test", 2)):
        for name in ("cat", "dog"):
            for n in range(count):
                picture(root / part / name / f"P{n:02d}{part[1]}_{name}.png", seed=hash((part, name, n)) % 1000)
    (root / "classes.txt").write_text("cat\ndog\n")
    return root


@pytest.fixture
def vfm(tmp_path: Path) -> Path:
    """Two data sets of one task, with blank lines, comments and Windows line ends."""
    root = tmp_path / "FundusClassification"
    for dataset in ("IDRiD", "APTOS"):
        for part, count in (("training", 4), ("test", 2)):
            lines = ["# path;class", ""]
            for n in range(count):
                picture(root / dataset / part / f"{n}.png", seed=n + 10 * len(lines) + len(dataset))
                lines.append(f"{part}/{n}.png; {n % 2}")
            (root / dataset / f"{part}_labels.txt").write_bytes("\r\n".join(lines).encode())
    return root


@pytest.fixture
def vessels(tmp_path: Path) -> Path:
    root = tmp_path / "VesselSegmentation"
    for part, count in (("training", 3), ("test", 2)):
        for n in range(count):
            picture(root / "DRIVE" / part / "images" / f"{n}.v1.jpg", seed=n)
            picture(root / "DRIVE" / part / "labels" / f"{n}.v1.png", seed=n, values=3)
    return root


# --- PCLT20K ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", ["link", "copy", None])
def test_pclt20k_becomes_a_ct_pet_tree(pclt: Path, tmp_path: Path, files: str | None) -> None:
    result = converted(pclt, tmp_path / "out", "pclt20k", files=files)
    data = read_ct_pet(tmp_path / "out")
    assert data.layout == "flat"
    triples = {triple.name: triple for triple in data.parts["all"]}
    assert sorted(triples) == [
        f"patient_{name}.png" for name in ("0001_slice_001", "0001_slice_002", "0007_slice_001", "0010_slice_003")
    ]
    assert {triple.patient_id for triple in triples.values()} == {"patient_0001", "patient_0007", "patient_0010"}
    assert triples["patient_0007_slice_001.png"].pet.read_bytes() == (pclt / "0007/0007_001_PET.png").read_bytes()
    link = tmp_path / "out/masks/patient_0001_slice_002.png"
    assert link.is_symlink() == (files != "copy")
    if files != "copy":
        assert os.readlink(link) == "../../PCLT20K/0001/0001_002_mask.png"
    mapped = {row["target"]: row["source"] for row in rows(tmp_path / "out/layout_map.csv")}
    assert len(mapped) == 12
    assert mapped["CT/patient_0010_slice_003.png"] == "0010/0010_003_CT.png"
    assert "4 slices of 3 patients" in result.summary()


def test_folders_of_a_split_stay(pclt: Path, tmp_path: Path) -> None:
    for part, patient in (("train", "0001"), ("val", "0007"), ("test", "0010")):
        (pclt / part).mkdir()
        shutil.move(pclt / patient, pclt / part / patient)
    converted(pclt, tmp_path / "out", "pclt20k")
    data = read_ct_pet(tmp_path / "out")
    assert data.layout == "presplit"
    assert {part: len(found) for part, found in data.parts.items()} == {"train": 2, "val": 1, "test": 1}


def test_every_slice_without_its_partner_is_told_at_once(pclt: Path, tmp_path: Path) -> None:
    (pclt / "0001/0001_001_PET.png").unlink()
    (pclt / "0010/0010_003_mask.png").unlink()
    picture(pclt / "0007/overview.png")
    error = refused(pclt, tmp_path / "out", "pclt20k")
    assert error.exit_code == 3
    for name in ("0001/0001_001_PET.png", "0010/0010_003_mask.png", "0007/overview.png"):
        assert name in error.where
    result = run(pclt, tmp_path / "out", "pclt20k", on_error="skip")
    assert isinstance(result.error, PartialFailure)
    assert len(read_ct_pet(tmp_path / "out").parts["all"]) == 2
    listed = rows(tmp_path / "out/failures.csv")
    assert list(listed[0]) == ["case_id", "path", "reason", "fix"]
    assert len(listed) == 3


def test_r12_a_patient_in_two_parts_is_refused(pclt: Path, tmp_path: Path) -> None:
    for part in ("train", "test"):
        shutil.copytree(pclt / "0001", pclt / part / "0001")
    error = refused(pclt, tmp_path / "out", "pclt20k")
    assert error.code == "split_leak"
    assert "0001" in error.where


# --- nnU-Net ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", ["copy", "link"])
def test_nnunet_becomes_a_tree_of_cases(nnunet: Path, tmp_path: Path, files: str) -> None:
    out = tmp_path / "out"
    converted(nnunet, out, "nnunet", files=files)
    assert detect_layout(out) == "cases"
    assert (out / "prostate_01/adc_map.nii.gz").read_bytes() == (
        nnunet / "imagesTr/prostate_01_0001.nii.gz"
    ).read_bytes()
    assert (out / "prostate_01/label.nii.gz").read_bytes() == (nnunet / "labelsTr/prostate_01.nii.gz").read_bytes()
    assert os.path.samefile(out / "prostate_01/t2.nii.gz", nnunet / "imagesTr/prostate_01_0000.nii.gz") == (
        files == "link"
    )
    cases = read_cases(out, ("t2", "adc_map"), split_csv=None)
    assert [case.case_id for case in cases] == ["prostate_00", "prostate_01", "prostate_07"]
    assert all(set(case.sequences) == {"t2", "adc_map"} for case in cases)
    found = find_label_cases(out, "auto", ("t2", "adc_map"), "label", split_csv=out / "train.csv")
    assert [case.case_id for case in found] == ["prostate_00", "prostate_01"]
    assert read_ids(out / "test.csv").ids == ("prostate_07",)
    spec = described_spec(out)
    assert spec is not None
    assert (spec.classes, spec.values) == (("background", "PZ", "TZ"), {0: 0, 1: 1, 2: 2})


def test_nnunet_1_names_its_channels_modality(nnunet: Path, tmp_path: Path) -> None:
    describe(
        nnunet,
        modality={"0": "T2", "1": "ADC"},
        labels={"0": "background", "1": "PZ", "2": "TZ"},
        training=[],
        numTest=1,
    )
    converted(nnunet, tmp_path / "out", "nnunet")
    assert sorted(p.name for p in (tmp_path / "out/prostate_00").iterdir()) == [
        "adc.nii.gz",
        "label.nii.gz",
        "t2.nii.gz",
    ]
    spec = described_spec(tmp_path / "out")
    assert spec is not None
    assert spec.classes == ("background", "PZ", "TZ")


def test_uncompressed_files_stay_uncompressed(nnunet: Path, tmp_path: Path) -> None:
    for path in [*nnunet.rglob("[!.]*.nii.gz")]:
        nib.save(nib.load(path), path.with_name(path.name[:-3]))
        path.unlink()
    description = json.loads((nnunet / "dataset.json").read_text())
    describe(nnunet, **{**description, "file_ending": ".nii"})
    converted(nnunet, tmp_path / "out", "nnunet")
    found = read_cases(tmp_path / "out", ("t2",), roi="label")
    assert found[0].sequences["t2"].path.name == "t2.nii"
    assert found[0].roi is not None


def test_incomplete_cases_are_told_at_once(nnunet: Path, tmp_path: Path) -> None:
    (nnunet / "imagesTr/prostate_00_0001.nii.gz").unlink()
    (nnunet / "labelsTr/prostate_01.nii.gz").unlink()
    mask(nnunet / "labelsTr/prostate_05.nii.gz")
    volume(nnunet / "imagesTr/localizer.nii.gz")
    volume(nnunet / "imagesTs/prostate_07_0002.nii.gz")
    error = refused(nnunet, tmp_path / "out", "nnunet")
    assert error.exit_code == 3
    for text in (
        "imagesTr/prostate_00: channel 0001 is missing",
        "imagesTr/prostate_01: there is no label map",
        "labelsTr/prostate_05.nii.gz: the label map has no image",
        "imagesTr/localizer.nii.gz: the file has no channel number",
        "imagesTs/prostate_07: channel 0002 is one too many",
    ):
        assert text in error.where


@pytest.mark.parametrize("text", ["{", '{"labels": {}}', '{"channel_names": {"0": "a", "2": "b"}}', "[1]", ""])
def test_a_damaged_description_is_refused(nnunet: Path, tmp_path: Path, text: str) -> None:
    (nnunet / "dataset.json").write_text(text)
    error = refused(nnunet, tmp_path / "out", "nnunet")
    assert (error.exit_code, error.code) == (3, "layout_json")
    assert "dataset.json" in error.where
    assert refused(nnunet, tmp_path / "out", "nnunet", on_error="skip").exit_code == 3


def test_regions_become_the_values_that_they_consist_of(nnunet: Path, tmp_path: Path) -> None:
    description = json.loads((nnunet / "dataset.json").read_text())
    labels = {"background": 0, "whole gland": [1, 2], "TZ": [2], "ignore": 3}
    describe(nnunet, **{**description, "labels": labels, "regions_class_order": [1, 2]})
    result = converted(nnunet, tmp_path / "out", "nnunet")
    assert json.loads((tmp_path / "out/dataset.json").read_text())["labels"] == {
        "background": 0,
        "class_1": 1,
        "TZ": 2,
        "ignore": 3,
    }
    assert "'whole gland'" in result.summary()
    spec = described_spec(tmp_path / "out")
    assert spec is not None
    assert spec.ignore_values == (3,)


def test_pictures_of_nnunet_go_beside_their_label_maps(tmp_path: Path) -> None:
    root = describe(
        tmp_path / "Dataset120_Roads",
        channel_names={"0": "R", "1": "G", "2": "B"},
        labels={"background": 0, "road": 1},
        file_ending=".png",
    )
    for folder, name in (("Tr", "img-1"), ("Tr", "img-2"), ("Ts", "img-9")):
        picture(root / f"images{folder}/{name}_0000.png", seed=len(name))
        if folder == "Tr":
            picture(root / f"labels{folder}/{name}.png", values=2)
    converted(root, tmp_path / "out", "nnunet")
    found = find_label_pictures(tmp_path / "out")
    assert [(case.case_id, case.split) for case in found] == [
        ("train/images/img-1.png", "train"),
        ("train/images/img-2.png", "train"),
    ]
    assert all(case.roi is not None for case in found)
    assert (tmp_path / "out/test/images/img-9.png").is_file()
    spec = described_spec(tmp_path / "out")
    assert spec is not None
    assert spec.classes == ("background", "road")
    picture(root / "imagesTr/img-1_0001.png")
    assert "join its channels first" in refused(root, tmp_path / "out2", "nnunet").fix


def test_folds_become_lists_that_no_reader_takes_for_cases(nnunet: Path, tmp_path: Path) -> None:
    folds = [{"train": ["prostate_00"], "val": ["prostate_01"]}, {"train": ["prostate_01"], "val": ["prostate_00"]}]
    (nnunet / "splits_final.json").write_text(json.dumps(folds))
    out = tmp_path / "out"
    result = converted(nnunet, out, "nnunet")
    assert read_ids(out / "folds/fold_1/val.csv").ids == ("prostate_00",)
    assert "folds" not in [case.case_id for case in read_cases(out, ("t2",))]
    assert f"--splits {out}/folds/fold_0" in result.summary()
    (nnunet / "splits_final.json").write_text(json.dumps([{"train": ["prostate_99"], "val": []}]))
    error = refused(nnunet, tmp_path / "out2", "nnunet")
    assert "prostate_99" in error.where


# --- Decathlon -------------------------------------------------------------------------------------------------------


def test_decathlon_is_cut_into_its_channels(decathlon: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = converted(decathlon, out, "decathlon")
    whole = nib.load(decathlon / "imagesTr/prostate_02.nii.gz")
    for number, stem in enumerate(("t2", "adc")):
        one = nib.load(out / f"prostate_02/{stem}.nii.gz")
        assert np.array_equal(one.dataobj, np.asarray(whole.dataobj)[..., number])
        assert np.array_equal(one.affine, whole.affine)
        assert one.header.get_zooms() == whole.header.get_zooms()[:3]
    assert (out / "prostate_02/label.nii.gz").read_bytes() == (decathlon / "labelsTr/prostate_02.nii.gz").read_bytes()
    assert read_ids(out / "train.csv").ids == ("prostate_00", "prostate_02")
    assert read_ids(out / "test.csv").ids == ("prostate_03",)
    found = find_label_cases(out, "auto", ("t2", "adc"), "label", split_csv=out / "train.csv")
    assert len(found) == 2
    assert "6 of them cut from 4-D files" in result.summary()
    assert {row["volume"] for row in rows(out / "layout_map.csv") if row["target"].endswith("adc.nii.gz")} == {"1"}


def test_decathlon_of_one_modality_is_copied(decathlon: Path, tmp_path: Path) -> None:
    for path in decathlon.glob("images*/*.nii.gz"):
        volume(path)
    description = json.loads((decathlon / "dataset.json").read_text())
    describe(decathlon, **{**description, "modality": {"0": "CT"}})
    converted(decathlon, tmp_path / "out", "decathlon")
    source, target = decathlon / "imagesTs/prostate_03.nii.gz", tmp_path / "out/prostate_03/ct.nii.gz"
    assert target.read_bytes() == source.read_bytes()


def test_faulty_entries_of_decathlon_are_told_at_once(decathlon: Path, tmp_path: Path) -> None:
    volume(decathlon / "imagesTr/prostate_00.nii.gz", channels=3)
    (decathlon / "imagesTs/prostate_03.nii.gz").unlink()
    description = json.loads((decathlon / "dataset.json").read_text())
    description["training"][1].pop("label")
    describe(decathlon, **description)
    error = refused(decathlon, tmp_path / "out", "decathlon")
    assert error.exit_code == 3
    for text in (
        "prostate_00.nii.gz: 3 volumes in one file, 2 expected",
        "there is no label map",
        "The file is missing",
    ):
        assert text in error.where


@pytest.mark.parametrize("bad", ["../outside.nii.gz", "/etc/passwd", "a\0b.nii.gz"])
def test_r13_entries_that_leave_the_folder_are_refused(decathlon: Path, tmp_path: Path, bad: str) -> None:
    volume(tmp_path / "outside.nii.gz", channels=2)
    description = json.loads((decathlon / "dataset.json").read_text())
    description["training"][0]["image"] = bad
    describe(decathlon, **description)
    assert refused(decathlon, tmp_path / "out", "decathlon").code == "path_escapes"


@pytest.mark.parametrize("kind", ["nnunet", "imagenet", "vfm"])
def test_r13_links_out_of_the_source_are_refused(
    kind: str, nnunet: Path, imagenet: Path, vfm: Path, tmp_path: Path
) -> None:
    secret = picture(tmp_path / "secret.png")
    place = {
        "nnunet": nnunet / "imagesTr/prostate_00_0000.nii.gz",
        "imagenet": imagenet / "val/cat/P00a_cat.png",
        "vfm": vfm / "IDRiD/training/0.png",
    }[kind]
    place.unlink()
    place.symlink_to(volume(tmp_path / "secret.nii.gz") if kind == "nnunet" else secret)
    error = refused({"nnunet": nnunet, "imagenet": imagenet, "vfm": vfm}[kind], tmp_path / "out", kind)
    assert (error.exit_code, error.code) == (3, "path_escapes")


# --- ImageNet --------------------------------------------------------------------------------------------------------


def test_class_folders_keep_their_places_and_get_a_table(imagenet: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = converted(imagenet, out, "imagenet")
    cases = read_image_cases(out)
    assert {(case.split, case.label) for case in cases} == {
        (s, c) for s in ("train", "val", "test") for c in ("cat", "dog")
    }
    assert len(cases) == 16
    table = rows(out / "labels.csv")
    assert list(table[0]) == ["image", "label", "split"]
    assert {row["image"]: (row["label"], row["split"]) for row in table} == {
        c.case_id: (c.label, c.split) for c in cases
    }
    assert read_ids(out / "train.csv").ids == tuple(c.case_id for c in cases if c.split == "train")
    assert "left alone: 1 file of the source, e.g. classes.txt" in result.summary()


def test_a_group_pattern_tells_patients(imagenet: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = converted(imagenet, out, "imagenet", group_pattern=r"(P\d+\w)_")
    assert result.plan.n_patients == 8
    assert list(rows(out / "labels.csv")[0]) == ["image", "patient_id", "label", "split"]
    chosen = read_image_cases(out, split_csv=out / "train.csv")
    assert {case.patient_id for case in chosen} == {"P00r", "P01r", "P02r", "P03r"}
    error = refused(imagenet, tmp_path / "out2", "imagenet", group_pattern=r"(P\d+)")
    assert error.code == "split_leak"


def test_folders_of_one_meaning_must_not_collide(imagenet: Path, tmp_path: Path) -> None:
    picture(imagenet / "train/cat/P00r_cat.png", seed=77)
    picture(imagenet / "train/CAT/P09r_cat.png", seed=78)
    picture(imagenet / "training/cat/p09R_cat.png", seed=79)
    error = refused(imagenet, tmp_path / "out", "imagenet")
    assert error.code == "name_collision"
    assert "train/cat/P00r_cat.png" in error.where
    assert "P09r_cat.png" in error.where
    result = run(imagenet, tmp_path / "out", "imagenet", on_error="skip")
    assert result.error is not None
    assert result.error.exit_code == 4
    assert not (tmp_path / "out/train/cat/P00r_cat.png").exists()
    assert len(read_image_cases(tmp_path / "out")) == 15


def test_pictures_outside_class_folders_are_told(imagenet: Path, tmp_path: Path) -> None:
    picture(imagenet / "val/stray.png")
    picture(imagenet / "extra/cat/a.png")
    (imagenet / "test/dog/empty.png").write_bytes(b"")
    error = refused(imagenet, tmp_path / "out", "imagenet")
    for text in (
        "val/stray.png: the picture lies in no class folder",
        "extra/cat/a.png: the picture lies in no folder of the split",
        "test/dog/empty.png: the file is empty",
    ):
        assert text in error.where


def test_classes_without_a_split(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for n in range(2):
            picture(tmp_path / "src" / name / f"{n}.png", seed=n)
    result = converted(tmp_path / "src", tmp_path / "out", "imagenet")
    assert [row["image"] for row in rows(tmp_path / "out/labels.csv")] == ["a/0.png", "a/1.png", "b/0.png", "b/1.png"]
    assert not (tmp_path / "out/train.csv").exists()
    assert "medssl split" in result.summary()


# --- VisionFM --------------------------------------------------------------------------------------------------------


def test_folders_of_modalities_get_their_canonical_names(tmp_path: Path) -> None:
    root = tmp_path / "pretrain"
    for folder in ("Fundus", "Silt-Lamp/a", "UltraSound", "External Eye"):
        picture(root / folder / "1.png")
    (root / "Fundus/notes.txt").write_text("x")
    converted(root, tmp_path / "out", "vfm")
    assert [case.case_id for case in read_image_cases(tmp_path / "out")] == [
        "external/1.png",
        "fundus/1.png",
        "slitlamp/a/1.png",
        "ultrasound/1.png",
    ]
    picture(root / "Fundos/1.png")
    picture(root / "SlitLamp/a/1.png")
    error = refused(root, tmp_path / "out2", "vfm")
    assert "did you mean fundus?" in error.where
    assert "2 files would be called slitlamp/a/1.png" in error.where


def test_label_files_become_one_table(vfm: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    picture(vfm / "IDRiD/training/unlisted.png")
    result = converted(vfm, out, "vfm")
    table = {row["image"]: row for row in rows(out / "labels.csv")}
    assert len(table) == 12
    assert table["train/IDRiD__3.png"] == {
        "image": "train/IDRiD__3.png",
        "label": "1",
        "dataset": "IDRiD",
        "split": "train",
    }
    assert (out / "train/APTOS__0.png").read_bytes() == (vfm / "APTOS/training/0.png").read_bytes()
    cases = read_image_cases(out)
    assert {case.case_id: case.split for case in cases} == {name: row["split"] for name, row in table.items()}
    assert {case.label for case in cases} == {""}  # a folder of a data set is no class
    assert "IDRiD/training/unlisted.png" in result.report()["left_alone"]
    assert "--task binary --target label" in result.summary()


def test_one_data_set_may_be_named_itself(vfm: Path, tmp_path: Path) -> None:
    (vfm / "IDRiD/groups.csv").write_text("image,group\n0.png,A\ntraining/1.png,A\n2,B\n3,B\ntest/0.png,C\n")
    shutil.move(vfm / "IDRiD/test/0.png", vfm / "IDRiD/test/t0.png")
    shutil.move(vfm / "IDRiD/test/1.png", vfm / "IDRiD/test/t1.png")
    (vfm / "IDRiD/test_labels.txt").write_text("# classes: healthy, ill\ntest/t0.png;0\ntest/t1.png;1\n")
    assert refused(vfm / "IDRiD", tmp_path / "out", "vfm").code == "label_tasks"
    (vfm / "IDRiD/training_labels.txt").write_text(
        "# classes: healthy, ill\n" + "".join(f"training/{n}.png;{n % 2}\n" for n in range(4))
    )
    converted(vfm / "IDRiD", tmp_path / "out", "vfm")
    table = {row["image"]: row for row in rows(tmp_path / "out/labels.csv")}
    assert table["train/1.png"] == {
        "image": "train/1.png",
        "patient_id": "A",
        "label": "1",
        "label_name": "ill",
        "split": "train",
    }
    assert table["test/t1.png"]["patient_id"] == "test/t1.png"
    (vfm / "IDRiD/test_labels.txt").write_text("# classes: healthy, ill\ntest/t0.png;2\n")
    assert "2 is none of 2 classes" in refused(vfm / "IDRiD", tmp_path / "out2", "vfm").where


def test_several_flags_or_numbers_become_columns(vfm: Path, tmp_path: Path) -> None:
    shutil.rmtree(vfm / "APTOS")
    for part, count in (("training", 4), ("test", 2)):
        lines = [f"{part}/{n}.png;0.05,{n},nan" for n in range(count)]
        (vfm / f"IDRiD/{part}_labels.txt").write_text("# classes: width, angle, age\n" + "\n".join(lines))
    result = converted(vfm, tmp_path / "out", "vfm")
    assert rows(tmp_path / "out/labels.csv")[3] == {
        "image": "train/3.png",
        "width": "0.05",
        "angle": "3",
        "age": "",
        "split": "train",
    }
    assert "--task regression --target width,angle,age" in result.summary()


def test_w25_lines_of_all_spellings_name_the_same_pictures(vfm: Path, tmp_path: Path) -> None:
    shutil.rmtree(vfm / "APTOS")
    lines = [
        "training/0.png;0",
        "training\\1.png;1",
        f"{vfm / 'IDRiD/training/2.png'};0",
        "./training/3.png ; 1",
        "training/3.png;1",
    ]
    (vfm / "IDRiD/training_labels.txt").write_bytes(("\ufeff# x\r\n\r\n" + "\r\n".join(lines)).encode())
    converted(vfm, tmp_path / "out", "vfm")
    labels = {row["image"]: row["label"] for row in rows(tmp_path / "out/labels.csv") if row["split"] == "train"}
    assert labels == {"train/0.png": "0", "train/1.png": "1", "train/2.png": "0", "train/3.png": "1"}


def test_faulty_label_lines_are_told_at_once_with_file_and_line(vfm: Path, tmp_path: Path) -> None:
    shutil.rmtree(vfm / "APTOS")
    picture(tmp_path / "outside.png")
    lines = [
        "training/0.png;0",
        "training/9.png;0",
        "training/0.png;1",
        "../../outside.png;1",
        "test/0.png;1",
        "/nowhere/1.png;1",
    ]
    (vfm / "IDRiD/training_labels.txt").write_text("\n".join(lines))
    error = refused(vfm, tmp_path / "out", "vfm")
    assert error.exit_code == 3
    for line, text in (
        (2, "no such picture: training/9.png"),
        (3, "the picture has another label in training_labels.txt, line 1"),
        (4, "../../outside.png"),
        (6, "/nowhere/1.png"),
    ):
        assert any(
            w.startswith(f"IDRiD/training_labels.txt, line {line}:") and text in w for w in error.where.splitlines()
        )
    assert "test_labels.txt, line 3: the picture is in train and test" in error.where


def test_forecasts_keep_their_intervals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "forecast"
    for part in ("training", "test"):
        for n in range(2):
            picture(root / part / f"{n}.png", seed=n)
    (root / "training_labels.txt").write_text("forecast/training/0.png, 1, 309\ntraining/1.png,0,690\n")
    (root / "test_labels.csv").write_text("image,label,interval_days,patient_id\ntest/0.png,1,12,P1\n")
    monkeypatch.chdir(tmp_path)
    result = converted(root, tmp_path / "out", "vfm")
    table = rows(tmp_path / "out/labels.csv")
    assert [(row["image"], row["label"], row["interval_days"]) for row in table] == [
        ("train/0.png", "1", "309"),
        ("train/1.png", "0", "690"),
        ("test/0.png", "1", "12"),
    ]
    assert table[2]["patient_id"] == "P1"
    assert "labels and intervals" in result.summary()


def test_pictures_and_label_maps_keep_their_stems(vessels: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = converted(vessels, out, "vfm")
    found = find_label_pictures(out)
    assert [(c.case_id, c.split) for c in found if c.split == "test"] == [
        ("test/images/0.v1.jpg", "test"),
        ("test/images/1.v1.jpg", "test"),
    ]
    first = next(case for case in found if case.case_id == "train/images/2.v1.jpg")
    assert first.roi == out / "train/labels/2.v1.png"
    assert first.roi.read_bytes() == (vessels / "DRIVE/training/labels/2.v1.png").read_bytes()
    assert f"medssl segment --task semantic --data {out}" in result.summary()


def test_label_maps_of_two_data_sets_do_not_meet(vessels: Path, tmp_path: Path) -> None:
    shutil.copytree(vessels / "DRIVE/training", vessels / "STARE/training")
    converted(vessels, tmp_path / "out", "vfm")
    names = sorted(p.name for p in (tmp_path / "out/train/labels").iterdir())
    assert names == [f"{d}__{n}.v1.png" for d in ("DRIVE", "STARE") for n in range(3)]


def test_pictures_or_label_maps_alone_are_told(vessels: Path, tmp_path: Path) -> None:
    (vessels / "DRIVE/training/labels/0.v1.png").unlink()
    picture(vessels / "DRIVE/test/labels/9.png", values=2)
    np.save(vessels / "DRIVE/training/labels/1.v1.npy", np.zeros((16, 16, 3), np.uint8))
    (vessels / "DRIVE/training/labels/1.v1.png").unlink()
    error = refused(vessels, tmp_path / "out", "vfm")
    for text in ("0.v1.jpg: no label map", "9.png: the label map has no picture", "landmarks are not trained here"):
        assert text in error.where


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "src/holiday/1.png")
    error = refused(tmp_path / "src", tmp_path / "out", "vfm")
    assert "training_labels.txt" in error.where
    assert refused(tmp_path / "src", tmp_path / "out", "nnunet").exit_code == 3
    assert refused(tmp_path / "src", tmp_path / "out", "decathlon").exit_code == 3
    assert refused(tmp_path / "src", tmp_path / "out", "pclt20k").exit_code == 3
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "empty", tmp_path / "out", "imagenet").exit_code == 3


# --- running again ---------------------------------------------------------------------------------------------------


def test_r16_a_second_run_does_only_what_is_missing(decathlon: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = converted(decathlon, out, "decathlon")
    before = {path: path.stat().st_ctime_ns for path in out.rglob("*.nii.gz")}
    assert (len(first.placed), len(first.kept)) == (8, 0)
    second = converted(decathlon, out, "decathlon")
    assert (len(second.placed), len(second.kept)) == (0, 8)
    assert "8 were up to date" in second.summary()
    (out / "prostate_00/adc.nii.gz").unlink()
    os.utime(decathlon / "labelsTr/prostate_02.nii.gz")
    third = converted(decathlon, out, "decathlon")
    assert sorted(file.target for file in third.placed) == ["prostate_00/adc.nii.gz", "prostate_02/label.nii.gz"]
    same = [path for path in before if before[path] == path.stat().st_ctime_ns]
    assert len(same) == 6


@pytest.mark.parametrize(("kind", "files"), [("pclt20k", "link"), ("pclt20k", "copy"), ("nnunet", "link")])
def test_links_and_copies_are_known_again(pclt: Path, nnunet: Path, tmp_path: Path, kind: str, files: str) -> None:
    source = {"pclt20k": pclt, "nnunet": nnunet}[kind]
    converted(source, tmp_path / "out", kind, files=files)
    again = converted(source, tmp_path / "out", kind, files=files)
    assert not again.placed
    other = converted(source, tmp_path / "out", kind, files="copy" if files == "link" else "link")
    assert not other.kept


class _Killed(BaseException):
    """What nothing catches."""


def test_r16_a_run_that_was_killed_is_gone_on_with(
    decathlon: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    converted(decathlon, undisturbed, "decathlon")
    placed: list[str] = []
    real = module._place_case

    def stop_at_third(result: LayoutResult, case: Any, folder: Path) -> None:
        if len(placed) == 2:
            raise _Killed
        placed.append(case.case_id)
        real(result, case, folder)

    monkeypatch.setattr(module, "_place_case", stop_at_third)
    with pytest.raises(_Killed):
        run(decathlon, out, "decathlon")
    assert not out.exists()
    (tmp_path / ".out.partial/prostate_03").mkdir(exist_ok=True)
    (tmp_path / ".out.partial/prostate_03/.t2.nii.gz.1.tmp.nii.gz").write_bytes(b"half")
    monkeypatch.setattr(module, "_place_case", real)
    result = converted(decathlon, out, "decathlon")
    assert (len(result.placed), len(result.kept)) == (2, 6)
    assert not (tmp_path / ".out.partial").exists()
    skip = {".lock", "convert_report.json"}
    assert {k: v for k, v in files_of(out).items() if k not in skip} == {
        k: v for k, v in files_of(undisturbed).items() if k not in skip
    }


def cut_off(path: Path) -> None:
    """A file whose header is sound and whose second channel ends early: found only when it is cut."""
    volume(path, channels=2, shape=(20, 80, 80))
    path.write_bytes(path.read_bytes()[:-2000])


def test_a_bad_file_costs_no_finished_result(decathlon: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    converted(decathlon, out, "decathlon")
    before = files_of(out)
    cut_off(decathlon / "imagesTr/prostate_02.nii.gz")
    result = run(decathlon, out, "decathlon", overwrite=True)
    assert isinstance(result.error, DataError)
    assert "prostate_02" in result.error.where
    assert files_of(out) == before
    skipped = run(decathlon, out, "decathlon", overwrite=True, on_error="skip")
    assert isinstance(skipped.error, PartialFailure)
    assert not (out / "prostate_02").exists()
    assert read_ids(out / "train.csv").ids == ("prostate_00",)
    assert [row["case_id"] for row in rows(out / "failures.csv")] == ["prostate_02"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Task05_Prostate", "out"]


def test_a_bad_file_costs_no_earlier_conversion(decathlon: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    converted(decathlon, out, "decathlon")
    before = {name: data for name, data in files_of(out).items() if name.endswith(".gz")}
    cut_off(decathlon / "imagesTr/prostate_02.nii.gz")
    for on_error, code in (("stop", 3), ("skip", 4)):
        error = run(decathlon, out, "decathlon", on_error=on_error).error
        assert error is not None
        assert error.exit_code == code
        assert "its earlier conversion was kept" in error.where
        assert {name: data for name, data in files_of(out).items() if name.endswith(".gz")} == before
    assert read_ids(out / "train.csv").ids == ("prostate_00", "prostate_02")
    assert not list(out.rglob(".*.tmp*"))


def test_a_result_that_has_more_than_the_source_is_refused(pclt: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    converted(pclt, out, "pclt20k", files="copy")
    shutil.rmtree(pclt / "0010")
    with pytest.raises(ConfigError) as caught:
        run(pclt, out, "pclt20k", files="copy")
    assert caught.value.code == "out_stale"
    assert "patient_0010_slice_003.png" in caught.value.where
    converted(pclt, out, "pclt20k", files="copy", overwrite=True)
    assert len(read_ct_pet(out).parts["all"]) == 3


def test_another_folder_is_not_replaced_unasked(pclt: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError):
        run(pclt, out, "pclt20k")
    assert (out / "thesis.txt").exists()
    converted(pclt, out, "pclt20k", overwrite=True)
    assert not (out / "thesis.txt").exists()
    assert len(read_ct_pet(out).parts["all"]) == 4


def test_the_working_directory_and_the_source_are_never_replaced(
    pclt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for out in (pclt, pclt / "out", tmp_path):
        with pytest.raises(ConfigError):
            run(pclt, out, "pclt20k", overwrite=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ConfigError) as caught:
        run(pclt, Path(), "pclt20k")
    assert caught.value.code == "out_is_cwd"


def test_hard_links_over_disks_are_refused_with_the_way_out(
    nnunet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(18, os.strerror(18))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(MedsslError) as caught:
        run(nnunet, tmp_path / "out", "nnunet", files="link")
    assert (caught.value.exit_code, "--files copy" in caught.value.fix) == (6, True)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_writes_nothing(nnunet: Path, tmp_path: Path) -> None:
    result = converted(nnunet, tmp_path / "out", "nnunet", dry_run=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Dataset501_Prostate"]
    assert "planned: 8 files to be copied; nothing was written" in result.summary()
    assert result.report()["n_files"] == 8


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"source": "nnunets"}, "did you mean nnunet?"),
        ({"files": "move"}, "--files move"),
        ({"on_error": "go"}, "--on-error go"),
        ({"source": "pclt20k", "group_pattern": "x"}, "no effect"),
    ],
)
def test_wrong_options_are_refused(pclt: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    request = LayoutRequest(pclt, tmp_path / "out", "pclt20k")
    with pytest.raises(ConfigError) as caught:
        convert_layout(replace(request, **change))
    assert said in caught.value.where


def test_r13_a_case_of_the_name_of_the_lists_is_refused(nnunet: Path, tmp_path: Path) -> None:
    for path in [*nnunet.rglob("prostate_00*")]:
        path.rename(path.with_name(path.name.replace("prostate_00", "folds")))
    assert refused(nnunet, tmp_path / "out", "nnunet").code == "name_collision"


def test_r20_reports_tell_no_home(pclt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    converted(pclt, tmp_path / "out", "pclt20k")
    text = "".join(path.read_text() for path in (tmp_path / "out").glob("*.[cj]s*"))
    assert str(tmp_path) not in text


def test_owners_of_the_source_stay_known(nnunet: Path, tmp_path: Path) -> None:
    (nnunet / "labels.csv").write_text("case_id,patient_id\nprostate_00,A\nprostate_01,A\nprostate_07,B\n")
    converted(nnunet, tmp_path / "out", "nnunet")
    assert {name: owner.patient_id for name, owner in read_owners(tmp_path / "out").items()} == {
        "prostate_00": "A",
        "prostate_01": "A",
        "prostate_07": "B",
    }


def test_volumes_are_read_as_they_were(nnunet: Path, tmp_path: Path) -> None:
    converted(nnunet, tmp_path / "out", "nnunet")
    for name, source in (("t2", "imagesTr/prostate_00_0000"), ("label", "labelsTr/prostate_00")):
        new = read_volume(tmp_path / f"out/prostate_00/{name}.nii.gz")
        old = nib.load(nnunet / f"{source}.nii.gz")
        assert np.array_equal(new.array, np.asarray(old.dataobj).T)
        assert np.array_equal(new.affine, old.affine)
