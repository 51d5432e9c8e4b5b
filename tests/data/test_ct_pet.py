"""Triples are made by name, patients kept apart, intensities the same everywhere; what is wrong is told all at once."""

from __future__ import annotations

import logging
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medssl_cli.core.errors import ConfigError, DataError
from medssl_cli.data.ct_pet import (
    Triple,
    compiled,
    find_pairs,
    find_patient,
    pair_folders,
    parts_digest,
    read_all_labelled,
    read_ct_pet,
    read_labelled,
    read_luminance,
    read_pair,
    read_pet_ct_mask,
    split_triples,
)

SIDE = 20


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def write_slice(folder: Path, name: str, number: int, *, names: tuple[str, str, str] = ("CT", "PET", "masks")) -> None:
    rng = np.random.default_rng(number)
    for kind in names[:2]:
        save(folder / kind / name, rng.integers(0, 256, (SIDE, SIDE), dtype=np.uint8))
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[5:9, 5 : 6 + number % 8] = 255
    save(folder / names[2] / name, mask)


def write_flat(root: Path, patients: int = 10, slices: int = 3, **options: tuple[str, str, str]) -> Path:
    for patient in range(patients):
        for index in range(slices):
            write_slice(root, f"patient_{patient:03d}_slice_{index}.png", patient * slices + index, **options)
    return root


def write_pclt(root: Path, patients: int = 10, slices: int = 2) -> Path:
    for patient in range(1, patients + 1):
        for index in range(slices):
            stem = f"{patient:04d}/{patient:04d}_{index:03d}"
            for kind in ("CT", "PET", "mask"):
                save(root / f"{stem}_{kind}.png", np.full((SIDE, SIDE), 255 * (kind == "mask"), np.uint8))
    return root


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    return write_flat(tmp_path / "flat")


def names_of(triples: tuple[Triple, ...]) -> list[str]:
    return [triple.name for triple in triples]


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_flat_tree_in_any_case_of_folder_names(tmp_path: Path) -> None:
    root = write_flat(tmp_path, 2, 2, names=("ct", "Pet", "mask"))
    data = read_ct_pet(root)
    assert data.layout == "flat"
    first = data.parts["all"][0]
    assert first == Triple(
        "patient_000_slice_0.png",
        "patient_000",
        root / "ct/patient_000_slice_0.png",
        root / "Pet/patient_000_slice_0.png",
        root / "mask/patient_000_slice_0.png",
    )
    assert [t.patient_id for t in data.parts["all"]] == ["patient_000"] * 2 + ["patient_001"] * 2


def test_without_masks_none_is_looked_for(flat: Path) -> None:
    for file in (flat / "masks").iterdir():
        file.unlink()
    (flat / "masks").rmdir()
    data = read_ct_pet(flat, masks=False)
    assert {triple.mask for triple in data.parts["all"]} == {None}
    with pytest.raises(ValueError, match="without masks"):
        read_labelled(data.parts["all"][0])
    with pytest.raises(DataError) as caught:
        read_ct_pet(flat)
    assert caught.value.code == "folder_missing"
    assert str(flat / "masks") in caught.value.where


@pytest.mark.parametrize("val", ["val", "valid", "Validation"])
def test_folders_of_a_split_win(tmp_path: Path, val: str, caplog: pytest.LogCaptureFixture) -> None:
    write_flat(tmp_path, 1, 1)
    for number, part in enumerate(("train", val, "TEST")):
        write_slice(tmp_path / part, f"p{number}_slice_1.png", number)
    with caplog.at_level(logging.WARNING):
        data = read_ct_pet(tmp_path)
    assert data.layout == "presplit"
    assert "beside them is not" in caplog.text
    split = split_triples(data, val_ratio=0.5)
    assert {part: names_of(triples) for part, triples in split.items()} == {
        "train": ["p0_slice_1.png"],
        "val": ["p1_slice_1.png"],
        "test": ["p2_slice_1.png"],
    }
    assert read_ct_pet(tmp_path, dataset_type="flat").parts.keys() == {"all"}


def test_without_val_it_comes_from_train_and_never_from_test(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_flat(tmp_path / "train", 10, 2)
    write_slice(tmp_path / "test", "other_slice_1.png", 0)
    with caplog.at_level(logging.WARNING):
        split = split_triples(read_ct_pet(tmp_path), val_ratio=0.2)
    assert "no folder val" in caplog.text
    assert {part: len(triples) for part, triples in split.items()} == {"train": 16, "val": 4, "test": 1}
    assert not {t.patient_id for t in split["train"]} & {t.patient_id for t in split["val"]}


def test_a_patient_on_two_sides_is_refused(tmp_path: Path) -> None:
    write_slice(tmp_path / "train", "p1_slice_1.png", 1)
    write_slice(tmp_path / "val", "p1_slice_2.png", 2)
    with pytest.raises(DataError) as caught:
        split_triples(read_ct_pet(tmp_path))
    assert caught.value.code == "split_leak"
    assert "p1: train and val" in caught.value.where


@pytest.mark.parametrize("part", ["", "train"])
def test_pclt20k_with_and_without_folders_of_a_split(tmp_path: Path, part: str) -> None:
    write_pclt(tmp_path / part, 10)
    for dataset_type in ("auto", "pclt", "pclt20k"):
        data = read_ct_pet(tmp_path, dataset_type=dataset_type)
        assert data.layout == "pclt20k"
        triple = data.parts[part or "all"][0]
        assert triple.name == "0001_000.png"
        assert triple.patient_id == "0001"
        assert triple.files == {kind: tmp_path / part / f"0001/0001_000_{kind}.png" for kind in ("CT", "PET", "mask")}
    split = split_triples(data)
    patients = {name: len({t.patient_id for t in triples}) for name, triples in split.items()}
    assert patients == ({"train": 8, "val": 2} if part else {"train": 6, "val": 2, "test": 2})


def test_pclt20k_tells_missing_partners_and_strange_names(tmp_path: Path) -> None:
    write_pclt(tmp_path, 2)
    (tmp_path / "0001/0001_001_PET.png").unlink()
    with pytest.raises(DataError) as caught:
        read_ct_pet(tmp_path)
    assert caught.value.where == "0001/0001_001_PET.png (there is CT and mask)"
    save(tmp_path / "0002/0001_009_CT.png", np.zeros((SIDE, SIDE), np.uint8))
    with pytest.raises(DataError) as caught:
        read_ct_pet(tmp_path)
    assert caught.value.code == "pclt_name"
    assert caught.value.where == "0002/0001_009_CT.png"


def test_no_layout_tells_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match="no CT-PET data set") as caught:
        read_ct_pet(tmp_path)
    assert "images" in caught.value.where
    assert "{CT,PET,masks}" in caught.value.fix
    write_flat(tmp_path, 1, 1)
    with pytest.raises(DataError, match="not the layout presplit"):
        read_ct_pet(tmp_path, dataset_type="presplit")
    (tmp_path / "ct").mkdir()
    with pytest.raises(DataError, match="CT folder is ambiguous"):
        read_ct_pet(tmp_path)
    with pytest.raises(DataError, match="no folder"):
        read_ct_pet(tmp_path / "absent")


def test_an_empty_tree_and_other_files_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for kind in ("CT", "PET", "masks"):
        (tmp_path / kind).mkdir()
    (tmp_path / "CT/notes.txt").write_text("")
    (tmp_path / "CT/.DS_Store").write_text("")
    with caplog.at_level(logging.WARNING), pytest.raises(DataError, match="no picture"):
        read_ct_pet(tmp_path)
    assert "notes.txt" in caplog.text
    assert "DS_Store" not in caplog.text


# --- pairs and patients ----------------------------------------------------------------------------------------------


def test_c03_a_missing_partner_is_named_and_pairs_never_shift(flat: Path) -> None:
    (flat / "PET/patient_004_slice_1.png").unlink()
    (flat / "CT/patient_007_slice_2.png").unlink()
    (flat / "masks/patient_007_slice_2.png").unlink()
    with pytest.raises(DataError) as caught:
        read_ct_pet(flat)
    assert caught.value.exit_code == 3
    assert "3 files" in caught.value.what
    assert caught.value.where.splitlines() == [
        "PET/patient_004_slice_1.png (there is CT and mask)",
        "CT/patient_007_slice_2.png (there is PET)",
        "masks/patient_007_slice_2.png (there is PET)",
    ]
    with pytest.raises(DataError) as caught:
        find_pairs(flat / "CT", flat / "PET")
    assert str(flat / "PET/patient_004_slice_1.png") in caught.value.where


def test_pairs_of_two_folders_need_no_patients(tmp_path: Path) -> None:
    for name in ("b.1.png", "a.png"):
        write_slice(tmp_path, name, 0)
    assert pair_folders(tmp_path) == (tmp_path / "CT", tmp_path / "PET")
    assert pair_folders(tmp_path / "CT") is None
    pairs = find_pairs(*pair_folders(tmp_path) or ())
    assert [(p.name, p.ct.name, p.pet.name, p.mask) for p in pairs] == [
        ("a.png", "a.png", "a.png", None),
        ("b.1.png", "b.1.png", "b.1.png", None),
    ]
    with pytest.raises(DataError, match="PET folder is none"):
        find_pairs(tmp_path / "CT", tmp_path / "absent")


@pytest.mark.parametrize(
    ("name", "regex", "patient"),
    [
        ("patient_001_slice_12.png", None, "patient_001"),
        ("a_slice_b_slice_3.png", None, "a_slice_b"),
        ("STS_007_z012.png", r"(STS_\d+)_", "STS_007"),
    ],
)
def test_patient_stands_before_the_last_marker_or_in_the_first_group(
    name: str, regex: str | None, patient: str
) -> None:
    assert find_patient(name, compiled(regex)) == patient


def test_c06_names_without_marker_are_an_error_that_lists_them(tmp_path: Path) -> None:
    for name in ("patient_001_1.png", "_slice_2.png", "patient_2_slice_1.png"):
        write_slice(tmp_path, name, 0)
    with pytest.raises(DataError) as caught:
        read_ct_pet(tmp_path)
    assert caught.value.where.splitlines()[1:] == ["_slice_2.png", "patient_001_1.png"]
    assert "--patient-regex" in caught.value.fix
    with pytest.raises(DataError, match="1 name of files"):
        read_ct_pet(tmp_path, patient_regex=r"(patient_\d+)_")
    for wrong, why in (("patient", "no group"), ("(", "unterminated")):
        with pytest.raises(ConfigError) as refused:
            read_ct_pet(tmp_path, patient_regex=wrong)
        assert why in refused.value.where


def test_c06_ten_patients_are_ten_groups_that_no_split_cuts(flat: Path) -> None:
    data = read_ct_pet(flat)
    assert len({triple.patient_id for triple in data.parts["all"]}) == 10
    for seed in range(5):
        split = split_triples(data, val_ratio=0.3, seed=seed)
        train, val = ({t.patient_id for t in split[part]} for part in ("train", "val"))
        assert (len(train), len(val)) == (7, 3)
        assert not train & val
        assert len(split["train"]) == 21
    assert split_triples(data, seed=1) == split_triples(data, seed=1) != split_triples(data, seed=2)
    assert parts_digest(split_triples(data, seed=1)) == parts_digest(split_triples(data, seed=1))


@pytest.mark.parametrize("val_ratio", [0.0, 1.0, -0.1])
def test_a_validation_of_nothing_or_all_is_refused(flat: Path, val_ratio: float) -> None:
    with pytest.raises(ConfigError, match="share of the validation"):
        split_triples(read_ct_pet(flat), val_ratio=val_ratio)


def test_one_patient_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too few patients"):
        split_triples(read_ct_pet(write_flat(tmp_path, 1, 5)))


# --- links -----------------------------------------------------------------------------------------------------------


def test_a_split_tree_of_links_to_the_flat_tree_works(flat: Path, tmp_path: Path) -> None:
    tree = tmp_path / "split"
    for part, patient in (("train", "000"), ("val", "001")):
        for file in sorted(flat.glob(f"*/patient_{patient}_*")):
            link = tree / part / file.parent.name / file.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(Path("../../../flat") / file.parent.name / file.name)
    split = split_triples(read_ct_pet(tree))
    assert {part: len(triples) for part, triples in split.items()} == {"train": 3, "val": 3}
    own, linked = read_ct_pet(flat).parts["all"][0], split["train"][0]
    assert np.array_equal(read_pair(linked), read_pair(own))


def test_a_link_to_nothing_is_a_missing_file(flat: Path) -> None:
    (flat / "PET/patient_000_slice_0.png").unlink()
    (flat / "PET/patient_000_slice_0.png").symlink_to("nowhere.png")
    with pytest.raises(DataError, match="is missing") as caught:
        read_ct_pet(flat)
    assert "PET/patient_000_slice_0.png" in caught.value.where


def test_a_folder_may_not_lead_out_of_the_root(flat: Path, tmp_path: Path) -> None:
    root = tmp_path / "own"
    root.mkdir()
    for kind in ("CT", "PET", "masks"):
        (root / kind).symlink_to(flat / kind)
    with pytest.raises(DataError) as caught:
        read_ct_pet(root)
    assert caught.value.code == "path_escapes"
    with pytest.raises(DataError):
        pair_folders(root)


# --- reading ---------------------------------------------------------------------------------------------------------


def write_pair(folder: Path, ct: np.ndarray, pet: np.ndarray | None = None) -> Triple:
    pet = ct if pet is None else pet
    return Triple("a.png", "", save(folder / "CT/a.png", ct), save(folder / "PET/a.png", pet))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "LA", "1"])
def test_luminance_is_that_of_pillow(tmp_path: Path, mode: str) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    picture = Image.fromarray(colours).convert(mode)
    picture.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        expected = np.asarray(image.convert("RGB").convert("L") if mode == "P" else image.convert("L"))
    assert np.array_equal(read_luminance(tmp_path / "a.png"), expected)


def test_c02_pure_green_is_its_luminance_and_not_channel_0(tmp_path: Path) -> None:
    green = np.zeros((SIDE, SIDE, 3), np.uint8)
    green[..., 1] = 255
    pair = read_pair(write_pair(tmp_path, green))
    assert np.array_equal(pair, np.full((2, SIDE, SIDE), np.float32(150) / np.float32(255)))


@pytest.mark.parametrize(("dtype", "top"), [(np.uint8, 255), (np.uint16, 65535)])
def test_c05_a_picture_of_maximum_one_is_not_brighter(tmp_path: Path, dtype: type, top: int) -> None:
    image = np.zeros((SIDE, SIDE), dtype)
    image[3, 4] = 1
    pair = read_pair(write_pair(tmp_path, image, np.full_like(image, top)))
    assert pair.dtype == np.float32
    assert pair[0].max() == np.float32(1) / np.float32(top)
    assert pair[1].min() == pair[1].max() == 1.0


def test_sixteen_bit_colours_keep_their_depth(tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    green = np.zeros((SIDE, SIDE, 3), np.uint16)
    green[..., 1] = 65535
    sitk.WriteImage(sitk.GetImageFromArray(green, isVector=True), str(tmp_path / "a.png"))
    image = read_luminance(tmp_path / "a.png")
    assert image.dtype == np.uint16
    assert set(np.unique(image)) == {round(65535 * 38470 / 65536)}


def test_floating_point_pictures_have_no_range(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((SIDE, SIDE), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="no fixed range"):
        read_luminance(tmp_path / "a.tif")


def test_sizes_of_ct_pet_and_mask_are_equal_and_large_enough(tmp_path: Path) -> None:
    zeros = np.zeros((SIDE, SIDE), np.uint8)
    with pytest.raises(DataError, match="CT and PET differ in size") as caught:
        read_pair(write_pair(tmp_path, zeros, zeros[:-1]))
    assert "20 x 20 px" in caught.value.where
    assert "19 x 20 px" in caught.value.where
    with pytest.raises(DataError, match="too small"):
        read_pair(write_pair(tmp_path, zeros[:15]))
    assert read_pair(write_pair(tmp_path, zeros[:16, :16])).shape == (2, 16, 16)
    pair = write_pair(tmp_path, zeros)
    mask = save(tmp_path / "masks/a.png", zeros.T[:, :18])
    with pytest.raises(DataError, match="CT and PET and mask differ"):
        read_labelled(Triple("a.png", "", pair.ct, pair.pet, mask))


@pytest.mark.parametrize("lesion", [1, 255])
def test_masks_hold_0_and_1_or_0_and_255(tmp_path: Path, lesion: int) -> None:
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[2:4, 5:9] = lesion
    read = read_pet_ct_mask(save(tmp_path / "a.png", mask))
    assert read.dtype == np.uint8
    assert np.array_equal(read, mask > 0)
    assert np.array_equal(read_pet_ct_mask(save(tmp_path / "a.png", np.stack([mask] * 3, -1))), mask > 0)


def test_other_values_of_a_mask_are_told_unless_there_is_a_threshold(tmp_path: Path) -> None:
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[0, :3] = (1, 254, 255)
    path = save(tmp_path / "a.png", mask)
    with pytest.raises(DataError) as caught:
        read_pet_ct_mask(path)
    assert "0 (397 px), 1 (1 px), 254 (1 px), 255 (1 px)" in caught.value.where
    assert [int(read_pet_ct_mask(path, threshold=t).sum()) for t in (0, 1, 127, 254)] == [3, 2, 2, 1]


def test_all_bad_files_are_told_in_one_message(flat: Path) -> None:
    save(flat / "masks/patient_002_slice_0.png", np.full((SIDE, SIDE), 7, np.uint8))
    (flat / "CT/patient_003_slice_0.png").write_bytes(b"no picture")
    save(flat / "PET/patient_004_slice_0.png", np.zeros((SIDE, SIDE + 1), np.uint8))
    triples = read_ct_pet(flat).parts["all"]
    good = read_all_labelled(triples)
    assert [ct.shape == pet.shape == mask.shape for ct, pet, mask in islice(good, 27)] == [True] * 27
    with pytest.raises(DataError) as caught:
        next(good)
    assert "3 slices" in caught.value.what
    for name, text in (("patient_002", "7 (400 px)"), ("patient_003", "cannot be read"), ("patient_004", "20 x 21 px")):
        assert any(name in line and text in line for line in caught.value.where.splitlines())
    with pytest.raises(DataError, match="cannot be read"):
        list(read_all_labelled([t for t in triples if "003" in t.name]))


def test_real_pairs(real_data: Path) -> None:
    root = real_data / "sts_ct_pet_png"
    data = read_ct_pet(root, patient_regex=r"(STS_\d+)_")
    assert data.layout == "flat"
    assert len(data.parts["all"]) == 186
    split = split_triples(data)
    assert {part: len({t.patient_id for t in triples}) for part, triples in split.items()} == {"train": 24, "val": 7}
    brighter = []
    for ct, pet, mask in read_all_labelled(data.parts["all"][:60]):
        assert ct.dtype == pet.dtype == np.uint8
        if mask.any():
            brighter.append(pet[mask > 0].mean() > pet[mask == 0].mean())
    assert all(brighter)
    assert len(brighter) > 40
