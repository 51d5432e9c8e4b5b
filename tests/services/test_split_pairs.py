"""A CT-PET data set into parts: patients together, files as links or copies, lists and counts beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medssl_cli.core.errors import ConfigError, DataError
from medssl_cli.data.ct_pet import read_ct_pet, split_triples
from medssl_cli.services.phantom import make_phantom
from medssl_cli.services.split import split


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pairs") / "data"
    make_phantom("ct-pet", root, cases=10, seed=1)
    return root


@pytest.mark.parametrize("files", ["link", "copy"])
def test_the_tree_of_the_parts_is_a_data_set_of_its_own(files: str, flat: Path, tmp_path: Path) -> None:
    result = split(flat, tmp_path / "out", ratios=(0.6, 0.2, 0.2), files=files)  # type: ignore[arg-type]
    found = split_triples(read_ct_pet(tmp_path / "out"))
    patients = {part: {triple.patient_id for triple in triples} for part, triples in found.items()}
    assert {part: len(ids) for part, ids in patients.items()} == {"train": 6, "val": 2, "test": 2}
    assert len(set().union(*patients.values())) == 10
    for triples in found.values():
        for triple in triples:
            for kind, path in triple.files.items():
                assert path.is_symlink() == (files == "link")
                original = flat / {"CT": "CT", "PET": "PET", "mask": "masks"}[kind] / triple.name
                assert path.read_bytes() == original.read_bytes()
    assert result.report["counts"] == {"train": 36, "val": 12, "test": 12}


def test_the_counts_of_split_info_are_those_of_the_folders(flat: Path, tmp_path: Path) -> None:
    split(flat, tmp_path / "out", ratios=(0.6, 0.2, 0.2), seed=3)
    info = json.loads((tmp_path / "out/split_info.json").read_text())
    assert info["statistics"] == {"total_patients": 10, "total_files": 60}
    assert info["split_config"] == {"ratios": [0.6, 0.2, 0.2], "seed": 3, "files": "link", "layout": "flat"}
    everyone: list[str] = []
    for part in ("train", "val", "test"):
        names = {path.name for path in (tmp_path / "out" / part / "masks").iterdir()}
        told = info[f"{part}_set"]
        assert told["file_count"] == len(names)
        assert set(told["patient_ids"]) == {name.rpartition("_slice_")[0] for name in names}
        assert told["patient_count"] == len(told["patient_ids"])
        everyone += told["patient_ids"]
    assert len(everyone) == len(set(everyone)) == 10


def test_lists_alone_on_demand_and_an_older_tree_goes(flat: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    split(flat, out, seed=1)
    assert (out / "train/CT").is_dir()
    split(flat, out, seed=1, files="none", overwrite=True)
    assert not (out / "train").exists()
    assert (out / "train.csv").read_text().splitlines()[0] == "patient_id,name"


def test_names_without_a_patient_are_refused_and_a_pattern_helps(real_data: Path, tmp_path: Path) -> None:
    source = real_data / "sts_ct_pet_png"
    with pytest.raises(DataError) as refused:
        split(source, tmp_path / "out")
    assert refused.value.code == "patient_unknown"
    assert not (tmp_path / "out").exists()
    result = split(source, tmp_path / "out", group_pattern=r"(STS_\d+)_")
    assert result.report["n_items"] == 186
    assert result.report["n_groups"] == 31


def test_options_without_effect_are_refused(flat: Path, prostate_tree: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="without these options"):
        split(flat, tmp_path / "out", stratify="label")
    with pytest.raises(ConfigError, match="without these options"):
        split(prostate_tree, tmp_path / "out", files="copy")
    assert not (tmp_path / "out").exists()


def test_what_is_split_is_not_split_again(flat: Path, tmp_path: Path) -> None:
    split(flat, tmp_path / "out")
    with pytest.raises(ConfigError, match="split already"):
        split(tmp_path / "out", tmp_path / "again", layout="ct-pet")


def test_pclt_folders_stay_folders_of_patients(flat: Path, tmp_path: Path) -> None:
    source = tmp_path / "pclt"
    for path in sorted((flat / "CT").iterdir()):
        patient, _, number = path.stem.removeprefix("patient_").partition("_slice_")
        (source / patient).mkdir(parents=True, exist_ok=True)
        for folder, kind in (("CT", "CT"), ("PET", "PET"), ("masks", "mask")):
            (source / patient / f"{patient}_{number}_{kind}.png").write_bytes((flat / folder / path.name).read_bytes())
    split(source, tmp_path / "out", layout="ct-pet")
    found = read_ct_pet(tmp_path / "out")
    assert found.layout == "pclt20k"
    assert sum(map(len, found.parts.values())) == 60


def test_the_command_says_what_it_made(medssl: Callable[..., Any], flat: Path, tmp_path: Path) -> None:
    done = medssl("split", flat, "--out", tmp_path / "out", "--files", "copy")
    assert done.exit_code == 0, done.output
    assert "train/, val/ and test/ with copies" in done.output
