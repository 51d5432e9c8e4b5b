"""Labelled phantoms of the services' tests; puts their shared constructions on the path."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))


@pytest.fixture(scope="session")
def labelled_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen small prostate phantoms with ``labels.csv``; not to be changed."""
    from medssl_cli.services.phantom import make_phantom

    root = tmp_path_factory.mktemp("labelled") / "prostate"
    make_phantom("prostate", root, cases=16, seed=1, size="small")
    return root
