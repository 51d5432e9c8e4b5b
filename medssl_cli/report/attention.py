"""Maps of patch tokens: patch similarity."""

from __future__ import annotations

import numpy as np


def similarity(patches_ND: np.ndarray, reference_D: np.ndarray) -> np.ndarray:
    """Cosine of each patch token with a reference vector, (..., N) float32 in [-1, 1]; 1 at the reference itself.

    It says which patches look like the reference; it is no lesion map.
    """
    patches, reference = patches_ND.astype(np.float64), reference_D.astype(np.float64)
    norms = np.linalg.norm(patches, axis=-1) * np.linalg.norm(reference)
    cosine = np.einsum("...d,...d->...", patches, reference) / np.maximum(norms, 1e-300)
    return np.clip(cosine, -1, 1).astype(np.float32)
