"""Which patch tokens of the global crops are hidden from the student: block masks in the manner of BEiT.

Either a fixed share of the crops is masked, with stratified ratios, so that every batch holds easy and hard crops
(DINOv2), or each crop draws its own ratio (iBOT). All crops of a batch are drawn side by side: one round of ten tried
rectangles a crop costs the same for one crop as for hundreds.

Letters: C crops, S sequences, N patch tokens of one sequence, M masks drawn, T tries, R rows, W columns of the grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

MaskMode = Literal["shared", "full_sequence", "independent"]
MaskSampling = Literal["stratified", "per_image"]
MaskShape = Literal["block", "rand"]

TRIES = 10
"""Rectangles tried before a mask is left as it is."""

MIN_AREA = 4.0
"""Smallest area that stratified masks ask for, in patches; less only where fewer remain to be masked."""

MIN_ASPECT = 0.3
"""Aspect of a rectangle, height over width, is log-uniform in 0.3 .. 1/0.3."""


@dataclass(frozen=True)
class TokenMasks:
    """The masks of one batch of crops.

    Args:
        blocks_CSN: bool, block masks; all False for a crop that drew none.
        pick_C: float64 in [0, 1), where among the sequences of its case the one lies that a crop hides whole, see
            ``hidden_whole``; None unless the mode is ``full_sequence``.
    """

    blocks_CSN: np.ndarray
    pick_C: np.ndarray | None = None

    def flat(self) -> np.ndarray:
        """(C, S*N) bool for cases with all sequences, sequence-major: all tokens of sequence 1, then of sequence 2."""
        masks_CSN = self.blocks_CSN
        if self.pick_C is not None:
            masks_CSN = masks_CSN | hidden_whole(self.pick_C, np.ones(masks_CSN.shape[:2], dtype=bool))[:, :, None]
        return masks_CSN.reshape(len(masks_CSN), -1)


def hidden_whole(pick_C: Any, available_CS: Any) -> Any:
    """(C, S) bool: which sequence each crop hides whole, alike among those that its case has; never the only one.

    Hiding one that is absent would hide nothing: its tokens are masked anyway and are no target.

    Args:
        pick_C: float64 in [0, 1). NumPy arrays, or tensors on one device, without waiting for it.
        available_CS: bool, which sequences the case of each crop has.
    """
    count_C1 = available_CS.sum(1)[:, None]
    place_C1 = pick_C[:, None] * count_C1
    nth_CS = available_CS.cumsum(1)
    return available_CS & (count_C1 > 1) & (nth_CS - 1 <= place_C1) & (place_C1 < nth_CS)


def draw_token_masks(
    n_crops: int,
    n_sequences: int,
    grid: tuple[int, int],
    rng: np.random.Generator,
    *,
    sample_probability: float = 0.5,
    ratio_min_max: tuple[float, float] = (0.1, 0.5),
    mode: MaskMode = "full_sequence",
    exact: bool = False,
    sampling: MaskSampling = "stratified",
    pred_ratio: Sequence[float] = (0.0, 0.3),
    pred_ratio_var: Sequence[float] = (0.0, 0.2),
    shape: MaskShape = "block",
) -> TokenMasks:
    """Draw the masks of ``n_crops`` global crops.

    Args:
        n_crops: C, the crops of all views together, view-major; the masks lie in the same order.
        n_sequences: S; 1 for a plain picture.
        grid: (rows, columns) of patch tokens of one sequence.
        rng: Source of every draw.
        sample_probability: Share p of the crops that get masks when stratified: exactly floor(p * C) of them.
        ratio_min_max: Share of the grid that a masked crop asks for when stratified; the i-th masked crop draws from
            the i-th of equal slices of this range, and the crops are shuffled.
        mode: ``shared``: one mask for all sequences. ``full_sequence``: the same, and one sequence of each crop, masked
            or not, hidden whole (where a case has a single one this would hide everything: it is ``shared``).
            ``independent``: a mask for each sequence, of the same requested ratio.
        exact: Top a block mask up with single patches to the requested number.
        sampling: ``stratified``, or ``per_image``: each crop draws a ratio within each r ± v of ``pred_ratio`` and
            ``pred_ratio_var``, and takes one of them at random.
        pred_ratio: Shares of the grid, r, of ``per_image``.
        pred_ratio_var: Half widths, v; as many, none above its r.
        shape: ``block``: rectangles; ``rand``: single patches anywhere.

    Source: block masks Bao et al. 2022 (BEiT), stratified ratios Oquab et al. 2023 (DINOv2), ratios for each image and
    single patches Zhou et al. 2022 (iBOT), whole sequences as in MM-DINOv2 (2025).
    """
    for value, choices in ((mode, MaskMode), (sampling, MaskSampling), (shape, MaskShape)):
        if value not in get_args(choices):
            raise ValueError(f"one of {', '.join(get_args(choices))} is needed, got {value!r}")
    n_tokens = grid[0] * grid[1]
    if sampling == "stratified":
        n_masked = int(sample_probability * n_crops + 1e-9)
        chosen = rng.permutation(n_crops)[:n_masked]
        requests = np.floor(n_tokens * _stratified(n_masked, ratio_min_max, rng) + 1e-9)
        smallest, largest = MIN_AREA, n_tokens / 2  # a true half: an odd grid keeps its half patch
    else:
        chosen = np.arange(n_crops)
        requests = n_tokens * _per_image(n_crops, pred_ratio, pred_ratio_var, rng)
        smallest, largest = float((min(grid) // 3) ** 2), math.inf
    n_own = n_sequences if mode == "independent" else 1
    requests = np.repeat(requests, n_own)
    if shape == "rand":
        masks = np.zeros((len(requests), *grid), dtype=bool)
        _top_up(masks, np.floor(requests + 1e-9), rng)
    else:
        masks = block_masks(requests, grid, rng, exact=exact, smallest=smallest, largest=largest)
    blocks_CSN = np.zeros((n_crops, n_sequences, n_tokens), dtype=bool)
    blocks_CSN[chosen] = masks.reshape(len(chosen), n_own, n_tokens)
    return TokenMasks(blocks_CSN, rng.random(n_crops) if mode == "full_sequence" else None)


def no_masks(n_crops: int, n_sequences: int, grid: tuple[int, int]) -> TokenMasks:
    """Masks that hide nothing, whatever the mode."""
    return TokenMasks(np.zeros((n_crops, n_sequences, grid[0] * grid[1]), dtype=bool))


def block_masks(
    requests_M: np.ndarray,
    grid: tuple[int, int],
    rng: np.random.Generator,
    *,
    exact: bool = False,
    smallest: float = MIN_AREA,
    largest: float | None = None,
) -> np.ndarray:
    """Masks made of rectangles, never of more patches than requested, and usually of 0 to 2 fewer.

    Args:
        requests_M: Patches to mask in each mask; fractions count in the areas that are drawn.
        grid: (rows, columns).
        rng: Source of every draw.
        exact: Add single patches where rectangles fell short.
        smallest: Smallest area asked for, in patches; less only where fewer remain to be masked.
        largest: Largest number of patches that one rectangle may add; None: half the grid.

    Returns:
        (M, rows, columns) bool.
    """
    masks_MRW = np.zeros((len(requests_M), *grid), dtype=bool)
    cap = grid[0] * grid[1] / 2 if largest is None else largest
    active = np.flatnonzero(requests_M > 0)
    while len(active):
        remaining = requests_M[active] - masks_MRW[active].sum((1, 2))
        grew = _add_rectangles(masks_MRW, active, np.minimum(remaining, cap), rng, smallest)
        left = requests_M[active] - masks_MRW[active].sum((1, 2))
        active = active[grew & (left > 0)]
    if exact:
        _top_up(masks_MRW, np.floor(requests_M), rng)
    return masks_MRW


def _stratified(count: int, bounds: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """``count`` numbers, the i-th uniform in the i-th of equal slices of ``bounds``."""
    low, high = bounds
    return low + (high - low) * (np.arange(count) + rng.random(count)) / max(count, 1)


def _per_image(count: int, middles: Sequence[float], widths: Sequence[float], rng: np.random.Generator) -> np.ndarray:
    """``count`` numbers, each uniform in one of the ranges middle ± width, every range as likely."""
    middle_R, width_R = np.asarray(middles, dtype=float), np.asarray(widths, dtype=float)
    if middle_R.shape != width_R.shape or (middle_R < width_R).any():
        raise ValueError(f"ratios {tuple(middles)} need as many half widths, none above its ratio: {tuple(widths)}")
    pick = rng.integers(len(middle_R), size=count)
    return middle_R[pick] + width_R[pick] * (2 * rng.random(count) - 1)


def _add_rectangles(
    masks_MRW: np.ndarray, active: np.ndarray, limit: np.ndarray, rng: np.random.Generator, smallest: float
) -> np.ndarray:
    """Add to each active mask the first of ten drawn rectangles that fits and brings 1 .. limit new patches.

    Returns:
        bool, one for each active mask: whether a rectangle was added.
    """
    rows, columns = masks_MRW.shape[1:]
    u = rng.random((4, len(active), TRIES))
    area = smallest + (limit[:, None] - smallest) * u[0]
    root_aspect = np.exp(math.log(MIN_ASPECT) * (u[1] - 0.5))  # square root of a log-uniform aspect
    height = np.rint(np.sqrt(area) * root_aspect).astype(np.int64)
    width = np.rint(np.sqrt(area) / root_aspect).astype(np.int64)
    fits = (height >= 1) & (height <= rows) & (width >= 1) & (width <= columns)
    height, width = np.where(fits, height, 1), np.where(fits, width, 1)
    top = (u[2] * (rows - height + 1)).astype(np.int64)
    left = (u[3] * (columns - width + 1)).astype(np.int64)
    new = height * width - _count_inside(masks_MRW[active], top, left, height, width)
    fits &= (new >= 1) & (new <= limit[:, None])
    first = fits.argmax(1)
    pick = np.arange(len(active))
    grew = fits[pick, first]
    box = [part[pick, first][grew, None] for part in (top, left, height, width)]
    y, x = np.arange(rows), np.arange(columns)
    in_rows = (y >= box[0]) & (y < box[0] + box[2])
    in_columns = (x >= box[1]) & (x < box[1] + box[3])
    masks_MRW[active[grew]] |= in_rows[:, :, None] & in_columns[:, None, :]
    return grew


def _count_inside(
    masks_MRW: np.ndarray, top: np.ndarray, left: np.ndarray, height: np.ndarray, width: np.ndarray
) -> np.ndarray:
    """(M, T) patches already masked inside each rectangle, from a summed-area table."""
    count, rows, columns = masks_MRW.shape
    table = np.zeros((count, rows + 1, columns + 1), dtype=np.int32)
    np.cumsum(masks_MRW, axis=1, out=table[:, 1:, 1:])
    np.cumsum(table[:, 1:, 1:], axis=2, out=table[:, 1:, 1:])
    m = np.arange(count)[:, None]
    bottom, right = top + height, left + width
    return table[m, bottom, right] - table[m, top, right] - table[m, bottom, left] + table[m, top, left]


def _top_up(masks_MRW: np.ndarray, requests_M: np.ndarray, rng: np.random.Generator) -> None:
    flat_MN = masks_MRW.reshape(len(masks_MRW), -1)
    short = requests_M - flat_MN.sum(1)
    order = np.argsort(np.where(flat_MN, 2.0, rng.random(flat_MN.shape)), axis=1)  # free patches first, shuffled
    m, rank = np.nonzero(np.arange(flat_MN.shape[1]) < short[:, None])
    flat_MN[m, order[m, rank]] = True
