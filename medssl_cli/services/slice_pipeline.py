"""Slices through a segmentation network: tiles of several of them together, probabilities out in their order.

Slices stream. Each is scaled to [0, 1] when its turn comes, brought to the pixel size of the network and cut into
overlapping tiles; its logits are blended, turned into probabilities and brought back to its own pixels. With
neighbouring slices a network that offers it computes the maps of every tile once and decodes them several times.

Letters: N slices, S sequences or colours, K neighbouring slices (2 * context + 1), C logits, B tiles computed together,
H W pixels of a slice, h w of a tile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from medssl_cli.core.config import Config
from medssl_cli.core.errors import NonFiniteError
from medssl_cli.data.labelled_volumes import resize_image, to_resolution
from medssl_cli.data.tiles import Blend, Stitch, padded_to, tile_places
from medssl_cli.data.views import normalize
from medssl_cli.models.dense_decoder import DenseNetwork

_FLIPS: tuple[tuple[int, ...], ...] = ((), (-1,), (-2,), (-2, -1))

T = TypeVar("T")
Progress = Callable[[int, int], None]


class InferSegmentConfig(Config):
    """How a segmentation network looks at a slice."""

    overlap: float = Field(0.5, ge=0, lt=1)
    """Share of a tile that its neighbour sees again."""
    blend: Blend = "gaussian"
    """How tiles are joined: `gaussian` trusts their middle (standard deviation an eighth of the tile), `constant`
    counts all pixels alike."""
    tta: bool = False
    """Average the logits over the four flips of each tile; four times the work."""
    batch_size: PositiveInt = 8
    """Tiles computed together; of several slices where a slice has fewer."""
    save_probabilities: bool = False
    """Keep the probabilities of every voxel too."""


class SliceNetwork(Protocol):
    """What ``segment_planes`` needs of a ``Segmenter``; a training has it before there is a finished run."""

    @property
    def network(self) -> nn.Module:
        """In evaluation mode, on ``device``."""

    @property
    def outputs(self) -> int:
        """Logits of a pixel."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    def tile(self) -> int:
        """Side in pixels of the square that it learned from; 0 shows it whole slices."""

    @property
    def pixel_mm(self) -> float | None:
        """Side of a pixel there in mm; None takes the smaller one of each slice."""

    @property
    def context(self) -> int:
        """Neighbouring slices on each side that it sees too."""

    @property
    def mean(self) -> float | tuple[float, ...]:
        """One number, or one a channel of a slice."""

    @property
    def std(self) -> float | tuple[float, ...]:
        """One number, or one a channel of a slice."""


class Slices(Protocol):
    """Slices in their order along one axis, scaled only when asked for."""

    def __len__(self) -> int: ...

    @property
    def spacing(self) -> tuple[float, float]:
        """Pixel size (y, x) in mm."""

    @property
    def available_S(self) -> np.ndarray:
        """Which channels of a slice exist."""

    def scaled(self, index: int) -> np.ndarray:
        """(S, H, W) float32 in [0, 1], as in training."""


def segment_planes(
    network: SliceNetwork, planes: Slices, config: InferSegmentConfig, *, progress: Progress | None = None
) -> Iterator[np.ndarray]:
    """Probabilities of every slice, one after the other.

    Held at a time: the slices whose tiles are being computed (at most ``batch_size`` tiles, so ``batch_size`` slices of
    one tile each) with S * K + C + 1 floats a pixel of the network's grid, and their neighbours with a context. The
    result does not depend on ``batch_size`` but for the order of the sums inside a matrix product.

    Args:
        network: In evaluation mode.
        planes: Slices of one case.
        config: How.
        progress: Told (slices done, slices).

    Yields:
        (C, H, W) float32 at the slice's own pixels: C = 1 the probability of the one structure (sigmoid), else of every
        class with the background (softmax).

    Raises:
        NonFiniteError: The network gave NaN or infinity.
    """
    if network.context and isinstance(network.network, DenseNetwork):
        stream = _MapPipeline(network, planes.available_S, config).run_maps(network.network, planes)
    else:
        stream = _Pipeline(network, planes.available_S, config).run(_with_neighbours(network, planes))
    for done, probability_CHW in enumerate(stream, start=1):
        yield probability_CHW
        if progress is not None:
            progress(done, len(planes))


def segment_pictures(
    network: SliceNetwork, pictures: Iterable[np.ndarray], config: InferSegmentConfig
) -> Iterator[np.ndarray]:
    """As ``segment_planes``, for pictures (S, H, W) in [0, 1] that may differ in size; each is read in its turn."""
    looked = (_prepared(network, picture_SHW, (1.0, 1.0)) for picture_SHW in pictures)
    yield from _Pipeline(network, None, config).run(looked)


class _Looked(NamedTuple):
    """A slice as the network sees it: normalised, padded to a tile at least.

    Args:
        image_SHW: Perhaps with all K neighbours' channels, slice-major.
        seen: (height, width) of the slice in it, without padding.
        own: (H, W) of the slice as it came.
    """

    image_SHW: Tensor
    seen: tuple[int, int]
    own: tuple[int, int]


def _prepared(network: SliceNetwork, scaled_SHW: np.ndarray, spacing: tuple[float, float]) -> _Looked:
    own = (int(scaled_SHW.shape[-2]), int(scaled_SHW.shape[-1]))
    image = to_resolution(torch.from_numpy(scaled_SHW), spacing, network.pixel_mm).to(network.device)
    seen = (int(image.shape[-2]), int(image.shape[-1]))
    image = padded_to(image, (network.tile, network.tile))
    return _Looked(normalize(image, network.mean, network.std), seen, own)


def _with_neighbours(network: SliceNetwork, planes: Slices) -> Iterator[_Looked]:
    """Every slice with those beside it; each is brought to the network once."""
    context, count = network.context, len(planes)
    near: dict[int, _Looked] = {}
    for index in range(count):
        wanted = neighbours(index, count, context)
        for number in wanted:
            if number not in near:
                near[number] = _prepared(network, planes.scaled(number), planes.spacing)
        image = torch.cat([near[number].image_SHW for number in wanted]) if context else near[index].image_SHW
        yield _Looked(image, near[index].seen, near[index].own)
        near.pop(index - context, None)


def neighbours(index: int, count: int, context: int) -> list[int]:
    """The slices that are shown with one; beyond the first and the last these stand in, as in training."""
    return [min(max(number, 0), count - 1) for number in range(index - context, index + context + 1)]


@dataclass
class _Flight:
    """A slice between its first tile and its last; ``waiting`` tiles of it are not computed yet."""

    looked: _Looked
    stitch: Stitch
    waiting: int


class _Tile(NamedTuple):
    flight: _Flight
    place: tuple[int, int]
    image_Shw: Tensor


class _Pipeline:
    """Slices in, tiles of several slices through the network together, probabilities out in the same order."""

    def __init__(self, network: SliceNetwork, available_S: np.ndarray | None, config: InferSegmentConfig) -> None:
        if network.network.training:
            raise ValueError("a network that is being trained is shown to inference; call eval() first")
        self.network, self.config = network, config
        self.flips = _FLIPS if config.tta else _FLIPS[:1]
        self._available_S = None if available_S is None else torch.as_tensor(available_S, device=network.device).bool()

    def run(self, slices: Iterable[_Looked]) -> Generator[np.ndarray, None, None]:
        """(C, H, W) probabilities of every slice."""
        flights: deque[_Flight] = deque()
        batch: list[_Tile] = []
        for flight, tiles in map(self._start, slices):
            flights.append(flight)
            for tile in tiles:
                if batch and tile.image_Shw.shape != batch[0].image_Shw.shape:
                    self._compute(batch)
                batch.append(tile)
                if len(batch) == self.config.batch_size:
                    self._compute(batch)
            while flights and not flights[0].waiting:
                yield self._probability(flights.popleft())
        if batch:
            self._compute(batch)
        while flights:
            yield self._probability(flights.popleft())

    def _start(self, looked: _Looked) -> tuple[_Flight, Iterator[_Tile]]:
        """A slice with its tiles."""
        image_SHW = looked.image_SHW
        size = (int(image_SHW.shape[-2]), int(image_SHW.shape[-1]))
        tile = (self.network.tile or size[0], self.network.tile or size[1])
        places = tile_places(size, tile, self.config.overlap)
        stitch = Stitch(self.network.outputs, size, tile, self.config.blend, self.network.device)
        flight = _Flight(looked, stitch, len(places))
        tiles = (
            _Tile(flight, (top, left), image_SHW[:, top : top + tile[0], left : left + tile[1]]) for top, left in places
        )
        return flight, tiles

    # --- through -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _compute(self, batch: list[_Tile]) -> None:
        """All tiles of the batch at once; it is empty afterwards."""
        logits_BChw = self._logits(torch.stack([tile.image_Shw for tile in batch]))
        for tile, logits_Chw in zip(batch, logits_BChw, strict=True):
            tile.flight.stitch.add(logits_Chw, tile.place)
            tile.flight.waiting -= 1
        batch.clear()

    def _logits(self, tiles_BShw: Tensor) -> Tensor:
        """(B, C, h, w), the mean over the flips."""
        available_BS = self._available(tiles_BShw)
        return self._mean_of_flips(lambda axes: self.network.network(flipped(tiles_BShw, axes), available_BS))

    def _mean_of_flips(self, look: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
        total: Tensor | float = 0.0
        for axes in self.flips:
            total = flipped(look(axes), axes).float() + total
        return torch.as_tensor(total) / len(self.flips)

    def _available(self, tiles_BShw: Tensor) -> Tensor:
        """(B, S) of tiles; pictures have all their channels."""
        if self._available_S is None:
            return torch.ones(tiles_BShw.shape[:2], dtype=torch.bool, device=tiles_BShw.device)
        return self._available_S.expand(len(tiles_BShw), -1)

    # --- out ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _probability(self, flight: _Flight) -> np.ndarray:
        height, width = flight.looked.seen
        logits_CHW = flight.stitch.mean()[:, :height, :width]
        if not torch.isfinite(logits_CHW).all():
            raise NonFiniteError(
                "The segmentation network gives NaN or infinite values.",
                fix="use an earlier checkpoint or another model; the images themselves are finite",
                code="logits_nonfinite",
            )
        probability_CHW = logits_CHW.sigmoid() if len(logits_CHW) == 1 else logits_CHW.softmax(0)
        return resized(probability_CHW, flight.looked.own).cpu().numpy()


@dataclass
class _Mapped:
    """A slice with its tiles and, of each, the maps of every flip and layer."""

    flight: _Flight
    tiles: list[_Tile]
    maps: list[list[list[Tensor]]]


class _MapPipeline(_Pipeline):
    """Slices with neighbours through a network that tells maps of single slices from what it makes of several.

    The backbone sees every tile once, whatever the context; without this each would pass it 2 * context + 1 times.
    """

    def run_maps(self, network: DenseNetwork, planes: Slices) -> Generator[np.ndarray, None, None]:
        """(C, H, W) probabilities of every slice.

        Held at a time: the maps of as many slices as fill a batch, and of their neighbours.
        """
        count, context = len(planes), self.network.context
        near: dict[int, _Mapped] = {}
        start, together = 0, 1
        while start < count:
            stop = min(count, start + together)
            for number in range(max(0, start - context), min(count, stop + context)):
                if number not in near:
                    flight, tiles = self._start(_prepared(self.network, planes.scaled(number), planes.spacing))
                    near[number] = _Mapped(flight, list(tiles), [])
            self._map(network, [mapped for mapped in near.values() if not mapped.maps])
            self._decode(network, near, range(start, stop), count)
            for index in range(start, stop):
                yield self._probability(near[index].flight)
                near.pop(index - context, None)
            together = max(1, self.config.batch_size // len(near[stop - 1].tiles))
            start = stop

    @torch.no_grad()
    def _map(self, network: DenseNetwork, fresh: list[_Mapped]) -> None:
        """The maps of all tiles of these slices."""
        for batch in _batches([(mapped, tile) for mapped in fresh for tile in mapped.tiles], self.config.batch_size):
            tiles_BShw = torch.stack([tile.image_Shw for _, tile in batch])
            available_BS = self._available(tiles_BShw)
            of_flips = [network.maps(flipped(tiles_BShw, axes), available_BS) for axes in self.flips]
            for number, (mapped, _) in enumerate(batch):
                mapped.maps.append([[layer[number] for layer in layers] for layers in of_flips])

    @torch.no_grad()
    def _decode(self, network: DenseNetwork, near: dict[int, _Mapped], indices: range, count: int) -> None:
        """Logits of all tiles of these slices, from their maps and those of their neighbours."""
        tiles = [(index, number) for index in indices for number in range(len(near[index].tiles))]
        for batch in _batches(tiles, self.config.batch_size):
            tiles_BShw = torch.stack([near[index].tiles[number].image_Shw for index, number in batch])
            look = partial(self._decoded, network, near, batch, tiles_BShw, count)
            for (index, number), logits_Chw in zip(batch, self._mean_of_flips(look), strict=True):
                near[index].flight.stitch.add(logits_Chw, near[index].tiles[number].place)

    def _decoded(
        self,
        network: DenseNetwork,
        near: dict[int, _Mapped],
        batch: Sequence[tuple[int, int]],
        tiles_BShw: Tensor,
        count: int,
        axes: tuple[int, ...],
    ) -> Tensor:
        """(B, C, h, w) of one flip, still mirrored."""
        flip = self.flips.index(axes)
        sides = range(2 * self.network.context + 1)
        maps = [self._maps_beside(near, batch, beside, flip, count) for beside in sides]
        logits = network.decode(maps, flipped(tiles_BShw, axes), None, self._available(tiles_BShw))
        assert isinstance(logits, Tensor)  # a list in training alone
        return logits

    def _maps_beside(
        self, near: dict[int, _Mapped], batch: Sequence[tuple[int, int]], beside: int, flip: int, count: int
    ) -> list[Tensor]:
        """Of every layer the maps (B, D, h, w) of the neighbour ``beside`` of each tile."""
        context = self.network.context
        maps = [near[neighbours(index, count, context)[beside]].maps[number][flip] for index, number in batch]
        return [torch.stack(layer) for layer in zip(*maps, strict=True)]


def _batches(items: list[T], size: int) -> Iterator[list[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def flipped(images: Tensor, axes: tuple[int, ...]) -> Tensor:
    """(..., H, W) mirrored along ``axes``; its own inverse."""
    return images.flip(axes) if axes else images


def resized(probability_CHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Probabilities at the slice's own pixels; averaged over them where the network's are finer."""
    return resize_image(probability_CHW, size).clamp(0, 1)
