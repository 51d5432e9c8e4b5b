from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from constructed import noise, run_infer, save, write_head

from medssl_cli.data.feature_store import ImageFacts
from medssl_cli.metrics.novelty import Novelty, NoveltyScore
from medssl_cli.services.quality import (
    INTENSITY_TOLERANCE,
    SLICES_TOLERANCE,
    SPACING_TOLERANCE,
    QualityFlag,
    quality_flags,
)

RANGES = {
    "spacing_z_mm": [3.0, 5.0],
    "spacing_y_mm": [0.5, 0.5],
    "spacing_x_mm": [0.5, 0.5],
    "slices": [20.0, 40.0],
    "ct_p01": [-1000.0, -900.0],
    "ct_p50": [0.0, 40.0],
    "ct_p99": [1000.0, 1400.0],
}
CARD: dict[str, Any] = {"ranges": RANGES, "sequences": ["ct"], "missing_in_training": {}}
FULL = np.ones(30, bool)


def facts(
    spacing: tuple[float, float, float] | None = (4.0, 0.5, 0.5),
    slices: int = 30,
    intensity: tuple[float, float, float] = (-950.0, 20.0, 1200.0),
    missing: tuple[str, ...] = (),
) -> ImageFacts:
    return ImageFacts(spacing, (slices, 64, 64), {"ct": intensity}, missing)


def codes(found: list[QualityFlag]) -> list[str]:
    return [flag.code for flag in found]


def flags_of(case: ImageFacts, card: dict[str, Any] = CARD, **more: Any) -> list[QualityFlag]:
    return quality_flags(case, card, **{"novelty": None, "filled_N": FULL, **more})


def test_a_case_like_the_training_set_is_said_to_be() -> None:
    assert codes(flags_of(facts())) == ["ok"]


@pytest.mark.parametrize(
    ("value", "is_odd"),
    [
        (5.0 * (1 + SPACING_TOLERANCE) - 1e-6, False),
        (5.0 * (1 + SPACING_TOLERANCE) + 1e-6, True),
        (3.0 * (1 - SPACING_TOLERANCE) + 1e-6, False),
        (3.0 * (1 - SPACING_TOLERANCE) - 1e-6, True),
    ],
)
def test_spacing_beyond_its_tolerance(value: float, is_odd: bool) -> None:
    found = flags_of(facts(spacing=(value, 0.5, 0.5)))
    assert ("spacing_outside" in codes(found)) == is_odd
    if is_odd:
        assert "3 to 5 mm" in found[0].text
        assert f"z: {value:.3g} mm" in found[0].text


@pytest.mark.parametrize(("count", "is_odd"), [(50, False), (51, True), (15, False), (14, True)])
def test_slices_beyond_their_tolerance(count: int, is_odd: bool) -> None:
    assert SLICES_TOLERANCE == 0.25
    assert ("slices_outside" in codes(flags_of(facts(slices=count)))) == is_odd


def test_intensities_beyond_their_tolerance() -> None:
    most = 1400 + INTENSITY_TOLERANCE * 400
    assert codes(flags_of(facts(intensity=(-950, 20, most)))) == ["ok"]
    (flag,) = flags_of(facts(intensity=(-950, 20, most + 1)))
    assert flag.code == "intensity_outside"
    assert "99th percentile 1601, in training 1000 to 1400" in flag.text
    (flag,) = flags_of(facts(intensity=(0, 500, 3000)))  # 12 bits from 0: no HU
    assert flag.text.count("percentile") == 3
    assert flag.text.startswith("1st percentile 0, ")


def test_an_embedding_outside_the_training_set() -> None:
    rows = np.random.default_rng(0).standard_normal((60, 8))
    rows[:, 0] += 20
    novelty = Novelty.fit(rows, [str(n) for n in range(60)])
    assert codes(flags_of(facts(), novelty=novelty.score(rows[0]))) == ["ok"]
    score = novelty.score(-rows[0])
    assert score.is_outside
    (flag,) = flags_of(facts(), novelty=score)
    assert (flag.kind, flag.code) == ("warning", "embedding_outside")
    assert f"{score.percentile:.1%}" in flag.text
    assert f"{score.limit:.3f}" in flag.text
    unknown = NoveltyScore(0.3, float("nan"), float("nan"), None)  # training rows of one patient
    assert codes(flags_of(facts(), novelty=unknown)) == ["ok"]


def test_a_missing_sequence_weighs_more_if_training_never_lacked_it() -> None:
    (flag,) = flags_of(facts(missing=("adc",)))
    assert (flag.kind, flag.code) == ("warning", "sequence_missing_new")
    found = flags_of(facts(missing=("adc",)), {**CARD, "missing_in_training": {"adc": 3}})
    assert [(flag.kind, flag.code) for flag in found] == [("info", "sequence_missing"), ("ok", "ok")]


def test_guesses_and_padding_are_told() -> None:
    several = {**CARD, "sequences": ["ct", "pet"]}
    assert (flags_of(facts(), several, guessed="ct")[0].kind, flags_of(facts(), guessed="ct")[0].kind) == (
        "warning",
        "info",
    )
    filled = FULL.copy()
    filled[:4] = False
    flag = flags_of(facts(), filled_N=filled)[0]
    assert flag.code == "padding"
    assert "4 slices of 30" in flag.text


def test_without_a_record_nothing_is_claimed() -> None:
    (flag,) = quality_flags(facts(), {"ranges": {}}, novelty=None, filled_N=FULL)
    assert (flag.kind, flag.code) == ("info", "unknown")


def test_the_weightiest_comes_first() -> None:
    filled = FULL.copy()
    filled[0] = False
    found = flags_of(facts(slices=99, missing=("adc",)), filled_N=filled)
    assert [flag.kind for flag in found] == ["warning", "warning", "info"]


def test_flags_reach_summary_lines_and_report(tmp_path: Path, write_run: Any) -> None:
    run = write_run(tmp_path / "run", ("ax_t2wi", "ax_adc"))
    rows = np.random.default_rng(0).standard_normal((40, 32)).astype(np.float32) * 1e-3 + 5
    head = write_head(
        tmp_path / "head",
        run,
        ranges={"slices": [50, 60], "spacing_z_mm": [1, 1]},
        sequences=["ax_t2wi", "ax_adc"],
        novelty=Novelty.fit(rows, [str(n) for n in range(40)]),
    )
    (summary,) = run_infer(tmp_path / "out", head, save(tmp_path / "scan.nii.gz", noise()))
    found = {flag["code"] for flag in summary["flags"]}
    assert found >= {"sequence_guessed", "slices_outside", "spacing_outside", "embedding_outside"}
    assert "sequence_missing_new" in found
    assert all(set(flag) == {"kind", "title", "text", "code"} for flag in summary["flags"])
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    for title in ("Taken as ax_t2wi", "Unusual number of slices", "Unlike the training cases"):
        assert title in page
