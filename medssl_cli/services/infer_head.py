"""What a head says of one case: probabilities or values, decisions with their thresholds, the slices that stand out.

Letters: N slices looked at, Z all slices of the case, C outputs, V width of a slice vector.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

import numpy as np

from medssl_cli.core.errors import ConfigError
from medssl_cli.metrics.calibration import nearby_frequency
from medssl_cli.report.verdict import Finding, Verdict
from medssl_cli.services.head import Head, novelty_vector
from medssl_cli.services.predictions import any_place

DEFAULT_THRESHOLD = 0.5
INTERVAL_SHARE, INTERVAL_LEAST = 0.1, 10
INTERVAL_DEFINITION = (
    "how often the finding was present among the validation cases with the nearest probabilities (a tenth of them, at "
    f"least {INTERVAL_LEAST}, or all there are), with its 95 % Wilson interval; it checks the probability from outside "
    "and is no interval of it, so the probability may lie outside"
)
SLICE_SCORES = {
    "volume_head": "the head of the whole case applied to each slice alone; it learned from pooled slices, so these "
    "scores rank slices and are no probabilities of a slice",
    "slice_head": "the head learned from labels of slices and was applied to each",
}


@dataclass(frozen=True)
class Limits:
    """From which probability on an output counts as positive.

    Args:
        values_C: One an output; None where nothing is decided by a threshold.
        source: ``given``, ``head`` (with its rule) or ``default``; None without thresholds.
    """

    values_C: np.ndarray | None
    source: str | None


@dataclass(frozen=True)
class Judgement:
    """What the head says of one case.

    Args:
        head: Which one.
        values_C: Probabilities, or values of a regression.
        slice_values_NC: The same of each slice alone.
        indices_N: Positions of the slices.
        limits: Thresholds.
        intervals: One an output, None without validation predictions.
        output: The output that ranks the slices and drives the heat map.
        order: Places among the slices looked at of those with the highest values of that output, best first.
        pooled_V: The vector of the case.
        attention_N: Weights of an attention head.
    """

    head: Head
    values_C: np.ndarray
    slice_values_NC: np.ndarray
    indices_N: np.ndarray
    limits: Limits
    intervals: list[dict[str, Any]] | None
    output: int
    order: tuple[int, ...]
    pooled_V: np.ndarray
    attention_N: np.ndarray | None

    @property
    def is_regression(self) -> bool:
        """Values instead of probabilities."""
        return self.head.task == "regression"

    @property
    def positive_C(self) -> np.ndarray | None:
        """Decisions, a probability at its threshold being positive; None where there are none."""
        if self.limits.values_C is None:
            return None
        return np.asarray(self.values_C.astype(float) >= self.limits.values_C.astype(float))

    @property
    def predicted(self) -> dict[str, bool] | str | None:
        """Decision of each class, the most probable class of exclusive ones, None for values."""
        if self.positive_C is not None:
            return {
                name: bool(is_positive) for name, is_positive in zip(self.head.classes, self.positive_C, strict=True)
            }
        return None if self.is_regression else str(self.head.classes[int(self.values_C.argmax())])


def judge(
    head: Head,
    slices_NV: np.ndarray,
    indices_N: np.ndarray,
    filled_N: np.ndarray,
    limits: Limits,
    *,
    top_k: int,
    by: str | None = None,
) -> Judgement:
    """Apply a head to the vectors of one case.

    Args:
        head: Trained on such vectors.
        slices_NV: Slice vectors.
        indices_N: Their positions.
        filled_N: Slices that hold something; padding is not ranked.
        limits: From ``limits_of``.
        top_k: Slices that are ranked at most.
        by: Class that ranks the slices; by default ``any`` or the positive class, or the predicted one.

    Raises:
        ConfigError: The head has no class ``by``.
    """
    values_C = np.asarray(head.values(slices_NV), dtype=np.float64)
    slice_values_NC = np.asarray(head.slice_values(slices_NV))
    output = _ranking_output(head, values_C, by)
    scores_N = slice_values_NC[:, output].astype(np.float64)
    ranked = np.flatnonzero(filled_N) if filled_N.any() else np.arange(len(indices_N))
    order = ranked[np.argsort(-scores_N[ranked], kind="stable")][:top_k]  # equal ones in their order
    attention_N = head.attention(slices_NV)
    return Judgement(
        head=head,
        values_C=values_C,
        slice_values_NC=slice_values_NC,
        indices_N=indices_N,
        limits=limits,
        intervals=_intervals(head, values_C),
        output=output,
        order=tuple(int(place) for place in order),
        pooled_V=_case_vector(head, slices_NV, attention_N),
        attention_N=attention_N,
    )


def limits_of(head: Head, threshold: float | None) -> Limits:
    """Thresholds: the one given for all classes, else the head's own, else 0.5.

    Raises:
        ConfigError: A threshold for a head that decides nothing by one.
    """
    if head.task not in ("binary", "multilabel"):
        if threshold is None:
            return Limits(None, None)
        raise ConfigError(
            "--threshold has no effect on this head.",
            where=f"task {head.task}: " + ("values" if head.task == "regression" else "the most probable class wins"),
            fix="leave it out",
            code="threshold_needless",
        )
    if threshold is not None:
        return Limits(np.full(head.outputs, threshold), "given")
    if head.thresholds is not None:
        rule = head.card.get("threshold_rule")
        return Limits(np.asarray(head.thresholds, dtype=np.float64), f"head ({rule})" if rule else "head")
    return Limits(np.full(head.outputs, DEFAULT_THRESHOLD), "default")


def check_class(head: Head, name: str) -> int:
    """Which output has this name.

    Raises:
        ConfigError: None.
    """
    if name in head.classes:
        return list(head.classes).index(name)
    near = difflib.get_close_matches(name, [str(one) for one in head.classes], n=1)
    raise ConfigError(
        f"The head has no class {name!r}.",
        where=f"heatmap_class={name}; its classes: {', '.join(map(str, head.classes))}",
        fix=f"did you mean {near[0]}?" if near else "choose one of them, or leave the key out",
        code="heatmap_class_unknown",
    )


def _ranking_output(head: Head, values_C: np.ndarray, by: str | None) -> int:
    if by is not None:
        return check_class(head, by)
    if head.task in ("binary", "regression"):
        return 0
    place = any_place(head.classes) if head.task == "multilabel" else None
    return int(values_C.argmax()) if place is None else place


def _case_vector(head: Head, slices_NV: np.ndarray, attention_N: np.ndarray | None) -> np.ndarray:
    """The pooled vector: as the head pools, or the mean where the head sees single slices."""
    if attention_N is not None:
        return np.asarray(attention_N @ slices_NV, dtype=np.float32)
    return novelty_vector(slices_NV, head.pool_mode)


def _intervals(head: Head, values_C: np.ndarray) -> list[dict[str, Any]] | None:
    if head.reliability is None or head.task == "regression":
        return None
    known_p, known_y = head.reliability
    if known_y.ndim == 1 or known_y.shape[1] < len(values_C):  # places of exclusive classes
        places = known_y.reshape(-1)
        known_y = np.where(np.isnan(places)[:, None], np.nan, places[:, None] == np.arange(len(values_C)))
    return [_interval(float(value), known_p[:, c], known_y[:, c]) for c, value in enumerate(values_C)]


def _interval(value: float, known_p: np.ndarray, known_y: np.ndarray) -> dict[str, Any]:
    near = nearby_frequency(value, known_p, known_y, share=INTERVAL_SHARE, least=INTERVAL_LEAST)
    low, high = (None, None) if near.n == 0 else (float(near.low), float(near.high))
    facts = {"low": low, "high": high, "n": int(near.n), "positives": int(near.positives)}
    return {**facts, "definition": INTERVAL_DEFINITION}


# --- what is told of it ----------------------------------------------------------------------------------------------


def facts_of(judgement: Judgement) -> dict[str, Any]:
    """The keys of ``summary.json`` that a head adds."""
    head, limits = judgement.head, judgement.limits
    named = {str(name): float(value) for name, value in zip(head.classes, judgement.values_C, strict=True)}
    same = limits.values_C is not None and bool((limits.values_C == limits.values_C[0]).all())
    facts: dict[str, Any] = {
        "task": head.task,
        "pool_mode": head.pool_mode,
        "slice_embedding_dim": head.slice_dim,
        **({"values": named} if judgement.is_regression else {"probabilities": named}),
        "predicted": judgement.predicted,
        "threshold": float(limits.values_C[0]) if limits.values_C is not None and same else None,
        "thresholds": None
        if limits.values_C is None
        else dict(zip(map(str, head.classes), map(float, limits.values_C), strict=True)),
        "threshold_source": limits.source,
        "calibrated": bool(head.calibrated),
        "intervals": None
        if judgement.intervals is None
        else dict(zip(map(str, head.classes), judgement.intervals, strict=True)),
        "slice_scores_from": head.slice_scores_from,
        "slice_scores_definition": SLICE_SCORES[head.slice_scores_from],
        "top_slices_class": str(head.classes[judgement.output]),
    }
    return facts


def null_reasons(judgement: Judgement) -> dict[str, str]:
    """Why keys of ``facts_of`` are null."""
    head, limits = judgement.head, judgement.limits
    reasons: dict[str, str] = {}
    if limits.values_C is None:
        text = "the head gives values" if judgement.is_regression else "the most probable class is predicted"
        reasons |= dict.fromkeys(("threshold", "thresholds", "threshold_source"), text)
    elif not (limits.values_C == limits.values_C[0]).all():
        reasons["threshold"] = "each class has its own, see thresholds"
    if judgement.is_regression:
        reasons |= dict.fromkeys(("predicted", "intervals"), "the head gives values")
    elif head.reliability is None:
        reasons["intervals"] = "the head keeps no validation predictions"
    return reasons


def ranked_slices(judgement: Judgement) -> list[dict[str, Any]]:
    """The slices with the highest score of one output, best first: the beginning of ``top_slices``."""
    entries = []
    is_any = any_place(judgement.head.classes) == judgement.output
    for rank, place in enumerate(judgement.order, start=1):
        score = float(judgement.slice_values_NC[place, judgement.output])
        entry: dict[str, Any] = {
            "rank": rank,
            "slice_pos": place,
            "slice_index": int(judgement.indices_N[place]),
            "score": score,
        }
        if is_any:
            entry["p_any"] = score
        if judgement.attention_N is not None:
            entry["attention"] = float(judgement.attention_N[place])
        entries.append(entry)
    return entries


def verdict_of(judgement: Judgement, count: int) -> Verdict:
    """For the report; ``count``: slices of the case."""
    head = judgement.head
    intervals = judgement.intervals or [{"low": None, "high": None}] * len(judgement.values_C)
    limits_C, positive_C = judgement.limits.values_C, judgement.positive_C
    findings = tuple(
        Finding(
            name=str(name),
            probability=float(judgement.values_C[c]),
            low=intervals[c]["low"],
            high=intervals[c]["high"],
            threshold=None if limits_C is None else float(limits_C[c]),
            is_positive=bool(positive_C[c]) if positive_C is not None else _is_chosen(judgement, c),
        )
        for c, name in enumerate(head.classes)
    )
    scores_Z = np.full(count, np.nan)
    scores_Z[judgement.indices_N] = judgement.slice_values_NC[:, judgement.output]
    return Verdict(
        findings=findings,
        calibrated=bool(head.calibrated),
        interval_definition=INTERVAL_DEFINITION if judgement.intervals is not None else "",
        head=describe(head),
        slice_scores_Z=scores_Z if count > 1 else None,
        slice_score_name=str(head.classes[judgement.output]),
        slice_scores_from=head.slice_scores_from,
        top=tuple(int(judgement.indices_N[place]) for place in judgement.order),
        is_regression=judgement.is_regression,
    )


def _is_chosen(judgement: Judgement, output: int) -> bool | None:
    return None if judgement.is_regression else output == int(judgement.values_C.argmax())


def describe(head: Head) -> str:
    """A head in a few words."""
    kind = str(head.card.get("kind", "head")).replace("_", " ")
    pooling = {"none": f"{head.level} level"}.get(head.pool_mode, f"{head.pool_mode} of the slices")
    return f"{kind}, {head.task}, {pooling}"


def lines_of(summary: dict[str, Any]) -> list[str]:
    """Decisions for people, one line a class."""
    values = summary.get("probabilities") or summary["values"]
    width = max(map(len, values))
    lines = []
    for name, value in values.items():
        words = [f"  {name:<{width}}  {_probability(value) if 'probabilities' in summary else f'{value:.4g}'}"]
        if summary["thresholds"] is not None:
            words.append(f"threshold {_apart(summary['thresholds'][name], value)}")
            words.append("POSITIVE" if summary["predicted"][name] else "negative")
        elif summary["predicted"] == name:
            words.append("PREDICTED")
        near = (summary.get("intervals") or {}).get(name)
        if near and near["low"] is not None:
            words.append(f"(present in {near['positives']} of {near['n']} validation cases near it)")
        lines.append("  ".join(words))
    return lines


def _probability(value: float) -> str:
    """Three digits; what is not quite 0 or 1 does not look so."""
    return "<0.001" if 0 < value < 0.0005 else ">0.999" if 0.9995 <= value < 1 else f"{value:.3f}"


def _apart(threshold: float, value: float) -> str:
    """The threshold with as many digits as tell it from the probability."""
    if threshold == value:
        return f"{threshold:.3f}"
    digits = next((n for n in range(3, 12) if f"{threshold:.{n}f}" != f"{value:.{n}f}"), 12)
    return f"{threshold:.{digits}f}"
