"""The pointing game: does a heat map peak inside the bleed? (Zhang et al. 2018.)

``python scripts/benchmarks/pointing.py SERIES_CSV INFERRED [SPLIT_CSV]`` reads the masks that a head CT phantom has
beside its series table, and ``heatmap.nii.gz`` of each case below INFERRED as ``medssl infer SERIES_CSV
--heatmap`` wrote it.
Printed are the hits within a tolerance, and what a peak at a random voxel of the head would hit.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
from scipy import ndimage

from medssl_cli.data.images import read_volume

TOLERANCE_MM = 15.0
"""As in the paper's tolerance of 15 pixels: half a patch of the small recipe is 9 mm."""
HEAD_HU = -300.0


def score_case(heatmap: np.ndarray, near_bleed: np.ndarray, head: np.ndarray) -> tuple[bool, float]:
    """Whether the highest voxel lies near a bleed, and the share of the head that does."""
    peak = np.unravel_index(int(np.argmax(np.where(head, heatmap, -np.inf))), heatmap.shape)
    return bool(near_bleed[peak]), float(near_bleed[head].mean())


def main(words: list[str]) -> int:
    """Print one JSON document."""
    if len(words) not in (2, 3):
        print(__doc__, file=sys.stderr)
        return 2
    series, inferred = Path(words[0]), Path(words[1])
    with Path(words[-1] if len(words) == 3 else series).open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["label_any"] == "1"]
    hits, chances = [], []
    for row in rows:
        folder = inferred / f"{row['series_uid']}_ct"
        mask = read_volume(series.parent / row["mask_path"])
        away_mm = ndimage.distance_transform_edt(mask.array == 0, sampling=mask.spacing)
        head = ndimage.binary_fill_holes(read_volume(series.parent / row["nifti_path"]).array > HEAD_HU)
        hit, chance = score_case(read_volume(folder / "heatmap.nii.gz").array, away_mm <= TOLERANCE_MM, head)
        hits.append(hit)
        chances.append(chance)
    facts = {"n": len(hits), "tolerance_mm": TOLERANCE_MM, "hit_rate": np.mean(hits), "chance": np.mean(chances)}
    print(json.dumps({key: round(float(value), 4) for key, value in facts.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
