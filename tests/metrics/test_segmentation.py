import math

import numpy as np
import pytest

from medssl_cli.core.protocols import IGNORE_LABEL
from medssl_cli.metrics import segmentation as seg


def maps(shape: tuple[int, ...] = (9, 11, 13), classes: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    reference = rng.integers(0, classes, shape).astype(np.uint8)
    prediction = np.where(rng.random(shape) < 0.6, reference, rng.integers(0, classes, shape)).astype(np.uint8)
    return prediction, reference


def test_two_shifted_squares_by_hand() -> None:
    prediction, reference = np.zeros((10, 10), bool), np.zeros((10, 10), bool)
    reference[2:6, 2:6] = True  # 16 voxels
    prediction[2:6, 3:8] = True  # 20 voxels, 12 of them shared
    tp, fp, fn, tn = seg.counts(prediction, reference)
    assert (tp, fp, fn, tn) == (12, 8, 4, 76)
    assert seg.dice(tp, fp, fn) == pytest.approx(24 / 36)
    assert seg.iou(tp, fp, fn) == pytest.approx(12 / 24)
    assert seg.accuracy(tp, fp, fn, tn) == pytest.approx(0.88)
    assert seg.precision(tp, fp) == pytest.approx(12 / 20)
    assert seg.recall(tp, fn) == pytest.approx(12 / 16)
    assert seg.f1(tp, fp, fn) == pytest.approx(2 * 0.6 * 0.75 / 1.35)
    assert seg.volume_error_ml(fp, fn, 500.0) == pytest.approx(2.0)
    assert seg.relative_volume_error(tp, fp, fn) == pytest.approx(0.25)


def test_counts_equal_scikit_learn() -> None:
    from sklearn.metrics import confusion_matrix, f1_score, jaccard_score

    prediction, reference = maps()
    found = seg.confusion_matrix(prediction, reference, 4)
    assert np.array_equal(found, confusion_matrix(reference.ravel(), prediction.ravel(), labels=range(4)))
    tp, fp, fn, tn = seg.class_counts(prediction, reference, 4)
    flat = (reference.ravel(), prediction.ravel())
    assert seg.dice(tp, fp, fn) == pytest.approx(f1_score(*flat, average=None))
    assert seg.iou(tp, fp, fn) == pytest.approx(jaccard_score(*flat, average=None))
    for c in range(4):
        assert seg.counts(prediction == c, reference == c) == (tp[c], fp[c], fn[c], tn[c])


def test_dice_equals_monai() -> None:
    torch = pytest.importorskip("torch")
    monai = pytest.importorskip("monai.metrics")
    prediction, reference = maps(seed=3)
    tp, fp, fn, _ = seg.class_counts(prediction, reference, 4)
    one_hot = [
        torch.nn.functional.one_hot(torch.from_numpy(m).long(), 4).movedim(-1, 0)[None] for m in (prediction, reference)
    ]
    assert seg.dice(tp, fp, fn) == pytest.approx(monai.DiceMetric()(*one_hot).numpy()[0], abs=1e-6)


def test_a_large_map_is_counted_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    prediction, reference = maps(seed=5)
    reference[0, 0, :4] = IGNORE_LABEL
    whole = seg.confusion_matrix(prediction, reference, 4)
    monkeypatch.setattr(seg, "_BLOCK", 7)
    assert np.array_equal(seg.confusion_matrix(prediction, reference, 4), whole)


def test_ignored_voxels_count_nowhere() -> None:
    prediction, reference = maps(seed=1)
    ignored = np.random.default_rng(2).random(reference.shape) < 0.3
    marked = np.where(ignored, IGNORE_LABEL, reference).astype(np.uint8)
    kept = seg.class_counts(prediction[~ignored], reference[~ignored], 4)
    assert all(np.array_equal(a, b) for a, b in zip(seg.class_counts(prediction, marked, 4), kept, strict=True))
    binary = np.where(ignored, IGNORE_LABEL, reference > 1).astype(np.uint8)
    assert seg.counts(prediction > 1, binary) == seg.counts(prediction[~ignored] > 1, reference[~ignored] > 1)
    nothing = np.full((3, 3), IGNORE_LABEL, np.uint8)
    assert seg.counts(np.ones((3, 3), bool), nothing) == (0, 0, 0, 0)
    assert math.isnan(seg.accuracy(*seg.counts(np.ones((3, 3), bool), nothing)))


def test_c13_two_images_are_two_images_and_not_one_pool() -> None:
    large, pixel = np.zeros((64, 64), bool), np.zeros((64, 64), bool)
    large[:32] = True
    pixel[0, 0] = True
    missed = np.zeros((64, 64), bool)
    pairs = [seg.counts(large, large), seg.counts(missed, pixel)]
    values = seg.dice(*(np.array(kind) for kind in list(zip(*pairs, strict=True))[:3]))
    assert values.mean() == 0.5
    assert values.std(ddof=1) == pytest.approx(0.7071, abs=1e-4)


def test_c14_empty_masks_have_one_rule_everywhere() -> None:
    from medssl_cli.metrics.sweep import ThresholdSweep

    empty, dot = np.zeros((5, 5), bool), np.eye(5, dtype=bool)
    both = seg.counts(empty, empty)
    sweep = ThresholdSweep()
    sweep.add(np.zeros((5, 5), np.float32), empty, "empty")
    assert seg.dice(*both[:3]) == seg.iou(*both[:3]) == seg.f1(*both[:3]) == 1
    assert {row["dice"] for row in sweep.table()} == {row["iou"] for row in sweep.table()} == {1.0}
    for one in (seg.counts(dot, empty), seg.counts(empty, dot)):
        assert seg.dice(*one[:3]) == seg.iou(*one[:3]) == 0
    assert math.isnan(seg.precision(0, 0))
    assert math.isnan(seg.recall(0, 0))
    assert math.isnan(seg.relative_volume_error(0, 3, 0))
    assert seg.dice(np.array([0, 0, 2]), np.array([0, 1, 0]), np.array([0, 0, 0])).tolist() == [1, 0, 1]


def test_wrong_shapes_and_values_are_refused() -> None:
    with pytest.raises(ValueError, match=r"prediction \(2,\) and reference \(3,\)"):
        seg.counts(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match="prediction holds values 0 to 7 for 4 classes"):
        seg.class_counts(np.array([0, 7]), np.array([0, 1]), 4)
    with pytest.raises(ValueError, match="256 classes"):
        seg.confusion_matrix(np.zeros(2, int), np.zeros(2, int), 256)
