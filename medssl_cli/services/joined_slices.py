"""Slices of several cases computed together where they have one size, each vector put back in its place.

Letters: N slices of a case, B slices computed together, S sequences or colour channels, H W pixels, h w patches,
D width of a slice vector, E width of the network.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from medssl_cli.core.case import Case
from medssl_cli.core.errors import MedsslError
from medssl_cli.data.feature_store import ImageFacts
from medssl_cli.services.backbone import Planes
from medssl_cli.services.case_vectors import CaseVectors


@dataclass
class Job:
    """One view of one case on its way to vectors.

    Args:
        key, fields: Of the cache.
        flips: Whether rows and columns are turned round.
        result: Of the cache, or the fault of the case; None if it is to be computed.
        planes: Until the last slice is on its way.
        left: Slices that the network has not seen yet.
    """

    case: Case
    view: int
    key: str
    fields: dict[str, Any]
    flips: tuple[bool, bool] = (False, False)
    result: CaseVectors | MedsslError | None = None
    planes: Planes | None = None
    facts: ImageFacts | None = None
    indices_N: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    available_S: np.ndarray = field(default_factory=lambda: np.empty(0, bool))
    left: int = 0
    slices_ND: np.ndarray | None = None
    patches_NShwD: np.ndarray | None = None

    @property
    def count(self) -> int:
        """Slices whose vectors are held."""
        return len(self.result.indices_N if isinstance(self.result, CaseVectors) else self.indices_N)


@dataclass
class _Batch:
    """Slices of one size that wait for each other: pieces (B, S, H, W), and whose they are."""

    images: list[Tensor] = field(default_factory=list)
    places: list[tuple[Job, slice]] = field(default_factory=list)

    @property
    def count(self) -> int:
        return sum(len(images) for images in self.images)


class Network(Protocol):
    """Who prepares and computes slices."""

    def network_size(self, planes: Planes) -> tuple[int, int]:
        """(height, width) of a slice as the network sees it."""

    def network_input(self, planes: Planes, indices: np.ndarray) -> Tensor:
        """(B, S, H, W) of some slices, normalised."""

    def forward(self, images_BSHW: Tensor, available_BS: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """(B, D) vectors, and (B, S, h, w, E) patch tokens where they are kept."""


class Joined:
    """The slices that wait for others of their size.

    Args:
        network: Told each batch once.
        batch_size: Slices computed together.
    """

    def __init__(self, network: Network, batch_size: int) -> None:
        self.network, self.batch_size = network, batch_size
        self._waiting: dict[tuple[int, ...], _Batch] = {}

    def add(self, job: Job) -> None:
        """Bring the slices of a case to the network; the last ones may wait for those of other cases."""
        planes, job.planes = job.planes, None
        if planes is None:
            return
        shape = (len(planes.stored_SNHW), *self.network.network_size(planes))
        start = 0
        while start < job.count:
            batch = self._waiting.setdefault(shape, _Batch())
            indices = job.indices_N[start : start + self.batch_size - batch.count]
            images = self.network.network_input(planes, indices)
            turned = [axis for axis, is_turned in zip((2, 3), job.flips, strict=True) if is_turned]
            batch.images.append(images.flip(turned) if turned else images)
            batch.places.append((job, slice(start, start + len(indices))))
            start += len(indices)
            if batch.count == self.batch_size:
                self._run(self._waiting.pop(shape))

    def finish(self, job: Job) -> None:
        """Compute what is still waiting of a case."""
        for shape, batch in list(self._waiting.items()):
            if any(owner is job for owner, _ in batch.places):
                self._run(self._waiting.pop(shape))

    def finish_all(self) -> None:
        """Compute all that is waiting."""
        while self._waiting:
            self._run(self._waiting.pop(next(iter(self._waiting))))

    def _run(self, batch: _Batch) -> None:
        counts = [part.stop - part.start for _, part in batch.places]
        available_BS = np.repeat([job.available_S for job, _ in batch.places], counts, axis=0)
        images = batch.images[0] if len(batch.images) == 1 else torch.cat(batch.images)
        vectors_BD, patches_BShwE = self.network.forward(images, available_BS)
        start = 0
        for (job, part), count in zip(batch.places, counts, strict=True):
            rows = slice(start, start + count)
            job.slices_ND = _filled(job.slices_ND, job.count, part, vectors_BD[rows])
            if patches_BShwE is not None:
                job.patches_NShwD = _filled(job.patches_NShwD, job.count, part, patches_BShwE[rows])
            job.left -= count
            start += count


def _filled(array: np.ndarray | None, count: int, part: slice, rows: np.ndarray) -> np.ndarray:
    """``rows`` at their place in an array of ``count`` rows, which is made with the first."""
    array = np.empty((count, *rows.shape[1:]), np.float32) if array is None else array
    array[part] = rows
    return array
