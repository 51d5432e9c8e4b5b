"""Crops and intensity changes against torch's own resize, SciPy, colorsys and float64 loops of the formulas."""

from __future__ import annotations

import colorsys
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage
from scipy.interpolate import make_interp_spline

from medssl_cli.data import transforms
from medssl_cli.data.transforms import (
    AreaCrop,
    ColorJitter,
    HistogramShift,
    RandomConvolution,
    SideCrop,
    SplineCurve,
    rank_pixels,
)

BOXES = [(3, 5, 40, 31), (0, 0, 60, 70), (20, 30, 7, 9), (59, 69, 1, 1), (10, 0, 32, 32)]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def everything(crops: torch.Tensor) -> torch.Tensor:
    return torch.ones(crops.shape[:2], dtype=torch.bool)


# --- resize ----------------------------------------------------------------------------------------------------------


def bicubic_row_by_loop(length: int, size: int, i: int) -> np.ndarray:
    """Weights of ``length`` pixels for output pixel ``i``, in float64, from Keys' kernel widened by the scale."""
    scale = length / size
    wide = max(scale, 1.0)
    weights = np.zeros(length)
    for j in range(length):
        x = abs((j + 0.5 - (i + 0.5) * scale) / wide)
        if x < 1:
            weights[j] = 1.5 * x**3 - 2.5 * x**2 + 1
        elif x < 2:
            weights[j] = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return weights / weights.sum()


@pytest.mark.parametrize("size", [14, 32, 48])
@pytest.mark.parametrize("flip", [False, True])
def test_crops_equal_torch_antialiased_bicubic(size: int, flip: bool) -> None:
    batch = images(1, 3, 60, 70)
    boxes = torch.tensor(BOXES)
    crops = transforms.resize_crops(batch, boxes, np.full(len(BOXES), flip), size)
    for crop, (top, left, height, width) in zip(crops, BOXES, strict=True):
        cut = batch[:, :, top : top + height, left : left + width]
        expected = F.interpolate(cut, (size, size), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)[0]
        torch.testing.assert_close(crop, expected.flip(-1) if flip else expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("length", "size"), [(40, 32), (200, 32), (9, 32), (32, 32), (1, 5)])
def test_resampling_matrix_equals_the_formula(length: int, size: int) -> None:
    matrix = transforms.resampling_matrices(torch.tensor([4]), torch.tensor([length]), size, length + 10)[0]
    expected = np.stack([bicubic_row_by_loop(length, size, i) for i in range(size)])
    np.testing.assert_allclose(matrix[:, 4 : 4 + length].numpy(), expected, atol=1e-6)
    assert matrix[:, :4].abs().max() == 0
    assert matrix[:, 4 + length :].abs().max() == 0


def test_batched_products_equal_single_ones() -> None:
    batch = images(2, 3, 50, 40)
    boxes = AreaCrop((0.1, 1.0), (0.75, 1.33)).draw(4, torch.tensor([[50, 40], [30, 35]]), None, rng())
    rows = transforms.resampling_matrices(boxes[:, 0], boxes[:, 2], 28, 50)
    columns = transforms.resampling_matrices(boxes[:, 1], boxes[:, 3], 28, 40)
    each = transforms._resample_each(batch, rows, columns, boxes)
    together = transforms._resample_all(batch, rows, columns, boxes)
    torch.testing.assert_close(together, each, atol=2e-6, rtol=0)


def test_whole_image_at_its_own_size_is_unchanged() -> None:
    batch = images(2, 2, 24, 24)
    crops = transforms.resize_crops(batch, torch.tensor([[0, 0, 24, 24]] * 2), np.zeros(2, dtype=bool), 24)
    assert torch.equal(crops, batch)


# --- boxes -----------------------------------------------------------------------------------------------------------


def area_box_by_loop(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """RandomResizedCrop of a share 0.1 .. 0.6 of the area, aspect 3/4 .. 4/3."""
    for _ in range(10):
        area = height * width * rng.uniform(0.1, 0.6)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    raise AssertionError("no box fitted")


def test_area_boxes_are_distributed_as_random_resized_crops() -> None:
    ours = AreaCrop((0.1, 0.6), (3 / 4, 4 / 3)).draw(2000, torch.tensor([[90, 60]]), None, rng()).double().numpy()
    loop_rng = rng(1)
    theirs = np.array([area_box_by_loop(90, 60, loop_rng) for _ in range(2000)], dtype=float)
    error = 5 * np.sqrt((ours.var(0) + theirs.var(0)) / 2000)
    assert np.all(np.abs(ours.mean(0) - theirs.mean(0)) < error)
    assert np.all(np.abs(ours.std(0) - theirs.std(0)) < error)


@pytest.mark.parametrize("kind", [AreaCrop, SideCrop])
@pytest.mark.parametrize("scale", [(0.05, 0.32), (0.9, 1.0), (0.001, 0.002)])
def test_boxes_lie_inside_the_true_region(kind: type[AreaCrop | SideCrop], scale: tuple[float, float]) -> None:
    sizes = torch.tensor([[7, 90], [64, 64], [1, 1], [33, 5]])
    roi = images(4, 64, 90) > 0.9
    boxes = kind(scale, (3 / 4, 4 / 3)).draw(200, sizes, rank_pixels(roi), rng())
    limits = sizes.repeat(200, 1)
    assert boxes.dtype == torch.int64
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] >= 1).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= limits).all()


def test_thin_image_falls_back_to_a_centred_box_of_allowed_aspect() -> None:
    boxes = AreaCrop((0.9, 1.0), (3 / 4, 4 / 3)).draw(50, torch.tensor([[300, 30]]), None, rng())
    assert torch.equal(boxes, torch.tensor([[130, 0, 40, 30]]).expand(50, 4))


def test_t33_scale_is_a_share_of_the_side_with_a_region_of_interest() -> None:
    sizes = torch.tensor([[200, 120]])
    boxes = SideCrop((0.5, 0.5), (3 / 4, 4 / 3)).draw(4000, sizes, None, rng()).double()
    share = boxes[:, 2:] / sizes
    # one side is exactly half; the other half times U(3/4, 4/3), whose mean is 25/24
    assert ((share == 0.5).sum(1) >= 1).all()
    assert share.mean().item() == pytest.approx(0.5 * (1 + 25 / 24) / 2, abs=0.004)
    assert share.min().item() >= 0.36
    assert share.max().item() <= 0.68
    assert (share.prod(1)).mean().item() == pytest.approx(0.25 * 25 / 24, abs=0.004)


def test_roi_crops_are_centred_on_uniform_pixels_of_the_mask() -> None:
    roi = torch.zeros(2, 80, 80, dtype=torch.bool)
    roi[0, 40:44, 30:32] = True
    boxes = SideCrop((0.25, 0.25), (1.0, 1.0)).draw(4000, torch.tensor([[80, 80], [80, 80]]), rank_pixels(roi), rng())
    centres = (boxes[:, :2] + boxes[:, 2:] // 2).view(4000, 2, 2)
    found, counts = torch.unique(centres[:, 0], dim=0, return_counts=True)
    assert {tuple(c) for c in found.tolist()} == {(y, x) for y in range(40, 44) for x in (30, 31)}
    assert counts.min() > 400
    assert torch.equal(centres[:, 1].unique(dim=0), torch.tensor([[40, 40]]))  # empty mask: middle of the image


def test_roi_crop_at_the_border_is_moved_not_cut() -> None:
    roi = torch.zeros(1, 80, 80, dtype=torch.bool)
    roi[0, 0, 79] = True
    boxes = SideCrop((0.5, 0.5), (1.0, 1.0)).draw(1, torch.tensor([[80, 80]]), rank_pixels(roi), rng())
    assert boxes.tolist() == [[0, 40, 40, 40]]


# --- random convolution ----------------------------------------------------------------------------------------------


def bilinear_by_scipy(image: np.ndarray, size: int) -> np.ndarray:
    at = np.linspace(0, image.shape[0] - 1, size)
    return ndimage.map_coordinates(image, np.meshgrid(at, at, indexing="ij"), order=1, mode="nearest")


def random_net_by_scipy(sequences: np.ndarray, kernels: list[np.ndarray], alpha: float, size: int) -> np.ndarray:
    """(S, G, G) float64, straight from the description."""
    side = sequences.shape[-1]
    filtered = []
    for sequence in sequences:
        layers = bilinear_by_scipy(sequence * 2 - 1, size)[None]
        for i, kernel in enumerate(kernels):
            layers = np.stack(
                [
                    sum(ndimage.correlate(x, k, mode="nearest") for x, k in zip(layers, out, strict=True))
                    for out in kernel.astype(np.float64)
                ]
            )
            if i < 3:
                layers = np.where(layers > 0, layers, 0.01 * layers)
        filtered.append(bilinear_by_scipy(layers[0], side))
    y = np.stack(filtered)
    y = (y - y.min()) / (y.max() - y.min())
    return np.where(sequences == 0, 0, alpha * y + (1 - alpha) * sequences)


@pytest.mark.parametrize(("size", "side"), [(64, 28), (32, 32), (48, 50), (512, 112)])
def test_random_convolution_equals_the_plain_net(size: int, side: int) -> None:
    crops = images(2, 3, side, side)
    crops[:, :, :5] = 0
    change = RandomConvolution(1.0, size)
    draws = change.draw(2, 3, rng())
    result = change.apply(crops, draws, everything(crops)).numpy()
    crop = 1
    expected = random_net_by_scipy(
        crops[crop].double().numpy(), [k[crop] for k in draws.kernels], draws.alpha_V[crop], size
    )
    np.testing.assert_allclose(result[crop], expected, atol=3e-5)


def test_random_nets_of_many_crops_at_once_equal_single_ones() -> None:
    """The grouped convolutions of an accelerator, run here."""
    crops = images(5, 2, 20, 20)
    change = RandomConvolution(1.0, 32)
    draws = change.draw(5, 2, rng())
    shapes = ((2, 1, 2), (2, 2, 2), (2, 2, 2), (4, 2, 2))
    kernels = [transforms._block_kernels(torch.as_tensor(k), *s) for k, s in zip(draws.kernels, shapes, strict=True)]
    together = transforms._filter(crops, kernels, 32)
    single = [transforms._filter(crops[v : v + 1], [k[v : v + 1] for k in kernels], 32) for v in range(5)]
    torch.testing.assert_close(together, torch.cat(single, 1), atol=1e-4, rtol=1e-5)


def test_rc_keeps_zeros_range_and_the_crops_it_is_not_for() -> None:
    crops = images(40, 2, 16, 16)
    crops[:, 0, 4:9] = 0
    change = RandomConvolution(0.5, 32)
    draws = change.draw(40, 2, rng())
    result = change.apply(crops, draws, everything(crops))
    assert torch.equal(result == 0, crops == 0)
    assert result.min() >= 0
    assert result.max() <= 1
    untouched = torch.as_tensor(draws.alpha_V == 0)
    assert 10 < untouched.sum() < 30
    assert torch.equal(result[untouched], crops[untouched])
    assert (result[~untouched] - crops[~untouched]).abs().amax((1, 2, 3)).min() > 1e-3


def test_rc_runs_no_net_for_the_crops_that_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    filtered, plain = [], transforms._filter

    def counting(crops: torch.Tensor, *rest: Any) -> torch.Tensor:
        filtered.append(len(crops))
        return plain(crops, *rest)

    monkeypatch.setattr(transforms, "_filter", counting)
    crops = images(6, 2, 16, 16)
    change = RandomConvolution(1.0, 32)
    draws = change.draw(6, 2, rng())
    every = change.apply(crops, draws, everything(crops))
    draws.alpha_V[[0, 2, 3]] = 0
    filtered.clear()
    some = change.apply(crops, draws, everything(crops))
    assert sum(filtered) == 3
    assert torch.equal(some[[1, 4, 5]], every[[1, 4, 5]])
    draws.alpha_V[:] = 0
    assert torch.equal(change.apply(crops, draws, everything(crops)), crops)
    assert sum(filtered) == 3


def test_rc_shares_one_net_between_sequences_and_none_between_crops() -> None:
    crops = images(1, 1, 16, 16).expand(3, 2, 16, 16).clone()
    change = RandomConvolution(1.0, 32)
    draws = change.draw(3, 2, rng())
    draws.alpha_V[:] = 1
    result = change.apply(crops, draws, everything(crops))
    assert torch.equal(result[:, 0], result[:, 1])
    assert not torch.allclose(result[0], result[1], atol=1e-2)
    assert not torch.allclose(result[1], result[2], atol=1e-2)


@pytest.mark.parametrize("change", [RandomConvolution(1.0, 32), HistogramShift()], ids=["rc", "histogram"])
def test_absent_sequence_does_not_move_the_joint_range(change: RandomConvolution | HistogramShift) -> None:
    crops = 0.2 + 0.5 * images(4, 2, 16, 16)
    alone = crops[:, :1]
    draws = change.draw(4, 2, rng())
    crops[:, 1] = 0
    available = torch.tensor([[True, False]]).expand(4, 2)
    together = change.apply(crops, draws, available)
    expected = change.apply(alone, draws, available[:, :1])
    torch.testing.assert_close(together[:, :1], expected, atol=1e-6, rtol=0)


def test_rc_of_a_constant_crop_is_finite() -> None:
    crops = torch.full((2, 1, 16, 16), 0.3)
    change = RandomConvolution(1.0, 32)
    assert change.apply(crops, change.draw(2, 1, rng()), everything(crops)).isfinite().all()


# --- other intensities -----------------------------------------------------------------------------------------------


def jitter_by_colorsys(pixel: tuple[float, float, float], kind: int, factor: float, mean: float) -> list[float]:
    r, g, b = pixel
    grey = 0.299 * r + 0.587 * g + 0.114 * b
    if kind == 3:
        h, s, v = colorsys.rgb_to_hsv(r, g, b)
        return list(colorsys.hsv_to_rgb((h + factor) % 1.0, s, v))
    other = (0.0, mean, grey)[kind]
    return [min(max(factor * c + (1 - factor) * other, 0), 1) for c in pixel]


@pytest.mark.parametrize("kind", [0, 1, 2, 3], ids=["brightness", "contrast", "saturation", "hue"])
def test_colour_jitter_equals_colorsys(kind: int) -> None:
    crops = images(3, 3, 6, 6)
    crops[0, :, 0, 0] = 0.4  # grey has no hue
    draws = ColorJitter(1.0).draw(3, 3, rng())
    neutral = np.array([1.0, 1.0, 1.0, 0.0])
    draws.factor_V4 = np.where(np.arange(4) == kind, draws.factor_V4, neutral)
    draws.grey_V[:] = False
    result = ColorJitter(1.0).apply(crops, draws, everything(crops))
    for v in range(3):
        x = crops[v].double().numpy()
        mean = float((0.299 * x[0] + 0.587 * x[1] + 0.114 * x[2]).mean())
        for at in np.ndindex(6, 6):
            pixel = (x[0][at], x[1][at], x[2][at])
            expected = jitter_by_colorsys(pixel, kind, draws.factor_V4[v, kind], mean)
            np.testing.assert_allclose(result[v, :, at[0], at[1]].numpy(), expected, atol=2e-6)


def test_colour_jitter_follows_its_draws() -> None:
    draws = ColorJitter().draw(4000, 3, rng())
    assert np.all(np.abs(draws.factor_V4 - [1, 1, 1, 0]) <= [0.4, 0.4, 0.2, 0.1])
    np.testing.assert_allclose(draws.factor_V4.mean(0), [1, 1, 1, 0], atol=0.02)
    assert draws.changed_V.mean() == pytest.approx(0.8, abs=0.03)
    assert draws.grey_V.mean() == pytest.approx(0.2, abs=0.03)
    assert len(np.unique(draws.order_V4, axis=0)) == 24
    crops = images(40, 3, 4, 4)
    few = ColorJitter().draw(40, 3, rng())
    result = ColorJitter().apply(crops, few, everything(crops))
    same = torch.as_tensor(~few.changed_V & ~few.grey_V)
    assert same.any()
    assert torch.equal(result[same], crops[same])
    grey = result[torch.as_tensor(few.grey_V)]
    assert torch.equal(grey[:, 0], grey[:, 2])
    assert result.min() >= 0
    assert result.max() <= 1


def test_colour_jitter_of_one_channel_is_brightness_and_contrast() -> None:
    crops = images(2, 1, 5, 5)
    draws = ColorJitter(1.0).draw(2, 1, rng())
    draws.order_V4[:] = [2, 0, 3, 1]
    result = ColorJitter(1.0).apply(crops, draws, everything(crops))
    for v in range(2):
        x = np.clip(crops[v].double().numpy() * draws.factor_V4[v, 0], 0, 1)
        expected = np.clip(draws.factor_V4[v, 1] * x + (1 - draws.factor_V4[v, 1]) * x.mean(), 0, 1)
        np.testing.assert_allclose(result[v].numpy(), expected, atol=1e-6)


def test_bspline_equals_scipy_and_pins_its_ends() -> None:
    crops = images(30, 2, 8, 8)
    crops[:, :, 0, 0], crops[:, :, 0, 1] = 0, 1
    change = SplineCurve()
    draws = change.draw(30, 2, rng())
    result = change.apply(crops, draws, everything(crops))
    knots = np.linspace(0, 1, 5)
    assert 15 <= draws.changed_V.sum() < 30
    for v in range(30):
        if not draws.changed_V[v]:
            assert torch.equal(result[v], crops[v])
            continue
        heights = np.append(draws.curve[v, :, 3], 1.0)  # constant terms: the spline at the left ends of its pieces
        assert heights[0] == 0
        assert np.all(np.diff(heights) >= 0)
        expected = np.clip(make_interp_spline(knots, heights, k=3)(crops[v].double().numpy()), 0, 1)
        np.testing.assert_allclose(result[v].numpy(), expected, atol=1e-5)
    assert (result[:, :, 0, 0] == 0).all()
    torch.testing.assert_close(result[:, :, 0, 1], torch.ones(30, 2), atol=1e-6, rtol=0)


def test_histogram_shift_equals_numpy_interp() -> None:
    crops = 0.1 + 0.8 * images(30, 2, 8, 8)
    change = HistogramShift()
    draws = change.draw(30, 2, rng())
    result = change.apply(crops, draws, everything(crops)).numpy()
    counts = draws.curve[:, 0].astype(int)
    assert set(counts) <= set(range(3, 11))
    for v in range(30):
        x = crops[v].double().numpy()
        heights = draws.curve[v, 1 : 1 + counts[v]]
        assert heights[0] == 0
        assert heights[-1] == 1
        assert np.all(np.diff(heights) >= 0)
        low, high = x.min(), x.max()
        at = np.linspace(0, 1, counts[v]) * (high - low) + low
        np.testing.assert_allclose(result[v], np.interp(x, at, heights * (high - low) + low), atol=2e-6)


def test_histogram_shift_draws_between_its_neighbours() -> None:
    """The first inner point of n is uniform in 0 .. 2/(n-1), the second between it and 3/(n-1)."""
    curve = HistogramShift(points=(4, 4)).draw(4000, 1, rng()).curve
    assert curve[:, 2].mean() == pytest.approx(1 / 3, abs=0.012)
    assert curve[:, 2].max() <= 2 / 3
    assert np.all((curve[:, 3] >= curve[:, 2]) & (curve[:, 3] <= 1))
    assert curve[:, 3].mean() == pytest.approx(2 / 3, abs=0.012)


def test_histogram_shift_leaves_a_constant_crop() -> None:
    crops = torch.full((2, 1, 4, 4), 0.7)
    assert torch.equal(HistogramShift().apply(crops, HistogramShift().draw(2, 1, rng()), everything(crops)), crops)


def eight_bits(crop_3GG: torch.Tensor) -> Image.Image:
    return Image.fromarray((crop_3GG * 255).round().byte().permute(1, 2, 0).numpy())


@pytest.mark.parametrize(
    ("kind", "pillow"),
    [(0, ImageEnhance.Brightness), (1, ImageEnhance.Contrast), (2, ImageEnhance.Color)],
    ids=["brightness", "contrast", "saturation"],
)
def test_colour_jitter_equals_pillow(kind: int, pillow: Any) -> None:
    crops = (images(3, 3, 12, 12) * 255).round() / 255
    draws = ColorJitter(1.0).draw(3, 3, rng(2))
    draws.factor_V4 = np.where(np.arange(4) == kind, draws.factor_V4, [1.0, 1.0, 1.0, 0.0])
    draws.grey_V[:] = False
    result = ColorJitter(1.0).apply(crops, draws, everything(crops)) * 255
    for v in range(3):
        expected = np.asarray(pillow(eight_bits(crops[v])).enhance(draws.factor_V4[v, kind]), dtype=float)
        np.testing.assert_allclose(result[v].permute(1, 2, 0).numpy(), expected, atol=2)  # Pillow cuts to whole levels


def test_grey_and_solarise_equal_pillow() -> None:
    crops = (images(2, 3, 12, 12) * 255).round() / 255
    draws = ColorJitter(0.0).draw(2, 3, rng())
    draws.grey_V[:] = [True, False]
    grey = ColorJitter(0.0).apply(crops, draws, everything(crops))
    expected = np.asarray(eight_bits(crops[0]).convert("L"), dtype=float)
    for channel in grey[0]:
        np.testing.assert_allclose(255 * channel.numpy(), expected, atol=1)
    assert torch.equal(grey[1], crops[1])
    solarised = transforms.solarize(crops, np.array([True, True]))
    for v in range(2):
        expected = np.asarray(ImageOps.solarize(eight_bits(crops[v]), 128), dtype=float)
        np.testing.assert_allclose(255 * solarised[v].permute(1, 2, 0).numpy(), expected, atol=1e-3)


def test_mirrored_crops_equal_pillow() -> None:
    crops = (images(1, 3, 12, 12) * 255).round() / 255
    box = torch.tensor([[0, 0, 12, 12]])
    result = transforms.resize_crops(crops, box, np.array([True]), 12)[0]
    expected = np.asarray(ImageOps.mirror(eight_bits(crops[0])), dtype=float)
    np.testing.assert_allclose(255 * result.permute(1, 2, 0).numpy(), expected, atol=1e-3)


# --- extras ----------------------------------------------------------------------------------------------------------


def test_blur_equals_scipy() -> None:
    crops = images(4, 2, 12, 12)
    before = crops.clone()
    sigma = np.array([0.5, 0.0, 1.0, 0.1])
    result = transforms.blur(crops, sigma)
    assert torch.equal(result[1], before[1])
    for v in (0, 2, 3):
        taps = np.exp(-0.5 * (np.arange(-4, 5) / sigma[v]) ** 2)
        taps /= taps.sum()
        x = before[v].double().numpy()
        expected = ndimage.correlate1d(ndimage.correlate1d(x, taps, axis=1, mode="mirror"), taps, axis=2, mode="mirror")
        np.testing.assert_allclose(result[v].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.0])
def test_blur_equals_scipys_gaussian_filter(sigma: float) -> None:
    crops = images(1, 2, 16, 16)
    expected = [ndimage.gaussian_filter(x, sigma, radius=4, mode="mirror") for x in crops[0].double().numpy()]
    np.testing.assert_allclose(transforms.blur(crops, np.array([sigma]))[0].numpy(), expected, atol=1e-6)


def test_t09_blur_hits_the_asked_share_of_crops() -> None:
    for probability in (0.0, 0.1, 0.9, 1.0):
        sigma = transforms.draw_blur(1000, probability, 1.0, rng())
        assert (sigma > 0).mean() == pytest.approx(probability, abs=0.04)
        assert np.all((sigma == 0) | ((sigma >= 0.1) & (sigma <= 1.0)))


def test_gamma_and_solarize_follow_their_formulas() -> None:
    crops = images(2, 1, 4, 4)
    np.testing.assert_allclose(
        transforms.gamma(crops, np.array([0.75, 1.5])).numpy(),
        crops.double().numpy() ** np.array([0.75, 1.5])[:, None, None, None],
        atol=1e-6,
    )
    result = transforms.solarize(crops, np.array([True, False]))
    assert torch.equal(result[1], crops[1])
    expected = [[1 - x if x >= 0.5 else x for x in row] for row in crops[0, 0].tolist()]
    torch.testing.assert_close(result[0, 0], torch.tensor(expected))
