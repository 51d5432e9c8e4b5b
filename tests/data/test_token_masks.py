"""Block masks: how many crops, how large, which sequences; checked against a plain loop."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from medssl_cli.data.token_masks import block_masks, draw_token_masks, hidden_whole, no_masks


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def block_mask_by_loop(request: int, rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """One mask, one rectangle after another, one try after another."""
    mask = np.zeros((rows, columns), dtype=bool)
    while mask.sum() < request:
        limit = min(request - mask.sum(), rows * columns / 2)
        for _ in range(10):
            area = rng.uniform(min(4.0, limit), max(4.0, limit))
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (1 <= height <= rows and 1 <= width <= columns):
                continue
            top, left = rng.integers(rows - height + 1), rng.integers(columns - width + 1)
            new = (~mask[top : top + height, left : left + width]).sum()
            if 1 <= new <= limit:
                mask[top : top + height, left : left + width] = True
                break
        else:
            return mask
    return mask


@pytest.mark.parametrize(
    ("n_crops", "probability", "expected"), [(16, 0.5, 8), (7, 0.5, 3), (100, 0.29, 29), (4, 0, 0)]
)
def test_exactly_the_asked_share_of_crops_is_masked(n_crops: int, probability: float, expected: int) -> None:
    masks = draw_token_masks(n_crops, 1, (16, 16), rng(), sample_probability=probability, mode="shared")
    assert masks.flat().any(1).sum() == expected


@pytest.mark.parametrize("grid", [(16, 16), (7, 7), (4, 4), (8, 5)])
def test_never_above_the_request_and_hardly_below(grid: tuple[int, int]) -> None:
    requests = rng(1).integers(0, grid[0] * grid[1] // 2 + 1, size=3000)
    short = requests - block_masks(requests, grid, rng()).sum((1, 2))
    assert short.min() == 0
    assert (short <= 2).mean() > 0.998
    exact = block_masks(requests, grid, rng(), exact=True).sum((1, 2))
    np.testing.assert_array_equal(exact, requests)


def test_ratios_are_stratified_and_shuffled() -> None:
    masks = draw_token_masks(40, 1, (16, 16), rng(3), mode="shared", exact=True)
    counts = masks.blocks_CSN.sum((1, 2))
    asked = np.sort(counts[counts > 0])
    edges = 256 * np.linspace(0.1, 0.5, 21)
    assert np.all(asked >= np.floor(edges[:-1]))
    assert np.all(asked <= edges[1:])
    given = counts[counts > 0]
    assert not np.all(np.diff(given) >= 0)


def test_odd_grid_keeps_its_half_patch() -> None:
    """A 7 x 7 grid allows rectangles of 24 patches: a cap of 21 or 22 would forbid them."""
    masks = block_masks(np.full(3000, 24), (7, 7), rng())
    rows, columns = masks.any(2).sum(1), masks.any(1).sum(1)
    assert np.any((masks.sum((1, 2)) == 24) & (rows * columns == 24))  # one single rectangle of 4 x 6


def test_blocks_are_distributed_as_by_the_plain_loop() -> None:
    draws, request, grid = 1500, 77, (16, 16)
    ours = block_masks(np.full(draws, request), grid, rng(5))
    loop_rng = rng(6)
    theirs = np.stack([block_mask_by_loop(request, *grid, loop_rng) for _ in range(draws)])
    spread = math.sqrt(2 * 0.25 / draws)
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 5 * spread
    for measure in (lambda m: m.any(2).sum(1), lambda m: (m[:, 1:] != m[:, :-1]).sum((1, 2)), lambda m: m.sum((1, 2))):
        a, b = measure(ours).astype(float), measure(theirs).astype(float)
        assert abs(a.mean() - b.mean()) < 5 * math.sqrt((a.var() + b.var()) / draws)


def test_t05_full_sequence_hides_one_sequence_of_every_crop_and_the_others_alike() -> None:
    masks = draw_token_masks(400, 3, (16, 16), rng(7))
    tokens = masks.flat().reshape(400, 3, 256)
    full = tokens.all(2)
    np.testing.assert_array_equal(full.sum(1), 1)
    for crop in range(400):
        first, second = tokens[crop][~full[crop]]
        np.testing.assert_array_equal(first, second)
    assert np.all(np.bincount(full.argmax(1), minlength=3) > 100)


def test_t05_masked_share_of_full_sequence() -> None:
    share = np.concatenate([draw_token_masks(64, 3, (16, 16), rng(s)).flat().mean(1) for s in range(30)])
    assert share.min() == pytest.approx(1 / 3)
    assert share.mean() == pytest.approx(0.433, abs=0.004)
    assert share.max() <= 1 / 3 + 2 / 3 * 0.5


def test_shared_mask_is_the_same_for_all_sequences() -> None:
    tokens = draw_token_masks(20, 3, (8, 8), rng(), mode="shared").flat().reshape(20, 3, 64)
    np.testing.assert_array_equal(tokens, np.broadcast_to(tokens[:, :1], tokens.shape))
    assert tokens.any((1, 2)).sum() == 10


def test_independent_masks_differ_between_sequences_of_one_ratio() -> None:
    tokens = draw_token_masks(20, 3, (16, 16), rng(), mode="independent", exact=True).flat().reshape(20, 3, 256)
    masked = tokens[tokens.any((1, 2))]
    assert len(masked) == 10
    assert all(not np.array_equal(one[0], one[1]) for one in masked)
    np.testing.assert_array_equal(masked.sum(2), np.broadcast_to(masked[:, :1].sum(2), (10, 3)))


def test_full_sequence_of_a_single_sequence_leaves_something_to_see() -> None:
    masks = draw_token_masks(10, 1, (4, 4), rng())
    np.testing.assert_array_equal(masks.flat(), masks.blocks_CSN[:, 0])
    assert masks.flat().mean(1).max() <= 0.5


def test_hidden_whole_takes_the_nth_sequence_that_is_there() -> None:
    available = np.array([[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 0, 1], [1, 0, 1], [0, 1, 1], [0, 1, 0]], dtype=bool)
    pick = np.array([0.0, 1 / 3, np.nextafter(1, 0), 0.49, 0.5, 0.0, 0.7])
    expected = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 0, 1], [0, 1, 0], [0, 0, 0]]
    np.testing.assert_array_equal(hidden_whole(pick, available), np.array(expected, dtype=bool))
    every = np.ones((10, 10), dtype=bool) & (np.arange(10) <= np.arange(10)[:, None])
    highest = hidden_whole(np.full(10, np.nextafter(1, 0)), every)
    np.testing.assert_array_equal(highest, np.eye(10, dtype=bool) & (np.arange(10) > 0))


def test_flat_is_sequence_major() -> None:
    masks = draw_token_masks(6, 2, (3, 4), rng(1), mode="independent")
    np.testing.assert_array_equal(masks.flat()[:, :12], masks.blocks_CSN[:, 0])
    np.testing.assert_array_equal(masks.flat()[:, 12:], masks.blocks_CSN[:, 1])


def test_same_seed_same_masks() -> None:
    first, again, other = (draw_token_masks(16, 3, (8, 8), rng(s)).flat() for s in (4, 4, 5))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="got 'block'"):
        draw_token_masks(2, 1, (4, 4), rng(), mode="block")  # type: ignore[arg-type]


# --- a ratio for each image (iBOT) -----------------------------------------------------------------------------------


def image_mask_by_loop(rng: np.random.Generator, side: int = 14) -> np.ndarray:
    """One mask as the text of the method has it: pick a ratio, then rectangle after rectangle, ten tries for each."""
    ratio = (0.0, rng.uniform(0.1, 0.5))[rng.integers(2)]
    request, mask, smallest = ratio * side * side, np.zeros((side, side), dtype=bool), (side // 3) ** 2
    while mask.sum() < request:
        remaining = request - mask.sum()
        for _ in range(10):
            area = smallest + (remaining - smallest) * rng.random()
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (1 <= height <= side and 1 <= width <= side):
                continue
            top, left = rng.integers(side - height + 1), rng.integers(side - width + 1)
            new = (~mask[top : top + height, left : left + width]).sum()
            if 1 <= new <= remaining:
                mask[top : top + height, left : left + width] = True
                break
        else:
            return mask
    return mask


def per_image(n_crops: int, seed: int = 0, n_sequences: int = 1, **settings: Any) -> np.ndarray:
    settings = {"mode": "shared", **settings}
    return draw_token_masks(n_crops, n_sequences, (14, 14), rng(seed), sampling="per_image", **settings).flat()


def test_masks_for_each_image_have_the_published_shares() -> None:
    share = per_image(6000).mean(1)
    masked = share[share > 0]
    assert (share == 0).mean() == pytest.approx(0.503, abs=0.02)  # three standard deviations
    assert masked.mean() == pytest.approx(0.29, abs=0.01)
    assert 0.48 < masked.max() <= 0.4950
    empty = [(per_image(64, seed) == 0).all(1).sum() for seed in range(30)]
    assert np.std(empty) == pytest.approx(4, abs=1.6)  # a draw for each crop: binomial, not a fixed share


def test_masks_for_each_image_are_distributed_as_by_the_plain_loop() -> None:
    draws = 1200
    ours = per_image(draws, 5).reshape(-1, 14, 14)
    loop_rng = rng(6)
    theirs = np.stack([image_mask_by_loop(loop_rng) for _ in range(draws)])
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 5 * math.sqrt(2 * 0.25 / draws)
    for measure in (lambda m: m.any(2).sum(1), lambda m: (m[:, 1:] != m[:, :-1]).sum((1, 2)), lambda m: m.sum((1, 2))):
        a, b = measure(ours).astype(float), measure(theirs).astype(float)
        assert abs(a.mean() - b.mean()) < 5 * math.sqrt((a.var() + b.var()) / draws)


def test_single_patches_reach_the_requested_number_exactly() -> None:
    counts = per_image(500, pred_ratio=(0.3,), pred_ratio_var=(0.0,), shape="rand").sum(1)
    np.testing.assert_array_equal(counts, math.floor(0.3 * 196))
    spread = per_image(3000, pred_ratio=(0.3,), pred_ratio_var=(0.0,), shape="rand").mean(0)
    assert np.abs(spread - 58 / 196).max() < 5 * math.sqrt(0.25 / 3000)  # anywhere alike
    stratified = draw_token_masks(40, 1, (14, 14), rng(), mode="shared", shape="rand").flat().sum(1)
    assert (stratified > 0).sum() == 20


def test_exact_masks_of_an_image_hold_the_whole_number() -> None:
    counts = per_image(300, pred_ratio=(0.31,), pred_ratio_var=(0.0,), exact=True).sum(1)
    np.testing.assert_array_equal(counts, math.floor(0.31 * 196))


def test_ratios_for_each_image_go_with_every_mode() -> None:
    ratios: dict[str, Any] = {"pred_ratio": (0.2, 0.4), "pred_ratio_var": (0.0, 0.0), "exact": True}
    shared = per_image(60, n_sequences=3, **ratios).reshape(60, 3, 196)
    np.testing.assert_array_equal(shared, np.broadcast_to(shared[:, :1], shared.shape))
    assert set(shared.sum(2).flat) == {39, 78}
    own = per_image(60, n_sequences=3, mode="independent", **ratios).reshape(60, 3, 196)
    assert not any(np.array_equal(crop[0], crop[1]) for crop in own)
    np.testing.assert_array_equal(own.sum(2), np.broadcast_to(own[:, :1].sum(2), (60, 3)))  # one ratio for a crop
    whole = per_image(60, n_sequences=3, mode="full_sequence", **ratios).reshape(60, 3, 196)
    np.testing.assert_array_equal(whole.all(2).sum(1), 1)


def test_masks_that_hide_nothing_and_settings_that_mean_nothing() -> None:
    assert not no_masks(4, 3, (5, 5)).flat().any()
    assert no_masks(4, 3, (5, 5)).flat().shape == (4, 75)
    assert not per_image(20, pred_ratio=(0.0,), pred_ratio_var=(0.0,)).any()
    for settings in ({"pred_ratio": (0.1,)}, {"pred_ratio": (0.1, 0.1)}):
        with pytest.raises(ValueError, match="half widths"):
            per_image(4, **settings)
    with pytest.raises(ValueError, match="got 'ring'"):
        per_image(4, shape="ring")
    with pytest.raises(ValueError, match="got 'often'"):
        draw_token_masks(4, 1, (4, 4), rng(), sampling="often")  # type: ignore[arg-type]
