"""How far a case is from what a head has learned from: what a reader has to know before trusting its numbers.

A flag says what differs and by how much, with both values; it never changes a probability.

Letters: N slices of the case.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from medssl_cli.core.wording import counted

if TYPE_CHECKING:
    from medssl_cli.data.feature_store import ImageFacts
    from medssl_cli.metrics.novelty import NoveltyScore

SPACING_TOLERANCE = 0.1
"""Share by which a voxel edge may lie outside the range of the training cases: 0.45 counts as 0.5 mm."""
SLICES_TOLERANCE = 0.25
"""Share by which the number of slices may lie outside."""
INTENSITY_TOLERANCE = 0.5
"""Share of the width of the training range by which a percentile may lie outside; scanners scale MR freely."""
INTENSITY_FLOOR = 0.05
"""At least this share of the largest training value, where the training range is narrow."""
WEAK_TOTAL = 0.1
"""Logits that a map of the head has to add up to; below, its places together change a probability of 0.5 by 0.025."""
PERCENTILES = {"p01": "1st", "p50": "50th", "p99": "99th"}
AXES = ("z", "y", "x")

Range = tuple[float, float]


@dataclass(frozen=True)
class QualityFlag:
    """One thing that is unusual.

    Args:
        kind: How much it weighs.
        title: A few words.
        text: What differs, with both values.
        code: Stable name for scripts.
    """

    kind: Literal["ok", "info", "warning", "error"]
    title: str
    text: str
    code: str


def quality_flags(
    facts: ImageFacts,
    card: Mapping[str, Any],
    *,
    novelty: NoveltyScore | None,
    guessed: str | None = None,
    filled_N: np.ndarray,
) -> list[QualityFlag]:
    """Everything unusual about one case, the weightiest first; one flag ``ok`` when there is nothing.

    Args:
        facts: Of the images.
        card: ``head.json``: ``ranges``, ``sequences`` and ``missing_in_training``.
        novelty: How far the embedding lies from the training set; None if the head does not know.
        guessed: The sequence that a file was taken for without its name saying so.
        filled_N: Which slices hold more than one value.
    """
    ranges = card.get("ranges") or {}
    flags = [
        *_novelty_flags(novelty),
        *_missing_flags(facts.missing, card),
        *_guess_flags(guessed, card.get("sequences") or ()),
        *_spacing_flags(facts.spacing_mm, ranges),
        *_slice_flags(facts.shape[0], ranges, is_volume=facts.spacing_mm is not None),
        *_intensity_flags(facts.intensity, ranges),
        *_padding_flags(filled_N),
    ]
    flags.sort(key=lambda flag: ("error", "warning", "info", "ok").index(flag.kind))
    if any(flag.kind in ("error", "warning") for flag in flags):
        return flags
    if not ranges and novelty is None:
        text = "The head keeps no record of its training cases."
        return [*flags, QualityFlag("info", "Not compared with the training set", text, "unknown")]
    text = "Nothing about the images is unusual for the head."
    return [*flags, QualityFlag("ok", "Like the training set", text, "ok")]


def map_flags(total: float | None, method: str) -> list[QualityFlag]:
    """A map that is divided by its maximum looks strong even where it explains next to nothing.

    Args:
        total: Sum of its raw values; None for maps in units of their own.
        method: Only ``head`` counts in logits.
    """
    if total is None or method != "head" or total >= WEAK_TOTAL:
        return []
    text = (
        f"All places of the heat map together raise the output by {total:.2g} (logit), to first order: the head "
        "decides by something that this map does not show. Do not make much of where it is bright."
    )
    return [QualityFlag("info", "The heat map explains little", text, "map_weak")]


def _novelty_flags(novelty: NoveltyScore | None) -> Iterator[QualityFlag]:
    if novelty is None or not novelty.is_outside:
        return
    yield QualityFlag(
        "warning",
        "Unlike the training cases",
        f"The embedding lies {novelty.distance:.3f} from the nearest training cases (cosine distance), farther than "
        f"{novelty.percentile:.1%} of the training cases lie from those of other patients; the limit is "
        f"{novelty.limit:.3f}. Probabilities of such a case may be far off.",
        "embedding_outside",
    )


def _missing_flags(missing: Sequence[str], card: Mapping[str, Any]) -> Iterator[QualityFlag]:
    seen_missing = set(card.get("missing_in_training") or ())
    for name in missing:
        if name in seen_missing:
            text = "Mask tokens stand in. Some training cases of the head lacked it too."
            yield QualityFlag("info", f"{name} is missing", text, "sequence_missing")
        else:
            text = "Mask tokens stand in. Every training case of the head had it."
            yield QualityFlag("warning", f"{name} is missing", text, "sequence_missing_new")


def _guess_flags(guessed: str | None, sequences: Sequence[str]) -> Iterator[QualityFlag]:
    if guessed is None:
        return
    text = f"The name of the file does not say what it is; it was taken as {guessed}. --sequence tells otherwise."
    yield QualityFlag("warning" if len(sequences) > 1 else "info", f"Taken as {guessed}", text, "sequence_guessed")


def _spacing_flags(spacing_mm: tuple[float, float, float] | None, ranges: Mapping[str, Any]) -> Iterator[QualityFlag]:
    if spacing_mm is None:
        return
    odd = []
    for axis, value in zip(AXES, spacing_mm, strict=True):
        known = range_of(ranges, f"spacing_{axis}_mm")
        if known and not known[0] * (1 - SPACING_TOLERANCE) <= value <= known[1] * (1 + SPACING_TOLERANCE):
            odd.append(f"{axis}: {value:.3g} mm, in training {_between(known)} mm")
    if odd:
        yield QualityFlag("warning", "Unusual voxel size", "; ".join(odd) + ".", "spacing_outside")


def _slice_flags(count: int, ranges: Mapping[str, Any], *, is_volume: bool) -> Iterator[QualityFlag]:
    known = range_of(ranges, "slices")
    if not is_volume or not known:
        return
    if not known[0] * (1 - SLICES_TOLERANCE) <= count <= known[1] * (1 + SLICES_TOLERANCE):
        text = f"{counted(count, 'slice')}, in training {_between(known)}: more or less of the body may be shown."
        yield QualityFlag("warning", "Unusual number of slices", text, "slices_outside")


def _intensity_flags(
    intensity: Mapping[str, tuple[float, float, float]], ranges: Mapping[str, Any]
) -> Iterator[QualityFlag]:
    for name, values in intensity.items():
        odd = []
        for label, value in zip(PERCENTILES, values, strict=True):
            known = range_of(ranges, f"{name}_{label}")
            if known and not _within(value, known):
                odd.append(f"{PERCENTILES[label]} percentile {value:.4g}, in training {_between(known)}")
        if odd:
            yield QualityFlag("warning", f"Unusual intensities of {name}", "; ".join(odd) + ".", "intensity_outside")


def _within(value: float, known: Range) -> bool:
    low, high = known
    margin = max(INTENSITY_TOLERANCE * (high - low), INTENSITY_FLOOR * max(abs(low), abs(high)))
    return low - margin <= value <= high + margin


def _padding_flags(filled_N: np.ndarray) -> Iterator[QualityFlag]:
    empty = int((~filled_N).sum())
    if not empty:
        return
    text = f"{counted(empty, 'slice')} of {len(filled_N)} hold a single value and are not ranked."
    yield QualityFlag("info", "Padding", text, "padding")


def range_of(ranges: Mapping[str, Any], key: str) -> Range | None:
    """[low, high] of the training cases; None where it is not known."""
    found = ranges.get(key)
    if not found or any(end is None for end in found):
        return None
    low, high = found
    return float(low), float(high)


def _between(known: Range) -> str:
    low, high = known
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
