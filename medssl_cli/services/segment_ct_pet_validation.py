"""Validation of a CT-PET network while it trains: every slice once, at its own size, with nothing kept but counts.

Slices go through the same reader and the same normaliser as those of inference, in batches of one size, so that none
is padded. Letters: B samples, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medssl_cli.core.protocols import LabelledBatch
from medssl_cli.core.run import worker_count
from medssl_cli.data.images import write_image
from medssl_cli.data.labelled_slices import CtPetSource, collate_labelled, ordered_batches
from medssl_cli.data.views import normalize
from medssl_cli.metrics.segmentation import counts, dice, f1, iou
from medssl_cli.metrics.surface import hausdorff_95
from medssl_cli.metrics.sweep import ThresholdSweep
from medssl_cli.objectives.segmentation import SegmentationLoss
from medssl_cli.report.mask_overlay import draw_masks, overlay_strip
from medssl_cli.report.overlay import window
from medssl_cli.services.read_ahead import read_ahead
from medssl_cli.services.segment_ct_pet_config import CtPetConfig
from medssl_cli.services.segment_job import SCORE, THRESHOLD_RESULTS

SHOWN = 8
"""Slices with an overlay."""
SIDE = 256
"""Side of a drawn slice in pixels, about: smaller ones are enlarged by a whole number."""
AT = 0.5
"""Threshold of the plain figures."""


def logits_of(network: nn.Module, batch: LabelledBatch, mean: float, std: float) -> Tensor:
    """(B, 1, H, W) float32 of slices as they come from the reader, on the device of the network."""
    device = next(network.parameters()).device
    moved = batch.to(device)
    return network(normalize(moved.images_BSHW.clone(), mean, std), None).float()


@dataclass
class Validation:
    """Figures of a network on the validation slices; called with it in eval mode.

    Args:
        source: Slices.
        loss: Of the training.
        config: Of the run.
        mean, std: Of the normaliser.
    """

    source: CtPetSource
    loss: SegmentationLoss
    config: CtPetConfig
    mean: float
    std: float

    @torch.no_grad()
    def __call__(self, network: nn.Module) -> dict[str, Any]:
        """``VAL_FIGURES``, ``score`` (the highest mean Dice of the sweep) and the table of the sweep."""
        sweep, losses = ThresholdSweep(), 0.0
        scores: list[tuple[float, float, float]] = []
        distances: list[float] = []
        with ThreadPoolExecutor(worker_count()) as pool:
            measured: Iterator[float] = iter(())
            for batch in read_ahead(ordered_batches(self.source, self.config.bs), 2):
                logits = logits_of(network, batch, self.mean, self.std)
                terms = self.loss(logits, batch.label_map_BHW.to(logits.device))
                losses += float(sum(value.double() for value in terms.values())) * len(batch.case_ids)
                probabilities_BHW = logits[:, 0].sigmoid().cpu().numpy()
                references_BHW = batch.label_map_BHW.numpy()
                images = zip(probabilities_BHW, references_BHW, batch.case_ids, strict=True)
                for probability_HW, reference_HW, name in images:
                    sweep.add(probability_HW, reference_HW, name)
                    tp, fp, fn, _ = counts(probability_HW >= AT, reference_HW)
                    scores.append((float(dice(tp, fp, fn)), float(iou(tp, fp, fn)), float(f1(tp, fp, fn))))
                distances += measured  # those of the batch before, measured while this one was computed
                if self.config.val_hd95:
                    measured = pool.map(_distance_px, probabilities_BHW >= AT, references_BHW != 0)
            distances += measured
        known = [value for value in distances if np.isfinite(value)]
        threshold, best = sweep.best()
        mean_dice, mean_iou, mean_f1 = np.mean(scores, axis=0).tolist()
        return {
            "val_loss": losses / len(scores),
            "val_dice": mean_dice,
            "val_iou": mean_iou,
            "val_f1": mean_f1,
            "val_hd95": float(np.mean(known)) if known else None,
            "val_best_dice": best,
            "val_best_threshold": threshold,
            SCORE: best,
            THRESHOLD_RESULTS: sweep.table(),
        }


@dataclass
class Overlays:
    """Pictures of some validation slices: CT and PET as they are, and with the reference and the prediction.

    Args:
        source: Slices.
        mean, std: Of the normaliser.
    """

    source: CtPetSource
    mean: float
    std: float

    @torch.no_grad()
    def __call__(self, network: nn.Module, folder: Path, threshold: float | None = None) -> None:
        """Write one PNG a slice into ``folder``; pixels count as predicted from ``threshold`` on, ``AT`` if None."""
        at = AT if threshold is None else threshold
        captions = ("CT", "green line: reference", "PET", f"filled: prediction from {at:g} on")
        for index in self.chosen():
            batch = collate_labelled([self.source[(index, index)]])
            predicted_HW = (logits_of(network, batch, self.mean, self.std)[0, 0].sigmoid() >= at).cpu().numpy()
            reference_HW = batch.label_map_BHW[0].numpy()
            scale = max(1, round(SIDE / max(reference_HW.shape)))
            panels = []
            for image_HW in batch.images_BSHW[0].numpy():
                grey = window(image_HW, 0.0, 1.0)
                panels.append(draw_masks(grey, None, None, scale=scale))
                panels.append(draw_masks(grey, reference_HW, predicted_HW, scale=scale))
            write_image(folder / Path(batch.case_ids[0]).with_suffix(".png").name, overlay_strip(panels, captions))

    def chosen(self) -> list[int]:
        """Slices spread over the list, those with a lesion first."""
        with_lesion = self.source.with_lesion()
        others = [index for index in range(len(self.source)) if index not in set(with_lesion)]
        return sorted([*_spread(with_lesion, SHOWN), *_spread(others, max(0, SHOWN - len(with_lesion)))])


def _spread(indices: Sequence[int], count: int) -> list[int]:
    """Up to ``count`` of them, evenly spaced."""
    if len(indices) <= count:
        return list(indices)
    return [indices[round(place)] for place in np.linspace(0, len(indices) - 1, count)] if count else []


def _distance_px(prediction_HW: np.ndarray, reference_HW: np.ndarray) -> float:
    return hausdorff_95(prediction_HW, reference_HW, (1.0, 1.0))
