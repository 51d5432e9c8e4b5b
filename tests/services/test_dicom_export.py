from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from constructed import noise, run_infer, save, write_head

from medssl_cli.core.case import Case, Sequence
from medssl_cli.core.errors import ConfigError, DataError, ResourceError
from medssl_cli.core.volume import Volume
from medssl_cli.services.dicom_export import (
    NOTE,
    dicom_formats,
    region_of,
    source_series,
    write_capture,
    write_parametric_map,
    write_segmentation,
)

pytest.importorskip("highdicom")

WriteRun = Callable[..., Path]
WriteDicom = Callable[..., Volume]
ORIENTATIONS = {
    "axial": (1, 0, 0, 0, 1, 0),
    "sagittal": (0, 1, 0, 0, 0, -1),
    "oblique": (0.98480775, 0.17364818, 0, -0.16317591, 0.92541658, 0.34202014),
    "feet first": (-1, 0, 0, 0, 1, 0),
}


@pytest.fixture(scope="module")
def head_run(tmp_path_factory: pytest.TempPathFactory, write_run: WriteRun) -> Path:
    folder = tmp_path_factory.mktemp("dicom")
    return write_head(folder / "head", write_run(folder / "run", ("ax_t2wi",)))


def study(folder: Path, write_dicom: WriteDicom, **more: Any) -> Path:
    """A series with a frame of reference, as scanners write it."""
    tags = {"FrameOfReferenceUID": "1.2.3.9", "PositionReferenceIndicator": "", "StudyID": "7", "AccessionNumber": "A1"}
    tags |= {"PatientSex": "F", "ReferringPhysicianName": ""}
    write_dicom(folder / "s5", size=(32, 40), **{**tags, **more})
    return folder


def sources(folder: Path) -> list[Any]:
    return [pydicom.dcmread(path) for path in sorted(folder.rglob("*.dcm"))]


def world_of(position: Any, orientation: Any, spacing: Any, row: int, column: int) -> np.ndarray:
    """RAS mm of a pixel, by the equation of the standard (C.7.6.2.1.1)."""
    cosines = np.array(orientation, float)
    lps = np.array(position, float) + cosines[:3] * float(spacing[1]) * column + cosines[3:] * float(spacing[0]) * row
    return lps * [-1, -1, 1]


def frames_of(image: Any) -> list[tuple[Any, Any, Any]]:
    """(position, orientation, spacing) of each frame."""
    shared = image.SharedFunctionalGroupsSequence[0]
    found = []
    for own in image.PerFrameFunctionalGroupsSequence:
        orientation = getattr(own, "PlaneOrientationSequence", None) or shared.PlaneOrientationSequence
        measures = getattr(own, "PixelMeasuresSequence", None) or shared.PixelMeasuresSequence
        position = own.PlanePositionSequence[0].ImagePositionPatient
        found.append((position, orientation[0].ImageOrientationPatient, measures[0].PixelSpacing))
    return found


# --- the whole way ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["axial", "oblique"])
def test_all_three_lie_on_the_source_and_hold_the_numbers_of_the_nifti(
    name: str, head_run: Path, write_dicom: WriteDicom, tmp_path: Path
) -> None:
    folder = study(tmp_path / "study", write_dicom, orientation=ORIENTATIONS[name])
    keys = ("mask_threshold=0.4",)
    (summary,) = run_infer(
        tmp_path / "out", head_run, folder, heatmap=True, dicom="pm,sc,seg", overrides=keys, sequence=None
    )
    assert summary["dicom"] == {"pm": "heatmap_pm.dcm", "sc": "heatmap_sc.dcm", "seg": "heatmap_seg.dcm"}
    nifti: Any = nib.load(tmp_path / "out/heatmap.nii.gz")
    voxels, to_voxel = np.asarray(nifti.dataobj), np.linalg.inv(nifti.affine)
    given = sources(folder)
    positions = {tuple(np.round(np.array(source.ImagePositionPatient, float), 4)) for source in given}
    maps = pydicom.dcmread(tmp_path / "out/heatmap_pm.dcm")
    regions = pydicom.dcmread(tmp_path / "out/heatmap_seg.dcm")
    for image, pixels in (
        (maps, np.frombuffer(maps.FloatPixelData, np.float32).reshape(6, 32, 40)),
        (regions, regions.pixel_array),
    ):
        assert image.FrameOfReferenceUID == "1.2.3.9"
        found = frames_of(image)
        assert {tuple(np.round(np.array(position, float), 4)) for position, _, _ in found} == positions
        for frame, (position, orientation, spacing) in zip(pixels, found, strict=True):
            np.testing.assert_allclose(np.array(orientation, float), ORIENTATIONS[name], atol=1e-6)
            for row, column in ((0, 0), (31, 39), (3, 21), (17, 5)):
                voxel = to_voxel @ [*world_of(position, orientation, spacing, row, column), 1]
                i, j, k = np.rint(voxel[:3]).astype(int)
                np.testing.assert_allclose(voxel[:3], (i, j, k), atol=0.02)
                value = voxels[i, j, k]
                assert frame[row, column] == (value if image is maps else value >= 0.4 * voxels.max())
    assert regions.pixel_array.sum() == (voxels >= 0.4 * voxels.max()).sum() > 0


def test_patient_source_and_words(head_run: Path, write_dicom: WriteDicom, tmp_path: Path) -> None:
    folder = study(tmp_path / "study", write_dicom)
    run_infer(tmp_path / "out", head_run, folder, heatmap=True, dicom="pm,sc,seg")
    given = sources(folder)
    uids = {str(source.SOPInstanceUID) for source in given}
    for name, modality in (("pm", None), ("sc", "OT"), ("seg", "SEG")):
        image = pydicom.dcmread(tmp_path / f"out/heatmap_{name}.dcm")
        assert (image.PatientID, str(image.PatientName)) == ("PAT-1", "Doe^Jane")
        assert image.StudyInstanceUID == given[0].StudyInstanceUID
        assert image.SeriesInstanceUID not in {source.SeriesInstanceUID for source in given}
        assert modality in (None, image.Modality)
        assert image.Manufacturer == "medssl"
        assert NOTE in image.SeriesDescription
        if name != "sc":
            told = str(image)
            assert all(uid in told for uid in uids), "not every source image is referenced"
    pm = pydicom.dcmread(tmp_path / "out/heatmap_pm.dcm")
    assert "no map of lesions" in pm.ImageComments
    assert pm.ContentQualification == "RESEARCH"
    segment = pydicom.dcmread(tmp_path / "out/heatmap_seg.dcm").SegmentSequence[0]
    assert segment.SegmentAlgorithmType == "AUTOMATIC"
    assert "medssl" in segment.SegmentationAlgorithmIdentificationSequence[0].AlgorithmName
    assert segment.SegmentationAlgorithmIdentificationSequence[0].AlgorithmSource == NOTE
    from PIL import Image

    picture = np.asarray(Image.open(tmp_path / "out/heatmap.png").convert("RGB"))
    np.testing.assert_array_equal(pydicom.dcmread(tmp_path / "out/heatmap_sc.dcm").pixel_array, picture)
    for name in ("summary.json", "report.html"):
        text = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert "Doe^" not in text
        assert "PAT-1" not in text


def test_highdicom_reads_them_back(head_run: Path, write_dicom: WriteDicom, tmp_path: Path) -> None:
    import highdicom

    folder = study(tmp_path / "study", write_dicom)
    run_infer(tmp_path / "out", head_run, folder, heatmap=True, dicom="seg")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "heatmap_seg.dcm" in names
    assert not names & {"heatmap_pm.dcm", "heatmap_sc.dcm"}
    segmentation = highdicom.seg.segread(tmp_path / "out/heatmap_seg.dcm")
    uids = [source.SOPInstanceUID for source in sources(folder)]
    pixels = segmentation.get_pixels_by_source_instance(uids, combine_segments=True)
    heat = np.asarray(nib.load(tmp_path / "out/heatmap.nii.gz").dataobj)
    assert pixels.shape == (6, 32, 40)
    assert pixels.sum() == (heat >= 0.5 * heat.max()).sum()
    run_infer(tmp_path / "out", head_run, folder, heatmap=True)
    assert not (tmp_path / "out/heatmap_seg.dcm").exists()


def test_the_same_result_has_the_same_identity(head_run: Path, write_dicom: WriteDicom, tmp_path: Path) -> None:
    folder = study(tmp_path / "study", write_dicom)
    found = []
    for name in ("a", "b"):
        run_infer(tmp_path / name, head_run, folder, heatmap=True, dicom="pm")
        found.append(pydicom.dcmread(tmp_path / name / "heatmap_pm.dcm").SOPInstanceUID)
    assert found[0] == found[1]


# --- any label map ---------------------------------------------------------------------------------------------------


def converted(folder: Path, write_dicom: WriteDicom, **more: Any) -> tuple[Path, Case, Volume]:
    """A DICOM folder, its conversion, and a volume on that grid."""
    from medssl_cli.data.images import read_volume
    from medssl_cli.services.convert import ConvertRequest, convert_dicom

    source = study(folder / "study", write_dicom, **more)
    result = convert_dicom(ConvertRequest(source, folder / "tree", align=False, workers=1, convert_all=True))
    (output,) = result.outputs
    path = folder / "tree" / output.path
    case = Case("P1", "P1", {"ax_t2wi": Sequence("ax_t2wi", path)})
    return source, case, read_volume(path)


def test_a_label_map_of_several_classes(write_dicom: WriteDicom, tmp_path: Path) -> None:
    source, case, grid = converted(tmp_path, write_dicom)
    labels = np.zeros(grid.shape, np.int16)
    labels[1, 3:9, 4:11] = 4
    labels[2, 5, 6] = 9
    labels[0, 0, 0] = 7  # of no name
    series = source_series(source, case, grid)
    path = tmp_path / "labels.dcm"
    write_segmentation(
        path, Volume(labels, grid.affine), series, {4: "blood", 9: "clot"}, algorithm="other", description="Masks"
    )
    import highdicom

    read = highdicom.seg.segread(path)
    assert [read.get_segment_description(n).segment_label for n in (1, 2)] == ["blood", "clot"]
    uids = [header.SOPInstanceUID for header in series.headers]
    pixels = read.get_pixels_by_source_instance(uids)
    np.testing.assert_array_equal(pixels[..., 0], series.frames(labels == 4))
    np.testing.assert_array_equal(pixels[..., 1], series.frames(labels == 9))
    assert pixels.sum() == 6 * 7 + 1


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_frames_are_the_pixels_of_the_source(name: str, write_dicom: WriteDicom, tmp_path: Path) -> None:
    """The converted image laid back onto its series gives the stored pixels of every instance."""
    source, case, grid = converted(tmp_path, write_dicom, orientation=ORIENTATIONS[name])
    series = source_series(source, case, grid)
    by_uid = {image.SOPInstanceUID: image.pixel_array for image in sources(source)}
    for header, frame in zip(series.headers, series.frames(grid.array), strict=True):
        np.testing.assert_array_equal(frame, by_uid[header.SOPInstanceUID])


def test_a_flat_map_and_an_empty_region(write_dicom: WriteDicom, tmp_path: Path) -> None:
    source, case, grid = converted(tmp_path, write_dicom)
    series = source_series(source, case, grid)
    heat = Volume(np.zeros(grid.shape, np.float32), grid.affine)
    write_parametric_map(tmp_path / "pm.dcm", heat, series, label="Nothing", definition="Nothing.")
    region = region_of(heat, 0.5)
    assert not region.array.any()
    write_segmentation(tmp_path / "seg.dcm", region, series, {1: "hot"}, algorithm="x", description="x")
    assert not pydicom.dcmread(tmp_path / "seg.dcm").pixel_array.any()
    write_capture(tmp_path / "sc.dcm", np.full((8, 9, 3), 7, np.uint8), series, label="x", definition="y")
    assert pydicom.dcmread(tmp_path / "sc.dcm").pixel_array.shape == (8, 9, 3)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_resampled_or_shifted_grid_is_refused(write_dicom: WriteDicom, tmp_path: Path) -> None:
    source, case, grid = converted(tmp_path, write_dicom)
    shifted, finer = grid.affine.copy(), grid.affine @ np.diag([0.5, 0.5, 1, 1])
    shifted[0, 3] += 0.3
    for affine, word in ((shifted, "resampled"), (finer, "resampled")):
        with pytest.raises(DataError) as caught:
            source_series(source, case, Volume(grid.array, affine))
        assert caught.value.code == "dicom_no_source"
        assert word in caught.value.where
    with pytest.raises(DataError) as caught:
        source_series(source, case, Volume(grid.array[:4], grid.affine))
    assert "beyond" in caught.value.where or "voxels" in caught.value.where


@pytest.mark.parametrize(
    ("tags", "word"), [({"FrameOfReferenceUID": None}, "frame of reference"), ({"NumberOfFrames": 3}, "multi-frame")]
)
def test_a_source_that_cannot_be_mapped_is_refused_with_the_reason(
    tags: dict[str, Any], word: str, write_dicom: WriteDicom, tmp_path: Path
) -> None:
    source, case, grid = converted(tmp_path, write_dicom)
    for path in source.rglob("*.dcm"):
        image = pydicom.dcmread(path)
        for keyword, value in tags.items():
            if value is None:
                delattr(image, keyword)
            else:
                setattr(image, keyword, value)
        image.save_as(path)
    with pytest.raises(DataError) as caught:
        source_series(source, case, grid)
    assert word in caught.value.where


def test_one_instance_a_place_of_the_wanted_b_value(write_dicom: WriteDicom, tmp_path: Path) -> None:
    source, case, grid = converted(tmp_path, write_dicom)
    sidecar = next((tmp_path / "tree").rglob("ax_t2wi.json"))
    for number, path in enumerate(sorted(source.rglob("*.dcm"))):
        image = pydicom.dcmread(path)
        for b in (0, 800):
            image.DiffusionBValue = float(b)
            image.SOPInstanceUID = f"1.2.3.4.{b}.{number}"
            image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
            image.save_as(path.with_name(f"b{b}_{number}.dcm"))
        path.unlink()
    import json

    record = json.loads(sidecar.read_text())
    record["medssl"]["b_value"] = 800
    sidecar.write_text(json.dumps(record))
    series = source_series(source, case, grid)
    assert [str(header.SOPInstanceUID) for header in series.headers] == [f"1.2.3.4.800.{n}" for n in range(6)]


def test_what_is_no_dicom_folder_is_refused_before_anything_is_written(head_run: Path, tmp_path: Path) -> None:
    file = save(tmp_path / "P1/ax_t2wi.nii.gz", noise())
    for path, word in ((file, "file"), (file.parent, "NIfTI")):
        with pytest.raises(ConfigError) as caught:
            run_infer(tmp_path / "out", head_run, path, heatmap=True, dicom="pm")
        assert caught.value.code == "dicom_needs_dicom"
        assert word in caught.value.where
    for text, more in (("pm,xx", {"heatmap": True}), ("pm", {})):
        with pytest.raises(ConfigError) as caught:
            run_infer(tmp_path / "out", head_run, file, dicom=text, **more)
        assert caught.value.fix
    with pytest.raises(ConfigError, match="mask_threshold"):
        run_infer(tmp_path / "out", head_run, file, heatmap=True, overrides=("mask_threshold=0.4",))
    assert not (tmp_path / "out").exists()


def test_without_highdicom_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(ResourceError) as caught:
        dicom_formats("pm", heatmap=True)
    assert caught.value.exit_code == 6
    assert "medssl[dicom]" in caught.value.fix
    assert dicom_formats(None, heatmap=False) == ()
