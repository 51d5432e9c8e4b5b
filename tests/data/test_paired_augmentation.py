"""Image and label move together, as SciPy moves them; what is not drawn changes no bit; draws make a batch again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import ndimage

from medssl_cli.core.protocols import IGNORE_LABEL, LabelledBatch
from medssl_cli.data.paired_augmentation import (
    PairedAugment,
    PairedAugmentConfig,
    PairedDraws,
    elastic_radius,
    smooth,
)

NOTHING = {
    "horizontal_flip": 0,
    "vertical_flip": 0,
    "affine_prob": 0,
    "elastic_prob": 0,
    "brightness_contrast_prob": 0,
    "noise_prob": 0,
}
ALWAYS = dict.fromkeys(NOTHING, 1)


def augment_of(**values: object) -> PairedAugment:
    return PairedAugment(PairedAugmentConfig.model_validate({**NOTHING, **values}))


def batch_of(count: int = 4, height: int = 40, width: int = 36, channels: int = 2, classes: int = 2) -> LabelledBatch:
    rng = np.random.default_rng(0)
    return LabelledBatch(
        images_BSHW=torch.from_numpy(rng.random((count, channels, height, width), np.float32)),
        label_map_BHW=torch.from_numpy(rng.integers(0, classes, (count, height, width))),
        available_BS=torch.ones(count, channels, dtype=torch.bool),
        sizes_B2=torch.tensor([[height, width]] * count),
        case_ids=[str(n) for n in range(count)],
    )


def disc_batch(count: int = 24, side: int = 96) -> LabelledBatch:
    """A bright disc in PET, off the centre, and its mask; CT is flat."""
    y, x = np.mgrid[:side, :side]
    disc = torch.from_numpy(((y - 40) ** 2 + (x - 55) ** 2 < 15**2).astype(np.int64))
    images = torch.stack([torch.full((side, side), 0.3), disc * 0.8 + 0.1])
    return LabelledBatch(
        images_BSHW=images.repeat(count, 1, 1, 1).float(),
        label_map_BHW=disc.repeat(count, 1, 1),
        available_BS=torch.ones(count, 2, dtype=torch.bool),
        sizes_B2=torch.tensor([[side, side]] * count),
        case_ids=["disc"] * count,
    )


def padded(batch: LabelledBatch, more: int) -> LabelledBatch:
    """The same samples beside a larger one: padded at the bottom and right."""
    count, channels, height, width = batch.images_BSHW.shape
    images = torch.zeros(count, channels, height + more, width + more)
    images[:, :, :height, :width] = batch.images_BSHW
    labels = torch.full((count, height + more, width + more), IGNORE_LABEL)
    labels[:, :height, :width] = batch.label_map_BHW
    return LabelledBatch(images, labels, batch.available_BS, batch.sizes_B2, batch.case_ids)


def equal(a: LabelledBatch, b: LabelledBatch) -> bool:
    return torch.equal(a.images_BSHW, b.images_BSHW) and torch.equal(a.label_map_BHW, b.label_map_BHW)


def by_scipy(
    batch: LabelledBatch, draws: PairedDraws, sample: int, bend_2HW: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a sample from the documented map, mirrored outside, in float64."""
    height, width = (int(n) for n in batch.sizes_B2[sample])
    y, x = np.mgrid[:height, :width].astype(np.float64)
    if bend_2HW is not None:
        x, y = x + bend_2HW[0, :height, :width], y + bend_2HW[1, :height, :width]
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    shift = draws.shift_B2[sample] * (width, height)
    offset = np.stack([x, y]) - (centre + shift)[:, None, None]
    place = np.einsum("ij,jyx->iyx", draws.linear_B22[sample], offset)
    place *= np.where(draws.flip_B2[sample], -1, 1)[:, None, None]
    place += centre[:, None, None]
    images = batch.images_BSHW[sample, :, :height, :width].double().numpy()
    label = batch.label_map_BHW[sample, :height, :width].numpy()
    read = [ndimage.map_coordinates(image, place[::-1], order=1, mode="mirror") for image in images]
    return np.stack(read), ndimage.map_coordinates(label, place[::-1], order=0, mode="mirror")


# --- geometry --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("elastic", [0, 1])
@pytest.mark.parametrize("more", [0, 9])
def test_images_and_labels_are_those_of_scipy(elastic: int, more: int) -> None:
    batch = padded(batch_of(classes=4), more)
    augment = augment_of(
        affine_prob=1, rotate_deg=40, translate=0.3, elastic_prob=elastic, horizontal_flip=0.5, vertical_flip=0.5
    )
    draws = augment.draw(batch, seed=3)
    result = augment.apply(batch, draws)
    for sample in range(4):
        bend = None
        if elastic:
            radius = elastic_radius(6)
            noise = draws.elastic_E2HW[sample].astype(np.float64)
            bend = 120 * ndimage.gaussian_filter(noise, (0, 6, 6), truncate=3.0)[:, radius:-radius, radius:-radius]
        images, label = by_scipy(batch, draws, sample, bend)
        height, width = label.shape
        np.testing.assert_allclose(result.images_BSHW[sample, :, :height, :width], images, atol=2e-4)
        differs = result.label_map_BHW[sample, :height, :width].numpy() != label
        assert differs.mean() < 0.005  # places halfway between two pixels are rounded either way


def test_smoothed_noise_is_that_of_scipy_and_moves_pixels_by_three() -> None:
    radius = elastic_radius(6.0)
    assert radius == 18
    noise = np.random.default_rng(0).uniform(-1, 1, (2, 2, 300 + 2 * radius, 280 + 2 * radius)).astype(np.float32)
    smoothed = smooth(torch.from_numpy(noise), 6.0)
    expected = ndimage.gaussian_filter(noise.astype(np.float64), (0, 0, 6, 6), truncate=3.0)
    np.testing.assert_allclose(smoothed, expected[..., radius:-radius, radius:-radius], atol=1e-6)
    # uniform noise has a deviation of 1/sqrt(3); a Gaussian in two dimensions divides it by 2 sigma sqrt(pi)
    assert 120 * float(smoothed.std()) == pytest.approx(120 / 3**0.5 / (12 * np.pi**0.5), rel=0.05)
    edge = torch.cat([smoothed[..., :6, :].flatten(), smoothed[..., -6:].flatten()])
    assert 120 * float(edge.std()) == pytest.approx(3.26, rel=0.2)


def test_image_and_mask_move_together() -> None:
    batch = disc_batch()
    moved = augment_of(affine_prob=1, elastic_prob=0.5, horizontal_flip=0.5, vertical_flip=0.5, translate=0.2)(batch, 5)
    pet = moved.images_BSHW[:, 1] > 0.5
    mask = moved.label_map_BHW == 1
    dice = 2 * (pet & mask).flatten(1).sum(1) / (pet.flatten(1).sum(1) + mask.flatten(1).sum(1))
    assert float(dice.min()) > 0.97
    assert torch.allclose(moved.images_BSHW[:, 0], torch.tensor(0.3), atol=1e-6)
    stayed = (mask & (batch.label_map_BHW == 1)).flatten(1).sum(1) / mask.flatten(1).sum(1)
    assert float(stayed.mean()) < 0.9


def test_c21_a_rotated_mask_holds_only_0_and_1() -> None:
    moved = augment_of(affine_prob=1, rotate_deg=45, elastic_prob=0.5)(disc_batch(), 1)
    assert moved.label_map_BHW.dtype == torch.int64
    assert moved.label_map_BHW.unique().tolist() == [0, 1]
    assert len(moved.images_BSHW[:, 1].unique()) > 100  # while images are interpolated


def test_translation_moves_both_ways_on_both_axes() -> None:
    batch = disc_batch(60)
    augment = augment_of(affine_prob=1, rotate_deg=0, scale=(1, 1), translate=0.05)
    moved = augment.apply(batch, draws := augment.draw(batch, 2))
    y, x = np.mgrid[:96, :96]
    mask = moved.label_map_BHW.numpy()
    offsets = np.stack([(mask * axis).sum((1, 2)) / mask.sum((1, 2)) for axis in (x, y)], -1) - (55, 40)
    np.testing.assert_allclose(offsets, draws.shift_B2 * 96, atol=0.6)
    for axis in (0, 1):
        assert offsets[:, axis].min() < -2
        assert offsets[:, axis].max() > 2
        assert np.abs(offsets[:, axis]).max() <= 0.05 * 96 + 0.6


def test_scale_and_angle_are_as_drawn() -> None:
    """A disc of radius 15 becomes one of 18; a point turns about the centre."""
    batch = disc_batch(1)
    larger = augment_of(affine_prob=1, rotate_deg=0, translate=0, scale=(1.2, 1.2))(batch, 0)
    area = (batch.label_map_BHW == 1).sum()
    assert float((larger.label_map_BHW == 1).sum() / area) == pytest.approx(1.44, rel=0.03)
    augment = augment_of(affine_prob=1, rotate_deg=90, translate=0, scale=(1, 1))
    draws = augment.draw(batch, 0)
    draws.linear_B22[0] = [[0, 1], [-1, 0]]
    turned = augment.apply(batch, draws).label_map_BHW[0]
    assert torch.equal(turned, batch.label_map_BHW[0].rot90(-1)) or torch.equal(turned, batch.label_map_BHW[0].rot90(1))


@pytest.mark.parametrize("more", [0, 7])
@pytest.mark.parametrize(("horizontal", "vertical"), [(1, 0), (0, 1), (1, 1)])
def test_mirrors_are_exact_and_leave_padding_in_place(more: int, horizontal: int, vertical: int) -> None:
    small = batch_of(3)
    flipped = augment_of(horizontal_flip=horizontal, vertical_flip=vertical)(padded(small, more), 0)
    axes = [-1] * horizontal + [-2] * vertical
    small.images_BSHW, small.label_map_BHW = small.images_BSHW.flip(axes), small.label_map_BHW.flip(axes)
    assert equal(flipped, padded(small, more))


def test_padding_stays_and_a_sample_moves_the_same_beside_a_larger_one() -> None:
    batch = batch_of()
    augment = augment_of(affine_prob=1, translate=0.2, horizontal_flip=0.5, noise_prob=1)
    alone = augment.apply(batch, draws := augment.draw(batch, 4))
    draws.noise_NCHW = np.pad(draws.noise_NCHW, ((0, 0), (0, 0), (0, 11), (0, 11)), constant_values=1.0)
    beside = augment.apply(padded(batch, 11), draws)
    np.testing.assert_allclose(beside.images_BSHW, padded(alone, 11).images_BSHW, atol=1e-4)
    assert (beside.label_map_BHW != padded(alone, 11).label_map_BHW).float().mean() < 0.002
    assert torch.equal(beside.label_map_BHW == IGNORE_LABEL, padded(alone, 11).label_map_BHW == IGNORE_LABEL)


def test_places_far_outside_are_mirrored_again_and_again() -> None:
    batch = batch_of(2)
    moved = augment_of(affine_prob=1, rotate_deg=180, scale=(0.1, 0.1), translate=1.0)(batch, 0)
    assert moved.label_map_BHW.unique().tolist() == [0, 1]
    assert float(moved.images_BSHW.mean()) == pytest.approx(0.5, abs=0.05)


# --- intensity -------------------------------------------------------------------------------------------------------


def test_noise_differs_between_ct_and_pet_and_has_the_drawn_deviation() -> None:
    batch = batch_of(3, 64, 64)
    batch.images_BSHW[:] = 0.5
    moved = augment_of(noise_prob=1, noise_std=(0.05, 0.1))(batch, 0)
    noise = (moved.images_BSHW - 0.5).flatten(2)
    for ct, pet in noise:
        assert abs(float(torch.corrcoef(torch.stack([ct, pet]))[0, 1])) < 0.06
        assert 0.045 < float(ct.std()) < 0.105
        assert float(pet.std()) == pytest.approx(float(ct.std()), rel=0.05)
    assert torch.equal(moved.label_map_BHW, batch.label_map_BHW)


def test_contrast_and_brightness_are_one_line_for_all_channels() -> None:
    batch = batch_of(20)
    batch.images_BSHW.mul_(0.5).add_(0.25)
    augment = augment_of(brightness_contrast_prob=1)
    changed = augment.apply(batch, draws := augment.draw(batch, 0))
    factor, summand = (torch.from_numpy(v).float()[:, None, None, None] for v in (draws.contrast_B, draws.brightness_B))
    torch.testing.assert_close(changed.images_BSHW, batch.images_BSHW * factor + summand)
    for values, centre in ((draws.contrast_B, 1), (draws.brightness_B, 0)):
        assert centre - 0.1 <= values.min() < centre - 0.05
        assert centre + 0.05 < values.max() <= centre + 0.1


def test_images_stay_in_range_and_absent_sequences_at_zero() -> None:
    """Two sequences of three neighbouring slices, slice-major; the second sequence of sample 1 is absent."""
    batch = batch_of(3, channels=6)
    batch.available_BS = torch.tensor([[True, True], [True, False], [True, True]])
    batch.images_BSHW[1, 1::2] = 0
    moved = augment_of(**{**ALWAYS, "brightness": 1, "noise_std": (0.5, 0.5)})(padded(batch, 5), 0)
    assert float(moved.images_BSHW.min()) == 0
    assert float(moved.images_BSHW.max()) == 1
    assert moved.images_BSHW[1, 1::2].abs().sum() == 0
    assert all(channel.abs().sum() > 0 for channel in moved.images_BSHW[1, ::2])
    assert moved.images_BSHW[..., 40:, :].abs().sum() == moved.images_BSHW[..., 36:].abs().sum() == 0


# --- draw, apply, remember -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probability", [0, 1])
def test_identity_changes_no_bit(probability: int) -> None:
    batch = padded(batch_of(classes=5), 3)
    strength = {"rotate_deg": 0, "translate": 0, "scale": (1, 1), "elastic_alpha": 0, "brightness": 0, "contrast": 0}
    chance = dict.fromkeys(("affine_prob", "elastic_prob", "brightness_contrast_prob", "noise_prob"), probability)
    assert equal(augment_of(**strength, **chance, noise_std=(0, 0))(batch, 0), batch)


def test_reading_every_pixel_at_its_own_place_is_the_identity() -> None:
    batch = padded(batch_of(classes=5), 3)
    augment = augment_of(affine_prob=1)
    draws = augment.draw(batch, 0)
    draws.linear_B22[:], draws.shift_B2[:] = np.eye(2), 0
    result = augment.apply(batch, draws)
    torch.testing.assert_close(result.images_BSHW, batch.images_BSHW, atol=1e-5, rtol=0)
    assert torch.equal(result.label_map_BHW, batch.label_map_BHW)


def test_samples_without_a_draw_keep_every_bit_and_the_input_stays() -> None:
    batch = padded(batch_of(12), 3)
    kept = batch.images_BSHW.clone(), batch.label_map_BHW.clone()
    augment = augment_of(affine_prob=0.3, elastic_prob=0.2, noise_prob=0.2, horizontal_flip=0.2)
    draws = augment.draw(batch, 1)
    result = augment.apply(batch, draws)
    untouched = ~(draws.affine_B | draws.elastic_B | draws.noise_B | draws.flip_B2.any(1))
    assert 0 < untouched.sum() < 12
    for sample in range(12):
        same = torch.equal(result.images_BSHW[sample], batch.images_BSHW[sample])
        assert same == untouched[sample]
    assert torch.equal(batch.images_BSHW, kept[0])
    assert torch.equal(batch.label_map_BHW, kept[1])
    assert result.case_ids == batch.case_ids


def test_the_same_seed_and_recorded_draws_make_the_same_batch() -> None:
    batch = batch_of(6)
    augment = PairedAugment(PairedAugmentConfig())
    first = augment(batch, 7)
    assert equal(first, augment(batch, 7))
    assert equal(first, augment.apply(batch, augment.draw(batch, 7)))
    assert not equal(first, augment(batch, 8))


def test_no_setting_moves_the_draws_of_another() -> None:
    batch = batch_of(6)
    everything, some = augment_of(**ALWAYS).draw(batch, 7), augment_of(affine_prob=1).draw(batch, 7)
    assert np.array_equal(everything.linear_B22, some.linear_B22)
    assert np.array_equal(everything.shift_B2, some.shift_B2)
    assert some.elastic_E2HW.shape[0] == some.noise_NCHW.shape[0] == 0


def test_shares_of_samples_are_as_configured() -> None:
    batch = batch_of(1, 16, 16)
    augment = PairedAugment(PairedAugmentConfig())
    draws = [augment.draw(batch, seed) for seed in range(600)]
    for found, expected in (
        ([d.flip_B2[0, 0] for d in draws], 0.5),
        ([d.flip_B2[0, 1] for d in draws], 0.5),
        ([d.affine_B[0] for d in draws], 0.5),
        ([d.elastic_B[0] for d in draws], 0.3),
        ([d.contrast_B[0] != 1 for d in draws], 0.3),
        ([d.noise_B[0] for d in draws], 0.2),
    ):
        assert np.mean(found) == pytest.approx(expected, abs=0.07)


@pytest.mark.parametrize(
    "values", [{"horizontal_flip": 1.5}, {"scale": (1.1, 0.9)}, {"noise_std": (0.2, 0.1)}, {"elastic_sigma": 0}]
)
def test_settings_that_make_no_sense_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PairedAugmentConfig.model_validate(values)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_makes_the_same_batch() -> None:
    batch = batch_of(8, 64, 64)
    augment = augment_of(**ALWAYS)
    draws = augment.draw(batch, 0)
    ours, theirs = augment.apply(batch, draws), augment.apply(batch.to(torch.device("cuda")), draws)
    torch.testing.assert_close(theirs.images_BSHW.cpu(), ours.images_BSHW, atol=1e-3, rtol=0)
    assert (theirs.label_map_BHW.cpu() != ours.label_map_BHW).float().mean() < 0.001
