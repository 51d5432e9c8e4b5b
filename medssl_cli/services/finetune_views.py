"""Decoded cases for training: kept in memory as far as it goes, and shown as random views of some of their slices.

A view is a random part of a slice, mirrored or not, resized to what the network sees of the whole slice. Each draw is
a function of the seed, the epoch and the case alone.

Letters: K slices of a case that are shown, S sequences or colour channels, H W pixels as stored, h w as the network
sees them.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from medssl_cli.core.case import Case
from medssl_cli.core.run import seed_for
from medssl_cli.data.transforms import AreaCrop, put, resampling_matrices
from medssl_cli.data.views import normalize
from medssl_cli.services.backbone import Backbone, Planes
from medssl_cli.services.embedding import Embedder
from medssl_cli.services.finetune_config import FinetuneConfig

A = TypeVar("A")
B = TypeVar("B")
_UNIT = 4096
"""Boxes are drawn on a square of so many places, whatever the proportions of the slice."""


class CaseImages:
    """The slices of cases, as the embedder reads them; kept in memory until a limit is reached.

    Args:
        embedder: Reads them.
        cache_gb: Limit in GB.
    """

    def __init__(self, embedder: Embedder, cache_gb: float) -> None:
        self._embedder, self._room = embedder, cache_gb * 1e9
        self._kept: dict[str, Planes] = {}
        self._lock = threading.Lock()

    def planes(self, case: Case) -> Planes:
        """The slices of a case; several threads may ask at a time.

        Raises:
            DataError: As ``Embedder.planes``.
        """
        found = self._kept.get(case.case_id)
        if found is None:
            found = self._embedder.planes(case)
            size = _bytes_of(found)
            with self._lock:
                if size <= self._room and case.case_id not in self._kept:
                    self._kept[case.case_id] = found
                    self._room -= size
        return found


def _bytes_of(planes: Planes) -> int:
    arrays = {id(planes.stored_SNHW): planes.stored_SNHW}
    if planes.prepared is not None:
        arrays[id(planes.prepared.images_SZYX)] = planes.prepared.images_SZYX
    return sum(array.nbytes for array in arrays.values())


def in_order(work: Callable[[A], B], items: Iterable[A], threads: int) -> Iterator[B]:
    """``map`` with some threads that work ahead; results in the order of the items, errors in their place."""
    if threads == 0:
        yield from map(work, items)
        return
    rest = iter(items)
    waiting: deque[Future[B]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="read-ahead") as pool:
        try:
            waiting.extend(pool.submit(work, item) for item in itertools.islice(rest, threads + 1))
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(work, item) for item in itertools.islice(rest, 1))
                yield result
        finally:
            for one in waiting:
                one.cancel()


# --- one case in one epoch -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """Some slices of a case, not yet changed.

    Args:
        place: Position of the case among the training cases.
        images_KSHW: In [0, 1].
        available_S: Which sequences exist.
        size: (h, w) as the network sees the whole slice.
        seed: Of its views.
    """

    place: int
    images_KSHW: np.ndarray
    available_S: np.ndarray
    size: tuple[int, int]
    seed: int


class CaseViews:
    """Cases to random views of some of their slices.

    Args:
        images: The cases.
        embedder: Tells which slices count, and how large the network sees them.
        config: How many slices, and how they are changed.
        seed: Of the run.
        pictures: The cases are pictures.
    """

    def __init__(
        self, images: CaseImages, embedder: Embedder, config: FinetuneConfig, seed: int, *, pictures: bool
    ) -> None:
        self.images, self.embedder, self.config, self.seed = images, embedder, config, seed
        self.crop = AreaCrop(config.crops(pictures=pictures), config.crop_aspect)
        self.flips = config.flips(pictures=pictures)

    def read(self, case: Case, place: int, epoch: int) -> Shown:
        """The slices of a case that are shown in an epoch: all, or some drawn without putting back.

        Raises:
            DataError: As ``Embedder.planes``.
        """
        planes = self.images.planes(case)
        indices = self.embedder.indices(planes)
        rng = np.random.default_rng(seed_for(self.seed, "finetune slices", epoch, case.case_id))
        if len(indices) > self.config.slices_per_case:
            indices = np.sort(rng.choice(indices, self.config.slices_per_case, replace=False))
        seed = seed_for(self.seed, "finetune views", epoch, case.case_id)
        return Shown(place, planes.batch(indices), planes.available_S, self.embedder.network_size(planes), seed)

    def show(self, shown: Shown) -> Tensor:
        """(K, S, h, w) normalised views on the network's device."""
        backbone: Backbone = self.embedder.backbone
        images_KSHW = put(shown.images_KSHW, backbone.device)
        draws = draw_views(*_sizes(images_KSHW), self.crop, self.flips, np.random.default_rng(shown.seed))
        return normalize(apply_views(images_KSHW, draws, shown.size), backbone.mean, backbone.std)


def _sizes(images_KSHW: Tensor) -> tuple[int, int, int]:
    count, _, height, width = images_KSHW.shape
    return count, height, width


@dataclass(frozen=True)
class ViewDraws:
    """What was drawn for some slices of one size.

    Args:
        boxes_K4: int64 (top, left, height, width) in pixels as stored.
        flip_rows_K, flip_columns_K: Mirrored top to bottom, left to right.
    """

    boxes_K4: Tensor
    flip_rows_K: np.ndarray
    flip_columns_K: np.ndarray


def draw_views(
    count: int, height: int, width: int, crop: AreaCrop, flips: tuple[bool, bool], rng: np.random.Generator
) -> ViewDraws:
    """Boxes and mirrors of ``count`` slices.

    A box has the proportions of the whole slice times the drawn aspect, so that a view is distorted by that alone.

    Args:
        count: Slices.
        height, width: Theirs, in pixels as stored.
        crop: Share of the area, and aspect.
        flips: Whether half of the slices are mirrored top to bottom, and left to right.
        rng: Source of every draw.
    """
    units_K4 = crop.draw(1, torch.full((count, 2), _UNIT), None, rng)
    whole = torch.tensor([height, width], dtype=torch.float64)
    sides_K2 = (units_K4[:, 2:] * whole / _UNIT).round().clamp_min(1)
    corners_K2 = (units_K4[:, :2] * whole / _UNIT).round().minimum(whole - sides_K2)
    mirrored = rng.random((2, count)) < 0.5
    boxes_K4 = torch.cat([corners_K2, sides_K2], 1).long()
    return ViewDraws(boxes_K4, mirrored[0] & flips[0], mirrored[1] & flips[1])


def apply_views(images_KSHW: Tensor, draws: ViewDraws, size: tuple[int, int]) -> Tensor:
    """(K, S, H, W) -> (K, S, h, w) in [0, 1]: the boxes, resized as whole slices are (antialiased, bicubic), mirrored.

    Sequences that do not exist are zeros and stay so.
    """
    device = images_KSHW.device
    height, width = images_KSHW.shape[-2:]
    boxes_K4 = put(draws.boxes_K4, device)
    flip_rows_K, flip_columns_K = put(draws.flip_rows_K, device), put(draws.flip_columns_K, device)
    rows_KhH = resampling_matrices(boxes_K4[:, 0], boxes_K4[:, 2], size[0], height, flip_rows_K)
    columns_KwW = resampling_matrices(boxes_K4[:, 1], boxes_K4[:, 3], size[1], width, flip_columns_K)
    across = images_KSHW @ columns_KwW[:, None].transpose(-1, -2)
    return (rows_KhH[:, None] @ across).clamp_(0, 1)
