"""Slices with a class for every pixel as batches: epochs over a fixed list, and CT-PET triples kept decoded.

A *position* counts the samples of the whole run over all processes, epoch after epoch; it alone decides which slice is
taken and seeds what is drawn of it. So the stream is the same for any number of loader workers and after a resume.

Letters: B samples, S sequences, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from medssl_cli.core.protocols import IGNORE_LABEL, LabelledBatch
from medssl_cli.core.run import seed_for
from medssl_cli.data.ct_pet import Triple, read_all_labelled, read_labelled, read_pet_ct_mask, to_unit
from medssl_cli.data.datasets import Key, Loader

Decoded = tuple[np.ndarray, np.ndarray, np.ndarray]
"""CT and PET (H, W) as stored, mask (H, W) uint8 of 0 and 1."""


@dataclass(frozen=True)
class LabelledSample:
    """One element of a ``LabelledBatch``.

    Args:
        image_SHW: (S, H, W) float32 in [0, 1].
        label_HW: Class of each pixel, uint8 or int64; ``IGNORE_LABEL`` where none counts.
        available_S: Which sequences exist, bool.
        case_id: Whose, for messages.
    """

    image_SHW: Tensor
    label_HW: Tensor
    available_S: Tensor
    case_id: str


class LabelledSource(Protocol):
    """What ``build_labelled_loader`` and ``ordered_batches`` read from."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: Key) -> LabelledSample:
        """The sample of ``(position, index)``; whatever is drawn is drawn from the position."""

    def case_id(self, index: int) -> str:
        """Name of a slice, for messages."""


def collate_labelled(samples: Sequence[LabelledSample]) -> LabelledBatch:
    """Samples as one batch, padded at the bottom and right: images with zeros, labels with ``IGNORE_LABEL``."""
    sizes_B2 = torch.tensor([sample.label_HW.shape for sample in samples], dtype=torch.int64)
    height, width = (int(side) for side in sizes_B2.amax(0))
    images_BSHW = torch.zeros(len(samples), samples[0].image_SHW.shape[0], height, width)
    label_map_BHW = torch.full((len(samples), height, width), IGNORE_LABEL, dtype=torch.int64)
    for place, sample in enumerate(samples):
        h, w = sample.label_HW.shape
        images_BSHW[place, :, :h, :w] = sample.image_SHW
        label_map_BHW[place, :h, :w] = sample.label_HW
    return LabelledBatch(
        images_BSHW=images_BSHW,
        label_map_BHW=label_map_BHW,
        available_BS=torch.stack([sample.available_S for sample in samples]),
        sizes_B2=sizes_B2,
        case_ids=[sample.case_id for sample in samples],
    )


def ordered_batches(source: LabelledSource, batch_size: int) -> Iterator[LabelledBatch]:
    """Every sample once and in order, for validation.

    A batch ends early where the size of the slices changes, so that none is padded: padding would enter the instance
    norm of a network, and the answer for a slice would depend on its neighbours.
    """
    waiting: list[LabelledSample] = []
    for index in range(len(source)):
        sample = source[(index, index)]
        if waiting and (len(waiting) == batch_size or sample.label_HW.shape != waiting[0].label_HW.shape):
            yield collate_labelled(waiting)
            waiting = []
        waiting.append(sample)
    if waiting:
        yield collate_labelled(waiting)


class EpochSampler:
    """Epochs without end, each a new order of all slices; the last step of an epoch is small, and none is dropped.

    A step takes ``world x accumulation x batch_size`` samples of the epoch's order, cut into one run of neighbours for
    each micro-batch and, within it, for each rank: so two ranks of batch 4 see together what one of batch 8 sees. In
    the last step the samples that are left are shared as evenly as can be. Where they are fewer than the batches of the
    step, the batches without one take samples from the start of the epoch, each as it was drawn there: no process is
    ever without work, and those few samples count twice.

    Args:
        count: Slices.
        batch_size: Samples of one rank in one full micro-batch.
        seed: Of the run.
        start_step: First step, over all epochs.
        rank, world: Of the process group.
        accumulation: Micro-batches of a step.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        rank: int = 0,
        world: int = 1,
        accumulation: int = 1,
    ) -> None:
        if min(count, batch_size, accumulation) < 1 or start_step < 0 or not 0 <= rank < world:
            raise ValueError(
                f"no epochs of {count} slices from step {start_step} on, in batches of {batch_size} x {accumulation} "
                f"for rank {rank} of {world}"
            )
        self.count, self.batch_size, self.seed, self.start_step = count, batch_size, seed, start_step
        self.rank, self.world, self.accumulation = rank, world, accumulation
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    @property
    def step_samples(self) -> int:
        """Samples of a full step over all ranks."""
        return self.batch_size * self.world * self.accumulation

    @property
    def epoch_steps(self) -> int:
        """Steps of an epoch."""
        return -(-self.count // self.step_samples)

    def order(self, epoch: int) -> np.ndarray:
        """The slices of an epoch in their order."""
        if self._order[0] != epoch:
            shuffled = np.random.default_rng(seed_for(self.seed, "shuffle", epoch)).permutation(self.count)
            self._order = (epoch, shuffled)
        return self._order[1]

    def batch_at(self, number: int) -> list[Key]:
        """The keys (position, index) of micro-batch ``number`` of this rank, counted from ``start_step``."""
        steps, micro = divmod(number, self.accumulation)
        epoch, step = divmod(self.start_step + steps, self.epoch_steps)
        order = self.order(epoch)
        return [(epoch * self.count + place, int(order[place])) for place in self._places(step, micro)]

    def batches(self) -> Iterator[list[Key]]:
        """``batch_at(0)``, ``batch_at(1)``, … without end."""
        number = 0
        while True:
            yield self.batch_at(number)
            number += 1

    def _places(self, step: int, micro: int) -> range:
        """Where in the order of its epoch this rank's part of a micro-batch lies."""
        first = step * self.step_samples
        left = min(self.step_samples, self.count - first)
        batches, batch = self.world * self.accumulation, micro * self.world + self.rank
        if batch >= left:
            wrapped = (batch - left) % self.count
            return range(wrapped, wrapped + 1)
        each, more = divmod(left, batches)
        start = first + batch * each + min(batch, more)
        return range(start, start + each + (batch < more))


def build_labelled_loader(
    source: LabelledSource,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    accumulation: int = 1,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    timeout_s: float = 180.0,
    pin_memory: bool = False,
    prefetch: int = 2,
) -> Loader[LabelledBatch]:
    """An endless iterator over the micro-batches from a step on; the same stream for any number of workers.

    Args:
        source: Labelled slices.
        batch_size: Samples of one process in one full micro-batch.
        seed: Of the run.
        start_step: First step.
        accumulation: Micro-batches of one step; ``start_step`` counts whole steps.
        workers: Loader processes; 0 loads in this one.
        rank, world: Of the process group.
        timeout_s: Seconds that a batch may take before the run ends with an error.
        pin_memory: Copy batches into page-locked memory, for a GPU.
        prefetch: Batches that each worker keeps ready.
    """
    sampler = EpochSampler(len(source), batch_size, seed, start_step, rank, world, accumulation)
    return Loader(
        source,
        sampler,
        collate_labelled,
        workers=workers,
        timeout_s=timeout_s,
        pin_memory=pin_memory,
        prefetch=prefetch,
    )


class CtPetSource:
    """CT-PET slices with their masks.

    With ``cache_gb`` every file is read once when the source is made, by several threads, so that whatever is wrong is
    told before the first epoch, all bad files at once. The first slices stay in memory as stored, 8 or 16 bits a pixel,
    until the limit is reached; the others are read again when their turn comes. Workers of a loader that are forked
    share that memory; a worker that is started anew begins without it.

    Args:
        triples: Slices with masks.
        mask_threshold: As of ``read_pet_ct_mask``.
        cache_gb: Memory for decoded slices in GB (10**9 bytes); 0 keeps none and reads nothing ahead.
        workers: Threads that read ahead; None: as many as this machine has CPUs to spare.

    Raises:
        DataError: A file that cannot be used, as ``read_all_labelled``.
    """

    def __init__(
        self,
        triples: Sequence[Triple],
        *,
        mask_threshold: int | None = None,
        cache_gb: float = 4.0,
        workers: int | None = None,
    ) -> None:
        self.triples, self.mask_threshold = tuple(triples), mask_threshold
        self._kept: list[Decoded] = []
        self._lesions: list[bool] = []
        if cache_gb <= 0:
            return
        room = int(cache_gb * 10**9)
        for decoded in read_all_labelled(self.triples, mask_threshold=mask_threshold, workers=workers):
            self._lesions.append(bool(decoded[2].any()))
            room -= sum(array.nbytes for array in decoded)
            if room >= 0:  # one that is too large closes the cache, so that what is kept are the first
                self._kept.append(decoded)

    def __len__(self) -> int:
        return len(self.triples)

    def __getitem__(self, key: Key) -> LabelledSample:
        """The slice of ``(position, index)``; nothing is drawn here.

        Raises:
            DataError: It cannot be read.
        """
        index = key[1]
        if index < len(self._kept):
            ct, pet, mask = self._kept[index]
        else:
            ct, pet, mask = read_labelled(self.triples[index], mask_threshold=self.mask_threshold)
        return LabelledSample(
            image_SHW=torch.from_numpy(np.stack([to_unit(ct), to_unit(pet)])),
            label_HW=torch.from_numpy(mask),
            available_S=torch.ones(2, dtype=torch.bool),
            case_id=self.triples[index].name,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": []}  # not through a pipe to each worker

    def case_id(self, index: int) -> str:
        """Name of a slice, for messages."""
        return self.triples[index].name

    def with_lesion(self) -> list[int]:
        """Slices whose mask is not empty; all masks are read where nothing was read ahead.

        Raises:
            DataError: A mask cannot be read.
        """
        for triple in self.triples[len(self._lesions) :]:
            if triple.mask is None:
                raise ValueError(f"{triple.name} was found without masks")
            self._lesions.append(bool(read_pet_ct_mask(triple.mask, threshold=self.mask_threshold).any()))
        return [index for index, has_one in enumerate(self._lesions) if has_one]

    @property
    def kept(self) -> int:
        """Slices that lie decoded in memory."""
        return len(self._kept)
