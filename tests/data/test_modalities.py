"""The alias table: every spelling in use leads to one kind of picture with its own statistics."""

from __future__ import annotations

from pathlib import Path

import pytest

from medssl_cli.core.errors import ConfigError
from medssl_cli.data.datasets import DataConfig
from medssl_cli.data.modalities import MODALITIES, find_modality, modality_folder, resolve_modality

NAMES = {
    "fundus": ("Fundus", "fundus", "FUNDUS"),
    "oct": ("OCT", "oct", "o.c.t"),
    "external": ("External Eye", "External", "external_eye", "externaleye"),
    "ubm": ("UBM", "ubm"),
    "ultrasound": ("B-Ultrasound", "Ultrasound", "UltraSound", "b-scan", "B Scan", "bscan"),
    "mri": ("MRI", "mri"),
    "slitlamp": ("Silt Lamp", "Silt-Lamp", "SlitLamp", "SiltLamp", "slit-lamp", "slit_lamp"),
    "ffa": ("FFA", "ffa"),
}


@pytest.mark.parametrize(("name", "spelling"), [(n, s) for n, spellings in NAMES.items() for s in spellings])
def test_w02_every_spelling_leads_to_one_modality(name: str, spelling: str) -> None:
    modality = resolve_modality(spelling)
    assert modality.name == name
    assert DataConfig(modality=spelling).modality == name


def test_w02_all_eight_are_there_with_statistics_of_their_own() -> None:
    assert {modality.name for modality in MODALITIES} == set(NAMES)
    assert len({modality.mean for modality in MODALITIES}) == 8
    for modality in MODALITIES:
        assert all(0 < value < 1 for value in (*modality.mean, *modality.std))
    assert resolve_modality("fundus").mean == (0.423737496, 0.260946065, 0.128403902)
    assert resolve_modality("Silt-Lamp").std == (0.26516676, 0.23311588, 0.23903583)
    assert resolve_modality("UBM").mean == (0.096110865,) * 3


def test_w03_an_unknown_modality_names_the_nearest_and_the_way_out() -> None:
    assert find_modality("xray") is None
    with pytest.raises(ConfigError, match="did you mean slitlamp") as caught:
        resolve_modality("slitlanp")
    assert "check-data --stats" in caught.value.fix
    assert caught.value.exit_code == 2
    with pytest.raises(ValueError, match=r"did you mean fundus.*crops\.mean"):
        DataConfig(modality="fundos")


def test_v02_the_folder_of_the_modality_is_the_image_tree(tmp_path: Path) -> None:
    for name in ("Silt-Lamp", "Fundus", ".OCT", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "UBM").write_text("a file")
    assert modality_folder(tmp_path, "slitlamp") == tmp_path / "Silt-Lamp"
    assert modality_folder(tmp_path, "fundus") == tmp_path / "Fundus"
    for elsewhere in ("oct", "ubm"):  # hidden, and no folder
        assert modality_folder(tmp_path, elsewhere) == tmp_path
    (tmp_path / "SlitLamp").mkdir()
    with pytest.raises(ConfigError, match="Several folders mean the modality slitlamp") as caught:
        modality_folder(tmp_path, "slitlamp")
    assert "Silt-Lamp, SlitLamp" in caught.value.where
