from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medssl_cli.core.case import Case, Sequence
from medssl_cli.core.errors import DataError, NonFiniteError
from medssl_cli.core.volume import Volume
from medssl_cli.data.images import write_image, write_volume
from medssl_cli.data.labelled_volumes import to_resolution
from medssl_cli.data.preprocess import PreprocessConfig
from medssl_cli.data.tiles import Stitch, tile_places, tile_starts, tile_weights
from medssl_cli.data.volume_stream import write_volumes
from medssl_cli.services.segmentation_inference import (
    InferSegmentConfig,
    decide,
    neighbours,
    read_slices,
    segment_case,
    segment_pictures,
    segment_planes,
    threshold_of,
)

CPU = torch.device("cpu")


class Pointwise(nn.Module):
    """Logits from each pixel alone: known answers."""

    def __init__(self, logits: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.logits = logits
        self.shapes: list[tuple[int, ...]] = []
        self.available: list[Tensor] = []
        self.eval()

    def forward(self, images_BSHW: Tensor, available_BS: Tensor | None = None) -> Tensor:
        self.shapes.append(tuple(images_BSHW.shape))
        if available_BS is not None:
            self.available.append(available_BS)
        return self.logits(images_BSHW)


def bright(images: Tensor) -> Tensor:
    """Positive from the grey value 0.5 on, of the first channel."""
    return 40 * (images[:, :1] - 0.5)


class Silent(Pointwise):
    """Without a record of what it has seen, which would grow."""

    def forward(self, images_BSHW: Tensor, available_BS: Tensor | None = None) -> Tensor:
        return self.logits(images_BSHW)


def convolution(channels: int, outputs: int, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Conv2d(channels, 8, 5, padding=2), nn.GELU(), nn.Conv2d(8, outputs, 5, padding=2))
    return Pointwise(network.requires_grad_(False).eval())


@dataclass(frozen=True)
class Fake:
    """What a Segmenter is, made by hand."""

    network: nn.Module = field(default_factory=lambda: Pointwise(bright))
    outputs: int = 1
    tile: int = 32
    pixel_mm: float | None = None
    context: int = 0
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0
    device: torch.device = CPU
    sequences: tuple[str, ...] = ("ct",)
    classes: tuple[str, ...] = ("background", "lesion")
    threshold: float | None = None
    preprocess: PreprocessConfig = field(default_factory=lambda: PreprocessConfig(window_hu=(0.0, 100.0)))
    windows_hu: tuple[tuple[str, float, float], ...] = ()
    channels: int = 1
    plain: bool = False
    pictures: bool = False
    task: str = "semantic"
    card: dict[str, Any] = field(default_factory=dict)
    run: Path = Path("runs/fake")


@dataclass(frozen=True)
class Planes:
    images_NSHW: np.ndarray
    spacing: tuple[float, float] = (1.0, 1.0)

    def __len__(self) -> int:
        return len(self.images_NSHW)

    @property
    def available_S(self) -> np.ndarray:
        return np.ones(self.images_NSHW.shape[1], dtype=bool)

    def scaled(self, index: int) -> np.ndarray:
        return self.images_NSHW[index]


def random_planes(count: int = 3, channels: int = 1, size: tuple[int, int] = (50, 70)) -> Planes:
    return Planes(np.random.default_rng(0).random((count, channels, *size)).astype(np.float32))


def probabilities(segmenter: Fake, planes: Planes, **keys: Any) -> np.ndarray:
    return np.stack(list(segment_planes(segmenter, planes, InferSegmentConfig(**keys))))


# --- tiles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "tile", "overlap"), [(50, 32, 0.5), (64, 32, 0.0), (33, 32, 0.9), (32, 32, 0.5)])
def test_tiles_cover_an_axis_and_end_with_it(size: int, tile: int, overlap: float) -> None:
    starts = tile_starts(size, tile, overlap)
    covered = np.zeros(size, int)
    for start in starts:
        covered[start : start + tile] += 1
    assert covered.min() >= 1
    assert starts[0] == 0
    assert starts[-1] == size - tile
    assert starts == sorted(set(starts))
    with pytest.raises(ValueError, match="pad it first"):
        tile_starts(tile - 1, tile, overlap)


@pytest.mark.parametrize("blend", ["gaussian", "constant"])
def test_stitched_tiles_are_the_slice_itself(blend: Any) -> None:
    image = torch.from_numpy(np.random.default_rng(1).random((2, 45, 61)).astype(np.float32))
    stitch = Stitch(2, (45, 61), (16, 24), blend, CPU)
    for top, left in tile_places((45, 61), (16, 24), 0.4):
        stitch.add(image[:, top : top + 16, left : left + 24], (top, left))
    torch.testing.assert_close(stitch.mean(), image, rtol=1e-6, atol=1e-6)


def test_weights_are_those_of_monai() -> None:
    from monai.data.utils import compute_importance_map

    expected = compute_importance_map((32, 48), mode="gaussian", sigma_scale=0.125).clamp_min(1e-3)
    torch.testing.assert_close(tile_weights((32, 48), "gaussian"), expected, rtol=1e-5, atol=1e-6)
    assert (tile_weights((4, 6), "constant") == 1).all()


# --- slices ----------------------------------------------------------------------------------------------------------


def test_slices_come_back_as_they_went_in() -> None:
    planes = random_planes()
    network = Pointwise(lambda images: torch.logit(images.clamp(1e-4, 1 - 1e-4)))
    found = probabilities(Fake(network), planes)
    np.testing.assert_allclose(found, planes.images_NSHW.clip(1e-4, 1 - 1e-4), atol=2e-5)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("mode", ["gaussian", "constant"])
def test_a_sliding_window_is_that_of_monai(mode: Any, outputs: int) -> None:
    from monai.inferers import sliding_window_inference

    planes = random_planes(channels=2, size=(75, 90))
    network = convolution(2, outputs)
    found = probabilities(Fake(network, outputs=outputs, mean=0.4, std=0.3), planes, blend=mode, overlap=0.5)
    images = (torch.from_numpy(planes.images_NSHW) - 0.4) / 0.3
    logits = sliding_window_inference(images, (32, 32), 4, network, overlap=0.5, mode=mode, sigma_scale=0.125)
    expected = logits.sigmoid() if outputs == 1 else logits.softmax(1)
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-6)


def test_the_result_does_not_depend_on_the_batch() -> None:
    planes, segmenter = random_planes(5), Fake(convolution(1, 2), outputs=2)
    one = probabilities(segmenter, planes, batch_size=1)
    for batch_size in (3, 8, 100):
        np.testing.assert_allclose(probabilities(segmenter, planes, batch_size=batch_size), one, atol=1e-6)


def test_tiles_of_several_slices_are_computed_together() -> None:
    planes = random_planes(6, size=(20, 25))
    network = convolution(1, 1)
    probabilities(Fake(network), planes, batch_size=4)
    assert network.shapes == [(4, 1, 32, 32), (2, 1, 32, 32)]


def test_one_tile_that_covers_a_slice_is_one_pass() -> None:
    planes, network = random_planes(2, size=(30, 40)), convolution(1, 1)
    images = torch.from_numpy(planes.images_NSHW)
    padded = torch.nn.functional.pad(images, (0, 8, 0, 18))
    expected = network(padded).sigmoid()[:, :, :30, :40]
    np.testing.assert_allclose(probabilities(Fake(network, tile=48), planes), expected.numpy(), atol=1e-6)
    whole = network(images).sigmoid()
    np.testing.assert_allclose(probabilities(Fake(network, tile=0), planes), whole.numpy(), atol=1e-6)


def test_flips_are_averaged_before_the_sigmoid() -> None:
    planes, network = random_planes(2, size=(32, 32)), convolution(1, 1)
    images = torch.from_numpy(planes.images_NSHW)
    flips: list[tuple[int, ...]] = [(), (-1,), (-2,), (-1, -2)]
    logits = torch.stack([network(images.flip(axes)).flip(axes) for axes in flips]).mean(0)
    found = probabilities(Fake(network), planes, tta=True)
    np.testing.assert_allclose(found, logits.sigmoid().numpy(), atol=1e-6)
    assert np.abs(found - probabilities(Fake(network), planes)).max() > 1e-3


def test_neighbours_are_channels_and_the_outermost_stand_in() -> None:
    assert [neighbours(z, 3, 1) for z in range(3)] == [[0, 0, 1], [0, 1, 2], [1, 2, 2]]
    assert neighbours(0, 1, 2) == [0] * 5
    planes = random_planes(4, channels=2, size=(32, 32))
    network = Pointwise(lambda images: images[:, [0, 3, 4]])  # before: seq 1, here: seq 2, after: seq 1
    logits: list[np.ndarray] = []

    def keep(images: Tensor) -> Tensor:
        logits.append(images.numpy().copy())
        return images[:, :1]

    network = Pointwise(keep)
    probabilities(Fake(network, context=1), planes, batch_size=1)
    for z, seen in enumerate(logits):
        expected = np.concatenate([planes.images_NSHW[n] for n in neighbours(z, 4, 1)])
        np.testing.assert_array_equal(seen[0], expected)
    assert network.available[0].tolist() == [[True, True]]


def test_each_slice_is_read_once_with_neighbours() -> None:
    reads: list[int] = []

    class Counting(Planes):
        def scaled(self, index: int) -> np.ndarray:
            reads.append(index)
            return super().scaled(index)

    probabilities(Fake(convolution(3, 1), context=1), Counting(random_planes(5).images_NSHW))
    assert reads == list(range(5))


def test_anisotropic_pixels_become_square_as_in_training_and_come_back() -> None:
    planes = Planes(random_planes(2, size=(24, 40)).images_NSHW, spacing=(2.0, 0.5))
    network = convolution(1, 1)
    found = probabilities(Fake(network, tile=0), planes)
    assert network.shapes[-1][-2:] == (96, 40)
    assert found.shape == (2, 1, 24, 40)
    seen = to_resolution(torch.from_numpy(planes.images_NSHW[0]), (2.0, 0.5), None)
    expected = torch.nn.functional.interpolate(network(seen[None]).sigmoid(), (24, 40), mode="bilinear", antialias=True)
    np.testing.assert_allclose(found[:1], expected.numpy(), atol=1e-6)
    probabilities(Fake(network, tile=0, pixel_mm=1.0), planes)
    assert network.shapes[-1][-2:] == (48, 20)


def test_pictures_of_several_sizes_keep_theirs() -> None:
    sizes = [(20, 30), (20, 30), (41, 16), (20, 30)]
    pictures = [np.random.default_rng(n).random((2, *size)).astype(np.float32) for n, size in enumerate(sizes)]
    network = convolution(2, 1)
    found = list(segment_pictures(Fake(network, tile=0), iter(pictures), InferSegmentConfig()))
    for picture, probability in zip(pictures, found, strict=True):
        expected = network(torch.from_numpy(picture)[None]).sigmoid()[0]
        np.testing.assert_allclose(probability, expected.numpy(), atol=1e-6)
    assert not list(segment_pictures(Fake(network), iter([]), InferSegmentConfig()))


def test_progress_is_told_slice_by_slice() -> None:
    told: list[tuple[int, int]] = []
    for _ in segment_planes(Fake(), random_planes(3), InferSegmentConfig(), progress=lambda *n: told.append(n)):
        pass
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_a_network_in_training_and_numbers_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="eval"):
        probabilities(Fake(Pointwise(bright).train()), random_planes())
    with pytest.raises(NonFiniteError, match="NaN"):
        probabilities(Fake(Pointwise(lambda images: images / 0)), random_planes())


def test_decisions_by_threshold_and_by_the_largest() -> None:
    one = np.array([[[0.2, 0.3, 0.31]]], np.float32)
    assert decide(one, np.float32(0.3)).tolist() == [[0, 1, 1]]
    several = np.array([[[0.2, 0.4]], [[0.5, 0.4]], [[0.3, 0.2]]], np.float32)
    assert decide(several, 0.9).tolist() == [[1, 0]]
    assert decide(several, 0.9).dtype == np.uint8


def test_c23_the_threshold_of_validation_counts_unless_another_is_asked_for() -> None:
    segmenter: Any = Fake(threshold=0.3)
    assert threshold_of(segmenter, None) == (0.3, "validation data of the training")
    assert threshold_of(segmenter, 0.7) == (0.7, "--threshold")
    assert threshold_of(Fake(), None)[0] == 0.5
    assert threshold_of(Fake(outputs=3), None) == (None, None)


# --- cases -----------------------------------------------------------------------------------------------------------


def oblique(shape: tuple[int, int, int], spacing: tuple[float, float, float], codes: str = "LAS") -> np.ndarray:
    """An affine (x, y, z) turned by 12 degrees about z and 8 about x, nearest to ``codes``."""
    turn_z, turn_x = np.deg2rad(12), np.deg2rad(8)
    about_z = np.array([[np.cos(turn_z), -np.sin(turn_z), 0], [np.sin(turn_z), np.cos(turn_z), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(turn_x), -np.sin(turn_x)], [0, np.sin(turn_x), np.cos(turn_x)]])
    axes = {"L": (-1, 0, 0), "R": (1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
    affine = np.eye(4)
    affine[:3, :3] = about_z @ about_x @ np.array([axes[code] for code in codes], float).T * spacing
    affine[:3, 3] = (-17.0, 23.0, 5.0)
    return affine


def lit_case(folder: Path, voxel: tuple[int, int, int], codes: str, **keys: Any) -> tuple[Case, np.ndarray, np.ndarray]:
    """A volume with one bright voxel (z, y, x), and a little noise that no threshold reaches."""
    shape = keys.get("shape", (7, 40, 50))
    array = np.random.default_rng(0).integers(0, 20, shape).astype(np.int16)
    array[voxel] = 100
    affine = oblique(shape, keys.get("spacing", (0.8, 0.8, 3.0)), codes)
    path = folder / f"{codes}.nii.gz"
    write_volume(path, Volume(array, affine))
    return Case("P1", "P1", {"ct": Sequence("ct", path)}), array, affine


@pytest.mark.parametrize("codes", ["LAS", "RAS", "PIR", "SLA", "LPI"])
def test_a_lit_voxel_lands_at_its_own_place(codes: str, tmp_path: Path) -> None:
    voxel = (2, 31, 9)
    case, array, _ = lit_case(tmp_path, voxel, codes)
    segmented = segment_case(Fake(), case, InferSegmentConfig())
    assert np.argwhere(segmented.label_map.array).tolist() == [list(voxel)]
    assert segmented.label_map.array.dtype == np.uint8
    assert segmented.label_map.array.shape == array.shape
    np.testing.assert_array_equal(segmented.label_map.affine, nib.load(case.sequences["ct"].path).affine)
    assert segmented.voxels == {"lesion": 1}
    assert segmented.volumes_ml is not None
    assert segmented.volumes_ml["lesion"] == pytest.approx(0.8 * 0.8 * 3.0 / 1000, rel=1e-5)


def test_anisotropic_slices_too(tmp_path: Path) -> None:
    case, _, _ = lit_case(tmp_path, (3, 12, 37), "LAS", spacing=(0.5, 1.0, 3.0))
    segmented = segment_case(Fake(threshold=0.4), case, InferSegmentConfig())
    assert np.argwhere(segmented.label_map.array).tolist() == [[3, 12, 37]]


def test_a_resampled_grid_comes_back_to_that_of_the_file(tmp_path: Path) -> None:
    z, y, x = np.meshgrid(*(np.arange(n) for n in (12, 40, 50)), indexing="ij")
    inside = (z - 5) ** 2 * 9 + (y - 25) ** 2 + (x - 15) ** 2 < 81
    affine = oblique((12, 40, 50), (1.0, 1.0, 3.0), "LAS")
    write_volume(tmp_path / "ct.nii.gz", Volume(np.where(inside, 100, 0).astype(np.int16), affine))
    case = Case("P1", "P1", {"ct": Sequence("ct", tmp_path / "ct.nii.gz")})
    preprocess = PreprocessConfig(window_hu=(0.0, 100.0), resample_mm=(1.5, 1.5, 1.5))
    segmented = segment_case(Fake(preprocess=preprocess), case, InferSegmentConfig())
    found = segmented.label_map.array.astype(bool)
    assert segmented.labels_NHW.shape != found.shape == inside.shape
    assert 2 * (found & inside).sum() / (found.sum() + inside.sum()) > 0.93


def test_probabilities_lie_on_the_grid_of_the_file_and_on_the_disk(tmp_path: Path) -> None:
    case, array, _ = lit_case(tmp_path, (2, 31, 9), "SLA", spacing=(3.0, 0.8, 0.8))
    network = Pointwise(lambda images: torch.cat([-images, images, images - 2], 1))
    segmenter = Fake(network, outputs=3, classes=("background", "a", "b"))
    config = InferSegmentConfig(save_probabilities=True)
    segmented = segment_case(segmenter, case, config, scratch=tmp_path / "scratch")
    kept = segmented.probabilities
    assert isinstance(kept, np.memmap)
    assert kept.shape == (3, *array.shape)
    assert kept.dtype == np.float32
    grey = torch.from_numpy(np.clip(array / 100, 0, 1).astype(np.float32))
    expected = torch.stack([-grey, grey, grey - 2]).softmax(0)
    np.testing.assert_allclose(kept, expected.numpy(), atol=1e-6)
    assert sorted(path.name for path in (tmp_path / "scratch").iterdir()) == ["probabilities_restored.npy"]
    with pytest.raises(ValueError, match="scratch"):
        segment_case(segmenter, case, config)


def test_volumes_are_written_one_by_one_as_nibabel_reads_them(tmp_path: Path) -> None:
    volumes = np.random.default_rng(0).random((3, 4, 5, 6)).astype(np.float32)
    affine = oblique((4, 5, 6), (0.7, 0.8, 2.0), "LPI")
    for suffix in ("nii", "nii.gz"):
        path = tmp_path / f"v.{suffix}"
        write_volumes(path, volumes, affine)
        image = nib.load(path)
        np.testing.assert_array_equal(np.asarray(image.dataobj), volumes.transpose(3, 2, 1, 0))
        np.testing.assert_allclose(image.affine, affine, atol=1e-6)
        assert image.header.get_data_dtype() == np.float32
        assert int(image.header["sform_code"]) == int(image.header["qform_code"]) == 1
        write_volumes(tmp_path / f"one.{suffix}", volumes[:1], affine)
        assert nib.load(tmp_path / f"one.{suffix}").shape == (6, 5, 4)


def test_limits_of_single_slices_are_those_of_the_whole_volume(tmp_path: Path) -> None:
    from medssl_cli.core.volume import AXIAL
    from medssl_cli.data.preprocess import prepare_case, scale_to_unit, sequence_limits

    case, _, _ = lit_case(tmp_path, (2, 31, 9), "LAS")
    preprocess = PreprocessConfig()
    slices = read_slices(case, Fake(preprocess=preprocess))
    prepared = prepare_case(case, ("ct",), preprocess)
    low, high = sequence_limits("ct", prepared.images_SZYX[0], AXIAL, preprocess)
    for z in range(len(slices)):
        expected = scale_to_unit(prepared.images_SZYX[:, z], low[z : z + 1], high[z : z + 1])
        np.testing.assert_array_equal(slices.scaled(z), expected)


def test_a_missing_sequence_is_zeros_and_told_to_the_network(tmp_path: Path) -> None:
    case, _, _ = lit_case(tmp_path, (2, 31, 9), "LAS")
    network = Pointwise(bright)
    segmenter = Fake(network, sequences=("ct", "pet"), channels=2)
    segment_case(segmenter, case, InferSegmentConfig())
    assert network.available[0].tolist() == [[True, False]] * len(network.available[0])
    with pytest.raises(DataError, match="none of the sequences"):
        segment_case(replace(segmenter, sequences=("a", "b")), case, InferSegmentConfig())


def test_windows_of_one_ct_are_channels(tmp_path: Path) -> None:
    case, array, _ = lit_case(tmp_path, (2, 31, 9), "RAS")
    windows = (("all", 0.0, 100.0), ("low", 0.0, 10.0))
    segmenter = Fake(sequences=("image",), plain=True, windows_hu=windows, channels=2)
    image = Sequence("image", case.sequences["ct"].path)
    slices = read_slices(Case("P1", "P1", {"image": image}), segmenter)
    np.testing.assert_allclose(slices.scaled(4)[0], np.clip(array[4] / 100, 0, 1), atol=1e-6)
    np.testing.assert_allclose(slices.scaled(4)[1], np.clip(array[4] / 10, 0, 1), atol=1e-6)
    assert slices.available_S.tolist() == [True, True]


def test_a_picture_gets_a_label_image_of_its_own_size(tmp_path: Path) -> None:
    picture = np.zeros((60, 90, 3), np.uint8)
    picture[40:48, 10:30, 0] = 255
    write_image(tmp_path / "p.png", picture)
    case = Case("p", "p", {"image": Sequence("image", tmp_path / "p.png")})
    segmenter = Fake(sequences=("image",), plain=True, pictures=True, channels=3, mean=(0.0,) * 3, std=(1.0,) * 3)
    segmented = segment_case(segmenter, case, InferSegmentConfig())
    np.testing.assert_array_equal(segmented.label_map.array[0], picture[..., 0] > 0)
    assert segmented.is_picture
    assert segmented.volumes_ml is None
    assert segmented.voxels == {"lesion": 160}
    reduced = replace(segmenter, preprocess=PreprocessConfig(picture_side=30))
    segmented = segment_case(reduced, case, InferSegmentConfig(save_probabilities=True), scratch=tmp_path / "s")
    assert segmented.label_map.array.shape == (1, 60, 90)
    assert segmented.labels_NHW.shape == (1, 30, 45)
    assert segmented.probabilities is not None
    assert segmented.probabilities.shape == (1, 1, 60, 90)
    overlap = (segmented.label_map.array[0].astype(bool) & (picture[..., 0] > 0)).sum()
    assert overlap / 160 > 0.9
    grey = replace(segmenter, channels=4)
    with pytest.raises(DataError, match="channels"):
        segment_case(grey, case, InferSegmentConfig())


def peak_bytes(depth: int, folder: Path) -> int:
    """Of everything that NumPy and Python allocate while a volume of this depth is segmented."""
    array = np.random.default_rng(0).integers(0, 100, (depth, 96, 96)).astype(np.int16)
    path = folder / f"{depth}.nii"
    write_volume(path, Volume(array, np.diag([1.0, 1.0, 2.0, 1.0])))
    case = Case("P1", "P1", {"ct": Sequence("ct", path)})
    segmenter = Fake(Silent(lambda images: torch.cat([images] * 6, 1)), outputs=6, classes=tuple("0abcde"))
    slices = read_slices(case, segmenter)
    gc.collect()
    tracemalloc.start()
    labels = np.zeros((depth, 96, 96), np.uint8)
    for z, probability in enumerate(segment_planes(segmenter, slices, InferSegmentConfig(batch_size=2))):
        labels[z] = decide(probability, 0.5)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def test_memory_grows_by_the_label_map_alone(tmp_path: Path) -> None:
    shallow, deep = peak_bytes(16, tmp_path), peak_bytes(112, tmp_path)
    assert deep - shallow < 1.05 * 96 * 96 * 96  # one byte a voxel


def test_torch_holds_a_few_slices_whatever_the_depth() -> None:
    alive: list[int] = []

    def count(images: Tensor) -> Tensor:
        tensors = [thing for thing in gc.get_objects() if type(thing) is Tensor]
        alive.append(sum(thing.numel() * thing.element_size() for thing in tensors))
        return images[:, :1]

    planes = random_planes(16, size=(64, 64))
    for _ in segment_planes(Fake(Silent(count), context=1), planes, InferSegmentConfig(batch_size=18)):
        pass
    assert max(alive[len(alive) // 2 :]) <= 1.2 * max(alive[1:6])


# --- the network with neighbours -------------------------------------------------------------------------------------


def dense_network(context: int, sequences: tuple[str, ...] | None = ("t2", "adc")) -> Any:
    from medssl_cli.models.dense_decoder import DecoderConfig, DenseNetwork
    from medssl_cli.models.vit import VisionTransformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = {"embed_dim": 16, "depth": 4, "num_heads": 2, "patch_size": 8, "img_size": 32}
        backbone = VisionTransformer(**settings, sequences=sequences)
        network = DenseNetwork(backbone, 2, DecoderConfig(base=8), context=context)
        for parameter in network.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.2)  # the maps of neighbours begin without effect
    return network.requires_grad_(False).eval()


@pytest.mark.parametrize("tta", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_maps_of_neighbours_computed_once_give_the_same(tta: bool, batch_size: int) -> None:
    network = dense_network(1)
    planes = random_planes(5, channels=2, size=(40, 50))
    found = probabilities(Fake(network, outputs=2, context=1), planes, tta=tta, batch_size=batch_size)
    slow = Pointwise(lambda images: network(images, torch.ones(len(images), 2, dtype=torch.bool)))
    expected = probabilities(Fake(slow, outputs=2, context=1), planes, tta=tta, batch_size=batch_size)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    alone = probabilities(Fake(network, outputs=2, context=1), random_planes(5, channels=2, size=(40, 50)))
    moved = random_planes(5, channels=2, size=(40, 50)).images_NSHW.copy()
    moved[3] = 1 - moved[3]
    beside = probabilities(Fake(network, outputs=2, context=1), Planes(moved))
    assert [bool(np.abs(beside[z] - alone[z]).max() > 1e-4) for z in range(5)] == [False, False, True, True, True]


def test_the_backbone_sees_each_tile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    network, seen = dense_network(2), []
    maps = network.maps

    def counted(images: Tensor, available: Tensor | None = None) -> list[Tensor]:
        seen.append(len(images))
        return maps(images, available)

    monkeypatch.setattr(network, "maps", counted)
    planes = random_planes(7, channels=2, size=(32, 32))
    assert probabilities(Fake(network, outputs=2, context=2), planes, batch_size=4).shape == (7, 2, 32, 32)
    assert sum(seen) == 7
