"""ConvNeXt against Hugging Face's, and its promises as a backbone."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from medssl_cli.core.errors import ConfigError
from medssl_cli.models.convnext import ConvNeXt
from medssl_cli.models.zoo import StudentConfig, build_backbone

TINY: dict[str, Any] = {"depths": (1, 2, 2, 1), "dims": (8, 16, 24, 32)}


def small(**settings: Any) -> ConvNeXt:
    torch.manual_seed(0)
    model = ConvNeXt(**{**TINY, "layer_scale": 0.5, **settings})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def hugging_face() -> Any:
    import transformers as hf

    torch.manual_seed(1)
    config = hf.ConvNextConfig(
        hidden_sizes=list(TINY["dims"]), depths=list(TINY["depths"]), layer_scale_init_value=0.6, layer_norm_eps=1e-6
    )
    model = hf.ConvNextModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def public_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's names as those of the public files."""
    rules = (
        (r"^embeddings\.patch_embeddings\.", "downsample_layers.0.0."),
        (r"^embeddings\.layernorm\.", "downsample_layers.0.1."),
        (r"^encoder\.stages\.(\d)\.downsampling_layer\.(\d)\.", r"downsample_layers.\1.\2."),
        (r"^encoder\.stages\.(\d)\.layers\.(\d+)\.", r"stages.\1.\2."),
        (r"layer_scale_parameter$", "gamma"),
        (r"layernorm\.", "norm."),
    )
    out = {}
    for old, tensor in state.items():
        name = old
        for pattern, text in rules:
            name = re.sub(pattern, text, name)
        out[name] = tensor
    return out


@pytest.mark.parametrize("size", [(224, 224), (64, 96), (70, 33)])
def test_features_equal_hugging_face(size: tuple[int, int]) -> None:
    theirs, ours = hugging_face(), ConvNeXt(**TINY).eval()
    ours.load_state_dict(public_names(theirs.state_dict()), strict=True)
    picture = images(2, 3, *size)
    with torch.no_grad():
        expected = theirs(picture, output_hidden_states=True)
        found, maps = ours(picture), ours.forward_maps(picture)
        tokens = theirs.layernorm(expected.last_hidden_state.flatten(2).transpose(1, 2))
    torch.testing.assert_close(found.cls_BD, expected.pooler_output, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.patches_BND, tokens, atol=1e-5, rtol=0)
    for each, hidden in zip(maps, expected.hidden_states[-4:], strict=True):
        torch.testing.assert_close(each, hidden, atol=1e-5, rtol=0)
    assert found.grid == (1, *expected.last_hidden_state.shape[-2:])
    assert found.registers_BRD.shape == (2, 0, 32)


@pytest.mark.parametrize(
    ("size", "count"), [("tiny", 27_820_128), ("small", 49_454_688), ("base", 87_566_464), ("large", 196_230_336)]
)
def test_sizes_have_the_published_counts_without_the_classifier(size: str, count: int) -> None:
    """28.6, 50.2, 88.6 and 197.8 million of Liu et al. 2022 with the 1000 classes."""
    with torch.device("meta"):
        model = build_backbone(StudentConfig(arch=f"convnext_{size}"), 224, None, stochastic_depth=False)
    assert sum(p.numel() for p in model.parameters()) == count
    published = {"tiny": 28_589_128, "small": 50_223_688, "base": 88_591_464, "large": 197_767_336}[size]
    assert count + 1000 * (model.embed_dim + 1) == published


def test_maps_have_strides_4_8_16_32_and_a_bright_spot_lies_at_its_place() -> None:
    model, picture = small(), torch.zeros(1, 3, 96, 64)
    base = model.forward_maps(picture)
    assert [tuple(each.shape[1:]) for each in base] == [(8, 24, 16), (16, 12, 8), (24, 6, 4), (32, 3, 2)]
    picture[0, :, 40:44, 20:24] = 50.0
    for stride, before, after in zip((4, 8, 16, 32), base, model.forward_maps(picture), strict=True):
        change = (after - before).norm(dim=1)[0]
        row, column = divmod(int(change.argmax()), change.shape[1])
        assert (row, column) == (40 // stride, 20 // stride), stride


def test_a_grey_picture_is_three_equal_channels() -> None:
    model, grey = small(), images(2, 1, 64, 64)
    torch.testing.assert_close(model(grey).cls_BD, model(grey.expand(-1, 3, -1, -1)).cls_BD, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="2 channels, the first convolution takes 3 or 1"):
        model(images(1, 2, 64, 64))
    with pytest.raises(ValueError, match="at least 32 x 32 are needed"):
        model(images(1, 3, 64, 24))


def test_masks_and_absence_are_refused_not_ignored() -> None:
    model, picture = small(), images(2, 3, 64, 64)
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    assert torch.equal(model(picture, nothing, torch.ones(2, 1, dtype=torch.bool)).cls_BD, model(picture).cls_BD)
    nothing[1, 2] = True
    with pytest.raises(ValueError, match="no mask token"):
        model(picture, nothing)
    with pytest.raises(ValueError, match="no channel may be absent"):
        model(picture, None, torch.zeros(2, 1, dtype=torch.bool))


def test_lists_needed_tokens_and_layers_are_the_plain_pass() -> None:
    model = small()
    crops = [images(2, 3, 64, 64), images(3, 3, 32, 32, seed=1)]
    whole = model.forward_list(crops, [None, None], [None, None])
    index = torch.tensor([7, 0, 3])
    (cls, patches), (_, none) = model.forward_needed(crops, [None, None], [None, None], [index, None])
    assert torch.equal(whole[1].cls_BD, model(crops[1]).cls_BD)
    assert torch.equal(cls, whole[0].cls_BD)
    assert torch.equal(patches, whole[0].patches_BND.flatten(0, 1)[index])
    assert none.shape == (0, 32)
    last, second = model.forward_layers(crops[0], [-1, 1])
    assert torch.equal(last.patches_BND, whole[0].patches_BND)
    assert second.patches_BND.shape == (2, 64, 16)
    assert second.grid == (1, 8, 8)
    torch.testing.assert_close(second.patches_BND.mean(-1), torch.zeros(2, 64), atol=1e-6, rtol=0)
    same_width = small(dims=(8, 8, 32, 32))
    inner = same_width.forward_maps(crops[0])[2].flatten(2).transpose(1, 2)
    expected = (inner - inner.mean(-1, keepdim=True)) / (inner.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    (third,) = same_width.forward_layers(crops[0], [2])
    torch.testing.assert_close(third.patches_BND, expected, atol=1e-5, rtol=0)  # not with the last stage's norm


def test_stochastic_depth_follows_the_seed_rises_and_is_off_in_evaluation() -> None:
    model = small(drop_path_rate=0.5)
    assert model.drop_rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    picture, quiet = images(8, 3, 64, 64), model(images(8, 3, 64, 64)).cls_BD

    def noisy(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model.train()(picture).cls_BD.detach()

    assert torch.equal(noisy(1), noisy(1))
    assert not torch.equal(noisy(1), noisy(2))
    assert torch.equal(model.eval()(picture).cls_BD, quiet)
    torch.manual_seed(0)
    factors = torch.cat([model.train()._drops(picture)[-1].flatten() for _ in range(100)])  # type: ignore[union-attr]
    assert set(factors.tolist()) == {0.0, 2.0}
    assert 0.9 < float(factors.mean()) < 1.1


def test_recomputation_gives_the_same_gradients() -> None:
    grads = []
    for checkpointing in (False, True):
        model = small(drop_path_rate=0.4, grad_checkpointing=checkpointing).train()
        torch.manual_seed(2)
        model(images(4, 3, 64, 64)).cls_BD.sin().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert grad is not None, name
        torch.testing.assert_close(grads[1][name], grad, msg=name)


def test_settings_of_a_configuration_and_what_has_no_effect() -> None:
    config = StudentConfig(arch="convnext_tiny", embed_dim=64, depth=5, drop_path_rate=0.1)
    model = build_backbone(config, 64, None, stochastic_depth=True)
    assert isinstance(model, ConvNeXt)
    assert (model.settings["depths"], model.settings["dims"]) == ([1, 1, 2, 1], [8, 16, 32, 64])
    assert model.drop_rates[-1] == pytest.approx(0.1)
    assert StudentConfig.model_validate(config.model_dump()) == config
    with pytest.raises(ValueError, match="no effect: num_register_tokens"):
        StudentConfig(arch="convnext_tiny", num_register_tokens=4)
    with pytest.raises(ValueError, match="patch_size 32"):
        StudentConfig(arch="convnext_tiny", patch_size=16)
    with pytest.raises(ConfigError) as caught:
        build_backbone(config, 64, ["t2", "adc"], stochastic_depth=True)
    assert "t2, adc" in caught.value.where
