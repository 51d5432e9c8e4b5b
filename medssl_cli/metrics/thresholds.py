"""From a probability to a decision: a threshold chosen by rule on validation cases; positive means p >= threshold.

Candidates lie halfway between neighbouring probabilities, so that no decision hangs on the last bit of one of them.
Letters: N cases, T candidates.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from medssl_cli.metrics.binary import decided

DEFAULT = 0.5
RULES = ("youden", "f1", "mcc", "sensitivity=0.9", "specificity=0.9", "fixed=0.5")
"""Rules, with an example of the number where one is needed."""


class Threshold(NamedTuple):
    """A threshold, and what is to be said of it."""

    value: float
    note: str = ""
    """Why the rule could not be applied, so that the value is 0.5; empty if it was."""


def parse_rule(rule: str) -> tuple[str, float | None]:
    """Name and number of a rule such as ``sensitivity=0.9``.

    Raises:
        ValueError: It is no rule, or its number is missing, not wanted or not in [0, 1].
    """
    name, sign, text = rule.strip().partition("=")
    known = {known.partition("=")[0]: "=" in known for known in RULES}
    if name not in known:
        raise ValueError(f"threshold rule {rule!r} is none of {', '.join(RULES)}")
    if known[name] != bool(sign):
        raise ValueError(
            f"threshold rule {name!r} {'needs a number: ' + name + '=0.9' if known[name] else 'takes no number'}"
        )
    if not sign:
        return name, None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise ValueError(f"threshold rule {rule!r}: {text!r} is no number from 0 to 1")
    return name, number


def choose_threshold(probability_N: np.ndarray, label_N: np.ndarray, rule: str) -> Threshold:
    """The best threshold by a rule; of equals the one nearest 0.5.

    ``youden``, ``f1`` and ``mcc`` are made as high as possible (Youden's index: sensitivity + specificity - 1).
    ``sensitivity=S``: the highest specificity with a sensitivity of at least S; ``specificity=S`` the other way round.
    ``fixed=T`` is T whatever the cases.

    Args:
        probability_N: Of the label being present, of validation cases.
        label_N: 0, 1 or NaN for unknown.
        rule: One of ``RULES``.

    Returns:
        The threshold; 0.5 with a note if the cases are all positive or all negative.

    Raises:
        ValueError: See ``parse_rule``; or shapes differ.
    """
    name, number = parse_rule(rule)
    if name == "fixed" and number is not None:
        return Threshold(number)
    probability, label = np.asarray(probability_N, dtype=np.float64), np.asarray(label_N, dtype=np.float64)
    if probability.shape != label.shape or label.ndim != 1:
        raise ValueError(f"probabilities {probability.shape} and labels {label.shape} are not (N,) alike")
    known = ~np.isnan(label)
    probability, positive = probability[known], label[known] > 0.5
    if positive.all() or not positive.any():
        state = "no label is known" if not len(positive) else f"all are {'positive' if positive[0] else 'negative'}"
        return Threshold(DEFAULT, f"{rule} cannot be applied to the validation cases, {state}: 0.5 is taken")
    candidates = candidate_thresholds(probability)
    score = _scores(probability, positive, candidates, name, number)
    best = candidates[score >= score.max() - 1e-12]
    return Threshold(float(best[np.argmin(np.abs(best - DEFAULT))]))


def candidate_thresholds(probability_N: np.ndarray) -> np.ndarray:
    """Every way to cut the cases in two: all positive, between neighbours, all negative; ascending, (T,)."""
    distinct = np.unique(np.asarray(probability_N, dtype=np.float64))
    between = (distinct[:-1] + distinct[1:]) / 2
    between = np.where(between > distinct[:-1], between, distinct[1:])  # neighbours in float64 have nothing in between
    above = 1.0 if distinct[-1] < 1 else np.nextafter(distinct[-1], np.inf)
    return np.concatenate([[min(0.0, distinct[0])], between, [above]])


def _scores(
    probability_N: np.ndarray, positive_N: np.ndarray, candidates_T: np.ndarray, name: str, number: float | None
) -> np.ndarray:
    """What the rule makes as high as possible, (T,)."""
    ascending = np.sort(probability_N[positive_N]), np.sort(probability_N[~positive_N])
    tp, fp = (len(part) - np.searchsorted(part, candidates_T, side="left").astype(float) for part in ascending)
    metrics = decided(tp, fp, len(ascending[0]) - tp, len(ascending[1]) - fp)
    if name == "youden":
        return metrics["sensitivity"] + metrics["specificity"] - 1
    if number is None:
        return metrics[name]
    other = "specificity" if name == "sensitivity" else "sensitivity"
    return np.where(metrics[name] >= number - 1e-12, metrics[other], -1.0)
