"""The picture of a segmentation's training: lists of two lengths, gaps, one epoch, none, and the kept one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medssl_cli.report.segment_plots import _Curves, draw_segment_progress

TRAIN, VAL, SWEPT = (76, 120, 168), (245, 133, 24), (176, 65, 62)


def history(epochs: int = 12, every: int = 2) -> dict[str, list[Any]]:
    epoch, val_epoch = list(range(1, epochs + 1)), list(range(every, epochs + 1, every))
    train = {f"train_{name}": [0.1 + e / 20 for e in epoch] for name in ("loss", "dice", "iou", "f1", "hd95")}
    val = {f"val_{name}": [0.1 + e / 30 for e in val_epoch] for name in ("loss", "dice", "iou", "f1", "hd95")}
    swept = {
        "val_best_dice": [0.3 - 0.01 * (e - 6) ** 2 for e in val_epoch],
        "val_best_threshold": [0.3] * len(val_epoch),
    }
    return {"epoch": epoch, "val_epoch": val_epoch, "lr": [1e-4] * epochs, **train, **val, **swept}


def drawn(given: dict[str, list[Any]], path: Path, **options: Any) -> np.ndarray:
    draw_segment_progress(given, path, "runs/lung", **options)
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def count(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((picture == colour).all(-1).sum())


def test_every_list_has_its_curve(tmp_path: Path) -> None:
    picture = drawn(history(), tmp_path / "progress.png")
    assert picture.shape == (760, 1500, 3)
    panels = [picture[top : top + 380, left : left + 500] for top in (0, 380) for left in (0, 500, 1000)]
    for number, colours in enumerate([(TRAIN, VAL), (TRAIN, VAL, SWEPT), (TRAIN, VAL), (TRAIN, VAL), (SWEPT,)]):
        for colour in colours:
            assert count(panels[number], colour) > 60, (number, colour)
    assert count(panels[5], (64, 64, 64)) > 60  # the rate, grey
    without = drawn(history(), tmp_path / "other.png", chosen=99)[:380, 500:1000]  # of which no score is known
    star = count(panels[1], SWEPT) - count(without, SWEPT)
    assert star > 40


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"epoch": [], "train_loss": [], "val_epoch": [], "val_loss": []},
        {"epoch": [1], "train_loss": [0.7], "lr": [1e-4]},
        {"epoch": [1, 2], "train_hd95": [None, math.nan], "train_loss": [0.5, None]},
        {k: v for k, v in history().items() if "best" not in k and "hd95" not in k},
        {k: v for k, v in history(every=1).items() if k != "val_epoch"},
    ],
    ids=["nothing", "no epoch", "one epoch", "gaps alone", "several classes", "validation in every epoch"],
)
def test_gaps_and_short_histories_are_drawn_without_a_word(tmp_path: Path, given: dict[str, list[Any]]) -> None:
    picture = drawn(given, tmp_path / "progress.png")
    assert bool(count(picture, TRAIN)) == any(v is not None for v in given.get("train_loss", []))


def test_the_kept_epoch_is_the_first_of_the_best_swept_ones() -> None:
    assert _Curves(history()).best_epoch() == 6
    assert _Curves({"val_epoch": [1, 2, 3, 4], "val_best_dice": [None, 0.5, 0.5, math.nan]}).best_epoch() == 2
    assert _Curves({"val_epoch": [1, 2], "val_best_dice": [None, None], "val_dice": [0.1, 0.4]}).best() == (2.0, 0.4)
    assert _Curves({"epoch": [1], "train_dice": [0.9]}).best_epoch() is None


def test_the_line_stands_at_the_epoch_that_is_given(tmp_path: Path) -> None:
    own, other = (drawn(history(), tmp_path / "p.png", chosen=chosen) for chosen in (None, 10))
    columns = np.flatnonzero((own[60:300, :500] != other[60:300, :500]).any((0, 2)))
    left, right = columns.min(), columns.max()
    assert right - left > 100  # the line moved from epoch 6 to 10 of 12


def test_lists_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="val_dice has 5 values for the 6 of val_epoch"):
        drawn({**history(), "val_dice": [0.1] * 5}, tmp_path / "progress.png")
    assert not list(tmp_path.iterdir())
