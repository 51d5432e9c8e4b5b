"""The picture of a head's training: by epoch, by C, or of one fit, with names that are long and values undefined."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medssl_cli.report.head_plots import draw_head_progress

EPOCHS = [
    {"epoch": e, "train_loss": 1 / e, "val_loss": 1.2 / e, "val_macro_auroc": 0.8, "val_per_class_auroc": [0.8, None]}
    for e in (1, 2, 3)
]
ONCE = [{"epoch": 0, "train_loss": 0.1, "val_loss": 0.2, "val_macro_auroc": None, "val_per_class_auroc": [None, 0.7]}]
SWEEP = ((0.1, 0.7), (1.0, 0.8), (10.0, float("nan")))


@pytest.mark.parametrize(
    "given",
    [
        {"history": EPOCHS, "criterion": "auroc", "chosen": 2},
        {"history": ONCE, "criterion": "loss", "chosen": (1.0, 0.1), "sweeps": (SWEEP, SWEEP)},
        {"history": ONCE, "criterion": "auroc", "chosen": (1.0,), "sweeps": (SWEEP,)},
        {"history": ONCE, "criterion": "auroc", "chosen": 0},
        {"history": [{"epoch": 1, "train_loss": 0.5}], "criterion": None, "chosen": 1},
    ],
)
def test_every_kind_of_head_has_its_picture(tmp_path: Path, given: dict[str, Any]) -> None:
    from PIL import Image

    path = tmp_path / "progress.png"
    draw_head_progress(path, "a head", classes=["a $name_ that is far too long for an axis", "b"], **given)
    with Image.open(path) as image:
        assert image.size[0] > 1000
        assert len(image.convert("L").getcolors() or ()) > 50  # something is drawn
