"""DICOM folders to case trees: choice, faults, re-runs, interruption, privacy, and real series of four vendors."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from medssl_cli.core.errors import ConfigError, DataError, PartialFailure
from medssl_cli.core.run import locked
from medssl_cli.core.volume import Volume
from medssl_cli.data.images import read_volume
from medssl_cli.services.convert import ConvertRequest, ConvertResult, convert_dicom, safe_name

Writer = Callable[..., Volume]

MAPPING = """
ax_t2wi: {SeriesDescription: "*t2*", plane: axial}
ax_adc: {SeriesDescription: "*adc*"}
ax_dwi: {SeriesDescription: "*dwi*", b: all, not: {SeriesDescription: "*adc*"}}
dyn: {SeriesDescription: "*dyn*"}
"""


@pytest.fixture
def convert(tmp_path: Path) -> Callable[..., ConvertResult]:
    """Convert ``tmp_path/src`` into ``tmp_path/out`` in this process, with a mapping of four names."""
    mapping = tmp_path / "mapping.yaml"
    mapping.write_text(MAPPING)

    def run(**changes: Any) -> ConvertResult:
        values: dict[str, Any] = {
            "source": tmp_path / "src",
            "out": tmp_path / "out",
            "mapping": str(mapping),
            "workers": 0,
        }
        return convert_dicom(ConvertRequest(**{**values, **changes}))

    return run


def tree(out: Path) -> dict[str, str]:
    """Digest of every file of a case tree, without reports (they hold times), marker and lock."""
    return {
        str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(out.rglob("*"))
        if p.is_file() and p.name not in {".lock", ".medssl.json", "convert_report.json", ".pseudonym_key"}
    }


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def world_equal(given: Volume, reference: Volume) -> None:
    """Same shape, affine within 0.01, values within 1e-4 of the maximum, after both are brought to RAS."""
    given, reference = given.reoriented("RAS"), reference.reoriented("RAS")
    assert given.array.shape == reference.array.shape
    np.testing.assert_allclose(given.affine, reference.affine, atol=0.01)
    limit = 1e-4 * float(np.abs(reference.array).max())
    assert np.abs(given.array.astype(float) - reference.array.astype(float)).max() <= limit


def study(source: Path, write_dicom: Writer, patient: str = "P1", **tags: Any) -> dict[str, Volume]:
    """T2, ADC and two b-values in one series, of one patient."""
    common = {"PatientID": patient, "StudyInstanceUID": f"1.9.{int.from_bytes(patient.encode(), 'big')}", **tags}
    root = common["StudyInstanceUID"]
    made = {
        "ax_t2wi": write_dicom(source / patient / "t2", SeriesInstanceUID=f"{root}.1", SeriesNumber=2, **common),
        "ax_adc": write_dicom(
            source / patient / "adc",
            seed=1,
            spacing=(3.0, 1.6, 1.4),
            size=(5, 6),
            SeriesInstanceUID=f"{root}.2",
            SeriesNumber=3,
            SeriesDescription="adc map",
            **common,
        ),
    }
    for i, b in enumerate((50.0, 800.0)):
        made[f"ax_dwi_b{b:.0f}"] = write_dicom(
            source / patient / "dwi",
            seed=2 + i,
            name=f"b{b:.0f}_",
            first_instance=1 + 6 * i,
            spacing=(3.0, 1.6, 1.4),
            size=(5, 6),
            SeriesInstanceUID=f"{root}.3",
            SeriesNumber=4,
            SeriesDescription="dwi",
            DiffusionBValue=b,
            **common,
        )
    return made


# --- the tree --------------------------------------------------------------------------------------------------------


def test_case_tree_tables_and_sidecars(
    tmp_path: Path, write_dicom: Writer, convert: Callable[..., ConvertResult]
) -> None:
    made = study(tmp_path / "src", write_dicom)
    write_dicom(
        tmp_path / "src/P1/t1",
        SeriesInstanceUID="1.2.90",
        SeriesDescription="t1 vibe",
        StudyInstanceUID="1.9.20529",
        PatientID="P1",
    )
    result = convert()
    assert result.error is None
    out = tmp_path / "out"
    for stem, volume in made.items():
        world_equal(read_volume(out / "P1" / f"{stem}.nii.gz"), volume)
    assert not list(out.rglob("*.bval"))
    table = rows(out / "cases.csv")
    assert list(table[0]) == ["case_id", "patient_id", "study_uid", "stem", "path", "series_uid", "n_slices", "spacing"]
    assert [r["stem"] for r in table] == ["ax_adc", "ax_dwi_b50", "ax_dwi_b800", "ax_t2wi"]
    assert table[3] == {
        "case_id": "P1",
        "patient_id": "P1",
        "study_uid": "1.9.20529",
        "stem": "ax_t2wi",
        "path": "P1/ax_t2wi.nii.gz",
        "series_uid": "1.9.20529.1",
        "n_slices": "6",
        "spacing": "3 0.8 0.7",
    }
    sidecar = json.loads((out / "P1" / "ax_dwi_b800.json").read_text())
    assert (sidecar["DiffusionBValue"], sidecar["PatientID"], sidecar["EchoTime"]) == (800, "P1", 100.0)
    assert sidecar["medssl"]["series_uid"] == "1.9.20529.3"
    report = json.loads((out / "convert_report.json").read_text())
    assert {"schema_version", "medssl_version", "command", "started_at", "elapsed_s"} <= set(report)
    assert (report["n_converted"], report["n_failed"], report["n_unmatched"]) == (4, 0, 1)
    assert report["unmatched"][0]["description"] == "t1 vibe"
    assert (out / "failures.csv").read_text() == "case_id,path,reason,fix\n"
    assert not (out / ".work").exists()


@pytest.mark.parametrize("engine", ["dicom2nifti", "simpleitk"])
def test_other_engines_write_the_same_volumes(
    tmp_path: Path, write_dicom: Writer, convert: Callable[..., ConvertResult], engine: str
) -> None:
    made = study(tmp_path / "src", write_dicom)
    assert convert(engine=engine).error is None
    for stem, volume in made.items():
        world_equal(read_volume(tmp_path / "out/P1" / f"{stem}.nii.gz"), volume)


def test_all_converts_the_rest_and_keeps_4d(
    tmp_path: Path, write_dicom: Writer, convert: Callable[..., ConvertResult]
) -> None:
    for i, b in enumerate((0.0, 700.0, 700.0)):
        write_dicom(
            tmp_path / "src",
            seed=i,
            name=f"v{i}",
            first_instance=1 + 6 * i,
            SeriesInstanceUID="1.2.5",
            SeriesNumber=9,
            SeriesDescription="ep2d: diff/*x*",
            DiffusionBValue=b,
            DiffusionGradientOrientation=[float(i == 1), float(i == 2), 0.0] if b else None,
        )
    write_dicom(
        tmp_path / "src/loc",
        SeriesInstanceUID="1.2.6",
        SeriesNumber=1,
        SeriesDescription="localizer",
        per_slice=lambda k: {"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]} if k > 2 else {},
    )
    with pytest.raises(DataError, match="No series fits"):
        convert()
    result = convert(convert_all=True)
    assert result.error is None
    volume = read_volume(tmp_path / "out/PAT-1/9_ep2d_diff_x.nii.gz")
    assert volume.array.shape == (3, 6, 8, 10)
    assert (tmp_path / "out/PAT-1/9_ep2d_diff_x.bval").read_text().split() == ["0", "700", "700"]
    assert [u["reason"] for u in result.unmatched] == ["a localizer: its images have several orientations"]


def test_three_directions_become_one_image(
    tmp_path: Path, write_dicom: Writer, convert: Callable[..., ConvertResult]
) -> None:
    made = [
        write_dicom(
            tmp_path / "src",
            seed=i,
            name=f"v{i}",
            first_instance=1 + 6 * i,
            SeriesInstanceUID="1.2.5",
            SeriesDescription="dwi",
            DiffusionBValue=700.0,
            DiffusionGradientOrientation=[float(i == j) for j in range(3)],
        )
        for i in range(3)
    ]
    assert convert().error is None
    expected = np.prod([v.array.astype(float) for v in made], axis=0) ** (1 / 3)
    world_equal(read_volume(tmp_path / "out/PAT-1/ax_dwi_b700.nii.gz"), Volume(expected, made[0].affine))
    sidecar = json.loads((tmp_path / "out/PAT-1/ax_dwi_b700.json").read_text())
    assert "geometric mean of 3 directions" in sidecar["medssl"]["made"]


def test_enhanced_file_of_two_b_values_is_split(
    tmp_path: Path, write_dicom: Writer, convert: Callable[..., ConvertResult]
) -> None:
    volume = write_dicom(tmp_path / "classic")
    image = pydicom.dcmread(tmp_path / "classic/im001.dcm")
    arrays = [np.random.default_rng(i).integers(0, 2000, volume.array.shape).astype(np.uint16) for i in range(2)]
    frames = []
    for v, b in enumerate((50.0, 800.0)):
        for k in range(6):
            frame, position, orientation, measures, content, weighting = (Dataset() for _ in range(6))
            position.ImagePositionPatient = [-3.0, 5.0, -10.0 + 3 * k]
            orientation.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
            measures.PixelSpacing, measures.SliceThickness, measures.SpacingBetweenSlices = [0.8, 0.7], 3.0, 3.0
            content.StackID, content.InStackPositionNumber, content.DimensionIndexValues = "1", k + 1, [1, k + 1, v + 1]
            weighting.DiffusionBValue, weighting.DiffusionDirectionality = b, "ISOTROPIC"
            frame.PlanePositionSequence, frame.PlaneOrientationSequence = Sequence([position]), Sequence([orientation])
            frame.PixelMeasuresSequence, frame.FrameContentSequence = Sequence([measures]), Sequence([content])
            frame.MRDiffusionSequence = Sequence([weighting])
            frames.append(frame)
    del image.ImagePositionPatient, image.ImageOrientationPatient, image.PixelSpacing, image.SliceThickness
    image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4.1"
    image.SeriesDescription, image.NumberOfFrames = "dwi", 12
    image.SharedFunctionalGroupsSequence = Sequence([Dataset()])
    image.PerFrameFunctionalGroupsSequence = Sequence(frames)
    image.PixelData = np.concatenate(arrays).tobytes()
    (tmp_path / "src").mkdir()
    image.save_as(tmp_path / "src/e.dcm")
    result = convert()
    assert result.error is None
    assert sorted(p.name for p in (tmp_path / "out").rglob("*.nii.gz")) == ["ax_dwi_b50.nii.gz", "ax_dwi_b800.nii.gz"]
    for array, b in zip(arrays, (50, 800), strict=True):
        world_equal(read_volume(tmp_path / f"out/PAT-1/ax_dwi_b{b}.nii.gz"), Volume(array, volume.affine))
    assert convert(convert_all=True, mapping=None, out=tmp_path / "all").error is None


def test_a_stem_that_names_a_b_value_takes_that_volume_alone(
    tmp_path: Path, write_dicom: Writer, convert: Callable[..., ConvertResult]
) -> None:
    made = study(tmp_path / "src", write_dicom)
    plain = write_dicom(
        tmp_path / "src/x", seed=9, PatientID="P2", StudyInstanceUID="1.4", SeriesDescription="dwi high"
    )
    (tmp_path / "one.yaml").write_text('dwi_b800: {SeriesDescription: "*dwi*"}\n')
    result = convert(mapping=str(tmp_path / "one.yaml"))
    assert [(o.case_id, o.stem, o.b) for o in result.outputs] == [("P1", "dwi_b800", 800), ("P2", "dwi_b800", 800)]
    world_equal(read_volume(tmp_path / "out/P1/dwi_b800.nii.gz"), made["ax_dwi_b800"])
    world_equal(read_volume(tmp_path / "out/P2/dwi_b800.nii.gz"), plain)  # no tag says otherwise
    (tmp_path / "one.yaml").write_text('dwi: {SeriesDescription: "*dwi*", b: highest, not: {PatientID: P2}}\n')
    result = convert(mapping=str(tmp_path / "one.yaml"), out=tmp_path / "two")
    assert [o.stem for o in result.outputs] == ["dwi_b800"]


def test_time_series_named_by_a_rule_stays_4d(
    tmp_path: Path, write_dicom: Writer, convert: Callable[..., ConvertResult]
) -> None:
    made = [
        write_dicom(
            tmp_path / "src",
            seed=i,
            name=f"v{i}",
            first_instance=1 + 6 * i,
            SeriesInstanceUID="1.2.5",
            SeriesDescription="dyn",
            TemporalPositionIdentifier=i + 1,
        )
        for i in range(3)
    ]
    assert convert().error is None
    given = read_volume(tmp_path / "out/PAT-1/dyn.nii.gz")
    world_equal(given, Volume(np.stack([v.array for v in made]), made[0].affine))


def test_choice_among_several_series_is_told(
    tmp_path: Path, write_dicom: Writer, convert: Callable[..., ConvertResult], caplog: pytest.LogCaptureFixture
) -> None:
    first = write_dicom(tmp_path / "src/a", SeriesInstanceUID="1.2.5", SeriesNumber=4)
    longer = write_dicom(
        tmp_path / "src/b", n_slices=8, seed=3, SeriesInstanceUID="1.2.6", SeriesNumber=6, SeriesDescription="t2 again"
    )
    with caplog.at_level("INFO"):
        result = convert()
    world_equal(read_volume(tmp_path / "out/PAT-1/ax_t2wi.nii.gz"), longer)
    assert "series 6 t2 again chosen, not series 4 t2_tse_tra" in caplog.text
    assert "series 6 t2 again chosen" in result.outputs[0].note
    assert first.shape != longer.shape


def test_copies_of_a_series_in_two_folders_give_one_volume(
    tmp_path: Path, write_dicom: Writer, convert: Callable[..., ConvertResult]
) -> None:
    volume = write_dicom(tmp_path / "src/a")
    shutil.copytree(tmp_path / "src/a", tmp_path / "src/b")
    assert convert().error is None
    world_equal(read_volume(tmp_path / "out/PAT-1/ax_t2wi.nii.gz"), volume)


def test_one_file_may_be_the_source(real_data: Path, tmp_path: Path) -> None:
    source = real_data / "dicom_series/siemens_mosaic_b17/dicom/0001.dcm"
    result = convert_dicom(ConvertRequest(source, tmp_path / "out", convert_all=True, workers=0))
    assert result.outputs[0].n_slices == 35


# --- case ids --------------------------------------------------------------------------------------------------------


def test_several_studies_of_a_patient_are_cases_of_their_own(
    tmp_path: Path, write_dicom: Writer, convert: Callable[..., ConvertResult]
) -> None:
    for i, (patient, date) in enumerate((("A", "20200101"), ("A", "20210202"), ("A", "20210202"), ("B", "20200101"))):
        write_dicom(tmp_path / f"src/{i}", seed=i, PatientID=patient, StudyDate=date, StudyInstanceUID=f"1.7.{i}")
    convert()
    table = rows(tmp_path / "out/cases.csv")
    assert [(r["case_id"], r["patient_id"]) for r in table] == [
        ("A_20200101", "A"),
        ("A_20210202", "A"),
        ("A_20210202_2", "A"),
        ("B", "B"),
    ]


def test_a_case_id_stays_when_another_study_arrives(
    tmp_path: Path, write_dicom: Writer, convert: Callable[..., ConvertResult]
) -> None:
    write_dicom(tmp_path / "src/0", PatientID="A", StudyDate="20200101", StudyInstanceUID="1.7.0")
    convert()
    write_dicom(tmp_path / "src/1", seed=1, PatientID="A", StudyDate="20210101", StudyInstanceUID="1.7.1")
    result = convert()
    assert [(o.case_id, o.status) for o in result.outputs] == [("A", "up_to_date"), ("A_20210101", "converted")]


def test_two_patients_with_one_study_uid_stay_two(
    tmp_path: Path, write_dicom: Writer, convert: Callable[..., ConvertResult]
) -> None:
    for i, patient in enumerate("AB"):
        write_dicom(tmp_path / f"src/{i}", seed=i, PatientID=patient, StudyInstanceUID="1.7.0")
    assert [o.case_id for o in convert().outputs] == ["A", "B"]
    assert [(o.case_id, o.status) for o in convert().outputs] == [("A", "up_to_date"), ("B", "up_to_date")]


@pytest.mark.filterwarnings("ignore:The value length:UserWarning")  # the writer's, of 300 characters
@pytest.mark.parametrize(
    "patient", ["../../evil", "/etc/x", "a" * 300, "Müller Ümit", "..", "IRC - Slice", "<script>", "."]
)
def test_r13_patient_ids_never_leave_the_folder(
    tmp_path: Path, write_dicom: Writer, convert: Callable[..., ConvertResult], patient: str
) -> None:
    write_dicom(tmp_path / "src", PatientID=patient, SpecificCharacterSet="ISO_IR 192")
    result = convert()
    case_id = result.outputs[0].case_id
    assert safe_name(case_id) == case_id or len(case_id) > 64
    assert (tmp_path / "out" / case_id / "ax_t2wi.nii.gz").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mapping.yaml", "out", "src"]
    assert rows(tmp_path / "out/cases.csv")[0]["patient_id"] == patient.strip()


def test_r13_patients_whose_safe_names_are_equal_stay_two(
    tmp_path: Path, write_dicom: Writer, convert: Callable[..., ConvertResult]
) -> None:
    for i, patient in enumerate(("a/b", "a:b", "A_B", "")):
        write_dicom(tmp_path / f"src/{i}", seed=i, PatientID=patient, StudyInstanceUID=f"1.7.{i}")
    result = convert()
    ids = [o.case_id for o in result.outputs]
    assert len({i.casefold() for i in ids}) == 4
    assert sum(i.startswith("unknown-") for i in ids) == 1


def test_r13_a_link_out_of_the_output_folder_is_refused(
    tmp_path: Path, write_dicom: Writer, convert: Callable[..., ConvertResult]
) -> None:
    study(tmp_path / "src", write_dicom)
    convert()
    shutil.rmtree(tmp_path / "out/P1")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out/P1").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="case id was refused"):
        convert()
    assert not list((tmp_path / "elsewhere").iterdir())


# --- faults ----------------------------------------------------------------------------------------------------------


def damage_missing_slice(folder: Path) -> None:
    (folder / "im003.dcm").unlink()


def damage_duplicate(folder: Path) -> None:
    shutil.copy(folder / "im003.dcm", folder / "im0031.dcm")


def damage_truncated(folder: Path) -> None:
    data = (folder / "im006.dcm").read_bytes()
    (folder / "im006.dcm").write_bytes(data[:-70])


def damage_emptied(folder: Path) -> None:
    (folder / "im006.dcm").write_bytes(b"")


def edit(path: Path, **tags: Any) -> None:
    image = pydicom.dcmread(path)
    for keyword, value in tags.items():
        setattr(image, keyword, value)
    image.save_as(path)


def damage_orientation(folder: Path) -> None:
    edit(folder / "im006.dcm", ImageOrientationPatient=[1, 0, 0, 0, 0, -1])


def damage_tag(folder: Path) -> None:
    image = pydicom.dcmread(folder / "im002.dcm")
    del image.ImagePositionPatient
    image.save_as(folder / "im002.dcm")


def damage_tilt(folder: Path) -> None:
    for k in range(6):
        edit(folder / f"im{k + 1:03d}.dcm", ImagePositionPatient=[-3, 5 + 0.7 * k, -10 + 3 * k])


def damage_size(folder: Path) -> None:
    edit(folder / "im004.dcm", Rows=4, Columns=20)


DAMAGES = [
    damage_missing_slice,
    damage_duplicate,
    damage_truncated,
    damage_emptied,
    damage_orientation,
    damage_tag,
    damage_tilt,
    damage_size,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__.removeprefix("damage_"))
@pytest.mark.parametrize("engine", ["dcm2niix", "dicom2nifti", "simpleitk"])
def test_r10_no_wrong_volume_is_written(
    tmp_path: Path,
    write_dicom: Writer,
    convert: Callable[..., ConvertResult],
    damage: Callable[[Path], None],
    engine: str,
) -> None:
    made = study(tmp_path / "src", write_dicom)
    damage(tmp_path / "src/P1/t2")
    (tmp_path / "src/P1/t2/Thumbs.db").write_bytes(b"\x01\x02" * 400)
    result = convert(on_error="skip", engine=engine)
    written = {p.name.removesuffix(".nii.gz") for p in (tmp_path / "out").rglob("*.nii*")}
    assert written == set(made) - {"ax_t2wi"}, "the damaged series wrote a file"
    assert isinstance(result.error, PartialFailure)
    assert "series 2 t2_tse_tra" in str(result.error)
    (row,) = rows(tmp_path / "out/failures.csv")
    assert list(row) == ["case_id", "path", "reason", "fix"]
    assert (row["case_id"], row["path"]) == ("P1", "P1/t2")
    assert "series 2 t2_tse_tra for ax_t2wi" in row["reason"]
    assert row["fix"]
    (failure,) = json.loads((tmp_path / "out/convert_report.json").read_text())["failures"]
    assert (failure["series_uid"], failure["series_number"]) == ("1.9.20529.1", "2")


def test_stop_ends_after_the_first_bad_case_and_keeps_the_good_ones(
    tmp_path: Path, write_dicom: Writer, convert: Callable[..., ConvertResult]
) -> None:
    for patient in ("P1", "P2", "P3"):
        study(tmp_path / "src", write_dicom, patient)
    damage_missing_slice(tmp_path / "src/P2/t2")
    result = convert()
    assert result.stopped
    assert isinstance(result.error, DataError)
    assert "--on-error skip" in result.error.fix
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir()) == ["P1", "P2"]
    assert len(list((tmp_path / "out/P1").glob("*.nii.gz"))) == 4
    assert len(list((tmp_path / "out/P2").glob("*.nii.gz"))) == 3
    assert convert(on_error="skip").count("converted") == 4


def test_a_good_output_stays_when_its_source_is_damaged_later(
    tmp_path: Path, write_dicom: Writer, convert: Callable[..., ConvertResult]
) -> None:
    study(tmp_path / "src", write_dicom)
    convert()
    before = {k: v for k, v in tree(tmp_path / "out").items() if k != "failures.csv"}
    damage_truncated(tmp_path / "src/P1/t2")
    assert convert().error is not None
    assert {k: v for k, v in tree(tmp_path / "out").items() if k != "failures.csv"} == before


def test_unreadable_files_without_any_series_are_listed(
    tmp_path: Path, write_dicom: Writer, convert: Callable[..., ConvertResult]
) -> None:
    study(tmp_path / "src", write_dicom)
    (tmp_path / "src/lost").mkdir()
    (tmp_path / "src/lost/im.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\x02\0\0\0UL\x04\0")
    result = convert(on_error="skip")
    assert [f.path for f in result.failures] == ["lost/im.dcm"]
    assert result.count("converted") == 4
    assert convert().stopped


def test_burst_of_unknown_b_value_is_refused_and_a_named_one_is_used(
    tmp_path: Path, write_dicom: Writer, convert: Callable[..., ConvertResult]
) -> None:
    volume = write_dicom(tmp_path / "src/a", SeriesDescription="dwi calc b1400", SeriesInstanceUID="1.2.5")
    assert [o.stem for o in convert().outputs] == ["ax_dwi_b1400"]
    world_equal(read_volume(tmp_path / "out/PAT-1/ax_dwi_b1400.nii.gz"), volume)
    write_dicom(tmp_path / "src/b", seed=1, SeriesDescription="dwi", SeriesInstanceUID="1.2.6")
    result = convert(on_error="skip")
    assert [f.code for f in result.failures] == ["dicom_no_b_value"]


def test_requests_that_cannot_be_met(
    tmp_path: Path, write_dicom: Writer, convert: Callable[..., ConvertResult]
) -> None:
    with pytest.raises(DataError, match="source is missing"):
        convert()
    (tmp_path / "src").mkdir()
    (tmp_path / "src/a.txt").write_text("x")
    with pytest.raises(DataError, match="no DICOM image"):
        convert()
    shutil.rmtree(tmp_path / "out")
    study(tmp_path / "src", write_dicom)
    with pytest.raises(ConfigError, match="dcm2nii is not known") as caught:
        convert(engine="dcm2nii")
    assert caught.value.fix == "did you mean dcm2niix?"
    with pytest.raises(ConfigError, match="names no such sequence") as caught:
        convert(reference="ax_t2w")
    assert caught.value.fix == "did you mean ax_t2wi?"
    for out in (tmp_path / "src", tmp_path):
        with pytest.raises(ConfigError, match="lies in the output folder"):
            convert(out=out, overwrite=True)
    for out in (tmp_path / "src/out", tmp_path / "src/P1/out"):
        with pytest.raises(ConfigError, match="lies in the source"):
            convert(out=out)
        assert not out.exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.doc").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        convert(out=tmp_path / "full")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "full/thesis.doc").read_text() == "mine"
    assert (tmp_path / "src/P1").is_dir()


# --- the reference ---------------------------------------------------------------------------------------------------


def test_t17_every_sequence_takes_the_grid_of_the_reference(
    tmp_path: Path, write_dicom: Writer, convert: Callable[..., ConvertResult]
) -> None:
    made = study(tmp_path / "src", write_dicom)
    assert convert(reference="ax_t2wi").error is None
    reference = read_volume(tmp_path / "out/P1/ax_t2wi.nii.gz")
    world_equal(reference, made["ax_t2wi"])
    adc = read_volume(tmp_path / "out/P1/ax_adc.nii.gz")
    assert adc.grid_difference(reference) is None
    # a voxel centre of the reference that is one of the source: (x, y) = first source voxel
    source = made["ax_adc"].reoriented("RAS")
    target = adc.reoriented("RAS")
    at = np.linalg.inv(target.affine) @ source.affine @ np.array([source.shape[2] - 1, source.shape[1] - 1, 2, 1.0])
    i, j, k = np.rint(at[:3]).astype(int)
    assert np.abs(at[:3] - (i, j, k)).max() < 1e-3
    assert target.array[k, j, i] == source.array[2, -1, -1]
    sidecar = json.loads((tmp_path / "out/P1/ax_adc.json").read_text())["medssl"]
    assert (sidecar["aligned_to"], sidecar["interpolation"], sidecar["n_slices"]) == ("ax_t2wi", "linear", 6)
    assert convert(reference="ax_t2wi").count("up_to_date") == 4
    again = convert(reference="ax_t2wi", align=False)
    assert again.count("converted") == 3
    assert read_volume(tmp_path / "out/P1/ax_adc.nii.gz").shape == (6, 5, 6)


def test_a_reference_split_by_b_value_is_the_highest_of_the_case(
    tmp_path: Path, write_dicom: Writer, convert: Callable[..., ConvertResult]
) -> None:
    study(tmp_path / "src", write_dicom)
    assert convert(reference="ax_dwi").error is None
    reference = read_volume(tmp_path / "out/P1/ax_dwi_b800.nii.gz")
    for stem in ("ax_t2wi", "ax_adc", "ax_dwi_b50"):
        assert read_volume(tmp_path / f"out/P1/{stem}.nii.gz").grid_difference(reference) is None
    sidecar = json.loads((tmp_path / "out/P1/ax_t2wi.json").read_text())["medssl"]
    assert sidecar["aligned_to"] == "ax_dwi_b800"
    assert convert(reference="ax_dwi_b800").count("up_to_date") == 4


def test_without_the_reference_nothing_of_the_case_is_written(
    tmp_path: Path, write_dicom: Writer, convert: Callable[..., ConvertResult]
) -> None:
    study(tmp_path / "src", write_dicom)
    damage_missing_slice(tmp_path / "src/P1/t2")
    result = convert(reference="ax_t2wi", on_error="skip")
    assert {f.code for f in result.failures} == {"dicom_uneven_slices", "reference_missing"}
    assert isinstance(result.error, PartialFailure)
    where = result.error.where.splitlines()
    assert where[0].startswith("series 2 t2_tse_tra for ax_t2wi: The slices are not evenly spaced")
    assert where[1:] == [f"and 3 more, all in {tmp_path / 'out/failures.csv'}"]
    assert result.error.fix == f"series 2 t2_tse_tra: {result.failures[0].fix}"
    assert not list((tmp_path / "out").rglob("*.nii.gz"))


# --- running again, interruption, workers ----------------------------------------------------------------------------


def test_running_again_does_only_what_is_new_or_changed(
    tmp_path: Path, write_dicom: Writer, convert: Callable[..., ConvertResult]
) -> None:
    study(tmp_path / "src", write_dicom)
    convert()
    first = tree(tmp_path / "out")
    assert convert().count("up_to_date") == 4
    assert tree(tmp_path / "out") == first
    edit(tmp_path / "src/P1/adc/im002.dcm", PixelData=np.full((5, 6), 7, np.uint16).tobytes())
    study(tmp_path / "src", write_dicom, "P2")
    result = convert()
    assert sorted((o.case_id, o.stem) for o in result.outputs if o.status == "converted") == [
        ("P1", "ax_adc"),
        *(("P2", stem) for stem in ("ax_adc", "ax_dwi_b50", "ax_dwi_b800", "ax_t2wi")),
    ]
    assert "were up to date" in result.summary()
    (tmp_path / "out/P1/ax_t2wi.nii.gz").write_bytes(b"cut")
    assert [o.stem for o in convert().outputs if o.status == "converted"] == ["ax_t2wi"]
    assert convert(overwrite=True).count("converted") == 8


def test_dry_run_writes_nothing(tmp_path: Path, write_dicom: Writer, convert: Callable[..., ConvertResult]) -> None:
    study(tmp_path / "src", write_dicom)
    damage_missing_slice(tmp_path / "src/P1/t2")
    result = convert(dry_run=True, on_error="skip")
    assert [(o.stem, o.status) for o in result.outputs] == [
        (s, "planned") for s in ("ax_adc", "ax_dwi_b50", "ax_dwi_b800")
    ]
    assert [f.code for f in result.failures] == ["dicom_uneven_slices"]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_worker_processes_change_nothing(
    tmp_path: Path, write_dicom: Writer, convert: Callable[..., ConvertResult]
) -> None:
    for patient in ("P1", "P2", "P3"):
        study(tmp_path / "src", write_dicom, patient)
    convert(reference="ax_t2wi")
    convert(reference="ax_t2wi", out=tmp_path / "two", workers=2)
    assert tree(tmp_path / "two") == tree(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_r16_interrupted_conversion_ends_as_an_undisturbed_one(
    tmp_path: Path, write_dicom: Writer, convert: Callable[..., ConvertResult], kill: signal.Signals
) -> None:
    for i in range(12):
        study(tmp_path / "src", write_dicom, f"P{i:02d}")
    convert(out=tmp_path / "undisturbed")
    out = tmp_path / "out"
    words = [
        "convert",
        "dicom",
        str(tmp_path / "src"),
        str(out),
        "--mapping",
        str(tmp_path / "mapping.yaml"),
        "--workers",
        "0",
    ]
    script = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # a background job ignores it
    process = subprocess.Popen(
        [sys.executable, "-c", f"{script}from medssl_cli.app import main; main()", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 60
    while len(list(out.glob("P*/[!.]*.json"))) < 6 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, kill)
    process.communicate(timeout=60)
    assert process.returncode == (-9 if kill == signal.SIGKILL else 75)
    done = len(list(out.glob("P*/[!.]*.json")))
    assert 6 <= done < 48
    for path in out.glob("P*/[!.]*.nii.gz"):
        nib.load(path).get_fdata()
    result = convert()
    assert result.count("up_to_date") >= 6
    assert tree(out) == tree(tmp_path / "undisturbed")


def test_r16_leftovers_of_a_killed_run_are_cleaned(
    tmp_path: Path, write_dicom: Writer, convert: Callable[..., ConvertResult]
) -> None:
    study(tmp_path / "src", write_dicom)
    convert()
    first = tree(tmp_path / "out")
    (tmp_path / "out/.work/P1/first/in").mkdir(parents=True)
    (tmp_path / "out/P1/.ax_adc.nii.gz.1234.tmp.nii.gz").write_bytes(b"half")
    (tmp_path / "out/P1/ax_t2wi.json").unlink()  # killed between volume and sidecar
    result = convert()
    assert [o.stem for o in result.outputs if o.status == "converted"] == ["ax_t2wi"]
    assert tree(tmp_path / "out") == first


def peak_rss_kib(source: Path, out: Path, mapping: Path) -> int:
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from medssl_cli.services.convert import ConvertRequest, convert_dicom\n"
        f"source, out, mapping = {str(source)!r}, {str(out)!r}, {str(mapping)!r}\n"
        "r = convert_dicom(ConvertRequest(Path(source), Path(out), mapping=mapping, workers=0))\n"
        "assert r.error is None\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600, check=True)
    return int(answer.stdout)


@pytest.mark.slow
def test_r18_memory_is_flat_in_the_number_of_cases(tmp_path: Path, write_dicom: Writer) -> None:
    (tmp_path / "m.yaml").write_text(MAPPING)
    for i in range(200):
        write_dicom(
            tmp_path / f"all/P{i:03d}",
            seed=i,
            PatientID=f"P{i:03d}",
            StudyInstanceUID=f"1.7.{i}",
            SeriesInstanceUID=f"1.8.{i}",
        )
        if i < 20:
            shutil.copytree(tmp_path / f"all/P{i:03d}", tmp_path / f"some/P{i:03d}")
    few = peak_rss_kib(tmp_path / "some", tmp_path / "o1", tmp_path / "m.yaml")
    many = peak_rss_kib(tmp_path / "all", tmp_path / "o2", tmp_path / "m.yaml")
    assert many < few * 1.1, (few, many)


# --- privacy ---------------------------------------------------------------------------------------------------------

SECRETS = {
    "PatientName": "Doe^Jane",
    "PatientID": "MRN-4711",
    "PatientBirthDate": "19500102",
    "PatientComments": "seen in ward seven",
    "InstitutionName": "Hospital Nowhere",
    "ReferringPhysicianName": "House^Gregory",
    "StudyDescription": "prostate of Mr D",
    "SeriesDescription": "t2 Doe Jane",
    "ProtocolName": "t2 for Jane",
    "AccessionNumber": "ACC99881",
    "ImageComments": "artefact by Jane",
    "StudyDate": "20200304",
    "StationName": "MRC35006",
    "DeviceSerialNumber": "35006",
    "OperatorsName": "Nurse^Joy",
    "StudyInstanceUID": "1.9.8.7.6",
    "SeriesInstanceUID": "1.9.8.7.6.5",
}


@pytest.mark.parametrize("broken", [False, True])
def test_r20_anonymous_output_tells_no_person(
    tmp_path: Path,
    write_dicom: Writer,
    convert: Callable[..., ConvertResult],
    caplog: pytest.LogCaptureFixture,
    broken: bool,
) -> None:
    volume = write_dicom(tmp_path / "src/Doe_Jane", **SECRETS)
    unmatched = {**SECRETS, "SeriesDescription": "scan of Doe Jane", "SeriesInstanceUID": "1.9.8.7.6.6"}
    write_dicom(tmp_path / "src/Doe_Jane2", seed=2, **unmatched)
    if broken:
        damage_missing_slice(tmp_path / "src/Doe_Jane")
        damage_truncated(tmp_path / "src/Doe_Jane2")
    with caplog.at_level("DEBUG"):
        result = convert(anonymize=True, convert_all=True, on_error="skip")
    told = "\n".join([caplog.text, result.summary(), str(result.error), json.dumps(result.report())]).encode()
    files = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    for path in files:
        data = path.read_bytes()
        told += str(path.relative_to(tmp_path)).encode() + (
            nib.Nifti1Image.from_filename(path).header.binaryblock if path.name.endswith(".nii.gz") else data
        )
    for keyword, value in SECRETS.items():
        for part in {value, *value.replace("^", " ").split()}:
            if len(part) > 3 and part not in {"prostate", "Hospital"}:
                assert part.encode() not in told, (keyword, part)
    assert b"Doe" not in told
    assert str(Path.home()).encode() not in told
    assert str(tmp_path / "src").encode() not in told
    if not broken:
        case_id = result.outputs[0].case_id
        assert case_id.startswith("anon-")
        world_equal(read_volume(tmp_path / "out" / case_id / "ax_t2wi.nii.gz"), volume)
        sidecar = json.loads((tmp_path / "out" / case_id / "ax_t2wi.json").read_text())
        assert (sidecar["EchoTime"], sidecar["Modality"]) == (100.0, "MR")
        assert {o.stem for o in result.outputs} == {"ax_t2wi", "5_MR"}


def test_r20_pseudonyms_are_stable_in_a_folder_and_differ_between_folders(
    tmp_path: Path, write_dicom: Writer, convert: Callable[..., ConvertResult]
) -> None:
    study(tmp_path / "src", write_dicom)
    first = convert(anonymize=True)
    assert convert(anonymize=True).count("up_to_date") == 4
    other = convert(anonymize=True, out=tmp_path / "other")
    assert other.outputs[0].patient_id != first.outputs[0].patient_id
    key = tmp_path / "out/.pseudonym_key"
    assert key.stat().st_mode & 0o077 == 0
    with pytest.raises(ConfigError, match="holds anonymous cases, and named ones"):
        convert()


def test_r20_burned_in_text_is_refused(
    tmp_path: Path, write_dicom: Writer, convert: Callable[..., ConvertResult]
) -> None:
    write_dicom(tmp_path / "src", BurnedInAnnotation="YES")
    assert [f.code for f in convert(anonymize=True).failures] == ["dicom_burned_in_text"]


# --- real series -----------------------------------------------------------------------------------------------------

REAL = [
    "d2n_fail_gantry_tilt",
    "d2n_fail_not_a_volume",
    "d2n_ge_anatomical",
    "d2n_hitachi_anatomical",
    "d2n_siemens_anatomical",
    "ge_epi_4",
    "philips_epi",
    "siemens_mosaic_b17",
    "siemens_xa10_enhanced",
]


@pytest.mark.parametrize("case", REAL)
def test_r10_real_series_give_their_reference_or_nothing(real_data: Path, tmp_path: Path, case: str) -> None:
    folder = real_data / "dicom_series" / case
    with (real_data / "dicom_series/index.csv").open(newline="", encoding="utf-8") as file:
        expected = next(row["expected"] for row in csv.DictReader(file) if row["case"] == case)
    result = convert_dicom(ConvertRequest(folder / "dicom", tmp_path / "out", convert_all=True, workers=0))
    written = list((tmp_path / "out").rglob("*.nii.gz"))
    if expected != "ok":
        assert written == []
        assert isinstance(result.error, DataError)
        return
    assert result.error is None
    (path,) = written
    (reference,) = (folder / "reference").glob("*.nii.gz")
    world_equal(read_volume(path), read_volume(reference))


def test_r10_real_transfer_syntaxes_give_one_image(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "dicom_series/transfer_syntaxes"
    result = convert_dicom(ConvertRequest(folder / "dicom", tmp_path / "out", convert_all=True, workers=0))
    assert result.error is None
    assert sorted(o.stem for o in result.outputs) == [f"{i}_ax_asc_35sl" for i in range(1, 10)]
    reference = read_volume(folder / "reference/1.nii.gz")
    for output in result.outputs:
        world_equal(read_volume(tmp_path / "out" / output.path), reference)


@pytest.mark.parametrize(
    "engine",
    [
        "dcm2niix",
        pytest.param("dicom2nifti", marks=pytest.mark.slow),
        pytest.param("simpleitk", marks=pytest.mark.slow),
    ],
)
def test_real_prostate_study_is_sorted_into_its_sequences(real_data: Path, tmp_path: Path, engine: str) -> None:
    case = real_data / "prostatex_mpmri/ProstateX-0000"
    result = convert_dicom(ConvertRequest(case / "dicom", tmp_path / "out", engine=engine, workers=0))
    assert result.error is None
    stems = [row["stem"] for row in rows(tmp_path / "out/cases.csv")]
    assert stems == ["ax_adc", "ax_dwi_b1000", "ax_dwi_b400", "ax_dwi_b50", "ax_dwi_b800", "ax_t2wi"]
    four = read_volume(case / "nifti/6_ep2d_diff_tra_DYNDIST.nii.gz")
    references = {
        "ax_t2wi": read_volume(case / "nifti/4_t2_tse_tra.nii.gz"),
        "ax_adc": read_volume(case / "nifti/7_ep2d_diff_tra_DYNDIST_ADC.nii.gz"),
        "ax_dwi_b1000": read_volume(case / "nifti/8_ep2d_diff_tra_DYNDISTCALC_BVAL.nii.gz"),
        **{f"ax_dwi_b{b}": Volume(four.array[i], four.affine) for i, b in enumerate((50, 400, 800))},
    }
    for stem, reference in references.items():
        world_equal(read_volume(tmp_path / f"out/ProstateX-0000/{stem}.nii.gz"), reference)


def test_overwrite_replaces_nothing_before_the_source_was_read(
    tmp_path: Path, write_dicom: Writer, convert: Callable[..., ConvertResult]
) -> None:
    out = tmp_path / "out"
    (out / ".work").mkdir(parents=True)
    (out / "thesis.txt").write_text("mine")
    kept = {".lock", ".work", "thesis.txt"}
    (tmp_path / "src").mkdir()
    (tmp_path / "src/a.txt").write_text("x")
    with pytest.raises(DataError, match="no DICOM image"):
        convert(overwrite=True)
    assert {p.name for p in out.iterdir()} == kept
    study(tmp_path / "src", write_dicom)
    with locked(out, "output folder"), pytest.raises(ConfigError, match="Another process"):
        convert(overwrite=True)
    nothing = tmp_path / "nothing.yaml"
    nothing.write_text("ax_pet: {Modality: PT}\n")
    with pytest.raises(DataError, match="No series fits"):
        convert(overwrite=True, mapping=str(nothing))
    with pytest.raises(ConfigError) as caught:
        convert(overwrite=True, mapping=str(tmp_path / "mapping.yaml"), out=tmp_path / "src/P1")
    assert caught.value.code == "out_in_source"
    slices = sorted((tmp_path / "src/P1/t2").iterdir())
    removed = slices[2].read_bytes()
    slices[2].unlink()
    assert convert(overwrite=True).stopped
    assert {p.name for p in out.iterdir()} == kept
    slices[2].write_bytes(removed)
    result = convert(overwrite=True, anonymize=True)
    assert result.error is None
    assert result.count("converted") == 4
    assert not {"thesis.txt", ".work"} & {p.name for p in out.iterdir()}
    assert (out / ".pseudonym_key").is_file()
