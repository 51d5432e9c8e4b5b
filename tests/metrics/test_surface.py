import math
import warnings

import numpy as np
import pytest

from medssl_cli.metrics import surface
from medssl_cli.metrics.surface import surface_distances


def masks(shape: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    first = gaussian_filter(rng.normal(size=shape), 1.2)
    second = first + 0.7 * gaussian_filter(rng.normal(size=shape), 1.2)
    return first > 0.8 * first.std(), second > 0.8 * second.std()


def by_loops(prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, ...]) -> list[float]:
    """Pooled distances from the definition, voxel by voxel."""

    def boundary(mask: np.ndarray) -> list[tuple[int, ...]]:
        found = []
        for place in zip(*np.nonzero(mask), strict=True):
            for axis in range(mask.ndim):
                for step in (-1, 1):
                    next_to = list(place)
                    next_to[axis] += step
                    inside = 0 <= next_to[axis] < mask.shape[axis]
                    if not inside or not mask[tuple(next_to)]:
                        found.append(place)
        return sorted(set(found))

    a, b = boundary(prediction), boundary(reference)
    far = [[math.dist(np.multiply(p, spacing), np.multiply(r, spacing)) for r in b] for p in a]
    return [min(row) for row in far] + [min(column) for column in zip(*far, strict=True)]


@pytest.mark.parametrize(
    ("shape", "spacing"), [((12, 14), (1.0, 1.0)), ((9, 15), (0.4, 2.5)), ((6, 9, 8), (3.0, 0.7, 0.9))]
)
def test_distances_equal_loops_from_the_definition(shape: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    for seed in range(3):
        prediction, reference = masks(shape, seed)
        pooled = by_loops(prediction, reference, spacing)
        found = surface_distances(prediction, reference, spacing)
        assert sorted(found.pooled) == pytest.approx(sorted(pooled), abs=1e-12)
        assert surface.hausdorff_95(prediction, reference, spacing) == pytest.approx(np.percentile(pooled, 95))
        assert surface.hausdorff_95(prediction, reference, spacing, percentile=100) == pytest.approx(max(pooled))
        assert surface.surface_distances(prediction, reference, spacing).mean() == pytest.approx(np.mean(pooled))
        within = np.mean(np.array(pooled) <= spacing[-1] + 1e-9)
        assert surface.surface_distances(prediction, reference, spacing).share_within(spacing[-1]) == pytest.approx(
            within
        )


def test_two_squares_by_hand() -> None:
    prediction, reference = np.zeros((12, 12), bool), np.zeros((12, 12), bool)
    reference[2:5, 2:5] = True  # 3 x 3: 8 boundary pixels
    prediction[2:5, 4:7] = True  # two columns to the right
    found = surface_distances(prediction, reference, (1.0, 0.5))
    # columns 5 and 6 lie 1 and 2 columns of 0.5 mm from column 4; column 4's centre is not on the prediction's boundary
    # at the middle row, but its left edge is: 0 there. By symmetry the other way.
    assert sorted(found.from_prediction) == [0, 0, 0, 0.5, 0.5, 1, 1, 1]
    assert sorted(found.from_reference) == [0, 0, 0, 0.5, 0.5, 1, 1, 1]
    assert found.mean() == pytest.approx(8 / 16)
    assert found.share_within(0.5) == pytest.approx(10 / 16)


def test_c15_a_hole_is_a_boundary() -> None:
    reference = np.zeros((61, 61), bool)
    reference[10:51, 10:51] = True
    prediction = reference.copy()
    prediction[20:41, 20:41] = False
    assert surface.hausdorff_95(prediction, reference, (1.0, 1.0)) > 5
    # the region version: every boundary voxel of the prediction lies in the reference
    assert reference[surface.boundary(prediction)].all()
    alone = surface.hausdorff_95(prediction[None], reference[None], (4.0, 1.0, 1.0))
    assert alone == surface.hausdorff_95(prediction, reference, (1.0, 1.0)), "one slice is a plane, not a slab"


def test_equal_masks_are_no_distance_apart() -> None:
    mask, _ = masks((8, 9, 10), 4)
    found = surface_distances(mask, mask, (2.0, 1.0, 1.0))
    assert found.percentile(100) == found.mean() == 0
    assert found.share_within(0) == 1


def test_the_bounding_box_changes_nothing() -> None:
    prediction, reference = masks((7, 10, 9), 2)
    wide = [np.pad(mask, ((5, 2), (0, 11), (30, 4))) for mask in (prediction, reference)]
    inner = [np.pad(mask, 1) for mask in (prediction, reference)]
    far, near = surface_distances(*wide, (3.0, 0.5, 0.7)), surface_distances(*inner, (3.0, 0.5, 0.7))
    assert far.pooled == pytest.approx(near.pooled, abs=1e-12)  # coordinates are larger: the last bits may differ
    whole = np.argwhere(surface.boundary(wide[0]))
    assert len(whole) == far.n_prediction


def test_distance_transforms_give_the_same_distances() -> None:
    from scipy.ndimage import distance_transform_edt

    prediction, reference = masks((20, 24, 22), 9)
    sizes = (2.2, 0.6, 0.8)
    found = surface_distances(prediction, reference, sizes)
    inner, outer = surface.boundary(prediction), surface.boundary(reference)
    assert found.from_prediction == pytest.approx(distance_transform_edt(~outer, sampling=sizes)[inner], abs=1e-12)
    assert found.from_reference == pytest.approx(distance_transform_edt(~inner, sampling=sizes)[outer], abs=1e-12)


def test_mean_distance_surface_dice_and_hausdorff_equal_monai() -> None:
    torch = pytest.importorskip("torch")
    monai = pytest.importorskip("monai.metrics")
    for shape, spacing in (((24, 30), (0.5, 1.5)), ((10, 18, 16), (3.0, 1.0, 1.0))):
        prediction, reference = masks(shape, 7)
        pair = [torch.from_numpy(mask)[None, None].float() for mask in (prediction, reference)]
        found = surface_distances(prediction, reference, spacing)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # monai warns of itself
            mean = monai.compute_average_surface_distance(
                *pair, include_background=True, symmetric=True, spacing=spacing
            )
            largest = monai.compute_hausdorff_distance(*pair, include_background=True, spacing=spacing)
            share = monai.compute_surface_dice(*pair, [1.0], include_background=True, spacing=spacing)
        assert found.mean() == pytest.approx(float(mean), abs=1e-4)
        assert found.percentile(100) == pytest.approx(float(largest), abs=1e-4)
        assert found.share_within(1.0) == pytest.approx(float(share), abs=1e-6)


def test_empty_masks_have_no_distance_and_a_stated_share() -> None:
    empty, dot = np.zeros((4, 5), bool), np.zeros((4, 5), bool)
    dot[2, 2] = True
    for pair in ((empty, dot), (dot, empty), (empty, empty)):
        assert math.isnan(surface.hausdorff_95(*pair, (1.0, 1.0)))
        assert math.isnan(surface.surface_distances(*pair, (1.0, 1.0)).mean())
    assert surface.surface_distances(empty, dot, (1.0, 1.0)).share_within(2) == 0
    assert surface.surface_distances(dot, empty, (1.0, 1.0)).share_within(2) == 0
    assert math.isnan(surface.surface_distances(empty, empty, (1.0, 1.0)).share_within(2))
    assert surface.diagonal((30, 40), (1.0, 1.0)) == 50
    assert surface.diagonal((1, 30, 40), (9.0, 2.0, 2.0)) == 100


def test_the_image_border_is_a_boundary() -> None:
    full = np.ones((5, 5), bool)
    ring = surface.boundary(full)
    assert ring.sum() == 16
    assert not ring[1:4, 1:4].any()
    assert surface.boundary(np.ones((3, 1), bool)).all()


def test_a_tolerance_is_met_in_spite_of_rounding() -> None:
    first, second = np.zeros((3, 40), bool), np.zeros((3, 40), bool)
    first[1, 1], second[1, 21] = True, True
    assert surface.surface_distances(first, second, (0.1, 0.1)).share_within(2.0) == 1


def test_grids_that_do_not_fit_are_refused() -> None:
    mask = np.ones((3, 4), bool)
    with pytest.raises(ValueError, match="differ in shape"):
        surface_distances(mask, mask[:2], (1.0, 1.0))
    for spacing in ((1.0,), (1.0, 0.0), (1.0, math.nan), (1.0, 1.0, 1.0)):
        with pytest.raises(ValueError, match="does not fit"):
            surface_distances(mask, mask, spacing)


def test_a_single_voxel_grid_works() -> None:
    assert surface.hausdorff_95(np.ones((1, 1, 1), bool), np.ones((1, 1, 1), bool), (1.0, 1.0, 1.0)) == 0
