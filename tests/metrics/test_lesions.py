import math
import time

import numpy as np
import pytest

from medssl_cli.metrics import lesions
from medssl_cli.metrics.lesions import CaseLesions, LesionScores, lesion_candidates, match


def one(scores: LesionScores) -> dict[str, float]:
    values = scores.values(np.ones((1, len(scores.n_lesions_N))))
    return {name: float(value[0]) for name, value in values.items()}


def row(*boxes: tuple[int, int, float], n: int = 40) -> np.ndarray:
    """A line of pixels, (1, n), with boxes (start, end, value)."""
    line = np.zeros((1, n))
    for start, end, value in boxes:
        line[0, start:end] = value
    return line


def judged(prediction: np.ndarray, reference: np.ndarray, **options: float) -> CaseLesions:
    return match(lesion_candidates(prediction), reference > 0, **options)


def test_candidates_hang_together_at_corners_in_a_plane_and_in_space() -> None:
    plane = np.zeros((4, 4))
    plane[0, 0], plane[1, 1], plane[3, 3] = 0.2, 0.9, 0.4
    found = lesion_candidates(plane)
    assert found.confidences_K.tolist() == [0.9, 0.4]
    assert found.voxels_K.tolist() == [2, 1]
    space = np.zeros((3, 3, 3))
    space[0, 0, 0], space[1, 1, 1], space[2, 2, 2] = 0.3, 0.1, 0.2
    assert lesion_candidates(space).confidences_K.tolist() == [0.3]
    assert lesion_candidates(space, 0.2).confidences_K.tolist() == [0.3, 0.2]
    small = lesion_candidates(plane, min_voxels=2)
    assert small.confidences_K.tolist() == [0.9]
    assert small.regions.tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert lesion_candidates(plane > 0).confidences_K.tolist() == [1, 1]
    assert not len(lesion_candidates(np.zeros((3, 3))).confidences_K)


def test_a_lesion_is_found_from_an_overlap_of_a_tenth_on() -> None:
    reference = row((0, 10, 1))
    exact = judged(row((9, 10, 0.7)), reference)  # 1 / 10
    assert (exact.n_found, exact.n_false) == (1, 0)
    assert exact.overlap_M.tolist() == [0.1]
    less = judged(row((9, 11, 0.7)), reference)  # 1 / 11
    assert (less.n_lesions, less.n_found, less.n_false) == (1, 0, 1)
    assert judged(row((9, 11, 0.7)), reference, min_iou=0.05).n_found == 1


def test_one_candidate_finds_one_lesion_and_a_second_one_on_it_counts_nowhere() -> None:
    two_lesions = judged(row((0, 11, 0.8)), row((0, 5, 1), (6, 11, 1)))
    assert (two_lesions.n_lesions, two_lesions.n_found, two_lesions.n_false) == (2, 1, 0)
    assert sorted(two_lesions.confidence_M) == [0, 0.8]
    two_candidates = judged(row((0, 3, 0.9), (4, 10, 0.4)), row((0, 10, 1)))
    assert (two_candidates.n_found, two_candidates.n_false, two_candidates.n_unjudged) == (1, 0, 1)
    assert two_candidates.confidence_M.tolist() == [0.4], "the larger overlap finds it"
    assert two_candidates.score == 0.9


def test_most_lesions_are_found_before_the_overlap_is_largest() -> None:
    # candidate A overlaps lesion 1 by 6/9 and lesion 2 by 3/12 (1 is A's best); candidate B overlaps lesion 1 alone
    iou = np.array([[0.9, 0.15], [0.12, 0.0]])
    chosen = lesions._assigned(iou, iou >= 0.1)
    assert list(zip(*chosen, strict=True)) == [(0, 1), (1, 0)]


def test_four_cases_by_hand() -> None:
    found = judged(row((0, 10, 0.9), (20, 22, 0.6)), row((0, 10, 1), (30, 34, 1)))  # a hit, a false alarm, a miss
    lower = judged(row((0, 10, 0.5)), row((0, 8, 1)))
    alarm = judged(row((5, 9, 0.7)), row())
    quiet = judged(row(), row())
    scores = LesionScores([found, lower, alarm, quiet])
    # thresholds: .9 TP, .7 FP, .6 FP, .5 TP of 3 lesions
    values = one(scores)
    assert values["average_precision"] == pytest.approx(1 / 3 * 1 + 1 / 3 * 2 / 4)
    assert values["auroc"] == pytest.approx(3 / 4)  # (.9, .5) against (.7, 0)
    assert values["ranking_score"] == pytest.approx((0.5 + 0.75) / 2)
    assert values["sensitivity"] == pytest.approx(2 / 3)
    assert values["precision"] == pytest.approx(2 / 4)
    assert values["false_positives_per_case"] == pytest.approx(2 / 4)
    froc = [values[f"sensitivity_at_{rate:g}_fp"] for rate in lesions.FP_RATES]
    assert froc == pytest.approx([1 / 3, 1 / 3, 2 / 3, 2 / 3, 2 / 3, 2 / 3, 2 / 3])
    points = [(0.9, 0, 1 / 3), (0.7, 0.25, 1 / 3), (0.6, 0.5, 1 / 3), (0.5, 0.5, 2 / 3)]
    assert [pytest.approx(point) for point in points] == scores.froc()


def random_cases(n: int, seed: int = 0) -> list[CaseLesions]:
    rng = np.random.default_rng(seed)
    cases = []
    for _ in range(n):
        reference = np.zeros((30, 30))
        for _ in range(rng.integers(0, 3)):
            y, x = rng.integers(0, 26, 2)
            reference[y : y + 4, x : x + 4] = 1
        prediction = np.zeros((30, 30))
        for y, x in [*np.argwhere(reference)[:1], *rng.integers(0, 26, (rng.integers(0, 4), 2))]:
            prediction[y : y + 3, x : x + 3] = np.round(rng.random(), 1) + 0.05
        cases.append(judged(prediction, reference))
    return cases


def test_precision_and_areas_equal_scikit_learn() -> None:
    from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

    cases = random_cases(40)
    values = one(LesionScores(cases))
    is_lesion = np.concatenate([case.is_lesion_M for case in cases])
    confidence = np.concatenate([case.confidence_M for case in cases])
    precision, recall, thresholds = precision_recall_curve(is_lesion, confidence)
    precision[:-1][thresholds == 0] = 0
    assert values["average_precision"] == pytest.approx(-np.sum(np.diff(recall) * precision[:-1]))
    assert values["average_precision"] < average_precision_score(is_lesion, confidence), "there are misses"
    truth = [case.n_lesions > 0 for case in cases]
    assert values["auroc"] == pytest.approx(roc_auc_score(truth, [case.score for case in cases]))


def test_weights_are_repetitions() -> None:
    cases = random_cases(12, seed=3)
    times = np.random.default_rng(1).integers(0, 3, 12)
    repeated = one(LesionScores([case for case, n in zip(cases, times, strict=True) for _ in range(n)]))
    weighted = LesionScores(cases).values(np.stack([times, np.ones(12)]).astype(float))
    assert {name: value[0] for name, value in weighted.items()} == pytest.approx(repeated)


def test_blocks_of_draws_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = LesionScores(random_cases(10, seed=5))
    weights = np.random.default_rng(0).integers(0, 3, (7, 10)).astype(float)
    whole = scores.values(weights)
    monkeypatch.setattr(lesions, "_CELLS", 1)
    assert all(np.array_equal(whole[name], values, equal_nan=True) for name, values in scores.values(weights).items())


def test_what_is_not_defined_is_nan() -> None:
    without = one(LesionScores([judged(row((0, 3, 0.5)), row()), judged(row(), row())]))
    assert without["false_positives_per_case"] == 0.5
    for name in ("average_precision", "auroc", "ranking_score", "sensitivity", "sensitivity_at_1_fp"):
        assert math.isnan(without[name])
    nothing = one(LesionScores([judged(row(), row((0, 3, 1)))]))
    assert nothing["average_precision"] == nothing["sensitivity"] == nothing["sensitivity_at_8_fp"] == 0
    assert math.isnan(nothing["precision"])
    assert LesionScores([judged(row(), row())]).froc() == []


def test_many_regions_take_one_pass() -> None:
    rng = np.random.default_rng(0)
    noise = np.where(rng.random((64, 128, 128)) < 0.02, rng.random((64, 128, 128)), 0)
    start = time.perf_counter()
    found = lesion_candidates(noise)
    case = match(found, noise > 0.99)
    assert len(found.confidences_K) > 5000
    assert case.n_lesions > 100
    assert time.perf_counter() - start < 5, "a pass for each region would take minutes"


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="not negative"):
        lesion_candidates(np.array([[-0.1]]))
    with pytest.raises(ValueError, match="finite"):
        lesion_candidates(np.array([[math.nan]]))
    with pytest.raises(ValueError, match="differ in shape"):
        match(lesion_candidates(row()), np.zeros((2, 2), bool))
