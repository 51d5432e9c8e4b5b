"""The CoCoSeg network: its table of parameters, its frozen part, sizes, places and the order of its layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from medssl_cli.models.dual_encoder import ConvStep, DualEncoderConfig, DualEncoderUNet, UNetEncoder


@pytest.fixture(scope="module")
def network() -> DualEncoderUNet:
    """Not to be trained."""
    torch.manual_seed(0)
    return DualEncoderUNet().eval()


def pictures(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def convolution(channels: int, width: int, side: int = 3) -> int:
    return side * side * channels * width + width


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_c07_parameter_table_is_exact(network: DualEncoderUNet) -> None:
    assert network.parameter_counts() == {
        "unet_encoders": 2_343_360,
        "fusion_projections": 3_097_024,
        "channel_attention": 2_323_779,
        "skip_attention": 0,
        "decoder": 977_601,
        "vgg_encoders": 4_648_832,
        "trainable": 8_741_764,
        "frozen": 4_648_832,
        "total": 13_390_596,
    }


@pytest.mark.parametrize(
    ("config", "trainable", "frozen"),
    [
        ({"skip_attention": True}, 8_769_509, 4_648_832),
        ({"fusion": "2way", "skip_attention": True}, 7_221_221, 0),
    ],
)
def test_variants_have_their_published_counts(config: dict[str, object], trainable: int, frozen: int) -> None:
    counts = DualEncoderUNet(DualEncoderConfig.model_validate(config)).parameter_counts()
    assert (counts["trainable"], counts["frozen"], counts["total"]) == (trainable, frozen, trainable + frozen)


def test_each_layer_is_that_of_the_table(network: DualEncoderUNet) -> None:
    encoder = {name: count(module) for name, module in network.unet_ct.named_children()}
    assert encoder == {
        "conv1_1": 320,
        "conv1_2": 9_248,
        "conv2_1": 18_496,
        "conv2_2": 36_928,
        "conv3_1": 73_856,
        "conv3_2": 147_584,
        "conv4_1": 295_168,
        "conv4_2": 590_080,
    }
    assert [count(module) for module in network.projections] == [147_520, 589_952, 2_359_552]
    decoder = {name: count(module) for name, module in network.decoder.named_children()}
    assert decoder == {
        "deconv6": convolution(256, 128),
        "conv7_1": convolution(256, 128),
        "conv7_2": convolution(128, 128),
        "deconv7": convolution(128, 64),
        "conv8_1": convolution(128, 64),
        "conv8_2": convolution(64, 64),
        "deconv8": convolution(64, 32),
        "conv9_1": convolution(96, 32),
        "conv9_2": convolution(32, 32),
        "conv10": convolution(32, 1, 1),
    }


def test_encoders_share_no_weights(network: DualEncoderUNet) -> None:
    assert not torch.equal(
        network.unet_ct.state_dict()["conv1_1.weight"], network.unet_pet.state_dict()["conv1_1.weight"]
    )
    storages = [parameter.data_ptr() for parameter in network.parameters()]
    assert len(set(storages)) == len(storages)


def test_a_step_is_convolution_then_leaky_relu_then_instance_norm() -> None:
    torch.manual_seed(1)
    step = ConvStep(3, 5)
    x = pictures(2, 3, 9, 7)
    plain = F.conv2d(x, step.weight, step.bias, padding=1)
    expected = nn.InstanceNorm2d(5)(torch.where(plain > 0, plain, 0.2 * plain))
    torch.testing.assert_close(step(x), expected, rtol=1e-5, atol=1e-6)
    other_order = F.leaky_relu(F.instance_norm(plain), 0.2)
    assert not torch.allclose(step(x), other_order, atol=1e-2)


def test_encoder_maps_have_their_channels_and_sizes() -> None:
    maps = UNetEncoder()(pictures(1, 1, 32, 48))
    assert [tuple(each.shape[1:]) for each in maps] == [(32, 32, 48), (64, 16, 24), (128, 8, 12), (256, 4, 6)]


def test_fusion_is_shared_attention_then_concatenation_in_order_then_norm(network: DualEncoderUNet) -> None:
    maps = [pictures(2, 64, 8, 8, seed=seed) for seed in range(4)]
    attended = torch.cat([network.attention[0](each) for each in maps], 1)
    projection = network.projections[0]
    expected = nn.InstanceNorm2d(64)(F.conv2d(attended, projection.weight, projection.bias, padding=1))
    torch.testing.assert_close(network._fused(0, maps), expected)


def test_streams_reach_the_fusion_as_ct_unet_ct_vgg_pet_unet_pet_vgg(network: DualEncoderUNet) -> None:
    """Each quarter of the last projection's kernel sees its own stream: without it the stream has no effect."""
    ct, pet = pictures(1, 1, 32, 32, seed=1), pictures(1, 1, 32, 32, seed=2)
    expected = [network.unet_ct(ct)[3], network.vgg_ct(ct)[2], network.unet_pet(pet)[3], network.vgg_pet(pet)[2]]
    seen: list[Tensor] = []
    hook = network.projections[2].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        network(torch.cat([ct, pet], 1))
        hook.remove()
        torch.testing.assert_close(seen[0], torch.cat([network.attention[2](each) for each in expected], 1))


def test_c07_vgg_weights_stay_while_all_others_move() -> None:
    torch.manual_seed(2)
    network = DualEncoderUNet(DualEncoderConfig(skip_attention=True)).train()
    with torch.no_grad():  # while gamma is 0 queries and keys have no gradient
        for attention in [*network.attention, network.skip_attention]:
            attention.gamma.fill_(0.5)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0, weight_decay=0.1)
    network(pictures(2, 2, 32, 32)).square().mean().backward()
    optimizer.step()
    assert not network.vgg_ct.training
    assert not network.vgg_pet.training
    same = {name for name, p in network.named_parameters() if torch.equal(before[name], p)}
    assert same == {name for name in before if name.startswith("vgg_")}


def test_c07_without_vgg_weights_the_output_is_another() -> None:
    torch.manual_seed(3)
    network, images = DualEncoderUNet().eval(), pictures(1, 2, 32, 32)
    with torch.no_grad():
        for trunk in (network.vgg_ct, network.vgg_pet):
            before = network(images)
            for parameter in trunk.parameters():
                parameter.zero_()
            assert not torch.allclose(before, network(images), atol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 16), (50, 37), (31, 64)])
def test_c24_logits_have_the_size_of_the_pictures(network: DualEncoderUNet, height: int, width: int) -> None:
    with torch.no_grad():
        assert network(pictures(2, 2, height, width)).shape == (2, 1, height, width)


def lit_place(network: DualEncoderUNet, height: int, width: int, row: int, column: int) -> tuple[float, float]:
    """Mean place of the 25 logits that change most when a PET square of 3 x 3 is lit."""
    images = pictures(1, 2, height, width) * 0.1
    lit = images.clone()
    lit[:, 1, row - 1 : row + 2, column - 1 : column + 2] = 5.0
    with torch.no_grad():
        change = (network(lit) - network(images)).abs()[0, 0]
    strongest = change.flatten().topk(25).indices
    return float((strongest // width).double().mean()), float((strongest % width).double().mean())


@pytest.mark.parametrize(("row", "column"), [(12, 70), (50, 20)])
def test_c24_a_lit_pixel_stays_in_place(network: DualEncoderUNet, row: int, column: int) -> None:
    found = lit_place(network, 65, 81, row, column)  # 7 rows above and 7 columns before are padding
    assert found == pytest.approx((row, column), abs=2)


@pytest.mark.slow
def test_c24_500_by_333_keeps_size_and_place(network: DualEncoderUNet) -> None:
    with torch.no_grad():
        assert network(pictures(1, 2, 500, 333)).shape == (1, 1, 500, 333)
    assert lit_place(network, 500, 333, 420, 60) == pytest.approx((420, 60), abs=2)


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["mean", "none"])
def test_c10_a_bright_constant_512_picture_stays_finite_under_autocast(scale: str) -> None:
    torch.manual_seed(4)
    network = DualEncoderUNet(DualEncoderConfig.model_validate({"cam_scale": scale})).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for attention in network.attention:
            attention.gamma.fill_(1.0)
        logits = network(torch.full((1, 2, 512, 512), 10.0))
    assert logits.dtype == torch.float32
    assert bool(logits.isfinite().all())


def test_wrong_pictures_are_refused_with_their_shape(network: DualEncoderUNet) -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 32, 32\).*CT and PET"):
        network(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"\(15, 64\) pixels; at least 16"):
        network(torch.zeros(1, 2, 15, 64))
    with pytest.raises(ValueError, match="lacks one of them"):
        network(torch.zeros(2, 2, 16, 16), torch.tensor([[True, True], [True, False]]))


def test_state_dict_tells_its_layout_and_rebuilds_the_network(network: DualEncoderUNet) -> None:
    state = network.state_dict()
    assert int(state["vgg_copies"]) == 2
    assert {name.split(".")[0] for name in state} == {
        "vgg_copies", "unet_ct", "unet_pet", "vgg_ct", "vgg_pet", "attention", "projections", "decoder"
    }  # fmt: skip
    assert int(DualEncoderUNet(DualEncoderConfig(fusion="2way")).state_dict()["vgg_copies"]) == 0
    other = DualEncoderUNet(DualEncoderConfig.model_validate(network.settings())).eval()
    other.load_state_dict(state)
    images = pictures(1, 2, 32, 32)
    with torch.no_grad():
        assert torch.equal(network(images), other(images))


def test_trained_parts_are_the_whole_network(network: DualEncoderUNet) -> None:
    assert network.trained_parts() == {"network": network}


def test_unknown_values_are_refused() -> None:
    with pytest.raises(ValidationError):
        DualEncoderConfig.model_validate({"fusion": "3way"})


def test_a_bright_disc_is_learned_in_a_few_steps() -> None:
    torch.manual_seed(5)
    network = DualEncoderUNet()
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    mask = ((y - 12) ** 2 + (x - 20) ** 2 < 36).float()[None, None]
    images = torch.cat([pictures(1, 1, 32, 32), 1.5 * mask - 1 + 0.1 * pictures(1, 1, 32, 32, seed=1)], 1)
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(12):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(network(images), mask).backward()
        optimizer.step()
    with torch.no_grad():
        prediction = network.eval()(images) > 0
    dice = 2 * (prediction & (mask > 0)).sum() / (prediction.sum() + mask.sum())
    assert float(dice) > 0.9
