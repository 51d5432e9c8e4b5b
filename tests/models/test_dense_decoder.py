"""Decoders on backbones: sizes, places, sequences, slices, what is trained and what is not."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from medssl_cli.core.errors import ConfigError
from medssl_cli.models.convnext import ConvNeXt
from medssl_cli.models.dense_decoder import DecoderConfig, DenseNetwork
from medssl_cli.models.vit import VisionTransformer

THREE = ("T2w", "ADC", "DWI")
DECODERS = ("linear", "unetr", "multiscale")


def vit(sequences: tuple[str, ...] | None = None, patch: int = 8, **settings: Any) -> VisionTransformer:
    """Width 32, four blocks; weights large enough that blocks and positions matter."""
    torch.manual_seed(0)
    known = {"embed_dim": 32, "depth": 4, "num_heads": 2, "layerscale": 0.3, "img_size": 4 * patch, **settings}
    model = VisionTransformer(patch_size=patch, sequences=sequences, in_chans=3 if sequences is None else 1, **known)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def convnext() -> ConvNeXt:
    torch.manual_seed(0)
    return ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), layer_scale=0.5)


def network(
    backbone: VisionTransformer | ConvNeXt | None = None,
    outputs: int = 2,
    *,
    context: int = 0,
    freeze_backbone: bool = True,
    **config: Any,
) -> DenseNetwork:
    torch.manual_seed(1)
    base = {} if config.get("name") == "linear" else {"base": 8}
    settings = DecoderConfig.model_validate({**base, **config})
    given = backbone or vit()
    return DenseNetwork(given, outputs, settings, context=context, freeze_backbone=freeze_backbone).eval()


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def logits_of(model: DenseNetwork, *given: Any) -> Tensor:
    with torch.no_grad():
        answer = model(*given)
    assert isinstance(answer, Tensor)
    return answer


# --- published sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "outputs", "count"),
    [({"name": "linear"}, 5, 15_365), ({"name": "unetr", "norm": "batch"}, 1, 1_991_217)],
)
def test_decoders_on_vit_base_have_visionfms_parameter_counts(config: dict[str, Any], outputs: int, count: int) -> None:
    backbone = VisionTransformer(patch_size=16, embed_dim=768, depth=1, num_heads=12)
    model = DenseNetwork(backbone, outputs, DecoderConfig.model_validate(config))
    assert sum(p.numel() for p in model.trained_parts()["decoder"].parameters()) == count


@pytest.mark.parametrize(
    ("depth", "layers"), [(12, (2, 5, 8, 11)), (24, (5, 11, 17, 23)), (4, (0, 1, 2, 3)), (2, (0, 0, 0, 1))]
)
def test_default_layers_are_evenly_spaced_and_end_with_the_last(depth: int, layers: tuple[int, ...]) -> None:
    assert network(vit(depth=depth), name="linear").layers == layers


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("patch", [8, 14, 16])
def test_logits_have_the_size_of_the_images_for_any_patch(name: str, patch: int) -> None:
    model = network(vit(THREE, patch=patch), name=name)
    for height, width in ((2 * patch, 3 * patch), (37, 50)):
        logits = logits_of(model, images(2, 3, height, width))
        assert logits.shape == (2, 2, height, width)
        assert logits.dtype == torch.float32


@pytest.mark.parametrize("name", DECODERS)
def test_convnext_maps_are_decoded_at_their_own_sizes(name: str) -> None:
    model = network(convnext(), outputs=3, name=name)
    assert [tuple(each.shape[1:]) for each in model.maps(images(1, 3, 64, 32))] == [
        (8, 16, 8),
        (16, 8, 4),
        (24, 4, 2),
        (32, 2, 1),
    ]
    assert logits_of(model, images(1, 3, 45, 70)).shape == (1, 3, 45, 70)


@pytest.mark.parametrize("name", DECODERS)
def test_one_tiny_image_is_padded(name: str) -> None:
    assert logits_of(network(name=name), images(1, 3, 5, 3)).shape == (1, 2, 5, 3)


@pytest.mark.parametrize("name", DECODERS)
def test_a_grey_picture_stands_for_equal_colours(name: str) -> None:
    model, grey = network(name=name), images(2, 1, 24, 16)
    torch.testing.assert_close(logits_of(model, grey), logits_of(model, grey.expand(-1, 3, -1, -1)), rtol=0, atol=1e-4)


def test_linear_decoder_is_one_matrix_on_the_tokens_of_each_place() -> None:
    model = network(name="linear", layers=[1, 3], dropout=0.5)
    picture = images(2, 3, 16, 24)
    features = model.backbone.forward_layers(picture, [1, 3])
    tokens_BND = torch.cat([each.patches_BND for each in features], -1)
    weight, bias = model.decoder["head"].head.weight[..., 0, 0], model.decoder["head"].head.bias
    small = torch.einsum("bnd,cd->bcn", tokens_BND, weight).add(bias[:, None]).view(2, 2, 2, 3)
    expected = F.interpolate(small, (16, 24), mode="bilinear", align_corners=False)
    torch.testing.assert_close(logits_of(model, picture), expected.detach(), rtol=1e-4, atol=1e-5)


def test_wrong_channels_are_refused_with_their_number() -> None:
    with pytest.raises(ValueError, match="4 channels; 1 slices of 3"):
        network(vit(THREE))(images(1, 4, 8, 8))
    with pytest.raises(ValueError, match="6 channels; 3 slices of 1 or 3"):
        network(context=1)(images(1, 6, 8, 8))


# --- places ----------------------------------------------------------------------------------------------------------


def test_tokens_of_all_sequences_stay_at_their_place() -> None:
    """The hazard of a plain reshape: width and place of several sequences mixed."""
    model = network(vit(THREE), layers=[0, 1, 2, 3], name="linear")
    picture = images(2, 3, 16, 40)
    with torch.no_grad():
        found = model.maps(picture)
        features = model.backbone.forward_layers(picture, [0, 1, 2, 3])
    for map_BDhw, each in zip(found, features, strict=True):
        assert map_BDhw.shape == (2, 32, 2, 5)
        for row in range(2):
            for column in range(5):
                tokens = [each.patches_BND[:, s * 10 + row * 5 + column] for s in range(3)]
                torch.testing.assert_close(map_BDhw[:, :, row, column], sum(tokens) / 3, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fusion", ["mean", "concat"])
@pytest.mark.parametrize("sequence", [0, 2])
def test_a_lit_patch_of_one_sequence_stays_in_place(fusion: str, sequence: int) -> None:
    model = network(vit(THREE, layerscale=0.02), fusion=fusion)
    dark, row, column = images(1, 3, 24, 56), 1, 5
    lit = dark.clone()
    lit[0, sequence, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 4
    with torch.no_grad():
        changes = [(a - b).norm(dim=1)[0] for a, b in zip(model.maps(lit), model.maps(dark), strict=True)]
    for change in changes:
        assert change.shape == (3, 7)
        assert int(change.argmax()) == row * 7 + column
        assert float(change.max()) > 3 * float(change.flatten().kthvalue(20).values)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("backbone", ["vit", "convnext"])
def test_what_is_lit_in_the_image_is_lit_in_the_logits(name: str, backbone: str) -> None:
    model = network(vit(layerscale=0.02) if backbone == "vit" else convnext(), name=name, outputs=1)
    rows, columns = 70, 100  # no multiples of a patch
    dark = 0.1 * images(1, 3, rows, columns)
    lit = dark.clone()
    lit[..., 18:26, 78:86] += 5
    change = (logits_of(model, lit) - logits_of(model, dark)).abs()[0, 0]
    strongest = change.flatten().topk(20).indices
    reach = 6 if backbone == "vit" else 20
    assert float((strongest // columns).double().mean()) == pytest.approx(21.5, abs=reach)
    assert float((strongest % columns).double().mean()) == pytest.approx(81.5, abs=reach)


# --- sequences -------------------------------------------------------------------------------------------------------


def test_the_order_of_sequences_does_not_matter_to_their_mean() -> None:
    model, picture = network(vit(THREE)), images(2, 3, 16, 24)
    order = [2, 0, 1]
    available = torch.tensor([[True, True, False], [True, True, True]])
    with torch.no_grad():
        straight, turned = model.maps(picture, available), model.maps(picture[:, order], available[:, order])
    for a, b in zip(straight, turned, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_mean_is_over_the_sequences_that_exist() -> None:
    model, picture = network(vit(THREE)), images(3, 3, 8, 16)
    available = torch.tensor([[True, False, True], [False, True, False], [True, True, True]])
    with torch.no_grad():
        found = model.maps(picture, available)[-1]
        tokens = model.backbone(picture, None, available).patches_BND
    for b in range(3):
        parts = [tokens[b, 2 * s : 2 * s + 2] for s in range(3) if available[b, s]]
        torch.testing.assert_close(found[b].flatten(1).T, sum(parts) / len(parts), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fusion", ["mean", "concat"])
@pytest.mark.parametrize("name", DECODERS)
def test_what_an_absent_sequence_holds_has_no_effect(name: str, fusion: str) -> None:
    model, picture = network(vit(THREE), name=name, fusion=fusion), images(2, 3, 16, 16)
    available = torch.tensor([[True, False, True], [True, True, True]])
    other = picture.clone()
    other[0, 1] = 7.0
    first, second = (logits_of(model, each, available) for each in (picture, other))
    assert torch.equal(first, second)
    assert not torch.allclose(first[0], logits_of(model, picture)[0], atol=1e-3)  # being absent has one


def test_concatenation_begins_as_the_mean_and_zeroes_the_absent() -> None:
    mean, joined = network(vit(THREE), fusion="mean"), network(vit(THREE), fusion="concat")
    picture, available = images(2, 3, 16, 16), torch.tensor([[True, False, False], [True, True, True]])
    with torch.no_grad():
        for a, b in zip(mean.maps(picture), joined.maps(picture), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        for a, b in zip(mean.maps(picture, available), joined.maps(picture, available), strict=True):
            torch.testing.assert_close(a[0] / 3, b[0], rtol=1e-4, atol=1e-5)  # one of three is there


def test_a_sample_without_any_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match=r"samples \[1\]"):
        network(vit(THREE))(images(2, 3, 8, 8), torch.tensor([[True, True, True], [False, False, False]]))
    with pytest.raises(ValueError, match="no channel may be absent"):
        network()(images(1, 3, 8, 8), torch.tensor([[True, False, True]]))


# --- neighbouring slices ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS)
def test_neighbours_begin_without_effect(name: str) -> None:
    flat, deep = network(vit(THREE), name=name), network(vit(THREE), name=name, context=2)
    deep.load_state_dict(flat.state_dict(), strict=False)
    stack = images(2, 15, 16, 24)
    centre = stack[:, 6:9]
    torch.testing.assert_close(logits_of(deep, stack), logits_of(flat, centre), rtol=0, atol=1e-5)


@pytest.mark.parametrize("context", [0, 1, 2])
def test_forward_is_maps_of_each_slice_decoded_together(context: int) -> None:
    model = network(vit(THREE), context=context, fusion="concat")
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    neighbours = 2 * context + 1
    stack, available = images(2, 3 * neighbours, 20, 24), torch.tensor([[True, True, False], [True, True, True]])
    slices = stack.unflatten(1, (neighbours, 3)).unbind(1)
    with torch.no_grad():
        maps = [model.maps(each, available) for each in slices]
        decoded = model.decode(maps, slices[context], (20, 24), available)
    assert isinstance(decoded, Tensor)
    whole = logits_of(model, stack, available)
    if context == 0:
        assert torch.equal(decoded, whole)
    torch.testing.assert_close(decoded, whole, rtol=0, atol=1e-5)


def test_each_neighbour_has_its_own_place() -> None:
    model = network(vit(THREE), context=1, name="linear")
    with torch.no_grad():
        for fusion in model.decoder["neighbours"]:
            fusion.conv.weight.copy_(0.1 * images(*fusion.conv.weight.shape))
    below, centre, above = images(3, 1, 3, 16, 16).unbind(0)
    straight = logits_of(model, torch.cat([below, centre, above], 1))
    for other in ((above, centre, below), (centre, below, above)):
        assert not torch.allclose(straight, logits_of(model, torch.cat(other, 1)), atol=1e-3)


def test_logits_of_another_size_are_the_same_resized() -> None:
    model, picture = network(), images(1, 3, 16, 24)
    with torch.no_grad():
        larger = model.decode([model.maps(picture)], picture, (32, 30))
    expected = F.interpolate(logits_of(model, picture), (32, 30), mode="bilinear", align_corners=False)
    assert isinstance(larger, Tensor)
    torch.testing.assert_close(larger, expected)


def test_maps_of_too_few_slices_are_refused() -> None:
    model, picture = network(context=1), images(1, 3, 8, 8)
    with pytest.raises(ValueError, match="maps of 1 slices, 3 are needed"):
        model.decode([model.maps(picture)], picture)


# --- training --------------------------------------------------------------------------------------------------------


def scalar(answer: Tensor | list[Tensor]) -> Tensor:
    levels = answer if isinstance(answer, list) else [answer]
    return sum((level.square().mean() for level in levels), torch.zeros(()))


@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
@pytest.mark.parametrize("name", DECODERS)
def test_every_parameter_of_the_decoder_learns(name: str, norm: str) -> None:
    extras = {} if name == "linear" else {"norm": norm, "deep_supervision": True}
    model = network(vit(THREE), name=name, context=1, fusion="concat", **extras).train()
    scalar(model(images(2, 9, 32, 40), torch.tensor([[True, False, True], [True, True, True]]))).backward()
    for parameter_name, parameter in model.decoder.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert bool(parameter.grad.isfinite().all()), parameter_name
        if parameter_name.endswith("weight"):  # a bias before a norm has no slope
            assert bool(parameter.grad.any()), parameter_name
    assert all(parameter.grad is None for parameter in model.backbone.parameters())


def test_a_frozen_backbone_is_neither_moved_nor_put_into_training() -> None:
    model = network(vit(THREE, drop_path_rate=0.5)).train()
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    assert model.decoder.training
    assert not any(module.training for module in model.backbone.modules())
    assert model.trained_parts() == {"decoder": model.decoder}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    scalar(model(images(2, 3, 16, 16))).backward()
    optimizer.step()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.backbone.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())


def test_a_backbone_that_is_not_frozen_learns() -> None:
    model = network(vit(THREE), freeze_backbone=False).train()
    assert model.backbone.training
    assert set(model.trained_parts()) == {"backbone", "decoder"}
    scalar(model(images(2, 3, 16, 16))).backward()
    for block in model.backbone.flat_blocks():
        assert block.attn.qkv.weight.grad is not None
        assert bool(block.attn.qkv.weight.grad.any())
    assert bool(model.backbone.patch_embed.proj.weight.grad.any())


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("unetr", [(64, 80), (32, 40), (16, 20), (8, 10)]),
        ("multiscale", [(32, 40), (8, 10), (4, 5), (2, 3)]),
    ],
)
def test_coarser_logits_come_in_training_alone(name: str, sizes: list[tuple[int, int]]) -> None:
    """Patches of 8 pixels: unetr doubles 4 x 5 places four times, multiscale makes 16 x 20, 8 x 10, 4 x 5 and 2 x 3."""
    model = network(name=name, deep_supervision=True).train()
    levels = model(images(1, 3, 32, 40))
    assert [tuple(level.shape) for level in levels] == [(1, 2, 32, 40), *((1, 2, *size) for size in sizes[1:])]
    assert isinstance(model.eval()(images(1, 3, 32, 40)), Tensor)


class Ramp(nn.Module):
    """Gives the row and column of each pixel of the padded image, at its size and at a quarter and a sixteenth."""

    def forward(self, maps: list[Tensor], images_BSHW: Tensor) -> list[Tensor]:
        height, width = images_BSHW.shape[-2:]
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        ramp = torch.stack([rows, columns]).float()[None]
        return [F.avg_pool2d(ramp, side) for side in (1, 4, 16)]


def test_coarser_logits_lie_where_the_finest_lie_after_padding() -> None:
    model = network(vit(patch=16))
    model.decoder["head"] = Ramp()
    fine, *coarse = model(images(1, 3, 130, 150))  # 14 rows and 10 columns of padding, 7 above and 5 before
    torch.testing.assert_close(fine[0, 0, :, 0], torch.arange(130.0) + 7)
    torch.testing.assert_close(fine[0, 1, 0], torch.arange(150.0) + 5)
    assert [tuple(each.shape[-2:]) for each in coarse] == [(32, 38), (8, 9)]
    for each, reach in zip(coarse, (0.5, 3.0), strict=True):
        for axis, before in ((0, 7), (1, 5)):
            ramp = each[0, axis].mean(1 - axis)
            count, side = len(ramp), (130, 150)[axis]
            centres = (torch.arange(count) + 0.5) * side / count - 0.5 + before
            torch.testing.assert_close(ramp[1:-1], centres[1:-1], rtol=0, atol=reach)


@pytest.mark.parametrize("name", DECODERS)
def test_a_disc_is_learned_from_one_batch(name: str) -> None:
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    mask = torch.stack([((y - cy) ** 2 + (x - cx) ** 2 < 200).float() for cy, cx in ((20, 40), (44, 24))])[:, None]
    pictures = torch.cat([mask + 0.3 * images(2, 1, 64, 64), images(2, 1, 64, 64, seed=1)], 1)
    model = network(vit(("T2w", "ADC"), patch=8), outputs=1, name=name, dropout=0.0).train()
    optimizer = torch.optim.Adam(model.trained_parts()["decoder"].parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(pictures), mask, pos_weight=torch.tensor(5.0)).backward()
        optimizer.step()
    prediction = logits_of(model.eval(), pictures) > 0
    dice = 2 * (prediction & (mask > 0)).sum() / (prediction.sum() + mask.sum())
    assert float(dice) > (0.8 if name == "linear" else 0.9)  # a linear decoder sees a grid of 8 x 8


def test_dropout_leaves_out_whole_channels_in_training_alone() -> None:
    model, picture = network(name="linear", dropout=0.5), images(1, 3, 16, 16)
    torch.manual_seed(2)
    assert torch.equal(logits_of(model, picture), logits_of(model, picture))
    assert not torch.equal(logits_of(model.train(), picture), logits_of(model, picture))


@pytest.mark.parametrize("name", DECODERS)
def test_half_precision_is_close_and_the_logits_are_float32(name: str) -> None:
    model, picture = network(vit(THREE), name=name), images(1, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = logits_of(model, picture)
    whole = logits_of(model, picture)
    assert half.dtype == torch.float32
    assert float((half - whole).norm() / whole.norm()) < 0.1


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS)
def test_settings_build_the_same_network(name: str) -> None:
    model = network(vit(THREE), name=name, fusion="concat", layers=[0, 1, 2, 3], context=1)
    settings = json.loads(json.dumps(model.settings()))
    config = DecoderConfig.model_validate(settings.pop("config"))
    other = DenseNetwork(VisionTransformer(**model.backbone.settings), config=config, **settings).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(other, images(1, 9, 16, 16)), logits_of(model, images(1, 9, 16, 16)))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"name": "linear", "base": 16}, "base: no effect on the linear decoder"),
        ({"name": "linear", "norm": "batch", "deep_supervision": True}, "norm, deep_supervision: no effect"),
        ({"layers": [0, 1, 2]}, "unetr joins 4 blocks, got 3"),
        ({"layers": [3, 1, 2, 0]}, "rising order"),
        ({"base": 3}, "multiple of 2"),
    ],
)
def test_settings_without_sense_are_refused(config: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        DecoderConfig.model_validate(config)


def test_a_block_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        network(vit(), layers=[3, 5, 7, 11])
    assert error.value.exit_code == 2
    assert "the backbone has 4 blocks" in error.value.where
    assert "0 to 3" in error.value.fix
