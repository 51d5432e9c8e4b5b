"""The pointing game, by hand-worked maps."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy import stats

from medssl_cli.core.volume import Volume
from medssl_cli.data.phantom_head import KINDS

FILE = Path(__file__).resolve().parents[1] / "scripts" / "benchmarks" / "pointing.py"


@pytest.fixture(scope="module")
def pointing() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pointing", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_peak_and_heat_are_those_of_the_head(pointing: ModuleType) -> None:
    """Ten voxels of which the last two are air: heat there counts for nothing, however hot."""
    head = np.array([[[True] * 8 + [False] * 2]])
    near = np.array([[[False, True, True] + [False] * 7]])
    heatmap = np.array([[[1, 3, 2, 0, 0, 2, 0, 0, 9, 9]]], float)
    assert pointing.score_case(heatmap, near, head) == (True, 5 / 8, 2 / 8)
    heatmap[0, 0, 5] = 4
    assert pointing.score_case(heatmap, near, head) == (False, 5 / 10, 2 / 8)


def test_an_empty_map_points_at_nothing(pointing: ModuleType) -> None:
    everywhere = np.ones((1, 2, 2), bool)
    assert pointing.score_case(np.zeros((1, 2, 2)), everywhere, everywhere) == (False, 0.0, 1.0)


def test_tolerance_is_in_mm_and_of_the_kind_asked_for(pointing: ModuleType) -> None:
    values = np.zeros((1, 1, 12), np.uint8)
    values[0, 0, 2] = 1 + KINDS.index("subdural")
    values[0, 0, 9] = 1 + KINDS.index("epidural")
    mask = Volume(values, np.diag([4.0, 4.0, 5.0, 1.0]))
    assert list(np.nonzero(pointing.near(mask, "label_subdural")[0, 0])[0]) == [0, 1, 2, 3, 4]
    assert pointing.near(mask, "label_any").sum() == 10
    assert not pointing.near(mask, "label_intraventricular").any()


@pytest.mark.parametrize(("hits", "n"), [(0, 30), (25, 30), (30, 30)])
def test_wilson_interval_is_that_of_scipy(pointing: ModuleType, hits: int, n: int) -> None:
    known = stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert pointing.wilson(hits, n) == pytest.approx((known.low, known.high), abs=1e-6)
