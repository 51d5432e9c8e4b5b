"""Head CT phantoms: tissues at their HU, bleeds where their names say, and nothing else that tells of a label."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from scipy import ndimage

from medssl_cli.data.phantom_head import KINDS, Head, Place, draw_bleed
from medssl_cli.data.phantom_head_ct import (
    LABELS,
    MIN_BLEED_MM2,
    HeadCtImages,
    HeadCtSeries,
    HeadCtStudy,
    draw_head_ct,
    plan_head_ct,
    without_bleeds,
)

SEED = 4


def hounsfield(images: HeadCtImages, series: HeadCtSeries) -> np.ndarray:
    """(Z, Y, X) HU in RAS order."""
    return images.stored.reoriented("RAS").array * series.slope + series.inter


def with_kind(kind: str) -> HeadCtStudy:
    return HeadCtStudy(SEED, 0, 0, (kind,), "ge")


@pytest.fixture(scope="module")
def healthy() -> tuple[HeadCtSeries, HeadCtImages]:
    study = HeadCtStudy(SEED, 0, 0, (), "ge")
    return study.series[0], draw_head_ct(study, study.series[0])


@pytest.fixture(scope="module")
def bleeding() -> dict[str, HeadCtImages]:
    """The same head with each kind of bleed alone."""
    return {kind: draw_head_ct(with_kind(kind), with_kind(kind).series[0]) for kind in KINDS}


@pytest.fixture(scope="module")
def place() -> Place:
    """Distances of the same head on a grid of its own, 2 mm isotropic."""
    to_head = np.diag([2.0, 2.0, 2.0, 1.0])
    to_head[:3, 3] = (-96, -110, -60)
    return Place(Head.draw(SEED, 0), to_head, (74, 110, 96), 2.0)


def test_tissues_have_their_hounsfield_units(healthy: tuple[HeadCtSeries, HeadCtImages]) -> None:
    series, images = healthy
    hu = hounsfield(images, series)
    core = ndimage.binary_erosion((hu > 15) & (hu < 60), iterations=2)
    assert 28 < np.median(hu[core]) < 40  # grey and white matter
    assert 900 < np.percentile(hu[hu > 300], 95) < 1400  # the tables of the skull
    middle = hu[hu.shape[0] // 2]
    assert (np.abs(middle[:8, :8] + 1000) < 40).mean() > 0.5 or series.padding_hu is not None
    assert images.stored.array.dtype == np.int16


def test_noise_is_a_few_units(healthy: tuple[HeadCtSeries, HeadCtImages]) -> None:
    hu = hounsfield(healthy[1], healthy[0])
    core = ndimage.binary_erosion((hu > 15) & (hu < 60), iterations=3)
    step = np.diff(hu, axis=2)[core[..., 1:] & core[..., :-1]]
    assert 2.5 < 1.4826 * np.median(np.abs(step)) / np.sqrt(2) < 6.5


def test_blood_is_as_dense_as_fresh_blood(bleeding: dict[str, HeadCtImages]) -> None:
    series = with_kind(KINDS[0]).series[0]
    for value, kind in enumerate(KINDS, start=1):
        images = bleeding[kind]
        hu, mask = hounsfield(images, series), images.mask.reoriented("RAS").array
        assert set(np.unique(mask)) == {0, value}
        inner = ndimage.binary_erosion(mask > 0, np.ones((1, 2, 2)))
        dense = hu[inner if inner.sum() >= 10 else mask > 0]
        assert (45 if kind == "subarachnoid" else 52) < np.median(dense) < 85, kind


def test_each_kind_has_its_own_shape(place: Place) -> None:
    """Epidural bulges inwards and is short, subdural is long and thin, the others lie where their names say."""
    for seed in range(6):
        blood = {kind: draw_bleed(kind, place.head, np.random.default_rng(seed)).distance(place) < 0 for kind in KINDS}
        assert all(region.any() for region in blood.values())
        depth = -place.inside_skull
        for kind in ("epidural", "subdural"):
            assert (depth[blood[kind]] > 0).all()
            assert np.percentile(depth[blood[kind]], 5) < 3.5  # begins at the bone
        assert np.ptp(np.argwhere(blood["subdural"])[:, 1]) > np.ptp(np.argwhere(blood["epidural"])[:, 1])
        assert (place.subarachnoid[blood["subarachnoid"]] < 1.7).all()
        assert (place.ventricles[blood["intraventricular"]] < 0).all()
        assert (place.brain[blood["intraparenchymal"]] < -2).all()
        sides = [np.sign(place.position_3ZYX[0][blood[kind]]) for kind in ("epidural", "subdural")]
        assert all(abs(side.mean()) > 0.7 for side in sides)  # on one side of the head


def test_oedema_lies_around_a_clot(
    bleeding: dict[str, HeadCtImages], healthy: tuple[HeadCtSeries, HeadCtImages]
) -> None:
    series, images = healthy
    kind = "intraparenchymal"
    change = hounsfield(bleeding[kind], series) - hounsfield(images, series)
    mask = bleeding[kind].mask.reoriented("RAS").array > 0
    rim = ndimage.binary_dilation(mask, np.ones((1, 5, 5))) & ~ndimage.binary_dilation(mask, np.ones((1, 3, 3)))
    assert np.percentile(change[rim], 25) < -3
    assert np.median(change[mask]) > 15


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_the_bleed_tells_of_it(
    kind: str, bleeding: dict[str, HeadCtImages], healthy: tuple[HeadCtSeries, HeadCtImages]
) -> None:
    """The same study without its bleed has the same voxels, to the last bit, wherever neither blood nor oedema is."""
    series, images = healthy
    assert without_bleeds(with_kind(kind)).series == (series,)
    changed = bleeding[kind].stored.array != images.stored.array
    reach_mm = 22.0  # voxels too little filled for the mask, the rim of oedema and the kernel around it
    mask = bleeding[kind].mask
    far = ndimage.distance_transform_edt(mask.array == 0, sampling=mask.spacing) > reach_mm
    assert changed.any()
    assert not (changed & far).any()
    np.testing.assert_array_equal(bleeding[kind].stored.affine, images.stored.affine)


def test_storage_scanner_and_patient_are_drawn_without_the_label() -> None:
    """Each vendor sees bleeds and healthy heads in the same proportion, in every ten studies as nearly as it goes."""
    studies = plan_head_ct(600, 1)
    assert np.mean([study.label for study in studies]) == 0.6
    for vendor in ("ge", "philips", "siemens"):
        mine = [study.label for study in studies if study.vendor == vendor]
        assert abs(np.mean(mine) - 0.6) < 0.06
    for fact in ("orientation", "slope", "padding_hu"):
        for value in {getattr(study.series[0], fact) for study in studies}:
            mine = [study.label for study in studies if getattr(study.series[0], fact) == value]
            assert abs(np.mean(mine) - 0.6) < 3.5 * np.sqrt(0.24 / len(mine)), (fact, value)
    two = [study.label for study in studies if len(study.series) == 2]
    assert abs(np.mean(two) - 0.6) < 3.5 * np.sqrt(0.24 / len(two))


def test_kinds_occur_alike_and_together() -> None:
    studies = plan_head_ct(200, 7)
    counts = Counter(kind for study in studies for kind in study.kinds)
    assert set(counts) == set(KINDS)
    assert min(counts.values()) >= 34  # a good fifth each, less three standard errors
    assert max(counts.values()) <= 64
    assert sum(len(study.kinds) > 1 for study in studies) > 60
    assert len({study.patient_id for study in studies}) == 180


def test_few_heads_have_what_looks_like_a_bleed_or_its_oedema() -> None:
    heads = [Head.draw(8, patient) for patient in range(400)]
    assert 0.05 < np.mean([bool(head.calcified) for head in heads]) < 0.2
    assert 0.04 < np.mean([head.infarct is not None for head in heads]) < 0.16


def test_study_depends_on_seed_and_index_alone() -> None:
    assert plan_head_ct(25, 3)[:7] == plan_head_ct(7, 3)
    assert plan_head_ct(25, 3) != plan_head_ct(25, 4)
    two = next(study for study in plan_head_ct(10, 3) if len(study.series) == 2)
    first, second = (draw_head_ct(two, series) for series in two.series)
    assert first.labels == second.labels
    assert first.stored.array.shape != second.stored.array.shape or (first.stored.array != second.stored.array).any()
    np.testing.assert_array_equal(draw_head_ct(two, two.series[0]).stored.array, first.stored.array)


def test_slice_labels_follow_the_mask_from_the_feet_to_the_head(bleeding: dict[str, HeadCtImages]) -> None:
    for value, kind in enumerate(KINDS, start=1):
        mask = bleeding[kind].mask.reoriented("RAS")
        area = (mask.array == value).sum((1, 2)) * mask.spacing.y * mask.spacing.x
        np.testing.assert_array_equal(bleeding[kind].labels_N6[:, value], area >= MIN_BLEED_MM2)
        np.testing.assert_array_equal(bleeding[kind].labels_N6[:, 0], bleeding[kind].labels_N6[:, 1:].max(1))
        assert bleeding[kind].labels == tuple(int(name in ("any", kind)) for name in LABELS)


def test_head_lies_as_the_affine_says(healthy: tuple[HeadCtSeries, HeadCtImages]) -> None:
    """Read as RAS the sinuses, which are air, lie in front and below, and the vertex is above."""
    series, images = healthy
    hu = hounsfield(images, series)
    head = ndimage.binary_fill_holes(hu > -300)
    air = head & (hu < -600)
    z, y, _ = (axis.mean() for axis in np.nonzero(air))
    centre = [axis.mean() for axis in np.nonzero(head)]
    assert y > centre[1] + 5
    assert z < centre[0] - 3
    area = head.sum((1, 2))
    assert area[-1] < 0.4 * area.max() < area[2]


@pytest.mark.slow
def test_every_planned_bleed_can_be_seen() -> None:
    for study in plan_head_ct(40, 11):
        images = draw_head_ct(study, study.series[0])
        assert images.labels == (study.label, *(int(kind in study.kinds) for kind in KINDS)), study


@pytest.mark.slow
def test_what_is_not_blood_does_not_tell() -> None:
    """Leave-one-out k-NN on bone, air, position and storage of 80 studies: near chance."""
    from sklearn.metrics import roc_auc_score
    from sklearn.neighbors import KNeighborsClassifier

    studies = plan_head_ct(80, 5)
    rows = []
    for study in studies:
        series = study.series[0]
        hu = hounsfield(draw_head_ct(study, series), series)
        bone, air = hu > 300, hu < -300
        where = [axis.mean() for axis in np.nonzero(bone)]
        rows.append([bone.mean(), air.mean(), hu[bone].mean(), hu[air].mean(), hu[air].std(), *where, *hu.shape])
    x = np.array(rows)
    x = (x - x.mean(0)) / x.std(0)
    y = np.array([study.label for study in studies])
    groups = np.array([study.patient for study in studies])
    scores = np.zeros(len(y))
    for i in range(len(y)):
        others = groups != groups[i]
        model = KNeighborsClassifier(15).fit(x[others], y[others])
        scores[i] = model.predict_proba(x[i : i + 1])[0, 1]
    assert 0.3 < roc_auc_score(y, scores) < 0.7  # three standard errors of 48 and 32 studies around .5
