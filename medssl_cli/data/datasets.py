"""Prepared slices and pictures as batches: every draw is a pure function of the seed and the position in the stream.

A *position* counts the samples of the whole run over all processes: 0, 1, 2, … It alone decides which case is taken,
which axis, which slice. So the stream is the same for any number of loader workers, any split of a global batch over
ranks or accumulation steps, and after a resume; and no draw repeats from one pass to the next.

Letters: B samples, S sequences, H W pixels.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

import blosc2
import numpy as np
import torch
from pydantic import Field, PositiveInt, field_validator, model_validator
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from medssl_cli.core.case import Case
from medssl_cli.core.config import Config
from medssl_cli.core.errors import ConfigError, MedsslError, ResourceError
from medssl_cli.core.protocols import SliceBatch
from medssl_cli.core.run import seed_for
from medssl_cli.core.volume import AXIAL, AXIS_NAMES, Spacing
from medssl_cli.data.layouts import LayoutChoice, check_template
from medssl_cli.data.modalities import find_modality, unknown_modality
from medssl_cli.data.preprocess import PreprocessConfig, scale_to_unit
from medssl_cli.data.store import SliceFacts, Store, StoredSlice, Window, build_store

log = logging.getLogger(__name__)

MAX_ANISOTROPY = 3.0
"""A plane whose pixels are longer than this in one direction is no picture of anything: 3 mm slices cut across."""

HuWindow = tuple[str, float, float]
"""(name, value that becomes 0, value that becomes 1)."""

_SQUARE = 1.05  # pixels count as square up to this ratio of their sides
_POLL_S = 1.0


class DataConfig(Config):
    """Which images, and how a slice is drawn from a case."""

    root: str = ""
    """Folder of the case tree, a series table (CSV), an image tree or another layout, see `layout`."""
    layout: LayoutChoice = "auto"
    """How the files under `root` are named: `<case>/<sequence>.nii.gz` (cases), pictures, a table, the raw folder of
    nnU-Net, the Medical Segmentation Decathlon, mm-dinov2, or as `template` says; auto looks."""
    template: str = ""
    """Path of a sequence with the fields {subject}, {dataset}, {relative} and {sequence}, e.g.
    {subject}/{sequence}.nii.gz; without one of the first three it counts from the folder of the case."""
    modality: str = ""
    """Kind of pictures: fundus, oct, external, ubm, ultrasound, mri, slitlamp or ffa, in any usual spelling. Where
    `root` has a folder of that name, that folder is read."""
    split_csv: str | None = None
    """Table with the ids to use; all cases of `root` when not given."""
    split: Literal["TRAIN", "VAL", "TEST"] = "TRAIN"
    """TRAIN draws axes and slices at random; VAL and TEST take the same slice each time."""
    kind: Literal["auto", "volumes", "images"] = "auto"
    """Volumes, pictures, or as the files under `root` show."""
    mri_sequences: tuple[str, ...] = ("ax_t2wi", "ax_adc", "ax_dwi")
    """Sequences in channel order; a list, or one text with commas."""
    random_axes: bool = False
    """TRAIN only: axial, coronal or sagittal, drawn alike among those that the voxels of a case do not distort;
    `preprocess.resample_mm` makes them all usable."""
    random_slices: bool = False
    """TRAIN only: any slice with enough region of interest, instead of the one with the most."""
    roi: str = "roi_Prostate"
    """File stem of the region of interest, which steers the choice of slice and window; optional for each case."""
    append_label_mask: bool | None = None
    """Hand the region of interest on to the views; if not given, as `crops.crop_from_tumor_foreground` says. Slices are
    chosen by it either way."""
    min_roi_pixels: PositiveInt = 1
    """Pixels of the region of interest that make a slice one to draw."""
    spatial_size: PositiveInt = 224
    """Side in pixels of the square window cut from a slice."""
    windows_hu: tuple[HuWindow, ...] | None = None
    """CT: windows in HU that become the channels of a picture, in this order, e.g.
    {brain: [0, 80], subdural: [-20, 180], bone: [-800, 2000]}. For volumes of one sequence; instead of
    `preprocess.window_hu`."""
    as_pictures: bool | None = None
    """Hand the slices of volumes of one sequence to a backbone for plain pictures. If not given: with `windows_hu`, and
    for a table of volumes."""
    percentage_labels: float = 1.0
    """Share of the cases with a region of interest that may use it, clipped to 0..1; with 0 no such file is read."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a bad case does: stop the run before it trains, or be left out and listed."""
    preprocess: PreprocessConfig = Field(default_factory=PreprocessConfig)
    """Grid and intensity limits."""

    @field_validator("mri_sequences", mode="before")
    @classmethod
    def _split_names(cls, value: Any) -> Any:
        return [name.strip() for name in value.split(",")] if isinstance(value, str) else value

    @field_validator("mri_sequences")
    @classmethod
    def _names_differ(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or not all(value) or len(set(value)) != len(value):
            raise ValueError("one or more different names are needed")
        return value

    @field_validator("windows_hu", mode="before")
    @classmethod
    def _windows_as_list(cls, value: Any) -> Any:
        """A mapping becomes a list, in which a change of the order shows."""
        if not isinstance(value, Mapping):
            return value
        if not all(isinstance(limits, (list, tuple)) for limits in value.values()):
            raise ValueError("each window is [low, high]")
        return [[name, *limits] for name, limits in value.items()]

    @field_validator("windows_hu")
    @classmethod
    def _windows_differ(cls, value: tuple[HuWindow, ...] | None) -> tuple[HuWindow, ...] | None:
        if value is not None and (not value or len({name for name, _, _ in value}) < len(value)):
            raise ValueError("one or more windows of different names are needed")
        for name, low, high in value or ():
            if not low < high:
                raise ValueError(f"the lower end of the window {name!r} must be below its upper end")
        return value

    @field_validator("modality")
    @classmethod
    def _known_modality(cls, value: str) -> str:
        if not value:
            return value
        modality = find_modality(value)
        if modality is None:
            raise ValueError(unknown_modality(value))
        return modality.name

    @field_validator("template")
    @classmethod
    def _fields_known(cls, value: str) -> str:
        if value:
            check_template(value)
        return value

    @model_validator(mode="after")
    def _fit_together(self) -> DataConfig:
        faults = []
        if self.windows_hu is not None and self.preprocess.window_hu is not None:
            faults.append("windows_hu and preprocess.window_hu exclude each other: one is of several windows")
        if self.windows_hu is not None and self.as_pictures is False:
            faults.append("windows_hu makes pictures: as_pictures cannot be false")
        if self.layout == "template" and not self.template:
            faults.append("layout template needs a template such as {subject}/{sequence}.nii.gz")
        if self.template and self.layout not in ("auto", "template"):
            faults.append(f"template has no effect with layout {self.layout}")
        wanted = {"images": "images", "auto": self.kind, "table": self.kind}.get(self.layout, "volumes")
        if self.kind not in ("auto", wanted):
            faults.append(f"kind {self.kind} contradicts layout {self.layout}")
        if faults:
            raise ValueError("; ".join(f"data.{text}" for text in faults))
        return self

    @field_validator("split", mode="before")
    @classmethod
    def _upper(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value

    @field_validator("percentage_labels")
    @classmethod
    def _clip(cls, value: float) -> float:
        clipped = min(1.0, max(0.0, value))
        if clipped != value:
            log.warning("data.percentage_labels=%s is a share: taken as %s", value, clipped)
        return clipped


@dataclass
class Sample:
    """One element of a batch.

    Args:
        image_SHW: (S, H, W) float32 in [0, 1].
        available_S: Which sequences exist.
        case_id: Whose.
        roi_HW: Boolean mask; None when the run uses none.
        axis, index: Which plane; -1 for a picture.
        window: Part of the stored plane it was cut from, (top, left, height, width).
    """

    image_SHW: Tensor
    available_S: Tensor
    case_id: str
    roi_HW: Tensor | None = None
    axis: int = -1
    index: int = -1
    window: Window = (0, 0, 0, 0)


Key = tuple[int, int]
"""(position in the stream, case)."""


class SampleSource(Protocol):
    """What ``build_loader`` reads from."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: Key) -> Sample: ...

    def case_id(self, case: int) -> str:
        """Id of a case, for messages."""


BatchT = TypeVar("BatchT", bound="Pinnable")


class Pinnable(Protocol):
    """A batch of any kind, as ``Loader`` hands it out."""

    def pin_memory(self: BatchT) -> BatchT:
        """The same batch in page-locked memory."""


class KeyedSource(Protocol):
    """What ``Loader`` reads from: samples of any kind by key."""

    def __getitem__(self, key: Key) -> Any: ...

    def case_id(self, case: int) -> str:
        """Id of a case, for messages."""


class BatchKeys(Protocol):
    """Which keys make which batch of ``Loader``."""

    def batch_at(self, number: int) -> list[Key]:
        """The keys of batch ``number``, counted from where the sampler starts."""

    def batches(self) -> Iterator[list[Key]]:
        """``batch_at(0)``, ``batch_at(1)``, … without end."""


def prepare_store(
    cases: list[Case],
    config: DataConfig,
    cache: Path,
    *,
    kind: Literal["volumes", "images"],
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Store:
    """The store that ``config`` asks for, built where it is not there yet; see ``build_store``.

    With ``percentage_labels: 0`` the files of regions of interest are neither looked at nor read.
    """
    if config.percentage_labels == 0:
        cases = [Case(**{**case.__dict__, "roi": None}) for case in cases]
    names = config.mri_sequences if kind == "volumes" else ("image",)
    return build_store(
        cases,
        names,
        config.preprocess,
        cache,
        kind=kind,
        workers=workers,
        on_error=config.on_error,
        progress=progress,
    )


class SliceDataset:
    """Slices of prepared volumes, cut to a window and scaled to [0, 1].

    A slice smaller than the window is enlarged until its longer side is ``spatial_size``; its shape stays, and the
    batch pads it. Where the pixels of a plane are not square, the window spans the same millimetres both ways and is
    brought to square pixels: shapes are never stretched. With random axes, those whose planes would be badly distorted
    are left out case by case.

    Attributes:
        sequences: Names in channel order for a backbone of several sequences; None where the slices are plain pictures.
        channels: Of each image: the sequences, or the windows that a picture is made of.

    Args:
        store: Prepared volumes.
        config: How slices are drawn.
        seed: Of the run.

    Raises:
        ConfigError: Axial slices would be badly distorted, or pictures are asked for of several sequences.
    """

    def __init__(self, store: Store, config: DataConfig, seed: int) -> None:
        if store.kind != "volumes":
            raise ValueError("slices are cut from a store of volumes")
        self.store, self.config, self.seed = store, config, seed
        self.axes = (0, 1, 2) if config.random_axes and config.split == "TRAIN" else (AXIAL,)
        self._usable_C3 = _usable_axes(store, self.axes)
        self._roi_allowed = exposed_rois(store, config.percentage_labels, seed)
        self.with_roi = config.append_label_mask is not False and len(self._roi_allowed) > 0
        pictures = config.windows_hu is not None if config.as_pictures is None else config.as_pictures
        if pictures and len(store.sequences) > 1:
            raise _too_many_for_pictures(store.sequences)
        self.sequences: tuple[str, ...] | None = None if pictures else store.sequences
        self.channels = len(config.windows_hu or store.sequences)
        _tell_if_not_hu(store, config)

    @property
    def n_sequences(self) -> int:
        """Images of one sample that a backbone takes: its sequences, or the one picture."""
        return 1 if self.sequences is None else len(self.sequences)

    def __len__(self) -> int:
        return len(self.store)

    def case_id(self, case: int) -> str:
        """Id of the case at position ``case`` of the store."""
        return self.store.case_id(case)

    def __getitem__(self, key: Key) -> Sample:
        """The sample at (position, case).

        Raises:
            DataError: The prepared file is missing or damaged; names the case.
        """
        position, case = key
        draw = np.random.default_rng(seed_for(self.seed, "slice", position))
        axis = self._choose_axis(case, draw)
        roi = case in self._roi_allowed
        facts = self.store.slice_facts(case, axis)
        index = self._choose_slice(facts, roi, draw)
        shape, spacing = self._plane(case, axis)
        size = window_size(self.config.spatial_size, spacing)
        centre = facts.roi_centre_N2[index] if roi and facts.roi_pixels_N[index] > 0 else None
        window = plan_window(shape, size, centre)
        plane = self.store.read_slice(case, axis, index, window=window, roi=roi and self.with_roi)
        out = output_size(window[2:], spacing, self.config.spatial_size)
        mask = None
        if self.with_roi:
            found = plane.roi_HW if plane.roi_HW is not None else np.zeros(window[2:], bool)
            mask = resize_mask(torch.from_numpy(np.ascontiguousarray(found)), out)
        return Sample(
            image_SHW=resize_image(torch.from_numpy(self._scaled(plane)), out),
            available_S=torch.from_numpy(plane.available_S.repeat(self.channels // len(plane.available_S))),
            case_id=self.store.case_id(case),
            roi_HW=mask,
            axis=axis,
            index=index,
            window=window,
        )

    def _scaled(self, plane: StoredSlice) -> np.ndarray:
        """(S, H, W) float32 in [0, 1]: one channel for each sequence, or for each window of the only one."""
        windows = self.config.windows_hu
        if windows is None:
            return plane.scaled()
        low, high = (np.array([window[end] for window in windows]) for end in (1, 2))
        return scale_to_unit(np.repeat(plane.image_SHW, len(windows), axis=0), low, high)

    def _choose_axis(self, case: int, draw: np.random.Generator) -> int:
        if len(self.axes) == 1:
            return self.axes[0]
        axes = np.flatnonzero(self._usable_C3[case])
        return int(axes[draw.integers(len(axes))])

    def _choose_slice(self, facts: SliceFacts, roi: bool, draw: np.random.Generator) -> int:
        train = self.config.split == "TRAIN"
        pixels = facts.roi_pixels_N
        if roi and pixels.max() > 0:
            enough = np.flatnonzero(pixels >= self.config.min_roi_pixels)
            if train and self.config.random_slices and len(enough):
                return int(enough[draw.integers(len(enough))])
            return int(pixels.argmax())
        if train:
            filled = np.flatnonzero((facts.high_NS > facts.low_NS).any(axis=1))  # padding slices hold nothing to learn
            return int(filled[draw.integers(len(filled))]) if len(filled) else int(draw.integers(len(pixels)))
        return len(pixels) // 2

    def _plane(self, case: int, axis: int) -> tuple[tuple[int, int], tuple[float, float]]:
        """(pixels, spacing in mm) of the planes of a case, both (y, x) of the plane."""
        facts = self.store.facts(case)
        down, across = (n for n in range(3) if n != axis)
        return (facts.shape[down], facts.shape[across]), (facts.spacing[down], facts.spacing[across])


class ImageDataset:
    """Whole pictures scaled to [0, 1], each at its own size.

    Where a set mixes grey and colour, grey ones are repeated over three channels.

    Attributes:
        sequences: None: a backbone takes them as plain pictures.
        channels: 1, or 3 where any picture has colours.

    Args:
        store: Prepared pictures.
    """

    sequences: tuple[str, ...] | None = None
    n_sequences = 1

    def __init__(self, store: Store) -> None:
        if store.kind != "images":
            raise ValueError("pictures are read from a store of pictures")
        self.store = store
        self.channels = store.channels

    def __len__(self) -> int:
        return len(self.store)

    def case_id(self, case: int) -> str:
        """Id of the picture at position ``case`` of the store."""
        return self.store.case_id(case)

    def __getitem__(self, key: Key) -> Sample:
        """The picture at (position, case); the position changes nothing.

        Raises:
            DataError: The prepared file is missing or damaged; names the case.
        """
        _, case = key
        stored, low, high = self.store.read_picture(case)
        image = scale_to_unit(stored, np.full(len(stored), low), np.full(len(stored), high))
        if len(image) < self.channels:
            image = np.repeat(image, self.channels, axis=0)
        return Sample(
            image_SHW=torch.from_numpy(image),
            available_S=torch.ones(self.channels, dtype=torch.bool),
            case_id=self.store.case_id(case),
            window=(0, 0, *stored.shape[1:]),
        )


def exposed_rois(store: Store, share: float, seed: int) -> frozenset[int]:
    """Positions of the cases that may use their region of interest: ``share`` of those that have one, rounded.

    Which ones follows from the seed and the case id alone, so ranks and restarts agree, and a larger share keeps the
    cases of a smaller one.
    """
    cases = [int(case) for case in store.roi_cases()] if share > 0 else []
    if share < 1:
        cases.sort(key=lambda case: seed_for(seed, "percentage_labels", store.case_id(case)))
        cases = cases[: round(share * len(cases))]
    return frozenset(cases)


def window_size(side: int, spacing: tuple[float, float]) -> tuple[int, int]:
    """(height, width) in pixels of a window that is square in mm, ``side`` pixels long where they are smallest."""
    smallest = min(spacing)
    if max(spacing) <= _SQUARE * smallest:
        return side, side
    height, width = (max(1, round(side * smallest / mm)) for mm in spacing)
    return height, width


def plan_window(shape: tuple[int, int], size: tuple[int, int], centre: Sequence[float] | np.ndarray | None) -> Window:
    """(top, left, height, width) of a window around ``centre`` (row, column), clamped inside, shrunk where needed.

    Without a centre it lies in the middle of the plane.
    """
    height, width = (min(n, wanted) for n, wanted in zip(shape, size, strict=True))
    middle = [n / 2 for n in shape] if centre is None else [float(c) + 0.5 for c in centre]
    starts = [
        min(max(0, int(np.floor(m - extent / 2 + 0.5))), n - extent)
        for m, extent, n in zip(middle, (height, width), shape, strict=True)
    ]
    return starts[0], starts[1], height, width


def output_size(window: tuple[int, int], spacing: tuple[float, float], side: int) -> tuple[int, int]:
    """(height, width) with square pixels and the longer side equal to ``side``; never stretched.

    A window of square pixels that has the full side already stays as it is, so nothing is interpolated.
    """
    smallest = min(spacing)
    square = max(spacing) <= _SQUARE * smallest
    height, width = window if square else (n * mm / smallest for n, mm in zip(window, spacing, strict=True))
    scale = side / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def resize_image(image_SHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, pixel centres kept (half-pixel convention); the same tensor when the size is right."""
    if tuple(image_SHW.shape[1:]) == size:
        return image_SHW
    return functional.interpolate(image_SHW[None], size, mode="bilinear", align_corners=False)[0]


def resize_mask(mask_HW: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest neighbour on the same pixel centres as ``resize_image``."""
    if tuple(mask_HW.shape) == size:
        return mask_HW
    return functional.interpolate(mask_HW[None, None].float(), size, mode="nearest-exact")[0, 0] > 0.5


def collate(samples: Sequence[Sample]) -> SliceBatch:
    """Samples of several sizes -> one batch, zero-padded at the bottom and right to the largest."""
    sizes = torch.tensor([sample.image_SHW.shape[1:] for sample in samples], dtype=torch.int64)
    height, width = (int(n) for n in sizes.max(dim=0).values)
    images = torch.zeros(len(samples), samples[0].image_SHW.shape[0], height, width)
    masks = None if samples[0].roi_HW is None else torch.zeros(len(samples), height, width, dtype=torch.bool)
    for place, sample in enumerate(samples):
        h, w = sample.image_SHW.shape[1:]
        images[place, :, :h, :w] = sample.image_SHW
        if masks is not None and sample.roi_HW is not None:
            masks[place, :h, :w] = sample.roi_HW
    return SliceBatch(
        images_BSHW=images,
        sizes_B2=sizes,
        available_BS=torch.stack([sample.available_S for sample in samples]),
        roi_BHW=masks,
        case_ids=[sample.case_id for sample in samples],
    )


class ResumableSampler(Sampler[Key]):
    """An endless stream of (position, case), newly shuffled for each pass over the cases.

    The case at a position is computed, not iterated to, so a run resumes anywhere at no cost. Of every ``world x
    batch_size`` positions each rank takes its own ``batch_size``: two ranks of batch 4 see what one of batch 8 sees.

    Args:
        count: Cases.
        batch_size: Samples of one rank in one batch.
        seed: Of the run.
        start_position: First position over all ranks, a multiple of ``world x batch_size``.
        rank, world: Of the process group.
    """

    def __init__(
        self, count: int, batch_size: int, seed: int, start_position: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        if count < 1 or batch_size < 1 or not 0 <= rank < world:
            raise ValueError(f"no stream of {count} cases in batches of {batch_size} for rank {rank} of {world}")
        if start_position % (batch_size * world):
            raise ValueError(f"position {start_position} is not the start of a batch of {batch_size} x {world}")
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.start_position, self.rank, self.world = start_position, rank, world
        self._orders: dict[int, np.ndarray] = {}

    def case_at(self, position: int) -> int:
        """The case at a position of the stream."""
        epoch, place = divmod(position, self.count)
        order = self._orders.get(epoch)
        if order is None:
            order = np.random.default_rng(seed_for(self.seed, "shuffle", epoch)).permutation(self.count)
            self._orders = {**dict(list(self._orders.items())[-1:]), epoch: order}  # a batch spans two passes at most
        return int(order[place])

    def batch_at(self, number: int) -> list[Key]:
        """The keys of batch ``number`` of this rank, counted from ``start_position``."""
        first = self.start_position + (number * self.world + self.rank) * self.batch_size
        return [(position, self.case_at(position)) for position in range(first, first + self.batch_size)]

    def batches(self) -> Iterator[list[Key]]:
        """``batch_at(0)``, ``batch_at(1)``, … without end."""
        number = 0
        while True:
            yield self.batch_at(number)
            number += 1

    def __iter__(self) -> Iterator[Key]:
        for batch in self.batches():
            yield from batch


def build_loader(
    dataset: SampleSource,
    *,
    batch_size: int,
    seed: int,
    accumulation: int = 1,
    workers: int = 0,
    start_step: int = 0,
    rank: int = 0,
    world: int = 1,
    timeout_s: float = 180.0,
    pin_memory: bool = False,
    prefetch: int = 2,
) -> Loader[SliceBatch]:
    """An endless iterator over the micro-batches from a step on; the same stream for any number of workers.

    Args:
        dataset: Slices or pictures.
        batch_size: Samples of one process in one micro-batch.
        seed: Of the run.
        accumulation: Micro-batches of one step; ``start_step`` counts whole steps.
        workers: Loader processes; 0 loads in this one.
        start_step: First step.
        rank, world: Of the process group.
        timeout_s: Seconds that a batch may take before the run ends with an error.
        pin_memory: Copy batches into page-locked memory, for a GPU.
        prefetch: Batches that each worker keeps ready.
    """
    start = start_step * accumulation * batch_size * world
    sampler = ResumableSampler(len(dataset), batch_size, seed, start, rank, world)
    return Loader(
        dataset, sampler, collate, workers=workers, timeout_s=timeout_s, pin_memory=pin_memory, prefetch=prefetch
    )


class Loader(Iterator[BatchT], Generic[BatchT]):
    """Batches from worker processes, watched: one that dies or falls silent is named with the case it was at.

    PyTorch's own way is to raise in the middle of whatever the main process does when a worker dies. Here a dead worker
    is met where the next batch is asked for. Workers that were asked to end (SIGTERM to the whole process group) are
    no error: this process then loads by itself, the same samples, until its own handler stops the run.

    Args:
        source: Samples by key.
        sampler: Which keys make which batch.
        collate: Samples to a batch; runs in the workers.
        workers, timeout_s, pin_memory, prefetch: As in ``build_loader``.
    """

    def __init__(
        self,
        source: KeyedSource,
        sampler: BatchKeys,
        collate: Callable[[Sequence[Any]], BatchT],
        *,
        workers: int,
        timeout_s: float,
        pin_memory: bool,
        prefetch: int,
    ) -> None:
        self.source, self.sampler, self.timeout_s = source, sampler, timeout_s
        self._workers, self._number, self._pin = workers, 0, pin_memory
        self._guarded = _Guarded(source, max(1, workers))
        self._collate = partial(_collate_unless_failed, collate)
        self._batches: Any = None
        if workers:
            loader = DataLoader(
                self._guarded,
                batch_sampler=_Batches(sampler),
                num_workers=workers,
                collate_fn=self._collate,
                pin_memory=pin_memory,
                timeout=min(_POLL_S, timeout_s),
                worker_init_fn=_start_worker,
                prefetch_factor=prefetch,
                generator=torch.Generator(),  # else each new loader would draw from the generator of the run
            )
            with _keeping_sigchld():
                self._batches = iter(loader)

    def __next__(self) -> BatchT:
        """The next batch.

        Raises:
            DataError: A sample cannot be read; names case and file.
            ResourceError: A worker died or gave nothing for ``timeout_s``; names worker and case.
        """
        batch = self._load_here() if self._batches is None else self._wait()
        if isinstance(batch, MedsslError):
            self.close()
            raise batch
        self._number += 1
        return batch

    def close(self) -> None:
        """End the workers; ``next`` goes on in this process."""
        self._batches = None  # PyTorch's iterator ends its workers when it goes

    def _kill(self) -> None:
        """End the workers although one may hang."""
        for worker in self._batches._workers:
            if worker.is_alive():
                worker.kill()
        self.close()

    def _load_here(self) -> BatchT | MedsslError:
        batch: BatchT | MedsslError = self._collate([self._guarded[key] for key in self.sampler.batch_at(self._number)])
        return batch.pin_memory() if self._pin and not isinstance(batch, MedsslError) else batch

    def _wait(self) -> BatchT | MedsslError:
        started = time.monotonic()
        while True:
            try:
                with self._watchdog() as ended_by_us:
                    return next(self._batches)
            except (RuntimeError, OSError, EOFError) as error:
                if ended_by_us.is_set():
                    raise self._silence() from error
                # RuntimeError: PyTorch's word for the end of a poll and for a dead worker. The others: a worker died
                # after it announced a batch, whose memory can no longer be fetched from it.
                ended = self._ended(wait_s=0.0 if isinstance(error, RuntimeError) else _POLL_S)
                if ended and all(w.exitcode in (0, -signal.SIGTERM) for w in ended):
                    log.warning("the loader's workers were asked to end; loading goes on in the main process")
                    self.close()
                    return self._load_here()
                if ended:
                    raise self._death(ended[0]) from error
                if "timed out" not in str(error):
                    raise
                if time.monotonic() - started >= self.timeout_s:
                    raise self._silence() from error

    @contextlib.contextmanager
    def _watchdog(self) -> Iterator[threading.Event]:
        """End a worker that was stopped as a whole: fetching the batch that it announced would wait for ever.

        A batch lies in shared memory whose handle the worker itself hands over, and no time-out covers that.
        """
        ended = threading.Event()
        process = self._batches._workers[self._number % self._workers]

        def end() -> None:
            ended.set()
            process.kill()

        timer = threading.Timer(self.timeout_s + 2 * _POLL_S, end)
        timer.daemon = True
        timer.start()
        try:
            yield ended
        finally:
            timer.cancel()

    def _ended(self, wait_s: float) -> list[Any]:
        """Workers that are no more; waits a moment for the first, whose end the system may still be at."""
        workers = self._batches._workers
        closed = connection.wait([worker.sentinel for worker in workers], timeout=wait_s)
        for worker in workers:
            if worker.sentinel in closed:
                worker.join(_POLL_S)  # its files are closed, yet the system may not tell its exit code for a moment
        return [worker for worker in workers if worker.exitcode is not None]

    def _death(self, process: Any) -> ResourceError:
        worker = self._batches._workers.index(process)
        place = self._place(worker)
        self._kill()
        return ResourceError(
            f"Loader worker {worker} died ({_exit_words(process.exitcode)}).",
            where=f"process {process.pid}, {place}",
            fix="use fewer workers or free memory (the system kills processes when it runs out, also of /dev/shm); "
            "the same command goes on from the last checkpoint",
            code="loader_worker_died",
        )

    def _silence(self) -> ResourceError:
        worker = self._number % self._workers  # batches go round the workers in turn
        process, place = self._batches._workers[worker], self._place(worker)
        self._kill()
        return ResourceError(
            f"Loader worker {worker} gave nothing for {self.timeout_s:g} s.",
            where=f"process {process.pid}, {place}",
            fix="look at the disk that holds the cache; if it is only slow, raise train.loader_timeout_s",
            code="loader_stuck",
        )

    def _place(self, worker: int) -> str:
        case = int(self._guarded.loading[worker])
        return "before its first case" if case < 0 else f"at case {self.source.case_id(case)}"


class _Guarded(Dataset[Any]):
    """Samples, or the error in place of one: so it arrives whole, and not as the text of a traceback."""

    def __init__(self, source: KeyedSource, workers: int) -> None:
        self.source = source
        self.loading = torch.full((workers,), -1, dtype=torch.int64).share_memory_()

    def __getitem__(self, key: Key) -> Any:
        worker = get_worker_info()
        self.loading[0 if worker is None else worker.id] = key[1]
        try:
            return self.source[key]
        except MedsslError as error:
            return error


class _Batches:
    """The batches of a sampler as an iterable."""

    def __init__(self, sampler: BatchKeys) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[list[Key]]:
        return self.sampler.batches()


def _collate_unless_failed(
    collate: Callable[[Sequence[Any]], BatchT], samples: Sequence[Any | MedsslError]
) -> BatchT | MedsslError:
    for sample in samples:
        if isinstance(sample, MedsslError):
            return sample
    return collate(samples)


def _start_worker(worker: int) -> None:
    """One thread, and signals to the whole group left to the main process."""
    blosc2.set_nthreads(1)  # torch's own threads are set to 1 by the loader
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


@contextlib.contextmanager
def _keeping_sigchld() -> Iterator[None]:
    """Undo the handler that PyTorch installs with its first workers, which raises anywhere in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        ours = getattr(before, "__module__", "").startswith("torch.")
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if ours or before is None else before)


def _exit_words(exitcode: int) -> str:
    if exitcode >= 0:
        return f"exit status {exitcode}"
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-exitcode).name}"
    return f"killed by signal {-exitcode}"


def _usable_axes(store: Store, axes: tuple[int, ...]) -> np.ndarray:
    """(cases, 3) bool: the planes across which axes have pixels that are not far from square.

    Raises:
        ConfigError: Axial planes have not.
    """
    spacings = store.spacings()
    planes = np.stack([np.delete(spacings, axis, axis=1) for axis in (0, 1, 2)], axis=1)
    ratio_C3 = planes.max(axis=2) / planes.min(axis=2)
    usable_C3 = ratio_C3 <= MAX_ANISOTROPY
    if not usable_C3[:, AXIAL].all():
        raise ConfigError(
            "Axial slices would be badly distorted.",
            where=_worst(store, spacings, ratio_C3, usable_C3, AXIAL),
            fix=f"set {_resampled(spacings[~usable_C3[:, AXIAL]])}",
            code="slices_stretched",
        )
    others = [axis for axis in axes if not usable_C3[:, axis].all()]
    if others:
        bad = ~usable_C3[:, others].all(axis=1)
        log.warning(
            "Random axes: %s slices are left out in %s, where they would be badly distorted; %s brings them in.",
            " and ".join(AXIS_NAMES[axis] for axis in others),
            _worst(store, spacings, ratio_C3, usable_C3, others[0]),
            _resampled(spacings[bad]),
        )
    return usable_C3


def _too_many_for_pictures(sequences: tuple[str, ...]) -> ConfigError:
    return ConfigError(
        "A picture is made of volumes of one sequence.",
        where=f"data.as_pictures or data.windows_hu with {len(sequences)} sequences: {', '.join(sequences)}",
        fix="name one sequence in data.mri_sequences, or set data.as_pictures=false and drop data.windows_hu",
        code="pictures_of_sequences",
    )


def _tell_if_not_hu(store: Store, config: DataConfig) -> None:
    """One warning where a window reaches below 0 and every volume has 8 bits: such values are no HU."""
    lows = [low for _, low, _ in config.windows_hu or ()]
    named = config.preprocess.window_sequences
    if config.preprocess.window_hu is not None and (named is None or set(named) & set(store.sequences)):
        lows.append(config.preprocess.window_hu[0])
    if min(lows, default=0.0) < 0 and store.is_eight_bit():
        log.warning(
            "ct_not_hu: these %d volumes hold values from 0 to 255 alone, but a window begins at %g HU. They look like "
            "pictures of CT: leave the window out, or convert them again from DICOM.",
            len(store),
            min(lows),
        )


def _worst(store: Store, spacings: np.ndarray, ratio_C3: np.ndarray, usable_C3: np.ndarray, axis: int) -> str:
    worst = int(ratio_C3[:, axis].argmax())
    spacing = Spacing(*(float(mm) for mm in spacings[worst]))
    return (
        f"{int((~usable_C3[:, axis]).sum())} of {len(store)} cases, e.g. {store.case_id(worst)}: "
        f"spacing z {spacing.z:.3g}, y {spacing.y:.3g}, x {spacing.x:.3g} mm"
    )


def _resampled(spacings: np.ndarray) -> str:
    side = round(float(np.median(spacings.min(axis=1))), 2)
    return f"data.preprocess.resample_mm=[{side:g},{side:g},{side:g}]"
