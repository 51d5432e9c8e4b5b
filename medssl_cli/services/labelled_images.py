"""Labelled cases as the network sees them, and their embeddings: one row a case, whatever the size of its images.

A volume is shown as training prepares it, without any draw: the slice with most region of interest, or the middle one,
cut to the training window. A picture is shown whole, as ``medssl infer`` shows it.

Letters: N cases, B images computed together, S sequences or colour channels, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from medssl_cli.core.case import Case
from medssl_cli.core.protocols import Features
from medssl_cli.core.volume import AXIAL
from medssl_cli.data.datasets import (
    DataConfig,
    ImageDataset,
    Key,
    Sample,
    SliceDataset,
    output_size,
    plan_window,
    window_size,
)
from medssl_cli.data.store import SliceFacts, Store
from medssl_cli.services.backbone import Backbone

Autocast = Callable[[], AbstractContextManager[object]]
Tokens = Literal["cls", "mean", "cls_mean"]


class EvenSlices(SliceDataset):
    """Axial slices without any draw: key (n, case) gives the n-th of those that are looked at.

    Args:
        store: Prepared volumes.
        config: Of the run.
        count: 1 takes the slice with most region of interest, or the middle one, as ``data.split: VAL`` does.
    """

    def __init__(self, store: Store, config: DataConfig, count: int) -> None:
        plain = {"split": "VAL", "random_axes": False, "random_slices": False, "append_label_mask": False}
        super().__init__(store, config.model_copy(update=plain), seed=0)
        self.count, self._nth = count, 0

    def __getitem__(self, key: Key) -> Sample:
        """The n-th slice of a case that is looked at; ``key`` is (n, case)."""
        self._nth = key[0]
        return super().__getitem__(key)

    def indices(self, case: int) -> list[int]:
        """Slices of a case: evenly spaced over those with region of interest, else over those that hold an image.

        Fewer slices than ``count`` are all taken.
        """
        return self._spread(self.store.slice_facts(case, AXIAL), case in self._roi_allowed)

    def output_size(self, case: int) -> tuple[int, int]:
        """(height, width) of every slice of a case."""
        shape, spacing = self._plane(case, AXIAL)
        window = plan_window(shape, window_size(self.config.spatial_size, spacing), None)
        return output_size(window[2:], spacing, self.config.spatial_size)

    def _choose_slice(self, facts: SliceFacts, roi: bool, draw: np.random.Generator) -> int:
        return super()._choose_slice(facts, roi, draw) if self.count == 1 else self._spread(facts, roi)[self._nth]

    def _spread(self, facts: SliceFacts, roi: bool) -> list[int]:
        if self.count == 1:
            return [super()._choose_slice(facts, roi, np.random.default_rng(0))]
        inside = np.asarray(facts.roi_pixels_N > 0)
        filled = inside if roi and inside.any() else np.any(facts.high_NS > facts.low_NS, axis=1)
        candidates = np.flatnonzero(filled) if filled.any() else np.arange(len(filled))
        count = min(self.count, len(candidates))
        places = (np.arange(count) + 0.5) * len(candidates) / count  # the middle of each of `count` equal parts
        return [int(candidates[int(place)]) for place in places]


@dataclass(frozen=True)
class _Image:
    """One image of one case.

    Args:
        row: Of the embeddings.
        key: For the dataset.
        stored: (height, width) as it comes.
        size: (height, width) as the network sees it.
    """

    row: int
    key: Key
    stored: tuple[int, int]
    size: tuple[int, int]


class LabelledImages:
    """Prepared images of labelled cases.

    Args:
        store: Holds all of them.
        data: Of the run.
        slices: Of a volume; see ``EvenSlices``.
        max_side: Longer side of a picture in pixels.
        batch_size: Images computed together; memory does not grow with the number of cases beyond their embeddings.
        tokens: What an image's embedding is made of: the cls token, the mean patch token, or both end to end.
    """

    def __init__(
        self,
        store: Store,
        data: DataConfig,
        *,
        slices: int = 1,
        max_side: int = 518,
        batch_size: int = 32,
        tokens: Tokens = "cls",
    ) -> None:
        self.store, self.max_side, self.batch_size, self.tokens = store, max_side, batch_size, tokens
        self.dataset = EvenSlices(store, data, slices) if store.kind == "volumes" else ImageDataset(store)
        self._place = {case_id: place for place, case_id in enumerate(store.case_ids())}

    @property
    def sequences(self) -> tuple[str, ...] | None:
        """Of a case; None where the network takes plain pictures."""
        return self.dataset.sequences

    def held(self, cases: Sequence[Case]) -> list[Case]:
        """The cases that could be prepared."""
        return [case for case in cases if case.case_id in self._place]

    def available(self, case: Case) -> np.ndarray:
        """(S,) bool: the sequences that a case has; one True for a picture."""
        if self.sequences is None:
            return np.ones(1, dtype=bool)
        return np.asarray(self.store.facts(self._place[case.case_id]).available_S, dtype=bool)

    @torch.no_grad()
    def embed(
        self,
        cases: Sequence[Case],
        backbone: Backbone,
        autocast: Autocast,
        shown: Mapping[str, np.ndarray] | None = None,
    ) -> np.ndarray:
        """Embeddings of the cases, averaged over their slices, (N, D) float32; (N, 2D) for cls and mean.

        Args:
            cases: Each prepared.
            backbone: In evaluation mode.
            autocast: Number format of the run.
            shown: (S,) bool by case id, which of the sequences count; the tokens of all others are mask tokens. None:
                all that the case has.

        Raises:
            DataError: A prepared file is missing or damaged; names the case.
        """
        sums_ND = np.zeros((len(cases), backbone.model.embed_dim * (1 + (self.tokens == "cls_mean"))))
        counts_N = np.zeros(len(cases))
        for images in self._batches(cases, backbone):
            samples = [self.dataset[image.key] for image in images]
            stack = np.stack([_in_colour(sample.image_SHW.numpy(), backbone) for sample in samples])
            masks = self._masks([cases[image.row] for image in images], shown)
            with autocast():
                seen = backbone.to_network(stack, images[0].size)
                features = backbone.model(seen, None, None if masks is None else masks.to(backbone.device))
            for image, row_D in zip(images, self._pooled(features).cpu().numpy(), strict=True):
                sums_ND[image.row] += row_D
                counts_N[image.row] += 1
        return (sums_ND / counts_N[:, None]).astype(np.float32)

    def _pooled(self, features: Features) -> Tensor:
        """(B, D) float32, or (B, 2D)."""
        parts = [] if self.tokens == "mean" else [features.cls_BD.float()]
        if self.tokens != "cls":
            parts.append(features.patches_BND.float().mean(1))
        return torch.cat(parts, dim=1)

    def _batches(self, cases: Sequence[Case], backbone: Backbone) -> Iterator[list[_Image]]:
        """Images of one size together."""
        groups: dict[tuple[object, ...], list[_Image]] = {}
        for row, case in enumerate(cases):
            for image in self._images(row, self._place[case.case_id], backbone):
                groups.setdefault((image.size, image.stored), []).append(image)
        for _, images in sorted(groups.items()):
            for start in range(0, len(images), self.batch_size):
                yield images[start : start + self.batch_size]

    def _images(self, row: int, case: int, backbone: Backbone) -> list[_Image]:
        if isinstance(self.dataset, EvenSlices):
            stored, count = self.dataset.output_size(case), len(self.dataset.indices(case))
        else:
            stored, count = self.store.facts(case).shape[1:], 1
        size = backbone.network_size(stored, (1.0, 1.0), self.max_side)
        return [_Image(row, (nth, case), stored, size) for nth in range(count)]

    def _masks(self, cases: Sequence[Case], shown: Mapping[str, np.ndarray] | None) -> Tensor | None:
        """(B, S) bool, which sequences count; None for plain pictures."""
        if self.sequences is None:
            return None
        every = [
            self.available(case) if shown is None else self.available(case) & shown[case.case_id] for case in cases
        ]
        return torch.from_numpy(np.stack(every))


def _in_colour(image_CHW: np.ndarray, backbone: Backbone) -> np.ndarray:
    """One grey channel repeated where the normalisation is made for several, as training repeats it."""
    if backbone.model.sequences is None and len(image_CHW) == 1 < backbone.colours:
        return np.repeat(image_CHW, backbone.colours, axis=0)
    return image_CHW
