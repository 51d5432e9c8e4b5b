"""A case tree onto the grid of its reference."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medssl_cli.core.errors import ConfigError, DataError, Interrupted, PartialFailure
from medssl_cli.core.run import locked
from medssl_cli.core.volume import Volume
from medssl_cli.data.images import read_volume, write_volume
from medssl_cli.data.manifest import read_case, read_owners
from medssl_cli.data.preprocess import PreprocessConfig, prepare_case
from medssl_cli.services import align as align_module
from medssl_cli.services.align import AlignRequest, AlignResult, align_tree


def affine_of(
    shape: tuple[int, int, int], spacing: tuple[float, float, float], centre: tuple[float, ...] = (0, 0, 0)
) -> np.ndarray:
    affine = np.diag([-spacing[2], spacing[1], spacing[0], 1.0])
    affine[:3, 3] = np.array(centre) - affine[:3, :3] @ ((np.array(shape[::-1]) - 1) / 2)
    return affine


def balls(shape: tuple[int, int, int], affine: np.ndarray, shift: tuple[float, float, float] = (0, 0, 0)) -> Volume:
    z, y, x = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    world = np.einsum("ij,j...->i...", affine, np.stack([x, y, z, np.ones_like(x)]))[:3]
    rng = np.random.default_rng(4)
    image = np.zeros(shape)
    for _ in range(12):
        centre = rng.uniform(-24, 24, 3) + np.array(shift)
        distance = np.sqrt(sum((w - c) ** 2 for w, c in zip(world, centre, strict=True)))
        image += rng.uniform(100, 500) * (1 + np.tanh((rng.uniform(6, 14) - distance) / 2))
    return Volume(image.astype(np.float32), affine)


T2 = (20, 64, 64)
ADC = (18, 40, 40)


def make_case(root: Path, name: str = "P1", shift: tuple[float, float, float] = (0, 0, 0)) -> None:
    t2_affine, adc_affine = affine_of(T2, (3, 1.2, 1.2)), affine_of(ADC, (3.4, 2, 2), (2, -1, 1))
    write_volume(root / name / "ax_t2wi.nii.gz", balls(T2, t2_affine))
    adc = balls(ADC, adc_affine, shift)
    write_volume(root / name / "ax_adc.nii.gz", Volume((1500 - adc.array * 0.5).astype(np.int16), adc_affine))
    roi = Volume((balls(ADC, adc_affine).array > 700).astype(np.uint8) * 5, adc_affine)
    write_volume(root / name / "roi_Prostate.nii.gz", roi)
    (root / name / "ax_adc.json").write_text(json.dumps({"EchoTime": 63, "medssl": {"series_uid": "1.2.3"}}))


def align(tmp_path: Path, **changes: Any) -> AlignResult:
    values = {"root": tmp_path / "tree", "out": tmp_path / "out", "reference": "ax_t2wi", "workers": 0}
    return align_tree(AlignRequest(**{**values, **changes}))


def test_t17_tree_is_mirrored_on_the_reference_grid(tmp_path: Path) -> None:
    make_case(tmp_path / "tree")
    result = align(tmp_path)
    assert result.error is None
    out = tmp_path / "out/P1"
    reference = read_volume(tmp_path / "tree/P1/ax_t2wi.nii.gz")
    np.testing.assert_array_equal(read_volume(out / "ax_t2wi.nii.gz").array, reference.array)
    for stem in ("ax_adc", "roi_Prostate"):
        assert read_volume(out / f"{stem}.nii.gz").grid_difference(reference) is None
    assert set(np.unique(read_volume(out / "roi_Prostate.nii.gz").array)) == {0, 5}
    inside = (slice(3, -3), slice(10, -10), slice(10, -10))
    expected = 1500 - 0.5 * reference.array
    error = np.abs(read_volume(out / "ax_adc.nii.gz").array - expected)[inside]
    assert error.mean() < 0.1 * np.ptp(expected[inside])
    sidecar = json.loads((out / "ax_adc.json").read_text())
    assert sidecar["EchoTime"] == 63
    assert sidecar["medssl"]["series_uid"] == "1.2.3"
    assert (sidecar["medssl"]["aligned_to"], sidecar["medssl"]["registered"]) == ("ax_t2wi", False)
    report = json.loads((tmp_path / "out/convert_report.json").read_text())
    assert (report["command"], report["n_aligned"], report["n_cases"]) == ("convert align", 3, 1)


def test_t17_an_aligned_tree_is_prepared_to_the_voxels_of_the_tree_itself(tmp_path: Path) -> None:
    make_case(tmp_path / "tree")
    align(tmp_path)
    names = ("ax_t2wi", "ax_adc")
    raw, aligned = (
        prepare_case(read_case(tmp_path / folder, "P1", names), names, PreprocessConfig()) for folder in ("tree", "out")
    )
    assert (raw.resampled_S.tolist(), aligned.resampled_S.tolist()) == ([False, True], [False, False])
    assert raw.roi_ZYX is not None
    assert raw.roi_ZYX.any()
    np.testing.assert_array_equal(raw.images_SZYX, aligned.images_SZYX)
    np.testing.assert_array_equal(raw.roi_ZYX, aligned.roi_ZYX)


def test_p41_registration_brings_a_moved_image_back(tmp_path: Path) -> None:
    make_case(tmp_path / "tree", shift=(4.0, -3.0, 2.0))
    align(tmp_path, out=tmp_path / "plain")
    assert align(tmp_path, register=True).error is None
    expected = 1500 - 0.5 * read_volume(tmp_path / "tree/P1/ax_t2wi.nii.gz").array
    inside = (slice(4, -4), slice(12, -12), slice(12, -12))

    def error(folder: str) -> float:
        return float(np.abs(read_volume(tmp_path / folder / "P1/ax_adc.nii.gz").array - expected)[inside].mean())

    assert error("out") < 0.5 * error("plain")
    record = json.loads((tmp_path / "out/P1/ax_adc.json").read_text())["medssl"]
    matrix = np.array(record["transform_ras"])
    np.testing.assert_allclose((matrix @ [0, 0, 0, 1])[:3], (4, -3, 2), atol=0.7)
    assert record["registered"] is True
    # the mask stays where scanner coordinates put it
    roi = json.loads((tmp_path / "out/P1/roi_Prostate.json").read_text())["medssl"]
    assert (roi["registered"], roi["interpolation"]) == (False, "nearest")


def test_running_again_does_only_what_changed(tmp_path: Path) -> None:
    make_case(tmp_path / "tree")
    make_case(tmp_path / "tree", "P2")
    align(tmp_path)
    before = (tmp_path / "out/P1/ax_adc.nii.gz").stat().st_mtime_ns
    assert align(tmp_path).count("up_to_date") == 6
    assert (tmp_path / "out/P1/ax_adc.nii.gz").stat().st_mtime_ns == before
    write_volume(tmp_path / "tree/P2/ax_adc.nii.gz", balls(ADC, affine_of(ADC, (3.4, 2, 2))))
    result = align(tmp_path)
    assert [(o.case_id, o.stem) for o in result.outputs if o.status == "aligned"] == [("P2", "ax_adc")]
    (tmp_path / "out/P1/ax_adc.nii.gz").write_bytes(b"cut")
    assert align(tmp_path).count("aligned") == 1


def test_bad_volumes_are_listed_and_the_rest_is_done(tmp_path: Path) -> None:
    for name in ("P1", "P2", "P3"):
        make_case(tmp_path / "tree", name)
    (tmp_path / "tree/P1/ax_t2wi.nii.gz").unlink()
    path = tmp_path / "tree/P2/ax_adc.nii.gz"
    path.write_bytes(path.read_bytes()[:300])
    far = affine_of(ADC, (3.4, 2, 2), (0, 0, 900))
    write_volume(tmp_path / "tree/P3/ax_dwi.nii.gz", balls(ADC, far))
    result = align(tmp_path, on_error="skip")
    assert isinstance(result.error, PartialFailure)
    with (tmp_path / "out/failures.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [(r["case_id"], r["path"]) for r in table] == [
        ("P1", "ax_t2wi"),
        ("P2", "ax_adc.nii.gz"),
        ("P3", "ax_dwi.nii.gz"),
    ]
    assert "there are ax_adc, roi_Prostate" in table[0]["reason"]
    assert "does not overlap" in table[2]["reason"]
    assert sorted(p.name for p in (tmp_path / "out").rglob("*.nii.gz")) == [
        "ax_adc.nii.gz",
        "ax_t2wi.nii.gz",
        "ax_t2wi.nii.gz",
        "roi_Prostate.nii.gz",
        "roi_Prostate.nii.gz",
    ]
    where = result.error.where.splitlines()
    assert where[0].startswith("P1 ax_t2wi: The case has no reference")
    assert where[1:] == [f"and 2 more, all in {tmp_path / 'out/failures.csv'}"]
    assert result.error.fix == "P1 ax_t2wi: choose a --reference that every case has"
    stopped = align(tmp_path, out=tmp_path / "two")
    assert stopped.stopped
    assert isinstance(stopped.error, DataError)


def test_patients_of_the_table_stay_known(tmp_path: Path) -> None:
    make_case(tmp_path / "tree")
    (tmp_path / "tree/cases.csv").write_text(
        "case_id,patient_id,study_uid,stem,path,series_uid,n_slices,spacing\n"
        "P1,007,1.2,ax_adc,P1/ax_adc.nii.gz,1.2.3,18,3.4 2 2\nP9,9,1.3,ax_adc,P9/ax_adc.nii.gz,1.2.4,18,3.4 2 2\n"
    )
    align(tmp_path)
    lines = (tmp_path / "out/cases.csv").read_text().splitlines()
    assert lines[1:] == ["P1,007,1.2,ax_adc,P1/ax_adc.nii.gz,1.2.3,20,3 1.2 1.2"]


def test_r12_patients_of_the_labels_go_along_with_the_aligned_cases(tmp_path: Path) -> None:
    make_case(tmp_path / "tree", "P1_1")
    make_case(tmp_path / "tree", "P1_2")
    make_case(tmp_path / "tree", "P2")
    (tmp_path / "tree/P2/ax_t2wi.nii.gz").unlink()
    (tmp_path / "tree/labels.csv").write_text("case_id,patient_id,label\nP1_1,007,1\nP1_2,007,0\nP2,8,1\nP9,9,0\n")
    align(tmp_path, on_error="skip")
    assert (tmp_path / "out/labels.csv").read_text() == "case_id,patient_id,label\nP1_1,007,1\nP1_2,007,0\n"
    assert {name: owner.patient_id for name, owner in read_owners(tmp_path / "out").items()} == {
        "P1_1": "007",
        "P1_2": "007",
    }


def test_r12_a_table_of_patients_that_cannot_be_read_is_refused_first(tmp_path: Path) -> None:
    make_case(tmp_path / "tree")
    (tmp_path / "tree/labels.csv").write_text("case_id,patient_id\nP1,7,8,9\n")
    with pytest.raises(DataError, match="does not fit the header"):
        align(tmp_path)
    assert not (tmp_path / "out").exists()


def test_t17_a_lesion_map_follows_with_its_values_even_when_it_is_empty(tmp_path: Path) -> None:
    make_case(tmp_path / "tree")
    source = tmp_path / "tree/P1"
    roi = read_volume(source / "roi_Prostate.nii.gz")
    write_volume(source / "lesion.nii.gz", Volume((roi.array > 0).astype(np.uint8) * 3, roi.affine))
    write_volume(source / "tz.nii.gz", Volume(np.zeros_like(roi.array), roi.affine))
    result = align(tmp_path, register=True)
    assert result.error is None
    lesion = read_volume(tmp_path / "out/P1/lesion.nii.gz").array
    assert (lesion.dtype, set(np.unique(lesion))) == (np.uint8, {0, 3})
    assert not read_volume(tmp_path / "out/P1/tz.nii.gz").array.any()
    record = json.loads((tmp_path / "out/P1/lesion.json").read_text())["medssl"]
    assert (record["registered"], record["interpolation"]) == (False, "nearest")


def test_interruption_names_the_output_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_case(tmp_path / "tree")

    def interrupt(task: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(align_module, "align_case", interrupt)
    with pytest.raises(Interrupted) as caught:
        align(tmp_path)
    assert str(tmp_path / "out") in caught.value.where


def test_one_volume_and_one_case_are_singular(tmp_path: Path) -> None:
    write_volume(tmp_path / "tree/P1/ax_t2wi.nii.gz", balls(T2, affine_of(T2, (3, 1.2, 1.2))))
    assert align(tmp_path).summary() == "1 case; aligned: 1 volume; 0 failed"
    assert align(tmp_path).summary() == "1 case; aligned: 0 volumes, 1 was up to date; 0 failed"
    (tmp_path / "tree/P1/ax_t2wi.nii.gz").write_bytes(b"cut")
    error = align(tmp_path).error
    assert error is not None
    assert error.what.startswith("1 volume could not be aligned")
    assert "more" not in error.where


def test_nii_wins_over_nii_gz_and_gradients_go_along_where_they_hold(tmp_path: Path) -> None:
    make_case(tmp_path / "tree")
    four = Volume(np.arange(2 * 20 * 64 * 64, dtype=np.float32).reshape(2, *T2), affine_of(T2, (3, 1.2, 1.2)))
    write_volume(tmp_path / "tree/P1/9_dti.nii", four)
    write_volume(tmp_path / "tree/P1/9_dti.nii.gz", balls(T2, four.affine))
    (tmp_path / "tree/P1/9_dti.bval").write_text("0 700\n")
    (tmp_path / "tree/P1/9_dti.bvec").write_text("0 1\n0 0\n0 0\n")
    align(tmp_path)
    assert read_volume(tmp_path / "out/P1/9_dti.nii.gz").array.shape == (2, *T2)
    assert (tmp_path / "out/P1/9_dti.bvec").read_text() == "0 1\n0 0\n0 0\n"
    assert (tmp_path / "out/P1/9_dti.bval").read_text() == "0 700\n"


def test_requests_that_cannot_be_met(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="case tree is missing"):
        align(tmp_path)
    (tmp_path / "tree/empty").mkdir(parents=True)
    with pytest.raises(DataError, match="holds no case"):
        align(tmp_path)
    make_case(tmp_path / "tree")
    for out in (tmp_path / "tree", tmp_path, tmp_path / "tree/out"):
        with pytest.raises(ConfigError, match="lie in one another"):
            align(tmp_path, out=out, overwrite=True)
    with pytest.raises(ConfigError, match="no case has such a sequence") as caught:
        align(tmp_path, reference="ax_t2w")
    assert caught.value.fix == "did you mean ax_t2wi?"
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="on-error"):
        align(tmp_path, on_error="maybe")
    assert len(list((tmp_path / "tree").rglob("*.nii.gz"))) == 3


def test_overwrite_replaces_nothing_before_the_tree_was_read(tmp_path: Path) -> None:
    make_case(tmp_path / "tree")
    make_case(tmp_path / "tree", "P2")
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with locked(out, "output folder"), pytest.raises(ConfigError, match="Another process"):
        align(tmp_path, overwrite=True)
    good = (tmp_path / "tree/P2/ax_adc.nii.gz").read_bytes()
    (tmp_path / "tree/P2/ax_adc.nii.gz").write_bytes(good[:100])
    result = align(tmp_path, overwrite=True)
    assert isinstance(result.error, DataError)
    assert "nothing was replaced" in result.error.fix
    assert {p.name for p in out.iterdir()} == {".lock", "thesis.txt"}
    with pytest.raises(ConfigError, match="no case has"):
        align(tmp_path, overwrite=True, reference="ax_dwi", on_error="skip")
    assert {p.name for p in out.iterdir()} == {".lock", "thesis.txt"}
    result = align(tmp_path, overwrite=True, on_error="skip")
    assert (result.count("aligned"), len(result.failures)) == (5, 1)
    assert not (out / "thesis.txt").exists()
    assert (out / "failures.csv").is_file()
