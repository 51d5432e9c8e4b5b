from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medssl_cli.report import masks_plots
from medssl_cli.report.masks_page import masks_page
from medssl_cli.report.masks_plots import Outlines


def metric(value: float | None, definition: str = "what it is; said at length") -> dict[str, Any]:
    reason = {"reason": "it is defined for no case"} if value is None else {}
    ends = {"ci_low": None if value is None else value - 0.1, "ci_high": None if value is None else value + 0.1}
    return {"value": value, **ends, "definition": definition, "n": 4, "n_groups": 2, "std": 0.2, **reason}


def facts(**more: Any) -> dict[str, Any]:
    spread = {"mean": 0.7, "std": None, "n": 1}
    names = ("dice", "iou", "accuracy", "f1", "nsd", "hd95", "assd", "volume_error_ml")
    of_each = {name: metric(0.7) for name in ("dice", "dice_non_empty", "iou", "nsd", "precision", "recall")}
    return {
        "task": "segmentation",
        "classes": ["background", "gland", "tumour"],
        "n": 4,
        "n_groups": 2,
        "group_by": "patient_id",
        "metrics": {"dice": metric(0.7), "hd95": metric(None)},
        "per_class": {"gland": of_each, "tumour": of_each},
        "overall": {name: {"definition": "x", "cases": spread, "patients": spread} for name in names},
        "empty_rules": "Both empty: 1.",
        "boundary_definition": "said at length",
        "empty_by_class": {
            name: {"n_empty_truth": 1, "n_both_empty": 0, "n_missed": 0, "n_false_alarm": 1}
            for name in ("gland", "tumour")
        },
        "distance_unit": "mm",
        "n_failed": 1,
        "extra_predictions": ["<b>stranger</b>.nii.gz"],
        **more,
    }


WORST = {"case_id": "<i>a</i>", "dice": 0.25, "hd95": 12.0, "slice": 3, "n_slices": 9}


def test_the_page_holds_all_sections_and_escapes_names() -> None:
    picture = masks_plots.draw_case(Outlines(None, np.eye(8, dtype=np.uint8), np.ones((8, 8), np.uint8)))
    text = masks_page(facts(notes=["mind <this>"]), {"Dice": b"\x89PNG"}, [(WORST, picture)]).render()
    for part in (
        "Segmentation of gland, tumour: 4 cases of 2 patients.",
        "Each structure",
        "Mean and standard deviation",
        "Empty masks",
        "Cases with the lowest Dice",
        "Left out",
        "&lt;i&gt;a&lt;/i&gt;: Dice 0.250, HD95 12.0 mm",
        "slice 4 of 9",
        "mind &lt;this&gt;",
        "&lt;b&gt;stranger&lt;/b&gt;.nii.gz",
        "it is defined for no case",
        "failures.csv",
    ):
        assert part in text, part
    assert "<i>a</i>" not in text
    assert "<b>stranger" not in text
    assert text.count("said at length") == 1, "the boundary is defined once"


def test_what_is_not_there_leaves_its_section_out() -> None:
    none = {name: dict.fromkeys(counts, 0) for name, counts in facts()["empty_by_class"].items()}
    text = masks_page(facts(empty_by_class=none, n_failed=0, extra_predictions=[]), {}, []).render()
    for part in ("Empty masks", "Left out", "Lesions", "lowest Dice", "Groups of cases", "Compared"):
        assert part not in text


def picture_of(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("image", [None, np.zeros((40, 40)), np.zeros((40, 40, 3), np.uint8)])
def test_the_colours_tell_who_drew_what(image: np.ndarray | None) -> None:
    prediction, reference = np.zeros((40, 40), np.uint8), np.zeros((40, 40), np.uint8)
    prediction[:20, :], reference[:, :20] = 1, 1
    found = picture_of(masks_plots.draw_case(Outlines(image, prediction, reference)))
    assert found.shape == (
        masks_plots.SIDE,
        masks_plots.SIDE * (1 if image is None else 2) + 2 * (image is not None),
        3,
    )
    right = found[:, -masks_plots.SIDE :].astype(int)
    quarter, three = masks_plots.SIDE // 4, 3 * masks_plots.SIDE // 4
    both, alone, missed = right[quarter, quarter], right[quarter, three], right[three, quarter]
    assert both.argmax() == 1, "green"
    assert alone.argmax() == 0, "red"
    assert missed.argmax() == 2, "blue"


def test_planes_are_turned_as_they_are_read() -> None:
    prediction = np.zeros((40, 40), np.uint8)
    prediction[:10, :10] = 1
    plane = Outlines(None, prediction, np.zeros_like(prediction), flip=(True, True))
    found = picture_of(masks_plots.draw_case(plane)).astype(int)
    assert found[-50, -50, 0] > 90 > found[50, 50, 0]


def test_plots_of_little_or_nothing_are_drawn() -> None:
    boxes = masks_plots.draw_boxes({"a": np.array([0.2, 0.4, np.nan]), "b": np.full(3, np.nan)}, "Dice", ends=(0, 1))
    froc = masks_plots.draw_froc({"a": [(0.0, 0.2), (0.5, 0.8)], "b": []})
    many = masks_plots.draw_boxes({"a": np.random.default_rng(0).random(900)}, "Dice")
    for data in (boxes, froc, many):
        assert picture_of(data).shape[0] > 200
