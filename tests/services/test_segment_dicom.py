"""Label maps as DICOM: what a reader finds at every place in the patient is what the NIfTI file holds there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from matplotlib.path import Path as Line
from test_dicom_export import ORIENTATIONS, frames_of, sources, study
from test_infer_segment import dense_run, write_segment_run
from torch import nn

from medssl_cli.core.errors import ConfigError
from medssl_cli.core.volume import Volume
from medssl_cli.models.dense_decoder import DecoderConfig, DenseNetwork
from medssl_cli.models.vit import VisionTransformer
from medssl_cli.report.labels import label_colour
from medssl_cli.services.dicom_export import NOTE
from medssl_cli.services.infer import InferRequest, infer
from medssl_cli.services.segment_dicom import _FINDINGS, _ORGANS, property_of

pytest.importorskip("highdicom")
WriteDicom = Callable[..., Volume]
CLASSES = ("background", "prostate", "lesion")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights on one sequence: a noisy label map, with holes and single voxels."""
    return dense_run(tmp_path_factory.mktemp("runs") / "run", CLASSES, ("ax_t2wi",))


def segmented(run: Path, folder: Path, out: Path, dicom: str | None = "seg,rtstruct", **more: Any) -> Any:
    """The label map as nibabel reads it."""
    infer(InferRequest((str(folder),), model=run, device="cpu", out=out, dicom=dicom, **more))
    return nib.load(out / f"{folder.name}_segmentation.nii.gz")


def from_segmentation(path: Path, nifti: Any) -> np.ndarray:
    """The label map of a DICOM segmentation on the grid of a NIfTI file, by the place of every pixel in mm."""
    image = pydicom.dcmread(path)
    to_voxel, found = np.linalg.inv(nifti.affine), np.zeros(nifti.shape, int)
    rows, columns = np.mgrid[: image.Rows, : image.Columns]
    for pixels, own, (position, orientation, spacing) in zip(
        image.pixel_array, image.PerFrameFunctionalGroupsSequence, frames_of(image), strict=True
    ):
        cosines, spacing = np.array(orientation, float), np.array(spacing, float)
        lps = np.array(position, float) + columns[..., None] * cosines[:3] * spacing[1]
        lps = lps + rows[..., None] * cosines[3:] * spacing[0]
        places = lps * [-1, -1, 1] @ to_voxel[:3, :3].T + to_voxel[:3, 3]
        voxels = np.rint(places).astype(int)
        np.testing.assert_allclose(places, voxels, atol=0.02)
        if not hasattr(own, "SegmentIdentificationSequence"):  # of one segment, told once for all frames
            own = image.SharedFunctionalGroupsSequence[0]
        number = own.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        assert not found[tuple(voxels[pixels > 0].T)].any()
        found[tuple(voxels[pixels > 0].T)] = number
    return found


def from_contours(path: Path, nifti: Any) -> np.ndarray:
    """The label map whose voxel centres lie inside an odd number of a region's contours, in mm of the patient."""
    structures = pydicom.dcmread(path)
    to_voxel, found = np.linalg.inv(nifti.affine), np.zeros(nifti.shape, int)
    for region in structures.ROIContourSequence:
        inside = np.zeros(nifti.shape, int)
        for contour in getattr(region, "ContourSequence", []):
            ras = np.array(contour.ContourData, float).reshape(-1, 3) * [-1, -1, 1]
            points = ras @ to_voxel[:3, :3].T + to_voxel[:3, 3]
            axis = int(np.argmin(np.ptp(points, axis=0)))
            plane = round(float(points[0, axis]))
            np.testing.assert_allclose(points[:, axis], plane, atol=0.02)  # one slice
            kept = [other for other in range(3) if other != axis]
            low = np.floor(points[:, kept].min(0)).astype(int).clip(0)
            high = np.ceil(points[:, kept].max(0)).astype(int) + 1
            box = tuple(map(slice, low, np.minimum(high, [nifti.shape[other] for other in kept])))
            centres = np.stack(np.mgrid[box], -1)
            mask = Line(points[:, kept]).contains_points(centres.reshape(-1, 2)).reshape(centres.shape[:2])
            np.moveaxis(inside, axis, 0)[plane][box] += mask
        assert not found[inside % 2 == 1].any()
        found[inside % 2 == 1] = region.ReferencedROINumber
    return found


@pytest.mark.parametrize("name", ["axial", "oblique", "feet first"])
def test_segmentation_and_contours_hold_every_voxel_of_the_label_map(
    name: str, run: Path, write_dicom: WriteDicom, tmp_path: Path
) -> None:
    folder = study(tmp_path / "study", write_dicom, orientation=ORIENTATIONS[name])
    nifti = segmented(run, folder, tmp_path / "out")
    labels = np.asarray(nifti.dataobj)
    assert set(np.unique(labels)) == {0, 1, 2}
    np.testing.assert_array_equal(from_segmentation(tmp_path / "out/study_seg.dcm", nifti), labels)
    np.testing.assert_array_equal(from_contours(tmp_path / "out/study_rtstruct.dcm", nifti), labels)
    told = json.loads((tmp_path / "out/summary.json").read_text(encoding="utf-8"))
    assert told["dicom"] == {"seg": "study_seg.dcm", "rtstruct": "study_rtstruct.dcm"}
    assert set(told["files"]) <= {path.name for path in (tmp_path / "out").iterdir()}


def test_patient_source_words_and_colours(run: Path, write_dicom: WriteDicom, tmp_path: Path) -> None:
    import highdicom

    folder = study(tmp_path / "study", write_dicom)
    segmented(run, folder, tmp_path / "out")
    given = sources(folder)
    segmentation = highdicom.seg.segread(tmp_path / "out/study_seg.dcm")
    structures = pydicom.dcmread(tmp_path / "out/study_rtstruct.dcm")
    for image in (segmentation, structures):
        assert (image.PatientID, str(image.PatientName)) == ("PAT-1", "Doe^Jane")
        assert image.StudyInstanceUID == given[0].StudyInstanceUID
        assert image.FrameOfReferenceUID == given[0].FrameOfReferenceUID == "1.2.3.9"
        assert image.SeriesInstanceUID not in {source.SeriesInstanceUID for source in given}
        assert image.SeriesDescription == f"Segmentation ({NOTE})"[:64]
        assert all(str(source.SOPInstanceUID) in str(image) for source in given)
        assert "hot region" not in str(image).lower()
        assert "hot-region" not in str(image).lower()
        assert "heatmap" not in str(image).lower()
    assert segmentation.SeriesInstanceUID != structures.SeriesInstanceUID
    assert segmentation.ContentLabel == "SEGMENTATION"
    found = [segmentation.get_segment_description(number) for number in (1, 2)]
    assert [segment.segment_label for segment in found] == ["prostate", "lesion"]
    meanings = [(one.segmented_property_category.meaning, one.segmented_property_type.meaning) for one in found]
    assert meanings == [("Anatomical Structure", "Prostate"), ("Morphologically Abnormal Structure", "Lesion")]
    assert [region.ROIName for region in structures.StructureSetROISequence] == ["prostate", "lesion"]
    colours = [tuple(region.ROIDisplayColor) for region in structures.ROIContourSequence]
    assert colours == [label_colour(0), label_colour(1)]
    for name in ("summary.json", "report.html"):
        text = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert "Doe^" not in text
        assert "PAT-1" not in text


def test_a_structure_that_was_not_found_is_told_so(write_dicom: WriteDicom, tmp_path: Path) -> None:
    run = dense_run(tmp_path / "run", ("background", "bleed"), ("ax_t2wi",), threshold=0.999999)
    folder = study(tmp_path / "study", write_dicom)
    nifti = segmented(run, folder, tmp_path / "out", threshold=0.9999999)
    assert not np.asarray(nifti.dataobj).any()
    assert not from_segmentation(tmp_path / "out/study_seg.dcm", nifti).any()
    structures = pydicom.dcmread(tmp_path / "out/study_rtstruct.dcm")
    assert [region.ROIName for region in structures.StructureSetROISequence] == ["bleed"]
    assert not hasattr(structures.ROIContourSequence[0], "ContourSequence")


def test_the_same_result_has_the_same_identity(run: Path, write_dicom: WriteDicom, tmp_path: Path) -> None:
    folder = study(tmp_path / "study", write_dicom)
    found = []
    for name in ("a", "b"):
        segmented(run, folder, tmp_path / name)
        files = [tmp_path / name / f"study_{kind}.dcm" for kind in ("seg", "rtstruct")]
        found.append([pydicom.dcmread(file).SOPInstanceUID for file in files])
    assert found[0] == found[1]
    segmented(run, folder, tmp_path / "a", dicom="seg")
    assert not (tmp_path / "a/study_rtstruct.dcm").exists()


def test_every_code_is_that_of_the_public_dictionary() -> None:
    from pydicom.sr.codedict import codes

    for table in (_FINDINGS, _ORGANS):
        for word, code in table.items():
            known = getattr(codes.SCT, code[2])
            assert (known.value, known.scheme_designator, known.meaning) == code, word
    for name in ("lesion", "prostate", "gland"):
        value, scheme, meaning = property_of(name)[0]
        known = getattr(codes.SCT, meaning.replace(" ", ""))
        assert (known.value, known.scheme_designator) == (value, scheme)


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("kidney_left", "Kidney"),
        ("Lungs", "Lung"),
        ("pancreas", "Pancreas"),
        ("liver_tumour", "Neoplasm"),
        ("bleed", "Hemorrhage"),
        ("gland", "Tissue"),
        ("class 3", "Tissue"),
        ("brainstem", "Tissue"),
    ],
)
def test_a_structure_has_the_code_of_its_name_or_none_of_its_own(name: str, meaning: str) -> None:
    assert property_of(name)[1][2] == meaning


@pytest.mark.parametrize(
    ("formats", "told"),
    [
        ("pm", "a parametric map holds the numbers of a heat map"),
        ("seg,sc", "overlay.png shows the structures"),
        ("nrrd", "no format that is known here"),
    ],
)
def test_formats_of_heat_maps_are_refused_with_the_reason(
    run: Path, write_dicom: WriteDicom, tmp_path: Path, formats: str, told: str
) -> None:
    folder = study(tmp_path / "study", write_dicom)
    with pytest.raises(ConfigError) as caught:
        segmented(run, folder, tmp_path / "out", dicom=formats)
    assert told in caught.value.what
    assert "rtstruct" in caught.value.fix
    assert not (tmp_path / "out").exists()


def test_contours_of_a_heat_map_are_refused_with_the_reason(
    write_run: Callable[..., Path], write_dicom: WriteDicom, tmp_path: Path
) -> None:
    folder = study(tmp_path / "study", write_dicom)
    backbone = write_run(tmp_path / "backbone", ("ax_t2wi",))
    request = InferRequest((str(folder),), model=backbone, device="cpu", out=tmp_path / "out", heatmap=True)
    with pytest.raises(ConfigError) as caught:
        infer(InferRequest(**{**vars(request), "dicom": "seg,rtstruct"}))
    assert "has no outline" in caught.value.what
    assert not (tmp_path / "out").exists()


def test_nifti_in_gives_no_dicom_out(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "ax_t2wi.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((40, 32, 4), np.int16), np.eye(4)), path)
    with pytest.raises(ConfigError) as caught:
        infer(InferRequest((str(path),), model=run, device="cpu", out=tmp_path / "out", dicom="rtstruct"))
    assert caught.value.code == "dicom_needs_dicom"
    assert not (tmp_path / "out").exists()


def smooth_run(run: Path) -> Path:
    """Random weights with the linear decoder: regions of some patches, as a trained network finds them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        settings: dict[str, Any] = {"embed_dim": 16, "depth": 4, "num_heads": 2, "patch_size": 16, "img_size": 64}
        network = DenseNetwork(VisionTransformer(**settings, sequences=("ax_t2wi",)), 3, DecoderConfig(name="linear"))
        for parameter in network.decoder.parameters():
            nn.init.normal_(parameter, std=0.3)
    facts = {"task": "semantic", "kind": "volumes", "sequences": ["ax_t2wi"], "preprocess": {}, "mean": 0.45}
    return write_segment_run(run, network, CLASSES, **facts, std=0.22, tile=64)


@pytest.mark.slow
def test_a_real_study_of_a_prostate(real_data: Path, tmp_path: Path) -> None:
    run = smooth_run(tmp_path / "run")
    folder = real_data / "prostatex_mpmri" / "ProstateX-0000" / "dicom"
    nifti = segmented(run, folder, tmp_path / "out")
    labels = np.asarray(nifti.dataobj)
    assert set(np.unique(labels)) == {0, 1, 2}
    np.testing.assert_array_equal(from_segmentation(tmp_path / "out/dicom_seg.dcm", nifti), labels)
    np.testing.assert_array_equal(from_contours(tmp_path / "out/dicom_rtstruct.dcm", nifti), labels)
