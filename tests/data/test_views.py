"""Views of a batch: layout, determinism, normalisation, masks, and what a configuration may say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from medssl_cli.core.config import dump_config, load_config
from medssl_cli.core.errors import ConfigError
from medssl_cli.core.protocols import SliceBatch
from medssl_cli.core.run import seed_for
from medssl_cli.data.token_masks import TokenMasks
from medssl_cli.data.views import CropsConfig, MultiCrop, ViewDraws, check_patch, normalize

BACKGROUND = (0 - 0.45) / 0.22


def make_batch(n_samples: int = 3, n_channels: int = 3, side: int = 40, *, roi: bool = True) -> SliceBatch:
    generator = torch.Generator().manual_seed(1)
    region = torch.zeros(n_samples, side, side, dtype=torch.bool)
    region[:, 10:20, 15:30] = True
    return SliceBatch(
        images_BSHW=torch.rand(n_samples, n_channels, side, side, generator=generator),
        sizes_B2=torch.full((n_samples, 2), side),
        available_BS=torch.ones(n_samples, n_channels, dtype=torch.bool),
        roi_BHW=region if roi else None,
        case_ids=[f"case{i}" for i in range(n_samples)],
    )


def small(**values: Any) -> CropsConfig:
    keys = {"global_crops_size": 32, "local_crops_size": 16, "local_crops_number": 4, "rc_size": 32} | values
    return CropsConfig(**keys)


def plain(**values: Any) -> CropsConfig:
    """No change of intensity at all."""
    return small(**({"blur_probs": (0, 0, 0), "gamma_range": (1, 1)} | values))


def raw(views: torch.Tensor) -> torch.Tensor:
    """Intensities before normalisation."""
    return views * 0.22 + 0.45


# --- layout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aug", [None, "none", "rc", "color_jittering", "bspline", "histogram"])
@pytest.mark.parametrize("roi_crop", [False, True])
def test_shapes_and_range(aug: str | None, roi_crop: bool) -> None:
    batch = make_batch()
    crop = MultiCrop(small(intensity_aug=aug, crop_from_tumor_foreground=roi_crop), 8, 3)
    views = crop(batch, 5)
    assert views.global_VSHW.shape == (6, 3, 32, 32)
    assert views.local_VSHW is not None
    assert views.local_VSHW.shape == (12, 3, 16, 16)
    assert views.token_mask_VN.shape == (6, 3 * 16)
    assert views.token_mask_VN.dtype == torch.bool
    assert torch.equal(views.available_BS, batch.available_BS)
    assert views.case_ids == batch.case_ids
    for part in (views.global_VSHW, views.local_VSHW):
        assert part.dtype == torch.float32
        assert raw(part).min() >= -1e-6
        assert raw(part).max() <= 1 + 1e-6


def test_t08_views_lie_view_major() -> None:
    """Sample b has the constant intensity b/4: row v of every output must belong to sample v mod B."""
    batch = make_batch(4)
    batch.images_BSHW = (torch.arange(4) / 4)[:, None, None, None].expand(4, 3, 40, 40).contiguous()
    views = MultiCrop(plain(), 8, 3)(batch, 0)
    assert views.local_VSHW is not None
    for part, n_views in ((views.global_VSHW, 2), (views.local_VSHW, 4)):
        expected = (torch.arange(4) / 4).repeat(n_views)
        torch.testing.assert_close(raw(part).mean((1, 2, 3)), expected, atol=1e-5, rtol=0)
        assert part.std((1, 2, 3)).max() < 1e-5


def test_t08_token_masks_lie_as_the_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mask only sample 0 of view 2: row B and no other."""
    blocks = np.zeros((6, 3, 16), dtype=bool)
    blocks[3, :, 5] = True
    masks = TokenMasks(blocks)
    monkeypatch.setattr("medssl_cli.data.views.draw_token_masks", lambda *args, **kwargs: masks)
    views = MultiCrop(small(), 8, 3)(make_batch(), 0)
    assert views.token_mask_VN.nonzero().tolist() == [[3, 5], [3, 16 + 5], [3, 32 + 5]]


def test_no_local_crops() -> None:
    views = MultiCrop(small(local_crops_number=0, local_crops_size=17), 8, 3)(make_batch(), 0)
    assert views.local_VSHW is None
    assert len(views.global_VSHW) == 6


def test_plain_colour_picture_has_one_sequence_of_tokens() -> None:
    for available in (torch.ones(3, 1, dtype=torch.bool), torch.ones(3, 3, dtype=torch.bool)):
        batch = replace(make_batch(), available_BS=available)
        views = MultiCrop(small(intensity_aug="color_jittering"), 8, 1)(batch, 0)
        assert views.global_VSHW.shape == (6, 3, 32, 32)
        assert views.token_mask_VN.shape == (6, 16)
        assert views.token_mask_VN.any(1).sum() == 3
        assert views.available_BS.shape == (3, 1)


def test_sequences_that_are_not_in_the_batch_are_a_fault_of_ours() -> None:
    with pytest.raises(ValueError, match="2 sequences are configured, the batch has 3 channels"):
        MultiCrop(small(), 8, 2)(make_batch(), 0)


# --- what a crop holds -----------------------------------------------------------------------------------------------


def test_plain_crops_equal_torch_resize_of_their_boxes() -> None:
    batch = make_batch()
    crop = MultiCrop(plain(), 8, 3)
    draws = crop.draw(batch, 3)
    global_VSHW, local_VSHW = crop.apply(batch, draws)
    assert draws.local_views is not None
    assert local_VSHW is not None
    for views, drawn, size in ((global_VSHW, draws.global_views, 32), (local_VSHW, draws.local_views, 16)):
        assert 0 < drawn.flip_V.sum() < len(drawn.flip_V)
        for v, (top, left, height, width) in enumerate(drawn.boxes_V4.tolist()):
            cut = batch.images_BSHW[v % 3, :, top : top + height, left : left + width][None]
            expected = F.interpolate(cut, (size, size), mode="bicubic", antialias=True).clamp(0, 1)[0]
            expected = expected.flip(-1) if drawn.flip_V[v] else expected
            torch.testing.assert_close(raw(views[v]), expected, atol=1e-5, rtol=0)


def test_identity_draws_change_nothing() -> None:
    batch = make_batch(side=32)
    crop = MultiCrop(small(intensity_aug="rc"), 8, 3)
    draws = crop.draw(batch, 0)
    draws.global_views.intensity.alpha_V[:] = 0
    draws.global_views = ViewDraws(
        boxes_V4=torch.tensor([[0, 0, 32, 32]] * 6),
        flip_V=np.zeros(6, dtype=bool),
        intensity=draws.global_views.intensity,
        blur_sigma_V=np.zeros(6),
        gamma_V=np.ones(6),
        solarize_V=np.zeros(6, dtype=bool),
    )
    global_VSHW, _ = crop.apply(batch, draws)
    assert torch.equal(global_VSHW, normalize(batch.images_BSHW).repeat(2, 1, 1, 1))


def test_padding_never_enters_a_crop() -> None:
    batch = make_batch()
    batch.sizes_B2 = torch.tensor([[40, 40], [25, 33], [9, 40]])
    for v, (height, width) in enumerate(batch.sizes_B2.tolist()):
        batch.images_BSHW[v, :, height:] = 0
        batch.images_BSHW[v, :, :, width:] = 0
    poisoned = replace(batch, images_BSHW=batch.images_BSHW.clone())
    for v, (height, width) in enumerate(batch.sizes_B2.tolist()):
        poisoned.images_BSHW[v, :, height:] = 50
        poisoned.images_BSHW[v, :, :, width:] = 50
    crop = MultiCrop(plain(), 8, 3)
    assert torch.equal(crop(batch, 0).global_VSHW, crop(poisoned, 0).global_VSHW)


def test_t34_background_gets_the_value_of_intensity_zero() -> None:
    batch = make_batch()
    batch.images_BSHW[:, :, :, :20] = 0
    for aug in (None, "rc", "bspline", "histogram"):
        crop = MultiCrop(small(intensity_aug=aug, blur_probs=(0, 0, 0)), 8, 3)
        views = crop(batch, 1).global_VSHW
        darkest = views.min()
        assert darkest.item() == pytest.approx(BACKGROUND, abs=1e-6)
        assert (views == darkest).float().mean() > 0.2
        assert (views == 0).float().mean() < 0.01


@pytest.mark.parametrize("aug", [None, "rc", "color_jittering", "bspline", "histogram"])
def test_absent_sequence_is_constant_and_has_no_influence(aug: str | None) -> None:
    batch = make_batch()
    batch.available_BS[1, 2] = False
    batch.images_BSHW[1, 2] = 0
    views = MultiCrop(small(intensity_aug=aug), 8, 3)(batch, 2)
    absent = torch.stack([views.global_VSHW[1, 2], views.global_VSHW[4, 2]])
    torch.testing.assert_close(absent, torch.full_like(absent, BACKGROUND), atol=1e-6, rtol=0)
    if aug not in (None, "color_jittering"):
        two = replace(batch, images_BSHW=batch.images_BSHW[:, :2], available_BS=batch.available_BS[:, :2])
        alone = MultiCrop(small(intensity_aug=aug), 8, 2)(two, 2)
        torch.testing.assert_close(views.global_VSHW[[1, 4], :2], alone.global_VSHW[[1, 4]], atol=1e-4, rtol=0)


def test_gamma_is_drawn_for_every_second_view_and_no_other() -> None:
    batch = make_batch(200, 1, 8)
    crop = MultiCrop(small(), 8, 1)
    draws = crop.draw(batch, 0)
    assert draws.local_views is not None
    first, second = np.split(draws.global_views.gamma_V.copy(), 2)
    assert np.all(first == 1)
    assert np.all((second >= 0.75) & (second <= 1.5))
    assert second.mean() == pytest.approx(1.125, abs=0.05)
    assert np.all(draws.local_views.gamma_V == 1)
    raised, _ = crop.apply(batch, draws)
    draws.global_views.gamma_V[:] = 1
    linear, _ = crop.apply(batch, draws)
    assert torch.equal(raised[:200], linear[:200])
    expected = raw(linear[200:]).clamp(0, 1) ** torch.as_tensor(second, dtype=torch.float32)[:, None, None, None]
    torch.testing.assert_close(raw(raised[200:]), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("probs", [(0.0, 0.9, 0.5), (1.0, 0.1, 0.5)])
def test_t09_blurred_crops_are_as_many_as_asked(probs: tuple[float, float, float]) -> None:
    batch = make_batch(500, 1, 8)
    draws = MultiCrop(small(blur_probs=probs, local_crops_number=2), 8, 1).draw(batch, 0)
    assert draws.local_views is not None
    blurred = draws.global_views.blur_sigma_V > 0
    shares = (blurred[:500].mean(), blurred[500:].mean(), (draws.local_views.blur_sigma_V > 0).mean())
    assert shares == pytest.approx(probs, abs=0.06)


def test_t09_changed_crops_are_those_that_drew_a_blur() -> None:
    batch = make_batch(30)
    crop = MultiCrop(small(gamma_range=(1, 1), local_crops_number=0), 8, 3)
    draws = crop.draw(batch, 0)
    blurred, _ = crop.apply(batch, draws)
    sigma = draws.global_views.blur_sigma_V.copy()
    draws.global_views.blur_sigma_V[:] = 0
    sharp, _ = crop.apply(batch, draws)
    changed = (blurred != sharp).any(1).any(1).any(1).numpy()
    np.testing.assert_array_equal(changed[sigma > 0.3], True)
    np.testing.assert_array_equal(changed[sigma == 0], False)
    assert not changed[:30].any()


def test_solarize_meets_second_views_of_plain_pictures_only() -> None:
    batch = make_batch(300, 3, 8)
    picture = MultiCrop(small(intensity_aug="color_jittering"), 8, 1).draw(batch, 0).global_views.solarize_V
    assert not picture[:300].any()
    assert picture[300:].mean() == pytest.approx(0.2, abs=0.08)
    assert not MultiCrop(small(intensity_aug="color_jittering"), 8, 3).draw(batch, 0).global_views.solarize_V.any()
    assert not MultiCrop(small(intensity_aug="rc"), 8, 1).draw(batch, 0).global_views.solarize_V.any()


def test_normalisation_of_each_channel() -> None:
    crops = torch.full((2, 3, 4, 4), 0.5)
    result = normalize(crops, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    expected = [(0.5 - 0.485) / 0.229, (0.5 - 0.456) / 0.224, (0.5 - 0.406) / 0.225]
    torch.testing.assert_close(result[1, :, 2, 2], torch.tensor(expected))
    assert crops.unique().tolist() == [0.5]
    with pytest.raises(ConfigError) as error:
        normalize(crops[:, :1], (0.4, 0.4, 0.4))
    assert "crops.mean has 3 values, the images have 1 channels" in error.value.where


# --- randomness ------------------------------------------------------------------------------------------------------


def test_same_seed_same_bytes_and_another_seed_differs() -> None:
    batch = make_batch()
    crop = MultiCrop(small(intensity_aug="rc"), 8, 3)
    torch.manual_seed(1)
    first = crop(batch, seed_for(0, "views", 7, 0))
    torch.manual_seed(2)
    np.random.seed(3)
    again = MultiCrop(small(intensity_aug="rc"), 8, 3)(batch, seed_for(0, "views", 7, 0))
    other = crop(batch, seed_for(0, "views", 8, 0))
    assert first.local_VSHW is not None
    assert again.local_VSHW is not None
    assert torch.equal(first.global_VSHW, again.global_VSHW)
    assert torch.equal(first.local_VSHW, again.local_VSHW)
    assert torch.equal(first.token_mask_VN, again.token_mask_VN)
    assert not torch.equal(first.global_VSHW, other.global_VSHW)
    assert not torch.equal(first.token_mask_VN, other.token_mask_VN)


def test_recorded_draws_make_the_same_crops_again() -> None:
    batch = make_batch()
    crop = MultiCrop(small(intensity_aug="histogram", crop_from_tumor_foreground=True), 8, 3)
    draws = crop.draw(batch, 4)
    first, again = crop.apply(batch, draws), crop.apply(batch, draws)
    assert torch.equal(first[0], again[0])
    assert first[1] is not None
    assert again[1] is not None
    assert torch.equal(first[1], again[1])
    assert torch.equal(first[0], crop(batch, 4).global_VSHW)


def test_input_is_left_as_it_was() -> None:
    batch = make_batch()
    before = batch.images_BSHW.clone()
    MultiCrop(small(intensity_aug="rc"), 8, 3)(batch, 0)
    assert torch.equal(batch.images_BSHW, before)


def test_t21_mixing_factors_never_repeat() -> None:
    """Two processes, two epochs of four steps, two micro-batches: no factor twice, in no view."""
    batch = make_batch()
    crop = MultiCrop(small(intensity_aug="rc"), 8, 3)
    alphas: list[float] = []
    for rank in range(2):
        for step in range(8):
            for micro in range(2):
                draws = crop.draw(batch, seed_for(0, "views", rank, step, micro))
                assert draws.local_views is not None
                alphas += [*draws.global_views.intensity.alpha_V, *draws.local_views.intensity.alpha_V]
    assert len(alphas) == 2 * 8 * 2 * 3 * 6
    assert len(set(alphas)) == len(alphas)


def test_one_setting_does_not_move_the_draws_of_another() -> None:
    batch = make_batch()
    one = MultiCrop(small(), 8, 3).draw(batch, 0)
    two = MultiCrop(small(intensity_aug="rc", blur_probs=(1, 1, 1), horizontal_flip=0), 8, 3).draw(batch, 0)
    assert torch.equal(one.global_views.boxes_V4, two.global_views.boxes_V4)
    np.testing.assert_array_equal(one.global_views.gamma_V, two.global_views.gamma_V)
    np.testing.assert_array_equal(one.token_masks.flat(), two.token_masks.flat())


# --- token masks -----------------------------------------------------------------------------------------------------


def test_the_only_sequence_of_a_case_is_never_hidden_whole() -> None:
    batch = make_batch(8)
    batch.available_BS[:4] = torch.tensor([True, False, False])
    hidden = MultiCrop(small(), 4, 3)(batch, 1).token_mask_VN.unflatten(1, (3, -1)).all(2)
    alone = torch.tensor([True] * 4 + [False] * 4).repeat(2)
    assert not hidden[alone].any()
    assert (hidden[~alone].sum(1) == 1).all()


def test_t05_an_absent_sequence_is_never_the_one_that_is_hidden_whole() -> None:
    """With two of three sequences each of the two is hidden in half of the crops, and every crop has a target."""
    batch = make_batch(300)
    batch.available_BS[:100, 0] = batch.available_BS[100:200, 1] = batch.available_BS[200:250, 2] = False
    hidden = MultiCrop(small(), 4, 3, mask_sample_probability=0)(batch, 1).token_mask_VN.unflatten(1, (3, -1)).all(2)
    available = batch.available_BS.repeat(2, 1)
    assert (hidden.sum(1) == 1).all()
    assert not (hidden & ~available).any()
    share = [hidden[available.eq(torch.tensor(kind)).all(1)].float().mean(0) for kind in ([False, True, True],)]
    assert share[0].tolist() == pytest.approx([0, 0.5, 0.5], abs=0.12)  # 200 crops: 3.4 standard deviations


def test_mask_settings_reach_the_sampler() -> None:
    crop = MultiCrop(small(), 4, 3, mask_sample_probability=1.0, mask_ratio_min_max=(0.25, 0.25), mask_mode="shared")
    masked = crop(make_batch(), 0).token_mask_VN.unflatten(1, (3, -1))
    assert torch.equal(masked, masked[:, :1].expand(-1, 3, -1))
    assert (masked.sum(2) <= 16).all()
    assert (masked.sum(2) >= 13).all()


def test_w19_before_the_first_masked_epoch_no_token_is_hidden_and_the_crops_are_the_same() -> None:
    crop = MultiCrop(small(), 4, 3, mask_sample_probability=1.0)
    whole, masked = (crop(make_batch(), 7, masking=masking) for masking in (False, True))
    assert not whole.token_mask_VN.any()  # the sequence that would be hidden whole included
    assert masked.token_mask_VN.any(1).all()
    assert whole.token_mask_VN.shape == masked.token_mask_VN.shape
    assert torch.equal(whole.global_VSHW, masked.global_VSHW)
    assert torch.equal(whole.local_VSHW, masked.local_VSHW)


def test_ibot_mask_settings_reach_the_sampler() -> None:
    settings: dict[str, Any] = {"mask_mode": "shared", "mask_sampling": "per_image"}
    crop = MultiCrop(small(), 4, 1, pred_ratio=(0.25,), pred_ratio_var=(0.0,), pred_shape="rand", **settings)
    counts = crop(make_batch(8, 1), 0).token_mask_VN.sum(1)
    assert (counts == counts[0]).all()
    tokens = crop.grid[0] * crop.grid[1]
    assert counts[0] == tokens // 4
    short = MultiCrop(small(), 4, 1, pred_ratio=(0.45,), pred_ratio_var=(0.0,), mask_exact=True, **settings)
    assert (short(make_batch(8, 1), 0).token_mask_VN.sum(1) == int(0.45 * tokens)).all()


# --- configuration ---------------------------------------------------------------------------------------------------


def test_views_of_ibot_for_photographs_can_be_written_down() -> None:
    """Aspect 0.8 to 1.2, jitter, grey, blur as it says up to 2, solarised second views, no gamma, no local crops."""
    config = small(
        crops_aspect=(0.8, 1.2), local_crops_number=0, intensity_aug="color_jittering", intensity_aug_prob=0.8,
        color_jitter=(0.4, 0.4, 0.2, 0.1), grey_prob=0.2, blur_probs=(1.0, 0.1, 0.5), max_blur_radius=2.0,
        solarize_prob=0.2, gamma_range=(1.0, 1.0), mean=(0.4, 0.3, 0.2), std=(0.3, 0.2, 0.1),
    )  # fmt: skip
    crop, batch = MultiCrop(config, 4, 1), make_batch(400, 3, roi=False)
    draws = crop.draw(batch, 0)
    views = draws.global_views
    aspect = (views.boxes_V4[:, 3] / views.boxes_V4[:, 2]).double()
    assert 0.72 < aspect.min() < 0.9 < 1.1 < aspect.max() < 1.34  # sides are whole pixels
    first, second = slice(0, 400), slice(400, 800)
    assert (views.blur_sigma_V[first] > 0).all()
    assert 1.7 < views.blur_sigma_V.max() <= 2.0
    assert (views.blur_sigma_V[second] > 0).mean() == pytest.approx(0.1, abs=0.05)
    assert not views.solarize_V[first].any()
    assert views.solarize_V[second].mean() == pytest.approx(0.2, abs=0.06)
    assert (views.gamma_V == 1).all()
    assert views.intensity.changed_V.mean() == pytest.approx(0.8, abs=0.05)
    assert views.intensity.grey_V.mean() == pytest.approx(0.2, abs=0.05)
    assert draws.local_views is None


def test_other_numbers_of_global_crops_are_refused_with_the_reason() -> None:
    assert CropsConfig(global_crops_number=2) == CropsConfig()
    with pytest.raises(ValidationError, match="the losses compare two, of which each is the target of the other"):
        CropsConfig(global_crops_number=4)


def test_t38_a_size_that_does_not_divide_is_told_its_neighbours() -> None:
    config = CropsConfig(global_crops_size=192, local_crops_size=96)
    faults = check_patch(config, 14)
    assert len(faults) == 2
    assert "192" in faults[0]
    assert "182 and 196" in faults[0]
    assert "84 and 98" in faults[1]
    assert check_patch(CropsConfig(global_crops_size=224, local_crops_size=112), 14) == []
    assert check_patch(CropsConfig(local_crops_size=96, local_crops_number=0), 14) == []
    assert check_patch(CropsConfig(local_crops_size=10, global_crops_size=28), 14)[0].endswith("the nearest are 14")
    with pytest.raises(ConfigError) as error:
        MultiCrop(config, 14, 3)
    assert "182 and 196" in error.value.where


def test_colour_jitter_of_two_sequences_is_refused_with_a_way_out() -> None:
    with pytest.raises(ConfigError) as error:
        MultiCrop(small(intensity_aug="color_jittering"), 8, 2)
    assert "2 sequences" in error.value.where
    assert "rc" in error.value.fix
    with pytest.raises(ConfigError, match="not 4"):
        MultiCrop(small(intensity_aug="color_jittering"), 8, 1)(make_batch(n_channels=4), 0)


@pytest.mark.parametrize(
    "values",
    [
        {"global_crops_scale": (0.5, 0.2)},
        {"global_crops_scale": (0.0, 1.0)},
        {"local_crops_scale": (0.1, 1.1)},
        {"intensity_aug": "random"},
        {"blur_probs": (0.5, 0.5)},
        {"blur_probs": (0.5, 0.5, 1.5)},
        {"gamma_range": (0, 1)},
        {"std": 0},
        {"rc_size": 30},
        {"local_crop_number": 2},
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CropsConfig(**values)


def test_defaults_are_those_of_the_framework_and_survive_a_file(tmp_path: Any) -> None:
    config = CropsConfig()
    assert (config.global_crops_size, config.local_crops_size, config.local_crops_number) == (224, 96, 8)
    assert (config.global_crops_scale, config.local_crops_scale) == ((0.32, 1.0), (0.05, 0.32))
    assert (config.max_blur_radius, config.gamma_range, config.blur_probs) == (1, (0.75, 1.5), (0.0, 0.9, 0.5))
    changed = CropsConfig(mean=(0.4, 0.5, 0.6), intensity_aug="rc")
    path = tmp_path / "crops.yaml"
    path.write_text(dump_config(changed))
    assert load_config(CropsConfig, path, recipes="pretrain") == changed
