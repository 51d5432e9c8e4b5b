import gzip
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medssl_cli.core.case import Case, Sequence
from medssl_cli.core.errors import DataError
from medssl_cli.core.volume import Volume
from medssl_cli.data.checks import (
    CaseRules,
    Finding,
    check_case,
    check_case_folder,
    check_channels,
    check_duplicates,
    check_labels,
    check_named_case,
    check_splits,
)
from medssl_cli.data.images import read_volume, write_image, write_volume
from medssl_cli.data.manifest import Ids, Owner
from medssl_cli.data.preprocess import PreprocessConfig, prepare_case

AFFINE = np.diag([0.5, 0.5, 1.0, 1.0])
RULES = CaseRules(("ax_t2wi", "ax_adc", "ax_dwi"))


def noise(seed: int, dtype: type = np.int16, shape: tuple[int, ...] = (6, 20, 24)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 900, shape).astype(dtype)


def good_case(root: Path, case_id: str = "c1", seed: int = 0) -> Path:
    folder = root / case_id
    folder.mkdir(parents=True)
    for i, stem in enumerate(("ax_t2wi", "ax_adc", "ax_dwi_b1400")):
        write_volume(folder / f"{stem}.nii.gz", Volume(noise(10 * seed + i), AFFINE))
    mask = np.zeros((6, 20, 24), np.uint8)
    mask[2:4, 5:12, 6:15] = 1
    write_volume(folder / "roi_Prostate.nii.gz", Volume(mask, AFFINE))
    return folder


def by_code(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.code: finding for finding in findings}


def test_a_good_case_has_no_error(tmp_path: Path) -> None:
    good_case(tmp_path)
    checked = check_case_folder(tmp_path, "c1", RULES, owners={"c1": Owner("p1", "1.2")}, split="val")
    assert [(f.severity, f.code) for f in checked.findings] == [("info", "dwi_choice")]
    assert list(checked.volumes) == ["ax_t2wi", "ax_adc", "ax_dwi"]
    assert (checked.case.patient_id, checked.case.split) == ("p1", "val")
    assert len(set(checked.digests.values())) == 3
    assert checked.roi is not None


# --- R09: each damage has its code and its path ----------------------------------------------------------------------


def raw(path: Path, change: Callable[[bytearray], None]) -> None:
    """Change the bytes of a .nii.gz below its compression."""
    data = bytearray(gzip.decompress(path.read_bytes()))
    change(data)
    path.write_bytes(gzip.compress(bytes(data), 1))


def put(offset: int, values: object, dtype: str) -> Callable[[bytearray], None]:
    packed = np.array(values, dtype=dtype).tobytes()

    def change(data: bytearray) -> None:
        data[offset : offset + len(packed)] = packed

    return change


def rewrite(path: Path, array: np.ndarray | None = None, affine: np.ndarray = AFFINE) -> None:
    write_volume(path, Volume(noise(1) if array is None else array, affine))


def with_nan(value: float) -> np.ndarray:
    array = noise(1, np.float32)
    array[1, 2, 3] = value
    return array


def plane(path: Path) -> None:
    image = nib.Nifti1Image(noise(1)[0], AFFINE)
    path.write_bytes(gzip.compress(image.to_bytes()))


def big_endian(path: Path) -> None:
    header = nib.Nifti1Header(endianness=">")
    image = nib.Nifti1Image(noise(1).T, AFFINE, header)
    image.set_sform(AFFINE, 1)
    image.set_qform(AFFINE, 1)
    path.write_bytes(gzip.compress(image.to_bytes()))


def two_forms(shift_mm: float) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        image = nib.Nifti1Image(noise(1).T, AFFINE)
        moved = AFFINE.copy()
        moved[0, 3] += shift_mm
        image.set_sform(AFFINE, 1)
        image.set_qform(moved, 1)
        path.write_bytes(gzip.compress(image.to_bytes()))

    return write


def flipped() -> np.ndarray:
    affine = AFFINE.copy()
    affine[0, 0] *= -1
    affine[0, 3] = 0.5 * 23
    return affine


def shifted(mm: float) -> np.ndarray:
    affine = AFFINE.copy()
    affine[0, 3] += mm
    return affine


DAMAGES: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "truncated": ("nifti_truncated", "error", lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2])),
    "truncated below its header": ("nifti_truncated", "error", lambda p: p.write_bytes(gzip.compress(b"\0" * 100))),
    "shorter than promised": ("nifti_truncated", "error", lambda p: raw(p, lambda d: d.__delitem__(slice(2000, None)))),
    "zero bytes": ("file_empty", "error", lambda p: p.write_bytes(b"")),
    "wrong magic": ("nifti_magic", "error", lambda p: p.write_bytes(gzip.compress(b"<html>" * 200))),
    "NaN": ("voxels_nonfinite", "error", lambda p: rewrite(p, with_nan(np.nan))),
    "infinite": ("voxels_nonfinite", "error", lambda p: rewrite(p, with_nan(-np.inf))),
    "constant": ("volume_constant", "error", lambda p: rewrite(p, np.full((6, 20, 24), 7, np.int16))),
    "4-D": ("volume_4d", "error", lambda p: rewrite(p, noise(1, shape=(3, 6, 20, 24)))),
    "2-D": ("volume_2d", "error", plane),
    "size-1 axis": ("axis_single", "error", lambda p: rewrite(p, noise(1, shape=(1, 20, 24)))),
    "huge dims": ("nifti_huge", "error", lambda p: raw(p, put(42, [32000] * 3, "<i2"))),
    "larger than memory": ("volume_too_large", "error", lambda p: raw(p, put(42, [32000, 32000, 8], "<i2"))),
    "negative dims": ("nifti_header", "error", lambda p: raw(p, put(42, [-4], "<i2"))),
    "five axes": ("nifti_dimensions", "error", lambda p: raw(p, put(40, [5, 24, 20, 2, 1, 3], "<i2"))),
    "singular affine": ("affine_singular", "error", lambda p: raw(p, put(280, [0] * 12, "<f4"))),
    "affine of NaN": ("affine_singular", "error", lambda p: raw(p, put(280, [np.nan] * 4, "<f4"))),
    "sform far from qform": ("sform_qform", "error", two_forms(4.0)),
    "sform near qform": ("sform_qform", "warning", two_forms(0.3)),
    "unusable qform": ("sform_qform", "warning", lambda p: raw(p, put(256, [5.0, 5.0, 5.0], "<f4"))),
    "flipped affine": ("grid_orientation", "error", lambda p: rewrite(p, affine=flipped())),
    "shifted affine": ("grid_position", "error", lambda p: rewrite(p, affine=shifted(10))),
    "another spacing": ("grid_spacing", "error", lambda p: rewrite(p, affine=np.diag([0.6, 0.5, 1.0, 1.0]))),
    "another shape": ("grid_shape", "error", lambda p: rewrite(p, noise(1, shape=(6, 20, 23)))),
    "big-endian": ("big_endian", "info", big_endian),
    "slope 0": ("scl_slope", "info", lambda p: raw(p, put(112, [0.0], "<f4"))),
    "slope NaN": ("scl_slope", "warning", lambda p: raw(p, put(112, [np.nan], "<f4"))),
    "uint16": ("dtype", "info", lambda p: rewrite(p, noise(1, np.uint16))),
    "float64": ("dtype", "info", lambda p: rewrite(p, noise(1, np.float64))),
    "complex": ("dtype_unsupported", "error", lambda p: raw(p, put(70, [32, 64], "<i2"))),
    "gz bomb": ("nifti_oversized", "error", lambda p: raw(p, lambda d: d.extend(b"\0" * 3_000_000))),
    "link to nothing": ("sequence_missing", "error", lambda p: (p.unlink(), p.symlink_to("nowhere.nii.gz"))),
    "link out of the tree": (
        "path_escapes",
        "error",
        lambda p: (p.rename(p.parents[2] / "x.nii.gz"), p.symlink_to(p.parents[2] / "x.nii.gz")),
    ),
    "folder instead of a file": ("sequence_missing", "error", lambda p: (p.unlink(), p.mkdir())),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_r09_damage_has_code_path_and_severity(tmp_path: Path, damage: str) -> None:
    code, severity, inflict = DAMAGES[damage]
    path = good_case(tmp_path / "root") / "ax_adc.nii.gz"
    inflict(path)
    checked = check_case_folder(tmp_path / "root", "c1", RULES)
    found = by_code(checked.findings)
    assert code in found, [(f.code, f.message) for f in checked.findings]
    assert (found[code].severity, found[code].case_id) == (severity, "c1")
    assert found[code].path in (str(path), str(path.parent))
    assert found[code].message
    assert found[code].fix or severity != "error"
    errors = {f.code for f in checked.findings if f.severity == "error"}
    assert errors == ({code} if severity == "error" else set())
    assert {"ax_t2wi", "ax_dwi"} <= set(checked.volumes)


def test_r09_lone_unusable_qform_is_a_known_error(tmp_path: Path) -> None:
    path = good_case(tmp_path) / "ax_adc.nii.gz"
    raw(path, put(252, [1, 0], "<i2"))  # qform code 1, sform code 0
    raw(path, put(256, [5.0, 5.0, 5.0], "<f4"))
    assert "affine_singular" in by_code(check_case_folder(tmp_path, "c1", RULES).findings)


def test_tolerance_of_grids(tmp_path: Path) -> None:
    path = good_case(tmp_path) / "ax_adc.nii.gz"
    rewrite(path, affine=shifted(0.05))
    assert "grid_position" not in by_code(check_case_folder(tmp_path, "c1", RULES).findings)
    rewrite(path, affine=shifted(0.2))
    found = by_code(check_case_folder(tmp_path, "c1", RULES).findings)["grid_position"]
    assert "0.20 mm" in found.message
    assert "medssl convert align" in found.fix


# --- 3.7: cases ------------------------------------------------------------------------------------------------------


def test_missing_sequence_is_an_error_or_allowed(tmp_path: Path) -> None:
    folder = good_case(tmp_path)
    (folder / "ax_adc.nii.gz").unlink()
    (folder / "ax_dwi_b1400.nii.gz").unlink()
    found = [f for f in check_case_folder(tmp_path, "c1", RULES).findings if f.code == "sequence_missing"]
    assert [(f.severity, f.message) for f in found] == [
        ("error", "There is no ax_adc."),
        ("error", "There is no ax_dwi."),
    ]
    rules = CaseRules(RULES.sequences, missing_allowed=True)
    assert by_code(check_case_folder(tmp_path, "c1", rules).findings)["sequence_missing"].severity == "warning"
    (folder / "ax_t2wi.nii.gz").unlink()
    assert by_code(check_case_folder(tmp_path, "c1", rules).findings)["sequence_missing"].severity == "error"


def test_folder_missing_or_outside(tmp_path: Path) -> None:
    good_case(tmp_path)
    assert by_code(check_case_folder(tmp_path, "c2", RULES).findings)["folder_missing"].severity == "error"
    assert by_code(check_case_folder(tmp_path, "../etc", RULES).findings)["path_escapes"].severity == "error"


def test_t23_diffusion_choice_is_told(tmp_path: Path) -> None:
    folder = good_case(tmp_path)
    rewrite(folder / "ax_dwi_b50.nii.gz", noise(77))
    found = by_code(check_case_folder(tmp_path, "c1", RULES).findings)
    assert found["dwi_candidates"].severity == "warning"
    assert (
        found["dwi_candidates"].message
        == "ax_dwi: ax_dwi_b1400.nii.gz chosen of ax_dwi_b1400.nii.gz, ax_dwi_b50.nii.gz"
    )
    assert "dwi_choice" not in found  # the warning tells the choice
    for name in ("ax_dwi_b50", "ax_dwi_b1400"):
        (folder / f"{name}.nii.gz").rename(folder / f"{name.replace('_b', '_x')}.nii.gz")
    found = by_code(check_case_folder(tmp_path, "c1", RULES).findings)
    assert found["dwi_ambiguous"].severity == "error"
    assert "sequence_missing" not in found
    (folder / "ax_dwi_x50.nii.gz").unlink()
    assert by_code(check_case_folder(tmp_path, "c1", RULES).findings)["dwi_b_unknown"].severity == "warning"


def test_roi_absent_empty_small_and_elsewhere(tmp_path: Path) -> None:
    path = good_case(tmp_path) / "roi_Prostate.nii.gz"
    mask = np.zeros((6, 20, 24), np.uint8)
    rewrite(path, mask)
    assert by_code(check_case_folder(tmp_path, "c1", RULES).findings)["roi_empty"].severity == "warning"
    mask[3, 4:7, 5:9] = 1
    rewrite(path, mask)
    assert "roi_small" not in by_code(check_case_folder(tmp_path, "c1", RULES).findings)
    small = by_code(check_case_folder(tmp_path, "c1", CaseRules(RULES.sequences, min_roi_pixels=13)).findings)[
        "roi_small"
    ]
    assert (small.severity, small.message) == (
        "warning",
        "The largest slice of the ROI has 12 pixels, 13 are asked for.",
    )
    rewrite(path, mask, shifted(7))
    assert by_code(check_case_folder(tmp_path, "c1", RULES).findings)["roi_grid"].severity == "error"
    path.write_bytes(b"")
    assert by_code(check_case_folder(tmp_path, "c1", RULES).findings)["file_empty"].path == str(path)
    path.unlink()
    assert by_code(check_case_folder(tmp_path, "c1", RULES).findings)["roi_absent"].severity == "info"


def test_anisotropy_once_a_case(tmp_path: Path) -> None:
    folder = good_case(tmp_path)
    for i, stem in enumerate(("ax_t2wi", "ax_adc", "ax_dwi_b1400")):
        rewrite(folder / f"{stem}.nii.gz", noise(i), np.diag([0.5, 0.5, 3.0, 1.0]))
    (folder / "roi_Prostate.nii.gz").unlink()
    found = [f for f in check_case_folder(tmp_path, "c1", RULES).findings if f.code == "anisotropy"]
    assert len(found) == 1
    assert found[0].severity == "warning"
    assert "0.5 x 0.5 x 3 mm" in found[0].message


def test_real_study_lies_on_two_grids(real_data: Path, tmp_path: Path) -> None:
    source = real_data / "prostatex_mpmri/ProstateX-0000/nifti"
    folder = tmp_path / "root" / "ProstateX-0000"
    folder.mkdir(parents=True)
    for stem, name in (
        ("ax_t2wi", "4_t2_tse_tra"),
        ("ax_adc", "7_ep2d_diff_tra_DYNDIST_ADC"),
        ("ax_dwi", "6_ep2d_diff_tra_DYNDIST"),
    ):
        (folder / f"{stem}.nii.gz").write_bytes((source / f"{name}.nii.gz").read_bytes())
    (folder / "ax_dwi.bval").write_text((source / "6_ep2d_diff_tra_DYNDIST.bval").read_text())
    checked = check_case_folder(tmp_path / "root", "ProstateX-0000", RULES)
    errors = [(f.code, Path(f.path).name) for f in checked.findings if f.severity == "error"]
    assert errors == [("grid_shape", "ax_adc.nii.gz"), ("grid_shape", "ax_dwi.nii.gz")]
    theirs = np.asanyarray(nib.load(folder / "ax_dwi.nii.gz").dataobj)[..., 2].T
    np.testing.assert_array_equal(checked.volumes["ax_dwi"].array, theirs)  # b 50, 400, 800
    same = check_case_folder(tmp_path / "root", "ProstateX-0000", CaseRules(("ax_adc", "ax_dwi")))
    assert not [f for f in same.findings if f.severity == "error"]


# --- pictures --------------------------------------------------------------------------------------------------------


def picture(path: Path) -> Case:
    return Case(path.name, path.name, {"image": Sequence("image", path)})


def test_r09_pictures(tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "a.png"
    write_image(path, noise(0, np.uint8, (40, 50)))
    assert not check_case(picture(path)).findings
    half = path.read_bytes()[:300]
    expected = {
        "file_empty": lambda: path.write_bytes(b""),
        "image_unreadable": lambda: path.write_bytes(half),
        "image_constant": lambda: write_image(path, np.full((40, 40), 3, np.uint8)),
        "image_small": lambda: write_image(path, noise(0, np.uint8, (40, 20))),
        "dtype": lambda: Image.fromarray(noise(0, np.uint16, (40, 40))).save(path),
        "file_missing": path.unlink,
    }
    for code, inflict in expected.items():
        inflict()
        found = by_code(check_case(picture(path)).findings)
        assert list(found) == [code]
        assert found[code].path == str(path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(0, np.uint8, (40, 40))).save(tmp_path / "b.jpg", exif=exif)
    assert by_code(check_case(picture(tmp_path / "b.jpg")).findings)["exif_orientation"].severity == "warning"


def test_grey_and_colour_in_one_set() -> None:
    assert not check_channels({"a": 3, "b": 3})
    found = check_channels({"a": 3, "b": 1, "c": 3})
    assert found[0].code == "channels_mixed"
    assert found[0].message.endswith("the fewer: b")


def test_labels() -> None:
    path = Path("labels.csv")
    assert not check_labels({f"{i}": str(i % 2) for i in range(6)}, path)
    assert [(f.code, f.case_id) for f in check_labels({"a": "", "b": "1", "c": "1"}, path)] == [
        ("label_missing", "a"),
        ("label_single", ""),
    ]
    labels = {**{f"{i}": str(i % 2) for i in range(6)}, "x": "9"}
    assert [(f.severity, f.code) for f in check_labels(labels, path)] == [("warning", "label_rare")]


# --- R12: leaks ------------------------------------------------------------------------------------------------------


def ids(*names: str, twice: tuple[str, ...] = ()) -> Ids:
    return Ids(names, twice, "patient_id")


def test_r12_ids_and_patients_across_splits() -> None:
    train, val = Path("train.csv"), Path("val.csv")
    splits = {"train": (train, ids("a", "p_s1", twice=("a",))), "val": (val, ids("a", "p_s2", "z"))}
    found = check_splits(splits, {"p_s1": "p", "p_s2": "p"})
    assert [(f.severity, f.code, f.case_id) for f in found] == [
        ("warning", "id_duplicate", "a"),
        ("error", "id_across_splits", "a"),
        ("error", "patient_across_splits", "p_s1"),
        ("error", "patient_across_splits", "p_s2"),
    ]
    assert not check_splits({"train": (train, ids("a")), "val": (val, ids("b"))}, {})


def test_r12_copies_are_found_under_other_names_and_headers(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        good_case(tmp_path, name, seed=ord(name))
    rewrite(tmp_path / "b" / "ax_adc.nii.gz", noise(10 * ord("a") + 1))  # the ADC of a, compressed anew
    rewrite(tmp_path / "c" / "ax_adc.nii.gz", noise(10 * ord("c")))  # the T2 of c itself
    for split, severity in (("train", "warning"), ("test", "error")):
        checked = [
            check_case_folder(tmp_path, n, RULES, split=s) for n, s in (("a", "train"), ("b", split), ("c", "train"))
        ]
        found = check_duplicates((c.case, c.digests) for c in checked)
        code = "duplicate_content" if split == "train" else "duplicate_across_splits"
        across = [f for f in found if f.code == code]
        assert [(f.severity, f.case_id) for f in across] == [(severity, "a"), (severity, "b")]
        assert Path(across[0].path).name == "ax_adc.nii.gz"
        within = [f for f in found if f.code == "duplicate_within_case"]
        assert [f.case_id for f in within] == ["c", "c"]


@pytest.mark.parametrize(
    ("low", "high", "window", "told"),
    [
        (0, 255, (-1000, 1000), True),
        (-1000, 255, (-1000, 1000), False),
        (0, 255, (0, 80), False),
        (0, 900, (-9, 9), False),
    ],
)
def test_ct_not_hu(tmp_path: Path, low: int, high: int, window: tuple[float, float], told: bool) -> None:
    array = np.random.default_rng(0).integers(low, high + 1, (4, 20, 20)).astype(np.int16)
    array[0, 0, :2] = low, high
    write_volume(tmp_path / "P/ct.nii.gz", Volume(array, np.eye(4)))
    rules = CaseRules(("ct",), roi="", windows_hu=(window,))
    case = Case("P", "P", {"ct": Sequence("ct", tmp_path / "P/ct.nii.gz")})
    for checked in (
        check_case(case, rules),
        check_named_case(case, rules, tmp_path),
        check_case_folder(tmp_path, "P", rules),
    ):
        found = [finding for finding in checked.findings if finding.code == "ct_not_hu"]
        assert [finding.severity for finding in found] == ["warning"] * told


def test_a_case_of_a_layout_is_asked_the_same_as_a_folder(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, shape in (("t2", (4, 20, 20)), ("adc", (4, 10, 10))):
        write_volume(tmp_path / f"P/{name}.nii.gz", Volume(rng.integers(0, 9, shape).astype(np.int16), np.eye(4)))
    write_volume(tmp_path / "P/roi.nii.gz", Volume(np.zeros((4, 20, 20), np.uint8), np.eye(4)))
    rules = CaseRules(("t2", "adc", "dwi"), roi="roi")
    files = {name: Sequence(name, tmp_path / f"P/{name}.nii.gz") for name in ("t2", "adc")}
    named = check_named_case(Case("P", "P", files, roi=tmp_path / "P/roi.nii.gz"), rules, tmp_path)
    folder = check_case_folder(tmp_path, "P", rules)
    assert [(f.severity, f.code) for f in named.findings] == [(f.severity, f.code) for f in folder.findings]
    assert {f.code for f in named.findings} == {"sequence_missing", "grid_shape", "roi_empty"}


@pytest.mark.parametrize(("shape", "missing"), [((8, 20, 24), 1), ((2, 8, 20, 24), 2)])
def test_r09_a_channel_that_a_file_lacks_is_never_taken_from_another(
    tmp_path: Path, shape: tuple[int, ...], missing: int
) -> None:
    """A description names more channels than the file has volumes, as in a damaged Decathlon folder."""
    write_volume(tmp_path / "a.nii.gz", Volume(np.random.default_rng(0).random(shape, dtype=np.float32), np.eye(4)))
    for index in range(missing + 1):
        case = Case("a", "a", {"x": Sequence("x", tmp_path / "a.nii.gz", volume_index=index)})
        codes = [f.code for f in check_case(case).findings if f.severity == "error"]
        assert codes == (["volume_absent"] if index == missing else [])
        if index == missing:
            for read in (
                lambda case=case: prepare_case(case, ("x",), PreprocessConfig()),
                lambda index=index: read_volume(tmp_path / "a.nii.gz", volume_index=index),
            ):
                with pytest.raises(DataError) as caught:
                    read()
                assert caught.value.code == "volume_absent"


def test_npy_pictures_and_volumes_are_checked(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "picture.npy", rng.integers(0, 255, (40, 40, 3)).astype(np.uint8))
    np.save(tmp_path / "volume.npy", rng.integers(-900, 900, (8, 40, 40)))
    np.save(tmp_path / "bad.npy", np.zeros((2, 3, 4, 5)))
    codes = {}
    for name in ("picture", "volume", "bad"):
        case = Case(name, name, {"image": Sequence("image", tmp_path / f"{name}.npy")})
        checked = check_case(case)
        codes[name] = [finding.code for finding in checked.findings]
        assert bool(checked.volumes) == (name == "volume")
        assert bool(checked.pictures) == (name == "picture")
    assert codes == {"picture": [], "volume": ["npy_geometry", "dtype"], "bad": ["npy_shape"]}
    volume = Case("volume", "volume", {"image": Sequence("image", tmp_path / "volume.npy")})
    alone = check_case(volume, only_pictures=True)  # in a folder of pictures, where training cannot read it
    assert [(f.severity, f.code) for f in alone.findings] == [("error", "npy_shape")]
