"""Confidence intervals by the bootstrap over groups: patients are drawn with replacement, never single cases.

A draw is a row of weights, how often each case counts; a metric that takes weights is computed for many draws at once.
Every draw is a function of the seed and its number alone, so neither the block size nor the order of metrics matters.
Letters: N cases, G groups, B draws of a block, D draws in all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from medssl_cli.core.run import seed_for

DRAWS = 1000
LEVEL = 0.95
LEAST_DEFINED = 0.9
"""Share of draws in which a metric has to be defined for an interval to be given."""

DEFINITION = (
    "percentile interval of 95 % over bootstrap draws of whole groups (patients) with replacement; draws in which the "
    "metric is undefined are left out, and no interval is given if more than 10 % of them are"
)

_BLOCK_CELLS = 1_000_000  # draws x cases in memory at a time: 8 MB of weights

Key = TypeVar("Key", bound=Hashable)
Weighted = Callable[[np.ndarray], Mapping[Key, np.ndarray]]
"""Weights (B, N) -> metrics, each (B,), NaN where it is not defined."""


class Interval(NamedTuple):
    """Ends of an interval; NaN with a reason where there is none."""

    low: float
    high: float
    reason: str = ""


def number_groups(groups: Sequence[str]) -> tuple[np.ndarray, int]:
    """Groups as numbers 0 to G - 1 in sorted order, (N,), and G."""
    names, numbers = np.unique(np.asarray([str(group) for group in groups], dtype=str), return_inverse=True)
    return numbers.reshape(-1), len(names)


def draw_weights(numbers_N: np.ndarray, n_groups: int, draws: range, seed: int) -> np.ndarray:
    """How often each case counts in each draw, (B, N) float64: G groups are drawn with replacement from G."""
    counts = np.empty((len(draws), n_groups))
    for row, draw in enumerate(draws):
        rng = np.random.default_rng(seed_for(seed, "bootstrap", draw))
        counts[row] = np.bincount(rng.integers(0, n_groups, n_groups), minlength=n_groups)
    return counts[:, numbers_N]


def weight_blocks(groups: Sequence[str], draws: int, seed: int) -> Iterator[np.ndarray]:
    """All draws, as blocks (B, N) of bounded size."""
    numbers, n_groups = number_groups(groups)
    size = max(1, _BLOCK_CELLS // max(1, len(numbers)))
    for start in range(0, draws, size):
        yield draw_weights(numbers, n_groups, range(start, min(start + size, draws)), seed)


def bootstrap(
    values: Weighted[Key], groups: Sequence[str], draws: int = DRAWS, seed: int = 42
) -> dict[Key, np.ndarray]:
    """Metrics in every draw, each (D,).

    Args:
        values: The metrics under given weights.
        groups: (N,) group of each case, as a rule its patient.
        draws: D.
        seed: Of the run.

    Source: Efron and Tibshirani 1993; groups as the unit of resampling: Field and Welsh 2007.
    """
    blocks = [values(weights) for weights in weight_blocks(groups, draws, seed)]
    return {key: np.concatenate([block[key] for block in blocks]) for key in blocks[0]} if blocks else {}


def percentile_interval(values_D: np.ndarray, n_groups: int, level: float = LEVEL) -> Interval:
    """Percentile interval of the draws, by linear interpolation between them.

    Args:
        values_D: The metric in each draw; NaN where it is undefined.
        n_groups: Groups that were drawn from; from one group no spread can be known.
        level: Share of draws inside.
    """
    if n_groups < 2:
        return Interval(math.nan, math.nan, "no interval: fewer than two groups (patients)")
    defined = np.isfinite(values_D)
    if not len(values_D) or defined.mean() < LEAST_DEFINED:
        share = f"defined in {int(defined.sum())} of {len(values_D)} bootstrap draws"
        return Interval(math.nan, math.nan, f"no interval: {share}, at least {LEAST_DEFINED:.0%} are needed")
    low, high = np.quantile(values_D[defined], [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))
