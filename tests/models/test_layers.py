"""Layers against their definitions; stochastic depth against its formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl_cli.models.layers import (
    Attention,
    Block,
    LayerScale,
    Mlp,
    PatchEmbed,
    SampleMask,
    Subset,
    SwiGlu,
    _AddSamples,
    _TakeSamples,
    draw_drops,
    nearest_legal_sizes,
)

CPU = torch.device("cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_t38_a_size_that_does_not_divide_names_the_nearest_legal_ones() -> None:
    with pytest.raises(ValueError, match=r"192 is no multiple of the patch size 14; .* 182 or 196"):
        PatchEmbed(14, 3, 8)(torch.zeros(1, 3, 196, 192))
    assert nearest_legal_sizes(96, 14) == (84, 98)
    assert nearest_legal_sizes(5, 14) == (14, 14)
    assert nearest_legal_sizes(28, 14) == (28, 28)


def test_patch_embed_is_a_matrix_product_of_each_patch() -> None:
    layer, images = PatchEmbed(4, 3, 8), torch.randn(2, 3, 8, 12, generator=generator())
    tokens = layer(images)
    assert tokens.shape == (2, 6, 8)
    row, column = 1, 2
    patch = images[1, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].double().flatten()
    expected = layer.proj.weight.double().flatten(1) @ patch + layer.proj.bias.double()
    torch.testing.assert_close(tokens[1, row * 3 + column].double(), expected, atol=1e-6, rtol=0)


def test_grey_images_equal_the_channel_repeated_with_gradients() -> None:
    grads = []
    for repeat in (1, 3):
        torch.manual_seed(0)
        layer = PatchEmbed(4, 3, 8)
        out = layer(torch.randn(2, 1, 8, 8, generator=generator()).repeat(1, repeat, 1, 1))
        out.square().sum().backward()
        grads.append((out.detach(), layer.proj.weight.grad))
    torch.testing.assert_close(grads[0], grads[1], atol=1e-4, rtol=1e-5)


def test_channels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="images of 2 channels, the patch convolution takes 3 or 1"):
        PatchEmbed(4, 3, 8)(torch.zeros(1, 2, 8, 8))


def test_attention_equals_torchs_own_module() -> None:
    ours, theirs = Attention(32, 4), nn.MultiheadAttention(32, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight)
        theirs.in_proj_bias.copy_(ours.qkv.bias)
        theirs.out_proj.weight.copy_(ours.proj.weight)
        theirs.out_proj.bias.copy_(ours.proj.bias)
    x = torch.randn(3, 7, 32, generator=generator())
    expected, weights = theirs(x, x, x)
    torch.testing.assert_close(ours(x.flatten(0, 1), ((3, 7),)).view(3, 7, 32), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.weights(x.flatten(0, 1), ((3, 7),)), weights, atol=1e-6, rtol=0)


def test_feed_forward_layers_are_their_formulas() -> None:
    x, mlp, gated = torch.randn(5, 12, generator=generator()), Mlp(12, 48), SwiGlu(12, 48)
    hidden = mlp.fc1(x).double()
    gelu = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(
        mlp(x).double(), F.linear(gelu, mlp.fc2.weight.double(), mlp.fc2.bias.double()), atol=1e-6, rtol=0
    )
    assert gated.w3.in_features == 32  # 48 * 2 / 3
    assert SwiGlu(1536, 4 * 1536).w3.in_features == 4096
    assert SwiGlu(10, 40).w3.in_features == 32  # 26 rounded up to a multiple of 8
    a, b = gated.w12(x).double()[:, :32], gated.w12(x).double()[:, 32:]
    expected = F.linear(a / (1 + (-a).exp()) * b, gated.w3.weight.double(), gated.w3.bias.double())
    torch.testing.assert_close(gated(x).double(), expected, atol=1e-6, rtol=0)


def block(layerscale: float = 0.5, ffn_layer: str = "mlp") -> Block:
    torch.manual_seed(0)
    return Block(16, 2, ffn_hidden=64, layerscale=layerscale, ffn_layer=ffn_layer)


def test_block_is_pre_norm_with_layer_scale() -> None:
    one, x = block(), torch.randn(2, 5, 16, generator=generator())
    groups = ((2, 5),)
    y = x.flatten(0, 1)
    y = y + 0.5 * one.attn(one.norm1(y), groups)
    y = y + 0.5 * one.mlp(one.norm2(y))
    torch.testing.assert_close(one(x), y.view(2, 5, 16), atol=1e-6, rtol=0)
    assert isinstance(one.ls1, LayerScale)
    assert "gamma" not in "".join(block(layerscale=0).state_dict())
    assert block(layerscale=0)(x).shape == block(ffn_layer="identity")(x).shape == x.shape


def test_packed_block_equals_each_batch_alone() -> None:
    one, a, b = block(), torch.randn(2, 5, 16, generator=generator(1)), torch.randn(3, 3, 16, generator=generator(2))
    packed = one(torch.cat([a.flatten(0, 1), b.flatten(0, 1)]), ((2, 5), (3, 3)))
    torch.testing.assert_close(packed, torch.cat([one(a).flatten(0, 1), one(b).flatten(0, 1)]), atol=1e-6, rtol=0)


# --- stochastic depth ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "rate", "kept"), [(8, 0.1, 7), (10, 0.3, 7), (2, 0.9, 1), (3, 0.95, 1), (64, 0.1, 57)]
)
def test_packed_passes_keep_a_subset_at_every_rate(samples: int, rate: float, kept: int) -> None:
    ((first, second),) = draw_drops([rate], ((samples, 4),), packed=True, device=CPU, generator=generator())
    assert isinstance(first, Subset)
    assert isinstance(second, Subset)
    assert first.kept == second.kept == (kept,)
    assert len(set(first.indices[0].tolist())) == kept
    assert set(first.indices[0].tolist()) <= set(range(samples))


def test_one_sample_is_never_dropped() -> None:
    assert draw_drops([0.5], ((1, 4), (1, 2)), packed=True, device=CPU) == [(None, None)]


def test_single_crops_are_masked_up_to_a_tenth_and_subset_above() -> None:
    drops = draw_drops([0.0, 0.1, 0.2], ((2000, 1),), packed=False, device=CPU, generator=generator())
    assert drops[0] == (None, None)
    mask = drops[1][0]
    assert isinstance(mask, SampleMask)
    assert mask.factor_B11.unique().tolist() == pytest.approx([0, 1 / 0.9])
    assert float((mask.factor_B11 == 0).float().mean()) == pytest.approx(0.1, abs=0.03)
    assert isinstance(drops[2][1], Subset)
    assert drops[2][1].kept == (1600,)


def test_draws_follow_the_generator_and_differ_between_branches_and_groups() -> None:
    groups = ((32, 4), (32, 2))
    draw = lambda seed: draw_drops([0.5, 0.5], groups, packed=True, device=CPU, generator=generator(seed))  # noqa: E731
    lists = [[i.tolist() for pair in draw(seed) for drop in pair for i in drop.indices] for seed in (1, 1, 2)]  # type: ignore[union-attr]
    assert lists[0] == lists[1] != lists[2]
    assert len({tuple(one) for one in lists[0]}) == 8


@pytest.mark.parametrize("dtype", [torch.float64])
def test_subset_operators_have_the_right_gradients(dtype: torch.dtype) -> None:
    subset = Subset(((3, 2), (2, 1)), (2, 1), (torch.tensor([2, 0]), torch.tensor([1])))
    x = torch.randn(8, 3, dtype=dtype, generator=generator(), requires_grad=True)
    part = torch.randn(5, 3, dtype=dtype, generator=generator(1), requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: _TakeSamples.apply(t, subset), (x,))
    assert torch.autograd.gradcheck(lambda t, p: _AddSamples.apply(t, p, subset), (x, part))


def test_subset_branch_is_the_formula_of_scaled_kept_samples() -> None:
    one, a, b = block(), torch.randn(4, 5, 16, generator=generator(1)), torch.randn(3, 2, 16, generator=generator(2))
    x = torch.cat([a.flatten(0, 1), b.flatten(0, 1)]).requires_grad_()
    groups = ((4, 5), (3, 2))
    drop = Subset(groups, (2, 1), (torch.tensor([3, 1]), torch.tensor([0])))
    out = one(x, groups, (drop, None))

    def expected_one(samples: Tensor, kept: list[int]) -> Tensor:
        out = samples.clone()
        for i in kept:
            branch = 0.5 * one.attn(one.norm1(samples[i]), ((1, samples.shape[1]),))
            out[i] = samples[i] + branch * len(samples) / len(kept)
        flat = out.flatten(0, 1)
        return flat + 0.5 * one.mlp(one.norm2(flat))

    y = x.detach().clone().requires_grad_()
    expected = torch.cat([expected_one(y[:20].view(4, 5, 16), [3, 1]), expected_one(y[20:].view(3, 2, 16), [0])])
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)
    out.sin().sum().backward()
    expected.sin().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, atol=1e-5, rtol=0)


def test_masked_samples_keep_their_input_and_the_others_are_scaled() -> None:
    one, x = block(), torch.randn(3, 5, 16, generator=generator())
    factor = torch.tensor([0.0, 2.0, 0.0]).view(3, 1, 1)
    out = one(x, None, (SampleMask(factor), SampleMask(torch.zeros(3, 1, 1))))
    assert torch.equal(out[0], x[0])
    expected = x[1] + 2 * 0.5 * one.attn(one.norm1(x[1]), ((1, 5),))
    torch.testing.assert_close(out[1], expected, atol=1e-6, rtol=0)
