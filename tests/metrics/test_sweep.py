import numpy as np
import pytest

from medssl_cli.core.protocols import IGNORE_LABEL
from medssl_cli.metrics.segmentation import counts, dice, iou
from medssl_cli.metrics.sweep import THRESHOLDS, ThresholdSweep


def images(n: int = 6, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        reference = (rng.random((13, 17)) < 0.3).astype(np.uint8)
        reference[rng.random((13, 17)) < 0.1] = IGNORE_LABEL
        found.append((np.clip(0.4 * (reference == 1) + 0.6 * rng.random((13, 17)), 0, 1).astype(np.float32), reference))
    return found


def test_the_thresholds_are_those_of_the_method() -> None:
    assert THRESHOLDS == (0.20, 0.25, 0.30, 0.35, 0.40, 0.45, 0.50, 0.55, 0.60)


def test_the_sweep_equals_nine_evaluations_of_kept_maps() -> None:
    sweep, pairs = ThresholdSweep(), images()
    for n, (probability, reference) in enumerate(pairs):
        sweep.add(probability, reference, f"image {n}")
    for row in sweep.table():
        found = [counts(probability >= row["threshold"], reference) for probability, reference in pairs]
        assert row["dice"] == pytest.approx(np.mean([dice(*c[:3]) for c in found]))
        assert row["iou"] == pytest.approx(np.mean([iou(*c[:3]) for c in found]))
        assert row["n"] == 6
    best, value = sweep.best()
    assert value == max(row["dice"] for row in sweep.table())
    assert [row["dice"] for row in sweep.table() if row["threshold"] == best] == [value]


def test_a_value_on_a_threshold_counts_as_predicted_in_every_precision() -> None:
    for kind in (np.float16, np.float32, np.float64):
        sweep = ThresholdSweep()
        probability = np.array(THRESHOLDS, dtype=kind)
        sweep.add(probability, np.ones(9, bool), "edges")
        assert sweep.counts().tp[0].tolist() == [int((probability >= t).sum()) for t in THRESHOLDS]
        assert sweep.counts().tp[0].tolist() == [9, 8, 7, 6, 5, 4, 3, 2, 1]


def test_slices_of_a_case_are_one_case() -> None:
    (first, first_reference), (second, second_reference) = images(2)
    apart, whole = ThresholdSweep(), ThresholdSweep()
    apart.add(first, first_reference, "case")
    apart.add(second, second_reference, "case")
    whole.add(np.stack([first, second]), np.stack([first_reference, second_reference]), "case")
    assert len(apart) == 1
    assert apart.table() == whole.table()


def test_equal_means_take_the_middle_threshold() -> None:
    sweep = ThresholdSweep()
    sweep.add(np.array([0.95, 0.05]), np.array([1, 0]), "sure")
    assert sweep.best() == (0.5, 1.0)
    low = ThresholdSweep((0.4, 0.6))
    low.add(np.array([0.95, 0.05]), np.array([1, 0]), "sure")
    assert low.best() == (0.4, 1.0)


def test_what_is_kept_does_not_grow_with_the_image() -> None:
    small, large = ThresholdSweep(), ThresholdSweep()
    small.add(np.zeros((2, 2), np.float32), np.zeros((2, 2), bool), "a")
    large.add(np.zeros((500, 500), np.float32), np.zeros((500, 500), bool), "a")
    size = [sum(array.nbytes for array in sweep._counts.values()) for sweep in (small, large)]
    assert size[0] == size[1] == 3 * 9 * 8


def test_bad_input_is_refused() -> None:
    sweep = ThresholdSweep()
    with pytest.raises(ValueError, match="no image"):
        sweep.best()
    assert [row["dice"] for row in sweep.table()] == [None] * 9
    with pytest.raises(ValueError, match="differ in shape"):
        sweep.add(np.zeros(3), np.zeros(4), "a")
    with pytest.raises(ValueError, match="not finite"):
        sweep.add(np.array([np.nan]), np.zeros(1), "a")
    with pytest.raises(ValueError, match="do not rise"):
        ThresholdSweep((0.5, 0.2))


def test_images_without_foreground_count_only_where_there_are_no_others() -> None:
    low, high = np.full((2, 2), 0.1), np.full((2, 2), 0.45)
    something, nothing = np.ones((2, 2), bool), np.zeros((2, 2), bool)
    every, present = ThresholdSweep(), ThresholdSweep(present_only=True)
    for sweep in (every, present):
        sweep.add(high, something, "lesion")
        for n in range(3):
            sweep.add(high, nothing, f"none {n}")
    assert every.best() == (0.5, 0.75)  # nothing predicted anywhere
    assert present.best() == (0.45, 1.0)
    assert [row["n"] for row in present.table()] == [1] * 9
    alone = ThresholdSweep(present_only=True)
    alone.add(low, nothing, "none")
    assert (alone.best(), len(alone)) == ((0.5, 1.0), 1)
