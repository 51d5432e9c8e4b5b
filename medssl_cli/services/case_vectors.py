"""What a network made of the slices of a case, with facts of its images; as arrays and back.

Letters: N slices that were looked at, D width of a slice vector, E width of the network, S sequences, h w patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from medssl_cli.data.feature_store import ImageFacts
from medssl_cli.services.backbone import PLAIN


@dataclass(frozen=True)
class CaseVectors:
    """What the network made of a case, one row a slice in rising order.

    Args:
        slices_ND: (N, D) float32.
        indices_N: (N,) int32, positions of the slices, from 0.
        facts: Of the images.
        patches_NShwD: (N, S, h, w, E) float32 patch tokens after the final norm; None without the token ``patch``.
    """

    slices_ND: np.ndarray
    indices_N: np.ndarray
    facts: ImageFacts
    patches_NShwD: np.ndarray | None


def pooled(slices_ND: np.ndarray, mode: Literal["mean", "meanmax"]) -> np.ndarray:
    """Slice vectors to one vector of the case: their mean (D,), or mean and maximum end to end (2D,), float32."""
    mean_D = slices_ND.mean(axis=0, dtype=np.float64).astype(np.float32)
    if mode == "mean":
        return mean_D
    return np.concatenate([mean_D, slices_ND.max(axis=0).astype(np.float32)])


def to_arrays(vectors: CaseVectors, sequences: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Everything of it as arrays, for a cache.

    Args:
        vectors: Of one case.
        sequences: Of the model, in channel order.
    """
    facts = vectors.facts
    names = PLAIN if facts.spacing_mm is None else sequences
    arrays = {
        "slices_ND": vectors.slices_ND,
        "indices_N": vectors.indices_N,
        "spacing_mm": np.array(facts.spacing_mm or (), np.float64),
        "shape": np.array(facts.shape, np.int64),
        "has_S": np.array([name in facts.intensity for name in names]),
        "intensity_S3": np.array([facts.intensity.get(name, (0.0, 0.0, 0.0)) for name in names], np.float64),
    }
    return arrays if vectors.patches_NShwD is None else {**arrays, "patches_NShwD": vectors.patches_NShwD}


def of_arrays(arrays: Mapping[str, np.ndarray], sequences: tuple[str, ...]) -> CaseVectors:
    """The vectors that ``to_arrays`` took apart."""
    spacing = arrays["spacing_mm"].tolist()
    names = sequences if spacing else PLAIN
    rows = zip(names, arrays["has_S"], arrays["intensity_S3"].tolist(), strict=True)
    intensity = {name: (row[0], row[1], row[2]) for name, has, row in rows if has}
    slices, height, width = arrays["shape"].tolist()
    facts = ImageFacts(
        spacing_mm=(spacing[0], spacing[1], spacing[2]) if spacing else None,
        shape=(slices, height, width),
        intensity=intensity,
        missing=tuple(name for name in names if name not in intensity),
    )
    return CaseVectors(arrays["slices_ND"], arrays["indices_N"], facts, arrays.get("patches_NShwD"))
