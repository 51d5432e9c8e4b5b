"""Phantoms of CT-PET: reproducible, and not to be solved by one threshold."""

from __future__ import annotations

import numpy as np
import pytest

from medssl_cli.data.phantom_ct_pet import CtPetSlice, draw_ct_pet, plan_ct_pet


@pytest.fixture(scope="module")
def cohort() -> dict[tuple[int, int], CtPetSlice]:
    return {(p.index, n): draw_ct_pet(p, n) for p in plan_ct_pet(40, 3) for n in p.slices}


def dice(prediction: np.ndarray, reference: np.ndarray) -> float:
    total = prediction.sum() + reference.sum()
    return 1.0 if total == 0 else 2 * (prediction & reference).sum() / total


def test_the_same_seed_gives_the_same_pixels_and_another_one_others() -> None:
    again, other = (draw_ct_pet(plan_ct_pet(2, seed)[1], 3) for seed in (5, 6))
    first = draw_ct_pet(plan_ct_pet(9, 5)[1], 3)
    assert all(np.array_equal(getattr(first, n), getattr(again, n)) for n in ("ct_HW", "pet_HW", "mask_HW"))
    assert not np.array_equal(first.pet_HW, other.pet_HW)


def test_masks_lie_where_ct_shows_soft_tissue_and_pet_takes_up_more_than_around(cohort: dict) -> None:
    with_tumour = [each for each in cohort.values() if (each.mask_HW > 0).sum() > 60]
    assert len(with_tumour) > 40
    warmer = [each.pet_HW[each.mask_HW > 0].mean() > each.pet_HW[each.mask_HW == 0].mean() for each in with_tumour]
    assert np.mean(warmer) == 1.0
    assert all(80 < np.median(each.ct_HW[each.mask_HW > 0]) < 160 for each in with_tumour)


def test_no_threshold_on_pet_finds_the_tumours_for_heart_and_kidneys_are_warm_too(cohort: dict) -> None:
    slices = [each for each in cohort.values() if each.mask_HW.any()]
    best = max(np.mean([dice(s.pet_HW >= level, s.mask_HW > 0) for s in slices]) for level in range(10, 200, 5))
    assert best < 0.6
    assert 0.3 < np.mean([each.mask_HW.any() for each in cohort.values()]) < 0.7


def test_a_slice_is_the_same_at_both_sizes_up_to_sampling() -> None:
    patient = next(p for p in plan_ct_pet(9, 3) if draw_ct_pet(p, 3).mask_HW.sum() > 100 * 255)
    small, full = (draw_ct_pet(patient, 3, size).mask_HW > 0 for size in ("small", "full"))
    assert small.mean() == pytest.approx(full.mean(), rel=0.1)
    assert full.shape == (512, 512)
