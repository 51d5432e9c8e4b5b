import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medssl_cli.core.errors import DataError, MedsslError
from medssl_cli.core.volume import Volume
from medssl_cli.data.images import write_volume
from medssl_cli.data.sequences import (
    b_value_of_name,
    best_candidate,
    choose_sequence,
    parse_bval,
    parse_json_b,
    resolve_sequence,
)


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (["ax_dwi_b1000.nii.gz", "ax_dwi_b2000.nii.gz"], "ax_dwi_b2000.nii.gz"),
        (["ax_dwi_1000.nii", "dwi_2000.nii"], "dwi_2000.nii"),
        (["ax_dwi_b0050_b1400.nii.gz", "ax_dwi_b800.nii.gz"], "ax_dwi_b0050_b1400.nii.gz"),
        (["ax_dwi_b50.nii.gz", "ax_dwi_20210315.nii.gz"], "ax_dwi_b50.nii.gz"),
        (["AX_DWI_b1000.nii.gz"], "AX_DWI_b1000.nii.gz"),
        # further traps
        (["ax_dwi_b1000.nii", "ax_dwi_b1000.nii.gz"], "ax_dwi_b1000.nii"),
        (["dwi_b800.nii.gz", "ax_dwi_b800.nii.gz"], "ax_dwi_b800.nii.gz"),
        (["dwi_b=1400.nii.gz", "dwi_bval50.nii.gz"], "dwi_b=1400.nii.gz"),
        (["ax_dwi_b1400_mask.nii.gz", "ax_dwi_b400.nii.gz"], "ax_dwi_b400.nii.gz"),
        (["ax_dwi_adc.nii.gz", "ax_dwi_b9.nii.gz"], "ax_dwi_b9.nii.gz"),
        (["dwi-roi-2000.nii.gz", "dwi-400.nii.gz"], "dwi-400.nii.gz"),
        (["dwi_label.nii.gz", "dwi_seg_b2000.nii.gz", "dwi_b50.nii.gz"], "dwi_b50.nii.gz"),
        (["ax_dwi_b800_20210315.nii.gz", "ax_dwi_b400_20220101.nii.gz"], "ax_dwi_b800_20210315.nii.gz"),
        (["ax_dwi_5001.nii.gz", "ax_dwi_0.nii.gz"], "ax_dwi_0.nii.gz"),
        (["ax_dwi_2_3.nii.gz", "ax_dwi_100.nii.gz"], "ax_dwi_100.nii.gz"),
        (["ax_dwi_tracew.nii.gz"], "ax_dwi_tracew.nii.gz"),
        (["ax_dwi_b1400.nii.gz.bak", "ax_dwi_b1400.json", "dwi_b5.nii"], "dwi_b5.nii"),
        (["ax_dwi.nii.gz", "ax_dwi_b1400.nii.gz"], "ax_dwi.nii.gz"),  # an exact stem wins
        (["AX_DWI.NII.GZ", "ax_dwi_b1400.nii.gz"], "AX_DWI.NII.GZ"),
    ],
)
def test_t23_diffusion_file_is_chosen_by_b_value(tmp_path: Path, files: list[str], chosen: str) -> None:
    sequence = resolve_sequence(touch(tmp_path / "c", *files), "ax_dwi")
    assert sequence is not None
    assert sequence.path.name == chosen


@pytest.mark.parametrize(
    ("stem", "b"),
    [
        ("ax_dwi_b1000", 1000),
        ("ax_dwi_b0050_b1400", 1400),
        ("ax_dwi_20210315", None),
        ("ax_dwi_1000", 1000),
        ("ax_dwi_1000_2", None),
        ("ax_dwi_1000_20210315", 1000),
        ("dwi.bval=800", 800),
        ("dwi_bvalue1400", 1400),
        ("dwi_B1500", 1500),
        ("dwi_abc1500", None),
        ("dwi_b1000a", None),
        ("dwi_b" + "9" * 5000, None),
        ("dwi_" + "9" * 5000, None),
        ("dwi_b٣", None),
        ("dwi", None),
    ],
)
def test_b_value_of_name(stem: str, b: int | None) -> None:
    assert b_value_of_name(stem) == b


def test_only_tokens_count_as_derived(tmp_path: Path) -> None:
    sequence = resolve_sequence(touch(tmp_path / "c", "ax_dwi_maskless_b900.nii.gz", "ax_dwi_b50.nii.gz"), "ax_dwi")
    assert sequence is not None
    assert sequence.path.name == "ax_dwi_maskless_b900.nii.gz"


def test_several_without_b_value_are_named(tmp_path: Path) -> None:
    folder = touch(tmp_path / "c", "ax_dwi_a.nii.gz", "ax_dwi_20210315.nii.gz")
    with pytest.raises(DataError) as caught:
        resolve_sequence(folder, "ax_dwi")
    assert caught.value.code == "dwi_ambiguous"
    assert "ax_dwi_a.nii.gz" in caught.value.where
    assert "ax_dwi_20210315.nii.gz" in caught.value.where
    assert ".bval" in caught.value.fix


def test_choice_is_told(tmp_path: Path) -> None:
    folder = touch(tmp_path / "c", "ax_dwi_b50.nii.gz", "ax_dwi_b1400.nii.gz", "ax_dwi_x.nii.gz")
    choice = choose_sequence(folder, "ax_dwi")
    assert choice is not None
    assert [code for code, _ in choice.warnings] == ["dwi_candidates", "dwi_b_unknown"]
    assert "ax_dwi_b50.nii.gz" in choice.sequence.note
    one = choose_sequence(touch(tmp_path / "d", "ax_dwi_x.nii.gz"), "ax_dwi")
    assert one is not None
    assert [code for code, _ in one.warnings] == ["dwi_b_unknown"]


def test_asked_b_value_and_absence(tmp_path: Path) -> None:
    folder = touch(tmp_path / "c", "ax_dwi_b50.nii.gz", "ax_dwi_b1400.nii.gz")
    exact, other = choose_sequence(folder, "ax_dwi_b50"), choose_sequence(folder, "ax_dwi_b1000")
    assert exact is not None
    assert other is not None
    assert exact.sequence.path.name == "ax_dwi_b50.nii.gz"
    assert other.sequence.path.name == "ax_dwi_b1400.nii.gz"
    assert "dwi_other_b" in [code for code, _ in other.warnings]
    assert resolve_sequence(folder, "ax_adc") is None
    assert resolve_sequence(tmp_path / "nowhere", "ax_dwi") is None


def test_spelling_of_other_sequences(tmp_path: Path) -> None:
    folder = touch(tmp_path / "c", "AX_T2WI.nii.gz", "ax_adc.nii", "ax_adc.nii.gz", "AX_ADC.nii.gz")
    t2, adc = choose_sequence(folder, "ax_t2wi"), choose_sequence(folder, "ax_adc")
    assert t2 is not None
    assert adc is not None
    assert t2.warnings[0][0] == "name_case"
    assert "capitals" in t2.sequence.note
    assert adc.sequence.path.name == "ax_adc.nii"


def test_sidecar_tells_the_b_value(tmp_path: Path) -> None:
    folder = touch(tmp_path / "c", "ax_dwi_a.nii.gz", "ax_dwi_c.nii.gz", "ax_dwi_d.nii.gz")
    (folder / "ax_dwi_a.bval").write_text("800\n")
    (folder / "ax_dwi_c.json").write_text(json.dumps({"DiffusionBValue": 1400}))
    (folder / "ax_dwi_d.json").write_text("not json")
    sequence = resolve_sequence(folder, "ax_dwi")
    assert sequence is not None
    assert sequence.path.name == "ax_dwi_c.nii.gz"


def four_d(folder: Path, name: str, volumes: int) -> Path:
    folder.mkdir(exist_ok=True)
    write_volume(folder / name, Volume(np.zeros((volumes, 2, 3, 4), np.int16), np.eye(4)))
    return folder


def test_4d_gives_the_volume_of_highest_b(tmp_path: Path) -> None:
    folder = four_d(tmp_path / "c", "ax_dwi.nii.gz", 4)
    (folder / "ax_dwi.bval").write_text("50 1400 800 1400")
    sequence = resolve_sequence(folder, "ax_dwi")
    assert sequence is not None
    assert sequence.volume_index == 1
    assert "b1400" in sequence.note


def test_4d_in_competition_counts_by_its_largest_b(tmp_path: Path) -> None:
    folder = four_d(tmp_path / "c", "ax_dwi_b50_b400.nii.gz", 2)
    (folder / "ax_dwi_b50_b400.bval").write_text("50 2000")
    touch(folder, "ax_dwi_b800.nii.gz")
    sequence = resolve_sequence(folder, "ax_dwi")
    assert sequence is not None
    assert (sequence.path.name, sequence.volume_index) == ("ax_dwi_b50_b400.nii.gz", 1)


@pytest.mark.parametrize("bval", [None, "50 400", "a b c", "50 nan 400"])
def test_4d_without_b_values_is_refused(tmp_path: Path, bval: str | None) -> None:
    folder = four_d(tmp_path / "c", "ax_dwi.nii.gz", 3)
    if bval:
        (folder / "ax_dwi.bval").write_text(bval)
    with pytest.raises(DataError, match="4-D") as caught:
        resolve_sequence(folder, "ax_dwi")
    assert caught.value.code == "dwi_4d_without_bval"


def test_folder_named_as_the_sequence(tmp_path: Path) -> None:
    touch(tmp_path / "ax_t2wi", "series.nii.gz")
    sequence = resolve_sequence(tmp_path, "ax_t2wi")
    assert sequence is not None
    assert sequence.path == tmp_path / "ax_t2wi" / "series.nii.gz"
    touch(tmp_path / "ax_t2wi", "second.nii.gz")
    with pytest.raises(DataError, match="several volumes"):
        resolve_sequence(tmp_path, "ax_t2wi")


def test_real_bval_of_a_scanner(real_data: Path, tmp_path: Path) -> None:
    source = real_data / "prostatex_mpmri/ProstateX-0000/nifti/6_ep2d_diff_tra_DYNDIST"
    (tmp_path / "ax_dwi.nii.gz").symlink_to(f"{source}.nii.gz")
    (tmp_path / "ax_dwi.bval").symlink_to(f"{source}.bval")
    sequence = resolve_sequence(tmp_path, "ax_dwi")
    assert sequence is not None
    assert sequence.volume_index == 2  # b 50, 400, 800


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40), st.text(max_size=60))
def test_r21_names_and_sidecars_never_break(stem: str, text: str) -> None:
    b = b_value_of_name("ax_dwi_" + stem)
    assert b is None or b >= 0
    assert best_candidate([]) is None
    for values in (parse_bval(text), parse_json_b(text), parse_json_b(json.dumps({"bval": text}))):
        assert values is None or all(v >= 0 for v in values)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.from_regex(r"(ax_)?(dwi|DWI)[_.\-a-z0-9=]{0,12}", fullmatch=True), min_size=1, max_size=4))
def test_r21_folders_of_names_give_a_file_or_a_known_error(
    tmp_path_factory: pytest.TempPathFactory, stems: list[str]
) -> None:
    folder = touch(tmp_path_factory.mktemp("c"), *(f"{stem}.nii.gz" for stem in stems))
    sequence, refusal = None, None
    try:
        sequence = resolve_sequence(folder, "ax_dwi")
    except MedsslError as error:
        refusal = error
    assert refusal is None or refusal.code == "dwi_ambiguous"
    assert sequence is None or sequence.path.is_file()
