"""What a user names as cases: files, folders, and the raw folders of nnU-Net and the Decathlon."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from medssl_cli.core.case import Case
from medssl_cli.core.volume import Volume
from medssl_cli.data.images import write_volume
from medssl_cli.services.case_input import Wanted, found_case, guessed_sequence, named_cases

WANTED = Wanted(("t2", "adc"), "t2", volumes=True)


def volume(path: Path, volumes: int = 1) -> Path:
    array = np.arange(volumes * 24, dtype=np.int16).reshape((volumes, 2, 3, 4) if volumes > 1 else (2, 3, 4))
    write_volume(path, Volume(array, np.eye(4)))
    return path


def found(path: Path, tmp_path: Path, wanted: Wanted = WANTED, sequence: str | None = None) -> Case:
    (named,) = named_cases([str(path)])
    with found_case(named, wanted, sequence, tmp_path / "scratch") as case:
        return case


@pytest.fixture
def nnunet(tmp_path: Path) -> Path:
    """Two test cases of ADC and T2, in the other order than the model takes them; the second lacks its T2."""
    root = tmp_path / "Dataset001_P"
    (root / "imagesTr").mkdir(parents=True)
    for name in ("a_0000", "a_0001", "b_0000"):
        volume(root / "imagesTs" / f"{name}.nii.gz")
    labels = {"background": 0, "gland": 1}
    description = {
        "channel_names": {"0": "ADC", "1": "T2"},
        "labels": labels,
        "numTraining": 0,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(description))
    return root


def test_a_folder_of_nnunet_images_is_all_its_cases(
    nnunet: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert [(case.name, case.path.name) for case in named_cases([str(nnunet / "imagesTs")])] == [
        ("a", "a_0000.nii.gz"),
        ("b", "b_0000.nii.gz"),
    ]
    case = found(nnunet / "imagesTs" / "a_0000.nii.gz", tmp_path)
    assert {name: entry.path.name for name, entry in case.sequences.items()} == {
        "t2": "a_0001.nii.gz",
        "adc": "a_0000.nii.gz",
    }
    assert list(case.sequences) == ["t2", "adc"]
    assert not caplog.records
    assert list(found(nnunet / "imagesTs" / "b_0000.nii.gz", tmp_path).sequences) == ["adc"]
    assert "b: t2 missing" in caplog.text


def test_a_file_of_nnunet_is_one_sequence_where_that_is_asked_for_or_no_name_fits(nnunet: Path, tmp_path: Path) -> None:
    path = nnunet / "imagesTs" / "a_0001.nii.gz"
    assert list(found(path, tmp_path, sequence="adc").sequences) == ["adc"]
    other = Wanted(("flair", "t1"), "flair", volumes=True)
    assert {name: entry.path for name, entry in found(path, tmp_path, other).sequences.items()} == {"flair": path}


def test_a_file_of_the_decathlon_has_its_channels(tmp_path: Path) -> None:
    root = tmp_path / "Task05_P"
    path = volume(root / "imagesTr" / "p_1.nii.gz", volumes=2)
    entries = [{"image": "./imagesTr/p_1.nii.gz", "label": "./labelsTr/p_1.nii.gz"}]
    described = {"modality": {"0": "T2", "1": "ADC"}, "labels": {"0": "background", "1": "PZ"}, "training": entries}
    (root / "dataset.json").write_text(json.dumps(described))
    case = found(path, tmp_path)
    assert {name: entry.volume_index for name, entry in case.sequences.items()} == {"t2": 0, "adc": 1}


@pytest.mark.parametrize(
    ("name", "asked", "expected"),
    [("t2_fs.nii.gz", None, None), ("scan.nii.gz", None, "t2"), ("scan.nii.gz", "adc", None), ("scan", None, None)],
)
def test_a_name_that_tells_nothing_is_a_guess(
    name: str, asked: str | None, expected: str | None, tmp_path: Path
) -> None:
    path = tmp_path / name
    volume(path if path.suffix else path / "t2.nii.gz")
    (named,) = named_cases([str(path)])
    case = found(path, tmp_path, sequence=asked)
    assert guessed_sequence(named, case, WANTED.sequences, asked) == expected


def test_what_a_data_set_tells_is_no_guess(nnunet: Path, tmp_path: Path) -> None:
    path = nnunet / "imagesTs" / "a_0000.nii.gz"
    (named,) = named_cases([str(path)])
    assert guessed_sequence(named, found(path, tmp_path), WANTED.sequences, None) is None
