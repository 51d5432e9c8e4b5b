"""Labelled slices of volumes and labelled pictures, cut to tiles for training.

The network sees square pixels of one size: ``to_resolution`` brings a slice there, at training and at inference. A tile
of training is a part of that very image, to the last digit that a float holds, but only the voxels under it are read.
Every draw is a function of the seed and the position in the stream.

Letters: B samples, S sequences, colours or windows of one slice, K neighbouring slices (2 * context + 1), H W pixels as
stored, h w pixels of the network.
"""

from __future__ import annotations

import functools
import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from medssl_cli.core.case import Case
from medssl_cli.core.errors import ConfigError, DataError
from medssl_cli.core.protocols import IGNORE_LABEL
from medssl_cli.core.run import hide_home, seed_for
from medssl_cli.core.volume import AXIAL
from medssl_cli.core.wording import counted
from medssl_cli.data.datasets import HuWindow, plan_window
from medssl_cli.data.images import check_finite, read_image
from medssl_cli.data.label_maps import LabelSpec, picture_size, read_label_picture, size_difference
from medssl_cli.data.labelled_slices import LabelledSample
from medssl_cli.data.preprocess import PreprocessConfig, naming_case, scale_to_unit, to_picture
from medssl_cli.data.store import SliceFacts, Store, StoredSlice

log = logging.getLogger(__name__)

_SQUARE = 1.05  # pixels count as square up to this ratio of their sides
_SHOWN = 8

Size = tuple[int, int]


# --- resolution ------------------------------------------------------------------------------------------------------


def size_at(size_HW: Size, spacing: tuple[float, float], pixel_mm: float | None) -> Size:
    """(h, w) of a slice with square pixels.

    Args:
        size_HW: Pixels as stored.
        spacing: Their size (y, x) in mm; 1, 1 for a picture.
        pixel_mm: Side of a pixel of the network; None takes the smaller one of ``spacing``, so that slices whose
            pixels are square already keep them.
    """
    if pixel_mm is None and max(spacing) <= _SQUARE * min(spacing):
        return size_HW
    side = min(spacing) if pixel_mm is None else pixel_mm
    height, width = (max(1, round(n * mm / side)) for n, mm in zip(size_HW, spacing, strict=True))
    return height, width


def to_resolution(image: Tensor, spacing: tuple[float, float], pixel_mm: float | None) -> Tensor:
    """(..., H, W) -> (..., h, w): square pixels, bilinear on pixel centres, antialiased where it becomes smaller.

    The image as it is where its size is right. Arguments as for ``size_at``.
    """
    return resize_image(image, size_at((image.shape[-2], image.shape[-1]), spacing, pixel_mm))


def resize_image(image: Tensor, size: Size) -> Tensor:
    """(..., H, W) floats -> (..., h, w), bilinear on pixel centres; the reverse of ``to_resolution``, too."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    planes = image.reshape(1, -1, *image.shape[-2:])
    resized = functional.interpolate(planes, size, mode="bilinear", align_corners=False, antialias=True)
    return resized.reshape(*image.shape[:-2], *size)


def resize_labels(labels_HW: np.ndarray, size: Size) -> np.ndarray:
    """(H, W) -> (h, w) by the nearest pixel, on the same pixel centres as ``resize_image``."""
    rows, columns = (_nearest(n, out) for n, out in zip(labels_HW.shape, size, strict=True))
    return labels_HW[np.ix_(rows, columns)]


def _nearest(count: int, out: int) -> np.ndarray:
    """The stored pixel under the centre of each of ``out`` pixels."""
    return np.minimum((2 * np.arange(out) + 1) * count // (2 * out), count - 1)


@functools.lru_cache(maxsize=256)
def _weights(count: int, out: int) -> Tensor:
    """(out, count) float32: what ``resize_image`` takes of each stored row for each row of the result."""
    return resize_image(torch.eye(count)[None], (out, count))[0]


class _Part(NamedTuple):
    """A stretch of pixels of the network along one axis and the stored pixels that it is made of."""

    start: int
    stop: int
    stored_start: int
    stored_stop: int
    weights: Tensor | None

    @classmethod
    def of(cls, count: int, out: int, start: int, length: int) -> _Part:
        stop = start + length
        if count == out:
            return cls(start, stop, start, stop, None)
        weights = _weights(count, out)[start:stop]
        used = torch.nonzero((weights != 0).any(dim=0))[:, 0]
        first, last = int(used[0]), int(used[-1]) + 1
        return cls(start, stop, first, last, weights[:, first:last])

    @property
    def stored(self) -> int:
        return self.stored_stop - self.stored_start


class _Tile(NamedTuple):
    """A tile of a slice at the resolution of the network."""

    rows: _Part
    columns: _Part
    stored_size: Size
    size: Size

    @classmethod
    def of(cls, stored: Size, size: Size, window: tuple[int, int, int, int]) -> _Tile:
        top, left, height, width = window
        rows, columns = _Part.of(stored[0], size[0], top, height), _Part.of(stored[1], size[1], left, width)
        return cls(rows, columns, stored, size)

    @property
    def window(self) -> tuple[int, int, int, int]:
        """(top, left, height, width) of the stored pixels to read."""
        return self.rows.stored_start, self.columns.stored_start, self.rows.stored, self.columns.stored

    def image(self, stored_SHW: Tensor) -> Tensor:
        """The stored pixels of ``window`` -> the tile, as a part of ``to_resolution`` of the whole slice."""
        if self.rows.weights is not None:
            stored_SHW = self.rows.weights @ stored_SHW
        if self.columns.weights is not None:
            stored_SHW = stored_SHW @ self.columns.weights.T
        return stored_SHW

    def labels(self, labels_HW: np.ndarray) -> np.ndarray:
        """The whole stored label map -> its part under the tile."""
        rows, columns = (_nearest(n, out) for n, out in zip(self.stored_size, self.size, strict=True))
        taken = np.ix_(rows[self.rows.start : self.rows.stop], columns[self.columns.start : self.columns.stop])
        return labels_HW[taken]


def _draw_tile(stored: Size, size: Size, tile: int, centre: Sequence[float] | None, draw: np.random.Generator) -> _Tile:
    """A tile around ``centre`` (row, column as stored), moved inside; anywhere without one; the whole slice for 0."""
    wanted = (tile or size[0], tile or size[1])
    if centre is not None:
        seen = [(c + 0.5) * out / n - 0.5 for c, out, n in zip(centre, size, stored, strict=True)]
        return _Tile.of(stored, size, plan_window(size, wanted, seen))
    height, width = (min(n, extent) for n, extent in zip(size, wanted, strict=True))
    top, left = (int(draw.integers(n - extent + 1)) for n, extent in zip(size, (height, width), strict=True))
    return _Tile.of(stored, size, (top, left, height, width))


def _draw_pixel(classes_HW: np.ndarray, draw: np.random.Generator) -> tuple[int, int] | None:
    """A pixel of a structure: each structure of the slice is as likely as the others, whatever its size."""
    present = np.flatnonzero(np.bincount(classes_HW.ravel(), minlength=256)[1:IGNORE_LABEL]) + 1
    if not len(present):
        return None
    rows, columns = np.nonzero(classes_HW == present[draw.integers(len(present))])
    place = int(draw.integers(len(rows)))
    return int(rows[place]), int(columns[place])


def _padded(image_SHW: Tensor, labels_HW: np.ndarray, tile: int) -> tuple[Tensor, Tensor]:
    """Image with zeros and label map with ``IGNORE_LABEL`` at the bottom and right, up to ``tile`` pixels."""
    height, width = labels_HW.shape
    missing = (0, max(0, tile - width), 0, max(0, tile - height))
    labels = torch.from_numpy(np.ascontiguousarray(labels_HW))
    if any(missing):
        image_SHW, labels = functional.pad(image_SHW, missing), functional.pad(labels, missing, value=IGNORE_LABEL)
    return image_SHW.contiguous(), labels


# --- volumes ---------------------------------------------------------------------------------------------------------


class SliceLabels:
    """Axial slices of prepared volumes with their label maps: random tiles for training, else every slice whole.

    Attributes:
        channels: Of one slice: its sequences, the windows of its only one, or colours that a grey slice is repeated to.

    Args:
        store: Of kind ``labels``.
        spec: What the values of its label maps mean.
        tile: Side of a training tile in pixels of the network; what a slice lacks is padded. 0 takes whole slices.
        pixel_mm: Side of a pixel of the network, see ``size_at``.
        context: Neighbouring slices on either side that are channels too; beyond the volume its outermost slice.
        seed: Of the run.
        training: Random tiles; else slice after slice of case after case, without tile or draw.
        foreground_share: How often a training slice is one with a structure, in a tile around one of its pixels.
        slices_per_case: Training tiles of a case in an epoch.
        windows_hu: CT: windows that become the channels of volumes of one sequence.
        colours: Channels that a slice of one channel is repeated to; 0 or 1 leaves it.

    Raises:
        DataError: A label map with a value that ``spec`` does not know; names the cases.
        ConfigError: ``windows_hu`` or ``colours`` with several sequences.
    """

    def __init__(
        self,
        store: Store,
        spec: LabelSpec,
        *,
        tile: int,
        pixel_mm: float | None = None,
        context: int = 0,
        seed: int = 0,
        training: bool = True,
        foreground_share: float = 0.5,
        slices_per_case: int = 8,
        windows_hu: Sequence[HuWindow] | None = None,
        colours: int = 0,
    ) -> None:
        if store.kind != "labels":
            raise ValueError("labelled slices are cut from a store of label maps")
        if (windows_hu or colours > 1) and len(store.sequences) > 1:
            raise _several_sequences(store.sequences)
        check_label_values(store, spec)
        self.store, self.spec, self.tile, self.pixel_mm = store, spec, tile, pixel_mm
        self.context, self.seed, self.training = context, seed, training
        self.foreground_share, self.slices_per_case = foreground_share, slices_per_case
        self.windows_hu = tuple(windows_hu or ())
        self.colours = colours
        self.channels = len(self.windows_hu) or (colours if colours > 1 else len(store.sequences))
        self._depths = np.cumsum([store.facts(case).shape[AXIAL] for case in range(len(store))])

    def __len__(self) -> int:
        return len(self.store) * self.slices_per_case if self.training else int(self._depths[-1])

    def case_id(self, index: int) -> str:
        """Id of the case that an index belongs to."""
        return self.store.case_id(self.place(index)[0])

    def place(self, index: int) -> tuple[int, int]:
        """(case of the store, slice) of an index; the slice is -1 in training, where it is drawn."""
        if self.training:
            return index % len(self.store), -1
        case = int(np.searchsorted(self._depths, index, side="right"))
        return case, index - (int(self._depths[case - 1]) if case else 0)

    def __getitem__(self, key: tuple[int, int]) -> LabelledSample:
        """The sample at (position in the stream, index).

        Raises:
            DataError: The prepared file is missing or damaged; names the case.
        """
        position, index = key
        case, number = self.place(index)
        draw = np.random.default_rng(seed_for(self.seed, "labelled_slice", position))
        around = False
        if self.training:
            around = bool(draw.random() < self.foreground_share)
            number = self._draw_slice(case, around, draw)
        labels_HW = self.spec.classes_of(self.store.read_labels(case, AXIAL, number), self.store.case_id(case))
        tile = self._tile(case, labels_HW, around, draw)
        image, labels = _padded(
            tile.image(self._read(case, number, tile)), tile.labels(labels_HW), self.tile if self.training else 0
        )
        available = self.store.facts(case).available_S
        return LabelledSample(
            image_SHW=image,
            label_HW=labels,
            available_S=torch.from_numpy(available.repeat(self.channels // len(available))),
            case_id=f"{self.store.case_id(case)} slice {number}",
        )

    def _draw_slice(self, case: int, around: bool, draw: np.random.Generator) -> int:
        facts = self.store.slice_facts(case, AXIAL)
        chosen = foreground_slices(facts) if around else np.empty(0)
        if not len(chosen):
            chosen = np.flatnonzero((facts.high_NS > facts.low_NS).any(axis=1))  # padding slices hold nothing to learn
        return int(chosen[draw.integers(len(chosen))]) if len(chosen) else int(draw.integers(len(facts.roi_pixels_N)))

    def _tile(self, case: int, labels_HW: np.ndarray, around: bool, draw: np.random.Generator) -> _Tile:
        facts = self.store.facts(case)
        stored = (facts.shape[1], facts.shape[2])
        size = size_at(stored, (facts.spacing.y, facts.spacing.x), self.pixel_mm)
        centre = _draw_pixel(labels_HW, draw) if around else None
        return _draw_tile(stored, size, self.tile if self.training else 0, centre, draw)

    def _read(self, case: int, number: int, tile: _Tile) -> Tensor:
        """(K * S, H, W) of the slice and its neighbours under a tile, slice-major, in [0, 1]."""
        last = self.store.facts(case).shape[AXIAL] - 1
        wanted = [min(max(0, n), last) for n in range(number - self.context, number + self.context + 1)]
        planes = {n: self._scaled(case, n, tile) for n in dict.fromkeys(wanted)}
        return torch.from_numpy(np.concatenate([planes[n] for n in wanted]))

    def _scaled(self, case: int, number: int, tile: _Tile) -> np.ndarray:
        stored = self.store.read_slice(case, AXIAL, number, window=tile.window, roi=False)
        return scaled_channels(stored, self.windows_hu, self.colours)


def scaled_channels(stored: StoredSlice, windows_hu: Sequence[HuWindow], colours: int) -> np.ndarray:
    """(S, H, W) float32 in [0, 1]: a channel for each sequence, for each window of the only one, or for each colour."""
    if windows_hu:
        low, high = (np.array([window[end] for window in windows_hu]) for end in (1, 2))
        return scale_to_unit(np.repeat(stored.image_SHW, len(windows_hu), axis=0), low, high)
    scaled = stored.scaled()
    return np.repeat(scaled, colours, axis=0) if len(scaled) == 1 < colours else scaled


def foreground_slices(facts: SliceFacts) -> np.ndarray:
    """Indices of the slices that hold anything but 0; no voxel is read."""
    return np.flatnonzero(facts.roi_pixels_N > 0)


def check_label_values(store: Store, spec: LabelSpec) -> None:
    """Refuse label maps with values that no class has, before the first of them is trained on; no voxel is read.

    Raises:
        DataError: ``label_values``, with the cases.
    """
    lut = {*spec.values, *spec.ignore_values}
    bad: dict[str, list[int]] = {}
    for case in range(len(store)):
        unknown = [int(value) for value in store.label_values(case) if value not in lut]
        if unknown:
            bad[store.case_id(case)] = unknown
    if bad:
        shown = list(bad)[:_SHOWN]
        lines = [f"case {name}: {', '.join(map(str, bad[name]))}" for name in shown]
        more = [f"and {counted(len(bad) - len(shown), 'case')} more"] if len(bad) > len(shown) else []
        raise DataError(
            "Label maps hold values of no class.",
            where="\n".join([*lines, *more, f"known are {spec.describe()}"]),
            fix="correct the files, or name what their values mean, e.g. --classes lesion=1+2,ignore=255",
            code="label_values",
        )


def _several_sequences(sequences: tuple[str, ...]) -> ConfigError:
    return ConfigError(
        "A picture is made of volumes of one sequence.",
        where=f"{len(sequences)} sequences: {', '.join(sequences)}",
        fix="name one sequence, or take a backbone of several sequences and no windows in HU",
        code="pictures_of_sequences",
    )


# --- pictures --------------------------------------------------------------------------------------------------------


class LabelledPictures:
    """Pictures with their label maps: random tiles for training, else every picture whole.

    Decoded pictures are kept in memory up to ``cache_gb`` in each process.

    Args:
        cases: With one picture and a label map as ``roi``.
        spec: What the values of the label maps mean.
        preprocess: The same as at inference: size and intensity limits of a picture.
        tile, pixel_mm, seed, training, foreground_share: As for ``SliceLabels``, pixels of a picture being 1 mm.
        colours: Channels of each picture; grey ones are repeated to as many.
        tiles_per_picture: Training tiles of a picture in an epoch.
        cache_gb: Memory for decoded pictures.

    Raises:
        DataError: Pictures without label map, or with one of another size; names them all.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        spec: LabelSpec,
        preprocess: PreprocessConfig,
        *,
        tile: int,
        pixel_mm: float | None = None,
        seed: int = 0,
        training: bool = True,
        foreground_share: float = 0.5,
        tiles_per_picture: int = 1,
        colours: int = 3,
        cache_gb: float = 2.0,
    ) -> None:
        _refuse_unequal(cases)
        self.cases, self.spec, self.preprocess = tuple(cases), spec, preprocess
        self.tile, self.pixel_mm, self.seed, self.training = tile, pixel_mm, seed, training
        self.foreground_share, self.tiles_per_picture = foreground_share, tiles_per_picture
        self.colours = self.channels = colours
        self._cache = _Pictures(round(cache_gb * 2**30))

    def __len__(self) -> int:
        return len(self.cases) * (self.tiles_per_picture if self.training else 1)

    def case_id(self, index: int) -> str:
        """Id of the picture that an index belongs to."""
        return self.cases[index % len(self.cases)].case_id

    def __getitem__(self, key: tuple[int, int]) -> LabelledSample:
        """The sample at (position in the stream, index).

        Raises:
            DataError: Picture or label map missing, damaged, of two sizes, or with values of no class.
        """
        position, index = key
        case = self.cases[index % len(self.cases)]
        picture = self._picture(case)
        draw = np.random.default_rng(seed_for(self.seed, "labelled_picture", position))
        stored = (picture.labels_HW.shape[0], picture.labels_HW.shape[1])
        size = size_at(stored, (1.0, 1.0), self.pixel_mm)
        around = self.training and bool(draw.random() < self.foreground_share)
        centre = _draw_pixel(picture.labels_HW, draw) if around else None
        tile = _draw_tile(stored, size, self.tile if self.training else 0, centre, draw)
        top, left, height, width = tile.window
        part = picture.image_CHW[:, top : top + height, left : left + width]
        scaled = scale_to_unit(part, np.full(len(part), picture.low), np.full(len(part), picture.high))
        scaled = np.repeat(scaled, self.colours, axis=0) if len(scaled) == 1 < self.colours else scaled
        image, labels = _padded(
            tile.image(torch.from_numpy(scaled)), tile.labels(picture.labels_HW), self.tile if self.training else 0
        )
        return LabelledSample(
            image_SHW=image,
            label_HW=labels,
            available_S=torch.ones(self.colours, dtype=torch.bool),
            case_id=case.case_id,
        )

    def _picture(self, case: Case) -> _Picture:
        known = self._cache.get(case.case_id)
        if known is None:
            known = read_labelled_picture(case, self.spec, self.preprocess)
            if len(known.image_CHW) not in (1, self.colours):
                raise DataError(
                    "The picture does not have the channels that the model takes.",
                    where=f"case {case.case_id}: {len(known.image_CHW)} channels, the model takes {self.colours} or 1",
                    fix="convert the picture to grey values, or use a model for colour pictures",
                    code="picture_channels",
                )
            self._cache.put(case.case_id, known)
        return known


def _refuse_unequal(cases: Sequence[Case]) -> None:
    """Refuse pairs of unequal size before the first epoch, by their headers."""
    faults = []
    for case in cases:
        try:
            with naming_case(case):
                _check_pair(case)
        except DataError as error:
            faults.append(error)
    if len(faults) > 1:
        more = [f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
        raise DataError(
            f"{counted(len(faults), 'picture')} cannot be trained on.",
            where="\n".join([*(f"{e.where} ({e.what})" for e in faults[:_SHOWN]), *more]),
            fix="; ".join(dict.fromkeys(error.fix for error in faults)),
            code=faults[0].code,
        )
    if faults:
        raise faults[0]


def _check_pair(case: Case) -> None:
    if case.roi is None:
        raise DataError("A picture has no label map.", fix="add it, or leave the picture out", code="label_missing")
    picture, labels = picture_size(next(iter(case.sequences.values())).path), picture_size(case.roi)
    if picture is not None and labels is not None and picture != labels:
        raise size_difference(case.roi, picture, labels)


class _Picture(NamedTuple):
    """A picture as stored, the values that become 0 and 1, and its classes."""

    image_CHW: np.ndarray
    low: float
    high: float
    labels_HW: np.ndarray


def read_labelled_picture(case: Case, spec: LabelSpec, preprocess: PreprocessConfig) -> _Picture:
    """Picture and classes of a case, both reduced as ``preprocess.picture_side`` says.

    Raises:
        DataError: With case and path: missing, damaged, non-finite, of two sizes, or with values of no class.
    """
    with naming_case(case):
        _check_pair(case)
        assert case.roi is not None
        path = next(iter(case.sequences.values())).path
        image = read_image(path)
        check_finite(path, image)
        labels_HW = spec.classes_of(read_label_picture(case.roi), hide_home(str(case.roi)))
        if image.shape[1:] != labels_HW.shape:
            raise size_difference(case.roi, image.shape[1:], labels_HW.shape)
        picture = to_picture(image, preprocess)
        size = (picture.image_CHW.shape[1], picture.image_CHW.shape[2])
        return _Picture(picture.image_CHW, picture.low, picture.high, resize_labels(labels_HW, size))


class _Pictures:
    """Decoded pictures, the last used ones up to a number of bytes."""

    def __init__(self, limit: int) -> None:
        self._limit, self._bytes = limit, 0
        self._known: OrderedDict[str, _Picture] = OrderedDict()

    def get(self, name: str) -> _Picture | None:
        if name in self._known:
            self._known.move_to_end(name)
        return self._known.get(name)

    def put(self, name: str, picture: _Picture) -> None:
        self._known[name] = picture
        self._bytes += _weight(picture)
        while self._bytes > self._limit and self._known:
            self._bytes -= _weight(self._known.popitem(last=False)[1])


def _weight(picture: _Picture) -> int:
    return picture.image_CHW.nbytes + picture.labels_HW.nbytes
