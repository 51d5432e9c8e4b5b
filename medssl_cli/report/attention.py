"""Maps of patch tokens: attention rollout and patch similarity."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def rollout(attention_TT: Sequence[np.ndarray], n_leading: int) -> np.ndarray:
    """How much each patch token reaches the CLS token through all blocks.

    Each block's head-averaged attention is mixed half and half with the identity, for the residual branch, its rows
    sum to 1, and the blocks are multiplied.

    Args:
        attention_TT: One (T, T) or (B, T, T) matrix a block, rows sum to 1, from first block to last.
        n_leading: CLS and register tokens in front of the patches.

    Returns:
        (N,) or (B, N), non-negative; sums to at most 1.

    Source: Abnar and Zuidema 2020.
    """
    joint: np.ndarray | None = None
    for attention in attention_TT:
        mixed = 0.5 * attention + 0.5 * np.eye(attention.shape[-1], dtype=attention.dtype)
        mixed /= mixed.sum(-1, keepdims=True)
        joint = mixed if joint is None else mixed @ joint
    if joint is None:
        raise ValueError("rollout needs the attention of at least one block")
    return joint[..., 0, n_leading:]


def similarity(patches_ND: np.ndarray, reference_D: np.ndarray) -> np.ndarray:
    """Cosine of each patch token with a reference vector, (..., N) in [-1, 1].

    It says which patches look like the reference; it is no lesion map.
    """
    norms = np.linalg.norm(patches_ND, axis=-1) * np.linalg.norm(reference_D)
    return (patches_ND @ reference_D) / np.maximum(norms, 1e-12)
