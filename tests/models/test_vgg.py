"""The frozen VGG-19 trunk against a plain sequence of torch's own layers, and how its weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from medssl_cli.core.digest import file_digest
from medssl_cli.core.errors import CheckpointError
from medssl_cli.models import vgg
from medssl_cli.models.foreign import vgg19_shapes
from medssl_cli.models.vgg import IMAGENET_DIGEST, VGGEncoder, VGGOrigin, load_vgg
from medssl_cli.services.convert_weights import WeightsRequest, convert_weights

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def weights() -> Weights:
    generator = torch.Generator().manual_seed(0)
    return {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in vgg19_shapes().items()}


@pytest.fixture(scope="module")
def torch_file(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As torchvision saves it, classifier included."""
    path = tmp_path_factory.mktemp("vgg") / "vgg19.pth"
    torch.save({**weights, "classifier.6.bias": torch.zeros(10)}, path)
    return path


@pytest.fixture(scope="module")
def pair() -> nn.ModuleList:
    return nn.ModuleList([VGGEncoder(), VGGEncoder()])


def reference_taps(weights: Weights, grey: Tensor) -> list[Tensor]:
    """Layers in the order of section 5.2, on a grey picture whose three colours are weighted."""
    shares = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    plan: list[Any] = [0, "pool", 2, "tap", "pool", 5, 7, "tap", "pool", 10, 12, 14, 16, "tap"]
    x, taps = grey * shares, []  # weighting the colours of the input is weighting the kernels
    for item in plan:
        if item == "pool":
            x = nn.MaxPool2d(2)(x)
        elif item == "tap":
            taps.append(x)
        else:
            weight, bias = weights[f"features.{item}.weight"], weights[f"features.{item}.bias"]
            x = nn.functional.conv2d(x, weight, bias, padding=1).relu()
    return taps


def test_taps_are_those_of_vgg19_with_one_pooling_more(pair: nn.ModuleList, torch_file: Path, weights: Weights) -> None:
    load_vgg(pair, torch_file)
    grey = torch.rand(2, 1, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    for encoder in pair:
        for own, other in zip(encoder(grey), reference_taps(weights, grey), strict=True):
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def test_c08_taps_lie_at_a_half_a_quarter_and_an_eighth() -> None:
    shapes = [tuple(tap.shape) for tap in VGGEncoder()(torch.zeros(1, 1, 64, 64))]
    assert shapes == [(1, 64, 32, 32), (1, 128, 16, 16), (1, 256, 8, 8)]


def test_parameters_by_layer_are_those_of_the_table() -> None:
    encoder = VGGEncoder()
    rows = {
        "conv1_1": 640,
        "conv1_2": 36_928,
        "conv2_1": 73_856,
        "conv2_2": 147_584,
        "conv3_1": 295_168,
        "conv3_2": 590_080,
        "conv3_3": 590_080,
        "conv3_4": 590_080,
    }
    counted = {name: sum(p.numel() for p in module.parameters()) for name, module in encoder.named_children()}
    assert counted == rows
    assert sum(rows.values()) == 2_324_416


def test_the_trunk_stays_frozen_and_in_evaluation_mode() -> None:
    network = nn.Sequential(VGGEncoder()).train()
    encoder = network[0]
    assert network.training
    assert not any(module.training for module in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    taps = encoder(torch.zeros(1, 1, 16, 16, requires_grad=True))
    assert not any(tap.requires_grad for tap in taps)


def test_a_converted_file_gives_the_weights_of_the_torch_file(
    pair: nn.ModuleList, torch_file: Path, tmp_path: Path
) -> None:
    own = tmp_path / "vgg19.safetensors"
    convert_weights(WeightsRequest(file=torch_file, out=own, source="vgg19"))
    assert load_vgg(pair, torch_file) == VGGOrigin(file_digest(torch_file), is_imagenet=False)
    first = {name: tensor.clone() for name, tensor in pair.state_dict().items()}
    assert load_vgg(pair, own) == VGGOrigin(file_digest(own), is_imagenet=False)
    assert all(torch.equal(first[name], tensor) for name, tensor in pair.state_dict().items())
    assert torch.equal(first["0.conv3_4.weight"], first["1.conv3_4.weight"])
    assert not any(p.requires_grad for p in pair.parameters())


def test_only_the_published_file_and_what_is_made_of_it_count_as_imagenet(
    pair: nn.ModuleList, torch_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert IMAGENET_DIGEST == "dcbb9e9d"  # of torchvision.models.VGG19_Weights.IMAGENET1K_V1: vgg19-dcbb9e9d.pth
    own, bare = tmp_path / "vgg19.safetensors", tmp_path / "bare.safetensors"
    convert_weights(WeightsRequest(file=torch_file, out=own, source="vgg19"))
    bare.write_bytes(own.read_bytes())
    assert not load_vgg(pair, torch_file).is_imagenet
    monkeypatch.setattr(vgg, "IMAGENET_DIGEST", file_digest(torch_file)[:8])
    assert load_vgg(pair, torch_file).is_imagenet
    assert load_vgg(pair, own).is_imagenet  # its card tells where it is from
    assert not load_vgg(pair, bare).is_imagenet  # without a card nobody knows


def test_a_file_that_its_card_does_not_describe_is_refused(
    pair: nn.ModuleList, torch_file: Path, weights: Weights, tmp_path: Path
) -> None:
    own = tmp_path / "vgg19.safetensors"
    convert_weights(WeightsRequest(file=torch_file, out=own, source="vgg19"))
    save_file({**weights, "features.0.bias": torch.ones(64)}, own)
    before = {name: tensor.clone() for name, tensor in pair.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load_vgg(pair, own)
    assert (error.value.code, error.value.exit_code) == ("weights_altered", 7)
    assert all(torch.equal(before[name], tensor) for name, tensor in pair.state_dict().items())


def changed(weights: Weights, how: str) -> Weights:
    if how == "vgg16":  # its fourth stage begins where VGG-19 has conv3_4
        return {name: t for name, t in weights.items() if not name.startswith("features.16.")}
    if how == "grey":
        return {**weights, "features.0.weight": weights["features.0.weight"].sum(1, keepdim=True)}
    return {**weights, "features.12.bias": torch.full((256,), float("nan"))}


@pytest.mark.parametrize(
    ("how", "told"),
    [("vgg16", "features.16.weight: missing"), ("grey", "(64, 1, 3, 3)"), ("nan", "features.12.bias: holds NaN")],
)
def test_other_weights_are_refused_and_nothing_changes(
    pair: nn.ModuleList, weights: Weights, tmp_path: Path, how: str, told: str
) -> None:
    path = tmp_path / "other.safetensors"
    save_file(changed(weights, how), path)
    before = {name: tensor.clone() for name, tensor in pair.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load_vgg(pair, path)
    assert error.value.exit_code == 7
    assert told in error.value.where
    assert "vgg19-dcbb9e9d.pth" in error.value.fix
    assert all(torch.equal(before[name], tensor) for name, tensor in pair.state_dict().items())


def test_missing_and_broken_files_are_refused(pair: nn.ModuleList, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        load_vgg(pair, tmp_path / "none.pth")
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04cut")
    with pytest.raises(CheckpointError):
        load_vgg(pair, tmp_path / "cut.pth")
    with pytest.raises(ValueError, match="no VGG encoder"):
        load_vgg(nn.Linear(1, 1), tmp_path / "none.pth")
