"""A batch with a class for every pixel moves as one."""

from __future__ import annotations

import torch

from medssl_cli.core.protocols import IGNORE_LABEL, LabelledBatch


def batch() -> LabelledBatch:
    return LabelledBatch(
        images_BSHW=torch.rand(3, 2, 4, 5),
        label_map_BHW=torch.full((3, 4, 5), IGNORE_LABEL),
        available_BS=torch.ones(3, 2, dtype=torch.bool),
        sizes_B2=torch.tensor([[4, 5]] * 3),
        case_ids=["a", "b", "c"],
    )


def test_every_part_moves_and_the_ids_stay() -> None:
    moved = batch().to(torch.device("meta"))
    parts = (moved.images_BSHW, moved.label_map_BHW, moved.available_BS, moved.sizes_B2)
    assert {part.device.type for part in parts} == {"meta"}
    assert moved.case_ids == ["a", "b", "c"]


def test_the_sample_with_a_nan_is_told() -> None:
    broken = batch()
    broken.images_BSHW[1, 0, 2, 3] = float("nan")
    assert broken.finite_samples().tolist() == [True, False, True]
