"""Shared phantoms, and where the real images are."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from medssl_cli.core.volume import Volume

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real images, ``MEDSSL_TEST_DATA``; the test is skipped visibly without it."""
    folder = Path(os.environ.get("MEDSSL_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real images: {folder} is missing; set MEDSSL_TEST_DATA")
    return folder


@pytest.fixture
def ball() -> Volume:
    """A ball of radius 8 mm at RAS (3, -4, 6) mm in noise, on an oblique-free LAS grid of 0.8 x 0.9 x 3 mm."""
    rng = np.random.default_rng(0)
    affine = np.array([[-0.8, 0, 0, 30.0], [0, 0.9, 0, -40.0], [0, 0, 3.0, -30.0], [0, 0, 0, 1]])
    z, y, x = np.meshgrid(np.arange(20), np.arange(80), np.arange(70), indexing="ij")
    world = np.einsum("ij,j...->i...", affine, np.stack([x, y, z, np.ones_like(x)]))[:3]
    inside = ((world - np.array([3.0, -4.0, 6.0]).reshape(3, 1, 1, 1)) ** 2).sum(0) < 64
    return Volume((100 + 10 * rng.standard_normal(x.shape) + 400 * inside).astype(np.int16), affine)
