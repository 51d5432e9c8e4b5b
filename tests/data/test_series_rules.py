"""Mappings from YAML, and the names that the shipped one knows."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medssl_cli.core.errors import ConfigError
from medssl_cli.data.dicom import Frame, Plane, SeriesEntry, SeriesFacts
from medssl_cli.data.series_rules import diffusion_stem, parse_mapping, preference, read_mapping


def entry(
    description: str, image_type: str = "ORIGINAL\\PRIMARY\\M", modality: str = "MR", number: str = "3"
) -> SeriesEntry:
    tags = {"SeriesDescription": [description], "ImageType": [image_type], "Modality": [modality]}
    return SeriesEntry("1.2", f"1.2.{number}", number, "P", "", "", tags, ["a"])


def facts(
    series: SeriesEntry, plane: str = "axial", n: int = 20, time: str = "", *, is_original: bool = True
) -> SeriesFacts:
    axes = {
        "axial": ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0)),
        "coronal": ((1.0, 0.0, 0.0), (0.0, 0.0, -1.0)),
        "sagittal": ((0.0, 1.0, 0.0), (0.0, 0.0, -1.0)),
    }[plane]
    frames = [Frame(0, Plane((0.0, 0.0, 0.0), *axes, (1.0, 1.0)), 8, 8)] * n
    return SeriesFacts(series, frames=frames, acquisition_time=time, is_original=is_original)


def stems(series: SeriesEntry, plane: str = "axial", n: int = 20) -> set[str]:
    rules = read_mapping(None).rules
    return {r.stem for r in rules if r.matches(series) and r.accepts_geometry(facts(series, plane, n))}


@pytest.mark.parametrize(
    ("description", "image_type", "expected"),
    [
        ("t2_tse_tra", "ORIGINAL\\PRIMARY\\M\\NORM", {"ax_t2wi"}),
        ("t2_tse_tra_320_p2", "ORIGINAL\\PRIMARY\\M", {"ax_t2wi"}),
        ("Ax T2 FRFSE", "ORIGINAL\\PRIMARY\\OTHER", {"ax_t2wi"}),
        ("AX T2 PROPELLER SMALL FOV", "ORIGINAL\\PRIMARY\\OTHER", {"ax_t2wi"}),
        ("T2W_TSE_ax", "ORIGINAL\\PRIMARY\\M_SE\\M\\SE", {"ax_t2wi"}),
        ("T2W tra HR", "ORIGINAL\\PRIMARY\\M_SE\\M\\SE", {"ax_t2wi"}),
        ("t2_spc_rst_axial_obl", "ORIGINAL\\PRIMARY\\M", {"ax_t2wi"}),
        ("ep2d_diff_tra_DYNDIST_ADC", "DERIVED\\PRIMARY\\DIFFUSION\\ADC", {"ax_adc"}),
        ("Apparent Diffusion Coefficient (mm2/s)", "DERIVED\\SECONDARY\\COMBINED", {"ax_adc"}),
        ("dADC Map", "DERIVED\\PRIMARY\\ADC\\ADC", {"ax_adc"}),
        ("diff_resolve_tra_ADC_DFC_MIX", "DERIVED\\PRIMARY\\DIFFUSION\\ADC", {"ax_adc"}),
        ("ep2d_diff_tra_DYNDIST", "DERIVED\\PRIMARY\\DIFFUSION\\TRACEW", {"ax_dwi"}),
        ("ep2d_diff_tra_DYNDISTCALC_BVAL", "DERIVED\\PRIMARY\\DIFFUSION\\TRACEW", {"ax_dwi"}),
        ("ep2d_diff_b50_400_800_tra_TRACEW", "DERIVED\\PRIMARY\\DIFFUSION\\TRACEW", {"ax_dwi"}),
        ("DWI b1400", "ORIGINAL\\PRIMARY\\M_SE\\M\\SE", {"ax_dwi"}),
        ("Ax DWI FOCUS B-1000", "ORIGINAL\\PRIMARY\\OTHER", {"ax_dwi"}),
        ("hbv", "DERIVED\\PRIMARY", {"ax_dwi"}),
        ("Exponential Apparent Diffusion Coefficient", "DERIVED\\SECONDARY", set()),
        ("eADC", "DERIVED\\PRIMARY", set()),
        ("t1_vibe_tra_dyn", "ORIGINAL\\PRIMARY\\M", set()),
        ("t2_loc_tra", "ORIGINAL\\PRIMARY\\M", set()),
    ],
)
def test_default_mapping_knows_the_vendors_names(description: str, image_type: str, expected: set[str]) -> None:
    assert stems(entry(description, image_type)) == expected


@pytest.mark.parametrize(("plane", "n"), [("sagittal", 20), ("coronal", 20), ("axial", 3)])
def test_other_planes_and_localizers_are_not_chosen(plane: str, n: int) -> None:
    assert stems(entry("t2_tse"), plane, n) == set()
    assert stems(entry("ep2d_diff_tra", "DERIVED\\PRIMARY\\DIFFUSION\\TRACEW"), plane, n) == set()


@pytest.mark.parametrize(
    ("description", "image_type", "modality", "expected"),
    [
        ("Head 5.0 H30s", "ORIGINAL\\PRIMARY\\AXIAL\\CT_SOM5 SEQ", "CT", True),
        ("WB CT", "ORIGINAL\\PRIMARY\\AXIAL", "CT", True),
        ("Topogram 0.6 T20f", "ORIGINAL\\PRIMARY\\LOCALIZER\\CT_SOM5 TOP", "CT", False),
        ("Scout", "ORIGINAL\\PRIMARY\\AXIAL", "CT", False),
        ("PET WB", "ORIGINAL\\PRIMARY", "PT", True),
        ("PET WB Uncorrected", "ORIGINAL\\PRIMARY", "PT", False),
        ("PET NAC", "ORIGINAL\\PRIMARY", "PT", False),
    ],
)
def test_default_mapping_knows_ct_and_pet(description: str, image_type: str, modality: str, expected: bool) -> None:
    found = stems(entry(description, image_type, modality))
    assert found == ({"ct" if modality == "CT" else "pet"} if expected else set())


def test_rules_and_lists_and_case() -> None:
    mapping = parse_mapping({"t2": {"series_description": "*T2*", "Modality": ["CT", "mr"]}}, "m")
    assert mapping.rules[0].matches(entry("My t2 scan"))
    assert not mapping.rules[0].matches(entry("My t1 scan"))
    assert mapping.keywords == ("Modality", "SeriesDescription")
    wrapped = parse_mapping({"mappings": {"t2": {"SeriesDescription": ["t2"]}}}, "m")
    assert wrapped.rules[0].stem == "t2"


def test_a_series_is_excluded_only_when_all_its_images_are() -> None:
    mapping = parse_mapping({"dwi": {"Modality": "MR", "not": {"ImageType": "adc"}, "b": "all"}}, "m")
    mixed = entry("x")
    mixed.tags["ImageType"] = ["DERIVED\\PRIMARY\\ADC", "DERIVED\\PRIMARY\\TRACEW"]
    (rule,) = mapping.rules
    assert rule.matches(mixed)
    assert not rule.matches(entry("x", "DERIVED\\PRIMARY\\ADC"))
    assert not rule.accepts_image("DERIVED\\PRIMARY\\ADC")
    assert rule.accepts_image("DERIVED\\PRIMARY\\TRACEW")


def test_choice_prefers_rule_then_original_then_slices_then_latest() -> None:
    base = facts(entry("a"), n=20, time="101500")
    better_first = [
        (facts(entry("b"), n=5), 0),
        (facts(entry("c"), n=24, time="090000"), 1),
        (facts(entry("d"), n=20, time="113000.5"), 1),
        (base, 1),
        (facts(entry("e"), n=40, is_original=False), 1),
    ]
    keys = [preference(f, rank) for f, rank in better_first]
    assert keys == sorted(keys)


def test_every_fault_is_told_with_the_nearest_name() -> None:
    bad = {
        "ax_t2wi": {"SeriesDescripton": "*t2*", "plan": "axial"},
        "../x": {"Modality": "MR"},
        "adc": [{"Modality": "MR", "plane": "oblique", "min_slices": 0, "b": "low", "not": {"ImagType": "x"}}],
        "dwi_b1000": {"Modality": "MR", "b": "all"},
        "pet": 3,
    }
    with pytest.raises(ConfigError) as caught:
        parse_mapping(bad, "mine.yaml")
    where = caught.value.where
    for text in (
        "ax_t2wi.SeriesDescripton: unknown key; did you mean SeriesDescription?",
        "ax_t2wi.plan: unknown key; did you mean plane?",
        "'../x': a stem is a file name",
        "adc[0].plane: one of axial, coronal, sagittal, got 'oblique'",
        "adc[0].min_slices: a whole number from 1, got 0",
        "adc[0].b: all, highest, or b-values",
        "adc[0].not.ImagType: unknown tag; did you mean ImageType?",
        "dwi_b1000.b: the stem names b = 1000, the rule asks for all",
        "pet: a rule is a mapping of tags to globs, got 3",
    ):
        assert text in where
    assert "mine.yaml" in caught.value.fix


def test_r14_yaml_tags_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text("ax: {Modality: !!python/object/apply:os.system ['touch /tmp/pwned']}\n")
    with pytest.raises(ConfigError, match="plain YAML"):
        read_mapping(str(path))
    with pytest.raises(ConfigError, match="no recipe"):
        read_mapping("defualt")


values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from(["ax_t2wi", "not", "plane", "b", "min_slices", "Modality", "sequences", "mappings"]) | st.text(
    max_size=8
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(keys, st.dictionaries(keys, values, max_size=3) | values, max_size=3))
def test_r21_any_mapping_parses_or_is_refused(data: dict[str, object]) -> None:
    with contextlib.suppress(ConfigError):
        for rule in parse_mapping(data, "m").rules:
            rule.matches(entry("t2"))


def test_stems_of_b_values() -> None:
    assert diffusion_stem("ax_dwi", 1000) == "ax_dwi_b1000"
    assert diffusion_stem("ax_dwi_b1000", 1000) == "ax_dwi_b1000"
