"""The pointing game: does a heat map peak inside the bleed? (Zhang et al. 2018.)

``python scripts/benchmarks/pointing.py SERIES_CSV INFERRED [SPLIT_CSV]`` reads the masks that a head CT phantom has
beside its series table, and ``heatmap.nii.gz`` of each case below INFERRED as ``medssl infer SERIES_CSV --heatmap
heatmap_class=label_any`` wrote it; of another class, ``label_subdural`` say, only bleeds of that kind count. Cases
without such a bleed have nothing to point at and are left out.

Printed are the share of maps that peak in the bleed or within the tolerance, with its 95 % Wilson interval, and how
often a random voxel of the head does; and the share of the heat within the tolerance of the bleed, against the share
of the head that lies there.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from medssl_cli.core.volume import Volume
from medssl_cli.data.images import read_volume
from medssl_cli.data.phantom_head import KINDS

TOLERANCE_MM = 10.0
"""Half a patch of the small recipe is 9 mm: a peak is the middle of a patch."""
HEAD_HU = -300.0


class Score(NamedTuple):
    """Of one heat map.

    Args:
        is_hit: Whether its highest voxel lies near a bleed.
        heat: Share of its heat near a bleed, 0 of an empty map.
        volume: Share of the head near a bleed: what a random voxel hits, and a flat map has.
    """

    is_hit: bool
    heat: float
    volume: float


def score_case(heatmap: np.ndarray, near_bleed: np.ndarray, head: np.ndarray) -> Score:
    """Look at the head alone; arrays of one shape, the last two boolean."""
    inside = np.where(head, heatmap, 0.0)
    total = float(inside.sum())
    peak = np.unravel_index(int(np.argmax(np.where(head, heatmap, -np.inf))), heatmap.shape)
    is_hit = bool(near_bleed[peak]) and total > 0
    return Score(is_hit, float(inside[near_bleed].sum()) / total if total else 0.0, float(near_bleed[head].mean()))


def near(mask: Volume, label: str, tolerance_mm: float = TOLERANCE_MM) -> np.ndarray:
    """Voxels within the tolerance of the bleeds that ``label`` names."""
    blood = mask.array > 0 if label == "label_any" else mask.array == 1 + KINDS.index(label.removeprefix("label_"))
    if not blood.any():
        return blood
    return ndimage.distance_transform_edt(~blood, sampling=mask.spacing) <= tolerance_mm


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a share."""
    z = 1.959964
    middle, width = (hits + z * z / 2) / (n + z * z), z * math.sqrt(hits * (n - hits) / n + z * z / 4) / (n + z * z)
    return middle - width, middle + width


def summarise(scores: list[Score]) -> dict[str, float | list[float]]:
    """Means over the cases."""
    hits = sum(score.is_hit for score in scores)
    return {
        "n": len(scores),
        "tolerance_mm": TOLERANCE_MM,
        "hit_rate": round(hits / len(scores), 4),
        "hit_rate_ci": [round(end, 4) for end in wilson(hits, len(scores))],
        "chance": round(float(np.mean([score.volume for score in scores])), 4),
        "heat_near": round(float(np.mean([score.heat for score in scores])), 4),
        "heat_near_median": round(float(np.median([score.heat for score in scores])), 4),
    }


def main(words: list[str]) -> int:
    """Print one JSON document."""
    if len(words) not in (2, 3):
        print(__doc__, file=sys.stderr)
        return 2
    series, inferred = Path(words[0]), Path(words[1])
    with Path(words[-1] if len(words) == 3 else series).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    scores: dict[str, list[Score]] = {}
    for row in rows:
        folder = inferred / f"{row['series_uid']}_ct"
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        label = str(summary["config"]["heatmap_class"] or summary["top_slices_class"])
        if row[label] != "1":
            continue
        near_bleed = near(read_volume(series.parent / row["mask_path"]), label)
        head = ndimage.binary_fill_holes(read_volume(series.parent / row["nifti_path"]).array > HEAD_HU)
        heatmap = read_volume(folder / "heatmap.nii.gz").array
        scores.setdefault(label, []).append(score_case(heatmap, near_bleed, head))
    print(json.dumps({label: summarise(found) for label, found in scores.items()}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
