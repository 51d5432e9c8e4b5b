"""The patch loss against loops in float64, and which tokens are targets."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from medssl_cli.objectives.dino import DinoConfig
from medssl_cli.objectives.ibot import (
    IbotConfig,
    find_existing_tokens,
    find_masked_tokens,
    head_warning,
    ibot_loss,
    mask_warning,
    patch_head,
)


def all_there(samples: int, sequences: int) -> Tensor:
    return torch.ones(samples, sequences, dtype=torch.bool)


def ibot_by_loop(logits_VNK: Tensor, targets_VNK: Tensor, target_VN: Tensor) -> float:
    total = 0.0
    for crop in range(len(target_VN)):
        places = [n for n in range(target_VN.shape[1]) if target_VN[crop, n]]
        for n in places:
            x = [float(v) / 0.1 for v in logits_VNK[crop, n]]
            log_sum = max(x) + math.log(math.fsum(math.exp(v - max(x)) for v in x))
            entropy = -math.fsum(float(t) * (v - log_sum) for t, v in zip(targets_VNK[crop, n], x, strict=True))
            total += entropy / len(places)
    return total / len(target_VN)


def test_worked_by_hand() -> None:
    # two crops, two tokens, K = 2; crop 1 has both masked, crop 2 none; C = 2
    # student p = (0.5, 0.5) at both: ln 2 each; weights 1/2: (ln 2 / 2 + ln 2 / 2) / 2 = 0.346574
    masked = find_masked_tokens(torch.tensor([[True, True], [False, False]]), all_there(1, 1))
    assert masked.index_M.tolist() == [0, 1]
    assert masked.weight_M.tolist() == [0.5, 0.5]
    assert masked.crops == 2
    loss = ibot_loss(torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [0.3, 0.7]]), masked)
    assert float(loss) == pytest.approx(0.346574, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_equals_loops_in_float64(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    crops, tokens, prototypes = 6, 12, 5
    token_mask = torch.rand(crops, tokens, generator=rng) < 0.4
    token_mask[2] = False
    available = torch.tensor([[True, True, True], [True, False, True], [False, True, True]])
    target = token_mask & available.repeat(2, 1).repeat_interleave(4, 1)
    logits = torch.randn(crops, tokens, prototypes, generator=rng) * 0.3
    targets = torch.randn(crops, tokens, prototypes, generator=rng).softmax(-1)
    masked = find_masked_tokens(token_mask, available)
    loss = ibot_loss(logits.flatten(0, 1)[masked.index_M], targets.flatten(0, 1)[masked.index_M], masked)
    assert float(loss) == pytest.approx(ibot_by_loop(logits, targets, target), rel=1e-6)


def test_weights_of_a_crop_sum_to_one() -> None:
    token_mask = torch.rand(8, 12, generator=torch.Generator().manual_seed(0)) < 0.3
    masked = find_masked_tokens(token_mask, all_there(4, 3))
    sums = torch.zeros(8).index_add(0, masked.index_M // 12, masked.weight_M)
    torch.testing.assert_close(sums, token_mask.any(1).float())


def test_absent_sequences_are_no_targets() -> None:
    available = torch.tensor([[True, False], [True, True]])  # sample 0 lacks sequence 2: tokens 2 and 3
    masked = find_masked_tokens(torch.ones(4, 4, dtype=torch.bool), available)
    # crops are view-major: 0 and 2 are sample 0, 1 and 3 are sample 1
    assert masked.index_M.tolist() == [0, 1, 4, 5, 6, 7, 8, 9, 12, 13, 14, 15]
    assert masked.weight_M.tolist() == [0.5, 0.5, *[0.25] * 4, 0.5, 0.5, *[0.25] * 4]


def test_crop_whose_masked_tokens_are_all_absent_counts_as_zero() -> None:
    token_mask = torch.tensor([[False, True], [True, False]])
    masked = find_masked_tokens(token_mask, torch.tensor([[True, False]]))
    assert masked.index_M.tolist() == [2]
    assert float(ibot_loss(torch.zeros(1, 8), torch.full((1, 8), 1 / 8), masked)) == pytest.approx(math.log(8) / 2)


def test_no_masked_token_gives_zero_with_a_gradient() -> None:
    masked = find_masked_tokens(torch.zeros(4, 6, dtype=torch.bool), all_there(2, 3))
    logits = torch.zeros(0, 5, requires_grad=True)
    loss = ibot_loss(logits, torch.zeros(0, 5), masked)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None


@pytest.mark.parametrize(("crops", "tokens"), [(3, 6), (4, 7)])
def test_shapes_that_do_not_fit_are_refused(crops: int, tokens: int) -> None:
    with pytest.raises(ValueError, match=r"token mask .* does not fit availability \(2, 3\)"):
        find_masked_tokens(torch.zeros(crops, tokens, dtype=torch.bool), all_there(2, 3))


@pytest.mark.parametrize(
    ("settings", "mode", "share"),
    [
        ({}, "shared", (0.5, 0.5)),
        ({"mask_per_channel": True}, "full_sequence", (0.5, 1.0)),
        ({"mask_per_channel": True, "mask_mode": "independent"}, "independent", (0.5, 0.5)),
        ({"mask_mode": "full_sequence"}, "full_sequence", (0.5, 1.0)),
        ({"mask_mode": "shared", "mask_sample_probability": 0.25}, "shared", (0.25, 0.25)),
    ],
)
def test_mask_mode_follows_mask_per_channel_unless_set(settings: dict, mode: str, share: tuple[float, float]) -> None:
    config = IbotConfig(**settings)
    assert config.masking == mode
    assert (config.masked_crops_share(1), config.masked_crops_share(3)) == share


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValidationError, match="the first must not be larger"):
        IbotConfig(mask_ratio_min_max=(0.5, 0.1))
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        IbotConfig(mask_ratio_min_max=(0.5, 1.1))
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        IbotConfig(head_n_prototypes=1)


def test_t28_ignored_head_settings_are_named() -> None:
    dino = DinoConfig(head_n_prototypes=4096)
    text = head_warning(dino, IbotConfig(head_n_prototypes=8192, head_nlayers=2, head_hidden_dim=2048))
    assert text is not None
    assert "ibot.head_n_prototypes=8192 (in force: dino.head_n_prototypes=4096)" in text
    assert "ibot.head_nlayers=2 (in force: dino.head_nlayers=3)" in text
    assert "hidden" not in text


def test_t28_nothing_is_said_when_settings_agree_are_used_or_were_not_given() -> None:
    dino = DinoConfig(head_n_prototypes=4096)
    assert head_warning(dino, IbotConfig(head_n_prototypes=4096)) is None
    assert head_warning(dino, IbotConfig(head_n_prototypes=8192, separate_head=True)) is None
    assert head_warning(dino, IbotConfig()) is None


# --- iBOT's own settings ---------------------------------------------------------------------------------------------


def test_ratios_for_each_image_are_checked() -> None:
    config = IbotConfig(mask_sampling="per_image", pred_ratio=0.3, pred_ratio_var=0)  # as iBOT's flags have them
    assert (config.pred_ratio, config.pred_ratio_var) == ((0.3,), (0.0,))
    with pytest.raises(
        ValidationError, match="pred_ratio has 2 numbers and pred_ratio_var 1: each ratio needs its own"
    ):
        IbotConfig(pred_ratio_var=(0.1,))
    with pytest.raises(ValidationError, match=r"pred_ratio 0\.1 ± pred_ratio_var 0\.2 leaves 0 \.\. 1"):
        IbotConfig(pred_ratio=(0.0, 0.1))
    with pytest.raises(ValidationError, match=r"leaves 0 \.\. 1"):
        IbotConfig(pred_ratio=(0.9,), pred_ratio_var=(0.2,))
    with pytest.raises(ValidationError, match="at least 1 item"):
        IbotConfig(pred_ratio=(), pred_ratio_var=())


def test_w19_epochs_without_masks_are_counted_in_steps() -> None:
    config = IbotConfig(pred_start_epoch=2)
    assert [config.masks_at(step, 10) for step in (0, 19, 20, 21)] == [False, False, True, True]
    assert IbotConfig().masks_at(0, 10)


def test_masked_crops_of_ratios_for_each_image() -> None:
    config = IbotConfig(mask_sampling="per_image", mask_sample_probability=0.9)
    assert config.masked_crops_share(1) == 0.5
    whole = IbotConfig(mask_sampling="per_image", mask_mode="full_sequence", pred_ratio=0.3, pred_ratio_var=0.2)
    assert (whole.masked_crops_share(1), whole.masked_crops_share(3)) == (1.0, 1.0)


def test_the_head_of_the_patches() -> None:
    dino = DinoConfig(head_n_prototypes=4096, head_hidden_dim=64)
    assert patch_head(dino, IbotConfig(head_n_prototypes=9)) is dino
    own = IbotConfig(head_n_prototypes=9, separate_head=True)
    assert patch_head(dino, own) is own
    last = patch_head(dino, IbotConfig(head_n_prototypes=9, separate_last_layer=True))
    assert (last.head_n_prototypes, last.head_hidden_dim) == (9, 64)
    with pytest.raises(ValidationError, match="separate_last_layer only its end"):
        IbotConfig(separate_head=True, separate_last_layer=True)


@pytest.mark.parametrize("name", ["csyncbn", "psyncbn"])
def test_norms_that_are_not_there_are_refused_with_a_way_out(name: str) -> None:
    with pytest.raises(ValidationError, match="no published model uses; take syncbn, ln or none"):
        DinoConfig(norm_in_head=name)  # type: ignore[arg-type]
    assert DinoConfig(norm_in_head=None).norm_in_head == "none"  # type: ignore[arg-type]


def test_t28_with_an_own_last_layer_the_prototypes_count_and_the_rest_does_not() -> None:
    dino = DinoConfig(head_n_prototypes=4096)
    ibot = IbotConfig(head_n_prototypes=8192, head_hidden_dim=64, norm_last_layer=True, separate_last_layer=True)
    text = head_warning(dino, ibot)
    assert text is not None
    assert "ibot.head_hidden_dim=64 (in force: dino.head_hidden_dim=2048)" in text
    assert "ibot.norm_last_layer=True (in force: dino.norm_last_layer=False)" in text
    assert "prototypes" not in text


def test_t28_settings_of_masks_without_effect_are_named() -> None:
    assert mask_warning(IbotConfig(), "centering") is None
    assert mask_warning(IbotConfig(mask_ratio_min_max=(0.1, 0.4)), "centering") is None
    assert mask_warning(IbotConfig(mask_sampling="per_image", pred_ratio=(0, 0.3)), "centering") is None
    text = mask_warning(IbotConfig(pred_ratio=(0, 0.4)), "centering")
    assert text == "No effect with ibot.mask_sampling stratified: ibot.pred_ratio."
    text = mask_warning(IbotConfig(mask_sampling="per_image", mask_sample_probability=0.4), "centering")
    assert text is not None
    assert "ibot.mask_sample_probability" in text
    assert "mask_exact" in (mask_warning(IbotConfig(pred_shape="rand", mask_exact=True), "centering") or "")
    assert "has no centre" in (mask_warning(IbotConfig(center_tokens="all"), "sinkhorn_knopp") or "")


def test_existing_tokens_are_those_of_sequences_that_are_there() -> None:
    available = torch.tensor([[True, False], [True, True]])
    # two samples, two views, two sequences of two tokens
    assert find_existing_tokens(available, 4).tolist() == [0, 1, 4, 5, 6, 7, 8, 9, 12, 13, 14, 15]
